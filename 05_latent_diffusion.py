"""05 · Latent diffusion: the core of Stable Diffusion, in one file.

    python 05_latent_diffusion.py
    torchrun --standalone --nproc_per_node=4 05_latent_diffusion.py       # on 4 GPUs of one machine

Most of an image's pixels say little. Stage 1 trains an autoencoder, a VAE, which turns an image
into a small grid of numbers, its latents, and back: here 28 × 28 pixels into 2 × 8 × 8 latents, in
Stable Diffusion 3 × 512 × 512 into 4 × 64 × 64. This VAE alone cannot generate: noise put into its
decoder does not come out as a digit. Stage 2 learns which latents do, by diffusion on the latents
of all images, scaled to fit the noise schedule (`encode_all`). It uses the same U-Net (`UNet` has
a diagram with 02's sizes), schedule, training and sampler as before. But the network predicts v, a
mixture of noise and latents, because latents have no range to which predictions could be clamped
(`loss` says more). To sample, diffusion generates latents from noise, and the decoder turns them
into an image. Labels, guidance (03) and text (cross-attention, LDM section 3.3) are left out.
What is new is marked `NEW in 05`: read section 5, and in section 6 `loss`, `predict` and `sample`;
section 9 puts the two stages together. U-Net and training are those of 02, the sampler that of 04.

The script leaves in `outputs/05_latent_diffusion/` reconstructions by the VAE, and images that it
decodes from noise (`autoencoder.png`), the latents (`latents.png`, `latent_scale.png`),
interpolations between images (`interpolation.png`), and samples, denoising and loss as in 01. Stage
1 saves its network in `vae.pt`, stage 2 both networks in `checkpoint.pt`. After `python -i`, or
`ldm = LatentDiffusion.load("outputs/05_latent_diffusion/checkpoint.pt")`:
`ldm.sample(n=16, ddim_steps=50)`; of images x, `ldm.decode(ldm.encode(x))`.

LDM = Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models,
arXiv:2112.10752v2
Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114
Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512
DDPM = Ho, Jain & Abbeel 2020, arXiv:2006.11239; Improved DDPM = Nichol & Dhariwal 2021,
arXiv:2102.09672; DDIM = Song, Meng & Ermon 2021, arXiv:2010.02502

Code            Paper              Shape               Meaning (for other symbols see 02 and 04)
mean            μ; E_μ(x)          (B, 2, h, h)        centre of the latents of an image
log_variance    log σ²; log E_σ²   (B, 2, h, h)        how far they spread around it
scale           1/σ̂ (appendix G)                       σ̂: standard deviation of all latents
z_0             z = E(x)/σ̂         (B, 2, h, h)        latents, drawn and scaled
z_t             z_t                (B, 2, h, h)        the same with the noise of step t
v_pred          v̂_θ(z_t, t)        (B, 2, h, h)        the prediction of √ᾱ_t · ε − √(1−ᾱ_t) · z_0
"""

# %% 1. Settings: edit and run again

import copy
import ctypes
import hashlib
import math
import os
import re
import socket
import sys
import tempfile
import unicodedata
from collections import OrderedDict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from time import monotonic as now

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from utils.interpolation import interpolate
from utils.visualize import (
    draw_digits,
    image_table,
    latent_pictures,
    latent_scaling,
    sample_grid,
    save_results,
)

ON_GPU = torch.cuda.is_available()  # selects the larger defaults below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", "DRAWN" (offline), or a folder of images
IMAGE_SIZE = 64  # for a folder: its images are cropped and resized to squares of this side
DOWNSAMPLE = 4  # NEW in 05: latents have 1/4 of the side of an image; 2, 4 or 8
LATENT_CH = 2 if DATASET in ("MNIST", "DRAWN") else 4  # NEW in 05: more: sharper, harder to model
VAE_CH = 32 if ON_GPU else 16  # NEW in 05: channels of the VAE at full size; more at coarser levels
VAE_EPOCHS = 10 if ON_GPU else 1  # NEW in 05: times that an image is seen in stage 1
KL_WEIGHT = 0.002  # NEW in 05: pull of the latents towards N(0, 1); see vae_loss
T = 1000  # noise steps in training; sampling takes DDIM_STEPS
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 128 if ON_GPU else 32  # channels of the U-Net
CHANNEL_MULT = (1, 2)  # in multiples of BASE_CH; MNIST: 8 × 8 → 4 × 4 latents
NUM_BLOCKS = 2  # residual blocks per level
ATTENTION_AT = (8,)  # resolutions of the latents with self-attention; the middle always has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # regularisation for photographs
FLIP = DATASET == "CIFAR10"  # mirror half of the images in stage 1; never digits
EPOCHS = 100 if ON_GPU else 15  # times that a latent is seen in stage 2
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # peak learning rate of Muon; halve it if the loss jumps up
EMA_DECAY = 0.9999  # highest decay of the averaged weights; reached only after 90,000 steps
DDIM_STEPS = 50  # evaluations of the U-Net per image, 1 ... T
SAVE_EVERY = 3  # minutes between checkpoints, each with a grid of samples; the most you can lose
COMPILE = False  # True: use torch.compile; slow to start, then perhaps faster on a GPU, not on CPUs
SEED = 0  # the same seed on the same CPU gives the same digits
DATA_DIR = "data"  # datasets are looked for and downloaded here
OUT_DIR = "outputs/05_latent_diffusion"  # results are saved here


# %% 2. Data and device

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # not classes
CLUTTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"}  # ignored
RESULTS = {"checkpoint.pt", "vae.pt", "denoising.gif"}  # a folder with one of these holds results


def read_image(file, size):
    """Return an image file of any kind as uint8 (3, size, size); transparency becomes white."""
    if not file.is_file():
        raise OSError("no file")  # a pipe, or a link to nothing
    image = ImageOps.exif_transpose(Image.open(file))  # upright, as the camera was held
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel, whole numbers or float
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        white = [w for w in (1, 255, 65535) if w / 4 <= high <= 1.001 * w or high == 0]
        if low < 0 or not white:  # such as 12 bits in 16
            raise ValueError(f"values from {low:g} to {high:g}: save it with 8 bits")
        image = Image.fromarray((values * 255 / white[0]).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(ImageOps.fit(image, (size, size)))).permute(2, 0, 1)


def load_folder(folder, size):
    """Return all images below a folder, uint8 (N, C, size, size), labels (N,) and class names.

    C is 1 if all images are grey, otherwise 3. Links are followed. What cannot be read is left out,
    and so are results of these scripts, as a line says; hidden files and clutter are ignored.
    """
    files, read, left_out = [], [], []
    walk = os.walk(folder, onerror=left_out.append, followlinks=True)
    for root, folders, names in walk if folder.is_dir() else ():
        here = Path(root)
        if RESULTS & {*names} or here.resolve() in map(Path.resolve, here.parents):
            print(f"Left out {here}: it holds results of these scripts, or leads in a circle.")
            names, folders[:] = [], []
        folders[:] = [n for n in folders if not n.startswith(".") and n not in CLUTTER]
        files += [here / n for n in names if not n.startswith(".") and n not in CLUTTER]
    try:
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    except RuntimeError:
        gigabytes = 3 * len(files) * size**2 / 1e9
        sys.exit(f"{len(files):,} images need {gigabytes:,.0f} GB of memory: lower IMAGE_SIZE.")
    PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS = 2**30, None  # large is not damaged
    for file in tqdm(sorted(files), "Reading images", unit=" files", disable=not sys.stdout):
        try:
            images[len(read)] = read_image(file, size)
            read.append(file)
        except Exception as error:
            left_out.append(f"{file.name} ({error})")  # not the error: it keeps the file open
    if left_out:
        print(f"Left out {len(left_out)}, not readable: {'; '.join(map(str, left_out[:10]))}")
    if len(read) < 2:
        sys.exit(f"DATASET: {folder} is neither a dataset known here nor a folder with 2 images.")
    images = images[: len(read)]
    if all((image == image[0]).all() for image in images):  # grey
        images = images[:, :1].clone()
    return images, *find_classes([file.parent.relative_to(folder).parts for file in read])


def find_classes(paths):
    """Return the labels, int64 (N,), and names of the classes, given the folders of each image.

    The classes are the subfolders, with everything below them: `cat` and `dog` of pets/cat/1.png
    and pets/dog/indoors/2.png. But a single subfolder is no class, nor are several called `train`,
    `test` and the like: the classes are inside. Images in no subfolder have the class `images`.
    Numbers sort as numbers.
    """
    heads = {path[0] for path in paths if path}
    while len(heads) == 1 or sum(head.lower() in SPLITS for head in heads) > 1:
        paths = [path[1:] for path in paths]
        heads = {path[0] for path in paths if path}
    labels = [unicodedata.normalize("NFC", path[0] if path else "images") for path in paths]
    names = sorted({*labels}, key=lambda n: (re.sub("[0-9]+", lambda d: d[0].zfill(20), n), n))
    return torch.tensor([names.index(label) for label in labels]), names


def load_dataset(name, folder, size):
    """Return images, uint8 (N, C, H, W), labels, int64 (N,), class names, and the dataset's name.

    name: a dataset of torchvision, "DRAWN", or a folder of images, which are resized to `size`.
    If MNIST cannot be loaded, rendered digits replace it; for other datasets, the program ends.
    """
    if name == "DRAWN":
        images, labels = draw_digits()
        return images[:, None], labels, [*"0123456789"], name
    if name not in ("MNIST", "FashionMNIST", "CIFAR10"):
        path = Path(os.path.expanduser(str(name))).resolve()
        return *load_folder(path, size), f"{path.name}/"
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


def fingerprint(images):
    """Return what tells uint8 images (N, C, H, W) from others: their shape, and a hash."""
    digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()[:8]
    return f"{' x '.join(map(str, images.shape))}, {digest}"


def to_batch(images, flip=False):
    """Turn images, uint8 0 ... 255, into float -1 ... 1; with flip, mirror about half of them."""
    x_0 = images.float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(len(x_0), 1, 1, 1, device=x_0.device) < 0.5
        x_0 = torch.where(mirrored, x_0.flip(3), x_0)
    return x_0


def pick_device():
    """Return the GPU if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def best_precision(device):
    """Return the fastest dtype here that trains well: bfloat16, float16 or float32.

    bfloat16 has float32's range with fewer digits. float16, for older GPUs, has a smaller range:
    small gradients would become zero without the GradScaler in `train`.
    """
    if device.type != "cuda":
        return torch.float32
    modern = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if modern else torch.float16


def best_layout(device):
    """Return the memory layout: channels_last is fast, but gave wrong results on Apple's GPUs."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


# %% 3. Noise schedule and forward process


def linear_beta_schedule(T):
    """Return β, float64 (T,): DDPM section 4, times 1000 / T as in Improved DDPM's code."""
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


SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule}


def q_sample(x_0, t, noise, alphas_cumprod):
    """Add the noise of all steps up to t (B,) to images x_0 (B, C, H, W), in one go."""
    alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    # DDPM Eq. 2, one step (t from 1):  x_t = √α_t · x_{t−1} + √β_t · ε_t.  Two steps lead to
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


class GroupNorm(nn.GroupNorm):
    """Normalise ch channels in groups of at least 8 (or all, as in 01), each image by itself.

    BatchNorm would average over images with different t. In a group of its own, a channel would
    lose its mean, and the block would not see how bright the image is. With 16 bits, PyTorch would
    return float32, which takes twice the memory; only the sums inside need it.
    """

    def __init__(self, ch):
        super().__init__(math.gcd(ch, max(1, ch // 8)), ch)  # gcd: the groups must divide ch

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def zero_init(layer):
    """Set a layer's weights to zero, so that a block ending in it starts as its shortcut alone."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """NEW in 02. Let each position of x (B, ch, H, W) gather information from all others.

    A 1 × 1 convolution gives each position a query, a key and a value. The position receives the
    mean of all values, weighted by how well their keys match its query. Several heads do this in
    parallel, each on its share of the channels. A convolution sees 3 × 3 positions, and attention
    sees them all. Its cost grows with the square of their number, so only coarse levels have it.
    """

    def __init__(self, ch):
        super().__init__()
        # About 64 channels for each head (arXiv:2105.05233); fewer than 128 channels have one head.
        self.heads = math.gcd(ch, max(1, ch // 64))  # gcd: the heads must divide ch
        self.norm, self.qkv = GroupNorm(ch), nn.Conv2d(ch, 3 * ch, 1)
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
        self.norm_1, self.conv_1 = GroupNorm(in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_ch)
        self.norm_2, self.dropout = GroupNorm(out_ch), nn.Dropout(dropout)
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
    """Predict the noise (05: v) in x_t (B, C, side, side) at t (B,): 01's U-Net with more blocks.

    This is the network for MNIST with BASE_CH = 32, CHANNEL_MULT = (1/4, 1, 2), NUM_BLOCKS = 1:

    28 × 28   conv_in (8) ──────────────── skip ───────────────→ block (8) → conv_out
                ↓ shrink                                           ↑ grow
    14 × 14     └ (32) → block (32) ────── skip ──────→ block (32) ┘
                           ↓ shrink                       ↑ grow
     7 × 7                 └ (64) → block (64) → middle_1* (64) → middle_2 (64)    * with attention

    Each level after the first halves the resolution, rounded up. attention_at: resolutions
    at which the blocks have attention. precision: the dtype of convolutions and matrix products.
    """

    def __init__(self, shape, base_ch, ch_mult, num_blocks, attention_at, dropout, precision):
        super().__init__()
        (channels, side, _), dim = shape, 4 * base_ch

        def blocks(level, in_ch):
            sizes = [in_ch] + num_blocks * [ch[level]]
            options = dim, dropout, math.ceil(side / 2**level) in attention_at
            return nn.ModuleList(ResBlock(i, out, *options) for i, out in pairwise(sizes))

        self.precision = precision
        self.time = nn.Sequential(nn.Linear(2 * base_ch, dim), nn.SiLU(), nn.Linear(dim, dim))
        ch = [max(1, round(base_ch * mult)) for mult in ch_mult]  # channels of each level
        self.conv_in = nn.Conv2d(channels, ch[0], 3, padding=1)
        self.shrink, self.down, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for level in range(1, len(ch)):
            self.shrink.append(nn.Conv2d(ch[level - 1], ch[level], 3, stride=2, padding=1))
            self.down.append(blocks(level, ch[level]))
        self.middle_1 = ResBlock(ch[-1], ch[-1], dim, dropout, attention=True)
        self.middle_2 = ResBlock(ch[-1], ch[-1], dim, dropout)
        for level in reversed(range(len(ch) - 1)):
            self.grow.append(nn.Conv2d(ch[level + 1], ch[level], 1))
            self.up.append(blocks(level, 2 * ch[level]))  # 2: the skip is concatenated
        self.norm_out = GroupNorm(ch[0])
        self.conv_out = zero_init(nn.Conv2d(ch[0], channels, 3, padding=1))

    def forward(self, x_t, t, condition=0):
        """Return the prediction, like x_t. In 03, condition (B, time_dim) joins t's embedding."""
        time = self.time(timestep_embedding(t, self.time[0].in_features)) + condition
        # Mixed precision: on CUDA GPUs, matrix products use 16 bits. Weights, sums over many values
        # and everything outside the network stay float32.
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision.itemsize < 4):
            h, time, skips = self.conv_in(x_t), F.silu(time), []  #      (B, 8, 28, 28)
            for shrink, blocks in zip(self.shrink, self.down):
                skips.append(h)
                h = shrink(h)  #                                         (B, 32, 14, 14), ...
                for block in blocks:
                    h = block(h, time)
            h = self.middle_2(self.middle_1(h, time), time)  #           (B, 64, 7, 7)
            for grow, blocks in zip(self.grow, self.up):
                h, skip = grow(h), skips.pop()  # `to`: CUDA's autocast interpolates in float32
                h = F.interpolate(h, skip.shape[2:]).to(h.dtype)  #      (B, 32, 14, 14), ...
                h = torch.cat([h, skip], dim=1)
                for block in blocks:
                    h = block(h, time)
            return self.conv_out(F.silu(self.norm_out(h))).float()  #    (B, C, 28, 28)


NETWORK = "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT", "DROPOUT"  # UNet's, in order


# %% 5. VAE and the scale of its latents: NEW in 05


class VAEBlock(nn.Module):
    """Two convolutions beside a shortcut; ResBlock without t. x (B, ch, H, W), same shape out."""

    def __init__(self, ch):
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(ch), nn.Conv2d(ch, ch, 3, padding=1)
        self.norm_2, self.conv_2 = GroupNorm(ch), zero_init(nn.Conv2d(ch, ch, 3, padding=1))

    def forward(self, x):
        h = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(h)))


class VAE(nn.Module):
    """Turn images into few numbers, the latents, and back; KL-regularised, as in LDM section 3.1.

    image_shape: (C, side, side). downsample: the factor by which latents are smaller, 2, 4 or 8
    (LDM's f). Images are padded with black, MNIST's from 28 to 32, so that the side of the latents
    is even, as the U-Net halves it; decoded images are cropped. base_ch: channels at full
    resolution; 2 · base_ch at half of it, 4 · base_ch below. latent_shape: (latent_ch, h, h).
    """

    def __init__(self, image_shape, base_ch, latent_ch, downsample=4):
        super().__init__()
        if downsample not in (2, 4, 8):
            sys.exit(f"DOWNSAMPLE = {downsample} does not work: use 2, 4 or 8.")
        channels, side, _ = image_shape
        padding = -side % (2 * downsample)
        before, small = padding // 2, (side + padding) // downsample
        self.padding = (before, padding - before) * 2  # left and right, above and below
        self.inside = slice(before, before + side)
        self.latent_shape = latent_ch, small, small
        # downsample = 4 has three levels: full size, half, quarter
        levels = [base_ch * min(2**level, 4) for level in range(downsample.bit_length())]
        down, up = [], []
        for fine, coarse in pairwise(levels):
            down += nn.Conv2d(fine, coarse, 3, stride=2, padding=1), VAEBlock(coarse)
            back = nn.Upsample(scale_factor=2), nn.Conv2d(coarse, fine, 3, padding=1)
            up = [VAEBlock(coarse), *back, *up]
        encoder = OrderedDict(  # with names, because split_weights asks for the outer layers
            conv_in=nn.Conv2d(channels, base_ch, 3, padding=1),
            down=nn.Sequential(*down),
            norm=GroupNorm(levels[-1]),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(levels[-1], 2 * latent_ch, 3, padding=1),  # mean, log variance
        )
        decoder = OrderedDict(
            conv_in=nn.Conv2d(latent_ch, levels[-1], 3, padding=1),
            up=nn.Sequential(*up),
            norm=GroupNorm(base_ch),
            silu=nn.SiLU(),
            conv_out=nn.Conv2d(base_ch, channels, 3, padding=1),
        )
        self.encoder, self.decoder = nn.Sequential(encoder), nn.Sequential(decoder)
        self.register_buffer("scale", torch.ones(()))  # see encode_all; saved in checkpoint.pt

    def encode(self, x):
        """Return mean and log variance (B, latent_ch, h, h) of the latents of x (B, C, H, W).

        An image becomes not a point but a small cloud, from which its latents are drawn.
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

    The KL divergence measures how far an image's cloud is from N(0, 1). If it were 0, all clouds
    would be the same, and the decoder could not tell images apart. Without it, clouds would shrink
    to points far from one another, and the decoder would never learn what lies between them.

    Kingma & Welling's loss is the sum of squared errors / (2 s²) + KL, where s is the assumed error
    of a pixel. Ours is 2 s² times that, divided by the number of values, with 2 s² = kl_weight:
    0.002 means s = 0.03, which is 4 of 255 grey levels. A larger weight blurs the images, and did
    not make the latents easier to model here; fewer channels did (tests/README.md). LDM uses about
    0.000001 (appendix G), which hardly restricts the size of the latents: that is left to scaling.

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
    """NEW in 05. Return mean and standard deviation of the latents of images; set vae.scale.

    images: uint8 (N, C, H, W). mean, deviation: (N, latent_ch, h, h). They are computed once and
    stored, so stage 2 never sees an image. scale: the factor that gives drawn latents variance 1.
    SIMPLIFIED: no mirroring here, because mirrored latents are not those of a mirrored image.
    """
    means, log_variances = zip(*(vae.encode(to_batch(part)) for part in images.split(batch_size)))
    mean, deviation = torch.cat(means), (torch.cat(log_variances) / 2).exp()
    # LDM appendix G:  z ← z / σ̂. One σ̂ for all values, from all images (the paper takes the first
    # batch). Centres and clouds both count:  σ̂² = Var[μ] + E[σ²].
    # Why? If latents have variance 1, so does z_t at every t, and signal and noise are equally
    # strong at t = 495 of 1000 (cosine). If latents were ten times as large, that point would be at
    # t = 935: training would mostly see nearly clean latents, and few steps of sampling would be
    # left for the noisy ones.
    # Does the KL term not lead to variance 1 by itself? A decoder could undo any scaling of all
    # latents, and of all scalings, the term prefers that with variance 1. But how close training
    # gets depends on its length and on KL_WEIGHT. With LDM's tiny weight, it does not get close:
    # Stable Diffusion's latents have a standard deviation of 5.5, so its factor is 0.18215.
    variance = mean.var() + deviation.square().mean()
    vae.scale.fill_(1 / variance.sqrt().item())
    return mean, deviation


AUTOENCODER = "VAE_CH", "LATENT_CH", "DOWNSAMPLE"  # the constants after the shape


# %% 6. Loss and sampler


def random_timesteps(n, T, device):
    """NEW in 02. Return n random t, int64 (n,), 0 ... T - 1, large ones more often:  t = T · √u.

    u is uniform in 0 ... 1, and each n-th of this range has one u. If t itself were uniform, as in
    DDPM, the 20 % with t < 200 would cause half of 02's loss and 96 % of its squared gradient norm
    (MNIST): fine detail would steer training. What an image shows is settled at larger t. Here, 4 %
    have t < 200. The best prediction for each t stays the same: this only weights the loss, as do,
    in other ways, arXiv:2204.00227 and arXiv:2303.09556.
    """
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    return (T * u.sqrt()).long().clamp(max=T - 1)


class LatentDiffusion:
    """NEW in 05. Diffusion on the latents of a VAE: v instead of ε, the sampler of 04, no clamp.

    model: called as model(z_t, t), returns (B, latent_ch, h, h). vae: a VAE, whose `scale` gives
    the latents the variance 1. betas: float64 (T,), each in (0, 1).
    """

    def __init__(self, model, vae, betas, device):
        self.model, self.vae, self.T, self.device = model, vae, len(betas), device
        self.latent_shape, alphas_cumprod = vae.latent_shape, torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # as in 02: [-1] is the clean latent's

    @classmethod
    def build(cls, settings, device):
        """Return an untrained VAE and U-Net with loss and sampler; settings: constants by name."""
        vae = VAE(settings["IMAGE_SHAPE"], *[settings[name] for name in AUTOENCODER])
        network = [settings[name] for name in NETWORK]
        model = UNet(vae.latent_shape, *network, best_precision(device))
        for module in vae, model:
            module.to(device, memory_format=best_layout(device))
        return cls(model, vae, SCHEDULES[settings["SCHEDULE"]](settings["T"]), device)

    @classmethod
    def load(cls, path):
        """Return the trained networks in a checkpoint of stage 2; as in 02."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        trained = cls.build(state["settings"], pick_device())
        for module, name in (trained.model, "averaged"), (trained.vae, "vae"):
            module.load_state_dict(state[name])
            module.eval().requires_grad_(False)
        return trained

    def loss(self, z_0):
        """Return the loss of scaled latents z_0 (B, latent_ch, h, h): LDM Eq. 2, but with v."""
        t = random_timesteps(len(z_0), self.T, self.device)
        noise = torch.randn_like(z_0)
        v_pred = self.model(q_sample(z_0, t, noise, self.alphas_cumprod), t)
        # NEW in 05: the network does not predict ε, as LDM Eq. 2 has it, but
        #   v = √ᾱ_t · ε − √(1−ᾱ_t) · z_0  (Salimans & Ho, section 4),
        # nearly ε where there is little noise, nearly −z_0 where there is little else: always what
        # z_t hides.
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * z_0
        # Why? To sample, we need ẑ_0 = √ᾱ_t · z_t − √(1−ᾱ_t) · v̂, which magnifies no error of v̂.
        # With ε_θ, ẑ_0 = (z_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t, and at t = T - 1 the cosine schedule has
        # 1/√ᾱ_t = 20,000. For pixels, clamping x̂_0 limits these errors; latents have no bounds to
        # clamp to. (In Stable Diffusion 1, 1/√ᾱ_t ends at 15, and the network predicts ε.)
        # ‖v − v̂‖² = ‖ε − ε̂‖² / ᾱ_t, so this loss cannot be compared with that of 02, and gives
        # large t more weight. That random_timesteps draws them more often changes little here.
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
        # 04's "early" steps, short near the noise; 50 of 1000: 999, 998, 995 ... 75, 38, -1
        steps, rest = range(ddim_steps, -1, -1), t + 1 - ddim_steps
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
        z = mean if draw is None else mean + (log_variance / 2).exp() * draw
        return z * self.vae.scale

    @torch.no_grad()
    def decode(self, z):
        """Return the images (B, C, H, W) in [-1, 1] of scaled latents z (B, latent_ch, h, h)."""
        return self.vae.decode(z / self.vae.scale)


# %% 7. Training: what is new, then from `save` on what every long training run needs (skim it)


class Muon(torch.optim.Optimizer):
    """NEW in 02. Momentum, but each update of a matrix is about equally large in all directions.

    Gradients are large in a few directions (singular vectors) and small in many that may matter,
    too. Muon scales all of them to about the same size. On a CPU, a step takes 4 to 8 % longer than
    with Adam, but after two minutes, 02's Fréchet distance is about half (tests/README.md).
    weights: parameters of two or more dimensions; lr: about 0.02. Jordan et al. 2024,
    kellerjordan.github.io/posts/muon. (torch.optim.Muon does not accept convolutions, and computes
    in bfloat16, which is slow on many CPUs.)
    """

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["average"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = {}  # by shape: equal ones are computed together, in fewer operations
            for weight in group["params"]:
                average = self.state[weight]["average"].lerp_(weight.grad, 0.05)
                u = weight.grad.lerp(average, 0.95).flatten(1)  # Nesterov; (out, in · kernel)
                updates.setdefault(u.shape, []).append((weight, u))
            for (rows, columns), pairs in updates.items():
                u = torch.stack([u for _, u in pairs])  # (count, out, in · kernel)
                u /= u.norm(dim=(1, 2), keepdim=True) + 1e-7  # all singular values s: at most 1
                # Newton–Schulz: u·uᵀ·u has the singular values s³. So products alone, with Jordan's
                # coefficients, bring all but tiny ones to about 0.7 ... 1.2.
                for _ in range(5):  # s ← 3.4445 s − 4.7750 s³ + 2.0315 s⁵
                    gram = u @ u.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                    u = torch.baddbmm(u, gram, u, beta=3.4445)
                # Jordan's factor for matrices with more rows than columns
                u *= group["lr"] * max(1, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, u):
                    weight.sub_(update.view_as(weight))


def split_weights(model):
    """Return the matrices inside the network, for Muon, and all other weights, for Adam.

    Muon's authors leave the first and the last layer, vectors and embeddings (03 has one) to Adam.
    (They also update query, key and value separately; here these are rows of one matrix.)
    """
    inner, outer = [], []
    for name, weight in model.named_parameters():
        at_the_ends = any(part in name for part in ("conv_in", "conv_out", "embedding"))
        (outer if at_the_ends or weight.ndim == 1 else inner).append(weight)
    return inner, outer


def update_average(averaged, model, step, ema_decay):
    """NEW in 02. Move averaged weights a little towards the model's, after training step `step`.

    Exponential moving average:  average ← decay · average + (1 − decay) · weights.  While the
    learning rate is high, the weights fluctuate from step to step, and samples are better with
    their average; at the end, when the rate is near zero, the two hardly differ. The average covers
    about 1 / (1 − decay) steps, 10,000 for 0.9999. Early on, these would include the random initial
    weights, so decay is smaller, and the average covers only a ninth of the steps so far.
    """
    decay = min(ema_decay, (1 + step) / (10 + step))
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # of all weights together
    update([*averaged.parameters()], [*model.parameters()], None)


def save(state, path):
    """Save to a temporary file and rename it: an interruption leaves the old file intact."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # waits until the disk has it: this survives a power cut
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def resume(parts, settings, fixed, path):
    """Load a checkpoint into parts, modules and optimizers by name; return images seen and losses.

    If that is impossible, end the program and leave the file as it is.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in fixed:
            old, new = state["settings"].get(name), settings[name]
            if old != new:
                raise ValueError(f"{name} was {old!r} and now is {new!r}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["seen"], state["losses"]
    except Exception as error:  # also for a damaged file, or another program's
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        hint = "To start from scratch, delete the file or set another OUT_DIR."
        sys.exit(f"Cannot resume from {path} ({reason}). {hint}")


def join_processes():
    """Return the number of this process and how many there are: torchrun starts one per GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local >= gpus > 0:
            sys.exit(f"There are {gpus} GPUs here: use --nproc_per_node={gpus}.")
        if gpus:
            torch.cuda.set_device(local)  # from here on, "cuda" means this process's GPU
        backend = "nccl" if gpus and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))  # rank 0 reads the images
        sys.stdout = sys.stdout if rank == 0 else None  # one process prints for all
    return rank, world


def train(model, loss, count, settings, fixed, path, preview=None, **extras):
    """Train the model; return a copy of it with averaged weights, and the loss of each step.

    Training resumes from the checkpoint at path, if there is one, however the last run ended. On a
    CPU, the result is the same as without the interruption, to the last bit. A GPU may add numbers
    in a different order.

    loss: a function from the indices of a batch (B,) to its loss. count: how many images there are.
    settings: the constants by name. fixed: the names of those that must be as in the checkpoint.
    preview: called after each checkpoint but the last with the number of steps so far, by one
    process; it has no influence on the training. extras: other modules for the checkpoint.
    """
    rank, world = join_processes()
    device, size = next(model.parameters()).device, settings["BATCH_SIZE"]
    averaged = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling
    inner, outer = split_weights(model)
    muon = Muon(inner, lr=0)  # each step sets both learning rates
    adam = torch.optim.Adam(outer, lr=0, betas=(0.9, 0.99), fused=True)
    float16 = getattr(model, "precision", None) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=float16)  # disabled, it does nothing
    parts = {"model": model, "averaged": averaged, "muon": muon, "adam": adam, **extras}
    seen, total, losses, recent = 0, math.ceil(settings["EPOCHS"] * count), [], []
    if path.exists():
        seen, losses = resume(parts, settings, fixed, path)
        print(f"Resuming from {path}, after {seen:,} of {total:,} images.")
    step, saved = len(losses), now()
    with tqdm(None, "Training", total, initial=seen, unit=" images", disable=rank > 0) as bar:
        while seen < total:
            # This number seeds everything random in a step: images, t, noise, dropout, mirroring.
            # So resuming needs no other random state.
            torch.manual_seed(hash((settings["SEED"], step, rank)))
            index = torch.randint(count, (math.ceil(size / world),), device=device)
            batch_loss = loss(index)
            scaler.scale(batch_loss).backward()
            for optimizer in muon, adam:
                scaler.unscale_(optimizer)
            # Both optimizers average past gradients; no outlier batch should dominate the average.
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # The learning rate rises for 5 % of the images and then falls to zero along a cosine.
            rise = (seen + size) / (0.05 * total)
            fall = 0.5 + 0.5 * math.cos(math.pi * seen / total)
            rate = settings["LEARNING_RATE"] * min(rise, fall)
            for optimizer, divisor in (muon, 1), (adam, 5):  # Adam: at most 0.004, as in 01
                optimizer.param_groups[0]["lr"] = rate / divisor
                if not float16 or norm.isfinite():  # float16 gradients may become infinite
                    scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            step, seen = step + 1, min(seen + size, total)
            recent.append(batch_loss.detach())  # no .item(): it would wait for the GPU
            update_average(averaged, model, step, settings["EMA_DECAY"])
            bar.update(seen - bar.n)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{torch.stack(recent[-50:]).mean():.4f}")
            if seen >= total or now() - saved > 60 * settings["SAVE_EVERY"]:
                losses, recent = losses + torch.stack(recent).tolist(), []
                if not math.isfinite(sum(losses) + nn.utils.get_total_norm(model.parameters())):
                    hint = "Halve LEARNING_RATE and start again: the last checkpoint is intact."
                    sys.exit(f"\nThe loss or a weight is NaN or infinite by step {step}. {hint}")
                if rank == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save({"settings": settings, "seen": seen, "losses": losses, **state}, path)
                    if preview and seen < total:
                        preview(step)
                saved = now()
    return averaged, losses


# %% 8. Figures


@torch.no_grad()
def save_autoencoder_figures(ldm, latents, x, settings, folder, note):
    """NEW in 05. Save reconstructions of test images x, their latents, and the scale of many.

    latents: scaled ones of training images, drawn, (N, latent_ch, h, h).
    """
    z = torch.cat([ldm.encode(part) for part in x.split(settings["BATCH_SIZE"])])
    again = torch.cat([ldm.decode(part) for part in z.split(settings["BATCH_SIZE"])])
    psnr = 10 * math.log10(4 / (again - x).square().mean().item())  # 4 = 2²: the range is 2
    print(f"PSNR of reconstructed test images: {psnr:.1f} dB.")
    # A VAE is meant to generate images from noise. But the latents of digits fill only a part of
    # N(0, 1), the smaller KL_WEIGHT, the smaller a part, and most noise lies elsewhere.
    noise = torch.randn(z[:12].shape, generator=torch.Generator().manual_seed(settings["SEED"]))
    prior = ldm.vae.decode(noise.to(z.device))
    rows = {"test images": x[:12], "reconstructions": again[:12], "from pure noise": prior}
    title = f"The autoencoder alone, PSNR {psnr:.1f} dB"
    image_table(rows, folder / "autoencoder.png", (), title, note)
    channels = (z[:12] / 2).transpose(0, 1)  # (latent_ch, 12, 8, 8), mostly within ±1
    latent_pictures(x[:12], channels, folder / "latents.png", note=note)
    path, scale = folder / "latent_scale.png", ldm.vae.scale.item()
    latent_scaling(latents / scale, scale, ldm.alphas_cumprod.cpu(), path, note=note)


def save_latent_interpolation(ldm, x, seed, folder, note, points=9):
    """NEW in 05. Blend the latents of pairs of test images x, add noise to them, and remove it."""
    x = x[: len(x[:6]) // 2 * 2]  # up to three pairs
    if len(x) == 0:
        return
    start = ldm.T * 6 // 10  # noise is 1.4 times the signal (cosine): the digit may change
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


def save_latent_figures(ldm, losses, x, settings, folder, note):
    """NEW in 05. Sample up to 36 images and save the figures; x: test images (B, C, H, W)."""
    frames, title = [], f"From latents, DDIM, {settings['DDIM_STEPS']} steps"
    torch.manual_seed(settings["SEED"])
    samples = ldm.sample(min(36, settings["BATCH_SIZE"]), settings["DDIM_STEPS"], frames=frames)
    save_results(folder, samples, frames, losses, note, title)
    save_latent_interpolation(ldm, x, settings["SEED"], folder, note)


# %% 9. Run

FIXED = "IMAGES", "T", "SCHEDULE", *NETWORK  # must be as in a checkpoint to resume from it
LIMITS = (  # constants, what each must be, the lowest and the highest value
    ("IMAGE_SIZE BASE_CH NUM_BLOCKS BATCH_SIZE", "a whole number", 1, 100_000),
    ("ATTENTION_AT", "whole numbers", 1, 100_000),
    ("CHANNEL_MULT", "numbers", 1e-9, 1000),
    ("T", "a whole number", 2, 100_000),
    ("SEED", "a whole number", 0, 2**63 - 1),
    ("EPOCHS SAVE_EVERY", "a number", 1e-9, 1e9),
    ("LEARNING_RATE", "a number", 1e-9, 1),
    ("DROPOUT EMA_DECAY", "a number", 0, 0.999999),
    ("FLIP COMPILE", "a choice", False, True),
)
# NEW in 05
FIXED_VAE = "IMAGES", *AUTOENCODER, "KL_WEIGHT"  # the same for stage 1
FIXED += (*AUTOENCODER, "KL_WEIGHT", "VAE_EPOCHS")
LIMITS += (
    ("LATENT_CH VAE_CH", "a whole number", 1, 100_000),
    ("DOWNSAMPLE", "a whole number", 2, 8),
    ("VAE_EPOCHS", "a number", 1e-9, 1e9),
    ("KL_WEIGHT", "a number", 0, 100),
    ("DDIM_STEPS", "a whole number", 1, T),
)


def check(constants):
    """Return the settings of a training run, and OUT_DIR; end the program if one cannot work."""
    settings, out_dir = {"SCHEDULE": constants["SCHEDULE"]}, constants["OUT_DIR"]
    if settings["SCHEDULE"] not in [*SCHEDULES]:
        sys.exit(f"SCHEDULE = {settings['SCHEDULE']!r} does not work: use one of {[*SCHEDULES]}.")
    for names, kind, low, high in LIMITS:
        type_ = int if "whole" in kind else int | float if "number" in kind else bool
        for name in names.split():
            value = constants[name]
            value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers
            many = kind.endswith("numbers")
            values = tuple(value) if many and isinstance(value, list | tuple) else (value,)
            works = all(isinstance(v, type_) and low <= v <= high for v in values)
            if not works or (name == "CHANNEL_MULT" and not values):
                sys.exit(f"{name} = {value!r} does not work: it must be {kind}, {low} to {high}.")
            settings[name] = values if many else value
    try:
        out_dir = Path(out_dir).expanduser()
        if out_dir.resolve() == Path(os.path.expanduser(str(constants["DATASET"]))).resolve():
            raise ValueError("the images of DATASET are there")
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()  # fails where nothing can be written
    except Exception as error:
        sys.exit(f"OUT_DIR = {constants['OUT_DIR']!r} does not work: {error}.")
    return settings, out_dir


if __name__ == "__main__":
    settings, out_dir = check(globals())
    if sys.platform == "linux":  # keep freed memory for the next step: 15 % less time on a CPU
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD in glibc's malloc.h
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    rank, world = join_processes()
    device = pick_device() if world == 1 or ON_GPU else torch.device("cpu")
    if rank > 0:
        dist.barrier()  # the first process downloads; then the others find the files
    images, _, names, source = load_dataset(DATASET, DATA_DIR, IMAGE_SIZE)
    if rank == 0 and world > 1:
        dist.barrier()
    images, test_images = hold_out(images, source, DATA_DIR)  # NEW in 05
    count, *shape = images.shape
    settings |= {"DATASET": source, "IMAGES": fingerprint(images), "IMAGE_SHAPE": tuple(shape)}
    path = out_dir / "checkpoint.pt"
    note = f"{source}, EPOCHS = {VAE_EPOCHS} and {EPOCHS}, SEED = {SEED}"

    torch.manual_seed(SEED)
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    ldm = LatentDiffusion.build(settings, device)
    model, images, x = ldm.model, images.to(device), to_batch(test_images.to(device))
    sizes = [sum(weight.numel() for weight in module.parameters()) for module in (ldm.vae, model)]
    print(f"{count:,} images of {source}; {len(names)} classes: {', '.join(names[:10])}")
    print(f"{sizes[0]:,} + {sizes[1]:,} parameters, on {device}")
    if COMPILE:
        model.compile()
    if world > 1:  # equal weights everywhere, and the mean of all processes' gradients
        ldm.model = nn.parallel.DistributedDataParallel(model)
    vae = nn.parallel.DistributedDataParallel(ldm.vae) if world > 1 else ldm.vae

    def loss_of_vae(index):
        x_0 = to_batch(images[index], FLIP)
        return vae_loss(x_0, *vae(x_0), KL_WEIGHT)

    def draw_latents(index):
        z = mean[index] + deviation[index] * torch.randn_like(mean[index])
        return z * ldm.vae.scale

    def loss(index):
        return ldm.loss(draw_latents(index))

    def preview(step):
        torch.manual_seed(SEED)  # the same noise each time: watch it change
        samples = LatentDiffusion.load(path).sample(min(16, BATCH_SIZE), DDIM_STEPS)
        sample_grid(samples, out_dir / f"samples_step_{step:06}.png", f"After {step:,} steps", note)

    try:
        if path.exists():  # stage 1 is finished, and its VAE is in the checkpoint of stage 2
            resume({"vae": ldm.vae.eval().requires_grad_(False)}, settings, FIXED, path)
        else:
            print("Stage 1 of 2: the autoencoder")
            stage_1, vae_path = settings | {"EPOCHS": settings["VAE_EPOCHS"]}, out_dir / "vae.pt"
            ldm.vae, _ = train(ldm.vae, loss_of_vae, count, stage_1, FIXED_VAE, vae_path)
        mean, deviation = encode_all(ldm.vae, images, settings["BATCH_SIZE"])
        if rank == 0:
            save_autoencoder_figures(ldm, draw_latents(slice(2000)), x, settings, out_dir, note)
        print("Stage 2 of 2: diffusion on its latents")
        _, losses = train(model, loss, count, settings, FIXED, path, preview, vae=ldm.vae)
        if rank == 0:
            ldm = LatentDiffusion.load(path)  # has the averaged weights; python -i keeps it at hand
            save_latent_figures(ldm, losses, x, settings, out_dir, note)
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command resumes from the last checkpoint, if any.")
