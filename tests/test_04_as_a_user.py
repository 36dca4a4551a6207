"""04_ddim_fast_sampling.py as a person meets it; what it shares with 02 is tested there."""

import re

import numpy as np
import pytest
import torch
from conftest import EACH_STEP, PICTURES, assert_learned_the_same, load
from PIL import Image

SCRIPT, SCRIPT_02 = "04_ddim_fast_sampling.py", "02_ddpm.py"
OWN = ["interpolation.png", "inversion.png", "samplers.png", "speed.png", "transitions.gif"]
FILES = sorted([*PICTURES, *OWN, "checkpoint.pt"])
FIGURES = {name for name in FILES if name.endswith(".png")}
SMALL_IMAGES = {"DATASET": "my images", "IMAGE_SIZE": 8}  # all these samplers take their time


def lay_images(project, count=30):
    folder = project.folder / "my images"
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(folder / f"{i}.png")


def table(done):
    """The rows of the printed table, each split at spaces: ..., evaluations, seconds, speed-up."""
    return [line.split() for line in done.stdout.splitlines() if re.search(r"[0-9] x$", line)]


def test_from_start_to_pictures(project, trained, real_figures):
    project.prepare(SCRIPT, SAVE_EVERY=EACH_STEP, OUT_DIR_02=None)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    previews = ["samples_step_000001.png", "samples_step_000002.png"]
    assert project.outputs(SCRIPT) == sorted(FILES + previews)
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    assert_learned_the_same(project.state(SCRIPT), trained.state(SCRIPT))
    # The table names each sampler with its evaluations, seconds and speed-up.
    rows = table(done)
    assert [int(row[-4]) for row in rows] == [5, 1, 1, 1]
    assert all(float(row[-3]) > 0 for row in rows) and float(rows[0][-2]) == 1.0
    assert "DDPM" in rows[0] and "DPM-Solver++(2M)" in rows[-1]


def test_the_network_of_02_is_used_whatever_it_looks_like(project, figures):
    lay_images(project)
    other = {"SCHEDULE": "linear", "BASE_CH": 6, "CHANNEL_MULT": (1, 1), "ATTENTION_AT": (4,)}
    project.prepare(SCRIPT_02, T=7, **other, **SMALL_IMAGES)
    assert project.run_here(SCRIPT_02).returncode == 0
    theirs = project.folder_of(SCRIPT_02) / "checkpoint.pt"
    ddpm, before = project.names["ddpm"], theirs.read_bytes()
    figures.clear()
    project.prepare(SCRIPT, **SMALL_IMAGES)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert f"Using the network in {theirs.relative_to(project.folder)}" in done.stdout
    assert "Training" not in done.stdout + done.stderr
    assert theirs.read_bytes() == before
    assert project.outputs(SCRIPT) == [], "no checkpoint of its own"
    assert set(figures) == FIGURES
    assert [int(row[-4]) for row in table(done)] == [7, 1, 1, 1], "its T, not that of 04"
    # It is the network of 02, to the last bit.
    ddim, samples = project.names["ddim"], []
    assert_learned_the_same(ddim.model.state_dict(), ddpm.model.state_dict())
    for sampler in ddpm, ddim:
        torch.manual_seed(1)
        samples.append(sampler.sample(2))
    assert torch.equal(*samples) and ddim.ddim_sample(2, 3).shape == (2, 3, 8, 8)


HARMS = {
    "other images": "ValueError: its images are 43 x 1 x 28 x 28, ",
    "more steps than it has": "ValueError: it has T = 5, less than DDIM_STEPS.",
    "damage": "",
    "another program": "KeyError: 'settings'",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_network_of_02_that_does_not_fit_is_left_alone(trained, tmp_path, capsys, harm):
    script, path = load(SCRIPT), tmp_path / "checkpoint.pt"
    state = trained.state(SCRIPT_02)
    torch.save(state | {"seen": 40}, path)  # interrupted
    script.DDIM_STEPS, images = 5, state["settings"]["IMAGES"]
    assert script.use_02(path, {"IMAGES": images}, 43)
    used = f"Using the network in {path}, trained on 40 of 43 images.\n"
    assert capsys.readouterr().out.startswith(used)
    images = "44" + images[2:] if harm == "other images" else images
    script.DDIM_STEPS += harm == "more steps than it has"
    if harm == "damage":
        path.write_bytes(path.read_bytes()[:-200])
    elif harm == "another program":
        torch.save({"of": "another program"}, path)
    before = path.read_bytes()
    assert not script.use_02(path, {"IMAGES": images}, 43)
    out = capsys.readouterr().out
    assert out.startswith(f"Training from scratch, because {path} does not fit: {HARMS[harm]}")
    assert out.count("\n") == 1, "one line"
    assert path.read_bytes() == before
    path.unlink()
    assert not script.use_02(path, {"IMAGES": images}, 43) and capsys.readouterr().out == ""


def test_without_a_network_of_02_it_trains_once(project, figures):
    """Here beside a damaged checkpoint of 02."""
    lay_images(project)
    theirs = project.folder_of(SCRIPT_02) / "checkpoint.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half a checkpo")
    project.prepare(SCRIPT, **SMALL_IMAGES)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Training from scratch, because" in done.stdout and "30/30" in done.stderr
    assert theirs.read_bytes() == b"half a checkpo"
    assert project.outputs(SCRIPT) == ["checkpoint.pt"] and set(figures) == FIGURES
    pixels = figures["interpolation.png"].axes[0].images[0].get_array().astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 100, "in colour"
    before = (project.folder_of(SCRIPT) / "checkpoint.pt").read_bytes()
    shown = figures["samples.png"].axes[0].images[0].get_array()
    # Other steps need no other training, and 02 is not asked any more.
    project.edit(SCRIPT, DDIM_STEPS=4, ETA=0.5)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "images/s" in again.stderr, again.stderr
    assert "from scratch" not in again.stdout
    assert (project.folder_of(SCRIPT) / "checkpoint.pt").read_bytes() == before
    assert figures["samples.png"].get_suptitle() == "DDIM, η = 0.5, 4 steps"
    assert not np.array_equal(shown, figures["samples.png"].axes[0].images[0].get_array())


def test_with_very_few_noise_steps(project, figures):
    lay_images(project)
    project.prepare(SCRIPT, T=2, DDIM_STEPS=1, **SMALL_IMAGES)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert set(figures) == FIGURES
