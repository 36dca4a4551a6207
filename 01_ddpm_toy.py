"""01 · DDPM, the textbook diffusion model: new handwritten digits, on a laptop, in minutes.

    python 01_ddpm_toy.py

What is a diffusion model? Take a picture, fade it a little and add a little random noise; repeat.
After 1000 steps only noise is left. Ruining a picture is easy; the way back must be learned.
Training: give a picture the noise of a random number of steps, let a neural network predict that
noise (`loss`), and adjust the network to reduce its error. Repeat this with all the pictures.
Sampling: start from pure noise. 1000 times, predict the noise, remove a little of it and, except
at the end, add a little new noise (`p_sample`). What is left is a new picture.

Schedule, loss and sampler are the paper's, line by line; network and training are simpler. Read
sections 3 to 5 of this file, skim the rest. After `python -i 01_ddpm_toy.py`: `ddpm.sample(n=16)`.

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Code              Paper         Shape          Meaning
x_0               x_0           (B, C, H, W)   clean images, pixels from -1 (black) to 1 (white)
x_t, x_prev       x_t, x_{t-1}  (B, C, H, W)   noisy images at step t, at the step before
noise             ε             (B, C, H, W)   Gaussian noise, mean 0, variance 1
noise_pred        ε_θ(x_t, t)   (B, C, H, W)   the network's prediction of it (θ: its weights)
t                 t             (B,)           0 ... T-1 (paper: 1 ... T); t = 0: after one step
betas, alphas     β, α = 1 - β  (T,)           noise variance of a step; share it leaves
alphas_cumprod    ᾱ             (T,)           product of the alphas: the share left at step t
"""

# %% 1. Settings: edit and run again

import math
import socket
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from utils.visualize import draw_digits, save_results, training_task

DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", or "DRAWN": digits rendered from fonts
T = 1000  # noise steps, at least 50; with fewer, sampling is faster and the images are worse
BASE_CH = 32  # width of the network: 16 is faster, 64 is slower and better
EPOCHS = 3  # passes through the dataset
BATCH_SIZE = 64  # images per training step
LEARNING_RATE = 0.004  # peak learning rate; halve it if the loss jumps up
SEED = 0  # the same seed on the same CPU gives the same digits
DATA_DIR = "data"  # datasets are looked for and downloaded here
OUT_DIR = "outputs/01_ddpm_toy"  # results are saved here


# %% 2. Data


def load_images(name, folder):
    """Return training images, uint8 (N, C, H, W), and the dataset's name: DRAWN without MNIST."""
    if name == "DRAWN":
        return draw_digits()[0][:, None], name
    socket.setdefaulttimeout(20)  # seconds; otherwise a dead connection could hang forever
    try:
        images = getattr(torchvision.datasets, name)(folder, train=True, download=True).data
    except Exception as error:  # no internet, a damaged file, no such dataset
        reason = " ".join(str(error).split())
        print(f"{name} could be neither read from {folder!r} nor downloaded: {reason}")
        return load_images("DRAWN", folder) if name == "MNIST" else sys.exit(1)
    images = torch.as_tensor(images)  # grey (N, H, W) or colour (N, H, W, 3)
    return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)), name


# %% 3. Noise schedule (β of each step) and forward process (adding noise: q in the paper)


def linear_beta_schedule(T):
    """Return β, float64 (T,): DDPM section 4, times 1000 / T as in Improved DDPM's code."""
    return (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)


def q_sample(x_0, t, noise, alphas_cumprod):
    """Add the noise of all steps up to t (B,) to images x_0 (B, C, H, W), in one go."""
    alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    # DDPM Eq. 2, one step (t from 1):  x_t = √α_t · x_{t−1} + √β_t · ε_t.  Two steps lead to
    #   x_2 = √α_2 · (√α_1 · x_0 + √β_1 · ε_1) + √β_2 · ε_2.  Sums of independent Gaussians
    #   are Gaussian; variances add up: α_2 · (1 − α_1) + (1 − α_2) = 1 − α_1·α_2 = 1 − ᾱ_2,
    # and so on, step by step, up to DDPM Eq. 4:  x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


# %% 4. U-Net: predicts the noise in an image (sizes for MNIST, BASE_CH = 32)
#   x_t (1, 28, 28)                                               noise_pred (1, 28, 28)
#     └ conv_in → (8, 28, 28) ────────── skip ────────→ block_up_28 → conv_out ┘
#         └ down_14, block_14 → (32, 14, 14) ── skip ─→ block_up_14 ┘
#             └ down_7 → (64, 7, 7) → block_7a → block_7b ┘
# The image shrinks until a few cheap convolutions see all of it; skips then bring the detail back.


def timestep_embedding(t, dim):
    """Turn t (B,) into sines and cosines (B, dim), fast to slow: DDPM appendix B."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SimpleBlock(nn.Module):
    """Two convolutions and a shortcut: x (B, in_ch, H, W), time (B, dim) → (B, out_ch, H, W)."""

    def __init__(self, in_ch, out_ch, dim):
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(1, in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm_2, self.conv_2 = nn.GroupNorm(1, out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.time = nn.Linear(dim, 2 * out_ch)  # scales and shifts; in the paper t only shifts
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)  # at first the shortcut dominates: easier to train

    def forward(self, x, time):
        # Why must the network know t? ε always has variance 1, but x_t contains √(1−ᾱ_t) · ε:
        # √(1−ᾱ_t) is 0.01 at t = 0 and nearly 1 at the end. t tells the network how faint ε is.
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, out_ch, 1, 1) each
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.norm_2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_2(F.silu(h))


class SimpleUNet(nn.Module):
    """Predict the noise in x_t (B, channels, H, W) at step t (B,); H and W divisible by 4."""

    def __init__(self, channels, base_ch):
        super().__init__()
        ch_28, ch_14, ch_7, dim = max(1, base_ch // 4), base_ch, 2 * base_ch, 4 * base_ch
        self.time = nn.Sequential(nn.Linear(ch_7, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.conv_in = nn.Conv2d(channels, ch_28, 3, padding=1)
        self.down_14 = nn.Conv2d(ch_28, ch_14, 3, stride=2, padding=1)
        self.block_14 = SimpleBlock(ch_14, ch_14, dim)
        self.down_7 = nn.Conv2d(ch_14, ch_7, 3, stride=2, padding=1)
        self.block_7a, self.block_7b = (SimpleBlock(ch_7, ch_7, dim) for _ in "ab")
        self.up_14 = nn.Conv2d(ch_7, ch_14, 1)
        self.block_up_14 = SimpleBlock(2 * ch_14, ch_14, dim)
        self.up_28 = nn.Conv2d(ch_14, ch_28, 1)
        self.block_up_28 = SimpleBlock(2 * ch_28, ch_28, dim)
        self.norm_out = nn.GroupNorm(1, ch_28)
        self.conv_out = nn.Conv2d(ch_28, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x_t, t):
        time = self.time(timestep_embedding(t, self.time[0].in_features))  # (B, dim)
        h_28 = self.conv_in(x_t)  #                                          (B, ch_28, 28, 28)
        h_14 = self.block_14(self.down_14(h_28), time)  #                    (B, ch_14, 14, 14)
        h = self.block_7b(self.block_7a(self.down_7(h_14), time), time)  #   (B, ch_7, 7, 7)
        h = F.interpolate(self.up_14(h), scale_factor=2)  #                  (B, ch_14, 14, 14)
        h = self.block_up_14(torch.cat([h, h_14], dim=1), time)
        h = F.interpolate(self.up_28(h), scale_factor=2)  #                  (B, ch_28, 28, 28)
        h = self.block_up_28(torch.cat([h, h_28], dim=1), time)
        return self.conv_out(F.silu(self.norm_out(h)))  #                    (B, channels, 28, 28)


# %% 5. Loss and sampler (removing noise: p in the paper)


class SimpleDDPM:
    """Trains a network that predicts noise, and samples with it. betas: float64 (T,)."""

    def __init__(self, model, betas, image_shape, device):
        self.model, self.T, self.image_shape, self.device = model, len(betas), image_shape, device
        self.betas, self.alphas = betas.float().to(device), (1 - betas).float().to(device)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0).float().to(device)

    def loss(self, x_0):
        """Return the loss of images x_0 (B, C, H, W) in [-1, 1]: DDPM Algorithm 1."""
        t = torch.randint(self.T, (len(x_0),), device=self.device)  # any step, for each image
        noise = torch.randn_like(x_0)
        noise_pred = self.model(q_sample(x_0, t, noise, self.alphas_cumprod), t)
        # DDPM Eq. 14, per pixel:  mean of ‖ε − ε_θ(x_t, t)‖².  Why the square? The step of p_sample
        # should be like the true one, given x_0 (Eq. 5). Both are Gaussians of fixed width; their
        # means differ (Eq. 8) by this error times a factor (Eq. 12), which Eq. 14 drops.
        return F.mse_loss(noise_pred, noise)

    def p_sample(self, x_t, t):
        """Step back from x_t (B, C, H, W) at t, an int: return x_prev, and x_0_pred to look at."""
        noise_pred = self.model(x_t, torch.full((len(x_t),), t, device=self.device))
        beta_t, alpha_t, alpha_bar_t = self.betas[t], self.alphas[t], self.alphas_cumprod[t]
        # Guess the image, move a little towards it, add new noise. Eq. 4 solved for x_0 (Eq. 15):
        #   x̂_0 = (x_t − √(1−ᾱ_t) · ε_θ) / √ᾱ_t.  Training with squared error makes it the mean of
        # all x_0 that x_t may come from: a blur, but good for one step, to x_{t−1}. Where is it?
        #   around x_t/√α_t, with variance β_t/α_t (Eq. 2, solved for x_{t−1}), and
        #   around √ᾱ_{t−1} · x̂_0, with variance 1−ᾱ_{t−1} (Eq. 4).
        # Bayes' rule multiplies both Gaussians. Weighted by 1 / variance, their centres give the
        # mean (Eq. 7), with x̂_0 put in: 1/√α_t · (x_t − β_t/√(1−ᾱ_t) · ε_θ), Algorithm 2, line 4.
        # At t = 500, if ε_θ = ε, it has noise of variance 0.911; z adds β_t: 1−ᾱ_{t−1} = 0.921.
        x_prev = (x_t - beta_t / (1 - alpha_bar_t).sqrt() * noise_pred) / alpha_t.sqrt()
        if t > 0:  # line 3: not in the last step. Why z? Many x_{t−1} fit x_t; this draws one.
            x_prev = x_prev + beta_t.sqrt() * torch.randn_like(x_t)
        x_0_pred = (x_t - (1 - alpha_bar_t).sqrt() * noise_pred) / alpha_bar_t.sqrt()
        return x_prev, x_0_pred.clamp(-1, 1)

    @torch.no_grad()
    def sample(self, n=16, frames=None):
        """Generate n images (n, C, H, W) in [-1, 1]: DDPM Algorithm 2. frames: list for figures."""
        x_t = torch.randn(n, *self.image_shape, device=self.device)
        for t in tqdm(reversed(range(self.T)), "Sampling", self.T, unit=" steps"):
            x_prev, x_0_pred = self.p_sample(x_t, t)
            if frames is not None and t % math.ceil(self.T / 50) == 0:
                frames.append((t, x_t, x_0_pred))
            x_t = x_prev
        return x_t.clamp(-1, 1)


# %% 6. Training: nothing about diffusion from here on


def simple_train(ddpm, images, epochs, batch_size, learning_rate):
    """Train on images, uint8 (N, C, H, W); return the loss of each step. Ctrl-C ends it early."""
    steps, losses = max(21, epochs * math.ceil(len(images) / batch_size)), []  # OneCycleLR needs 21
    optimizer = torch.optim.Adam(ddpm.model.parameters(), betas=(0.9, 0.99))  # paper: 0.9, 0.999
    schedule = OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05, cycle_momentum=False)
    bar = tqdm(total=epochs * len(images), desc="Training", unit=" images")
    try:
        for _ in range(epochs):
            for index in torch.randperm(len(images), device=images.device).split(batch_size):
                loss = ddpm.loss(images[index].float() / 127.5 - 1)  # 0 ... 255 → -1 ... 1
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
                bar.update(len(index))
    except KeyboardInterrupt:
        print("\nTraining ended early; sampling with what has been learned so far.")
    bar.close()
    return losses


# %% 7. Run

if __name__ == "__main__":
    torch.manual_seed(SEED)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"  # a GPU if any
    images, source = load_images(DATASET, DATA_DIR)
    model = SimpleUNet(images.shape[1], BASE_CH).to(device)
    ddpm = SimpleDDPM(model, linear_beta_schedule(T), images.shape[1:], device)
    out_dir = Path(OUT_DIR).expanduser()
    out_dir.mkdir(parents=True, exist_ok=True)
    print(f"Training with {len(images):,} images of {source} on {device}; results: {out_dir}")
    losses = simple_train(ddpm, images.to(device), EPOCHS, BATCH_SIZE, LEARNING_RATE)
    torch.save(model.state_dict(), out_dir / "weights.pt")
    frames = []
    samples = ddpm.sample(n=36, frames=frames)
    note = f"{source}, SEED = {SEED}, {len(losses)} training steps, T = {T}, BASE_CH = {BASE_CH}"
    save_results(out_dir, samples, frames, losses, note)
    training_task(ddpm, images[:2], out_dir / "task.png", note=note)
