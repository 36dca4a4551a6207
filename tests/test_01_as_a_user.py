"""01_ddpm_toy.py as a person meets it: edit the constants, run the file, look at what it leaves."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import load, wait_for
from PIL import Image

from utils import visualize

SCRIPT = "01_ddpm_toy.py"
FILES = ["denoising.gif", "denoising.png", "loss.png", "samples.png", "weights.pt"]
SMALL = {"T": 5, "BASE_CH": 4, "EPOCHS": 1, "BATCH_SIZE": 20}
draw_digits, save_results = visualize.draw_digits, visualize.save_results


@pytest.fixture
def notes(monkeypatch):
    """Collects what stands below the figures."""
    found = []

    def noting(folder, samples, frames, losses, note):
        found.append(note)
        save_results(folder, samples, frames, losses, note)

    monkeypatch.setattr(visualize, "save_results", noting)
    return found


@pytest.fixture
def few_digits(monkeypatch):
    """Has 600 digits drawn instead of 20,000, to save time."""
    monkeypatch.setattr(visualize, "draw_digits", lambda: draw_digits(600))


def check_outputs(project):
    """Nothing missing, nothing else there, and weights that are numbers."""
    assert project.outputs(SCRIPT) == FILES
    project.check_pictures(SCRIPT, others=["weights.pt"])
    weights = read_weights(project)
    assert all(torch.isfinite(w).all() for w in weights.values())
    return weights


def read_weights(project):
    path = project.folder / "outputs" / "01_ddpm_toy" / "weights.pt"
    return torch.load(path, weights_only=True)


def lay_small_mnist(project, name="MNIST", count=65):
    project.lay_mnist(*draw_digits(count, seed=1), name)


def test_without_a_network_from_start_to_pictures(project, few_digits, notes):
    """MNIST cannot be had, and drawn digits take its place, in name too."""
    project.edit(SCRIPT, **{**SMALL, "T": 60, "BASE_CH": 8, "EPOCHS": 3})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    first, second, *_, last = done.stdout.splitlines()
    assert first.startswith("MNIST could be neither read from 'data' nor downloaded: ")
    assert second.startswith("Training with 600 images of DRAWN on "), "the first is one line"
    assert second.endswith("outputs/01_ddpm_toy") and "outputs/01_ddpm_toy" in last
    assert "1800/1800" in done.stderr and "60/60" in done.stderr, "two bars, to the end"
    losses = [float(loss) for loss in re.findall(r"loss=([\d.]+)", done.stderr)]
    assert 0 < losses[-1] < 0.6 < losses[0] < 1.5
    assert len(notes) == 1 and notes[0].startswith("DRAWN, ") and "MNIST" not in notes[0]
    assert "90 training steps" in notes[0]
    # What was saved can be loaded, as the README does, and samples.
    weights = check_outputs(project)
    toy = load(SCRIPT)
    model = toy.SimpleUNet(1, 8)
    model.load_state_dict(weights)
    ddpm = toy.SimpleDDPM(model, toy.linear_beta_schedule(60), (1, 28, 28), "cpu")
    assert ddpm.sample(n=2).shape == (2, 1, 28, 28)


def test_drawn_digits_can_be_asked_for(tmp_path, capsys):
    images, name = load(SCRIPT).load_images("DRAWN", str(tmp_path))
    assert images.shape == (20_000, 1, 28, 28) and images.dtype == torch.uint8 and name == "DRAWN"
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST", "MINST"])
def test_a_chosen_dataset_is_never_replaced(project, few_digits, name):
    """Neither one that cannot be had nor one that does not exist."""
    project.edit(SCRIPT, DATASET=name, **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "Training" not in done.stderr
    line, *more = done.stdout.splitlines()
    assert line.startswith(f"{name} could be neither read from 'data' nor downloaded: ")
    assert not more, "one line is enough"
    assert not (project.folder / "outputs").exists()


def test_a_damaged_file_is_left_alone(project, few_digits):
    lay_small_mnist(project, "FashionMNIST")
    file = project.folder / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    project.edit(SCRIPT, DATASET="FashionMNIST", **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert done.stdout.startswith("FashionMNIST could be neither read from 'data' nor downloaded")
    assert "Traceback" not in done.stderr
    assert len(file.read_bytes()) == 1000
    assert not (project.folder / "outputs").exists()


def test_cifar10(project, notes):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of CIFAR10" in done.stdout and notes[0].startswith("CIFAR10, ")
    assert check_outputs(project)["conv_in.weight"].shape[1] == 3, "it learns colours"


def test_fashion_mnist(project, notes):
    lay_small_mnist(project, "FashionMNIST")
    project.edit(SCRIPT, DATASET="FashionMNIST", **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "65 images of FashionMNIST" in done.stdout and notes[0].startswith("FashionMNIST, ")
    check_outputs(project)


@pytest.mark.parametrize(
    ("constants", "steps"),
    [
        ({"T": 40, "BASE_CH": 20}, 4),
        ({"T": 3, "BATCH_SIZE": 1, "BASE_CH": 1}, 65),
        ({"BATCH_SIZE": 999, "EPOCHS": 2}, 2),
        ({"BATCH_SIZE": 7, "LEARNING_RATE": 1e-4, "SEED": 5}, 10),
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, notes, constants, steps):
    lay_small_mnist(project)
    project.edit(SCRIPT, **{**SMALL, **constants})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    check_outputs(project)
    assert f"{steps} training steps" in notes[0]
    for name in constants.keys() & {"T", "BASE_CH", "SEED"}:
        assert f"{name} = {constants[name]}" in notes[0]


def test_same_seed_same_pictures_other_seed_other_pictures(project):
    lay_small_mnist(project)
    pictures, weights = [], []
    for seed in (0, 0, 1):
        project.edit(SCRIPT, SEED=seed, **SMALL)
        assert project.run_here(SCRIPT).returncode == 0
        path = project.folder / "outputs" / "01_ddpm_toy" / "samples.png"
        pictures.append(np.asarray(Image.open(path).convert("L"))[100:-100])  # without the note
        weights.append(torch.cat([w.flatten() for w in read_weights(project).values()]))
    assert np.array_equal(pictures[0], pictures[1]) and torch.equal(weights[0], weights[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", ["relative", "absolute", "home"])
def test_folders_can_be_changed(project, few_digits, tmp_path, monkeypatch, kind):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    base = {"relative": project.folder, "absolute": tmp_path / "elsewhere", "home": home}[kind]
    prefix = {"relative": "", "absolute": f"{base}/", "home": "~/"}[kind]
    lay_small_mnist(project)
    base.mkdir(exist_ok=True)
    (project.folder / "data").rename(base / "images")
    before = {p.name for p in project.folder.iterdir()}
    folders = {"DATA_DIR": f"{prefix}images", "OUT_DIR": f"{prefix}my pictures/today"}
    project.edit(SCRIPT, **folders, **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "65 images of MNIST" in done.stdout and "my pictures/today" in done.stdout
    assert sorted(p.name for p in (base / "my pictures/today").iterdir()) == FILES
    new = {p.name for p in project.folder.iterdir()} - before
    assert new == ({"my pictures"} if kind == "relative" else set()), "nothing anywhere else"


def test_ctrl_c_in_training_samples_with_what_was_learned(project):
    lay_small_mnist(project, count=600)
    project.edit(SCRIPT, **{**SMALL, "EPOCHS": 10_000})
    process = project.start(SCRIPT)
    try:
        wait_for(process, "loss=")
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Training ended early" in out and "Saved samples.png" in out
    assert "5/5" in err and "Traceback" not in out + err
    check_outputs(project)


def test_ctrl_c_in_the_very_first_step_ends_well_too(project, few_digits, monkeypatch):
    """That step can take long: some devices compile their kernels then."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", interrupted)
    project.edit(SCRIPT, DATASET="DRAWN", **SMALL)
    try:
        done = project.run_here(SCRIPT)
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C ended everything")  # instead of ending pytest too
    assert done.returncode == 0, done.stderr
    assert "Training ended early" in done.stdout
