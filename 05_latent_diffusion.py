"""05 · Latent diffusion: the core of Stable Diffusion, in one file.

    python 05_latent_diffusion.py
    torchrun --nproc_per_node=4 05_latent_diffusion.py        # on 4 GPUs of one machine

Most of an image's pixels say little. Stage 1 trains an autoencoder, a VAE, which turns an image
into few numbers, its latents, and back. Stage 2 trains diffusion on these latents: the same U-Net,
schedule, training and sampler as before, on 8 × 8 places in place of 28 × 28. To sample, diffusion
makes latents out of noise, and the decoder an image out of the latents.
"Stable" is no property of the method; Stability AI gave the computing time. What does make
training on latents well-behaved is that they are regularised (a KL term, a small penalty for
leaving N(0, 1), keeps them together and smooth) and have the variance 1, so that z_t has it at
every t. Text as input is left out (cross-attention, LDM section 3.3); guidance is that of 03.
What is new is marked `NEW in 05`; U-Net and training are those of 02, the sampler is that of 04.

You see in `outputs/05_latent_diffusion/` what the VAE keeps of an image, and what it makes of noise
(`autoencoder.png`), the latents (`latents.png`, `latent_scale.png`), what diffusion costs on pixels
and on latents (`cost.png`), ways between two images (`interpolation.png`), and samples, denoising,
loss and checkpoints as in 02. Ctrl-C stops in either stage; the same command goes on there.
With `python -i`: `sample_grid(ldm.sample(n=16, ddim_steps=50), "new.png")`; of x, 1,000 test
images, `ldm.decode(ldm.encode(x))` (scaled latents) or `vae.decode(vae.encode(x)[0])` (unscaled).

Measured with these settings on MNIST, two cores of an AMD EPYC (Zen 3), PyTorch 2.14.1: 15 min 52 s
from start to last picture, 2 of them for stage 1, with 2.0 GB of memory. Test images come back
from their latents with a PSNR of 34 dB; loss and gradients cost 9.3 times less than on pixels. Not
yet timed on a GPU.

LDM = Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models,
arXiv:2112.10752
Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114
DDPM = Ho, Jain & Abbeel 2020, arXiv:2006.11239; Improved DDPM = Nichol & Dhariwal 2021,
arXiv:2102.09672; DDIM = Song, Meng & Ermon 2021, arXiv:2010.02502

Code            Paper              Shape               Meaning (what is not here is as in 02, 04)
mean            μ; E_μ(x)          (B, 4, 8, 8)        centre of the latents of an image
log_variance    log σ²; log E_σ²   (B, 4, 8, 8)        how far they spread around it
z_0, z_t        z = E(x)/σ̂, z_t    (B, 4, 8, 8)        drawn and scaled; with the noise of step t
scale           1/σ̂ (appendix G)                       gives the latents the variance 1
"""

# %% 1. Settings: edit and run again

import copy
import hashlib
import io
import math
import os
import random
import signal
import socket
import sys
import tempfile
from collections import OrderedDict
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

from utils.interpolation import interpolate
from utils.visualize import (
    denoising_gif,
    denoising_strip,
    draw_digits,
    image_table,
    latent_pictures,
    latent_scaling,
    loss_curve,
    sample_grid,
    table,
)

# A checkpoint can be resumed only with the settings that it was made with. vae.pt (stage 1) depends
# on DATASET, LATENT_CH, VAE_CH, VAE_EPOCHS, KL_WEIGHT, FLIP, BATCH_SIZE, LEARNING_RATE, EMA_DECAY
# and SEED: to change one of these delete vae.pt and checkpoint.pt; to change another, checkpoint.pt
# (stage 2) alone. Both are in outputs/05_latent_diffusion/. Or set another OUT_DIR. DDIM_STEPS may
# change at any time.
ON_GPU = torch.cuda.is_available()  # no setting: an NVIDIA GPU gets the larger values below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", or "DRAWN": digits drawn offline
LATENT_CH = 4  # NEW in 05: channels of the 8 × 8 latents; more: sharper, but harder to model
VAE_CH = 32 if ON_GPU else 16  # NEW in 05: channels of the VAE at 32 × 32; twice as many per level
VAE_EPOCHS = 10 if ON_GPU else 2  # NEW in 05: passes through the data in stage 1
KL_WEIGHT = 0.002  # NEW in 05: pull of the latents towards N(0, 1); see vae_loss
T = 1000  # noise steps in training; sampling takes DDIM_STEPS
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 128 if ON_GPU else 48  # channels of the U-Net at 8 × 8; many, for they are cheap here
CHANNEL_MULT = (1, 2)  # in multiples of BASE_CH; 8 → 4 places (cost.png: 28 → 14 pixels)
NUM_BLOCKS = 2 if ON_GPU else 1  # residual blocks per level
ATTENTION_AT = (8,)  # sides of the latents with self-attention; the middle always has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # against learning photographs by heart
FLIP = DATASET == "CIFAR10"  # mirror half of the images in stage 1 (2 sees none); never digits
EPOCHS = 100 if ON_GPU else 9  # passes through the latents in stage 2
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # at its highest, for Muon (AdamW gets a fifth); halve it if the loss jumps
EMA_DECAY = 0.9999  # memory of the averaged weights; felt only in runs of over 90,000 steps
DDIM_STEPS = 50  # calls of the U-Net for a sample, 1 ... T
PREVIEW_EVERY = 2  # epochs from one sample grid to the next
COMPILE = False  # True: torch.compile, a minute or more of waiting and then faster steps
SEED = 0  # same seed on the same CPU: same digits
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"  # where data sets are looked for and downloaded to
OUT_DIR = ROOT / "outputs" / "05_latent_diffusion"  # where pictures and checkpoints are saved


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


# %% 5. VAE: NEW in 05


class VAEBlock(nn.Module):
    """Two convolutions beside a shortcut; ResBlock without t. x (B, ch, H, W), same shape out."""

    def __init__(self, ch):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(ch), nn.Conv2d(ch, ch, 3, padding=1)
        self.norm_2, self.conv_2 = group_norm(ch), zero_init(nn.Conv2d(ch, ch, 3, padding=1))

    def forward(self, x):
        h = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(h)))


class VAE(nn.Module):
    """Turn images into few numbers, the latents, and back; KL-regularised, as in LDM section 3.1.

    image_shape: (C, side, side), side a multiple of 4 up to 32; images are padded with black to
    32 × 32, and cropped again. The encoder halves that twice, so latents are (latent_ch, 8, 8).
    base_ch: channels at 32 × 32; 2 · base_ch at 16 and 4 · base_ch at 8.
    """

    def __init__(self, image_shape, base_ch, latent_ch):
        super().__init__()
        channels, side, _ = image_shape
        self.margin = (32 - side) // 2
        ch_16, ch_8 = 2 * base_ch, 4 * base_ch
        self.encoder = nn.Sequential(
            OrderedDict(
                conv_in=nn.Conv2d(channels, base_ch, 3, padding=1),
                down_16=nn.Conv2d(base_ch, ch_16, 3, stride=2, padding=1),
                block_16=VAEBlock(ch_16),
                down_8=nn.Conv2d(ch_16, ch_8, 3, stride=2, padding=1),
                block_8=VAEBlock(ch_8),
                norm=group_norm(ch_8),
                silu=nn.SiLU(),
                conv_out=nn.Conv2d(ch_8, 2 * latent_ch, 3, padding=1),  # mean and log variance
            )
        )
        self.decoder = nn.Sequential(
            OrderedDict(
                conv_in=nn.Conv2d(latent_ch, ch_8, 3, padding=1),
                block_8=VAEBlock(ch_8),
                grow_16=nn.Upsample(scale_factor=2),
                up_16=nn.Conv2d(ch_8, ch_16, 3, padding=1),
                block_16=VAEBlock(ch_16),
                grow_32=nn.Upsample(scale_factor=2),
                up_32=nn.Conv2d(ch_16, base_ch, 3, padding=1),
                norm=group_norm(base_ch),
                silu=nn.SiLU(),
                conv_out=nn.Conv2d(base_ch, channels, 3, padding=1),
            )
        )

    def encode(self, x):
        """Return mean and log variance (B, latent_ch, 8, 8) of the latents of x (B, C, H, W).

        An image becomes not a point but a small cloud, from which one latent is drawn.
        """
        padded = F.pad(x, [self.margin] * 4, value=-1.0)  #                      (B, C, 32, 32)
        mean, log_variance = self.encoder(padded).chunk(2, dim=1)
        # clamp: else exp() of an untrained guess may overflow. clone: Apple's GPUs have had wrong
        # results for convolutions of what is only a view of some channels.
        return mean.clone(), log_variance.clamp(-20, 10)

    def decode(self, z):
        """Return images (B, C, side, side) in [-1, 1] of latents z (B, latent_ch, 8, 8)."""
        return self.reconstruct(z).clamp(-1, 1)

    def reconstruct(self, z):
        """As decode, but unclamped, for training: a clamped pixel would learn nothing."""
        return F.pad(self.decoder(z), [-self.margin] * 4)  # negative padding cuts off

    def forward(self, x):
        """Return the reconstruction of x (B, C, H, W), and its latents' mean and log variance."""
        mean, log_variance = self.encode(x)
        # Reparameterisation:  z = μ + σ · ε. As a sum it lets gradients through to μ and σ.
        # (Kingma & Welling, section 2.4)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.reconstruct(z), mean, log_variance


def vae_loss(x, reconstruction, mean, log_variance, kl_weight):
    """Return the VAE's loss: squared error + kl_weight · KL divergence, both per pixel value.

    kl_weight = 2 s² is the VAE of Kingma & Welling for pixels from N(x̂, s²), whose −log p is the
    squared error / (2 s²): 0.002 stands for s = 0.03, 4 of 255 grey levels. Less gives sharper
    images, and latents that are rougher and harder to model; more gives smoother latents and
    blurred images. LDM takes about 0.000001 (appendix G), which hardly binds the size of the
    latents: that is left to scaling.

    SIMPLIFIED: LDM adds a perceptual loss (LPIPS: the error in the features of a trained image
    classifier) and an adversarial one (a second network that learns to tell reconstructions from
    images, patch by patch). Without them fine texture comes out blurred, as the mean over all
    textures has the smallest squared error. Digits have none; photographs suffer.
    """
    # Kingma & Welling, appendix B:  KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ (μ² + σ² − 1 − log σ²)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
    return F.mse_loss(reconstruction, x) + kl_weight * kl.mean() / x[0].numel()


# %% 6. Loss and sampler


class LatentDiffusion:
    """NEW in 05. Diffusion on the latents of a VAE: the loss of 02, the sampler of 04, no clamp.

    model: called as model(z_t, t), returns (B, latent_ch, 8, 8). vae: trained. scale: the factor
    that gives the latents the variance 1. betas: float64 (T,), each in (0, 1).
    """

    def __init__(self, model, vae, scale, betas, latent_shape, device):
        self.model, self.vae, self.scale, self.T = model, vae, scale, len(betas)
        self.betas, self.latent_shape, self.device = betas, latent_shape, device
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # as in 04: [-1] is the clean latent's

    def loss(self, z_0):
        """Return the loss of scaled latents z_0 (B, latent_ch, 8, 8): as in 02, on latents."""
        t = torch.randint(self.T, (len(z_0),), device=self.device)  # 0 ... T-1, all of them
        noise = torch.randn_like(z_0)
        # LDM Eq. 2:  L = E ‖ε − ε_θ(z_t, t)‖², with 02's weight 1/√ᾱ_t
        noise_pred = self.model(q_sample(z_0, t, noise, self.alphas_cumprod), t)
        error = (noise - noise_pred).square().flatten(1).mean(dim=1)  # (B,)
        return (error / self.alphas_cumprod[t].sqrt()).mean()

    def ddim_step(self, z_t, t, t_prev, eta):
        """Go from z_t at t to any t_prev < t, both ints: return z_prev, z_0_pred; as in 04."""
        alpha_bar_t, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]
        noise_pred = self.model(z_t, torch.full((len(z_t),), t, device=self.device))
        # DDPM Eq. 15:  ẑ_0 = (z_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t.  No clamp: pixels end at ±1, latents
        # anywhere. As 02 says, our U-Net undoes 1/√ᾱ_t: it returns ε_θ = √(1−ᾱ_t) · z_t + √ᾱ_t · h,
        # so ẑ_0 = √ᾱ_t · z_t − √(1−ᾱ_t) · h, and what is wrong with h is not magnified. (Stable
        # Diffusion returns ε itself and needs no clamp either: its 1/√ᾱ_t ends at 15.)
        z_0_pred = (z_t - math.sqrt(1 - alpha_bar_t) * noise_pred) / math.sqrt(alpha_bar_t)
        # DDIM Eq. 16:  σ_t = η · √((1−ᾱ_prev) / (1−ᾱ_t)) · √(1 − ᾱ_t/ᾱ_prev)
        sigma_t = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        sigma_t = sigma_t * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        # DDIM Eq. 12:  z_prev = √ᾱ_prev · ẑ_0 + √(1−ᾱ_prev−σ_t²) · ε_θ + σ_t · fresh noise
        z_prev = math.sqrt(alpha_bar_prev) * z_0_pred
        z_prev = z_prev + math.sqrt(1 - alpha_bar_prev - sigma_t**2) * noise_pred
        if sigma_t > 0:
            z_prev = z_prev + sigma_t * torch.randn_like(z_t)
        return z_prev, z_0_pred

    @torch.no_grad()
    def sample(self, n=16, ddim_steps=50, eta=0.0, z_t=None, start=None, frames=None):
        """Make n new images, (n, C, H, W) in [-1, 1]: DDIM from noise to latents, then decoding.

        ddim_steps: calls of the U-Net, 1 ... T. eta: 0 ... 1, as in 04. z_t: scaled latents with
        the noise of step `start` to go on from, (B, latent_ch, 8, 8); then n does not count.
        start: T - 1 unless given. frames: as in 02, decoded. Raises ValueError for values out of
        range.
        """
        start = self.T - 1 if start is None else start
        if not isinstance(start, int) or not 0 <= start < self.T:
            raise ValueError(f"start = {start!r}: it must be a whole number, 0 to {self.T - 1}")
        if z_t is None and start != self.T - 1:
            raise ValueError(f"start = {start}: give the z_t to start from; pure noise is T - 1")
        if not isinstance(ddim_steps, int) or not 1 <= ddim_steps <= start + 1:
            allowed = f"a whole number, 1 to {start + 1}"
            raise ValueError(f"ddim_steps = {ddim_steps!r}: it must be {allowed}")
        if not (isinstance(eta, int | float) and 0 <= eta <= 1):
            raise ValueError(f"eta = {eta!r}: it must be a number, 0 to 1")
        z_t = torch.randn(n, *self.latent_shape, device=self.device) if z_t is None else z_t
        timesteps = [round((start + 1) * i / ddim_steps) - 1 for i in range(ddim_steps, -1, -1)]
        bar = tqdm(timesteps[:-1], "DDIM", unit=" steps", leave=False)
        for i, (t, t_prev) in enumerate(zip(bar, timesteps[1:])):
            z_prev, z_0_pred = self.ddim_step(z_t, t, t_prev, eta)
            if frames is not None and i % math.ceil(ddim_steps / 50) == 0:
                frames.append((t, self.decode(z_t), self.decode(z_0_pred)))
            z_t = z_prev
        images = self.decode(z_t)
        if frames is not None:
            frames.append((-1, images, images))
        return images

    @torch.no_grad()
    def encode(self, x, draw=None):
        """Return scaled latents (B, latent_ch, 8, 8) of images x (B, C, H, W) in [-1, 1].

        draw: noise for μ + σ · draw, which is what the diffusion was trained on; without it only μ,
        which varies less: where an image says nothing, the KL term makes μ = 0 and σ = 1.
        """
        mean, log_variance = self.vae.encode(x)
        return (mean if draw is None else mean + (log_variance / 2).exp() * draw) * self.scale

    @torch.no_grad()
    def decode(self, z):
        """Return the images (B, C, H, W) in [-1, 1] of scaled latents z (B, latent_ch, 8, 8)."""
        return self.vae.decode(z / self.scale)


# %% 7. Training


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


# %% 8. Run


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


@torch.no_grad()
def encode_all(vae, images):
    """NEW in 05. Return mean and standard deviation of the latents of images, and their scale.

    images: uint8 (N, C, H, W). mean, deviation: (N, latent_ch, 8, 8). Computed once and kept, so
    the second stage never sees an image. scale: the factor that gives drawn latents the variance 1.
    SIMPLIFIED: no mirroring here, for mirrored latents are not the latents of a mirrored image.
    """
    means, log_variances = zip(*(vae.encode(to_batch(part)) for part in images.split(500)))
    mean, deviation = torch.cat(means), (torch.cat(log_variances) / 2).exp()
    # LDM appendix G:  z ← z / σ̂. One σ̂ for all values, from all images (the paper takes the first
    # batch). Centres and clouds both count:  σ̂² = Var[μ] + E[σ²].
    # Why: of data with the variance 1, z_t has it at every t, too. Latents ten times as large would
    # be as strong as the noise not at t = 496 but at 936 of 1000 (cosine): training would mostly
    # see nearly clean latents, and the first few steps of sampling would decide everything. (LDM
    # 4.3.2 and D.1 show the harm to images larger than those trained on.)
    # A large enough KL_WEIGHT brings the scale near 1 by itself: the decoder undoes any stretching
    # of a channel, and the KL term is least when the mean of μ² + σ² is 1. LDM's tiny one does not:
    # Stable Diffusion's latents have a standard deviation of 5.5, hence its 0.18215.
    variance = mean.var() + deviation.square().mean()
    return mean, deviation, 1 / variance.sqrt().item()


def digest_of(network):
    """NEW in 05. Return a few letters that change whenever a weight of network does."""
    weights = b"".join(weight.detach().cpu().numpy().tobytes() for weight in network.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def go_on(trainer, path, what):
    """NEW in 05. Train from the checkpoint in path on, if there is one; yield finished epochs."""
    size = sum(p.numel() for p in trainer.model.parameters())
    print(f"{what}: {size:,} parameters, {trainer.count:,} images, on {trainer.device}")
    trainer.resume(path)
    check_agreement((trainer.settings["DATASET"], trainer.count, trainer.step), trainer.world)
    yield from trainer.run(path)


def train_vae(vae, images, settings, path, rank, world):
    """NEW in 05. Stage 1: train vae, going on from the checkpoint in path; return its average.

    images: uint8 (N, C, H, W). settings: all those at the head; the VAE depends on a part of them.
    """
    other = path.with_name("checkpoint.pt")
    if other.exists() and not path.exists():
        sys.exit(f"{other} belongs to a VAE that is gone, {path}. Delete it as well.")
    names = "DATASET", "LATENT_CH", "VAE_CH", "KL_WEIGHT", "FLIP", "BATCH_SIZE", "LEARNING_RATE"
    own = {name: settings[name] for name in (*names, "EMA_DECAY", "SEED")}
    parallel = nn.parallel.DistributedDataParallel(vae) if world > 1 else vae

    def loss(index):
        x = to_batch(images[index], own["FLIP"])
        return vae_loss(x, *parallel(x), own["KL_WEIGHT"])

    own["VAE_EPOCHS"] = own["EPOCHS"] = settings["VAE_EPOCHS"]  # Trainer knows it as EPOCHS
    trainer = Trainer(vae, loss, len(images), own, rank, world)
    for _ in go_on(trainer, path, f"Stage 1 of 2: an autoencoder for {own['DATASET']}"):
        pass  # nothing to do between the epochs
    torch.manual_seed(own["SEED"])  # what comes next must not depend on where this was resumed
    return trainer.averaged


def load_test_images(name, folder, count=1000):
    """NEW in 05. Return images that no training has seen, uint8 (count, C, H, W)."""
    if name == "DRAWN":
        return draw_digits(count, seed=1)[0][:, None]
    images = torch.as_tensor(getattr(torchvision.datasets, name)(folder, train=False).data[:count])
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


@torch.no_grad()
def save_autoencoder_figures(vae, latents, scale, alphas_cumprod, x, seed, out_dir, note):
    """NEW in 05. Save what the VAE does to test images x (B, C, H, W), and how its latents lie.

    latents: many unscaled ones, drawn, (N, latent_ch, 8, 8).
    """
    z = vae.encode(x)[0]
    again = vae.decode(z)
    psnr = 10 * math.log10(4 / (again - x).square().mean().item())  # 4 = 2²: the range is 2
    print(f"Test images come back from their latents with {psnr:.1f} dB (PSNR).")
    # What a VAE is meant for: to decode noise. But the latents of digits fill only a small
    # part of N(0, 1), the less the smaller KL_WEIGHT is, and most noise lies elsewhere.
    noise = torch.randn(z[:12].shape, generator=torch.Generator().manual_seed(seed))
    prior = vae.decode(noise.to(z.device))
    rows = torch.cat([x[:12], again[:12], prior])
    names = ["test images", "from their latents", "from pure noise"]
    title = f"The autoencoder alone, PSNR {psnr:.1f} dB"
    image_table(rows, out_dir / "autoencoder.png", [""] * 12, names, title, note)
    channels = (z[:12] * scale / 2).transpose(0, 1)  # (latent_ch, 12, 8, 8), mostly within ±1
    latent_pictures(x[:12], channels, out_dir / "latents.png", note=note)
    latent_scaling(latents, scale, alphas_cumprod, out_dir / "latent_scale.png", note=note)


def save_latent_preview(ldm, trainer, epoch, preview_every, ddim_steps, out_dir, note):
    """NEW in 05. Every few epochs the first process saves 16 samples."""
    is_last = epoch == trainer.settings["EPOCHS"]
    if trainer.rank == 0 and epoch % preview_every == 0 and not is_last:
        torch.manual_seed(trainer.settings["SEED"])  # the same noise each time: watch it change
        path, title = out_dir / f"samples_epoch_{epoch:03}.png", f"After epoch {epoch}"
        sample_grid(ldm.sample(16, ddim_steps), path, title, note)


def training_cost(loss):
    """NEW in 05. Return seconds and megabytes of loss() and its gradients, without the optimizers.

    The memory is what the network keeps for the gradients, weights included; it grows with the
    batch. Gradients, optimizers and averages need three to four times the weights on top, and as
    much on pixels as on latents.
    """
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    loss().backward()  # the first step is slow: it does not count
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
    result.backward()
    result.item()  # a GPU runs behind: wait, or the time would include the step above
    start = perf_counter()
    for _ in range(2):
        result = loss()
        result.backward()
    result.item()  # waits until a GPU is done
    return (perf_counter() - start) / 2, sum(kept.values()) / 1e6


def save_costs(ldm, x_0, architecture, out_dir, note):
    """NEW in 05. Print and save what diffusion costs on pixels and on latents, at one width.

    What counts is places, 784 against 64, not values: each place has BASE_CH channels inside.
    x_0: a batch of images (B, C, H, W) in [-1, 1]. architecture: BASE_CH and the rest, as in UNet.
    """
    rows, steps = [], min(50, ldm.T)
    for name, shape in ("pixels", x_0.shape[1:]), ("latents", ldm.latent_shape):
        model = UNet(shape, *architecture, ldm.alphas_cumprod, ldm.model.precision)
        model.to(ldm.device, memory_format=best_layout(ldm.device))
        other = LatentDiffusion(model, ldm.vae, ldm.scale, ldm.betas, shape, ldm.device)
        data = x_0 if name == "pixels" else ldm.encode(x_0)
        seconds, megabytes = training_cost(partial(other.loss, data))
        if name == "pixels":
            other.decode = lambda z: z
        other.sample(1, 2).cpu()
        start = perf_counter()
        other.sample(1, steps).cpu()
        rows.append([data[0].numel(), 1000 * seconds, megabytes, perf_counter() - start])
    header = ["", "pixels", "latents", "ratio"]
    what = (
        ("values per image", "{:.0f}"),
        (f"loss and gradients of {len(x_0)} images: milliseconds", "{:.0f}"),
        ("the same: megabytes kept for the gradients", "{:.0f}"),
        (f"one image by {steps} steps of DDIM, decoded: seconds", "{:.2f}"),
    )
    lines = [
        [name, form.format(pixel), form.format(latent), f"{pixel / latent:.1f} ×"]
        for (name, form), pixel, latent in zip(what, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    for line in header, *lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths))
        print(text.replace("×", "x"))  # which any log file can hold
    title = f"The same U-Net on pixels and on latents (without stage 1), on {ldm.device}"
    table(header, lines, out_dir / "cost.png", title, note)


def save_latent_interpolation(ldm, x, seed, out_dir, note, points=9):
    """NEW in 05. Save ways between pairs of test images x (B, C, H, W), by way of noisy latents."""
    start = ldm.T * 6 // 10  # so much noise that the digit may change, not enough to forget it
    torch.manual_seed(seed)
    draw, noise = torch.randn(2, 1, *ldm.latent_shape, device=ldm.device)  # the same for all images
    z_0 = ldm.encode(x[:6], draw)
    t = torch.full((6,), start, device=ldm.device)
    z_t = q_sample(z_0, t, noise, ldm.alphas_cumprod)
    # Both images get the same noise, so on a straight line it stays as strong as step `start` wants
    # it. (DDPM section 4.4 blends two different noises along a line; half-way they are weaker.
    # slerp, right for two different noises, would magnify the one that is shared.)
    between = interpolate(z_t[0::2], z_t[1::2], points, "lerp").transpose(0, 1)
    diffused = ldm.sample(z_t=between.flatten(0, 1), start=start, ddim_steps=min(50, start + 1))
    plain = interpolate(z_0[0::2], z_0[1::2], points, "lerp").transpose(0, 1)
    decoded = ldm.decode(plain.flatten(0, 1))
    pairs = [ways.unflatten(0, (3, points)) for ways in (diffused, decoded)]
    rows = torch.stack(pairs, dim=1).flatten(0, 2)  # pair by pair, way by way
    shares = [f"{100 * i / (points - 1):.0f} %" for i in range(points)]
    names = ["noised, lerp, denoised", "lerp, decoded"] * 3
    title = f"From one test image to another, with the noise of t = {start} and without"
    image_table(rows, out_dir / "interpolation.png", shares, names, title, note)


def save_latent_figures(ldm, trainer, x, architecture, ddim_steps, out_dir, note):
    """NEW in 05. Sample 36 images and save the figures of a finished training in out_dir.

    x: test images (B, C, H, W) in [-1, 1], at least 12.
    """
    seed, frames = trainer.settings["SEED"], []
    title, short_note = f"DDIM, {ddim_steps} steps", f"{trainer.settings['DATASET']}, SEED = {seed}"
    torch.manual_seed(seed)
    samples = ldm.sample(36, ddim_steps, frames=frames)
    sample_grid(samples, out_dir / "samples.png", f"New images from latents, {title}", note)
    save_latent_interpolation(ldm, x, seed, out_dir, note)
    save_costs(ldm, x[:64], architecture, out_dir, note)
    denoising_strip(frames, out_dir / "denoising.png", "From noise to image, decoded", note)
    denoising_gif(frames, out_dir / "denoising.gif", note=short_note)
    loss_curve(trainer.losses, out_dir / "loss.png", "Training loss of the diffusion", note)
    print(f"Saved samples, autoencoder, latents, interpolation, cost and more in {out_dir}")


def check_latent_settings(settings):
    """NEW in 05. End the program with one clear line if a new setting does not work."""
    for name, kind, lowest, highest in (
        ("DDIM_STEPS", int, 1, settings["T"]),
        ("LATENT_CH", int, 1, 64),
        ("VAE_CH", int, 1, 1024),
        ("VAE_EPOCHS", int, 1, 100_000),
        ("KL_WEIGHT", (int, float), 0, 100),
    ):
        check_setting(name, settings[name], kind, lowest, highest)
    if len(settings["CHANNEL_MULT"]) > 4:
        sys.exit(
            f"CHANNEL_MULT = {settings['CHANNEL_MULT']} does not work: each entry after the first "
            "halves the latents, whose 8 × 8 places can be halved 3 times."
        )


FIXED = (  # the settings that a checkpoint must agree with
    *("DATASET", "LATENT_CH", "VAE_CH", "VAE_EPOCHS", "KL_WEIGHT"),  # NEW in 05
    *("T", "SCHEDULE", "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT"),
    *("DROPOUT", "FLIP", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "EMA_DECAY", "SEED"),
)

if __name__ == "__main__":
    sys.excepthook = explain
    rank, world = join_processes()
    check_settings(globals(), world)
    check_latent_settings(globals())
    settings = {name: globals()[name] for name in FIXED}  # the constants above, by name
    device = torch.device("cpu") if world > 1 and not ON_GPU else pick_device()
    out_dir = make_folder(OUT_DIR)
    images, _, source = load_images_in_turn(DATASET, DATA_DIR, rank, world)
    settings["DATASET"] = source  # drawn digits must not go on where MNIST stopped
    images, shape = images.to(device), images.shape[1:]
    x = to_batch(load_test_images(source, DATA_DIR).to(device))  # NEW in 05
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    betas = cosine_beta_schedule(T) if SCHEDULE == "cosine" else linear_beta_schedule(T)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    torch.manual_seed(SEED)
    vae = VAE(shape, VAE_CH, LATENT_CH).to(device, memory_format=best_layout(device))
    vae = train_vae(vae, images, settings, out_dir / "vae.pt", rank, world)  # NEW in 05
    mean, deviation, scale = encode_all(vae, images)
    settings["VAE"] = digest_of(vae)  # a stage 2 fits no other VAE than its own
    note = f"{source}, VAE_EPOCHS = {VAE_EPOCHS}, EPOCHS = {EPOCHS}, T = {T}, SEED = {SEED}"
    if rank == 0:
        drawn = mean[:2000] + deviation[:2000] * torch.randn_like(mean[:2000])
        save_autoencoder_figures(vae, drawn, scale, alphas_cumprod, x, SEED, out_dir, note)
    latent_shape, architecture = mean.shape[1:], (BASE_CH, CHANNEL_MULT, NUM_BLOCKS, ATTENTION_AT)
    model = UNet(latent_shape, *architecture, DROPOUT, alphas_cumprod, best_precision(device))
    model.to(device, memory_format=best_layout(device))
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    ldm_in_training = LatentDiffusion(parallel, vae, scale, betas, latent_shape, device)

    def loss(index):
        z = mean[index] + deviation[index] * torch.randn_like(mean[index])  # NEW in 05
        return ldm_in_training.loss(z * scale)

    trainer = Trainer(model, loss, len(mean), settings, rank, world)
    ldm = LatentDiffusion(trainer.averaged, vae, scale, betas, latent_shape, device)
    if COMPILE:
        model.compile()
    for epoch in go_on(trainer, out_dir / "checkpoint.pt", "Stage 2 of 2: diffusion on latents"):
        save_latent_preview(ldm, trainer, epoch, PREVIEW_EVERY, DDIM_STEPS, out_dir, note)
    parallel = ldm_in_training.model = model  # without DistributedDataParallel, which ends now
    leave_processes(world)
    if rank == 0:
        save_latent_figures(ldm, trainer, x, (*architecture, DROPOUT), DDIM_STEPS, out_dir, note)
