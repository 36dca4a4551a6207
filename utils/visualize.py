"""Figures for the diffusion scripts, all in one style, and digits rendered without a download.

    python utils/visualize.py

This command needs no training. It takes MNIST digits if `data/` has them, rendered ones otherwise,
and leaves these figures in `outputs/visualize/`: how noise takes over an image, with the linear
schedule of DDPM and the cosine schedule of Improved DDPM (`forward_process.png`), and how noise
becomes data, for points in the plane, whose best possible denoiser is known (`reverse_process.png`,
and as an animation `reverse_process.gif`).

Nothing here is needed to understand diffusion: the algorithms are in the scripts, this file draws.
Images are float tensors in [-1, 1] of shape (B, C, H, W), C = 1 or 3. Every figure is written to a
temporary file and then renamed, so an interrupted run leaves the old figure intact. No display is
needed; in a notebook, the figures also appear below the cell.

Papers
    DDPM           Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    Improved DDPM  Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models,
                   arXiv:2102.09672
"""

import math
import os
import sys
import textwrap
from contextlib import suppress
from functools import cache
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from unicodedata import east_asian_width

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

__all__ = [
    "blend_comparison",
    "denoising_gif",
    "denoising_strip",
    "draw_digits",
    "forward_process",
    "grid_gif",
    "guidance_vectors",
    "image_table",
    "latent_pictures",
    "latent_scaling",
    "loss_curve",
    "nearest_images",
    "reconstruction_errors",
    "reverse_process",
    "sample_grid",
    "save_results",
    "table",
    "timestep_losses",
    "training_task",
]

# A console that cannot show a letter shows "?"; a program without a console has nowhere to print.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")
sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115

# From Okabe and Ito's palette, made for colour-blind readers.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


# %% 1. Digits without a download

# Fonts that ship with every matplotlib since 3.8 and hold the ten digits.
DIGIT_FONTS = [
    *(f"DejaVuSans{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{s}" for s in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{s}" for s in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
]


def _digit_templates(side=64, height=44):
    """Each digit in each font and three stroke weights: uint8 (fonts, weights, 10, side, side)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    templates = np.zeros((len(DIGIT_FONTS), 3, 10, side, side), dtype=np.uint8)
    for f, name in enumerate(DIGIT_FONTS):
        font = ImageFont.truetype(folder / f"{name}.ttf", 64)
        left, top, right, bottom = font.getbbox("0")
        font = ImageFont.truetype(folder / f"{name}.ttf", round(64 * height / (bottom - top)))
        for weight in range(3):
            for digit in range(10):
                canvas = Image.new("L", (side, side))
                pen = ImageDraw.Draw(canvas)
                left, top, right, bottom = pen.textbbox((0, 0), str(digit), font)
                corner = (side - left - right) / 2, (side - top - bottom) / 2
                pen.text(corner, str(digit), 255, font, stroke_width=weight)
                templates[f, weight, digit] = canvas
    return torch.from_numpy(templates)


def draw_digits(n=20_000, seed=0):
    """Draw a stand-in for MNIST: digits in 20 fonts, randomly turned, sheared, scaled and shifted.

    Returns images, uint8 (n, 28, 28), white (255) on black (0), and labels, int64 (n,), 0 ... 9:
    the shapes and ranges of torchvision's `MNIST.data` and `MNIST.targets`. The same seed gives the
    same digits. Raises ValueError if n is not a positive whole number.
    """
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"draw_digits: n = {n!r}, but it must be a whole number of at least 1")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    templates = _digit_templates()
    labels = torch.randint(10, (n,), generator=generator)
    fonts = torch.randint(len(DIGIT_FONTS), (n,), generator=generator)
    weights = torch.randint(3, (n,), generator=generator)
    # theta maps each output pixel to the place in the template that it shows, both in -1 ... 1.
    angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    scale_x, scale_y = uniform(0.9, 1.25), uniform(0.95, 1.15)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([scale_x * cos, scale_x * (shear - sin), uniform(-0.12, 0.12)], 1),
            torch.stack([scale_y * sin, scale_y * cos, uniform(-0.08, 0.08)], 1),
        ],
        dim=1,
    )  # (n, 2, 3)
    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    for part in torch.arange(n).split(1000):
        glyphs = templates[fonts[part], weights[part], labels[part]][:, None].float()
        # Twice the final resolution, then the mean of each 2 x 2 block: smooth edges, like MNIST's.
        grid = F.affine_grid(theta[part], (len(part), 1, 56, 56), align_corners=False)
        drawn = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)
        images[part] = drawn[:, 0].round().clamp(0, 255).byte()
    return images, labels


# %% 2. One look for every figure

STYLE = {
    **matplotlib.rcParamsDefault,  # figures do not depend on the user's own style
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}


def _figure(width, height, title, note=""):
    """An empty figure (inches) with a title and, in small grey letters below, what was run."""
    title, note = _drawable([title, note], longest=200)
    width = max(width, 0.1 * _letters(title) + 0.3, 0.065 * _letters(note) + 0.3)
    fig = Figure(figsize=(width, height))
    fig.suptitle(title, fontsize=13)
    if note:
        fig.supxlabel(note, fontsize=8, color=GREY)
    return fig


def _letters(text):
    """How wide text is, in letters: Chinese ones and emoji are twice as wide as Latin ones."""
    return sum(1 + (east_asian_width(letter) in "WF") for letter in text)


def _wrapped(name, width=16):
    """Break a name into lines of at most `width` letters, of which wide ones count twice."""
    return textwrap.fill(name, width // 2 if _letters(name) > len(name) else width)


@cache
def _charmap(file):
    return FT2Font(file).get_charmap().keys()


def _drawable(names, longest=60):
    """Return names as matplotlib should draw them, and use a font that has their letters.

    `$` does not begin a formula. If no font here has all letters of a name, a number precedes it.
    Of long names, the first letters are shown.
    """
    names = [name.encode(errors="replace").decode() for name in names]  # broken letters become "?"
    names = [n if len(n) <= longest else f"{n[: longest - 1]}…" for n in names]
    missing = {ord(letter) for letter in "".join(names)} - _charmap(findfont("DejaVu Sans"))
    families = [name for name in matplotlib.rcParams["font.family"] if name != "sans-serif"]
    families = families or ["DejaVu Sans"]  # and those of earlier names in this figure
    for font in fontManager.ttflist if missing else ():
        if font.name[:11] != "Last Resort" and missing & _charmap(font.fname):  # it has boxes only
            families.append(font.name)
            missing -= _charmap(font.fname)
    matplotlib.rcParams["font.family"] = families  # until the figure is drawn: see rc_context
    unknown = [bool(missing & {*map(ord, name)}) for name in names]
    numbered = [f"{i}: {name}" if no else name for i, (no, name) in enumerate(zip(unknown, names))]
    return [name.replace("$", "\\$") for name in numbered]


def _write(path, write):
    """Call write with a temporary file, which becomes `path` once the writing has gone well.

    A picture that cannot be written costs a line, not the training before or the pictures after it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
        _show_in_notebook(path)
    except OSError as error:
        print(f"{path} could not be written: {error}")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _save(fig, path):
    """Write the figure atomically, show it if this is a notebook, and return its path.

    The path's suffix says in which format; without one it is PNG.
    """
    path = Path(path).expanduser()
    return _write(path, lambda file: fig.savefig(file, format=path.suffix[1:] or "png"))


def _show_in_notebook(path):
    """Display a picture below the running cell; do nothing outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if hasattr(shell, "kernel") and path.suffix in (".png", ".gif", ".jpg", ".jpeg"):
        ipython.display.display(ipython.display.Image(filename=path))


def _to_uint8(images):
    """Images in [-1, 1], (B, C, H, W), as a NumPy array of 0 ... 255, (B, H, W, 3)."""
    images = images.detach().float().cpu().clamp(-1, 1)
    images = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return images.expand(-1, -1, -1, 3).numpy()  # grey becomes three equal channels


def _tile(images, columns, gap=2, background=255):
    """Set images (B, C, H, W) into one picture, row by row, framed: uint8 (height, width, 3)."""
    images = images.detach().float().cpu()
    grid = make_grid(images, columns, gap, pad_value=background / 127.5 - 1)
    return _to_uint8(grid[None])[0]


def _show_tiles(ax, images, columns, column_names=(), row_names=(), gap=2):
    """Draw images (B, C, H, W) as a table on the axes, with a name at each column and each row."""
    high, wide = images.shape[-2:]
    ax.imshow(_tile(images, columns, gap), interpolation="nearest")
    ax.xaxis.tick_top()
    ax.set_xticks([(i + 0.5) * (wide + gap) for i in range(len(column_names))], column_names)
    ax.set_yticks([(i + 0.5) * (high + gap) for i in range(len(row_names))], row_names)
    ax.tick_params(length=0, labelsize=9)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _inches(images):
    """Return the side of an image in a figure, large enough to show each of its pixels."""
    return max(0.75, images.shape[-1] / 100)


# %% 3. The figures


@matplotlib.rc_context(STYLE)
def sample_grid(images, path, title="Samples", note="", columns=None):
    """Save images (B, C, H, W) in [-1, 1] as a grid, square unless `columns` says otherwise."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width = max(4.5, _inches(images) * columns)
    fig = _figure(width, width * rows / columns + 0.6, title, note)
    _show_tiles(fig.subplots(), images, columns)
    return _save(fig, path)


def save_results(folder, samples, frames, losses, note="", title="Generated images"):
    """Save the four pictures that every script leaves in its folder, and print their names.

    samples.png: samples (B, C, H, W) as a grid; denoising.png and denoising.gif: how they emerged,
    from frames as for `denoising_strip`; loss.png: losses, one number per training step.
    """
    folder = Path(folder)
    sample_grid(samples, folder / "samples.png", title, note)
    denoising_strip(frames, folder / "denoising.png", note=note)
    denoising_gif(frames, folder / "denoising.gif", note=note.split(",")[0])
    loss_curve(losses, folder / "loss.png", note=note)
    print(f"Pictures in {folder}: samples.png, denoising.png, denoising.gif and loss.png")


@matplotlib.rc_context(STYLE)
def image_table(rows, path, column_names=(), title="", note=""):
    """Save a table of images, with a name at each row and, if given, at each column.

    rows: {name: images (columns, C, H, W) in [-1, 1]}, from top to bottom, all of the same length.
    Raises ValueError if rows and column names differ in length.
    """
    lengths = {len(images) for images in rows.values()} | {len(column_names) or None} - {None}
    if len(lengths) != 1:
        raise ValueError(f"rows and column names differ in length: {sorted(lengths)}")
    columns, images = lengths.pop(), torch.cat([images.cpu() for images in rows.values()])
    row_names, column_names = _drawable(rows), [*map(_wrapped, _drawable(column_names))]
    lines = [line for name in column_names for line in name.splitlines()]
    side = max(_inches(images), 0.08 * max(map(_letters, lines), default=0) + 0.1)
    width = side * columns + 0.6 + 0.08 * max(map(_letters, row_names))
    height = (
        side * len(rows)
        + 1
        + 0.15 * max((name.count("\n") + 1 for name in column_names), default=1)
    )
    fig = _figure(width, height, title, note)
    _show_tiles(fig.subplots(), images, columns, column_names, row_names)
    return _save(fig, path)


@torch.no_grad()
def training_task(ddpm, images, path, title="What training asks of the network", note=""):
    """Save images with noise, the noise that the network should predict, and what it predicts.

    ddpm: has model(x_t, t), which predicts noise, and alphas_cumprod, float (T,). images: uint8
    (B, C, H, W); each is shown at four t.
    """
    x_0 = images.to(ddpm.device).repeat_interleave(4, dim=0) / 127.5 - 1
    t = (len(ddpm.alphas_cumprod) * torch.tensor([0.1, 0.3, 0.5, 0.7])).long().repeat(len(images))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    alpha_bar_t = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
    signal, spread = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    x_t = signal * x_0 + spread * noise  # DDPM Eq. 4
    noise_pred = ddpm.model(x_t, t.to(x_0.device))
    rows = {
        "an image: x_0": x_0,
        "given: x_t, the same with noise": x_t,
        "asked: the noise, ε": noise / 3,
        "answered: ε_θ": noise_pred / 3,
        "the image that this implies: x̂_0": (x_t - spread * noise_pred) / signal,  # DDPM Eq. 15
    }
    return image_table(rows, path, [f"t = {step}" for step in t], title, note)


@matplotlib.rc_context(STYLE)
def denoising_strip(frames, path, title="From noise to image", note="", count=3, columns=11):
    """Save how images emerge from noise: x_t above, the predicted image, x̂₀, below.

    frames: list of (t, x_t, x_0_pred) in sampling order, images (B, C, H, W) in [-1, 1]; t = -1
    stands for the finished images. Shows the first `count` images at `columns` stages.
    """
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    frames = [frames[i] for i in chosen]
    names = [f"t = {t}" if t >= 0 else "image" for t, _, _ in frames]
    count = min(count, len(frames[0][1]))
    rows, row_names = [], []
    for i in range(count):
        rows += [x_t[i] for _, x_t, _ in frames] + [x_0_pred[i] for _, _, x_0_pred in frames]
        row_names += ["$x_t$", r"$\hat{x}_0$"]
    side = max(0.85, _inches(rows[0]))
    fig = _figure(side * len(frames) + 0.6, side * 2 * count + 1.1, title, note)
    _show_tiles(fig.subplots(), torch.stack(rows), len(frames), names, row_names)
    return _save(fig, path)


def denoising_gif(frames, path, note="", count=9, scale=2, stages=26, milliseconds=100):
    """Save the way from noise to image as an animated GIF with a bar that shows how far it is.

    frames: as for `denoising_strip`. Shows the first `count` images at `stages` of the stages, each
    pixel `scale` pixels wide, with `note` below; the finished images stand still for two seconds.
    """
    chosen = np.linspace(0, len(frames) - 1, min(stages, len(frames))).round().astype(int)
    pictures = []
    for number, index in enumerate(chosen, start=1):
        shown = frames[index][1][:count]
        tiles = _tile(shown, columns=math.ceil(math.sqrt(len(shown))), background=30)
        bar = np.full((3, tiles.shape[1], 3), 30, dtype=np.uint8)
        # Grey, because with so few colours in the file, a coloured bar would tint the images.
        bar[1:, : round(tiles.shape[1] * number / len(chosen))] = 160
        pictures.append(np.concatenate([tiles, bar]).repeat(scale, 0).repeat(scale, 1))
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    # Few images, stages and colours keep the file small: noise cannot be compressed.
    return _save_gif(pictures, path, durations, note, colours=8 if shown.shape[1] == 1 else 64)


def grid_gif(images, path, note="", milliseconds=80, scale=3):
    """Save images (moments, B, C, H, W) in [-1, 1] as an animated GIF that runs in a circle."""
    columns = math.ceil(math.sqrt(images.shape[1]))
    tiles = [_tile(moment, columns, background=30) for moment in images]
    pictures = [picture.repeat(scale, 0).repeat(scale, 1) for picture in tiles]
    durations = [milliseconds] * len(pictures)
    return _save_gif(pictures, path, durations, note, colours=16 if images.shape[2] == 1 else 64)


def _save_gif(pictures, path, durations, note, colours):
    """Write pictures, uint8 (height, width, 3), with `note` below them; durations: milliseconds."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)
    frames = []
    for picture in pictures:
        caption = np.full((14 if note else 0, picture.shape[1], 3), 30, dtype=np.uint8)
        frame = Image.fromarray(np.concatenate([picture, caption]))
        pen = ImageDraw.Draw(frame)
        pen.fontmode = "1"  # no half-tones: the few colours belong to the images
        pen.text((3, frame.height - 13), note, (200, 200, 200), font)
        frames.append(frame.quantize(colours, dither=Image.Dither.NONE))
    options = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": durations}
    path = Path(path).expanduser()
    return _write(path, lambda file: frames[0].save(file, "GIF", **options))


def nearest_images(samples, images, path, title="Does it invent?", note=""):
    """Save samples (B, C, H, W) in [-1, 1], each above the training image nearest to it.

    images: all training images, uint8 (N, C, H, W), as they are, not mirrored. Nearest: by the
    squared difference of pixels.
    """
    samples, distances = samples.cpu(), []
    for some in images.cpu().split(1000):
        distances.append(torch.cdist(samples.flatten(1), some.flatten(1) / 127.5 - 1))
    nearest = images.cpu()[torch.cat(distances, dim=1).argmin(dim=1)] / 127.5 - 1
    rows = {"samples": samples, "nearest training images": nearest}
    return image_table(rows, path, title=title, note=note)


@matplotlib.rc_context(STYLE)
def loss_curve(losses, path, title="Training loss", note=""):
    """Save the loss of every training step (pale) and its running mean (strong), on a log axis."""
    losses = np.asarray(losses if len(losses) else [np.nan], dtype=np.float64)
    window = max(1, min(100, len(losses) // 10))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    fig = _figure(7, 4, title, note)
    ax = fig.subplots()
    ax.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, alpha=0.2, linewidth=0.7)
    centres = np.arange(len(mean)) + (window + 1) / 2
    ax.plot(centres, mean, color=BLUE, label=f"mean of {window} steps")
    ax.set(xlabel="training step", ylabel="loss", yscale="log")
    ax.legend()
    return _save(fig, path)


@torch.no_grad()
@matplotlib.rc_context(STYLE)
def timestep_losses(ddpm, x_0, visits, path, title="What training learns from", note="", count=40):
    """Save the loss of x_0 (B, C, H, W) at up to `count` timesteps, and its share in training.

    ddpm: has T, alphas_cumprod and predict_noise(x_t, t). visits: many t, drawn as in training.
    """
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    count = min(count, ddpm.T)  # equal parts of 0 ... T - 1, and the t in the middle of each
    timesteps = ((torch.arange(count) + 0.5) * ddpm.T / count).long().tolist()
    losses = []
    for t, alpha_bar_t in zip(timesteps, ddpm.alphas_cumprod[timesteps]):
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise  # DDPM Eq. 4
        losses.append((noise - ddpm.predict_noise(x_t, t)).square().mean().item())
    counts, _ = np.histogram(visits.cpu(), bins=count, range=(0, ddpm.T))
    fig = _figure(9.5, 4.2, title, note)
    left, right = fig.subplots(1, 2)
    left.plot(timesteps, losses, ".-", color=BLUE)
    left.set(title="Squared error of the noise", xlabel="t", ylabel="loss", yscale="log")
    for name, weights, colour in ("uniform t", np.ones(len(counts)), GREY), ("02", counts, BLUE):
        for part, values, style in ("visits", weights, "--"), ("loss", weights * losses, "-"):
            share = 100 * values / values.sum()
            right.plot(timesteps, share, style, color=colour, label=f"{name}: {part}")
    right.set(title="Visits in training, and shares of its loss", xlabel="t")
    right.set(ylabel=f"per cent, in each 1/{count} of all t")
    right.legend()
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def table(header, rows, path, title="", note=""):
    """Print a table and save it: header and rows are lists of strings, the first column names."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in header, *rows:
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        print(line.replace("η", "eta").replace("×", "x"))  # which any terminal can show
    fig = _figure(0.095 * sum(widths) + 0.3 * len(header), 0.26 * len(rows) + 1.1, title, note)
    ax = fig.subplots()
    ax.axis("off")
    cells = ax.table(rows, colLabels=header, loc="center", edges="horizontal", cellLoc="right")
    cells.auto_set_font_size(False)
    cells.auto_set_column_width(range(len(header)))
    cells.scale(1, 1.3)
    for (row, column), cell in cells.get_celld().items():
        cell.set(edgecolor="#C8C8C8")
        cell.set_text_props(weight="bold" if row == 0 else "normal")
        if column == 0:
            cell.set_text_props(horizontalalignment="left")
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def guidance_vectors(predictions, path, title="Guidance in the plane of two predictions", note=""):
    """Save the noise that is predicted at some guidance scales as arrows, with x̂_0 at their tips.

    predictions: {scale: (x_0_pred, noise_pred), (1, C, H, W) each}, with scales 0 and 1. However
    many pixels there are, the predictions without and with the label span a plane, and all others
    lie in it: this is a map of that plane, stretched in one direction.
    """
    noise = {scale: pred.flatten().cpu().double() for scale, (_, pred) in predictions.items()}
    along = noise[0] / noise[0].norm()
    difference = noise[1] - noise[0]
    across = difference - (difference @ along) * along
    across = across / across.norm().clamp(min=1e-12)
    fig = _figure(9.5, 5.5, title, note)
    ax = fig.subplots()
    for scale, vector in noise.items():
        tip, colour = (float(vector @ along), float(vector @ across)), GREY if scale > 1 else BLUE
        colour = ORANGE if scale == 0 else colour
        ax.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
        picture = OffsetImage(_to_uint8(predictions[scale][0])[0], zoom=1.6)
        ax.add_artist(AnnotationBbox(picture, tip, (45, 0), boxcoords="offset points", pad=0.2))
        ax.annotate(f"s = {scale}", tip, (75, 0), textcoords="offset points", va="center")
        ax.plot(*tip, ".", color=colour)
    ax.set(xlabel="along the noise predicted without label (orange)", ylabel="across, stretched")
    ax.set_xlim(0, 1.2 * max(float(vector @ along) for vector in noise.values()))
    ax.margins(y=0.15)
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def reconstruction_errors(errors, images, path, title="", note=""):
    """Save how the error of a reconstruction falls with the number of steps, beside the images.

    errors: {steps: mean absolute error}. images: {name: images (B, C, H, W) in [-1, 1]}, a row
    each; the same images in the same order.
    """
    fig = _figure(9.5, 3.8, title, note)
    left, right = fig.subplots(1, 2)
    left.plot(list(errors), list(errors.values()), "o-", color=BLUE)
    for steps, error in errors.items():
        left.annotate(f"{error:.3f}", (steps, error), (4, 5), textcoords="offset points")
    left.set(xlabel="steps each way", ylabel="mean absolute error (white − black = 2)")
    left.set(xscale="log", yscale="log")
    left.set_xticks(list(errors), list(map(str, errors)))
    left.minorticks_off()
    left.margins(0.15, 0.15)
    columns = len(next(iter(images.values())))
    _show_tiles(right, torch.cat(list(images.values())), columns, (), list(images))
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def latent_pictures(images, channels, path, title="Images and their latents", note=""):
    """Save images (B, C, H, W) in [-1, 1] and below each the channels (K, B, h, w) of its latents.

    Channels are shown from -1 (black) to 1 (white).
    """
    side = images.shape[-1]
    rows = {"image": images.expand(-1, 3, -1, -1)}
    for k, channel in enumerate(channels):
        large = F.interpolate(channel[:, None], size=(side, side))
        rows[f"channel {k}"] = large.expand(-1, 3, -1, -1)
    return image_table(rows, path, (), title, note)


@matplotlib.rc_context(STYLE)
def latent_scaling(latents, scale, alphas_cumprod, path, title="Why latents are scaled", note=""):
    """Save how latents (N, ...) spread, as they are and times scale, and what the noise hides.

    alphas_cumprod: ᾱ, float (T,).
    """
    values = latents.flatten()[:500_000].detach().float().cpu()
    fig = _figure(9.5, 4, title, note)
    left, right = fig.subplots(1, 2)
    edges = np.linspace(-4, 4, 81)
    for factor, colour, label in (1, ORANGE, "as they are"), (scale, BLUE, f"times {scale:.3g}"):
        shown = (values * factor).numpy()
        left.hist(shown, edges, density=True, histtype="step", color=colour, label=label)
        variance = (values * factor).var().item()
        snr = (variance * alphas_cumprod / (1 - alphas_cumprod)).cpu().log()
        right.plot(snr, color=colour, label=f"{label}: half hidden at t = {snr.abs().argmin()}")
    snr = (100 * variance * alphas_cumprod / (1 - alphas_cumprod)).cpu().log()
    label = f"were they 10 times as large: at t = {snr.abs().argmin()}"
    right.plot(snr, color=GREY, linestyle="--", label=label)
    gaussian = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    left.plot(edges, gaussian, color=GREY, linestyle="--", label="N(0, 1)")
    left.set(title="Values of the latents", xlabel="value", ylabel="density")
    right.set(title="Signal-to-noise ratio in z_t", xlabel="t", ylabel="log SNR", ylim=(-12, 10))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def blend_comparison(curves, images, path, title="Between two noises", note=""):
    """Save the norm along several ways between two noises, and the images along each way.

    curves: {name: norms, relative to the expected one}. images: {name: (points, C, H, W)}.
    """
    fig = _figure(9.5, 5.6, title, note)
    axes = fig.subplot_mosaic([["norm"], ["images"]], height_ratios=[3, 2])
    for (name, norms), colour, dash in zip(curves.items(), (ORANGE, BLUE), ("--", "-")):
        shares = np.linspace(0, 1, len(norms))
        axes["norm"].plot(shares, norms, color=colour, linestyle=dash, label=name)
    axes["norm"].set(xlabel="share of the second noise", ylabel=r"norm / $\sqrt{D}$")
    axes["norm"].set_ylim(0.6, 1.1)
    axes["norm"].legend()
    points = len(next(iter(images.values())))
    _show_tiles(axes["images"], torch.cat(list(images.values())), points, (), list(images))
    return _save(fig, path)


# %% 4. The forward process and the schedules


def _linear_alphas_cumprod(T=1000):
    """ᾱ of DDPM's schedule (section 4: β from 1e-4 to 0.02 at T = 1000), float64 (T,)."""
    betas = (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def _cosine_alphas_cumprod(T=1000, s=0.008):
    """ᾱ of Improved DDPM, Eq. 17, with β clipped at 0.999 as the paper says, float64 (T,)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def _noised(x_0, alphas_cumprod, timesteps, seed):
    """One image (C, H, W) at several timesteps with the same noise: (len(timesteps), C, H, W)."""
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    x_0, alpha_bar_t = x_0.cpu(), alphas_cumprod.cpu()[timesteps].float().view(-1, 1, 1, 1)
    # DDPM Eq. 4:  x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


@matplotlib.rc_context(STYLE)
def forward_process(x_0, path, T=1000, note="", seed=0):
    """Save images x_0 (B, C, H, W) in [-1, 1] as they drown in noise, with either schedule.

    Below them: ᾱ, the share of the image's variance that is left, and the signal-to-noise ratio.
    """
    schedules = {
        "linear": (_linear_alphas_cumprod(T), ORANGE, "--"),
        "cosine": (_cosine_alphas_cumprod(T), BLUE, "-"),
    }
    title = "The forward process: noise drowns an image sooner with the linear schedule"
    fig = _figure(10.5, 1.7 * len(x_0) + 3.6, title, note)
    axes = fig.subplot_mosaic(
        [["images", "images"], ["left", "right"]], height_ratios=[1.7 * len(x_0), 2.6]
    )
    tenths = 0, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10
    timesteps = [min(int(T * tenth / 10), T - 1) for tenth in tenths]
    pairs = [(x, name) for x in x_0 for name in schedules]
    rows = torch.cat([_noised(x, schedules[name][0], timesteps, seed) for x, name in pairs])
    columns, names = [f"t = {t}" for t in timesteps], [name for _, name in pairs]
    _show_tiles(axes["images"], rows, len(timesteps), columns, names)
    for name, (alphas_cumprod, colour, dash) in schedules.items():
        log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
        axes["left"].plot(alphas_cumprod, color=colour, linestyle=dash, label=name)
        axes["right"].plot(log_snr, color=colour, linestyle=dash, label=name)
    axes["left"].set(title="Signal left in the image", xlabel="t", ylabel=r"$\bar\alpha_t$")
    axes["right"].set(title="Signal-to-noise ratio", xlabel="t", ylim=(-12, 10))
    axes["right"].set_ylabel(r"log SNR = $\log\ \bar\alpha_t\,/\,(1-\bar\alpha_t)$")
    axes["left"].legend()
    axes["right"].legend()
    return _save(fig, path)


# %% 5. The reverse process, with an ideal network


def _spiral(n):
    """Return n points on a spiral, (n, 2), with variance 1: they take the place of images."""
    generator = torch.Generator().manual_seed(0)
    angle = 4 * math.pi * torch.rand(n, generator=generator).sqrt()
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None]
    points = points + 0.2 * torch.randn(n, 2, generator=generator)
    points = points - points.mean(dim=0)
    return points / points.std()


def _ideal_x_0(x_t, alpha_bar_t, points):
    """Return the best possible x̂_0 of x_t (B, 2), if x_0 is one of points (N, 2).

    The squared error is smallest for the mean of all points, each weighted by the probability that
    x_t came from it (Karras et al. 2022, arXiv:2206.00364, Eq. 57). A network learns this mean from
    examples; for points in the plane, it can be computed.
    """
    distance = torch.cdist(x_t, alpha_bar_t.sqrt() * points)
    return (-distance.square() / (2 * (1 - alpha_bar_t))).softmax(dim=1) @ points


def _denoise(x_t, steps, points, alphas_cumprod, new_noise=True):
    """Return all stages of x_t (B, 2) on its way from pure noise to clean points."""
    generator = torch.Generator().manual_seed(1)
    alpha_bars = torch.cat([torch.ones(1), alphas_cumprod.float()])  # [0]: clean
    timesteps = torch.linspace(len(alphas_cumprod), 0, steps + 1).round().long()
    stages = [x_t]
    for alpha_bar_t, alpha_bar_prev in pairwise(alpha_bars[timesteps]):
        alpha_t, share = alpha_bar_t / alpha_bar_prev, (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        # DDPM Eq. 7:  x_{t−1} = √ᾱ_{t−1}·β_t/(1−ᾱ_t) · x̂_0 + √α_t·share · x_t + √(share·β_t) · z,
        # share = (1−ᾱ_{t−1}) / (1−ᾱ_t), as in 02
        x_0_pred = _ideal_x_0(x_t, alpha_bar_t, points)
        noise = (share * (1 - alpha_t)).sqrt() * torch.randn(x_t.shape, generator=generator)
        weight_x_0 = alpha_bar_prev.sqrt() * (1 - alpha_t) / (1 - alpha_bar_t)
        x_t = weight_x_0 * x_0_pred + alpha_t.sqrt() * share * x_t + new_noise * noise
        stages.append(x_t)
    return stages


BELOW = {  # what to see in the panels of `reverse_process`
    999: "Each arrow leads from an x_t to x̂_0,\nthe mean of all points (black) that it may\n"
    "come from: in pure noise, of all.",
    600: "A jump along an arrow would end in the\nmiddle. So the sampler moves a little,\n"
    "adds new noise and predicts again.",
    350: "Less noise: an x_t may come from several\narms, and their mean lies between them.",
    150: "From outside, arrows end on the spiral.\nBetween two arms, x̂_0 still hesitates.",
    20: "Little noise: the arrows are too short to see.",
    "three paths": "From noise (blue) to end points (black):\n"
    "first the new noise decides, then x̂_0.",
    "200 steps": "1,000 samples cover the whole spiral.",
    "without new noise": "200 steps that add no noise: too little\n"
    "is left, and all end in one place.",
    "20 steps": "Nearly all samples reach the spiral,\nbut some are left between its arms.",
    "5 steps": "Steps far too long: most samples end\nbetween the arms, where x̂_0 was a mean.",
}


@matplotlib.rc_context({**STYLE, "axes.labelsize": 8})
def reverse_process(path, n=1000):
    """Save how noise becomes a spiral of points, without training, and an animation beside it."""
    points, alphas_cumprod = _spiral(n), _linear_alphas_cumprod()
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(2))
    fig = _figure(13, 6.8, "The reverse process: how pure noise becomes data, here a spiral")
    axes = fig.subplots(2, 5).flat
    for ax, (title, text) in zip(axes, BELOW.items()):
        ax.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=[], yticks=[], aspect="equal")
        ax.set(title=f"t = {title}" if isinstance(title, int) else title, xlabel=text)
    for ax, t in zip(axes[:5], BELOW):
        alpha_bar_t = alphas_cumprod[t].float()
        x_t = alpha_bar_t.sqrt() * points + (1 - alpha_bar_t).sqrt() * noise  # DDPM Eq. 4
        arrows = _ideal_x_0(x_t[:30], alpha_bar_t, points) - x_t[:30]
        ax.plot(*x_t.T, ".", color=GREY, markersize=2)
        ax.plot(*points.T, ".", color="black", markersize=1)
        options = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.007, "zorder": 3}
        ax.quiver(*x_t[:30].T, *arrows.T, color=ORANGE, **options)
    many, some, few = (_denoise(noise, steps, points, alphas_cumprod) for steps in (200, 20, 5))
    still = _denoise(noise, 200, points, alphas_cumprod, new_noise=False)
    for way in torch.stack(many)[:, :3].unbind(1):
        axes[5].plot(*way.T, color=ORANGE, linewidth=0.7)
        axes[5].plot(*way[-1], ".", color="black", markersize=9, zorder=3)
    for ax, shown, size in zip(
        axes[5:], (noise[:3], many[-1], still[-1], some[-1], few[-1]), "82222"
    ):
        ax.plot(*points.T, ".", color=GREY, markersize=1, zorder=0)
        ax.plot(*shown.T, ".", color=BLUE, markersize=int(size) + 1)
    pictures = []
    for stage in [*many[::4], many[-1]]:
        column, row = (120 + 35 * stage.T).round().long().clamp(0, 239).numpy()
        pictures.append(np.full((240, 240, 3), 30, dtype=np.uint8))
        pictures[-1][239 - row, column] = 230
    durations = [80] * (len(pictures) - 1) + [2000]
    gif = _save_gif(pictures, Path(path).with_suffix(".gif"), durations, "", colours=2)
    return _save(fig, path), gif


# %% 6. Run


def _some_digits(data_dir):
    """One image of each of 0 ... 4, (5, 1, 28, 28) in [-1, 1], and the name of the data set."""
    try:
        from torchvision.datasets import MNIST

        mnist = MNIST(data_dir, train=True, download=False)
        (images, labels), name = (mnist.data, mnist.targets), "MNIST"
    except Exception:  # the files are not there, or damaged
        (images, labels), name = draw_digits(200, seed=0), "drawn digits"
    first = torch.stack([images[labels == digit][0] for digit in range(5)])
    return first[:, None].float() / 127.5 - 1, name


if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parent.parent
    digits, source = _some_digits(ROOT / "data")
    folder = ROOT / "outputs" / "visualize"
    print(f"Images: {source}")
    note = f"{source}, T = 1000, seed 0"
    for saved in (
        forward_process(digits[2:4], folder / "forward_process.png", note=note),
        *reverse_process(folder / "reverse_process.png"),
    ):
        print(f"Saved {saved}")
