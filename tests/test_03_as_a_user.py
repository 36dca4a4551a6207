"""03_conditional_ddpm.py as a person meets it; what it shares with 02 is tested there."""

import numpy as np
import pytest
import torch
from conftest import EACH_STEP, PICTURES, assert_learned_the_same, load
from PIL import Image

SCRIPT = "03_conditional_ddpm.py"
OWN = ["guidance.png", "guidance_vectors.png", "interpolation.png"]
FILES = sorted([*PICTURES, *OWN, "checkpoint.pt"])


def lay_colours(project, colours, count):
    """A folder of plain images, one subfolder for each class: {name: colour}."""
    for name, colour in colours.items():
        folder = project.folder / "my images" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")


def pixels_of(figure):
    return figure.axes[0].images[0].get_array()


def test_from_start_to_pictures(project, trained, real_figures):
    project.prepare(SCRIPT, SAVE_EVERY=EACH_STEP)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "43 images of MNIST" in done.stdout and "43/43" in done.stderr
    previews = ["samples_step_000001.png", "samples_step_000002.png"]
    assert project.outputs(SCRIPT) == FILES + previews
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    assert_learned_the_same(project.state(SCRIPT), trained.state(SCRIPT))
    ddpm = project.names["ddpm"]
    assert ddpm.class_names == [*"0123456789"] and ddpm.null_label == 10 and ddpm.T == 5


def test_another_scale_needs_no_other_training_and_more_epochs_do(project, figures):
    lay_colours(project, {"black": (0, 0, 0), "white": (255, 255, 255)}, count=22)
    project.prepare(SCRIPT, DATASET="my images", IMAGE_SIZE=8, GUIDE_ABOVE=0, GUIDE_BELOW=1)
    assert project.run_here(SCRIPT).returncode == 0
    path, names = project.folder_of(SCRIPT) / "checkpoint.pt", ("samples.png", "guidance.png")
    before, shown = path.read_bytes(), [pixels_of(figures[name]) for name in names]
    project.edit(SCRIPT, GUIDANCE_SCALE=8.0)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "images/s" in again.stderr, again.stderr
    assert path.read_bytes() == before
    equal = [np.array_equal(old, pixels_of(figures[name])) for name, old in zip(names, shown)]
    assert equal == [False, True], "another scale, and always the same scales"
    assert "guidance scale 8.0" in figures["samples.png"].get_suptitle()
    # Another share of withheld labels is no other network; more epochs resume.
    project.edit(SCRIPT, P_UNCOND=0.2, EPOCHS=3)
    longer = project.run_here(SCRIPT)
    assert longer.returncode == 0 and "after 44 of 132 images" in longer.stdout, longer.stderr
    assert project.names["ddpm"].p_uncond == 0.2


def test_it_learns_which_class_is_which_from_a_folder_of_images(project, figures):
    colours = {"black": (0, 0, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
    lay_colours(project, colours, count=8)
    constants = {"IMAGE_SIZE": 8, "T": 20, "SAMPLE_STEPS": 4, "BASE_CH": 8, "CHANNEL_MULT": (1, 1)}
    constants |= {"DATASET": "my images", "EPOCHS": 40, "BATCH_SIZE": 12}
    project.prepare(SCRIPT, **constants)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    # `load` needs nothing but the file: the constants of this module are others.
    script = load(SCRIPT)
    ddpm = script.GuidedDDPM.load(project.folder_of(SCRIPT) / "checkpoint.pt")
    assert ddpm.class_names == ["black", "red", "white"]
    # With the label of an image the noise in it is predicted best: for 100 images of each class.
    x_0 = (torch.tensor([*colours.values()]) / 127.5 - 1)[:, :, None, None].expand(3, 3, 8, 8)
    x_0, t = x_0.repeat_interleave(100, dim=0), torch.full((300,), 8)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    x_t = script.q_sample(x_0, t, noise, ddpm.alphas_cumprod)
    answers = torch.stack([ddpm.model(x_t, t, torch.full((300,), label)) for label in range(3)])
    errors = (answers - noise).square().reshape(3, 3, -1).mean(2)  # by label and class
    assert errors.argmin(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"there is no class 'cat'.*: black, red, white"):
        ddpm.sample(n=2, labels=["cat", "red"])
    # The rows of the picture are the classes, in this order.
    (ax,) = figures["samples.png"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["black", "red", "white"]
    rows = [pixels_of(figures["samples.png"])[y : y + 8, 2:10] for y in (2, 12, 22)]
    rows = torch.tensor(np.array(rows), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    settings = {"SEED": 0, "BATCH_SIZE": 12, "GUIDANCE_SCALE": 2.0, "SAMPLE_STEPS": 4}
    settings |= {"GUIDE_ABOVE": script.GUIDE_ABOVE, "GUIDE_BELOW": script.GUIDE_BELOW}
    wanted = script.sample_classes(ddpm, [0, 1, 2] * 4, settings)[:3]  # 12 / 3 of each
    assert (rows - wanted).abs().max() < 0.01


@pytest.mark.parametrize("classes", [1, 12])
def test_any_number_of_classes(project, figures, classes):
    lay_colours(project, {f"c{i:02}": (0, 0, 20 * i) for i in range(classes)}, count=2)
    project.prepare(SCRIPT, DATASET="my images", IMAGE_SIZE=8)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    pictures = {name for name in FILES if name.endswith(".png")}
    if classes == 1:
        pictures.remove("interpolation.png")  # there is no other label
    assert set(figures) == pictures
