"""03_conditional_ddpm.py as a person meets it; what it shares with 02 is tested there."""

import itertools

import numpy as np
import torch
from PIL import Image

from utils.visualize import draw_digits

SCRIPT = "03_conditional_ddpm.py"
FILES = [
    "checkpoint.pt",
    "denoising.gif",
    "denoising.png",
    "guidance.png",
    "interpolation.png",
    "loss.png",
    "samples.png",
]
SMALL = {
    "T": 10,
    "BASE_CH": 8,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
    "PREVIEW_EVERY": 1,
}


def prepare(project, count=200, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def test_from_start_to_pictures_and_again(project):
    prepare(project, count=600, EPOCHS=3)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert str(project.folder) in done.stdout
    previews = ["samples_epoch_001.png", "samples_epoch_002.png"]
    assert project.outputs(SCRIPT) == FILES + previews
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    folder = project.folder / "outputs" / "03_conditional_ddpm"
    before = {name: (folder / name).read_bytes() for name in FILES}

    def tiles():  # without the title, which names the scale
        with Image.open(folder / "samples.png") as picture:
            return np.asarray(picture.convert("L"))[100:-100]

    tiles_before = tiles()
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "Epoch" not in again.stderr
    for name in FILES:
        assert (folder / name).read_bytes() == before[name], f"{name} is the same as before"
    # Another scale needs no other training, and gives other pictures.
    project.edit(SCRIPT, GUIDANCE_SCALE=8.0)
    assert project.run_here(SCRIPT).returncode == 0
    assert (folder / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
    assert not np.array_equal(tiles(), tiles_before)
    assert (folder / "guidance.png").read_bytes() == before["guidance.png"]
    # Another share of withheld labels does.
    project.edit(SCRIPT, P_UNCOND=0.2)
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "P_UNCOND was 0.1 and now is 0.2" in refused.stderr


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])


def test_it_learns_which_class_is_which(project):
    """One class is white, nine are black: what is asked for must come, by number and by name."""
    images = torch.zeros(400, 28, 28, dtype=torch.uint8)
    labels = torch.arange(400) % 10
    images[labels == 3] = 255
    project.lay_mnist(images, labels)
    project.edit(SCRIPT, **{**SMALL, "T": 30, "EPOCHS": 12, "BATCH_SIZE": 20, "PREVIEW_EVERY": 99})
    question = (
        "x = ddpm.sample(n=6, labels=[0, 3, '1', '3', 2, 3])\n"
        "print('means', [round(v, 1) for v in x.mean((1, 2, 3)).tolist()])\n"
        "ddpm.sample(n=2, labels=['cat', 1])\n"
    )
    done = project.run("-i", SCRIPT, stdin=question)
    line = next(line for line in done.stdout.splitlines() if "means" in line)
    means = np.array(eval(line.split("means")[1]))
    assert (means[0::2] < -0.7).all() and (means[1::2] > 0.5).all(), line
    assert "ValueError: there is no class 'cat'" in done.stderr
    # The rows of the grid are the classes, from 0 to 9.
    path = project.folder / "outputs" / "03_conditional_ddpm" / "samples.png"
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L")).astype(float)
    # The picture's background is white: look where the tiles are, between title and note.
    dark = (pixels < 60).mean(axis=1) > 0.3
    top, bottom = np.flatnonzero(dark)[[0, -1]]
    edges = np.linspace(top, bottom, 11).round().astype(int)
    share = [dark[a + 8 : b - 8].mean() for a, b in itertools.pairwise(edges)]
    assert [round(s) for s in share] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1], share
