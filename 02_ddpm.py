"""02 · DDPM at full size: a U-Net with attention, trained for minutes or for days.

    python 02_ddpm.py
    torchrun --nproc_per_node=4 02_ddpm.py        # on 4 GPUs of one machine

Loss and sampler are those of 01, to the last character. New is what separates a toy from a model
that one trains in earnest: a U-Net of residual blocks with self-attention, the cosine noise
schedule, weights averaged over the training, mixed precision, a checkpoint from which a stopped
training goes on as if it had never stopped, and training on several GPUs.

You see a progress bar per epoch, and in `outputs/02_ddpm/` a grid of samples every few epochs, at
the end the pictures of 01, the checkpoint, and `loss_per_timestep.png`: why samples go on improving
when the loss hardly falls. Stop with Ctrl-C whenever you like; the same command goes on, and after
the end it only samples again. With `python -i` you can then play: `ddpm.sample(n=16)`.

Measured with these settings on MNIST, two cores of an AMD EPYC (Zen 3), PyTorch 2.14.1: 16 to
18 min, start to last picture, with 1.3 GB of memory. Scores by `tests/benchmark.py`: Fréchet
distance 14 (01: 61, real images: 6), 92 % read with confidence. Not yet timed on a GPU.

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Improved DDPM = Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models,
arXiv:2102.09672

Code              Paper         Shape          Meaning
x_0               x_0           (B, C, H, W)   images in [-1, 1]
x_t, x_prev       x_t, x_{t-1}  (B, C, H, W)   an image with the noise of step t; one step before
noise             ε             (B, C, H, W)   Gaussian noise, mean 0, variance 1
noise_pred        ε_θ(x_t, t)   (B, C, H, W)   the network's guess of that noise
x_0_pred          x̂_0           (B, C, H, W)   the image that follows from this guess
t                 t             (B,)           0 ... T-1 in code, 1 ... T in the paper; x_0: -1
betas             β             (T,)           variance of the noise that a step adds
alphas            α = 1 - β     (T,)           share of the image's variance that it keeps
alphas_cumprod    ᾱ             (T,)           product of the alphas: the share left at step t;
                                               alphas_cumprod[t] is the paper's ᾱ_{t+1}
"""

# %% 1. Settings: edit and run again

import copy
import io
import math
import os
import random
import signal
import socket
import sys
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from time import time as now

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from utils.visualize import (
    denoising_gif,
    denoising_strip,
    draw_digits,
    loss_curve,
    sample_grid,
    timestep_losses,
)

# A checkpoint can be resumed only with the settings that it was made with. To train with others,
# delete outputs/02_ddpm/checkpoint.pt or set another OUT_DIR.
ON_GPU = torch.cuda.is_available()  # no setting: an NVIDIA GPU gets the larger values below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", or "DRAWN": digits drawn offline
T = 1000  # noise steps, in training and in sampling; with half as many, sampling takes half as long
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 64 if ON_GPU else 16  # channels at full resolution; DDPM's code has 128 for CIFAR-10
CHANNEL_MULT = (1, 2, 4)  # channels of each level in multiples of BASE_CH; 28 → 14 → 7 pixels
NUM_BLOCKS = 2 if ON_GPU else 1  # residual blocks per level
ATTENTION_AT = (14, 16)  # sides with self-attention: MNIST's 14, CIFAR10's 16; the middle has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # against learning photographs by heart
FLIP = DATASET == "CIFAR10"  # mirror half of the images; never digits: a mirrored 3 is no digit
EPOCHS = 30 if ON_GPU else 6  # passes through the data; CIFAR10 needs hundreds (DDPM: 2,000)
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # at its highest, for Muon (AdamW gets a fifth); halve it if the loss jumps
EMA_DECAY = 0.9999  # memory of the averaged weights; felt only in runs of over 90,000 steps
PREVIEW_EVERY = 2  # epochs from one sample grid to the next
COMPILE = False  # True: torch.compile, a minute or more of waiting and then faster steps
SEED = 0  # same seed on the same CPU: same digits
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"  # where data sets are looked for and downloaded to
OUT_DIR = ROOT / "outputs" / "02_ddpm"  # where pictures and the checkpoint are saved


# %% 2. Data


def load_images(name, folder):
    """Return the training images, uint8 (N, C, H, W), labels, int64 (N,), and the data set's name.

    The labels, 0 ... 9, have no part before 03. If MNIST is not in `folder` and cannot be
    downloaded, drawn digits take its place and a line says why. If any other data set is missing,
    the program ends.
    """
    if name == "DRAWN":
        images, labels = draw_digits()
        return images[:, None], labels, name
    socket.setdefaulttimeout(20)  # seconds: a dead connection is an error, not an endless wait
    try:
        data = getattr(torchvision.datasets, name)(folder, train=True, download=True)
    except Exception as error:  # no network, a full disk, a damaged file: all end the same way
        reason = f"{name} could be neither read from {folder} nor downloaded ({error})."
        reason = " ".join(reason.split()) + " If its files are there, delete them: they are damaged"
        if name != "MNIST":
            sys.exit(f"{reason}. If not, put them there, or set DATASET = 'DRAWN': it needs none.")
        print(f"{reason}. Going on with DRAWN digits.")
        return load_images("DRAWN", folder)
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    grey = images.ndim == 3  # (N, H, W); colour is (N, H, W, 3)
    return (images[:, None] if grey else images.permute(0, 3, 1, 2)), labels, name


# %% 3. Noise schedule and forward process


def linear_beta_schedule(T):
    """Return β of T steps, float64 (T,): DDPM section 4, from 1e-4 to 0.02 at T = 1000.

    Fewer steps must each add more noise, or the last image would not be noise: hence 1000 / T.
    With T = 20 or less that reaches 1, which leaves nothing of the image, and is cut off.
    """
    return (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)


def cosine_beta_schedule(T):
    """Return β of T steps, float64 (T,): Improved DDPM, section 3.2, with s = 0.008.

    The linear schedule drowns an image too soon: the last fifth of its steps is almost pure noise
    and teaches little. Here ᾱ falls along a cosine, evenly in the middle and gently at both ends.
    """
    s = 0.008  # else the first steps would add so little noise that it is hard to predict
    # Improved DDPM Eq. 17:  ᾱ_t = f(t) / f(0),  f(t) = cos²( (t/T + s) / (1 + s) · π/2 )
    t = torch.arange(T + 1, dtype=torch.float64)  # here as in the paper: 0 is the clean image
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    # β_t = 1 − ᾱ_t / ᾱ_{t−1}, cut off at 0.999: else ᾱ_T would be 0, and x̂_0 a division by it.
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def q_sample(x_0, t, noise, alphas_cumprod):
    """Add the noise of all steps up to t (B,) to images x_0 (B, C, H, W) in one go.

    q is the paper's name for the process that adds noise, p for the one that removes it.
    """
    alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    # DDPM Eq. 2, one step:  x_t = √α_t · x_{t−1} + √β_t · ε.  The sum of independent Gaussians is
    # one, and their variances add up, here to 1 − ᾱ_t. So all steps up to t together are
    # DDPM Eq. 4:  x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


# %% 4. U-Net


def timestep_embedding(t, dim):
    """Turn steps t (B,) into vectors (B, dim), dim even: sines and cosines, fast to slow.

    They tell neighbouring steps apart better than one number could; the position encoding of
    Vaswani et al. 2017 (arXiv:1706.03762, section 3.5) but for its order; DDPM, appendix B.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(ch):
    """Return a GroupNorm for ch channels: 8 groups, or fewer where 8 does not divide ch."""
    # It normalises each image by itself; BatchNorm would mix noise levels.
    return nn.GroupNorm(math.gcd(8, ch), ch)


def zero_init(layer):
    """Set a layer's weights to zero: a block that ends with it starts as just its shortcut."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """Let each place of x (B, ch, H, W) gather from all other places what concerns it.

    Each place holds a value, offers a key and asks a query; it receives the mean of all values,
    weighted by how well their keys match its query. Several heads do so side by side, each with its
    share of the channels. A convolution sees 3 × 3 places, attention sees the whole image at once;
    but its cost grows with the square of their number, hence only at coarse levels.
    """

    def __init__(self, ch):
        super().__init__()
        # About 64 channels for each head (arXiv:2105.05233); fewer than 128 channels have one head.
        self.heads = math.gcd(ch, max(1, ch // 64))  # gcd: the heads must divide ch
        self.norm, self.qkv = group_norm(ch), nn.Conv2d(ch, 3 * ch, 1)
        self.out = zero_init(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        query, key, value = qkv.transpose(-1, -2).unbind(1)  #        (B, heads, H·W, C/heads) each
        # softmax(query · keyᵀ / √(C/heads)) · value, mostly without storing that (H·W)² matrix
        h = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, steered by t; then, where wanted, attention.

    Takes x (B, in_ch, H, W) and t as `time` (B, time_dim), returns (B, out_ch, H, W).
    """

    def __init__(self, in_ch, out_ch, time_dim, dropout, attention=False):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_ch)
        self.norm_2, self.dropout = group_norm(out_ch), nn.Dropout(dropout)
        self.conv_2 = zero_init(nn.Conv2d(out_ch, out_ch, 3, padding=1))
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.attention = Attention(out_ch) if attention else nn.Identity()

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, out_ch, 1, 1) each
        h = self.conv_1(F.silu(self.norm_1(x)))
        # Improved DDPM, appendix A: t scales and shifts the channels (DDPM only shifts them).
        h = F.silu(self.norm_2(h) * (1 + scale) + shift)
        return self.attention(self.shortcut(x) + self.conv_2(self.dropout(h)))


class UNet(nn.Module):
    """Guess the noise in x_t (B, C, side, side) at step t (B,): after DDPM, appendix B.

    From level to level the side halves: it must be divisible by 2 once per entry of ch_mult after
    the first. attention_at: sides at which the blocks have attention. alphas_cumprod: ᾱ, float
    (T,). precision: the dtype of convolutions and matrix products; float32 is the safe one.
    """

    def __init__(
        self,
        image_shape,
        base_ch,
        ch_mult,
        num_blocks,
        attention_at,
        dropout,
        alphas_cumprod,
        precision=torch.float32,
    ):
        super().__init__()
        channels, side, _ = image_shape
        assert side % 2 ** (len(ch_mult) - 1) == 0, f"{side} pixels cannot be halved so often"
        self.precision, time_dim = precision, 4 * base_ch
        self.time = nn.Sequential(
            nn.Linear(2 * base_ch, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.conv_in = nn.Conv2d(channels, base_ch, 3, padding=1)
        widths = [base_ch * mult for mult in ch_mult]
        has_attention = [side // 2**level in attention_at for level in range(len(widths))]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        ch, skip_channels = base_ch, [base_ch]  # of h now; of each output that is handed across
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skip_channels.append(ch)
            for _ in range(num_blocks):
                self.down.append(ResBlock(ch, width, time_dim, dropout, has_attention[level]))
                ch = width
                skip_channels.append(ch)
        self.middle_1 = ResBlock(ch, ch, time_dim, dropout, attention=True)
        self.middle_2 = ResBlock(ch, ch, time_dim, dropout)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):  # + 1 for what conv_in or the halving handed across
                in_ch = ch + skip_channels.pop()
                self.up.append(ResBlock(in_ch, width, time_dim, dropout, has_attention[level]))
                ch = width
            if level > 0:
                grow = nn.Upsample(scale_factor=2), nn.Conv2d(ch, ch, 3, padding=1)
                self.up.append(nn.Sequential(*grow))
        self.norm_out = group_norm(ch)
        self.conv_out = zero_init(nn.Conv2d(ch, channels, 3, padding=1))
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, x_t, t):
        # Mixed precision: in here products are computed with 16 bits where the hardware is fast at
        # it; weights, sums over many values and everything outside stay float32.
        mixed = self.precision != torch.float32
        with torch.autocast(x_t.device.type, self.precision) if mixed else nullcontext():
            time = self.time(timestep_embedding(t, self.time[0].in_features))
            time = F.silu(time)  #                                       (B, time_dim)
            h = self.conv_in(x_t)  #                                     (B, base_ch, side, side)
            skips = [h]
            for layer in self.down:
                h = layer(h, time) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
            h = self.middle_2(self.middle_1(h, time), time)  #  (B, ch, side, side), the coarsest
            for layer in self.up:
                if isinstance(layer, ResBlock):
                    h = layer(torch.cat([h, skips.pop()], dim=1), time)
                else:
                    h = layer(h)
            h = self.conv_out(F.silu(self.norm_out(h)))  #               (B, channels, side, side)
        # As in 01: the exact h is v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0; with it this is ε.
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar_t).sqrt() * x_t + alpha_bar_t.sqrt() * h.float()


# %% 5. Loss and sampler


class DDPM:
    """The noise schedule around a network that guesses noise: its loss and its sampler.

    model: called as model(x_t, t), returns (B, C, H, W). betas: float64 (T,), each in (0, 1).
    image_shape: (C, H, W).
    """

    def __init__(self, model, betas, image_shape, device):
        self.model, self.T, self.image_shape, self.device = model, len(betas), image_shape, device
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)  # ᾱ of the step before
        # DDPM Eq. 7: given x_t and x_0, x_{t−1} is Gaussian, with mean μ̃_t and variance β̃_t:
        #   μ̃_t = √ᾱ_{t−1}·β_t / (1−ᾱ_t) · x_0 + √α_t·(1−ᾱ_{t−1}) / (1−ᾱ_t) · x_t
        mean_factor_x_0 = alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod)
        mean_factor_x_t = alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        #   β̃_t = (1−ᾱ_{t−1}) / (1−ᾱ_t) · β_t
        posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas
        # Computed in float64, in which a product of 1000 factors is exact enough; used in float32.
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        self.mean_factor_x_0 = mean_factor_x_0.float().to(device)
        self.mean_factor_x_t = mean_factor_x_t.float().to(device)
        self.posterior_std = posterior_variance.sqrt().float().to(device)

    def loss(self, x_0):
        """Return the loss of images x_0 (B, C, H, W) in [-1, 1]: DDPM Algorithm 1, weighted."""
        t = torch.randint(self.T, (len(x_0),), device=self.device)  # 0 ... T-1, all of them
        noise = torch.randn_like(x_0)
        noise_pred = self.model(q_sample(x_0, t, noise, self.alphas_cumprod), t)
        error = (noise - noise_pred).square().flatten(1).mean(dim=1)  # (B,)
        # DDPM Eq. 14 is the plain mean of ‖ε − ε_θ(x_t, t)‖². Any weight for each t has the same
        # ideal answer; ours is 1/√ᾱ_t. With our U-Net the error is ᾱ_t · ‖v − h‖²: where noise
        # outweighs the image, and it is decided which digit it will be, so small that in a short
        # training it hardly counts.
        return (error / self.alphas_cumprod[t].sqrt()).mean()

    def p_sample(self, x_t, t):
        """Go one step back, from x_t (B, C, H, W) at step t, an int: return x_prev, x_0_pred."""
        noise_pred = self.model(x_t, torch.full((len(x_t),), t, device=self.device))
        alpha_bar_t = self.alphas_cumprod[t]
        # DDPM Eq. 15:  x̂_0 = (x_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t
        x_0_pred = (x_t - (1 - alpha_bar_t).sqrt() * noise_pred) / alpha_bar_t.sqrt()
        # 1/√ᾱ_t magnifies what is wrong with ε_θ: where sampling begins 157 times with the linear
        # schedule, 20,000 times with the cosine one. (Our U-Net undoes that, as it multiplies h by
        # √ᾱ_t; one that returns ε itself does not.) No image has values beyond [-1, 1], so neither
        # may x̂_0; DDPM's own code clamps it too. (Unclamped, all this is Algorithm 2, line 4, with
        # σ_t² = β̃_t, one of the two choices of section 3.2.)
        x_0_pred = x_0_pred.clamp(-1, 1)
        # From strong noise x̂_0 is but a blur, the mean of all images it may be, so we go only one
        # step towards it (DDPM Eq. 7), and add fresh noise to have as much as the network expects
        # in an image of step t − 1.
        x_prev = self.mean_factor_x_0[t] * x_0_pred + self.mean_factor_x_t[t] * x_t
        if t > 0:  # Algorithm 2, line 3: none in the last step (β̃ is 0 there anyway, but β is not)
            x_prev = x_prev + self.posterior_std[t] * torch.randn_like(x_t)
        return x_prev, x_0_pred

    @torch.no_grad()
    def sample(self, n=16, frames=None):
        """Make n new images out of noise, (n, C, H, W) in [-1, 1]: DDPM Algorithm 2.

        frames: a list that is given up to 51 stages (t, x_t, x_0_pred) of the way, for pictures;
        the last one holds the finished images and has t = -1.
        """
        x_t = torch.randn(n, *self.image_shape, device=self.device)
        for t in tqdm(reversed(range(self.T)), "Sampling", self.T, unit=" steps"):
            x_prev, x_0_pred = self.p_sample(x_t, t)
            if frames is not None and (self.T - 1 - t) % math.ceil(self.T / 50) == 0:
                frames.append((t, x_t, x_0_pred))
            x_t = x_prev
        if frames is not None:
            frames.append((-1, x_t, x_t))
        return x_t


# Why does the loss stop falling while the samples still improve?
#
# In the first epoch the training loss falls from 0.61 to 0.060, and in five more to 0.052: a flat,
# noisy line, in which one batch differs from the next by 8 %. Yet the digits turn from scribbles
# into handwriting. `loss_per_timestep.png` shows why; the numbers below are those of the default
# run on MNIST, for the plain squared error, without the weight of `DDPM.loss`.
#
# - At small t the image is nearly clean and the noise faint. Within a stroke nobody can tell faint
#   noise from detail, so most of that error stays: at t = 100, 5 % of it went after the first
#   epoch. (Not at t = 0: there 31 % went, for on plain black even the faintest noise shows.) But
#   that error is large: the first fifth of the steps makes up half of the plain mean, more than a
#   third of the training loss, and hides the rest.
# - In the middle, t = 500 to 800, it is decided which digit it will be and where its strokes run.
#   The error there is small, and 13 % of it went. That counts: the squared error of x̂_0 is it
#   times (1−ᾱ_t)/ᾱ_t, 1 at t = 500 and 10 at t = 800, and later steps hardly mend what goes wrong.
# - Near t = T the image is nothing but noise. What can be known there is learned at once.
#
# And everywhere most of what remains is not the network's fault: even the best possible one does
# not know the noise, only its mean given x_t. Samples suffer from the network's distance to that
# best one alone, and a loss that falls by a few per cent may have lost most of it. So compare two
# diffusion models by their samples, or by the loss at each t, but never by the mean alone.


@torch.no_grad()
def loss_per_timestep(ddpm, x_0, count=50):
    """Return up to `count` timesteps and the mean squared error of the noise at each, as lists.

    x_0 (B, C, H, W) in [-1, 1]. The noise is the same at every call: two networks can be compared.
    """
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    # Not T - 1: there the error is nothing but rounding.
    timesteps = torch.linspace(0, ddpm.T - 2, min(count, ddpm.T - 1)).round().long().tolist()
    errors = []
    for timestep in timesteps:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        noise_pred = ddpm.model(q_sample(x_0, t, noise, ddpm.alphas_cumprod), t)
        errors.append((noise - noise_pred).square().mean().item())
    return timesteps, errors


# %% 6. Training


def best_precision(device):
    """Return the fastest dtype here that trains well: bfloat16, float16 or float32.

    bfloat16 has float32's range with fewer digits. float16, for older GPUs, has a smaller range:
    small gradients would become zero without the GradScaler in `Trainer`.
    """
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def best_layout(device):
    """Return the order in memory in which convolutions are fast: the channels of a pixel together.

    On two CPU cores a guess takes 15 % less time (02). Apple's GPUs gave wrong results with it.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def derive_seed(*parts):
    """Return a seed made of its parts, such as (SEED, "step", 7): the same in every run.

    Different parts give unrelated seeds. SEED + step would not: 0 + 7 and 1 + 6 are the same.
    """
    return random.Random(repr(parts)).getrandbits(63)


def to_batch(images, flip=False):
    """Turn images, uint8 0 ... 255, into float -1 ... 1; with flip, mirror about half of them."""
    x_0 = images.float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(len(x_0), 1, 1, 1, device=x_0.device) < 0.5
        x_0 = torch.where(mirrored, x_0.flip(3), x_0)
    return x_0


class Muon(torch.optim.Optimizer):
    """Momentum whose update moves a matrix of weights about equally far in all directions.

    It has nothing to do with diffusion, and Adam works too, but is slower: in 01, after 25,000
    images, the squared error of x̂_0 at t = 300 is 0.064 with Adam (learning rate 0.008, the best
    of five tried), 0.055 with Muon. weights: parameters of two or more dimensions; lr: about 0.02.
    Jordan et al. 2024, kellerjordan.github.io/posts/muon. (torch.optim.Muon takes no convolutions,
    and computes in bfloat16, which is slow on many CPUs.)
    """

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 0.05)
                u = weight.grad.lerp(average, 0.95).flatten(1)  # Nesterov; (out, in · kernel)
                u = u / (u.norm() + 1e-7)  # now all singular values σ are at most 1
                # Lift them to about 1, by steps of Newton and Schulz with Jordan's coefficients:
                for _ in range(5):  # σ ← 3.4445 σ − 4.7750 σ³ + 2.0315 σ⁵
                    gram = u @ u.T
                    u = 3.4445 * u + (2.0315 * gram @ gram - 4.7750 * gram) @ u
                step_size = group["lr"] * max(1, u.shape[0] / u.shape[1]) ** 0.5
                weight.sub_(step_size * u.view_as(weight))


def save_atomically(contents, path):
    """Save by way of a temporary file: whatever interrupts it leaves the old file whole."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)  # not to a file: a full disk would be no OSError, but a crash
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # waits until it is on the disk and survives a power cut
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Trainer:
    """A training that can stop after any step and go on later as if it had never stopped.

    On a CPU that holds to the last bit; a GPU may add numbers in another order every time.

    model: a network on its device, with weights in float32. loss: a function from the indices of a
    batch (B,) to its loss. count: how many images the indices choose from. settings: the constants
    at the head, by name; a checkpoint must agree with them. rank, world: the number of this
    process, and how many there are.
    """

    PARTS = "model", "averaged", "muon", "adamw", "scaler"  # have a state_dict each
    VALUES = "step", "losses", "extras"

    def __init__(self, model, loss, count, settings, rank=0, world=1):
        self.model, self.loss, self.count, self.settings = model, loss, count, settings
        self.rank, self.world, self.device = rank, world, next(model.parameters()).device
        if settings["BATCH_SIZE"] > count:
            sys.exit(f"BATCH_SIZE = {settings['BATCH_SIZE']} is more than the {count:,} images.")
        self.steps_per_epoch = count // settings["BATCH_SIZE"]  # the rest waits for another epoch
        self.total_steps = settings["EPOCHS"] * self.steps_per_epoch
        self.step, self.losses, self.stop_requested = 0, [], False
        self.extras = {}  # whatever else the checkpoint should keep
        self.saved_at = None  # when the checkpoint that this training knows of was written
        # The averaged weights are those that sample. They never see dropout: eval() is for good.
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        # Muon for the matrices inside the network; its authors leave the first layer, the last, all
        # vectors and embeddings (03 has one) to AdamW.
        inner, outer = [], []
        for name, weight in model.named_parameters():
            at_the_ends = any(part in name for part in ("conv_in", "conv_out", "embedding"))
            (outer if at_the_ends or weight.ndim == 1 else inner).append(weight)
        self.muon = Muon(inner, lr=0)  # train_step sets both learning rates
        # betas: a shorter memory than by default, for short trainings. fused: all weights at once.
        # No weight decay: these are mostly biases and gains, which have no reason to shrink.
        options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self.adamw = torch.optim.AdamW(outer, lr=0, **options)
        float16 = getattr(model, "precision", None) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=float16)

    def learning_rate(self):
        """Rise over the first 5 % of the steps, then fall to zero along a cosine."""
        rise = (self.step + 1) / (0.05 * self.total_steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * self.step / self.total_steps)
        return self.settings["LEARNING_RATE"] * min(rise, fall)

    def train_step(self, index):
        """Learn from the images at index (B,); return their loss, a tensor on the device."""
        # The random numbers of a step (t, noise, dropout, mirroring) come from a seed of its own,
        # not from what went before: its number is all the random state that a restart needs.
        torch.manual_seed(derive_seed(self.settings["SEED"], "step", self.step, self.rank))
        self.muon.param_groups[0]["lr"] = self.learning_rate()
        self.adamw.param_groups[0]["lr"] = self.learning_rate() / 5
        loss = self.loss(index)
        self.model.zero_grad()
        self.scaler.scale(loss).backward()  # the scaler does nothing unless it is float16
        for optimizer in self.muon, self.adamw:
            self.scaler.unscale_(optimizer)
        # Both optimizers scale their updates; clipping keeps one freak batch out of their memories.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # float16: gradients that became infinite spoil the norm, and with it all others, so the
        # step is left out, and the scaler scales less from now on.
        if not self.scaler.is_enabled() or norm.isfinite():
            for optimizer in self.muon, self.adamw:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        # EMA, exponential moving average:  average ← decay · average + (1 − decay) · weights.
        # It reaches back over about 1 / (1 − decay) steps. 10,000 of them would in a short training
        # be mostly the random weights of the start, so at first it reaches over the last ninth of
        # the steps so far, until EMA_DECAY reaches less far.
        decay = min(self.settings["EMA_DECAY"], (1 + self.step) / (10 + self.step))
        with torch.no_grad():  # foreach: one call for all weights
            averages, weights = list(self.averaged.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, 1 - decay)
        return loss.detach()

    def train_epoch(self):
        """Train to the end of the epoch, or until a stop is requested."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        batch_size, epochs = self.settings["BATCH_SIZE"], self.settings["EPOCHS"]
        seed = derive_seed(self.settings["SEED"], "order", epoch)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        batches = order[: self.steps_per_epoch * batch_size].view(-1, batch_size).to(self.device)
        losses = []
        bar = tqdm(
            desc=f"Epoch {epoch + 1}/{epochs}",
            total=batches.numel(),
            initial=first * batch_size,
            unit=" images",
            unit_scale=True,
            disable=self.rank > 0,
        )
        with bar:
            # Each process has shuffled alike, and takes every world-th image of each batch.
            for index in batches[first:, self.rank :: self.world]:
                losses.append(self.train_step(index))  # no .item(): it waits for the GPU
                bar.update(batch_size)
                last = self.stop_requested or self.step % self.steps_per_epoch == 0
                if last or len(losses) % 50 == 0:  # last: a checkpoint follows, it must be sound
                    bar.set_postfix(loss=f"{self.checked_mean(losses[-50:]):.4f}")
                if last:
                    break
        losses = torch.stack(losses)
        if self.world > 1:  # so far each process knows only the loss of its share
            dist.all_reduce(losses)
        self.losses += (losses / self.world).tolist()

    def checked_mean(self, losses):
        """Return the mean loss as a number; end the program if it or a weight is not finite."""
        mean = torch.stack(losses).mean()
        weights = torch.stack([weight.detach().sum() for weight in self.model.parameters()])
        if not torch.isfinite(mean + weights.sum()):
            sys.exit(
                f"The loss or a weight became NaN or infinite before step {self.step}. Usually "
                f"LEARNING_RATE = {self.settings['LEARNING_RATE']} is too high: halve it and "
                "start anew. The checkpoint of the last sound epoch was left as it is."
            )
        return mean.item()

    def request_stop(self, *_):
        """Answer Ctrl-C: the first one lets the step under way finish, the second one does not.

        In the middle of a step some weights have changed and others have not.
        """
        if self.stop_requested:
            sys.exit("Stopped at once. The checkpoint of the last epoch is whole.")
        self.stop_requested = True
        print("\nStopping after the step or picture under way; Ctrl-C again stops at once.")

    def run(self, path):
        """Train to the end or to Ctrl-C; after each epoch save a checkpoint and yield its number.

        Whatever the caller does between two epochs has no influence on the training.
        """
        # Several processes would have to agree on the step to stop at; they stop at once, and go on
        # from the last whole epoch.
        before = signal.getsignal(signal.SIGINT)
        if self.world == 1:
            signal.signal(signal.SIGINT, self.request_stop)
        try:
            while self.step < self.total_steps and not self.stop_requested:
                self.train_epoch()
                if self.rank == 0:
                    self.save(path)
                if not self.stop_requested:
                    yield self.step // self.steps_per_epoch
        finally:
            signal.signal(signal.SIGINT, before)
        if self.stop_requested or self.step < self.total_steps:
            sys.exit(
                f"Stopped at step {self.step} of {self.total_steps}. The same command goes on."
            )

    def save(self, path):
        """Write all that the training has changed, and its settings, to path.

        A checkpoint of another run there, perhaps further on, is left as it is, and this run ends.
        """
        if path.exists() and path.stat().st_mtime_ns != self.saved_at:
            sys.exit(f"Another run has written {path} meanwhile. This one stops.")
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {name: getattr(self, name) for name in self.VALUES}
        save_atomically({"settings": self.settings, **state}, path)
        self.saved_at = path.stat().st_mtime_ns

    def resume(self, path):
        """Go on from the checkpoint in path, if there is one.

        A file that cannot be read or has other settings ends the program and is left untouched.
        """
        if not path.exists():
            return
        self.saved_at = path.stat().st_mtime_ns
        start_anew = f"To start anew, move or delete {path}, or set OUT_DIR to another folder."
        try:  # weights_only: a file from somebody else cannot run code
            state = torch.load(path, map_location=self.device, weights_only=True)
            saved = dict(state["settings"])
        except Exception as error:  # cut short, damaged, another program's: all end the same way
            reason = " ".join(str(error).split())[:100]
            sys.exit(
                f"{path} is damaged or is no checkpoint of this script ({reason}). {start_anew}"
            )
        different = [
            f"{name} was {saved.get(name)!r} and now is {value!r}"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if different:
            sys.exit(
                f"{path} comes from a training with other settings: {', '.join(different)}. To go "
                f"on with it, set them back. {start_anew}"
            )
        try:
            for name in self.PARTS:
                if state[name] or name != "scaler":  # empty in a training without float16
                    getattr(self, name).load_state_dict(state[name])
            for name in self.VALUES:
                setattr(self, name, state[name])
        except Exception as error:
            reason = " ".join(str(error).split())[:100]
            sys.exit(f"{path} does not fit the network of this script ({reason}). {start_anew}")
        print(f"Going on from step {self.step:,} of {self.total_steps:,}.")


# %% 7. Run


def explain(kind, error, traceback):
    """Say in one line what to do about full memory, a failed file or Ctrl-C; else the traceback."""
    reason = " ".join(str(error).split())[:200]
    full = "out of memory", "can't allocate memory", "not enough memory"  # GPU; Linux; Windows
    if kind is MemoryError or any(words in reason for words in full):
        reason = f"Not enough memory: reduce BATCH_SIZE or BASE_CH ({reason})."
    elif issubclass(kind, OSError):
        reason = f"Reading or writing failed: {reason}. Make room, or set another OUT_DIR."
    elif kind is KeyboardInterrupt:
        reason = "Stopped."
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(f"\n{reason} What was saved before is whole.", file=sys.stderr)


def make_folder(path):
    """Return the folder for the results; end the program now if no file can be made there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for leftover in folder.glob(".*.part"):  # of a run that was killed while it saved
            if now() - leftover.stat().st_mtime > 60:  # not of one that is saving now
                leftover.unlink(missing_ok=True)
    except OSError as error:
        sys.exit(f"OUT_DIR = {str(path)!r} does not work: {error}.")
    return folder


def pick_device():
    """Return the fastest device here: an NVIDIA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def join_processes():
    """Return the number of this process, its rank, and how many processes there are.

    torchrun starts one process per GPU and tells each of them who it is; without it there is one.
    """
    names = ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in names)
    if ON_GPU:
        torch.cuda.set_device(local_rank)  # from here on "cuda" means this process's GPU
    if world > 1:
        nccl = ON_GPU and dist.is_nccl_available()  # Windows has none
        backend, own_gpu = ("nccl", torch.device("cuda", local_rank)) if nccl else ("gloo", None)
        # Two hours, as the others must wait while the first process downloads or makes samples.
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=own_gpu)
    if rank > 0:
        sys.stdout = io.StringIO()  # one process speaks for all
    return rank, world


def leave_processes(world):
    """End the communication; no process may end its own while another still needs it."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def load_images_in_turn(name, folder, rank, world):
    """As load_images, one process after the other: the first downloads, the others find it."""
    for turn in range(world):
        if turn == rank:
            data = load_images(name, folder)
        if world > 1:
            dist.barrier()  # everyone waits here until all have come
    return data


def check_agreement(start, world):
    """End the program unless start, a tuple of what a process starts with, is the same in all."""
    everyone = [start] * world
    if world > 1:
        dist.all_gather_object(everyone, start)
    if any(other != start for other in everyone):
        sys.exit(f"The processes differ: {everyone}. All need the same DATA_DIR and OUT_DIR.")


def check_setting(name, value, kind, lowest=None, highest=None):
    """End the program with one clear line if a setting is of the wrong kind or out of range."""
    numbers = {int: "a whole number", (int, float): "a number"}
    wanted = {**numbers, bool: "True or False", (str, Path): "the path of a folder"}[kind]
    works = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind in numbers:
        works, wanted = works and lowest <= value <= highest, f"{wanted}, {lowest} to {highest}"
    if not works:
        sys.exit(f"{name} = {value!r} does not work: it must be {wanted}.")


def check_settings(settings, world):
    """End the program with one clear line if a setting does not work; settings: by name."""
    for name, allowed in (
        ("DATASET", ("MNIST", "FashionMNIST", "CIFAR10", "DRAWN")),
        ("SCHEDULE", ("cosine", "linear")),
    ):
        if settings[name] not in allowed:
            sys.exit(f"{name} = {settings[name]!r} is not {' or '.join(map(repr, allowed))}.")
    for name, kind, lowest, highest in (
        ("T", int, 2, 100_000),
        ("BASE_CH", int, 1, 1024),
        ("NUM_BLOCKS", int, 1, 16),
        ("DROPOUT", (int, float), 0, 0.9),
        ("EPOCHS", int, 1, 100_000),
        ("BATCH_SIZE", int, 1, 100_000),
        ("LEARNING_RATE", (int, float), 1e-7, 1),
        ("EMA_DECAY", (int, float), 0, 0.999999),
        ("PREVIEW_EVERY", int, 1, 100_000),
        ("SEED", int, 0, 2**63 - 1),
    ):
        check_setting(name, settings[name], kind, lowest, highest)
    for name in "FLIP", "COMPILE":
        check_setting(name, settings[name], bool)
    for name in "DATA_DIR", "OUT_DIR":
        check_setting(name, settings[name], (str, Path))
    for name in "CHANNEL_MULT", "ATTENTION_AT":
        value = settings[name]
        is_tuple = isinstance(value, tuple) and (value or name == "ATTENTION_AT")
        if not is_tuple or not all(isinstance(v, int) and v > 0 for v in value):
            sys.exit(f"{name} = {value!r} does not work: it must look like (1, 2, 4) or (14,).")
    side = 32 if settings["DATASET"] == "CIFAR10" else 28
    halvings = len(settings["CHANNEL_MULT"]) - 1
    if side % 2**halvings:
        sys.exit(
            f"CHANNEL_MULT = {settings['CHANNEL_MULT']} does not work: each entry after the first "
            f"halves the image, and {side} pixels cannot be halved {halvings} times."
        )
    if settings["BATCH_SIZE"] % world:
        sys.exit(f"BATCH_SIZE = {settings['BATCH_SIZE']} cannot be shared by {world} processes.")


def save_progress(ddpm, trainer, epoch, preview_every, x_0, out_dir, note):
    """After the first epoch keep the loss per timestep; every few epochs save 16 samples."""
    if not trainer.extras:
        trainer.extras[f"after epoch {epoch}"] = loss_per_timestep(ddpm, x_0)
        trainer.save(out_dir / "checkpoint.pt")
    if epoch % preview_every == 0 and epoch < trainer.settings["EPOCHS"]:
        torch.manual_seed(trainer.settings["SEED"])  # the same noise each time: watch it change
        path, title = out_dir / f"samples_epoch_{epoch:03}.png", f"After epoch {epoch}"
        sample_grid(ddpm.sample(n=16), path, title, note)


def save_figures(ddpm, trainer, x_0, out_dir, note):
    """Sample 36 images and save the figures of a finished training in out_dir."""
    torch.manual_seed(trainer.settings["SEED"])
    frames = []
    samples = ddpm.sample(n=36, frames=frames)
    sample_grid(samples, out_dir / "samples.png", "New images out of noise", note)
    denoising_strip(frames, out_dir / "denoising.png", note=note)
    short_note = f"{trainer.settings['DATASET']}, SEED = {trainer.settings['SEED']}"
    denoising_gif(frames, out_dir / "denoising.gif", note=short_note)
    loss_curve(trainer.losses, out_dir / "loss.png", note=note)
    curves = {**trainer.extras, "at the end": loss_per_timestep(ddpm, x_0)}
    timestep_losses(curves, out_dir / "loss_per_timestep.png", note=note)
    print(f"Saved samples, denoising, loss and loss_per_timestep (.png, .gif) in {out_dir}")


FIXED = (  # the settings that a checkpoint must agree with
    *("DATASET", "T", "SCHEDULE", "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT"),
    *("DROPOUT", "FLIP", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "EMA_DECAY", "SEED"),
)

if __name__ == "__main__":
    sys.excepthook = explain
    rank, world = join_processes()
    check_settings(globals(), world)
    settings = {name: globals()[name] for name in FIXED}  # the constants above, by name
    device = torch.device("cpu") if world > 1 and not ON_GPU else pick_device()
    out_dir = make_folder(OUT_DIR)
    images, _, source = load_images_in_turn(DATASET, DATA_DIR, rank, world)
    settings["DATASET"] = source  # drawn digits must not go on where MNIST stopped
    images, shape = images.to(device), images.shape[1:]

    torch.manual_seed(SEED)
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    betas = cosine_beta_schedule(T) if SCHEDULE == "cosine" else linear_beta_schedule(T)
    architecture = shape, BASE_CH, CHANNEL_MULT, NUM_BLOCKS, ATTENTION_AT, DROPOUT
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    model = UNet(*architecture, alphas_cumprod, best_precision(device))
    model.to(device, memory_format=best_layout(device))
    # DistributedDataParallel: equal weights everywhere, and the mean of all processes' gradients
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    ddpm_in_training = DDPM(parallel, betas, shape, device)

    def loss(index):
        return ddpm_in_training.loss(to_batch(images[index], FLIP))

    trainer = Trainer(model, loss, len(images), settings, rank, world)
    ddpm = DDPM(trainer.averaged, betas, shape, device)  # samples with the averaged weights
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(images):,} images of {source}, {size:,} parameters, on {device}")
    trainer.resume(out_dir / "checkpoint.pt")
    check_agreement((source, len(images), trainer.step), world)
    if COMPILE:
        model.compile()
    some_images = to_batch(images[:128])
    note = f"{source}, EPOCHS = {EPOCHS}, BASE_CH = {BASE_CH}, T = {T}, SEED = {SEED}"
    for epoch in trainer.run(out_dir / "checkpoint.pt"):
        if rank == 0:
            save_progress(ddpm, trainer, epoch, PREVIEW_EVERY, some_images, out_dir, note)
    parallel = ddpm_in_training.model = model  # without DistributedDataParallel, which ends now
    leave_processes(world)
    if rank == 0:
        save_figures(ddpm, trainer, some_images, out_dir, note)
