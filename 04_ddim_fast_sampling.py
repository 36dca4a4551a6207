"""04 · DDIM: the same network, twenty times faster, and backwards.

    python 04_ddim_fast_sampling.py
    torchrun --standalone --nproc_per_node=4 04_ddim_fast_sampling.py     # on 4 GPUs of one machine

DDPM evaluates the network once for each of its 1000 steps. But training never asked for 1000 steps:
it only fixed how much noise an image has at step t. So DDIM takes fewer, longer steps: of 50, the
first leads from t = 999 to 979, the last from t = 19 to the image. A step predicts the image, and
gives it the predicted noise again, as much as belongs to the smaller t; it needs no new noise. Then
only the starting noise is random: the same noise always gives the same image, the noise that leads
to a real image can be found approximately, and interpolating between two noise samples gives images
in between. That is the paper's method in its simplest form (η = 0, even steps); `ddim_invert` takes
the same steps from image to noise. The defaults of `ddim_sample` differ: new noise in each step, as
much as in DDPM (η = 1), which makes better digits with this network, and steps that are short near
the noise ("early"), which help if there are few. (η = 1 with even steps is 02's `sample`, up to
rounding of t.)

Network, training and DDPM's sampler are those of 02, to the last character. If 04 has no checkpoint
of its own, but 02 has one for the same images, 04 uses 02's network and trains nothing. What is new
is marked `NEW in 04`: constants, the class `DDIM` in section 5, the figures, and in section 8 the
use of 02's checkpoint.

The script leaves in `outputs/04_ddim_fast_sampling/` a cost table of all samplers (`speed.png`),
samples of the fast ones from the same noise (`samplers.png`), reconstructions after inversion
(`inversion.png`), interpolations, mostly between noise samples (`interpolation.png`), loops of
transitions (`transitions.gif`), and samples, denoising and loss as in 01. After
`python -i 04_ddim_fast_sampling.py`, or `ddim = DDIM.load(path)`:
`ddim.ddim_sample(n=16, ddim_steps=20)`, `ddim.sample(n=16)`, `ddim.ddim_invert(x)`.

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Improved DDPM = Nichol & Dhariwal 2021, arXiv:2102.09672
DDIM = Song, Meng & Ermon 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
DPM-Solver++ = Lu et al. 2022, arXiv:2211.01095

Code            Paper             Shape          Meaning (for other symbols see 02)
x_T             x_T               (B, C, H, W)   the noise at the start, t = T - 1
ddim_steps      S                                network evaluations for one image
timesteps       τ                 S + 1 ints     the steps that are visited, T - 1 ... -1
t, t_prev       τ_i, τ_{i−1}                     the current step; the next, smaller one
eta             η                                0 ... 1: new noise as a share of DDPM's √β̃
sigma_t         σ_{τ_i}(η)                       standard deviation of the new noise
alpha_bars[t]   ᾱ_t; DDIM's α_t                  as alphas_cumprod[t], and 1 for t = -1
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
from datetime import timedelta
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
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from utils.interpolation import interpolate, loop, transition_gif
from utils.visualize import (
    draw_digits,
    image_table,
    reconstruction_errors,
    sample_grid,
    save_results,
    table,
)

ON_GPU = torch.cuda.is_available()  # selects the larger defaults below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", "DRAWN" (offline), or a folder of images
IMAGE_SIZE = 32  # for a folder: its images are cropped and resized to squares of this side
T = 1000  # noise steps in training; `sample` takes as many, or fewer
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 128 if ON_GPU else 32  # width of the network, as in 01
CHANNEL_MULT = (1 / 4, 1, 2)  # channels of each level in multiples of BASE_CH; 28 → 14 → 7 pixels
NUM_BLOCKS = 2 if ON_GPU else 1  # residual blocks per level
ATTENTION_AT = (14, 16) if ON_GPU else ()  # resolutions with attention; the middle always has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # regularisation for photographs
FLIP = DATASET == "CIFAR10"  # mirror half of the images; never digits: a mirrored 3 is no digit
EPOCHS = 30 if ON_GPU else 8  # times that an image is seen, on average; CIFAR10 needs hundreds
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # peak learning rate of Muon; halve it if the loss jumps up
EMA_DECAY = 0.9999  # highest decay of the averaged weights; reached only after 90,000 steps
DDIM_STEPS = 50  # NEW in 04: network evaluations per image, 1 ... T; try 10
ETA = 1.0  # NEW in 04: new noise in each step; 1: as much as a DDPM with these steps, 0: none
SAVE_EVERY = 3  # minutes between checkpoints, each with a grid of samples; the most you can lose
COMPILE = False  # True: use torch.compile; slow to start, then perhaps faster on a GPU, not on CPUs
SEED = 0  # the same seed on the same CPU gives the same digits
DATA_DIR = "data"  # datasets are looked for and downloaded here
OUT_DIR = "outputs/04_ddim_fast_sampling"  # results are saved here
OUT_DIR_02 = "outputs/02_ddpm"  # NEW in 04: a checkpoint here is used instead of training


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


# %% 5. Loss and sampler


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


class DDPM:
    """A network that predicts noise, with its noise schedule, its loss and its sampler.

    model: called as model(x_t, t), returns (B, C, H, W). betas: float64 (T,), each in (0, 1).
    image_shape: (C, H, W). condition: further arguments of predict_noise; here, none.
    """

    def __init__(self, model, betas, image_shape, device):
        self.model, self.T, self.image_shape, self.device = model, len(betas), image_shape, device
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # float64: the product of 1000 factors
        self.alphas_cumprod = alphas_cumprod.float().to(device)  # ᾱ_t for a tensor t
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # ᾱ_t for an int t; 1 for t = -1

    @classmethod
    def build(cls, settings, device):
        """Return an untrained network with its loss and sampler; settings: constants by name."""
        shape, network = settings["IMAGE_SHAPE"], [settings[name] for name in NETWORK]
        model = UNet(shape, *network, best_precision(device))
        model.to(device, memory_format=best_layout(device))
        return cls(model, SCHEDULES[settings["SCHEDULE"]](settings["T"]), shape, device)

    @classmethod
    def load(cls, path):
        """Return the trained network in a checkpoint: DDPM.load(path).sample(n=16).

        The checkpoint describes itself: the constants at the top of this file have no influence.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        trained = cls.build(state["settings"], pick_device())
        trained.model.load_state_dict(state["averaged"])
        trained.model.eval().requires_grad_(False)
        return trained

    def loss(self, x_0):
        """Return the loss of images x_0 (B, C, H, W) in [-1, 1]: DDPM Algorithm 1, with other t."""
        t = random_timesteps(len(x_0), self.T, self.device)
        noise = torch.randn_like(x_0)
        noise_pred = self.model(q_sample(x_0, t, noise, self.alphas_cumprod), t)
        return F.mse_loss(noise_pred, noise)  # DDPM Eq. 14, per pixel:  mean of ‖ε − ε_θ(x_t, t)‖²

    def predict_noise(self, x_t, t, *condition):
        """Return noise_pred (B, C, H, W), the noise in x_t at step t, an int."""
        return self.model(x_t, torch.full((len(x_t),), t, device=self.device), *condition)

    def predict(self, x_t, t, *condition):
        """Return x_0_pred and noise_pred, (B, C, H, W) each, for x_t at step t, an int."""
        noise_pred = self.predict_noise(x_t, t, *condition)
        signal, spread = math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        # DDPM Eq. 15:  x̂_0 = (x_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t
        return (x_t - spread * noise_pred) / signal, noise_pred

    def p_sample(self, x_t, t, t_prev, *condition):
        """Go from x_t (B, C, H, W) at t to any t_prev < t, ints: return x_prev and x_0_pred."""
        # NEW in 02: 1/√ᾱ_t magnifies the errors of ε_θ: at the start of sampling, by 157 with the
        # linear schedule, by 20,000 with the cosine one (its last β is 0.999). Pixels lie in
        # [-1, 1], so x̂_0 should lie there, too. DDPM's own code also clamps it.
        x_0_pred = self.predict(x_t, t, *condition)[0].clamp(-1, 1)
        alpha_bar_t, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]  # t_prev = -1: 1
        # NEW in 02: a step may skip some t (Improved DDPM, section 4; 04 says why). Then, below,
        # t−1 means t_prev, α_t = ᾱ_t / ᾱ_{t−1}, the product of the α in between, and β_t = 1 − α_t.
        alpha_t = alpha_bar_t / alpha_bar_prev
        beta_t = 1 - alpha_t
        # DDPM Eq. 7, the mean of x_{t−1} given x_t and x_0, where x̂_0 replaces the unknown x_0:
        #   μ̃_t = √ᾱ_{t−1}·β_t / (1−ᾱ_t) · x̂_0 + √α_t·(1−ᾱ_{t−1}) / (1−ᾱ_t) · x_t
        # and its variance,  β̃_t = (1−ᾱ_{t−1}) / (1−ᾱ_t) · β_t.  Unclamped, this mean is that of
        # Algorithm 2, line 4. NEW in 02: σ_t² = β̃_t. (Section 3.2 allows both; 01's β_t would be
        # too much noise for long steps.)
        weight_x_0 = math.sqrt(alpha_bar_prev) * beta_t / (1 - alpha_bar_t)
        weight_x_t = math.sqrt(alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        x_prev = weight_x_0 * x_0_pred + weight_x_t * x_t
        if t_prev >= 0:  # Algorithm 2, line 3: no noise in the last step, where β̃ is 0
            sigma_t = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t)
            x_prev = x_prev + sigma_t * torch.randn_like(x_t)
        return x_prev, x_0_pred

    @torch.no_grad()
    def sample(self, n=16, steps=None, frames=None, condition=()):
        """Generate n images (n, C, H, W) in [-1, 1]: DDPM Algorithm 2.

        steps: 1 ... T; raises ValueError for others. Without steps, there are T of them; 50 of 1000
        lead from t = 999 to 979 ... 19 and -1, the image. frames: a list to which up to 51 stages
        (t, x_t, x_0_pred) are appended, for the figures; the last stage holds the finished images
        and has t = -1.
        """
        steps = self.T if steps is None else steps
        if steps not in range(1, self.T + 1):
            raise ValueError(f"{steps!r} steps: it must be a whole number, 1 to T = {self.T}")
        timesteps = [round(self.T * i / steps) - 1 for i in range(steps, -1, -1)]
        x_t = torch.randn(n, *self.image_shape, device=self.device)
        for i, (t, t_prev) in enumerate(tqdm([*pairwise(timesteps)], "Sampling", unit=" steps")):
            x_prev, x_0_pred = self.p_sample(x_t, t, t_prev, *condition)
            if frames is not None and i % math.ceil(steps / 50) == 0:
                frames.append((t, x_t, x_0_pred))
            x_t = x_prev
        if frames is not None:
            frames.append((-1, x_t, x_t))
        return x_t


class DDIM(DDPM):
    """NEW in 04. DDPM with faster samplers; the training stays the same.

    The loss depends only on how noisy x_t is (DDPM Eq. 4), not on the path from x_0 to x_t. So the
    network fits every process that has the same amount of noise at each t (DDIM section 3), and
    some of these skip most of the steps (section 4.2). It takes the same arguments as DDPM.
    """

    def timesteps(self, steps, spacing):
        """Return steps + 1 timesteps from T - 1 down to -1, the clean image.

        spacing: "even" makes all steps equally long: 50 of 1000 are 999, 979 ... 39, 19, -1.
        "early" makes the first ones short, those near the noise: 999, 998, 995 ... 75, 38, -1. The
        first x̂_0 is mostly magnified error (1/√ᾱ_t is 20,000), which a long step would carry on.
        "late", like DDIM D.2's quadratic spacing, makes the last ones short.
        Raises ValueError unless steps is a whole number, 1 ... T.
        """
        if steps not in range(1, self.T + 1):
            raise ValueError(f"{steps!r} steps: it must be a whole number, 1 to T = {self.T}")
        curves = {"even": lambda u: u, "early": lambda u: 1 - (1 - u) ** 2, "late": lambda u: u**2}
        # Each step is at least 1 long; the curve distributes the rest of T over the steps.
        rest, curve = self.T - steps, curves[spacing]
        return [i + round(rest * curve(i / steps)) - 1 for i in range(steps, -1, -1)]

    def predict(self, x_t, t):
        """As in DDPM, but clamped: return x_0_pred and noise_pred, (B, C, H, W) each."""
        x_0_pred = super().predict(x_t, t)[0].clamp(-1, 1)
        # The paper clamps nothing. Image and noise must still add up to x_t, else η = 1 with all T
        # steps would not be p_sample:  ε̂ = (x_t − √ᾱ_t · x̂_0) / √(1−ᾱ_t)
        noise_pred = x_t - math.sqrt(self.alpha_bars[t]) * x_0_pred
        return x_0_pred, noise_pred / math.sqrt(1 - self.alpha_bars[t])

    def ddim_step(self, x_t, t, t_prev, eta):
        """Go from x_t (B, C, H, W) at t to any t_prev < t, both ints: return x_prev, x_0_pred."""
        x_0_pred, noise_pred = self.predict(x_t, t)
        # The DDIM paper writes α for what is ᾱ in DDPM and here. Its τ_{i−1} is our t_prev.
        alpha_bar_t, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]
        # First with η = 0, so that σ_t = 0. Were image and noise known, q_sample would give
        #   x_prev = √ᾱ_prev · x̂_0 + √(1−ᾱ_prev) · ε̂,  however far t_prev is from t.
        # They are predictions, so long steps err. Nothing is random, but unlike in `p_sample`
        # without its noise, x_prev is as noisy as it should be. The shorter the steps, the closer
        # x_t follows a smooth curve that its start determines, the solution of an ordinary
        # differential equation (DDIM Eq. 14, there for x_t/√ᾱ_t and without a clamp).
        # With η > 0, new noise of variance σ_t² replaces as much of the predicted noise: together
        # they still have 1 − ᾱ_prev. η = 1 renews as much as a DDPM with these steps. DDIM Eq. 16:
        #   σ_t = η · √((1−ᾱ_prev) / (1−ᾱ_t)) · √(1 − ᾱ_t/ᾱ_prev)
        sigma_t = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        sigma_t = sigma_t * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        # η = 1 makes the better digits here: with η = 0, the network's errors stay to the end; new
        # noise probably covers them, so that later steps, which see more of the image, correct them
        # (Karras et al. 2022, arXiv:2206.00364, section 4). tests/README.md measures both.
        # DDIM Eq. 12:  x_prev = √ᾱ_prev · x̂_0 + √(1−ᾱ_prev−σ_t²) · ε̂ + σ_t · new noise
        x_prev = math.sqrt(alpha_bar_prev) * x_0_pred
        x_prev = x_prev + math.sqrt(1 - alpha_bar_prev - sigma_t**2) * noise_pred
        if sigma_t > 0:
            x_prev = x_prev + sigma_t * torch.randn_like(x_t)
        return x_prev, x_0_pred

    @torch.no_grad()
    def ddim_sample(self, n=16, ddim_steps=50, eta=1.0, x_T=None, frames=None, spacing="early"):
        """Generate n images (n, C, H, W) in [-1, 1] with ddim_steps network evaluations.

        ddim_steps: 1 ... T. eta: 0 ... 1. With eta = 0, the same noise always gives the same image;
        eta = 1 with spacing="even" is `sample`, up to rounding of t. x_T: the starting noise,
        (B, C, H, W), such as that of ddim_invert (then with spacing="even"); n is then ignored.
        frames: as in `sample`. spacing: as in `timesteps`. Raises ValueError for steps and eta out
        of range. DDIM sections 4.1 and 4.2.
        """
        timesteps = self.timesteps(ddim_steps, spacing)
        eta = float(eta)  # NumPy's float32 would be too inexact
        if not 0 <= eta <= 1:
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
        """Return, approximately, the noise x_T that ddim_sample with eta = 0 turns into x_0.

        x_0: (B, C, H, W) in [-1, 1]. ddim_steps: 1 ... T; raises ValueError for others. To come
        back to x_0, sample with as many steps, eta=0 and spacing="even", as here: "early" would
        begin the way up with its longest step. The differential equation behind η = 0 holds in both
        directions (section 4.3). Sampling evaluates the network where its step starts: at the
        x_{t_next} for which inversion is still looking. So inversion evaluates it at x_t. This
        causes an error, which shrinks with the step length.
        """
        x_t, timesteps = x_0, self.timesteps(ddim_steps, "even")[::-1]  # -1 ... T - 1
        bar = tqdm(timesteps[:-1], "Inverting", unit=" steps", leave=False)
        for t, t_next in zip(bar, timesteps[1:]):
            # In the first step, x_0 is known; only the noise is predicted, at t = 0 instead of -1.
            x_0_pred, noise_pred = self.predict(x_t, max(t, 0))
            x_0_pred = x_0 if t == -1 else x_0_pred
            alpha_bar_next = self.alpha_bars[t_next]
            # DDIM Eq. 12 with σ = 0, upwards
            x_t = math.sqrt(alpha_bar_next) * x_0_pred + math.sqrt(1 - alpha_bar_next) * noise_pred
        return x_t

    @torch.no_grad()
    def dpm_solver_sample(self, n=16, steps=15, x_T=None, spacing="early"):
        """OPTIONAL: DPM-Solver++(2M), for the equation of η = 0. n, x_T, spacing: as above.

        DDIM takes x̂_0 to be constant during a step. Here the last two x̂_0 are extrapolated to the
        middle of the step, on the axis λ_t = log(√ᾱ_t / √(1−ᾱ_t)), half the log of the
        signal-to-noise ratio (2M: second order, multistep). This is DPM-Solver++ Algorithm 2, which
        writes α_t for our √ᾱ_t and σ_t for our √(1−ᾱ_t). Its authors clamp x̂_0 adaptively and
        stop at a small t > 0. The usual last step, to x̂_0, is DDIM's: λ is infinite at t = -1.
        """
        alpha_bars, timesteps = self.alpha_bars, self.timesteps(steps, spacing)
        x_t = torch.randn(n, *self.image_shape, device=self.device) if x_T is None else x_T
        x_0_before = h_before = None
        bar = tqdm(pairwise(timesteps), "DPM-Solver++", len(timesteps) - 1, leave=False)
        for t, t_prev in bar:
            x_0_pred, _ = self.predict(x_t, t)
            if t_prev == -1:
                return x_0_pred
            # h = λ_prev − λ_t, the length of the step
            snr_prev, snr = (alpha_bars[i] / (1 - alpha_bars[i]) for i in (t_prev, t))
            h = math.log(snr_prev / snr) / 2
            D = x_0_pred  # the first step has no earlier x̂_0, so it is DDIM's
            if h_before is not None:
                # D = x̂_0 + (x̂_0 − x̂_0 of the step before) · h / (2 · h of the step before)
                D = x_0_pred + (x_0_pred - x_0_before) * h / (2 * h_before)
            x_0_before, h_before = x_0_pred, h
            # x_prev = √(1−ᾱ_prev)/√(1−ᾱ_t) · x_t − √ᾱ_prev · (e^−h − 1) · D
            ratio = math.sqrt((1 - alpha_bars[t_prev]) / (1 - alpha_bars[t]))
            x_t = ratio * x_t - math.sqrt(alpha_bars[t_prev]) * math.expm1(-h) * D


# %% 6. Training: what is new, then from `save` on what every long training run needs (skim it)


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


# %% 7. Figures


def generate(ddim, x_T, ddim_steps):
    """NEW in 04. Return images of noise x_T (B, C, H, W), η = 0, with the steps of ddim_invert."""
    return ddim.ddim_sample(x_T=x_T, ddim_steps=ddim_steps, eta=0, spacing="even")


def compare_samplers(ddim, seed, count):
    """NEW in 04. Return {(sampler, network evaluations): (seconds, count images)}, DDPM first."""
    samplers = {("DDPM", ddim.T): ddim.sample}
    for name, sampler, all_steps in (
        ("DDIM, η = 1", ddim.ddim_sample, (10, 20, 50, 100)),
        ("DDIM, η = 0", partial(ddim.ddim_sample, eta=0), (10, 20, 50)),
        ("DPM-Solver++(2M)", ddim.dpm_solver_sample, (10, 20)),
    ):
        for steps in [n for n in all_steps if n <= ddim.T] or [1]:
            samplers[name, steps] = lambda n, f=sampler, steps=steps: f(n, steps)
    ddim.ddim_sample(count, 1).cpu()  # the first call is slow and does not count
    results = {}
    for key, sampler in samplers.items():
        torch.manual_seed(seed)  # the same starting noise for all
        start = now()
        images = sampler(count).cpu()  # .cpu() waits until a GPU is done
        results[key] = now() - start, images
    return results


def save_comparison(ddim, seed, count, folder, note):
    """NEW in 04. Print and save what each sampler costs, and its samples from the same noise."""
    results = compare_samplers(ddim, seed, count)
    ddpm_seconds, _ = results["DDPM", ddim.T]
    header = ["sampler", "network evaluations", f"seconds for {count} images", "speed-up"]
    lines = [
        [name, f"{steps}", f"{seconds:.2f}", f"{ddpm_seconds / seconds:.1f} ×"]
        for (name, steps), (seconds, _) in results.items()
    ]
    title = f"The same network with different samplers, on {ddim.device}"
    table(header, lines, folder / "speed.png", title, note)
    names, all_steps = zip(*[key for key in results if key[0] != "DDPM"])
    columns, rows = sorted(set(all_steps)), {}
    nothing = 0, torch.ones(count, *ddim.image_shape)  # a white square where there is no sample
    for name in dict.fromkeys(names):
        for i in range(min(3, count)):
            row = [results.get((name, steps), nothing)[1][i] for steps in columns]
            rows[f"{name.replace('(2M)', '')}, noise {i + 1}"] = torch.stack(row)
    title = "Three noise samples with each fast sampler"
    image_table(rows, folder / "samplers.png", [f"{n} steps" for n in columns], title, note)


def save_inversion(ddim, x_0, folder, note):
    """NEW in 04. Save images x_0 next to their reconstructions from inverted noise.

    Where all training images are black, as at MNIST's border, sampling turns any noise black, and
    inversion finds noise that is too weak.
    """
    errors, images = {}, {"image": x_0[:5]}
    for steps in [n for n in (10, 20, 50, 100, 250) if n < ddim.T] or [ddim.T]:
        x_T = ddim.ddim_invert(x_0, steps)
        back = generate(ddim, x_T, steps)
        errors[steps] = (back - x_0).abs().mean().item()
        images[f"{steps} steps"] = back[:5]
    images["its noise"] = x_T[:5]
    title = "Training images to their noise and back, DDIM with η = 0"
    reconstruction_errors(errors, images, folder / "inversion.png", title, note)


def save_transitions(ddim, x_0, seed, size, folder, note, points=11):
    """NEW in 04. Save interpolations between noise samples, and a looping animation.

    One row interpolates between two images x_0, although the noise that inversion finds for them
    is not typical (see `save_inversion`).
    """
    steps = min(100, ddim.T)
    torch.manual_seed(seed + 5)  # MNIST, SEED = 0: all six ends are digits, not so for other noise
    stops = torch.randn(4, 6, *ddim.image_shape, device=ddim.device)  # 4 loops of 6 stops each
    pairs = {"A": stops[0, :2], "B": stops[1, :2], "C": stops[2, :2]}
    pairs["training images"] = ddim.ddim_invert(x_0[:2], steps)

    def blend(a, b, method="slerp"):
        return interpolate(a[None], b[None], points, method)[:, 0]

    rows = {name: generate(ddim, blend(*pair), steps) for name, pair in pairs.items()}
    rows["A, straight (lerp)"] = generate(ddim, blend(*pairs["A"], "lerp"), steps)
    rows["A, pixels"] = blend(rows["A"][0], rows["A"][-1], "lerp")  # without any model
    shares = [f"{100 * i / (points - 1):.0f} %" for i in range(points)]
    title = "Between two noise samples along the arc (slerp), and otherwise"
    image_table(rows, folder / "interpolation.png", shares, title, note)
    noise = torch.stack([loop(one_loop, 10) for one_loop in stops], dim=1)

    def show(x_T):
        return ddim.ddim_sample(x_T=x_T, ddim_steps=min(50, ddim.T), eta=0)

    transition_gif(show, noise, folder / "transitions.gif", note.split(",")[0], size)


def save_sampling_figures(ddim, losses, settings, x_0, folder, note):
    """NEW in 04. Sample up to 36 images, save the figures; x_0: training images (B, C, H, W)."""
    seed, size, frames = settings["SEED"], settings["BATCH_SIZE"], []
    steps, eta = settings["DDIM_STEPS"], settings["ETA"]
    torch.manual_seed(seed)
    samples = ddim.ddim_sample(min(36, size), steps, eta, frames=frames)
    title = f"DDIM, η = {eta:g}, {steps} steps"
    save_results(folder, samples, frames, losses, note, title)
    print("Next: all samplers side by side. On a CPU that takes some minutes.")
    save_comparison(ddim, seed, min(64, size), folder, note)
    save_inversion(ddim, x_0[: min(16, size)], folder, note)
    save_transitions(ddim, x_0, seed, size, folder, note)


# %% 8. Run

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
LIMITS += (("DDIM_STEPS", "a whole number", 1, T), ("ETA", "a number", 0, 1))  # NEW in 04


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


def use_02(path, settings, count):
    """NEW in 04. Return whether path is a checkpoint of 02 for the same images, count of them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        trained, total = state["settings"], math.ceil(state["settings"]["EPOCHS"] * count)
        if trained["IMAGES"] != settings["IMAGES"]:
            raise ValueError(f"its images are {trained['IMAGES']}, not {settings['IMAGES']}")
        if DDIM.load(path).T < DDIM_STEPS:
            raise ValueError(f"it has T = {trained['T']}, less than DDIM_STEPS")
    except FileNotFoundError:
        return False
    except Exception as error:  # also for a damaged file, or another program's
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"Training from scratch, because {path} does not fit: {reason}.")
        return False
    print(f"Using the network in {path}, trained on {state['seen']:,} of {total:,} images.")
    print("To train another one, change OUT_DIR_02.")
    return True


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
    count, *shape = images.shape
    settings |= {"DATASET": source, "IMAGES": fingerprint(images), "IMAGE_SHAPE": tuple(shape)}
    path, note = out_dir / "checkpoint.pt", f"{source}, EPOCHS = {EPOCHS}, T = {T}, SEED = {SEED}"
    path_02 = Path(str(OUT_DIR_02)).expanduser() / "checkpoint.pt"
    of_02 = not path.exists() and use_02(path_02, settings, count)  # NEW in 04
    if of_02:
        path, note = path_02, f"{source}, the network of 02, SEED = {SEED}"

    torch.manual_seed(SEED)
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    ddim = DDIM.build(settings, device)
    model, images = ddim.model, images.to(device)
    size = sum(weight.numel() for weight in model.parameters())
    if not of_02:
        print(f"{count:,} images of {source}; {len(names)} classes: {', '.join(names[:10])}")
        print(f"{size:,} parameters, on {device}")
    if COMPILE:
        model.compile()
    if world > 1:  # equal weights everywhere, and the mean of all processes' gradients
        ddim.model = nn.parallel.DistributedDataParallel(model)

    def loss(index):
        return ddim.loss(to_batch(images[index], FLIP))

    def preview(step):
        torch.manual_seed(SEED)  # the same noise each time: watch it change
        samples = DDIM.load(path).ddim_sample(min(16, BATCH_SIZE), DDIM_STEPS, ETA)
        sample_grid(samples, out_dir / f"samples_step_{step:06}.png", f"After {step:,} steps", note)

    try:
        if not of_02:
            train(model, loss, count, settings, FIXED, path, preview)
        if rank == 0:
            ddim = DDIM.load(path)  # has the averaged weights; python -i keeps it at hand
            losses = torch.load(path, map_location="cpu", weights_only=True)["losses"]
            save_sampling_figures(ddim, losses, settings, to_batch(images[:16]), out_dir, note)
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command resumes from the last checkpoint, if any.")
