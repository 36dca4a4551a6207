"""04 · DDIM: the same network, twenty times faster, and backwards.

    python 04_ddim_fast_sampling.py
    torchrun --nproc_per_node=4 04_ddim_fast_sampling.py        # on 4 GPUs of one machine

DDPM calls the network once for each of its 1000 steps. But the training never asked for 1000 steps:
it only fixed how much noise an image has at step t. So DDIM takes long steps, t = 999, 979, 959 ...
or longer. How much fresh noise it adds on the way can be chosen by η: 1 is as much as DDPM, 0 none.
With η = 0 only the first noise is random: the same noise always gives the same image, a real image
can be followed back to its noise, and a blend of two noises gives an image between two images.
The network, the training and DDPM's sampler are those of 02, to the last character; if 02 has been
trained with the same settings, 04 goes on from its checkpoint. What is new is marked `NEW in 04`:
in section 5 the class `DDIM`, in 7 the pictures. (02's essay on the loss is left out.)

You see in `outputs/04_ddim_fast_sampling/` what each sampler costs (`speed.png`), what the fast
ones make of the same noise (`samplers.png`), how well images come back from their noise
(`inversion.png`), the way from one image to another (`interpolation.png`) through their noises, by
an arc (slerp) or a line (lerp), and by fading; smooth transitions (`transitions.gif`), and as in 02
samples, denoising, loss and checkpoint. With `python -i`: `sample_grid(ddim.ddim_sample(n=16,
ddim_steps=20), "new.png")`, `ddim.sample(n=16)`, `ddim.ddim_invert(to_batch(images[:8]))`.

Measured with these settings on MNIST, two cores of an AMD EPYC (Zen 3), PyTorch 2.14.1: 17 min 13 s
from start to last picture with 1.3 GB of memory; with 02's network 1 min 31 s, 1.0 GB. 50 steps of
DDIM are 20 times faster than DDPM's 1000; with η = 1 they are as good, with η = 0 not quite:
`tests/benchmark.py 04`. Not yet timed on a GPU.

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Improved DDPM = Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models,
arXiv:2102.09672
DDIM = Song, Meng & Ermon 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
DPM-Solver++ = Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling, arXiv:2211.01095

Code            Paper             Shape          Meaning (what is not here is as in 02)
x_T             x_T               (B, C, H, W)   the noise at the start, t = T - 1
ddim_steps      S                                calls of the network for one image
timesteps       τ                 (S + 1,)       the steps that are visited, T - 1 ... -1
t, t_prev       τ_i, τ_{i−1}                     the step at hand; the next one on the way down
eta             η                                0 ... 1: share of the noise that DDPM would renew
sigma_t         σ_{τ_i}(η)                       standard deviation of the fresh noise
alpha_bars[t]   ᾱ_t; DDIM's α_t                  as alphas_cumprod[t], and 1 for t = -1
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
from functools import partial
from pathlib import Path
from time import perf_counter
from time import time as now

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from utils.interpolation import interpolate, loop, transition_gif
from utils.visualize import (
    denoising_gif,
    denoising_strip,
    draw_digits,
    image_table,
    loss_curve,
    reconstruction_errors,
    sample_grid,
    table,
)

# A checkpoint can be resumed only with the settings that it was made with. To train with others,
# delete outputs/04_ddim_fast_sampling/checkpoint.pt or set another OUT_DIR. DDIM_STEPS
# and ETA may change at any time: they have no part in the training.
ON_GPU = torch.cuda.is_available()  # no setting: an NVIDIA GPU gets the larger values below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", or "DRAWN": digits drawn offline
T = 1000  # noise steps in training; sampling may take fewer: DDIM_STEPS
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
DDIM_STEPS = 50  # NEW in 04: calls of the network for samples and denoising, 1 ... T; try 10
ETA = 0.0  # NEW in 04: fresh noise in each step; 0: none, 1: as much as a DDPM with these steps
PREVIEW_EVERY = 2  # epochs from one sample grid to the next
COMPILE = False  # True: torch.compile, a minute or more of waiting and then faster steps
SEED = 0  # same seed on the same CPU: same digits
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"  # where data sets are looked for and downloaded to
OUT_DIR = ROOT / "outputs" / "04_ddim_fast_sampling"  # for the pictures and the checkpoint
OUT_DIR_02 = ROOT / "outputs" / "02_ddpm"  # NEW in 04: its checkpoint will do, if settings agree


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


class DDIM(DDPM):
    """NEW in 04. DDPM with faster ways from noise to image; the training stays the same.

    The loss asks only how x_t depends on x_0 (DDPM Eq. 4), never how x_t came about one step at a
    time. So the network fits every process that has the same noise at each t (DDIM section 3), and
    among those are some that skip most of the steps (section 4.2). Same arguments as DDPM.
    """

    def __init__(self, model, betas, image_shape, device):
        super().__init__(model, betas, image_shape, device)
        # As alphas_cumprod, but with 64 bits, for 1 − ᾱ_t/ᾱ_prev below would lose its digits in 32.
        # The 1 at the end is the clean image's, t = -1: alpha_bars[-1] is the last entry.
        self.alpha_bars = [*torch.cumprod(1 - betas, dim=0).tolist(), 1.0]

    def timesteps(self, ddim_steps):
        """Return ddim_steps + 1 timesteps, evenly spread from T - 1 down to -1, the clean image.

        50 of 1000: 999, 979, ... 39, 19, -1. Where ddim_steps does not divide T, some gaps are one
        wider than others. (DDIM D.2 spaces evenly, too, or for CIFAR-10 quadratically, with short
        steps at small t; neither begins at the very end.)
        Raises ValueError unless ddim_steps is a whole number, 1 ... T.
        """
        if not isinstance(ddim_steps, int) or not 1 <= ddim_steps <= self.T:
            raise ValueError(f"{ddim_steps!r} steps: it must be a whole number, 1 to T = {self.T}")
        return [round(self.T * i / ddim_steps) - 1 for i in range(ddim_steps, -1, -1)]

    def predict(self, x_t, t):
        """Return x_0_pred and noise_pred, the guesses for x_t (B, C, H, W) at step t, an int."""
        noise_pred = self.model(x_t, torch.full((len(x_t),), t, device=self.device))
        signal, spread = math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        # DDPM Eq. 15:  x̂_0 = (x_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t,  clamped as in p_sample
        x_0_pred = ((x_t - spread * noise_pred) / signal).clamp(-1, 1)
        # The same solved for ε. (The paper clamps nothing.) Image and noise must still add up to
        # x_t, else η = 1 with all T steps would not be DDPM's p_sample.
        return x_0_pred, (x_t - signal * x_0_pred) / spread

    def ddim_step(self, x_t, t, t_prev, eta):
        """Go from x_t (B, C, H, W) at t to any t_prev < t, both ints: return x_prev, x_0_pred."""
        x_0_pred, noise_pred = self.predict(x_t, t)
        # The DDIM paper writes α for what is ᾱ in DDPM and here. Its τ_{i−1} is our t_prev.
        alpha_bar_t, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]
        # DDIM Eq. 16:  σ_t = η · √((1−ᾱ_prev) / (1−ᾱ_t)) · √(1 − ᾱ_t/ᾱ_prev)
        sigma_t = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        sigma_t = sigma_t * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        # DDIM Eq. 12:  x_prev = √ᾱ_prev · x̂_0 + √(1−ᾱ_prev−σ_t²) · ε_θ + σ_t · fresh noise.
        # Old and fresh noise together have the variance 1 − ᾱ_prev that belongs to t_prev, however
        # far away that is. η = 1 renews as much of it as a DDPM with these steps would; η = 0
        # renews nothing: then only the start is random.
        x_prev = math.sqrt(alpha_bar_prev) * x_0_pred
        x_prev = x_prev + math.sqrt(1 - alpha_bar_prev - sigma_t**2) * noise_pred
        if sigma_t > 0:
            x_prev = x_prev + sigma_t * torch.randn_like(x_t)
        return x_prev, x_0_pred

    @torch.no_grad()
    def ddim_sample(self, n=16, ddim_steps=50, eta=0.0, x_T=None, frames=None):
        """Make n new images, (n, C, H, W) in [-1, 1], with ddim_steps calls of the network.

        ddim_steps: 1 ... T. eta: 0 ... 1; with 0 the same noise always gives the same image, 1 with
        all T steps is `sample`. x_T: the noise to start from, (B, C, H, W), such as ddim_invert
        finds; then n does not count. frames: as in `sample`. Raises ValueError for steps and eta
        out of range. DDIM sections 4.1 and 4.2.
        """
        timesteps = self.timesteps(ddim_steps)
        if not (isinstance(eta, int | float) and 0 <= eta <= 1):
            raise ValueError(f"eta = {eta!r}: it must be a number, 0 to 1")
        x_t = torch.randn(n, *self.image_shape, device=self.device) if x_T is None else x_T
        bar = tqdm(timesteps[:-1], "DDIM", unit=" steps", leave=False)
        for i, (t, t_prev) in enumerate(zip(bar, timesteps[1:])):
            x_prev, x_0_pred = self.ddim_step(x_t, t, t_prev, eta)
            if frames is not None and i % math.ceil(ddim_steps / 50) == 0:
                frames.append((t, x_t, x_0_pred))
            x_t = x_prev
        if frames is not None:
            frames.append((-1, x_t, x_t))
        return x_t

    @torch.no_grad()
    def ddim_invert(self, x_0, ddim_steps=50):
        """Find about the noise x_T (B, C, H, W) out of which ddim_sample with eta = 0 makes x_0.

        x_0: (B, C, H, W) in [-1, 1]. ddim_steps: 1 ... T, as many as the way back will take; raises
        ValueError for others. With η = 0 and small steps DDIM follows a differential equation (DDIM
        Eq. 14), which holds in both directions (section 5.4). Sampling asks the network at
        the point where a step starts. Backwards, that point is the step's end and not yet known; so
        we ask at the point that we have, and err a little. Shorter steps err less.
        """
        x_t, timesteps = x_0, self.timesteps(ddim_steps)[::-1]  # -1 ... T - 1
        bar = tqdm(timesteps[:-1], "Inverting", unit=" steps", leave=False)
        for t, t_next in zip(bar, timesteps[1:]):
            # The network knows no t = -1: at the clean image it is asked with t = 0, the nearest.
            x_0_pred, noise_pred = self.predict(x_t, max(t, 0))
            x_0_pred = x_0 if t == -1 else x_0_pred
            alpha_bar_next = self.alpha_bars[t_next]
            # DDIM Eq. 12 with σ = 0, upwards
            x_t = math.sqrt(alpha_bar_next) * x_0_pred + math.sqrt(1 - alpha_bar_next) * noise_pred
        return x_t

    @torch.no_grad()
    def dpm_solver_sample(self, n=16, steps=15, x_T=None, power=2):
        """GOING FURTHER than DDIM: DPM-Solver++(2M), good with as few as 10 to 20 steps.

        steps: 1 ... T; n and x_T as in ddim_sample; there is no fresh noise. DDIM takes x̂_0 to be
        constant during a step. Here the last two guesses are continued to the middle of the step,
        in λ (2M: second order, multistep). Raises ValueError for steps out of range. DPM-Solver++
        Algorithm 2; x̂_0 is clamped, as its authors advise; their α_t is √ᾱ_t, their σ_t √(1−ᾱ_t).
        """
        self.timesteps(steps)  # raises the ValueError
        # power = 1: even steps. power = 2: short ones while the noise is strong and it is decided
        # which digit it will be, then longer and longer ones: better on MNIST (the README has the
        # numbers). Others space evenly in t or in λ, or make the last steps short instead. (From
        # about √(2T) steps on the shortest fall together, and there are fewer calls.)
        timesteps = {round(self.T * (1 - (1 - i / steps) ** power)) - 1 for i in range(steps + 1)}
        timesteps = sorted(timesteps, reverse=True)  # T - 1 ... -1
        x_t = torch.randn(n, *self.image_shape, device=self.device) if x_T is None else x_T
        x_0_before = h_before = None
        bar = tqdm(timesteps[:-1], "DPM-Solver++", unit=" steps", leave=False)
        for t, t_prev in zip(bar, timesteps[1:]):
            x_0_pred, _ = self.predict(x_t, t)
            if t_prev == -1:
                # To the clean image h is infinite, and D with it. So the last step is DDIM's, which
                # ends at x̂_0: the usual addition to Algorithm 2.
                return x_0_pred
            h = self.half_log_snr(t_prev) - self.half_log_snr(t)  # the length of the step
            D = x_0_pred  # all that is known in the first step, which is DDIM's too
            if h_before is not None:
                # D = x̂_0 + (x̂_0 − x̂_0 of the step before) · h / (2 · h of the step before)
                D = x_0_pred + (x_0_pred - x_0_before) * h / (2 * h_before)
            x_0_before, h_before = x_0_pred, h
            # x_prev = √(1−ᾱ_prev)/√(1−ᾱ_t) · x_t − √ᾱ_prev · (e^−h − 1) · D
            ratio = math.sqrt((1 - self.alpha_bars[t_prev]) / (1 - self.alpha_bars[t]))
            x_t = ratio * x_t - math.sqrt(self.alpha_bars[t_prev]) * math.expm1(-h) * D

    def half_log_snr(self, t):
        """Return λ_t = log(√ᾱ_t / √(1−ᾱ_t)), half the log of the signal-to-noise ratio; t >= 0."""
        return math.log(self.alpha_bars[t] / (1 - self.alpha_bars[t])) / 2


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


def adopt_checkpoint(out_dir, out_dir_02, settings, rank, world):
    """NEW in 04. Where there is no own checkpoint take over 02's, if its settings agree."""
    own, other = (folder / "checkpoint.pt" for folder in (out_dir, out_dir_02))
    if rank == 0 and not own.exists() and other.exists():
        try:
            state = torch.load(other, map_location="cpu", weights_only=True)
            agrees = state["settings"] == settings
        except Exception:  # damaged, or no checkpoint
            agrees = False
        if agrees:
            print(f"Using what 02 has trained with the same settings: {other}")
            save_atomically(state, own)
        else:
            print(f"Training anew: {other} is damaged or has other settings.")
    if world > 1:
        dist.barrier()


def save_fast_preview(ddim, trainer, epoch, preview_every, ddim_steps, eta, out_dir, note):
    """NEW in 04. Every few epochs save 16 samples, made with DDIM: it takes but a moment."""
    if epoch % preview_every == 0 and epoch < trainer.settings["EPOCHS"]:
        torch.manual_seed(trainer.settings["SEED"])  # the same noise each time: watch it change
        path, title = out_dir / f"samples_epoch_{epoch:03}.png", f"After epoch {epoch}"
        sample_grid(ddim.ddim_sample(16, ddim_steps, eta), path, title, note)


def compare_samplers(ddim, seed, count=64):
    """NEW in 04. Time each sampler on the same noise, DDPM first.

    Returns {(name, calls of the network): (seconds, images)}, with `count` images of each.
    """
    runs = {("DDPM", ddim.T): partial(ddim.sample, count)}
    for name, sampler, all_steps in (
        ("DDIM, η = 0", ddim.ddim_sample, (10, 15, 20, 50, 100)),
        ("DDIM, η = 1", partial(ddim.ddim_sample, eta=1.0), (10, 15, 20, 50, 100)),
        ("DPM-Solver++(2M)", ddim.dpm_solver_sample, (10, 15, 20)),
    ):
        for steps in [n for n in all_steps if n <= ddim.T] or [1]:
            runs[name, steps] = partial(sampler, count, steps)
    ddim.ddim_sample(count, 1).cpu()  # the first call with so many images is slow: it is left out
    results = {}
    for key, run in runs.items():
        torch.manual_seed(seed)  # each draws the starting noise first: the same for all
        start = perf_counter()
        images = run().cpu()  # .cpu() waits until a GPU is done
        results[key] = perf_counter() - start, images
    return results


def save_comparison(ddim, seed, out_dir, note):
    """NEW in 04. Print and save what each sampler costs, and what the fast ones make of a noise."""
    results = compare_samplers(ddim, seed)
    ddpm_seconds, images = results["DDPM", ddim.T]
    header = ["sampler", "calls of the network", f"seconds for {len(images)} images", "speed-up"]
    rows = [
        [name, f"{steps}", f"{seconds:.2f}", f"{ddpm_seconds / seconds:.1f} ×"]
        for (name, steps), (seconds, _) in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in header, *rows:
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        print(line.replace("η", "eta").replace("×", "x"))  # which any log file can hold
    title = f"The same network, other samplers, on {ddim.device}"
    table(header, rows, out_dir / "speed.png", title, note)
    faster = [key for key in results if key[0] != "DDPM"]
    names, counts = dict.fromkeys(name for name, _ in faster), sorted({n for _, n in faster})
    nothing, shown, row_names = torch.ones_like(images[0]), [], []  # a white square
    for name in names:
        for i in range(3):
            shown += [results[name, n][1][i] if (name, n) in results else nothing for n in counts]
            row_names.append(f"{name.split('(')[0]}, noise {i + 1}")
    title = "The same three noises, with each fast sampler"
    columns = [f"{steps} calls" for steps in counts]
    image_table(torch.stack(shown), out_dir / "samplers.png", columns, row_names, title, note)


def save_inversion(ddim, x_0, out_dir, note):
    """NEW in 04. Save how well x_0, images of the training, come back out of their noise.

    That noise is weaker than Gaussian noise where all images are black: there every noise becomes
    black, and the inversion finds about the weakest of them.
    """
    errors, images = {}, {"image": x_0[:5]}
    for steps in [n for n in (10, 20, 50, 100, 250) if n < ddim.T] or [ddim.T]:
        x_T = ddim.ddim_invert(x_0, steps)
        back = ddim.ddim_sample(x_T=x_T, ddim_steps=steps)
        errors[steps] = (back - x_0).abs().mean().item()
        images[f"{steps} steps"] = back[:5]
    images["its noise"] = x_T[:5]
    title = "Training images to their noise and back, DDIM with η = 0"
    reconstruction_errors(errors, images, out_dir / "inversion.png", title, note)


def save_transitions(ddim, x_0, seed, out_dir, note, short_note, points=11):
    """NEW in 04. Save ways between three pairs of real images, and loops through random noises."""
    steps, ways = min(100, ddim.T), []
    x_T = ddim.ddim_invert(x_0[:6], steps)
    for method in "slerp", "lerp":
        between = interpolate(x_T[0::2], x_T[1::2], points, method)  # (points, 3, C, H, W)
        images = ddim.ddim_sample(x_T=between.flatten(0, 1), ddim_steps=steps)
        ways.append(images.unflatten(0, (points, 3)))
    ways.append(interpolate(x_0[0:6:2], x_0[1:6:2], points, "lerp"))  # fading, without any model
    rows = torch.stack(ways).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)  # pair by pair, way by way
    shares = [f"{100 * i / (points - 1):.0f} %" for i in range(points)]
    title = "From one training image to another: share of the one on the right"
    names = ["noise, slerp", "noise, lerp", "pixels, lerp"] * 3
    image_table(rows, out_dir / "interpolation.png", shares, names, title, note)
    torch.manual_seed(seed)
    stops = torch.randn(4, 6, *ddim.image_shape, device=ddim.device)  # 4 loops of 6 stops each
    noises = torch.stack([loop(stops_of_one, 10) for stops_of_one in stops], dim=1)

    def generate(x_T):
        return ddim.ddim_sample(x_T=x_T, ddim_steps=min(50, ddim.T))

    transition_gif(generate, noises, out_dir / "transitions.gif", short_note)


def save_figures_of_sampling(ddim, trainer, images, ddim_steps, eta, out_dir, note):
    """NEW in 04. Sample 36 images and save the figures of a finished training in out_dir.

    images: those of the training, uint8 (N, C, H, W), N at least 6.
    """
    seed, frames, x_0 = trainer.settings["SEED"], [], to_batch(images[:16])
    short_note, title = f"{trainer.settings['DATASET']}, SEED = {seed}", f"DDIM, η = {eta:g}"
    torch.manual_seed(seed)
    samples = ddim.ddim_sample(36, ddim_steps, eta, frames=frames)
    sample_grid(samples, out_dir / "samples.png", f"{title}, {ddim_steps} steps", note)
    print("Next: all samplers side by side. On a CPU that takes some minutes.")
    save_comparison(ddim, seed, out_dir, note)
    save_inversion(ddim, x_0, out_dir, note)
    save_transitions(ddim, x_0, seed, out_dir, note, short_note)
    denoising_strip(frames, out_dir / "denoising.png", f"From noise to image, {title}", note)
    denoising_gif(frames, out_dir / "denoising.gif", note=short_note)
    loss_curve(trainer.losses, out_dir / "loss.png", note=note)
    print(f"Saved samples, samplers, inversion, interpolation, transitions and more in {out_dir}")


FIXED = (  # the settings that a checkpoint must agree with
    *("DATASET", "T", "SCHEDULE", "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT"),
    *("DROPOUT", "FLIP", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "EMA_DECAY", "SEED"),
)

if __name__ == "__main__":
    sys.excepthook = explain
    rank, world = join_processes()
    check_settings(globals(), world)
    settings = {name: globals()[name] for name in FIXED}  # the constants above, by name
    check_setting("DDIM_STEPS", DDIM_STEPS, int, 1, T)  # NEW in 04
    check_setting("ETA", ETA, (int, float), 0, 1)  # NEW in 04
    check_setting("OUT_DIR_02", OUT_DIR_02, (str, Path))  # NEW in 04
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
    ddim = DDIM(trainer.averaged, betas, shape, device)  # NEW in 04
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(images):,} images of {source}, {size:,} parameters, on {device}")
    adopt_checkpoint(out_dir, Path(OUT_DIR_02), settings, rank, world)  # NEW in 04
    trainer.resume(out_dir / "checkpoint.pt")
    check_agreement((source, len(images), trainer.step), world)
    if COMPILE:
        model.compile()
    note = f"{source}, EPOCHS = {EPOCHS}, BASE_CH = {BASE_CH}, T = {T}, SEED = {SEED}"
    for epoch in trainer.run(out_dir / "checkpoint.pt"):
        if rank == 0:
            save_fast_preview(ddim, trainer, epoch, PREVIEW_EVERY, DDIM_STEPS, ETA, out_dir, note)
    parallel = ddpm_in_training.model = model  # without DistributedDataParallel, which ends now
    leave_processes(world)
    if rank == 0:
        save_figures_of_sampling(ddim, trainer, images, DDIM_STEPS, ETA, out_dir, note)
