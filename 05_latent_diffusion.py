"""05 · Latent diffusion: the core of Stable Diffusion, in one file.

    python 05_latent_diffusion.py
    torchrun --standalone --nproc_per_node=4 05_latent_diffusion.py       # on 4 GPUs of one machine

Most of an image's pixels say little. Stage 1 trains an autoencoder, a VAE, which turns an image
into a small grid of numbers, its latents, and back: here 28 × 28 pixels into 4 × 8 × 8 latents, in
Stable Diffusion 3 × 512 × 512 into 4 × 64 × 64. The VAE alone cannot generate: the latents of
digits fill only a small part of N(0, 1), so pure noise does not decode to a digit. Stage 2 learns
which part, by diffusion on the latents of all images. It uses the same U-Net, schedule, training
and sampler as before, which are cheap on a grid of 8 × 8. The one difference is that the network
predicts v, a mixture of noise and latents (`loss` says why). To sample, diffusion generates latents
from noise, and the decoder turns them into an image.
Stable Diffusion is named after Stability AI, which provided the computing time. Training on latents
is stable because they are regularised (`vae_loss`) and scaled to the variance 1 that the noise
schedule assumes (`encode_all`). Labels, guidance (03) and text (cross-attention, LDM section 3.3)
are left out.
What is new is marked `NEW in 05`: read section 5, and in section 6 `loss`, `predict` and `sample`;
section 9 puts the two stages together. U-Net and training are those of 02, the sampler that of 04.

The script leaves in `outputs/05_latent_diffusion/` reconstructions by the VAE, and images that it
decodes from noise (`autoencoder.png`), the latents (`latents.png`, `latent_scale.png`), the cost of
diffusion on pixels and on latents (`cost.png`), interpolations between images
(`interpolation.png`), and the other files of 02. Each stage has a checkpoint of its own. With
`python -i`, or after `ldm = load("outputs/05_latent_diffusion/checkpoint.pt")`:
`ldm.sample(n=16, ddim_steps=50)`; of images x, `ldm.decode(ldm.encode(x))`.

LDM = Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models,
arXiv:2112.10752v2
Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114
Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512
DDPM = Ho, Jain & Abbeel 2020, arXiv:2006.11239; Improved DDPM = Nichol & Dhariwal 2021,
arXiv:2102.09672; DDIM = Song, Meng & Ermon 2021, arXiv:2010.02502

Code            Paper              Shape               Meaning (for other symbols see 02 and 04)
mean            μ; E_μ(x)          (B, 4, h, h)        centre of the latents of an image
log_variance    log σ²; log E_σ²   (B, 4, h, h)        how far they spread around it
scale           1/σ̂ (appendix G)                       σ̂: standard deviation of all latents
z_0             z = E(x)/σ̂         (B, 4, h, h)        latents, drawn and scaled
z_t             z_t                (B, 4, h, h)        the same with the noise of step t
v_pred          v̂_θ(z_t, t)        (B, 4, h, h)        the prediction of √ᾱ_t · ε − √(1−ᾱ_t) · z_0
"""

# %% 1. Settings: edit and run again

import copy
import hashlib
import io
import math
import os
import socket
import sys
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic as now

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.interpolation import interpolate
from utils.visualize import (
    draw_digits,
    image_table,
    latent_pictures,
    latent_scaling,
    sample_grid,
    save_results,
    table,
)

ON_GPU = torch.cuda.is_available()  # selects the larger defaults below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", "DRAWN" (offline), or a folder of images
IMAGE_SIZE = 64  # for a folder: its images are cropped and resized to squares of this side
DOWNSAMPLE = 4  # NEW in 05: latents have 1/4 of the side of an image; 2, 4 or 8
LATENT_CH = 4  # NEW in 05: channels of the latents; more: sharper, but harder to model
VAE_CH = 32 if ON_GPU else 16  # NEW in 05: channels of the VAE at full size; more at coarser levels
VAE_EPOCHS = 10 if ON_GPU else 2  # NEW in 05: times that an image is seen in stage 1
KL_WEIGHT = 0.002  # NEW in 05: pull of the latents towards N(0, 1); see vae_loss
T = 1000  # noise steps in training; sampling takes DDIM_STEPS
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 128 if ON_GPU else 48  # channels of the U-Net; many, because they are cheap here
CHANNEL_MULT = (1, 2)  # in multiples of BASE_CH; MNIST: 8 × 8 → 4 × 4 latents
NUM_BLOCKS = 2 if ON_GPU else 1  # residual blocks per level
ATTENTION_AT = (8,)  # resolutions of the latents with self-attention; the middle always has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # regularisation for photographs
FLIP = DATASET == "CIFAR10"  # mirror half of the images in stage 1; never digits
EPOCHS = 100 if ON_GPU else 9  # times that a latent is seen in stage 2
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # peak learning rate of Muon; halve it if the loss jumps up
EMA_DECAY = 0.9999  # highest decay of the averaged weights; reached only after 90,000 steps
DDIM_STEPS = 50  # evaluations of the U-Net per image, 1 ... T
SAVE_EVERY = 2  # minutes between checkpoints: the most that an interruption can cost
PREVIEW_EVERY = 5  # minutes between grids of samples
COMPILE = False  # True: use torch.compile; slow to start, perhaps faster then
SEED = 0  # the same seed on the same CPU gives the same digits
DATA_DIR = "data"  # datasets are looked for and downloaded here
OUT_DIR = "outputs/05_latent_diffusion"  # results are saved here


# %% 2. Data


def read_image(file, size):
    """Return an image file of any kind as uint8 (3, size, size); transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(file))  # upright, as the camera was held
    if image.mode.startswith("I"):  # 16 bits per pixel
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(ImageOps.fit(image, (size, size)))).permute(2, 0, 1)


def load_folder(folder, size):
    """Return all images below a folder, uint8 (N, 3, size, size), labels (N,) and class names.

    The class of an image is the name of the folder that contains it. Files and folders whose names
    begin with a dot are skipped.
    """
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in kinds)
    files = [f for f in files if "/." not in f"/{f.relative_to(folder).as_posix()}"]
    if len(files) < 2:
        sys.exit(f"DATASET: {folder} is neither a dataset known here nor a folder with 2 images.")
    class_names, images = sorted({file.parent.name for file in files}), []
    for file in tqdm(files, "Reading images", unit=" images"):
        try:
            images.append(read_image(file, size))
        except Exception as error:
            sys.exit(f"\n{file} cannot be read as an image ({error}): repair or remove it.")
    labels = torch.tensor([class_names.index(file.parent.name) for file in files])
    return torch.stack(images), labels, class_names


def load_dataset(name, folder, size):
    """Return images, uint8 (N, C, H, W), labels, int64 (N,), class names, and the dataset's name.

    name: a dataset of torchvision, "DRAWN", or a folder of images, which are resized to `size`.
    If MNIST cannot be loaded, rendered digits replace it; if another dataset cannot, the program
    ends.
    """
    if name == "DRAWN":
        images, labels = draw_digits()
        return images[:, None], labels, [*"0123456789"], name
    if name not in ("MNIST", "FashionMNIST", "CIFAR10"):
        path = Path(name).expanduser().resolve()
        return *load_folder(path, size), f"{path.parent.name}/{path.name}/"
    socket.setdefaulttimeout(20)  # seconds; otherwise a dead connection would hang for ever
    try:
        data = getattr(torchvision.datasets, name)(folder, train=True, download=True)
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    except Exception as error:  # no internet or a damaged file
        reason = " ".join(str(error).split())
        print(f"{name} could be neither read from {folder} nor downloaded: {reason}")
        return load_dataset("DRAWN", folder, size) if name == "MNIST" else sys.exit(1)
    # grey (N, H, W) → (N, 1, H, W), colour (N, H, W, 3) → (N, 3, H, W)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images, labels, [c.split(" - ")[0] for c in data.classes], name  # MNIST: "0 - zero"


def hold_out(images, name, folder):
    """NEW in 05. Return the images to train on and up to 1,000 others, both uint8 (N, C, H, W)."""
    if name == "DRAWN":
        return images, draw_digits(1000, seed=1)[0][:, None]
    if not name.endswith("/"):  # no folder: see load_dataset
        try:
            test = getattr(torchvision.datasets, name)(folder, train=False).data[:1000]
        except Exception as error:
            sys.exit(f"The test images of {name} in {folder} are damaged ({error}): delete them.")
        test = torch.as_tensor(test)
        return images, test[:, None] if test.ndim == 3 else test.permute(0, 3, 1, 2)
    held_out = torch.arange(len(images)) % 20 == 0  # of one's own images every 20th
    return images[~held_out], images[held_out][:1000]


# %% 3. Noise schedule and forward process


def linear_beta_schedule(T):
    """Return β, float64 (T,): DDPM section 4; 1000 / T, for other T, as in Improved DDPM's code."""
    return (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)


def cosine_beta_schedule(T):
    """NEW in 02. Return β of T steps, float64 (T,): Improved DDPM, section 3.2, with s = 0.008.

    The linear schedule destroys an image too early: in the last fifth of its steps, x_t is almost
    pure noise and teaches little. Here ᾱ falls evenly in the middle and gently at both ends.
    """
    s = 0.008  # without it, the first steps add so little noise that it is hard to predict
    # Improved DDPM Eq. 17:  ᾱ_t = f(t) / f(0),  f(t) = cos²( (t/T + s) / (1 + s) · π/2 )
    t = torch.arange(T + 1, dtype=torch.float64)  # here as in the paper: 0 is the clean image
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    # β_t = 1 − ᾱ_t / ᾱ_{t−1}. The last would be 1 and ᾱ_T 0, so β is cut off at 0.999.
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def q_sample(x_0, t, noise, alphas_cumprod):
    """Add the noise of all steps up to t (B,) to images x_0 (B, C, H, W), in one go."""
    alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    # DDPM Eq. 2, one step:  x_t = √α_t · x_{t−1} + √β_t · ε_t.  Two steps from x_0 lead to
    #   x_2 = √α_2 · (√α_1 · x_0 + √β_1 · ε_1) + √β_2 · ε_2.  Sums of independent Gaussians
    #   are Gaussian; variances add up: α_2 · (1 − α_1) + (1 − α_2) = 1 − α_1·α_2 = 1 − ᾱ_2,
    # and so on, step by step, up to DDPM Eq. 4:  x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


# %% 4. U-Net


def timestep_embedding(t, dim):
    """Turn t (B,) into sines and cosines (B, dim), fast to slow: DDPM appendix B."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(ch):
    """Return a GroupNorm for ch channels: 8 groups, or fewer where 8 does not divide ch."""
    # It normalises each image by itself; BatchNorm would average over images with different t.
    return nn.GroupNorm(math.gcd(8, ch), ch)


def zero_init(layer):
    """Set a layer's weights to zero, so that a block ending in it starts as its shortcut alone."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """NEW in 02. Let each position of x (B, ch, H, W) gather information from all others.

    Each position has a query, a key and a value. It receives the mean of all values, weighted by
    how well their keys match its query. Several heads do this in parallel, each on its share of the
    channels. A convolution sees 3 × 3 positions, and attention sees them all. But the cost of
    attention grows with the square of their number, so only coarse levels have it.
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
        # softmax(query · keyᵀ / √(C/heads)) · value
        h = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two convolutions, conditioned on t, and a shortcut; then attention, if requested.

    Takes x (B, in_ch, H, W) and `time` (B, time_dim), t's embedding; returns (B, out_ch, H, W).
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
        # t scales and shifts the channels: Improved DDPM, appendix A. (DDPM only shifts them.)
        h = F.silu(self.norm_2(h) * (1 + scale) + shift)
        return self.attention(self.shortcut(x) + self.conv_2(self.dropout(h)))


class UNet(nn.Module):
    """Predict the noise (05: v) in x_t (B, C, side, side) at step t (B,): after DDPM, appendix B.

    This is the network of 02 to 04 for MNIST on a CPU, with NUM_BLOCKS = 1 and BASE_CH = 16. Every
    output on the left is a skip. (05 has two levels, 8 × 8 and 4 × 4.)

    28 × 28   conv_in (16) → block (16) ───── 2 skips ────→ 2 blocks (16) → conv_out
                ↓ shrink                                      ↑ grow
    14 × 14         └ block (32) ──────────── 2 skips ────→ 2 blocks (32)       * with attention
                        ↓ shrink                              ↑ grow
     7 × 7                  └ block (64) ──── 2 skips ────→ 2 blocks (64)
                                └─→ middle_1* (64) → middle_2 (64) ┘

    Each level after the first halves the resolution, which must be even. attention_at: resolutions
    at which the blocks have attention. precision: the dtype of convolutions and matrix products.
    """

    def __init__(self, shape, base_ch, ch_mult, num_blocks, attention_at, dropout, precision):
        super().__init__()
        channels, side, _ = shape
        assert side % 2 ** (len(ch_mult) - 1) == 0, f"{side} pixels cannot be halved so often"
        self.precision, time_dim = precision, 4 * base_ch
        self.time = nn.Sequential(
            nn.Linear(2 * base_ch, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.conv_in = nn.Conv2d(channels, base_ch, 3, padding=1)
        self.shrink, self.down = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        attention = [side // 2**level in attention_at for level in range(len(ch_mult))]
        ch, skip_channels = base_ch, [base_ch]  # of h, and of each skip
        for level, mult in enumerate(ch_mult):
            if level > 0:
                self.shrink.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skip_channels.append(ch)
            self.down.append(nn.ModuleList())
            for _ in range(num_blocks):
                block = ResBlock(ch, base_ch * mult, time_dim, dropout, attention[level])
                self.down[level].append(block)
                ch = base_ch * mult
                skip_channels.append(ch)
        self.middle_1 = ResBlock(ch, ch, time_dim, dropout, attention=True)
        self.middle_2 = ResBlock(ch, ch, time_dim, dropout)
        for level, mult in reversed(list(enumerate(ch_mult))):
            self.up.append(nn.ModuleList())
            for _ in range(num_blocks + 1):  # + 1: conv_in and shrink have a skip, too
                in_ch = ch + skip_channels.pop()
                block = ResBlock(in_ch, base_ch * mult, time_dim, dropout, attention[level])
                self.up[-1].append(block)
                ch = base_ch * mult
            if level > 0:
                self.grow.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = group_norm(ch)
        self.conv_out = zero_init(nn.Conv2d(ch, channels, 3, padding=1))

    def forward(self, x_t, t):
        # Mixed precision: matrix products use 16 bits if the GPU is fast at that. Weights, sums
        # over many values and everything outside the network stay float32.
        mixed = self.precision != torch.float32
        with torch.autocast(x_t.device.type, self.precision, enabled=mixed):
            time = self.time(timestep_embedding(t, self.time[0].in_features))
            time = F.silu(time)  #                                       (B, time_dim)
            h = self.conv_in(x_t)  #                                     (B, base_ch, side, side)
            skips = [h]
            for level, blocks in enumerate(self.down):
                if level > 0:
                    h = self.shrink[level - 1](h)  #                     (B, ch, side / 2, side / 2)
                    skips.append(h)
                for block in blocks:
                    h = block(h, time)
                    skips.append(h)
            h = self.middle_2(self.middle_1(h, time), time)
            for i, blocks in enumerate(self.up):  # from the coarsest level to the finest
                if i > 0:
                    h = self.grow[i - 1](F.interpolate(h, scale_factor=2))  # twice the side
                for block in blocks:
                    h = block(torch.cat([h, skips.pop()], dim=1), time)
            return self.conv_out(F.silu(self.norm_out(h))).float()  #    (B, C, side, side)


# %% 5. VAE and the scale of its latents: NEW in 05


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

    image_shape: (C, side, side). downsample: the factor by which latents are smaller, 2, 4 or 8
    (LDM's f). Images are padded with black, MNIST's from 28 to 32, so that the side of the latents
    is even and the U-Net can halve it; decoded images are cropped. base_ch: channels at full
    resolution; 2 · base_ch at half of it, 4 · base_ch below. latent_shape: (latent_ch, h, h).
    """

    def __init__(self, image_shape, base_ch, latent_ch, downsample=4):
        super().__init__()
        channels, side, _ = image_shape
        padding = -side % (2 * downsample)
        before, small = padding // 2, (side + padding) // downsample
        self.padding = (before, padding - before) * 2  # left and right, above and below
        self.inside = slice(before, before + side)
        self.latent_shape = latent_ch, small, small
        levels = [base_ch * min(2**level, 4) for level in range(downsample.bit_length())]
        down, up = [], []
        for fine, coarse in pairwise(levels):
            down += nn.Conv2d(fine, coarse, 3, stride=2, padding=1), VAEBlock(coarse)
            back = nn.Upsample(scale_factor=2), nn.Conv2d(coarse, fine, 3, padding=1)
            up = [VAEBlock(coarse), *back, *up]
        encoder = OrderedDict(  # the layers have names because Muon leaves the outer ones to Adam
            conv_in=nn.Conv2d(channels, base_ch, 3, padding=1),
            down=nn.Sequential(*down),
            norm=group_norm(levels[-1]),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(levels[-1], 2 * latent_ch, 3, padding=1),  # mean, log variance
        )
        decoder = OrderedDict(
            conv_in=nn.Conv2d(latent_ch, levels[-1], 3, padding=1),
            up=nn.Sequential(*up),
            norm=group_norm(base_ch),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(base_ch, channels, 3, padding=1),
        )
        self.encoder, self.decoder = nn.Sequential(encoder), nn.Sequential(decoder)

    def encode(self, x):
        """Return mean and log variance (B, latent_ch, h, h) of the latents of x (B, C, H, W).

        An image becomes not a point but a small cloud, from which one latent is drawn.
        """
        padded = F.pad(x, self.padding, value=-1.0)
        mean, log_variance = self.encoder(padded).chunk(2, dim=1)
        # clamp: exp() of an untrained output may overflow. clone: Apple's GPUs have given wrong
        # results for convolutions of a tensor that is a view of some channels of another.
        return mean.clone(), log_variance.clamp(-20, 10)

    def decode(self, z):
        """Return images (B, C, side, side) in [-1, 1] of latents z (B, latent_ch, h, h)."""
        return self.reconstruct(z).clamp(-1, 1)

    def reconstruct(self, z):
        """As decode, but unclamped, for training: a clamped pixel would learn nothing."""
        return self.decoder(z)[:, :, self.inside, self.inside]

    def forward(self, x):
        """Return the reconstruction of x (B, C, H, W), and its latents' mean and log variance."""
        mean, log_variance = self.encode(x)
        # Reparameterisation:  z = μ + σ · ε. Drawing from N(μ, σ²) has no gradient; in this sum
        # only ε is random, and gradients reach μ and σ. (Kingma & Welling, section 2.4)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.reconstruct(z), mean, log_variance


def vae_loss(x, reconstruction, mean, log_variance, kl_weight):
    """Return the VAE's loss: squared error + kl_weight · KL divergence, both per pixel value.

    The KL divergence is 0 where the cloud is N(0, 1). Without it, clouds would shrink to points far
    from one another, and the decoder would never learn what lies between them.

    kl_weight = 2 s² gives the VAE of Kingma & Welling for pixels from N(x̂, s²): we multiply their
    loss, the sum of squared errors / (2 s²) + KL, by 2 s² and divide it by the number of values.
    0.002 means s = 0.03, which is 4 of 255 grey levels. A smaller weight gives sharper images, but
    latents that are rougher and harder to model; a larger one gives smoother latents, but blurred
    images. LDM uses about 0.000001 (appendix G), which hardly restricts the size of the latents:
    that is left to scaling.

    SIMPLIFIED: LDM uses the absolute error, and adds a perceptual loss (LPIPS: the error in the
    features of a trained image classifier) and an adversarial one (a second network that learns to
    tell reconstructions from images, patch by patch). Without these, fine texture comes out
    blurred, because the mean over all textures has the smallest squared error. Digits have no
    texture; photographs suffer.
    """
    # Kingma & Welling, appendix B:  KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ (μ² + σ² − 1 − log σ²)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
    return F.mse_loss(reconstruction, x) + kl_weight * kl.mean() / x[0].numel()


@torch.no_grad()
def encode_all(vae, images, batch_size):
    """NEW in 05. Return mean and standard deviation of the latents of images, and their scale.

    images: uint8 (N, C, H, W). mean, deviation: (N, latent_ch, h, h). They are computed once and
    stored, so stage 2 never sees an image. scale: the factor that gives drawn latents variance 1.
    SIMPLIFIED: no mirroring here, because mirrored latents are not those of a mirrored image.
    """
    means, log_variances = zip(*(vae.encode(to_batch(part)) for part in images.split(batch_size)))
    mean, deviation = torch.cat(means), (torch.cat(log_variances) / 2).exp()
    # LDM appendix G:  z ← z / σ̂. One σ̂ for all values, from all images (the paper takes the first
    # batch). Centres and clouds both count:  σ̂² = Var[μ] + E[σ²].
    # Why? If latents have variance 1, so does z_t at every t, and signal and noise are equally
    # strong at t = 496 of 1000 (cosine). If latents were ten times as large, that point would be at
    # t = 936: training would mostly see nearly clean latents, and the first few steps of sampling
    # would decide everything.
    # Does the KL term not lead to variance 1 by itself? Averaged over all images, the term is
    # smallest there, and a decoder can undo any stretching of the latents. But how close training
    # gets depends on its length and on KL_WEIGHT. With LDM's tiny weight, it does not get close:
    # Stable Diffusion's latents have a standard deviation of 5.5, so its factor is 0.18215.
    variance = mean.var() + deviation.square().mean()
    return mean, deviation, 1 / variance.sqrt().item()


# %% 6. Loss and sampler


class LatentDiffusion:
    """NEW in 05. Diffusion on the latents of a VAE: v instead of ε, the sampler of 04, no clamp.

    model: called as model(z_t, t), returns (B, latent_ch, h, h). vae: trained. scale: the factor
    that gives the latents the variance 1. betas: float64 (T,), each in (0, 1).
    """

    def __init__(self, model, vae, scale, betas, latent_shape, device):
        self.model, self.vae, self.scale, self.T = model, vae, scale, len(betas)
        self.betas, self.latent_shape, self.device = betas, latent_shape, device
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # as in 04: [-1] is the clean latent's

    @classmethod
    def build(cls, state, device):
        """Return the sampler that a checkpoint describes, with its averaged weights.

        state: the contents of the checkpoint: "settings", the constants by name, "extras", the VAE
        and the scale of its latents, and "averaged", the weights of the U-Net. Without the last,
        the U-Net is untrained.
        """
        settings, extras = state["settings"], state["extras"]
        vae = VAE(*[settings[name] for name in AUTOENCODER])
        vae.load_state_dict(extras["vae"])
        betas = SCHEDULES[settings["SCHEDULE"]](settings["T"])
        model = UNet(*[settings[name] for name in NETWORK], best_precision(device))
        if "averaged" in state:
            model.load_state_dict(state["averaged"])
            model.eval().requires_grad_(False)
        for network in model, vae.eval().requires_grad_(False):
            network.to(device, memory_format=best_layout(device))
        return cls(model, vae, extras["scale"], betas, vae.latent_shape, device)

    def loss(self, z_0):
        """Return the loss of scaled latents z_0 (B, latent_ch, h, h): LDM Eq. 2, but with v."""
        t = torch.randint(self.T, (len(z_0),), device=self.device)  # 0 ... T-1, any step
        noise = torch.randn_like(z_0)
        v_pred = self.model(q_sample(z_0, t, noise, self.alphas_cumprod), t)
        # NEW in 05: the network does not predict ε, as LDM Eq. 2 has it, but
        #   v = √ᾱ_t · ε − √(1−ᾱ_t) · z_0  (Salimans & Ho, section 4),
        # nearly ε where there is little noise, nearly −z_0 where there is little else. We get back
        #   ẑ_0 = √ᾱ_t · z_t − √(1−ᾱ_t) · v̂,
        # and no error of v̂ is magnified. With ε_θ, ẑ_0 = (z_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t, and at
        # t = T - 1 the cosine schedule has 1/√ᾱ_t = 20,000. For pixels, clamping x̂_0 limits these
        # errors; latents have no bounds to clamp to. (In Stable Diffusion 1, 1/√ᾱ_t ends at 15, and
        # the network predicts ε; the 768-pixel model of Stable Diffusion 2 predicts v.)
        # ‖v − v̂‖² = ‖ε − ε̂‖² / ᾱ_t, so this loss cannot be compared with that of 02.
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * z_0
        return F.mse_loss(v_pred, v)

    def predict(self, z_t, t):
        """Return z_0_pred and noise_pred, (B, latent_ch, h, h) each, for z_t at step t, an int."""
        v_pred = self.model(z_t, torch.full((len(z_t),), t, device=self.device))
        signal, spread = math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        # NEW in 05: DDPM Eq. 4 and the definition of v, solved for z_0 and ε
        #   ẑ_0 = √ᾱ_t · z_t − √(1−ᾱ_t) · v̂,   ε̂ = √(1−ᾱ_t) · z_t + √ᾱ_t · v̂
        return signal * z_t - spread * v_pred, spread * z_t + signal * v_pred

    def ddim_step(self, z_t, t, t_prev, eta):
        """Go from z_t at t to any t_prev < t, both ints: return z_prev, z_0_pred; as in 04."""
        z_0_pred, noise_pred = self.predict(z_t, t)
        alpha_bar_t, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]
        # DDIM Eq. 16:  σ_t = η · √((1−ᾱ_prev) / (1−ᾱ_t)) · √(1 − ᾱ_t/ᾱ_prev)
        sigma_t = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        sigma_t = sigma_t * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        # DDIM Eq. 12:  z_prev = √ᾱ_prev · ẑ_0 + √(1−ᾱ_prev−σ_t²) · ε̂ + σ_t · new noise
        z_prev = math.sqrt(alpha_bar_prev) * z_0_pred
        z_prev = z_prev + math.sqrt(1 - alpha_bar_prev - sigma_t**2) * noise_pred
        if sigma_t > 0:
            z_prev = z_prev + sigma_t * torch.randn_like(z_t)
        return z_prev, z_0_pred

    @torch.no_grad()
    def sample(self, n=16, ddim_steps=50, eta=1.0, frames=None):
        """Make n new images, (n, C, H, W) in [-1, 1]: from noise to latents, then to images.

        ddim_steps, eta, frames: as in `denoise`.
        """
        z_T = torch.randn(n, *self.latent_shape, device=self.device)
        return self.decode(self.denoise(z_T, self.T - 1, ddim_steps, eta, frames))

    @torch.no_grad()
    def denoise(self, z_t, t, ddim_steps=50, eta=1.0, frames=None):
        """Return scaled latents z_0 (B, latent_ch, h, h), from z_t with the noise of step t: DDIM.

        t: an int, 0 ... T - 1. ddim_steps: evaluations of the U-Net, 1 ... t + 1. eta: 0 ... 1, as
        in 04. frames: as in 02, decoded. Raises ValueError for steps and eta out of range.
        """
        if ddim_steps not in range(1, t + 2):
            allowed = f"a whole number, 1 to {t + 1}"
            raise ValueError(f"ddim_steps = {ddim_steps!r}: it must be {allowed}")
        eta = float(eta)  # NumPy's float32 would be too inexact
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta!r}: it must be a number, 0 to 1")
        steps, rest = range(ddim_steps, -1, -1), t + 1 - ddim_steps  # 04's "early"
        timesteps = [i + round(rest * (1 - (1 - i / ddim_steps) ** 2)) - 1 for i in steps]
        bar = tqdm(timesteps[:-1], "DDIM", unit=" steps", leave=False)
        for i, (t, t_prev) in enumerate(zip(bar, timesteps[1:])):
            z_prev, z_0_pred = self.ddim_step(z_t, t, t_prev, eta)
            if frames is not None and i % math.ceil(ddim_steps / 50) == 0:
                frames.append((t, self.decode(z_t), self.decode(z_0_pred)))
            z_t = z_prev
        if frames is not None:
            images = self.decode(z_t)
            frames.append((-1, images, images))
        return z_t

    @torch.no_grad()
    def encode(self, x, draw=None):
        """Return scaled latents (B, latent_ch, h, h) of images x (B, C, H, W) in [-1, 1].

        draw: the noise in μ + σ · draw, the latents that diffusion is trained on. Without draw, the
        latents are μ, which varies less: the distribution of a latent that the decoder does not
        need becomes N(0, 1), so its μ is 0.
        """
        mean, log_variance = self.vae.encode(x)
        return (mean if draw is None else mean + (log_variance / 2).exp() * draw) * self.scale

    @torch.no_grad()
    def decode(self, z):
        """Return the images (B, C, H, W) in [-1, 1] of scaled latents z (B, latent_ch, h, h)."""
        return self.vae.decode(z / self.scale)


def update_average(averaged, model, step, ema_decay):
    """NEW in 02. Move averaged weights a little towards the model's, after training step `step`.

    Exponential moving average:  average ← decay · average + (1 − decay) · weights.  While the
    learning rate is high, the weights fluctuate from step to step, and samples are better with
    their average; at the end, when the rate is near zero, the two hardly differ. The average covers
    about 1 / (1 − decay) steps, 10,000 for 0.9999. Early on, these would include the random initial
    weights, so decay is smaller, and the average covers only a ninth of the steps so far.
    """
    decay = min(ema_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, weight in zip(averaged.parameters(), model.parameters()):
            average.lerp_(weight, 1 - decay)


SAMPLER = LatentDiffusion  # what a checkpoint of this script holds
SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule}
AUTOENCODER = "IMAGE_SHAPE", "VAE_CH", "LATENT_CH", "DOWNSAMPLE"  # NEW in 05
NETWORK = "LATENT_SHAPE", "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT", "DROPOUT"
FIXED_VAE = "DATASET", *AUTOENCODER, "KL_WEIGHT", "VAE_EPOCHS"  # NEW in 05
FIXED = "VAE", *FIXED_VAE, "T", "SCHEDULE", *NETWORK  # must match a checkpoint to resume


def load(path):
    """Return the sampler in a checkpoint, with the averaged weights: load(path).sample(n=16).

    The checkpoint describes itself: the constants at the top of this file have no influence.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    return SAMPLER.build(state, pick_device())


# %% 7. Training: nothing about diffusion from here on


def best_precision(device):
    """Return the fastest dtype here that trains well: bfloat16, float16 or float32.

    bfloat16 has float32's range with fewer digits. float16, for older GPUs, has a smaller range:
    small gradients would become zero without the GradScaler in `Trainer`.
    """
    if device.type != "cuda":
        return torch.float32
    modern = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if modern else torch.float16


def best_layout(device):
    """Return the memory layout that makes convolutions fast: the channels of a pixel together.

    On two CPU cores, a network evaluation is 15 % faster. Apple's GPUs gave wrong results with it.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_batch(images, flip=False):
    """Turn images, uint8 0 ... 255, into float -1 ... 1; with flip, mirror about half of them."""
    x_0 = images.float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(len(x_0), 1, 1, 1, device=x_0.device) < 0.5
        x_0 = torch.where(mirrored, x_0.flip(3), x_0)
    return x_0


class Muon(torch.optim.Optimizer):
    """NEW in 02. Momentum, but each update of a matrix is about equally large in all directions.

    Gradients are large in a few directions (singular vectors) and small in most. Muon scales
    all of them to about the same size. On a CPU, a step takes about 10 % longer than with Adam, but
    after the same training time the Fréchet distance of 02 is two thirds smaller (see the README).
    weights: parameters of two or more dimensions; lr: about 0.02. Jordan et al. 2024,
    kellerjordan.github.io/posts/muon. (torch.optim.Muon does not accept convolutions, and computes
    in bfloat16, which is slow on many CPUs.)
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
                # Newton–Schulz steps with Jordan's coefficients bring them all close to 1:
                for _ in range(5):  # σ ← 3.4445 σ − 4.7750 σ³ + 2.0315 σ⁵
                    gram = u @ u.T
                    u = 3.4445 * u + (2.0315 * gram @ gram - 4.7750 * gram) @ u
                step_size = group["lr"] * max(1, u.shape[0] / u.shape[1]) ** 0.5
                weight.sub_(step_size * u.view_as(weight))


def split_weights(model):
    """Return the matrices inside the network, for Muon, and all other weights, for Adam.

    Muon's authors leave the first and the last layer, vectors and embeddings to Adam. (They also
    update query, key and value separately; here these are rows of one matrix.)
    """
    inner, outer = [], []
    for name, weight in model.named_parameters():
        at_the_ends = any(part in name for part in ("conv_in", "conv_out", "embedding"))
        (outer if at_the_ends or weight.ndim == 1 else inner).append(weight)
    return inner, outer


def save_atomically(contents, path):
    """Save to a temporary file and rename it: an interruption leaves the old file intact."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)  # not to a file: a full disk would end Python without a message
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # waits until the disk has it: this survives a power cut
    os.replace(partial, path)


class Trainer:
    """Trains a network; a new Trainer resumes from the last checkpoint, however the old one ended.

    On a CPU, the result is the same as without the interruption, to the last bit. A GPU may add
    numbers in a different order.

    loss: a function from the indices of a batch (B,) to its loss. count: how many images there are.
    settings: the constants by name, saved in the checkpoint. fixed: the names of constants that
    must be the same as in the checkpoint. path: the checkpoint. rank: the number of this process.
    world: how many processes there are.
    """

    STATES = "model", "averaged", "muon", "adam"  # have a state_dict each
    VALUES = "step", "losses", "extras"

    def __init__(self, model, loss, count, settings, fixed, path, rank=0, world=1):
        self.model, self.loss, self.count, self.settings = model, loss, count, settings
        self.path, self.rank, self.world = path, rank, world
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)  # these weights sample
        inner, outer = split_weights(model)
        self.muon = Muon(inner, lr=0)  # train_step sets both learning rates
        self.adam = torch.optim.Adam(outer, 0, betas=(0.9, 0.99), fused=True)
        self.device, float16 = outer[0].device, getattr(model, "precision", None) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=float16)
        self.step, self.losses, self.recent = 0, [], []
        self.extras = {}  # whatever else the checkpoint should hold
        self.total_steps = max(1, settings["EPOCHS"] * count // settings["BATCH_SIZE"])
        if path.exists():
            self.resume(fixed)

    def resume(self, fixed):
        """Resume from the checkpoint; if that is impossible, end the program and keep the file."""
        begin = f"Cannot go on from {self.path}:"
        hint = "To start from scratch, delete the file or set another OUT_DIR."
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for name in fixed:
                old, new = state["settings"][name], self.settings[name]
                if old != new:
                    sys.exit(f"{begin} {name} was {old!r} and now is {new!r}. {hint}")
            for name in self.STATES:
                getattr(self, name).load_state_dict(state[name])
            for name in self.VALUES:
                setattr(self, name, state[name])
            # Another BATCH_SIZE changes the number of steps; the share of them done stays the same.
            before = max(1, self.settings["EPOCHS"] * self.count // state["settings"]["BATCH_SIZE"])
            self.step = self.step * self.total_steps // before
        except Exception as error:  # cut short, damaged, another program's file
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            sys.exit(f"{begin} it cannot be read as a checkpoint of this script ({reason}). {hint}")
        print(f"Going on from {self.path}, step {self.step:,} of {self.total_steps:,}.")

    def save(self):
        """Write the checkpoint, unless the loss or a weight is not finite: then end the program."""
        self.losses += [loss.item() for loss in self.recent]
        self.recent.clear()
        weights = torch.stack([weight.detach().sum() for weight in self.model.parameters()])
        if not math.isfinite(sum(self.losses) + weights.sum().item()):
            sys.exit(
                f"\nThe loss or a weight became NaN or infinite before step {self.step}. Usually "
                f"LEARNING_RATE = {self.settings['LEARNING_RATE']} is too high: halve it. The last "
                "checkpoint is intact."
            )
        if self.rank == 0:
            state = {name: getattr(self, name).state_dict() for name in self.STATES}
            state |= {name: getattr(self, name) for name in self.VALUES}
            save_atomically({"settings": self.settings, **state}, self.path)

    def train_step(self):
        """Learn from a batch of images drawn at random; return the loss, a tensor on the device."""
        # The step's number seeds everything random in a step: images, t, noise, dropout, mirroring.
        # So resuming needs no other random state.
        torch.manual_seed(hash((self.settings["SEED"], self.step, self.rank)))
        size = math.ceil(self.settings["BATCH_SIZE"] / self.world)  # each GPU has its share
        loss = self.loss(torch.randint(self.count, (size,), device=self.device))
        # The learning rate rises for 5 % of the steps and then falls to zero along a cosine.
        rise = (self.step + 1) / (0.05 * self.total_steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * self.step / self.total_steps)
        rate = self.settings["LEARNING_RATE"] * min(rise, fall)
        # Adam has a fifth of Muon's rate: at most 0.004, as in 01.
        self.muon.param_groups[0]["lr"], self.adam.param_groups[0]["lr"] = rate, rate / 5
        self.model.zero_grad()
        self.scaler.scale(loss).backward()  # the scaler acts only in float16
        for optimizer in self.muon, self.adam:
            self.scaler.unscale_(optimizer)
        # Both optimizers average past gradients, and no outlier batch should dominate the average.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.muon, self.adam:  # neither, if float16 gradients became infinite
            if not self.scaler.is_enabled() or norm.isfinite():
                self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        update_average(self.averaged, self.model, self.step, self.settings["EMA_DECAY"])
        return loss.detach()

    def run(self):
        """Train to the end; save a checkpoint every SAVE_EVERY, yield every PREVIEW_EVERY minutes.

        What the caller does when this yields has no influence on the training.
        """
        size, saved, shown = self.settings["BATCH_SIZE"], now(), now()
        save_every = 60 * self.settings["SAVE_EVERY"]  # seconds
        preview_every = 60 * self.settings["PREVIEW_EVERY"]
        sizes = {"total": self.total_steps * size, "initial": self.step * size}
        with tqdm(desc="Training", unit=" images", disable=self.rank > 0, **sizes) as bar:
            while self.step < self.total_steps:
                self.recent.append(self.train_step())  # no .item(): it would wait for the GPU
                bar.update(size)
                if self.step % 50 == 0:
                    bar.set_postfix(loss=f"{torch.stack(self.recent[-50:]).mean():.4f}")
                if self.step == self.total_steps or now() - saved > save_every:
                    self.save()
                    saved = now()
                if self.step < self.total_steps and now() - shown > preview_every:
                    yield
                    shown = now()


def digest_of(network):
    """NEW in 05. Return a few letters that change whenever a weight of network does."""
    weights = b"".join(weight.detach().cpu().numpy().tobytes() for weight in network.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def train_vae(vae, images, settings, path, rank, world):
    """NEW in 05. Stage 1: train vae on images, uint8 (N, C, H, W); return its average."""
    parallel = nn.parallel.DistributedDataParallel(vae) if world > 1 else vae

    def loss(index):
        x = to_batch(images[index], settings["FLIP"])
        return vae_loss(x, *parallel(x), settings["KL_WEIGHT"])

    settings = settings | {"EPOCHS": settings["VAE_EPOCHS"]}  # Trainer knows it as EPOCHS
    trainer = Trainer(vae, loss, len(images), settings, FIXED_VAE, path, rank, world)
    size = sum(weight.numel() for weight in vae.parameters())
    print(f"Stage 1 of 2, an autoencoder for {len(images):,} images, {size:,} parameters")
    for _ in trainer.run():
        pass  # no previews here
    return trainer.averaged


# %% 8. Figures


def sample_in_parts(sample, n, size, frames=None):
    """Return n images of sample(m, frames=...), at most `size` at once; frames: of the first."""
    parts = [min(size, n - first) for first in range(0, n, size)]
    return torch.cat([sample(m, frames=None if i else frames) for i, m in enumerate(parts)])


@torch.no_grad()
def save_autoencoder_figures(ldm, latents, x, settings, folder, note):
    """NEW in 05. Save reconstructions of test images x, and the distribution of their latents.

    latents: many scaled ones, drawn, (N, latent_ch, h, h).
    """
    z = torch.cat([ldm.encode(part) for part in x.split(settings["BATCH_SIZE"])])
    again = torch.cat([ldm.decode(part) for part in z.split(settings["BATCH_SIZE"])])
    psnr = 10 * math.log10(4 / (again - x).square().mean().item())  # 4 = 2²: the range is 2
    print(f"PSNR of reconstructed test images: {psnr:.1f} dB.")
    # A VAE is meant to generate images from noise. But the latents of digits fill only a small part
    # of N(0, 1), which shrinks as KL_WEIGHT does, and most noise lies elsewhere.
    noise = torch.randn(z[:12].shape, generator=torch.Generator().manual_seed(settings["SEED"]))
    prior = ldm.vae.decode(noise.to(z.device))
    rows = {"test images": x[:12], "reconstructions": again[:12], "from pure noise": prior}
    title = f"The autoencoder alone, PSNR {psnr:.1f} dB"
    image_table(rows, folder / "autoencoder.png", (), title, note)
    channels = (z[:12] / 2).transpose(0, 1)  # (latent_ch, 12, 8, 8), mostly within ±1
    latent_pictures(x[:12], channels, folder / "latents.png", note=note)
    path, unscaled = folder / "latent_scale.png", latents / ldm.scale
    latent_scaling(unscaled, ldm.scale, ldm.alphas_cumprod.cpu(), path, note=note)


def save_latent_preview(ldm, trainer, ddim_steps, folder, note):
    """NEW in 05. Save 16 samples."""
    torch.manual_seed(trainer.settings["SEED"])  # the same noise each time: watch it change
    samples = ldm.sample(min(16, trainer.settings["BATCH_SIZE"]), ddim_steps)
    path, title = folder / f"samples_step_{trainer.step:06}.png", f"After {trainer.step:,} steps"
    sample_grid(samples, path, title, note)


def training_cost(loss):
    """NEW in 05. Return seconds and megabytes of loss() and its gradients, without the optimizers.

    The memory is what the network stores to compute gradients, weights included; it grows with the
    batch. Gradients, optimizers and averaged weights add three to four times the size of the
    weights, for pixels as for latents.
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
    start = now()
    for _ in range(2):
        result = loss()
        result.backward()
    result.item()  # waits until a GPU is done
    return (now() - start) / 2, sum(kept.values()) / 1e6


def save_costs(ldm, settings, folder, note, sides=(32, 64, 128), batch=4):
    """NEW in 05. Print and save what diffusion costs on pixels and on latents, at one width.

    Both U-Nets have BASE_CH channels at each position, and attention only in their middle, at half
    the side; latents have DOWNSAMPLE² times fewer positions.
    """
    lines, device, (channels, *_) = [], ldm.device, settings["IMAGE_SHAPE"]
    network = settings["BASE_CH"], (1, 2), settings["NUM_BLOCKS"], (), 0.0
    steps = min(10, ldm.T)
    for side in sides:
        x = torch.rand(batch, channels, side, side, device=device) * 2 - 1
        vae = VAE(x.shape[1:], *[settings[name] for name in AUTOENCODER[1:]])
        vae.to(device, memory_format=best_layout(device))
        costs = []
        for shape, decode in (x.shape[1:], lambda z: z), (vae.latent_shape, vae.decode):
            model = UNet(shape, *network, ldm.model.precision)
            model.to(device, memory_format=best_layout(device))
            other = LatentDiffusion(model, vae, 1.0, ldm.betas, shape, device)
            other.decode = decode
            data = torch.randn(batch, *shape, device=device)
            seconds, megabytes = training_cost(partial(other.loss, data))
            other.sample(1, 1).cpu()  # the first evaluation is slow: it does not count
            start = now()
            other.sample(1, steps).cpu()
            costs.append([1000 * seconds, megabytes, 1000 * (now() - start)])
        what = f"ms per training step of {batch} images", "MB for its gradients"
        for name, pixels, latents in zip((*what, f"ms per image, {steps} steps"), *costs):
            cells = f"{pixels:.0f}", f"{latents:.0f}", f"{pixels / latents:.1f} ×"
            lines.append([f"{side} × {side}: {name}", *cells])
        seconds, _ = training_cost(lambda x=x, vae=vae: vae_loss(x, *vae(x), 0.002))
        lines.append([f"{side} × {side}: ms per step of the VAE", "", f"{1000 * seconds:.0f}", ""])
    title = f"One U-Net on pixels and on latents, on {device}"
    table(["", "pixels", "latents", "ratio"], lines, folder / "cost.png", title, note)


def save_latent_interpolation(ldm, x, seed, folder, note, points=9):
    """NEW in 05. Save interpolations between pairs of test images x, made on noisy latents."""
    x = x[: len(x[:6]) // 2 * 2]  # up to three pairs
    if len(x) == 0:
        return
    start = ldm.T * 6 // 10  # so much noise that the digit may change, not enough to forget it
    torch.manual_seed(seed)
    draw, noise = torch.randn(2, 1, *ldm.latent_shape, device=ldm.device)
    z_0 = ldm.encode(x, draw)
    between = interpolate(z_0[0::2], z_0[1::2], points, "lerp").transpose(0, 1).flatten(0, 1)
    decoded = ldm.decode(between)
    # All use the same noise, so only the latents change along a row. (DDPM section 4.4 blends two
    # noised images; their noise differs, and halfway, the blend of the two is too weak.)
    t = torch.full((len(between),), start, device=ldm.device)
    z_t = q_sample(between, t, noise, ldm.alphas_cumprod)
    diffused = ldm.decode(ldm.denoise(z_t, start, min(50, start + 1), eta=0))
    rows = {}
    for pair, name in enumerate("ABC"[: len(x) // 2]):
        rows[f"{name}: lerp, noised, denoised"] = diffused[pair * points : (pair + 1) * points]
        rows[f"{name}: lerp, decoded"] = decoded[pair * points : (pair + 1) * points]
    shares = [f"{100 * i / (points - 1):.0f} %" for i in range(points)]
    title = f"From one test image to another, with the noise of t = {start} and without"
    image_table(rows, folder / "interpolation.png", shares, title, note)


def save_latent_figures(ldm, trainer, x, folder, note):
    """NEW in 05. Sample 36 images and save the figures; x: test images (B, C, H, W) in [-1, 1]."""
    settings, frames = trainer.settings, []
    size, steps = settings["BATCH_SIZE"], settings["DDIM_STEPS"]
    torch.manual_seed(settings["SEED"])
    samples = sample_in_parts(partial(ldm.sample, ddim_steps=steps), 36, size, frames)
    save_results(
        folder, samples, frames, trainer.losses, note, f"From latents, DDIM, {steps} steps"
    )
    save_latent_interpolation(ldm, x, settings["SEED"], folder, note)
    save_costs(ldm, settings, folder, note)


# %% 9. Run


def pick_device():
    """Return the GPU if there is one, else the CPU."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return gpu or torch.device("cpu")


def join_processes():
    """Return the number of this process and how many there are: torchrun starts one per GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if world > gpus > 0:
        sys.exit(1 if rank else f"{world} processes but {gpus} GPUs: use --nproc_per_node={gpus}.")
    if world > 1:
        if gpus:
            torch.cuda.set_device(rank)  # from here on "cuda" means this process's GPU
        dist.init_process_group("nccl" if gpus and dist.is_nccl_available() else "gloo")
    if rank > 0:
        sys.stdout = io.StringIO()  # one process prints for all
    return rank, world


def end_with_one_line(kind, error, traceback):
    """Print one line instead of a traceback if the program was ended by Ctrl-C."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, traceback)
    print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)


def is_whole(value, lowest=1):
    return isinstance(value, int) and value >= lowest


def is_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


CHECKS = (  # constants, the condition that each must meet, and the same in words
    ("IMAGE_SIZE BASE_CH NUM_BLOCKS EPOCHS BATCH_SIZE", is_whole, "a whole number from 1"),
    # NEW in 05
    ("LATENT_CH VAE_CH VAE_EPOCHS", is_whole, "a whole number from 1"),
    ("DOWNSAMPLE", lambda v: v in (2, 4, 8), "2, 4 or 8"),
    ("KL_WEIGHT", lambda v: 0 <= v <= 100, "a number from 0 to 100"),
    ("T", lambda v: is_whole(v, 2), "a whole number from 2"),
    ("DDIM_STEPS", lambda v: is_whole(v) and v <= T, "a whole number from 1 to T"),  # NEW in 04
    ("SEED", lambda v: is_whole(v, 0), "a whole number from 0"),
    ("SCHEDULE", lambda v: v in SCHEDULES, "'linear' or 'cosine'"),
    ("CHANNEL_MULT", lambda v: v and all(map(is_whole, v)), "like (1, 2, 4)"),
    ("ATTENTION_AT", lambda v: all(map(is_whole, v)), "like (14, 16), or ()"),
    ("DROPOUT EMA_DECAY", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("LEARNING_RATE", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    ("SAVE_EVERY PREVIEW_EVERY", lambda v: v > 0, "a number of minutes above 0"),
    ("FLIP COMPILE", lambda v: isinstance(v, bool), "True or False"),
    ("DATASET DATA_DIR", Path, "a name or a path"),
    ("OUT_DIR", is_writable, "a folder in which files can be made"),
)


def check_settings(constants):
    """Return the constants by name as plain Python; end the program if one cannot work."""
    settings = {}
    for names, works, allowed in CHECKS:
        for name in names.split():
            value = constants[name]
            try:
                value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers
                value = tuple(value) if isinstance(value, list) else value
                value = Path(value).expanduser() if "_DIR" in name else value
                assert works(value)
            except Exception:  # also what comes of None < 2
                sys.exit(f"{name} = {value!r} does not work: it must be {allowed}.")
            settings[name] = value
    return settings


if __name__ == "__main__":
    sys.excepthook = end_with_one_line
    settings = check_settings(globals())
    globals().update(settings)  # from here on the constants are plain Python
    data_dir, out_dir = settings.pop("DATA_DIR"), settings.pop("OUT_DIR")
    rank, world = join_processes()
    device = pick_device() if world == 1 or ON_GPU else torch.device("cpu")
    for turn in range(world):
        if turn == rank:  # the first process downloads, the others find the files
            images, _, _, source = load_dataset(DATASET, data_dir, IMAGE_SIZE)
        if world > 1:
            dist.barrier()
    images, test_images = hold_out(images, source, data_dir)  # NEW in 05
    count, *shape = images.shape
    settings |= {"DATASET": source, "IMAGE_SHAPE": tuple(shape)}
    images, x = images.to(device), to_batch(test_images.to(device))
    note = f"{source}, VAE_EPOCHS = {VAE_EPOCHS}, EPOCHS = {EPOCHS}, T = {T}, SEED = {SEED}"

    torch.manual_seed(SEED)
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    vae = VAE(*[settings[name] for name in AUTOENCODER])  # NEW in 05
    settings["LATENT_SHAPE"], side = vae.latent_shape, vae.latent_shape[1]
    if side % 2 ** (len(CHANNEL_MULT) - 1):
        sys.exit(f"CHANNEL_MULT = {CHANNEL_MULT} halves {side} latents too often: shorten it.")
    vae.to(device, memory_format=best_layout(device))
    vae = train_vae(vae, images, settings, out_dir / "vae.pt", rank, world)  # NEW in 05
    mean, deviation, scale = encode_all(vae, images, BATCH_SIZE)
    settings["VAE"] = digest_of(vae)  # a stage 2 fits no other VAE than its own
    torch.manual_seed(SEED)
    extras = {"vae": vae.state_dict(), "scale": scale}
    ldm = SAMPLER.build({"settings": settings, "extras": extras}, device)

    def draw_latents(index):
        z = mean[index] + deviation[index] * torch.randn_like(mean[index])  # NEW in 05
        return scale * z

    if rank == 0:
        save_autoencoder_figures(ldm, draw_latents(slice(2000)), x, settings, out_dir, note)
    model = ldm.model
    if world > 1:  # equal weights everywhere, and the mean of all processes' gradients
        ldm.model = nn.parallel.DistributedDataParallel(model)

    def loss(index):
        return ldm.loss(draw_latents(index))

    path = out_dir / "checkpoint.pt"
    trainer = Trainer(model, loss, count, settings, FIXED, path, rank, world)
    trainer.extras = extras  # NEW in 05
    size = sum(weight.numel() for weight in model.parameters())
    print(f"Stage 2 of 2, diffusion on {count:,} latents, {size:,} parameters, on {device}")
    if COMPILE:
        model.compile()
    for _ in trainer.run():  # pauses every PREVIEW_EVERY minutes
        if rank == 0:
            trainer.save()
            save_latent_preview(load(path), trainer, DDIM_STEPS, out_dir, note)
    if rank == 0:
        ldm = load(path)  # has the averaged weights; python -i keeps it at hand
        save_latent_figures(ldm, trainer, x, out_dir, note)
