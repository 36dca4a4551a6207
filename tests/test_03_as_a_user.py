"""03_conditional_ddpm.py as a person meets it; what it shares with 02 is tested there."""

import shutil

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image

from utils import visualize
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
    "T": 5,
    "BASE_CH": 8,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
}


def folder_of(project):
    return project.folder / "outputs" / "03_conditional_ddpm"


def lay_colours(project, colours, count=8, side=8):
    """A folder of plain images, one subfolder for each class: {name: colour}."""
    for name, colour in colours.items():
        folder = project.folder / "my images" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (side, side), colour).save(folder / f"{i}.png")


def test_from_start_to_pictures_and_again(project, monkeypatch):
    project.lay_mnist(*draw_digits(100, seed=1))
    project.edit(SCRIPT, **SMALL, PREVIEW_EVERY=1e-9)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of MNIST" in done.stdout and "200/200" in done.stderr
    folder = folder_of(project)
    previews = [f"samples_step_{step:06}.png" for step in (1, 2, 3)]
    assert project.outputs(SCRIPT) == FILES + previews
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    ddpm = load(SCRIPT).load(folder / "checkpoint.pt")
    assert ddpm.class_names == [*"0123456789"] and ddpm.null_label == 10 and ddpm.T == 5

    def contents():
        return {name: (folder / name).read_bytes() for name in FILES}

    def tiles():  # without the title, which names the scale
        with Image.open(folder / "samples.png") as picture:
            return np.asarray(picture.convert("L"))[100:-100]

    before, tiles_before = contents(), tiles()
    # Another scale needs no other training, and gives other pictures, where it matters.
    project.edit(SCRIPT, GUIDANCE_SCALE=8.0)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "step 4 of 4" in again.stdout, again.stderr
    after = contents()
    for name in "checkpoint.pt", "guidance.png", "loss.png":
        assert after[name] == before[name], name
    assert not np.array_equal(tiles(), tiles_before)
    # Another share of withheld labels is no other network; more epochs train on.
    project.edit(SCRIPT, P_UNCOND=0.2, EPOCHS=3, PREVIEW_EVERY=99)
    monkeypatch.setattr(visualize, "_save", lambda fig, path: path)  # saves time
    longer = project.run_here(SCRIPT)
    assert longer.returncode == 0 and "step 4 of 6" in longer.stdout, longer.stderr
    assert load(SCRIPT).load(folder / "checkpoint.pt").p_uncond == 0.2


def test_it_learns_which_class_is_which_from_a_folder_of_images(project):
    colours = {"black": (0, 0, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
    lay_colours(project, colours)
    small = {**SMALL, "T": 20, "EPOCHS": 75, "BATCH_SIZE": 12, "SAVE_EVERY": 99}
    project.edit(SCRIPT, DATASET="my images", IMAGE_SIZE=8, **small)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == FILES
    # load() needs nothing but the file: the constants of this module are others.
    ddpm = load(SCRIPT).load(folder_of(project) / "checkpoint.pt")
    assert ddpm.class_names == ["black", "red", "white"]
    asked = ["red", 2, "black", "white", 1, 0]
    found = ddpm.sample(n=6, labels=asked).mean((2, 3))
    distances = torch.cdist(found, torch.tensor([*colours.values()]) / 127.5 - 1)
    assert distances.argmin(1).tolist() == [1, 2, 0, 2, 1, 0] and distances.amin(1).max() < 0.8
    with pytest.raises(ValueError, match=r"there is no class 'cat'.*: black, red, white"):
        ddpm.sample(n=2, labels=["cat", "red"])
    # The rows of the picture are the classes, in this order.
    with Image.open(folder_of(project) / "samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    dark = (pixels.max(2) < 60).mean(axis=1) > 0.3
    red = ((pixels[..., 0] > 195) & (pixels[..., 1] < 60)).mean(axis=1) > 0.3
    assert dark.any() and red.any()
    assert np.flatnonzero(dark).max() < np.flatnonzero(red).min()
    # With other classes it is another task, also for a folder of the same name.
    path = folder_of(project) / "checkpoint.pt"
    before = path.read_bytes()
    shutil.move(project.folder / "my images" / "red", project.folder / "my images" / "blue")
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "CLASS_NAMES was ['black', 'red'" in refused.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("classes", [1, 12])
def test_any_number_of_classes(project, classes):
    lay_colours(project, {f"c{i:02}": (0, 0, 20 * i) for i in range(classes)}, count=2)
    small = {**SMALL, "T": 2, "EPOCHS": 1, "BATCH_SIZE": 2}
    project.edit(SCRIPT, DATASET="my images", IMAGE_SIZE=8, **small)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    wanted = FILES if classes > 1 else [name for name in FILES if name != "interpolation.png"]
    assert project.outputs(SCRIPT) == wanted, "between labels, where there are two of them"
