"""utils/interpolation.py: ways between noises, against closed forms, and what it leaves."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from utils.interpolation import grid, interpolate, lerp, loop, slerp, transition_gif


def test_star_import_gives_the_public_names_and_no_others():
    names = {}
    exec("from utils.interpolation import *", names)
    names.pop("__builtins__")
    assert set(names) == {"grid", "interpolate", "lerp", "loop", "slerp", "transition_gif"}
    assert all(names[name].__doc__ for name in names)


def test_slerp_in_the_plane_is_a_rotation():
    for angle in 0.3, 1.5, 3.0:
        a = torch.tensor([[2.0, 0.0]])
        b = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        for w in 0.0, 0.2, 0.5, 0.9, 1.0:
            wanted = 2 * torch.tensor([[math.cos(w * angle), math.sin(w * angle)]])
            assert torch.allclose(slerp(a, b, w), wanted, atol=1e-6)


def test_ends_norms_and_shapes():
    z_a, z_b = torch.randn(5, 1, 28, 28), 3 * torch.randn(5, 1, 28, 28)
    for way in lerp, slerp:
        assert torch.allclose(way(z_a, z_b, 0), z_a, atol=1e-5)
        assert torch.allclose(way(z_a, z_b, 1), z_b, atol=1e-5)
        assert way(z_a, z_b, 0.3).shape == z_a.shape and way(z_a, z_b, 0.3).dtype == z_a.dtype
    norm = [z.flatten(1).norm(dim=1) for z in (z_a, z_b, slerp(z_a, z_b, 0.25))]
    assert torch.allclose(norm[2], 0.75 * norm[0] + 0.25 * norm[1], rtol=1e-5)


def test_the_arc_keeps_the_norm_of_noise_and_the_line_loses_it():
    (z_a, z_b), root = torch.randn(2, 20, 3072), math.sqrt(3072)
    assert (slerp(z_a, z_b, 0.5).norm(dim=1) / root - 1).abs().max() < 0.05
    assert (lerp(z_a, z_b, 0.5).norm(dim=1) / root - math.sqrt(0.5)).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nearly_parallel_vectors(dtype):
    z = torch.randn(4, 100, dtype=torch.float64)
    for distance in 0.0, 1e-12, 1e-7, 1e-5, 1e-3:
        other = (z + distance * torch.randn_like(z)).to(dtype)
        middle = slerp(z.to(dtype), other, 0.5)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(middle, lerp(z.to(dtype), other, 0.5), atol=tolerance)
    zero = torch.zeros_like(z)
    assert slerp(zero, zero, 0.5).isfinite().all() and slerp(zero, z, 0.5).isfinite().all()


def test_each_item_has_its_own_arc_and_weight():
    z_a, z_b = torch.randn(2, 3, 2, 5)
    z_b[1] = z_a[1]  # one of them parallel
    weights = torch.tensor([0.1, 0.5, 0.8])
    for way in lerp, slerp:
        together = way(z_a, z_b, weights)
        for i in range(3):
            alone = way(z_a[i : i + 1], z_b[i : i + 1], weights[i].item())
            assert torch.allclose(together[i], alone[0], atol=1e-6)


def test_errors():
    z = torch.randn(2, 4)
    with pytest.raises(ValueError, match="opposite"):
        slerp(z, -2 * z, 0.5)
    for way in lerp, slerp:
        for a, b in (z, torch.randn(2, 5)), (z[0], z[1]):
            with pytest.raises(ValueError, match="same shape"):
                way(a, b, 0.5)
        with pytest.raises(ValueError, match="3 weights for 2 items"):
            way(z, z, torch.ones(3))
    assert len(interpolate(z, z, np.int64(3))) == 3
    for steps in 1, 0, 2.5:
        with pytest.raises(ValueError, match=r"points = .* of at least 2"):
            interpolate(z, z, steps)
    with pytest.raises(ValueError, match="method = 'cubic'"):
        interpolate(z, z, 3, "cubic")
    with pytest.raises(ValueError, match="a grid has 4"):
        grid(z, 3, 3)
    with pytest.raises(ValueError, match="at least 2"):
        loop(z[:1], 5)


def test_interpolate_goes_from_end_to_end_at_an_even_rate():
    z_a, z_b = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    points = interpolate(z_a, z_b, 7)
    assert points.shape == (7, 2, 1, 8, 8)
    assert torch.allclose(points[0], z_a, atol=1e-5) and torch.allclose(points[-1], z_b, atol=1e-5)
    unit = torch.nn.functional.normalize(points.flatten(2).double(), dim=2)
    angles = (unit[1:] * unit[:-1]).sum(2).arccos()  # (6, 2)
    assert torch.allclose(angles, angles[:1].expand(6, 2), atol=1e-4)
    straight = interpolate(z_a, z_b, 7, "lerp")
    assert torch.allclose(straight[2], lerp(z_a, z_b, 2 / 6), atol=1e-6)
    assert not torch.allclose(straight[3], points[3], atol=0.1)


def test_grid_has_its_corners_and_straight_rows():
    corners = torch.randn(4, 1, 6, 6)
    field = grid(corners, 3, 5)
    assert field.shape == (3, 5, 1, 6, 6)
    for corner, place in zip(corners, [(0, 0), (0, 4), (2, 0), (2, 4)]):
        assert torch.allclose(field[place], corner, atol=1e-5)
    row = interpolate(field[1:2, 0], field[1:2, 4], 5)[:, 0]
    assert torch.allclose(field[1], row, atol=1e-5)


def test_loop_is_closed_and_passes_every_stop():
    stops = torch.randn(6, 1, 28, 28)
    points = loop(stops, 4)
    assert points.shape == (24, 1, 28, 28)
    assert torch.allclose(points[::4], stops, atol=1e-5)
    gaps = (points - points.roll(-1, 0)).flatten(1).norm(dim=1)
    assert gaps.max() < 1.5 * gaps.min(), "no jump, also not from the last point to the first"


def test_transition_gif(tmp_path):
    for noises, count, frames in (
        (loop(torch.randn(3, 4, 1, 16, 16), 5), 15 * 4, 15),  # 4 transitions side by side
        (torch.randn(4, 3, 16, 16), 4, 4),  # one, in colour
    ):
        asked = []
        path = transition_gif(
            lambda noises, asked=asked: asked.append(len(noises)) or noises.tanh(),
            noises,
            tmp_path / "way.gif",
            "a note",
            batch_size=7,
        )
        assert sum(asked) == count and max(asked) <= 7
        with Image.open(path) as animation:
            assert animation.n_frames == frames and animation.info["loop"] == 0
        assert [p.name for p in tmp_path.iterdir()] == ["way.gif"]
