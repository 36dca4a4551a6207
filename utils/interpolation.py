"""Interpolation between noise samples (or latents), and what a model generates in between.

    from utils.interpolation import *    # lerp, slerp, interpolate, grid, loop, transition_gif
    python utils/interpolation.py

The functions know nothing about models: they return tensors of noise, which any deterministic
sampler can turn into images, such as `ddim.ddim_sample(x_T=noise, eta=0)` of 04.

Run as a program, this file needs no training and leaves `outputs/interpolation/why_slerp.png`. The
figure shows why we take not the straight line between two noise samples, `lerp`, but the arc,
`slerp`. In D dimensions, nearly all Gaussian noise has a norm close to √D, like points on a
sphere. The straight line between two such points cuts through the inside: halfway, its norm is only
about √½ · √D, because two noise samples are almost perpendicular. A model never sees noise that
weak in training. The arc stays on the sphere.

White 2016, Sampling Generative Networks, arXiv:1609.04468, proposes slerp for this, and DDIM
(arXiv:2010.02502, section 5.3 and Eq. 67) uses it. The formula is from Shoemake 1985, Animating
rotation with quaternion curves, SIGGRAPH, for vectors of length 1; here we blend the length, too.
"""

import math
import sys
from numbers import Integral
from pathlib import Path

import torch

if __name__ == "__main__":  # started as a program, Python looks beside this file only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.visualize import blend_comparison, draw_digits, grid_gif

__all__ = ["grid", "interpolate", "lerp", "loop", "slerp", "transition_gif"]


def lerp(z_a, z_b, weight):
    """Return the point of the straight line from z_a to z_b: (1 − weight) · z_a + weight · z_b.

    z_a, z_b: float, of the same shape (B, ...). weight: a number, 0 for z_a to 1 for z_b, or a
    tensor (B,) with one for each item. Right for what is no noise: pixels, label embeddings.
    Raises ValueError if the shapes differ.
    """
    weight = _checked_weight(z_a, z_b, weight)
    return (1 - weight) * z_a + weight * z_b


def slerp(z_a, z_b, weight):
    """Return the point on the arc from z_a to z_b, item by item: interpolation for noise.

    z_a, z_b: float, of the same shape (B, ...); each item is one vector, however many axes it has.
    weight: as for `lerp`. The direction turns at a constant rate, and the norm changes linearly
    from that of z_a to that of z_b. For vectors in almost the same direction, the result is that of
    lerp. Raises ValueError if the shapes differ, or if two vectors point in opposite directions:
    many arcs join these, and none is the shortest.
    """
    weight = _checked_weight(z_a, z_b, weight).flatten(1).cpu()  # (B, 1) or (1, 1)
    # On the CPU in float64, which Apple's GPU does not have.
    a, b = z_a.flatten(1).cpu().double(), z_b.flatten(1).cpu().double()  # (B, D)
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    # clamp: a vector of zeros has no direction, but must not divide by zero either
    unit_a, unit_b = a / norm_a.clamp(min=1e-30), b / norm_b.clamp(min=1e-30)
    # Shoemake:  (sin((1−w)·θ) · a + sin(w·θ) · b) / sin θ,  θ the angle between unit vectors a, b.
    # This form of θ keeps its digits for small angles, where the arc cosine would lose them.
    theta = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))[:, None]
    if (math.pi - theta < 1e-6).any():
        raise ValueError("two vectors point in opposite directions: many arcs join them")
    nearly_parallel = theta < 1e-6
    sine = torch.where(nearly_parallel, 1.0, theta.sin())
    share_a = torch.where(nearly_parallel, 1 - weight, ((1 - weight) * theta).sin() / sine)
    share_b = torch.where(nearly_parallel, weight, (weight * theta).sin() / sine)
    direction = share_a * unit_a + share_b * unit_b
    z = ((1 - weight) * norm_a + weight * norm_b) * direction
    return z.view_as(z_a).to(z_a)  # back to the dtype and the device of z_a


def _checked_weight(z_a, z_b, weight):
    """Return weight with axes to multiply (B, ...) by; raise ValueError if the shapes differ."""
    if z_a.shape != z_b.shape or z_a.ndim < 2:
        shapes = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
        raise ValueError(f"both must have the same shape, (B, ...), not {shapes}")
    weight = torch.as_tensor(weight, dtype=z_a.dtype, device=z_a.device).reshape(-1)
    if len(weight) not in (1, len(z_a)):
        raise ValueError(f"{len(weight)} weights for {len(z_a)} items: give one, or one for each")
    return weight.view(-1, *(z_a.ndim - 1) * [1])  # (B, 1, 1, ...) or (1, 1, 1, ...)


METHODS = {"lerp": lerp, "slerp": slerp}


def interpolate(z_a, z_b, points, method="slerp"):
    """Return points on the way from z_a (B, ...) to z_b, both ends included: (points, B, ...).

    method: "slerp" or "lerp". One noise alone is z[:1], not z[0]: the first axis counts vectors.
    Raises ValueError for any other method, for fewer than 2 points, and where lerp and slerp do.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: it must be 'slerp' or 'lerp'")
    if not isinstance(points, Integral) or points < 2:
        raise ValueError(f"points = {points!r}: it must be a whole number of at least 2")
    return torch.stack([METHODS[method](z_a, z_b, i / (points - 1)) for i in range(points)])


def grid(corners, rows, columns, method="slerp"):
    """Return a field of points between four corners, (rows, columns, ...).

    corners: (4, ...), top left, top right, bottom left, bottom right. The left and the right edge
    are made first, then each row between them. Raises ValueError as `interpolate` does.
    """
    if len(corners) != 4:
        raise ValueError(f"{len(corners)} corners: a grid has 4")
    top_left, top_right, bottom_left, bottom_right = corners[:, None]
    left = interpolate(top_left, bottom_left, rows, method)[:, 0]  # (rows, ...)
    right = interpolate(top_right, bottom_right, rows, method)[:, 0]
    return interpolate(left, right, columns, method).transpose(0, 1)


def loop(stops, steps, method="slerp"):
    """Return a closed path through all stops, (K, ...), and back to the first: (K · steps, ...).

    A stop is one vector, such as a noise sample (C, H, W). Each is followed by steps − 1 points on
    the path to the next. The last point is one step before the first, so an animation never jumps.
    Raises ValueError for fewer than 2 stops, and as `interpolate` does.
    """
    if len(stops) < 2:
        raise ValueError(f"{len(stops)} stop: a loop needs at least 2")
    ways = interpolate(stops, stops.roll(-1, 0), steps + 1, method)[:-1]  # (steps, K, ...)
    return ways.transpose(0, 1).flatten(0, 1)


def transition_gif(generate, noises, path, note="", batch_size=64, milliseconds=80):
    """Save smooth transitions as an animated GIF: one picture for each point of a way.

    generate: any function from noises (B, C, H, W) to images (B, C, H, W) in [-1, 1]. noises:
    (points, C, H, W), or (points, B, C, H, W) for B transitions side by side, best from `loop`.
    generate gets at most batch_size noises at a time. Returns the path.
    """
    noises = noises[:, None] if noises.ndim == 4 else noises
    parts = noises.flatten(0, 1).split(batch_size)
    images = torch.cat([generate(part).cpu() for part in parts])
    return grid_gif(images.unflatten(0, noises.shape[:2]), path, note, milliseconds)


if __name__ == "__main__":
    # Digits as a Gaussian distribution with their mean and covariance: a poor model of digits, but
    # its deterministic sampler is known exactly: it turns noise z into mean + √covariance · z.
    digits = draw_digits(5000)[0].flatten(1).double() / 127.5 - 1  # (5000, 784)
    mean, covariance = digits.mean(0), digits.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    z = torch.randn(2, 1, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curves, images = {}, {}
    for name in METHODS:
        between = interpolate(*z, 11, name)[:, 0]  # (11, 784)
        curves[name] = (between.norm(dim=1) / math.sqrt(784)).tolist()
        images[name] = (mean + between @ root).view(-1, 1, 28, 28)
    folder = Path(__file__).resolve().parent.parent / "outputs" / "interpolation"
    note = "noise of 784 numbers, seed 0; a Gaussian model of drawn digits"
    print(f"Saved {blend_comparison(curves, images, folder / 'why_slerp.png', note=note)}")
