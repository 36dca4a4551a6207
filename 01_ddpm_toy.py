"""01 · A toy DDPM: handwritten digits out of pure noise, in about 5 minutes on two CPU cores.

    python 01_ddpm_toy.py

A diffusion model destroys images with noise in T small steps, trains a network to guess the noise
in a noisy image, and makes new images by starting from pure noise and removing it step by step.
This file is the whole of it: data, noise, network, training, sampling.

You see a progress bar, then in `outputs/01_ddpm_toy/` a grid of new digits, their way out of the
noise as a strip and as an animation, the loss curve, and the weights. With `python -i` in place
of `python` the trained model is there to play with afterwards: `ddpm.sample(n=16)`.

Measured with these settings on MNIST, two cores of an AMD EPYC (Zen 3), PyTorch 2.14.1: 1 min 41 s
to 4 min 52 s in six runs, start to last picture, with 1.1 GB of memory. Scores of 1,000 samples by
`tests/benchmark.py`: Fréchet distance 61 in the features of a digit classifier (real images: 6),
which reads 81 % of them with confidence (real images: 99 %).

Left out, and brought by 02_ddpm.py: attention, a deeper network, the cosine schedule, averaged
weights, restarting, mixed precision, several GPUs. Other than in the paper, for a short training:
what the U-Net returns (section 4), the weight in the loss (5), Muon in place of Adam (6).

DDPM = Ho, Jain & Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239

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

import io
import math
import os
import socket
import sys
import tempfile
from pathlib import Path
from time import time as now

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from utils.visualize import denoising_gif, denoising_strip, draw_digits, loss_curve, sample_grid

DATASET = "MNIST"  # "MNIST", "FashionMNIST", "CIFAR10", or "DRAWN": digits drawn offline
T = 1000  # noise steps, in training and in sampling; with half as many, sampling takes half as long
BASE_CH = 32  # channels at half resolution (02: at full); 16 is quicker, 64 slower
EPOCHS = 2  # passes through the data
BATCH_SIZE = 64  # images per training step
LEARNING_RATE = 0.02  # at its highest; halve it if the loss jumps
SEED = 0  # same seed on the same CPU: same digits
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"  # where data sets are looked for and downloaded to
OUT_DIR = ROOT / "outputs" / "01_ddpm_toy"  # where pictures and weights are saved


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


class SimpleBlock(nn.Module):
    """Two convolutions beside a shortcut; between them t scales and shifts the channels.

    Takes x (B, in_ch, H, W) and t as `time` (B, time_dim), returns (B, out_ch, H, W).
    """

    def __init__(self, in_ch, out_ch, time_dim):
        super().__init__()
        # GroupNorm normalises each image by itself; BatchNorm would mix noise levels.
        self.norm_1, self.conv_1 = nn.GroupNorm(1, in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm_2, self.conv_2 = nn.GroupNorm(1, out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_ch)
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)  # at first the block is just its shortcut: a deep
        nn.init.zeros_(self.conv_2.bias)  # network starts as a shallow one

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, out_ch, 1, 1) each
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.norm_2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_2(F.silu(h))


class SimpleUNet(nn.Module):
    """Guess the noise in x_t (B, channels, H, W) at step t (B,); H and W divisible by 4.

    The image shrinks twice (28 → 14 → 7 for MNIST, hence the names below), until a few cheap
    convolutions see all of it, and grows back; skip connections hand the detail across.
    alphas_cumprod: ᾱ, float (T,).
    """

    def __init__(self, channels, base_ch, alphas_cumprod):
        super().__init__()
        # A channel costs 16 times as much at 28 × 28 as at 7 × 7, and few are enough there.
        ch_28, ch_14, ch_7, time_dim = max(1, base_ch // 4), base_ch, 2 * base_ch, 4 * base_ch
        self.time = nn.Sequential(
            nn.Linear(ch_7, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(channels, ch_28, 3, padding=1)
        self.down_14 = nn.Conv2d(ch_28, ch_14, 3, stride=2, padding=1)
        self.block_14 = SimpleBlock(ch_14, ch_14, time_dim)
        self.down_7 = nn.Conv2d(ch_14, ch_7, 3, stride=2, padding=1)
        self.block_7a = SimpleBlock(ch_7, ch_7, time_dim)
        self.block_7b = SimpleBlock(ch_7, ch_7, time_dim)
        self.up_14 = nn.Conv2d(ch_7, ch_14, 1)
        self.block_up_14 = SimpleBlock(2 * ch_14, ch_14, time_dim)
        self.up_28 = nn.Conv2d(ch_14, ch_28, 1)
        self.block_up_28 = SimpleBlock(2 * ch_28, ch_28, time_dim)
        self.norm_out = nn.GroupNorm(1, ch_28)
        self.conv_out = nn.Conv2d(ch_28, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, x_t, t):
        time = self.time(timestep_embedding(t, self.time[0].in_features))  # (B, time_dim)
        h_28 = self.conv_in(x_t)  #                                          (B, ch_28, 28, 28)
        h_14 = self.block_14(self.down_14(h_28), time)  #                    (B, ch_14, 14, 14)
        h = self.block_7a(self.down_7(h_14), time)  #                        (B, ch_7, 7, 7)
        h = self.block_7b(h, time)
        h = F.interpolate(self.up_14(h), scale_factor=2)  #                  (B, ch_14, 14, 14)
        h = self.block_up_14(torch.cat([h, h_14], dim=1), time)
        h = F.interpolate(self.up_28(h), scale_factor=2)  #                  (B, ch_28, 28, 28)
        h = self.block_up_28(torch.cat([h, h_28], dim=1), time)
        h = self.conv_out(F.silu(self.norm_out(h)))  #                       (B, channels, 28, 28)
        # Near t = T an image is noise but for a trace, and the right answer is almost x_t itself.
        # A network that has to copy x_t loses that trace, so we add x_t here and only h is learned.
        # The exact h is v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0 (Salimans & Ho 2022, arXiv:2202.00512): with
        # it the sum is ε. For pixels from N(0, 1) all that can be known of v is its mean, 0.
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar_t).sqrt() * x_t + alpha_bar_t.sqrt() * h


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


# %% 6. Training


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


def mean_loss(losses, learning_rate):
    """Return the mean of losses as a number; end the program if it is not finite."""
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        sys.exit(
            f"The loss became NaN or infinite. Usually LEARNING_RATE = {learning_rate} is too "
            "high: halve it. Nothing was overwritten."
        )
    return mean


def train(ddpm, images, epochs, batch_size, learning_rate):
    """Train on images, uint8 (N, C, H, W) on the device; return the loss of every step.

    Ctrl-C ends the training early and keeps what has been learned so far.
    """
    steps = epochs * math.ceil(len(images) / batch_size)
    # Muon is for the matrices inside the network; its authors leave the first and the last layer
    # and all vectors to AdamW; Adam will do.
    ends = *ddpm.model.conv_in.parameters(), *ddpm.model.conv_out.parameters()
    inner = [w for w in ddpm.model.parameters() if w.ndim > 1 and not any(w is e for e in ends)]
    outer = [w for w in ddpm.model.parameters() if not any(w is i for i in inner)]
    optimizers = Muon(inner, learning_rate), torch.optim.Adam(outer, learning_rate / 5)

    def rate(step):  # rises over the first 5 % of the steps, then falls to zero along a cosine
        return min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    losses = []
    bar = tqdm(total=epochs * len(images), desc="Training", unit=" images", unit_scale=True)
    try:
        for _ in range(epochs):
            # All images lie on the device and a batch is picked by index: nothing to wait for.
            # Images that do not fit into memory, or are cropped at random, need a DataLoader.
            for index in torch.randperm(len(images), device=images.device).split(batch_size):
                x_0 = images[index].float() / 127.5 - 1  # 0 ... 255 becomes -1 ... 1
                loss = ddpm.loss(x_0)
                ddpm.model.zero_grad()
                loss.backward()
                for optimizer, schedule in zip(optimizers, schedules):
                    optimizer.step()
                    schedule.step()
                losses.append(loss.detach())  # no .item(): it would wait for the GPU in every step
                bar.update(len(index))
                if len(losses) % 50 == 0:
                    bar.set_postfix(loss=f"{mean_loss(losses[-50:], learning_rate):.4f}")
    except KeyboardInterrupt:
        print("\nTraining ended early; going on with what has been learned so far.")
    finally:
        bar.close()
    if not losses:
        sys.exit("Training was interrupted before its first step: there is nothing to save.")
    mean_loss(losses, learning_rate)  # also of the last steps, before anything is saved
    return torch.stack(losses).tolist()


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


def check_setting(name, value, kind, lowest=None, highest=None):
    """End the program with one clear line if a setting is of the wrong kind or out of range."""
    numbers = {int: "a whole number", (int, float): "a number"}
    wanted = {**numbers, bool: "True or False", (str, Path): "the path of a folder"}[kind]
    works = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind in numbers:
        works, wanted = works and lowest <= value <= highest, f"{wanted}, {lowest} to {highest}"
    if not works:
        sys.exit(f"{name} = {value!r} does not work: it must be {wanted}.")


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


if __name__ == "__main__":
    sys.excepthook = explain
    if DATASET not in ("MNIST", "FashionMNIST", "CIFAR10", "DRAWN"):
        sys.exit(f"DATASET = {DATASET!r} is not MNIST, FashionMNIST, CIFAR10 or DRAWN.")
    check_setting("T", T, int, 2, 100_000)
    check_setting("BASE_CH", BASE_CH, int, 1, 1024)
    check_setting("EPOCHS", EPOCHS, int, 1, 100_000)
    check_setting("BATCH_SIZE", BATCH_SIZE, int, 1, 100_000)
    check_setting("LEARNING_RATE", LEARNING_RATE, (int, float), 1e-7, 1)
    check_setting("SEED", SEED, int, 0, 2**63 - 1)
    check_setting("DATA_DIR", DATA_DIR, (str, Path))
    check_setting("OUT_DIR", OUT_DIR, (str, Path))

    torch.manual_seed(SEED)
    device = pick_device()
    if device.type == "cuda":  # TF32: float32 products with fewer digits, several times as fast
        torch.set_float32_matmul_precision("high")
    out_dir = make_folder(OUT_DIR)
    images, _, source = load_images(DATASET, DATA_DIR)
    images = images.to(device)
    betas = linear_beta_schedule(T)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    model = SimpleUNet(images.shape[1], BASE_CH, alphas_cumprod).to(device)
    ddpm = DDPM(model, betas, images.shape[1:], device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(images):,} images of {source}, a network of {size:,} parameters, on {device}")

    losses = train(ddpm, images, EPOCHS, BATCH_SIZE, LEARNING_RATE)
    first, last = losses[:50], losses[-50:]
    print(f"Loss {sum(first) / len(first):.4f} at first, {sum(last) / len(last):.4f} at last")
    save_atomically({k: v.cpu() for k, v in model.state_dict().items()}, out_dir / "weights.pt")

    frames = []
    samples = ddpm.sample(n=36, frames=frames)
    note = f"{source}, {len(losses)} training steps, T = {T}, BASE_CH = {BASE_CH}, SEED = {SEED}"
    sample_grid(samples, out_dir / "samples.png", "New images out of noise", note)
    denoising_strip(frames, out_dir / "denoising.png", note=note)
    denoising_gif(frames, out_dir / "denoising.gif", note=f"{source}, SEED = {SEED}")
    loss_curve(losses, out_dir / "loss.png", note=note)
    print(f"Saved samples.png, denoising.png, denoising.gif, loss.png, weights.pt in {out_dir}")
