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
    "BASE_CH": 8,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
}


def folder_of(project):
    return project.folder / "outputs" / "04_ddim_fast_sampling"


def prepare(project, **constants):
    project.lay_mnist(*draw_digits(100, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def train_02(path, dataset="MNIST", shape=(1, 28, 28), T=7, steps=2):
    """Leave a checkpoint of 02 whose network is not the one of SMALL; return its sampler."""
    two = load("02_ddpm.py")
    settings = two.check_settings({**vars(two), "DATA_DIR": "data", "OUT_DIR": path.parent})
    settings |= {"DATASET": dataset, "IMAGE_SHAPE": shape, "T": T, "SCHEDULE": "linear"}
    settings |= {"BASE_CH": 4, "CHANNEL_MULT": (1, 1), "NUM_BLOCKS": 1, "ATTENTION_AT": (7,)}
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
def without_pictures(monkeypatch):
    """Saves most of the time, where the pictures do not matter."""
    monkeypatch.setattr(visualize, "_save", lambda fig, path: path)
    monkeypatch.setattr(visualize, "_save_gif", lambda *_, **__: None)


def test_from_start_to_pictures_and_again(project):
    prepare(project, T=20, DDIM_STEPS=7, PREVIEW_EVERY=1e-9)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    previews = [f"samples_step_{step:06}.png" for step in (1, 2, 3)]
    assert project.outputs(SCRIPT) == sorted([*FILES, *previews])
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    # The table names each sampler with its calls, seconds and speed-up.
    rows, calls = calls_and_speeds(done)
    assert calls == [20, *(10, 15, 20) * 3]
    assert all(float(row[-3]) > 0 for row in rows) and float(rows[0][-2]) == 1.0
    assert "DDPM" in rows[0] and "DPM-Solver++(2M)" in rows[-1]
    # Other steps need no other training, and give other pictures. What 02 has is of no use now.
    names = "checkpoint.pt", "samples.png", "inversion.png"
    before = [(folder_of(project) / name).read_bytes() for name in names]
    train_02(project.folder / "outputs" / "02_ddpm" / "checkpoint.pt")
    project.edit(SCRIPT, DDIM_STEPS=10, ETA=1.0)
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "step 4 of 4" in again.stdout, again.stderr
    after = [(folder_of(project) / name).read_bytes() for name in names]
    assert [a == b for a, b in zip(before, after)] == [True, False, True]


def test_the_network_of_02_is_used_whatever_it_looks_like(project):
    prepare(project)
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    ddpm = train_02(theirs)
    before = theirs.read_bytes()
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Using the network in" in done.stdout and "02_ddpm" in done.stdout
    assert "Training" not in done.stdout + done.stderr
    assert theirs.read_bytes() == before
    assert project.outputs(SCRIPT) == [name for name in FILES if name != "checkpoint.pt"]
    assert calls_and_speeds(done)[1][0] == 7, "its T, not that of 04"
    # It is 02's network, to the last bit.
    ddim = load(SCRIPT).load(theirs)
    for name, weight in ddpm.model.state_dict().items():
        assert torch.equal(ddim.model.state_dict()[name], weight), name
    samples = []
    for sampler in ddpm, ddim:
        torch.manual_seed(1)
        samples.append(sampler.sample(2))
    assert torch.equal(*samples) and ddim.ddim_sample(2, 3).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("harm", ["damage", "another dataset", "another size", "no checkpoint"])
def test_what_of_02_does_not_fit_is_left_alone(tmp_path, capsys, harm):
    script, path = load(SCRIPT), tmp_path / "checkpoint.pt"
    source, shape = "photos/", [3, 16, 16]
    train_02(path, source, tuple(shape))
    capsys.readouterr()
    assert script.is_usable(path, source, shape) and capsys.readouterr().out == ""
    if harm == "damage":
        path.write_bytes(path.read_bytes()[:-200])
    elif harm == "another dataset":
        source, reason = "MNIST", "photos/"
    elif harm == "another size":
        shape = [3, 32, 32]
    else:
        path.write_bytes(b"")
        torch.save({"of": "another program"}, path)
    before = path.read_bytes()
    assert not script.is_usable(path, source, shape)
    out = capsys.readouterr().out
    assert out.startswith(f"Training from scratch, because {path} does not fit: ")
    assert out.count("\n") == 1, "one line"
    assert harm != "another dataset" or reason in out
    assert path.read_bytes() == before
    path.unlink()
    assert not script.is_usable(path, source, shape) and capsys.readouterr().out == ""


def test_a_damaged_checkpoint_of_02_does_not_stop_04(project, without_pictures):
    prepare(project)
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half a checkpo")
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Training from scratch, because" in done.stdout and "200/200" in done.stderr
    assert theirs.read_bytes() == b"half a checkpo"
    assert project.outputs(SCRIPT) == ["checkpoint.pt"]


def test_with_very_few_noise_steps(project):
    prepare(project, T=2, DDIM_STEPS=1, EPOCHS=1)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == FILES


def test_more_steps_than_there_are_end_at_once(project):
    prepare(project, T=5, DDIM_STEPS=6)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and "DDIM_STEPS = 6" in done.stderr
    assert "Training" not in done.stderr and project.outputs(SCRIPT) == []


def test_cifar10_in_colour(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    with Image.open(folder_of(project) / "interpolation.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 20, "in colour"
