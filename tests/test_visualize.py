"""utils/visualize.py: the drawn digits and the figures; also those of tests/figures.py."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler
from figures import bars, quality_by_steps, trade_off
from PIL import Image

from utils import visualize
from utils.visualize import draw_digits


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


# %% Drawn digits


def test_drawn_digits_have_the_shape_and_range_of_mnist():
    images, labels = draw_digits(500, seed=3)
    assert images.shape == (500, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (500,) and labels.dtype == torch.int64
    assert sorted(labels.unique().tolist()) == list(range(10))
    assert images.min() == 0 and images.max() == 255
    assert 0.05 < images.float().mean() / 255 < 0.25, "MNIST has 0.13"
    assert (images[:, 0].float().mean() < 5) and (images[:, :, 0].float().mean() < 5), "clear edge"
    assert (images.flatten(1).amax(1) > 150).all(), "no image is empty"


def test_drawn_digits_follow_their_seed_and_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    first, again, other = (draw_digits(50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    random = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(random, torch.rand(3))


def test_drawn_digits_vary_and_can_be_told_apart():
    """A nearest-mean classifier trained on some reads others: the labels belong to the images."""
    images, labels = draw_digits(3000, seed=0)
    x = images.flatten(1).float()
    means = torch.stack([x[:2000][labels[:2000] == d].mean(0) for d in range(10)])
    read = torch.cdist(x[2000:], means).argmin(1)
    assert (read == labels[2000:]).float().mean() > 0.7
    spread = torch.stack([x[labels == d].std(0).mean() for d in range(10)])
    assert (spread > 20).all(), "many ways to write each digit"


@pytest.mark.parametrize("n", [0, -1, 2.5, "many"])
def test_drawing_a_senseless_number_of_digits(n):
    with pytest.raises(ValueError, match="n ="):
        draw_digits(n)
    assert len(draw_digits(np.int64(3))[0]) == 3


# %% Figures


def make_frames(channels=1, count=4, stages=12):
    images = torch.rand(stages, count, channels, 8, 8) * 2 - 1
    return [(stages - 2 - i, x, x / 2) for i, x in enumerate(images)]


def test_every_figure_is_written_and_shows_something(tmp_path):
    x, folder = torch.rand(5, 3, 8, 8) * 2 - 1, tmp_path / "new folder"
    frames = make_frames(channels=3)
    paths = [
        visualize.sample_grid(x, folder / "grid.png", "Title", "note"),
        visualize.denoising_strip(frames, folder / "strip.png"),
        visualize.denoising_gif(frames, folder / "steps.gif"),
        visualize.loss_curve(np.linspace(1, 0.1, 300), folder / "loss.png"),
        visualize.image_table({"a": x[:2], "b": x[2:4]}, folder / "table.png", ["one", "two"]),
        visualize.forward_process(x[:2], folder / "forward.png", T=50),
    ]
    assert all(pixels(path).std() > 5 for path in paths)
    assert len(os.listdir(folder)) == len(paths), "no temporary file stays"


def test_paths_may_begin_with_the_home_folder_and_name_a_format(tmp_path, monkeypatch):
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(tmp_path))
    grid = visualize.sample_grid(torch.zeros(4, 1, 8, 8), "~/grid.pdf")
    assert grid == tmp_path / "grid.pdf" and grid.read_bytes().startswith(b"%PDF")
    gif = visualize.grid_gif(torch.zeros(3, 4, 1, 8, 8), "~/grid.gif")
    assert gif == tmp_path / "grid.gif" and gif.read_bytes().startswith(b"GIF")


def test_each_pixel_of_large_images_is_shown(tmp_path, real_figures):
    """Columns of white and black in turn: the figure has as many."""
    images = torch.ones(36, 1, 128, 128)
    images[..., ::2] = -1
    grid = visualize.sample_grid(images, tmp_path / "grid.png")
    table = visualize.image_table({"a": images[:5], "b": images[:5]}, tmp_path / "table.png")
    for path, count in (grid, 6 * 64), (table, 5 * 64):
        row = pixels(path)[pixels(path).shape[0] // 2 - 60, :, 0]
        assert ((row[1:] > 128) & (row[:-1] < 128)).sum() >= count


def test_one_image_and_one_loss_are_enough(tmp_path):
    visualize.sample_grid(torch.zeros(1, 1, 28, 28), tmp_path / "grid.png")
    visualize.loss_curve([0.5], tmp_path / "loss.png")
    visualize.denoising_strip(make_frames(stages=2, count=1), tmp_path / "strip.png")
    visualize.denoising_gif(make_frames(stages=2, count=1), tmp_path / "steps.gif")


@pytest.mark.parametrize(
    ("lengths", "names", "expected"),
    [((2, 3), (), r"\[2, 3\]"), ((3, 3), ["a", "b"], r"\[2, 3\]"), ((1, 4), ["a"], r"\[1, 4\]")],
)
def test_a_table_that_is_not_full_is_refused(tmp_path, lengths, names, expected):
    rows = {f"row {i}": torch.zeros(count, 1, 8, 8) for i, count in enumerate(lengths)}
    with pytest.raises(ValueError, match=f"differ in length: {expected}"):
        visualize.image_table(rows, tmp_path / "t.png", names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [("left", "middle", "right"), ()])
def test_a_table_of_images_has_its_rows_and_names_in_order(figures, columns):
    greys = {"first": (-1.0, 0.0, 1.0), "second": (1.0, -1.0, 0.0)}
    rows = {k: torch.tensor(v).view(3, 1, 1, 1).expand(3, 1, 4, 4) for k, v in greys.items()}
    visualize.image_table(rows, Path("t.png"), columns, "Title", "a note")
    fig = figures["t.png"]
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
    assert [label.get_text() for label in ax.get_xticklabels()] == list(columns)
    shown = ax.images[0].get_array()
    x = (3, 9, 15)  # 4 pixels each, and 2 around and between them; the names stand in the middle
    assert [[int(shown[y, i, 0]) for i in x] for y in (3, 9)] == [[0, 128, 255], [255, 0, 128]]
    assert list(ax.get_yticks()) == [3, 9] and list(ax.get_xticks()) == list(x[: len(columns)])
    assert fig.get_suptitle() == "Title" and fig.get_supxlabel() == "a note"


def test_a_table_is_printed_and_drawn(figures, capsys):
    rows = [["DDIM, η = 0", "5", "1.0 ×"], ["DDPM", "1000", "20.5 ×"]]
    header = ["sampler", "steps", "speed-up"]
    visualize.table(header, rows, Path("t.png"), "Title")
    assert capsys.readouterr().out.splitlines() == [
        "    sampler  steps  speed-up",
        "DDIM, eta = 0      5     1.0 x",
        "       DDPM   1000    20.5 x",
    ]
    (table,) = figures["t.png"].axes[0].tables
    cells = {place: cell.get_text().get_text() for place, cell in table.get_celld().items()}
    texts = [[cells[row, column] for column in range(3)] for row in range(3)]
    assert texts == [header, *rows]


def test_what_every_script_leaves(tmp_path, monkeypatch, capsys):
    given, shown = {}, {"samples.png": "samples", "loss.png": "losses"}
    shown |= {"denoising.png": "frames", "denoising.gif": "frames"}

    def keep(content, path, *_, **__):
        given[path] = content

    for name in "sample_grid", "denoising_strip", "denoising_gif", "loss_curve":
        monkeypatch.setattr(visualize, name, keep)
    visualize.save_results(str(tmp_path), "samples", "frames", "losses", "MNIST", "Title")
    assert given == {tmp_path / name: content for name, content in shown.items()}
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and all(name in printed for name in [*shown, str(tmp_path)])


def test_tiles_stand_row_by_row_in_the_right_greys_and_colours():
    images = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    tiles = visualize._tile(images, columns=2, gap=1, background=7)
    assert tiles.shape == (7, 7, 3)
    assert [tiles[y, x, 0] for y in (1, 4) for x in (1, 4)] == [0, 128, 255, 255]
    for edge in 0, 3, 6:
        assert (tiles[edge] == 7).all() and (tiles[:, edge] == 7).all()
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert (visualize._tile(red, columns=1) == [255, 0, 0]).all()


def test_animation_runs_from_first_to_last_frame(tmp_path):
    frames = [(1 - i, torch.full((4, 1, 8, 8), v), None) for i, v in enumerate((-1.0, 0.0, 1.0))]
    path = visualize.denoising_gif(frames, tmp_path / "steps.gif", scale=1)
    with Image.open(path) as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
        greys = []
        for i in range(3):
            animation.seek(i)
            greys.append(animation.convert("L").getpixel((4, 4)))
        assert greys == [0, 128, 255]
        assert animation.info["duration"] == 2000


def test_grey_images_stay_grey_in_the_animation(tmp_path):
    """The few colours of the palette must not lend a tint to pixels between black and white."""
    frames = [(3 - i, torch.rand(9, 1, 28, 28) * 2 - 1, None) for i in range(4)]
    path = visualize.denoising_gif(frames, tmp_path / "steps.gif", note="what was run")
    with Image.open(path) as animation:
        for i in range(animation.n_frames):
            animation.seek(i)
            colours = np.asarray(animation.convert("RGB")).astype(int)
            assert (np.ptp(colours, axis=2) <= 2).all()
        caption = colours[-14:]
        assert caption.max() > 150, "the note stands below the images"


def test_a_failed_save_costs_a_line_and_leaves_the_old_picture(tmp_path, monkeypatch, capsys):
    path = visualize.sample_grid(torch.zeros(4, 1, 8, 8), tmp_path / "grid.png")
    before = path.read_bytes()

    def full_disk(self, target, **options):
        with open(target, "wb") as file:
            file.write(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(visualize.Figure, "savefig", full_disk)
    capsys.readouterr()
    assert visualize.sample_grid(torch.ones(4, 1, 8, 8), path) == path, "the others can be written"
    assert capsys.readouterr().out == f"{path} could not be written: No space left on device\n"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["grid.png"]


def test_figures_appear_in_a_notebook(tmp_path, monkeypatch):
    shown = []
    display = SimpleNamespace(display=shown.append, Image=lambda filename: filename.read_bytes())
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True), display=display)
    monkeypatch.setitem(visualize.sys.modules, "IPython", ipython)
    png = visualize.sample_grid(torch.zeros(4, 1, 8, 8), tmp_path / "grid.png")
    gif = visualize.grid_gif(torch.zeros(3, 4, 1, 8, 8), tmp_path / "grid.gif")
    assert shown == [png.read_bytes(), gif.read_bytes()]
    assert visualize.sample_grid(torch.zeros(4, 1, 8, 8), tmp_path / "grid.pdf").exists()
    assert len(shown) == 2, "a notebook cannot show a PDF"


def test_figures_do_not_depend_on_the_users_style(tmp_path, real_figures):
    pictures = []
    for style in {}, {"font.size": 30, "axes.facecolor": "black", "image.origin": "lower"}:
        with matplotlib.rc_context(style):
            path = visualize.loss_curve([3.0, 2.0, 1.0], tmp_path / "loss.png", "Loss", "note")
            pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]


def test_names_of_any_kind_are_shown_as_they_are(monkeypatch, real_figures):
    """As wide as needed; a number before letters that no font has."""
    drawn = {}
    monkeypatch.setattr(visualize, "_save", lambda fig, path: drawn.update(fig=fig))
    names = ["cost $5", "$x_t$", "\U000f0000", "a name that is much wider than its image", "b"]
    names += ["0" * 200, "caf\udce9"]  # the latter is no Unicode
    visualize.image_table({"row": torch.zeros(7, 1, 8, 8)}, "x.png", names, "Title " * 30)
    fig = drawn["fig"]
    fig.canvas.draw()
    labels = [label for label in fig.axes[0].get_xticklabels() if label.get_text()]
    shown = [label.get_text().replace("\\$", "$").replace("\n", " ") for label in labels]
    assert shown[:5] == [*names[:2], "2: \U000f0000", *names[3:5]]
    assert [name.replace(" ", "") for name in shown[5:]] == ["0" * 59 + "…", "caf?"]
    assert fig.bbox.width < 4000 and fig.bbox.height < 1000
    boxes = [label.get_window_extent() for label in [*labels, fig._suptitle]]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes[:-1])), "names do not overlap"
    assert boxes[-1].x0 > 0 and boxes[-1].x1 < fig.bbox.width, "the title fits"


def test_a_console_that_cannot_show_a_letter_and_none_at_all():
    program = (
        "import sys, utils.visualize\nprint('\u52d5\u7269 caf\u00e9')\nprint(1, file=sys.stderr)"
    )
    for start, expected in ("", b"?? caf\xe9"), ("import sys; sys.stderr = None\n", b"?? caf\xe9"):
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
        command = [sys.executable, "-c", start + program]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0 and done.stdout.strip() == expected, done.stderr


def test_the_program_takes_mnist_if_it_is_there_and_intact(project):
    data, (drawn, labels) = project.folder / "data", draw_digits(200, seed=0)
    images, name = visualize._some_digits(data)
    assert name == "drawn digits" and images.shape == (5, 1, 28, 28) and images.abs().max() == 1
    found = [labels[(x * 127.5 + 127.5 - drawn).flatten(1).norm(dim=1) < 1] for x in images]
    assert torch.cat(found).tolist() == [0, 1, 2, 3, 4]
    project.lay_mnist(*draw_digits(100, seed=1))
    assert visualize._some_digits(data)[1] == "MNIST"
    for content in b"", b"<html>not found</html>":
        (data / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
        assert visualize._some_digits(data)[1] == "drawn digits"


def test_schedules_are_those_of_diffusers():
    linear = DDPMScheduler(1000, beta_schedule="linear").alphas_cumprod
    cosine = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert (visualize._linear_alphas_cumprod().float() - linear).abs().max() < 1e-6
    assert (visualize._cosine_alphas_cumprod().float() - cosine).abs().max() < 1e-6


def guided(difference):
    """Predictions at scales 0 to 2 whose difference is across the first."""
    image, noise, across = torch.zeros(3, 1, 1, 8, 8)
    noise[..., 0, 0], across[..., 0, 1] = 1.0, difference
    return {scale: (image, noise + scale * across) for scale in (0, 1, 2)}


def scores(recall):
    names = "read as asked", "precision", "recall", "Fréchet distance"
    of_scales = {scale: dict(zip(names, (0.9, 0.8, recall, 2.0))) for scale in (0, 1, 3)}
    return {"in the interval": of_scales, "every t": of_scales}


IMAGES, ALPHAS_CUMPROD = torch.zeros(3, 3, 8, 8), torch.linspace(0.99, 0.01, 50)


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (visualize.table, lambda v: (["a", "b"], [["x", f"{v}"]])),
        (visualize.reconstruction_errors, lambda v: ({10: 1.0, 20: v}, {"image": IMAGES})),
        (visualize.blend_comparison, lambda v: ({"lerp": [1, v, 1]}, {"lerp": IMAGES})),
        (visualize.guidance_vectors, lambda v: (guided(v),)),
        (visualize.latent_pictures, lambda v: (IMAGES, torch.full((4, 3, 2, 2), v))),
        (visualize.latent_scaling, lambda v: (torch.linspace(-3, 3, 99), v, ALPHAS_CUMPROD)),
        (trade_off, lambda v: (scores(v),)),
        (bars, lambda v: ({"a": [3.0, 2.0], "b": [v]},)),
        (quality_by_steps, lambda v: ({"a": {10: 3.0, 50: v}}, {"DDPM": 0.1}, (50, [2.0]))),
    ],
    ids=lambda value: value.__name__,
)
def test_figures_show_what_they_are_given(tmp_path, draw, arguments):
    one, other = (pixels(draw(*arguments(v), tmp_path / f"{v}.png")) for v in (0.7, 0.9))
    assert min(one.shape[:2]) > 30 and one.std() > 5
    assert not np.array_equal(one, other)
    assert sorted(os.listdir(tmp_path)) == ["0.7.png", "0.9.png"]


def test_half_hidden_is_where_signal_and_noise_are_equal(figures):
    """With ᾱ falling evenly from 1 to 0, latents of variance 1 are half hidden in the middle."""
    latents, alphas_cumprod = 2 * torch.randn(100_000), torch.linspace(0.999, 0.001, 1000)
    visualize.latent_scaling(latents, 0.5, alphas_cumprod, Path("x.png"))
    texts = [text.get_text() for text in figures["x.png"].axes[1].get_legend().get_texts()]
    at = [int(text.split("t = ")[1]) for text in texts]
    assert at == [pytest.approx(800, abs=5), pytest.approx(500, abs=5), pytest.approx(990, abs=5)]


@pytest.mark.parametrize("difference", [0.5, 0.0])
def test_guidance_vectors_are_at_their_place_in_the_plane(figures, difference):
    """Without any difference there is no second direction, and nothing is divided by zero."""
    visualize.guidance_vectors(guided(difference), Path("a.png"))
    tips = [tuple(line.get_xydata()[0]) for line in figures["a.png"].axes[0].lines]
    assert np.allclose(tips, [(1, 0), (1, difference), (1, 2 * difference)])


def test_the_reverse_process_ends_where_the_figure_says(tmp_path, real_figures):
    """Given an ideal denoiser: 200 steps cover the data, without new noise they collapse."""
    points, alphas_cumprod = visualize._spiral(400), visualize._linear_alphas_cumprod()
    assert points.std() == pytest.approx(1, abs=1e-3)
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(2))

    def ends(steps, new_noise=True):
        stages = visualize._denoise(noise, steps, points, alphas_cumprod, new_noise)
        assert len(stages) == steps + 1 and torch.equal(stages[0], noise)
        distance = torch.cdist(stages[-1], points).min(1).values
        return stages[-1].std(), (distance < 0.1).double().mean()

    spread, near = ends(200)
    assert spread == pytest.approx(1, abs=0.05) and near > 0.97
    assert ends(200, new_noise=False)[0] < 0.3
    assert ends(5)[1] < 0.7 < ends(20)[1]
    png, gif = visualize.reverse_process(tmp_path / "reverse.png", n=300)
    assert pixels(png).std() > 5 and gif.stat().st_size < 300_000
    with Image.open(gif) as animation:
        assert animation.n_frames > 40


def test_the_ideal_x_0_of_points_is_the_mean_of_the_posterior():
    points, x_t = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.3, 5.0]])
    alpha_bar_t = torch.tensor(0.64)
    # Two points: the log of the odds is 2 · √ᾱ · x / (1 − ᾱ), and the mean its tanh of half.
    expected = math.tanh(0.8 * 0.3 / 0.36)
    assert torch.allclose(
        visualize._ideal_x_0(x_t, alpha_bar_t, points), torch.tensor([[expected, 0.0]])
    )


def test_the_training_task_is_asked_and_answered_as_in_training(tmp_path, monkeypatch):
    """A network that knows the image answers with the noise; without it, the image is left."""
    shown, images = {}, torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    alphas_cumprod, seen = torch.linspace(0.99, 0.01, 50), []
    x_0 = (images / 127.5 - 1).repeat_interleave(4, dim=0)

    def model(x_t, t):
        seen.append((x_t, t))
        alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()

    monkeypatch.setattr(visualize, "image_table", lambda rows, *_: shown.update(rows))
    ddpm = SimpleNamespace(model=model, alphas_cumprod=alphas_cumprod, device="cpu")
    visualize.training_task(ddpm, images, tmp_path / "task.png")
    clean, given, asked, answered, left = shown.values()
    assert seen[0][1].tolist() == [5, 15, 25, 35] * 2 and torch.equal(given, seen[0][0])
    assert torch.equal(clean, x_0) and torch.allclose(left, x_0, atol=1e-4)
    assert torch.allclose(asked, answered, atol=1e-4) and abs(3 * asked.std() - 1) < 0.15


def test_nearest_images_are_the_nearest(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (2500, 1, 4, 4), dtype=torch.uint8)
    shown, chosen = {}, torch.tensor([2499, 0, 1200])
    monkeypatch.setattr(visualize, "image_table", lambda rows, *_, **__: shown.update(rows))
    samples = images[chosen] / 127.5 - 1 + 0.05 * torch.randn(3, 1, 4, 4)
    visualize.nearest_images(samples, images, tmp_path / "nearest.png")
    assert torch.equal(shown["samples"], samples)
    assert torch.equal(shown["nearest training images"], images[chosen] / 127.5 - 1)
