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
    "guidance_vectors.png",
    "interpolation.png",
    "loss.png",
    "samples.png",
]
SMALL = {
    "T": 3,
    "SAMPLE_STEPS": 2,
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 1, 1),
    "NUM_BLOCKS": 1,
    "EPOCHS": 1,
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


@pytest.fixture
def figures(monkeypatch):
    """Pictures by name, kept instead of written: that saves most of the time."""
    kept = {}
    monkeypatch.setattr(visualize, "_save", lambda fig, path: kept.update({path.name: fig}))
    monkeypatch.setattr(visualize, "_save_gif", lambda *_, **__: None)
    return kept


def test_from_start_to_pictures(project):
    project.lay_mnist(*draw_digits(100, seed=1))
    project.edit(SCRIPT, **SMALL, PREVIEW_EVERY=1e-9)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of MNIST" in done.stdout and "100/100" in done.stderr
    folder = folder_of(project)
    assert project.outputs(SCRIPT) == [*FILES, "samples_step_000001.png"]
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    ddpm = load(SCRIPT).load(folder / "checkpoint.pt")
    assert ddpm.class_names == [*"0123456789"] and ddpm.null_label == 10 and ddpm.T == 3


def test_what_needs_no_other_training_and_what_does(project, figures):
    lay_colours(project, {"black": (0, 0, 0), "white": (255, 255, 255)})
    project.edit(SCRIPT, DATASET="my images", IMAGE_SIZE=8, **{**SMALL, "BATCH_SIZE": 4})
    path = folder_of(project) / "checkpoint.pt"
    assert project.run_here(SCRIPT).returncode == 0

    def shown():
        names = "samples.png", "guidance.png"
        return [figures[name].axes[0].images[0].get_array() for name in names]

    before, one = path.read_bytes(), shown()
    # Another scale needs no other training, and gives other pictures, where it matters.
    project.edit(SCRIPT, GUIDANCE_SCALE=8.0)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "step 4 of 4" in again.stdout, again.stderr
    assert path.read_bytes() == before
    assert [np.array_equal(a, b) for a, b in zip(one, shown())] == [False, True]
    assert "guidance scale 8.0" in figures["samples.png"].get_suptitle()
    # Another share of withheld labels is no other network; more epochs train on.
    project.edit(SCRIPT, P_UNCOND=0.2, EPOCHS=2)
    longer = project.run_here(SCRIPT)
    assert longer.returncode == 0 and "step 4 of 8" in longer.stdout, longer.stderr
    assert load(SCRIPT).load(path).p_uncond == 0.2
    # With other classes it is another task, also for a folder of the same name.
    before = path.read_bytes()
    shutil.move(project.folder / "my images" / "white", project.folder / "my images" / "grey")
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "CLASS_NAMES was ['black', 'white']" in refused.stderr
    assert path.read_bytes() == before


def test_it_learns_which_class_is_which_from_a_folder_of_images(project, figures):
    colours = {"black": (0, 0, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
    lay_colours(project, colours)
    small = {
        **SMALL,
        "T": 20,
        "SAMPLE_STEPS": 20,
        "BASE_CH": 8,
        "CHANNEL_MULT": (1, 1),
        "EPOCHS": 75,
        "BATCH_SIZE": 12,
        "SAVE_EVERY": 99,
    }
    project.edit(SCRIPT, DATASET="my images", IMAGE_SIZE=8, **small)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == ["checkpoint.pt"]
    # load() needs nothing but the file: the constants of this module are others.
    ddpm = load(SCRIPT).load(folder_of(project) / "checkpoint.pt")
    assert ddpm.class_names == ["black", "red", "white"]
    # With the label of an image the noise in it is predicted best: for 100 images of each class.
    x_0 = (torch.tensor([*colours.values()]) / 127.5 - 1)[:, :, None, None].expand(3, 3, 8, 8)
    x_0, t = x_0.repeat_interleave(100, dim=0), torch.full((300,), 8)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    x_t = load(SCRIPT).q_sample(x_0, t, noise, ddpm.alphas_cumprod)
    answers = torch.stack([ddpm.model(x_t, t, torch.full((300,), label)) for label in range(3)])
    errors = (answers - noise).square().reshape(3, 3, -1).mean(2)  # by label and class
    assert errors.argmin(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"there is no class 'cat'.*: black, red, white"):
        ddpm.sample(n=2, labels=["cat", "red"])
    # The rows of the picture are the classes, in this order.
    (ax,) = figures["samples.png"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["black", "red", "white"]
    rows = [ax.images[0].get_array()[y : y + 8, :8] for y in (0, 10, 20)]
    rows = torch.tensor(np.array(rows), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    settings = {"SEED": 0, "BATCH_SIZE": 12, "GUIDANCE_SCALE": 2.0, "SAMPLE_STEPS": 20}
    wanted = load(SCRIPT).sample_classes(ddpm, [0, 1, 2] * 6, settings)[:3]
    assert (rows - wanted).abs().max() < 0.01


@pytest.mark.parametrize("classes", [1, 12])
def test_any_number_of_classes(project, figures, classes):
    lay_colours(project, {f"c{i:02}": (0, 0, 20 * i) for i in range(classes)}, count=2)
    small = {**SMALL, "T": 2, "BATCH_SIZE": 2}
    project.edit(SCRIPT, DATASET="my images", IMAGE_SIZE=8, **small)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    pictures = {name for name in FILES if name.endswith(".png")}
    if classes == 1:
        pictures.remove("interpolation.png")  # there is no other label
    assert set(figures) == pictures
