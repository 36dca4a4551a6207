"""04_ddim_fast_sampling.py as a person meets it; what it shares with 02 is tested there."""

import re

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image

from utils import visualize
from utils.visualize import draw_digits

SCRIPT = "04_ddim_fast_sampling.py"
SOURCE = "a folder with spaces/my digits/"  # as load_dataset calls the folder in a Project
FILES = [
    "checkpoint.pt",
    "denoising.gif",
    "denoising.png",
    "interpolation.png",
    "inversion.png",
    "loss.png",
    "samplers.png",
    "samples.png",
    "speed.png",
    "transitions.gif",
]
SMALL = {
    "T": 5,
    "DDIM_STEPS": 3,
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 1, 1),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
    "DATASET": "my digits",
    "IMAGE_SIZE": 8,
}


def folder_of(project):
    return project.folder / "outputs" / "04_ddim_fast_sampling"


def prepare(project, **constants):
    """Lay red digits into a folder: small images, for all these samplers take their time."""
    (project.folder / "my digits").mkdir()
    for i, image in enumerate(draw_digits(100, seed=1)[0]):
        colour = np.stack([image, 0 * image, 0 * image], axis=2)
        Image.fromarray(colour).save(project.folder / "my digits" / f"{i:03}.png")
    project.edit(SCRIPT, **{**SMALL, **constants})


def train_02(path, dataset=SOURCE, shape=(3, 8, 8), T=7, steps=2):
    """Leave a checkpoint of 02 whose network is not the one of SMALL; return its sampler."""
    two = load("02_ddpm.py")
    settings = two.check_settings({**vars(two), "DATA_DIR": "data", "OUT_DIR": path.parent})
    del settings["DATA_DIR"], settings["OUT_DIR"]
    settings |= {"DATASET": dataset, "IMAGE_SHAPE": shape, "T": T, "SCHEDULE": "linear"}
    settings |= {"BASE_CH": 6, "CHANNEL_MULT": (1, 1), "NUM_BLOCKS": 1, "ATTENTION_AT": (4,)}
    settings |= {"EPOCHS": steps, "BATCH_SIZE": 8}
    torch.manual_seed(5)
    ddpm = two.DDPM.build({"settings": settings}, torch.device("cpu"))
    x_0 = torch.rand(8, *shape) * 2 - 1
    trainer = two.Trainer(
        ddpm.model, lambda index: ddpm.loss(x_0[index]), 8, settings, two.FIXED, path
    )
    list(trainer.run())
    return two.load(path)


def calls_and_speeds(done):
    """Network evaluations, seconds and speed-ups in the printed table."""
    rows = [line.split() for line in done.stdout.splitlines() if re.search(r"[0-9] x$", line)]
    return rows, [int(row[-4]) for row in rows]


@pytest.fixture
def figures(monkeypatch):
    """Pictures by name, kept instead of written: that saves most of the time."""
    kept = {}
    monkeypatch.setattr(visualize, "_save", lambda fig, path: kept.update({path.name: fig}))
    monkeypatch.setattr(visualize, "_save_gif", lambda *_, **__: None)
    return kept


def test_from_start_to_pictures_and_again(project):
    prepare(project, IMAGE_SIZE=16, T=10, DDIM_STEPS=7, PREVIEW_EVERY=1e-9)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    previews = [f"samples_step_{step:06}.png" for step in (1, 2, 3)]
    assert project.outputs(SCRIPT) == sorted([*FILES, *previews])
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    with Image.open(folder_of(project) / "interpolation.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 100, "in colour"
    # The table names each sampler with its calls, seconds and speed-up.
    rows, calls = calls_and_speeds(done)
    assert calls == [10, 10, 10, 10]
    assert all(float(row[-3]) > 0 for row in rows) and float(rows[0][-2]) == 1.0
    assert "DDPM" in rows[0] and "DPM-Solver++(2M)" in rows[-1]


def test_other_steps_need_no_other_training(project, figures):
    prepare(project)
    assert project.run_here(SCRIPT).returncode == 0
    before = (folder_of(project) / "checkpoint.pt").read_bytes()
    shown = [figures["samples.png"].axes[0].images[0].get_array()]
    # From now on what 02 has is of no use.
    train_02(project.folder / "outputs" / "02_ddpm" / "checkpoint.pt")
    project.edit(SCRIPT, DDIM_STEPS=4, ETA=1.0)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "step 4 of 4" in again.stdout, again.stderr
    assert (folder_of(project) / "checkpoint.pt").read_bytes() == before
    assert figures["samples.png"].get_suptitle() == "DDIM, η = 1, 4 steps"
    shown.append(figures["samples.png"].axes[0].images[0].get_array())
    assert shown[0].shape == shown[1].shape and not np.array_equal(*shown)


def test_the_network_of_02_is_used_whatever_it_looks_like(project, figures):
    prepare(project)
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    ddpm = train_02(theirs)
    before = theirs.read_bytes()
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Using the network in" in done.stdout and "02_ddpm" in done.stdout
    assert "Training" not in done.stdout + done.stderr
    assert theirs.read_bytes() == before
    assert project.outputs(SCRIPT) == [], "no checkpoint of its own"
    assert len(figures) == len(FILES) - 3, "but all pictures"
    assert calls_and_speeds(done)[1][0] == 7, "its T, not that of 04"
    # It is 02's network, to the last bit.
    ddim = load(SCRIPT).load(theirs)
    for name, weight in ddpm.model.state_dict().items():
        assert torch.equal(ddim.model.state_dict()[name], weight), name
    samples = []
    for sampler in ddpm, ddim:
        torch.manual_seed(1)
        samples.append(sampler.sample(2))
    assert torch.equal(*samples) and ddim.ddim_sample(2, 3).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("harm", ["damage", "another dataset", "another program"])
def test_what_of_02_does_not_fit_is_left_alone(tmp_path, capsys, harm):
    script, path = load(SCRIPT), tmp_path / "checkpoint.pt"
    train_02(path)
    capsys.readouterr()
    assert script.is_usable(path, SOURCE, (3, 8, 8)) and capsys.readouterr().out == ""
    if harm == "damage":
        path.write_bytes(path.read_bytes()[:-200])
    elif harm == "another program":
        torch.save({"of": "another program"}, path)
    source = "MNIST" if harm == "another dataset" else SOURCE
    before = path.read_bytes()
    assert not script.is_usable(path, source, (3, 8, 8))
    out = capsys.readouterr().out
    assert out.startswith(f"Training from scratch, because {path} does not fit: ")
    assert out.count("\n") == 1, "one line"
    assert harm != "another dataset" or SOURCE in out
    assert path.read_bytes() == before
    path.unlink()
    assert not script.is_usable(path, source, (3, 8, 8)) and capsys.readouterr().out == ""


def test_a_network_of_02_for_images_of_another_size_is_not_used(project, figures):
    prepare(project, EPOCHS=1)
    train_02(project.folder / "outputs" / "02_ddpm" / "checkpoint.pt", shape=(3, 16, 16))
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Training from scratch, because" in done.stdout
    assert load(SCRIPT).load(folder_of(project) / "checkpoint.pt").image_shape == (3, 8, 8)


def test_a_network_of_02_with_fewer_steps_than_ddim_is_to_take(project, figures):
    prepare(project, T=1000, DDIM_STEPS=50)
    train_02(project.folder / "outputs" / "02_ddpm" / "checkpoint.pt", T=7)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1, done.stderr
    assert "DDIM_STEPS = 50" in done.stderr.strip().splitlines()[-1]


def test_a_damaged_checkpoint_of_02_does_not_stop_04(project, figures):
    prepare(project)
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half a checkpo")
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Training from scratch, because" in done.stdout and "200/200" in done.stderr
    assert theirs.read_bytes() == b"half a checkpo"
    assert project.outputs(SCRIPT) == ["checkpoint.pt"]


def test_with_very_few_noise_steps(project, figures):
    prepare(project, T=2, DDIM_STEPS=1, EPOCHS=1)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert len(figures) == len(FILES) - 3, "all but the checkpoint and two animations"


def test_more_steps_than_there_are_end_at_once(project):
    prepare(project, T=5, DDIM_STEPS=6)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and "DDIM_STEPS = 6" in done.stderr
    assert "Training" not in done.stderr and project.outputs(SCRIPT) == []
