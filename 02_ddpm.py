"""02 · DDPM in earnest: the textbook's method, made to work well.

    python 02_ddpm.py
    torchrun --standalone --nproc_per_node=4 02_ddpm.py        # on 4 GPUs of one machine

Training and sampling are still the two algorithms of 01. What is new is marked `NEW in 02`. The
README shows what each addition except the clamp gains in equal training time; at this size, some
gain nothing:

  cosine schedule    section 3   fewer steps are wasted on images that are almost pure noise
  attention          section 4   every part of an image takes the whole image into account
  clamped sampling   section 5   each predicted image is clamped to the range of pixels, -1 ... 1
  averaged weights   section 5   sampling uses a moving average of the weights
  Muon               section 6   an optimizer that needs fewer steps

The rest is what a serious training run needs: checkpoints, 16-bit arithmetic on GPUs, several GPUs,
and images of your own.

Every few minutes, the script saves a checkpoint and a grid of samples in `outputs/02_ddpm/`. At the
end, it adds the figures of 01 and `loss_per_timestep.png`, the network's error at each t. Stop it
whenever you like: the same command resumes from the last checkpoint, or only samples if training is
finished. After `python -i 02_ddpm.py`: `ddpm.sample(n=16)`. To sample from any checkpoint, whatever
the constants in this file say: `load("a/checkpoint.pt").sample(n=16)`.

How to read it: sections 3 to 5 are diffusion. Skim the rest.

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Improved DDPM = Nichol & Dhariwal 2021, arXiv:2102.09672

Code              Paper         Shape          Meaning
x_0               x_0           (B, C, H, W)   clean images, pixels from -1 (black) to 1 (white)
x_t, x_prev       x_t, x_{t-1}  (B, C, H, W)   noisy images at step t, at the step before
noise             ε             (B, C, H, W)   Gaussian noise, mean 0, variance 1
noise_pred        ε_θ(x_t, t)   (B, C, H, W)   the network's prediction of that noise
x_0_pred          x̂_0           (B, C, H, W)   the image that follows from this prediction
t                 t             (B,)           0 ... T-1 (paper: 1 ... T); t = 0: after one step
betas             β             (T,)           variance of the noise that a step adds; α = 1 - β
alphas_cumprod    ᾱ             (T,)           product of the α up to t: the image's share of x_t²
alpha_bars        ᾱ             T + 1 floats   the same for an int t; [-1] is 1, the clean image's
"""

# %% 1. Settings: edit and run again

import copy
import io
import math
import os
import socket
import sys
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

from utils.visualize import draw_digits, sample_grid, save_results, timestep_losses

ON_GPU = torch.cuda.is_available()  # selects the larger defaults below
DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", "DRAWN" (offline), or a folder of images
IMAGE_SIZE = 32  # for a folder: its images are cropped and resized to squares of this side
T = 1000  # noise steps, in training and in sampling
SCHEDULE = "cosine"  # how the noise grows: "cosine" (Improved DDPM) or "linear" (DDPM)
BASE_CH = 64 if ON_GPU else 16  # channels at full resolution; DDPM's code has 128 for CIFAR-10
CHANNEL_MULT = (1, 2, 4)  # channels of each level in multiples of BASE_CH; 28 → 14 → 7 pixels
NUM_BLOCKS = 2 if ON_GPU else 1  # residual blocks per level
ATTENTION_AT = (14, 16) if ON_GPU else ()  # resolutions with attention; the middle always has it
DROPOUT = 0.1 if DATASET == "CIFAR10" else 0.0  # regularisation for photographs
FLIP = DATASET == "CIFAR10"  # mirror half of the images; never digits: a mirrored 3 is no digit
EPOCHS = 30 if ON_GPU else 6  # times that an image is seen, on average; CIFAR10 needs hundreds
BATCH_SIZE = 128 if ON_GPU else 64  # images per training step, over all GPUs together
LEARNING_RATE = 0.02  # peak learning rate of Muon; halve it if the loss jumps up
EMA_DECAY = 0.9999  # highest decay of the averaged weights; reached only after 90,000 steps
SAVE_EVERY = 2  # minutes between checkpoints: the most that an interruption can cost
PREVIEW_EVERY = 5  # minutes between grids of samples
COMPILE = False  # True: use torch.compile; slow to start, perhaps faster then
SEED = 0  # the same seed on the same CPU gives the same digits
DATA_DIR = "data"  # datasets are looked for and downloaded here
OUT_DIR = "outputs/02_ddpm"  # results are saved here


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


# %% 5. Loss and sampler


class DDPM:
    """A network that predicts noise, with its noise schedule, its loss and its sampler.

    model: called as model(x_t, t), returns (B, C, H, W). betas: float64 (T,), each in (0, 1).
    image_shape: (C, H, W).
    """

    def __init__(self, model, betas, image_shape, device):
        self.model, self.T, self.image_shape, self.device = model, len(betas), image_shape, device
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # float64: the product of 1000 factors
        self.alphas_cumprod = alphas_cumprod.float().to(device)  # ᾱ_t for a tensor t
        self.betas = betas.tolist()
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # ᾱ_t for an int; [-1]: the clean image's

    @classmethod
    def build(cls, state, device):
        """Return the sampler that a checkpoint describes, with its averaged weights.

        state: the contents of the checkpoint: "settings", the constants by name, and "averaged",
        the weights. Without the latter the network is untrained.
        """
        settings = state["settings"]
        model = UNet(*[settings[name] for name in NETWORK], best_precision(device))
        if "averaged" in state:
            model.load_state_dict(state["averaged"])
            model.eval().requires_grad_(False)
        model.to(device, memory_format=best_layout(device))
        betas = SCHEDULES[settings["SCHEDULE"]](settings["T"])
        return cls(model, betas, settings["IMAGE_SHAPE"], device)

    def loss(self, x_0):
        """Return the loss of images x_0 (B, C, H, W) in [-1, 1]: DDPM Algorithm 1."""
        t = torch.randint(self.T, (len(x_0),), device=self.device)  # any step, for each image
        noise = torch.randn_like(x_0)
        noise_pred = self.model(q_sample(x_0, t, noise, self.alphas_cumprod), t)
        return F.mse_loss(noise_pred, noise)  # DDPM Eq. 14:  mean of ‖ε − ε_θ(x_t, t)‖²

    def predict(self, x_t, t):
        """Return x_0_pred and noise_pred, (B, C, H, W) each, for x_t at step t, an int."""
        noise_pred = self.model(x_t, torch.full((len(x_t),), t, device=self.device))
        signal, spread = math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        # DDPM Eq. 15:  x̂_0 = (x_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t
        return (x_t - spread * noise_pred) / signal, noise_pred

    def p_sample(self, x_t, t):
        """Step back from x_t (B, C, H, W) at t, an int: return x_prev and x_0_pred."""
        # NEW in 02: 1/√ᾱ_t magnifies the errors of ε_θ: at the start of sampling, by 157 with the
        # linear schedule and by 20,000 with the cosine one. Pixels lie in [-1, 1], so x̂_0 should
        # lie there, too. DDPM's own code also clamps it.
        x_0_pred = self.predict(x_t, t)[0].clamp(-1, 1)
        beta_t, alpha_bar_t = self.betas[t], self.alpha_bars[t]
        alpha_bar_prev = self.alpha_bars[t - 1]  # at t = 0 it is 1, the clean image's
        # DDPM Eq. 7, the mean of x_{t−1} given x_t and x_0, where x̂_0 replaces the unknown x_0:
        #   μ̃_t = √ᾱ_{t−1}·β_t / (1−ᾱ_t) · x̂_0 + √α_t·(1−ᾱ_{t−1}) / (1−ᾱ_t) · x_t
        # and its variance,  β̃_t = (1−ᾱ_{t−1}) / (1−ᾱ_t) · β_t.  Unclamped, this mean is that of
        # Algorithm 2, line 4. NEW in 02: σ_t² = β̃_t. (01 takes β_t; section 3.2 allows both.)
        weight_x_0 = math.sqrt(alpha_bar_prev) * beta_t / (1 - alpha_bar_t)
        weight_x_t = math.sqrt(1 - beta_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        x_prev = weight_x_0 * x_0_pred + weight_x_t * x_t
        if t > 0:  # Algorithm 2, line 3: no noise in the last step, where β̃ is 0
            sigma_t = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t)
            x_prev = x_prev + sigma_t * torch.randn_like(x_t)
        return x_prev, x_0_pred

    @torch.no_grad()
    def sample(self, n=16, frames=None):
        """Generate n images (n, C, H, W) in [-1, 1]: DDPM Algorithm 2.

        frames: a list to which up to 51 stages (t, x_t, x_0_pred) are appended, for the figures;
        the last stage holds the finished images and has t = -1.
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


def ideal_x_0(x_t, alpha_bar_t, images):
    """Return the best possible x̂_0 of x_t (B, C, H, W), if x_0 is one of images (N, C, H, W).

    The squared error is smallest for the mean of all images, each weighted by the probability that
    x_t came from it: the less noise it takes to turn an image into x_t, the more probable that
    image is (Karras et al. 2022, arXiv:2206.00364, Eq. 57). On average, no network can do better.
    At large t, this is a mean of many images, which a network can learn. At small t, it is a single
    image, and a network that did as well would have memorised it.
    """
    signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    # ε = (x_t − √ᾱ_t · x_0) / √(1−ᾱ_t) has the density exp(−‖ε‖² / 2), up to a constant.
    noise_norm = torch.cdist(x_t.flatten(1) / signal, images.flatten(1)) * signal / spread  # (B, N)
    probability = (-noise_norm.square() / 2).softmax(dim=1)
    return (probability @ images.flatten(1)).view_as(x_t)


@torch.no_grad()
def loss_per_timestep(ddpm, images, batch_size=64, count=20):
    """Return up to `count` timesteps, the network's squared error of ε at each, and the ideal one.

    images: the training images, (N, C, H, W) in [-1, 1]; the errors are those of the first few.
    """
    x_0 = images[:batch_size]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    # Not T - 1: with the cosine schedule no trace of the image is left there.
    timesteps = torch.linspace(0, ddpm.T - 2, min(count, ddpm.T - 1)).round().long().tolist()
    errors, ideal_errors = [], []
    for timestep in timesteps:
        alpha_bar_t = ddpm.alpha_bars[timestep]
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        x_t = q_sample(x_0, t, noise, ddpm.alphas_cumprod)
        _, noise_pred = ddpm.predict(x_t, timestep)
        errors.append((noise - noise_pred).square().mean().item())
        # By DDPM Eq. 15, at the same x_t:  ‖ε − ε_θ‖² = ᾱ_t / (1−ᾱ_t) · ‖x_0 − x̂_0‖²
        error = (x_0 - ideal_x_0(x_t, alpha_bar_t, images)).square().mean().item()
        ideal_errors.append(alpha_bar_t / (1 - alpha_bar_t) * error)
    return timesteps, errors, ideal_errors


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


SAMPLER = DDPM
SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule}
NETWORK = "IMAGE_SHAPE", "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT", "DROPOUT"
FIXED = "DATASET", "T", "SCHEDULE", *NETWORK  # must match a checkpoint to resume from it


def load(path):
    """Return the sampler in a checkpoint, with the averaged weights: load(path).sample(n=16).

    The checkpoint describes itself: the constants at the top of this file have no influence.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    return SAMPLER.build(state, pick_device())


# %% 6. Training: nothing about diffusion from here on


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


# %% 7. Figures


def sample_in_parts(sample, n, size, frames=None):
    """Return n images of sample(m, frames=...), at most `size` at once; frames: of the first."""
    parts = [min(size, n - first) for first in range(0, n, size)]
    return torch.cat([sample(m, frames=None if i else frames) for i, m in enumerate(parts)])


def save_preview(ddpm, trainer, folder, note):
    """Save 16 samples."""
    torch.manual_seed(trainer.settings["SEED"])  # the same noise each time: watch it change
    samples = sample_in_parts(ddpm.sample, 16, trainer.settings["BATCH_SIZE"])
    path, title = folder / f"samples_step_{trainer.step:06}.png", f"After {trainer.step:,} steps"
    sample_grid(samples, path, title, note)


def save_figures(ddpm, trainer, images, folder, note):
    """Sample 36 images and save the final figures; images: uint8 (N, C, H, W)."""
    torch.manual_seed(trainer.settings["SEED"])
    frames = []
    samples = sample_in_parts(ddpm.sample, 36, trainer.settings["BATCH_SIZE"], frames)
    save_results(folder, samples, frames, trainer.losses, note)
    few = to_batch(images[: 2**26 // images[0].numel()])  # at most 0.3 GB
    timesteps, *losses = loss_per_timestep(ddpm, few, min(64, trainer.settings["BATCH_SIZE"]))
    timestep_losses(timesteps, *losses, folder / "loss_per_timestep.png", note=note)


# %% 8. Run


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
    ("T", lambda v: is_whole(v, 2), "a whole number from 2"),
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
    count, *shape = images.shape
    if shape[1] % 2 ** (len(CHANNEL_MULT) - 1):
        sys.exit(f"CHANNEL_MULT = {CHANNEL_MULT} halves {shape[1]} pixels too often: shorten it.")
    settings |= {"DATASET": source, "IMAGE_SHAPE": tuple(shape)}

    torch.manual_seed(SEED)
    if ON_GPU:  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    ddpm = SAMPLER.build({"settings": settings}, device)
    model, images = ddpm.model, images.to(device)
    if world > 1:  # equal weights everywhere, and the mean of all processes' gradients
        ddpm.model = nn.parallel.DistributedDataParallel(model)

    def loss(index):
        return ddpm.loss(to_batch(images[index], FLIP))

    path = out_dir / "checkpoint.pt"
    trainer = Trainer(model, loss, count, settings, FIXED, path, rank, world)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{count:,} images of {source}, {size:,} parameters, on {device}")
    if COMPILE:
        model.compile()
    note = f"{source}, EPOCHS = {EPOCHS}, T = {T}, SEED = {SEED}"
    for _ in trainer.run():  # pauses every PREVIEW_EVERY minutes
        if rank == 0:
            trainer.save()
            save_preview(load(path), trainer, out_dir, note)
    if rank == 0:
        ddpm = load(path)  # has the averaged weights; python -i keeps it at hand
        save_figures(ddpm, trainer, images, out_dir, note)
