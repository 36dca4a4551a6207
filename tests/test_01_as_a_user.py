"""01_ddpm_toy.py as a person meets it: edit the constants, run the file, look at what it leaves."""

import re

import numpy as np
import pytest
import torch
from conftest import PICTURES, ctrl_c, load

from utils import visualize
from utils.visualize import draw_digits, save_results

SCRIPT = "01_ddpm_toy.py"
FILES = [*PICTURES, "task.png", "weights.pt"]


@pytest.fixture
def notes(monkeypatch):
    """Collects the notes below the figures."""
    found = []

    def noting(folder, samples, frames, losses, note):
        found.append(note)
        save_results(folder, samples, frames, losses, note)

    monkeypatch.setattr(visualize, "save_results", noting)
    return found


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Has 600 digits drawn instead of 20,000, to save time."""
    monkeypatch.setattr(visualize, "draw_digits", lambda: draw_digits(600))


def check(project, done):
    """Nothing is missing, nothing else is there; return the weights, all of them numbers."""
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == FILES
    weights = project.state(SCRIPT, "weights.pt")
    assert all(torch.isfinite(w).all() for w in weights.values())
    return weights


def test_without_a_network_from_start_to_pictures(project, real_figures, notes):
    """MNIST cannot be downloaded, and drawn digits replace it, in name too."""
    (project.folder / "data").mkdir()  # remains empty
    project.prepare(SCRIPT, T=60, BASE_CH=8, EPOCHS=3)
    done = project.run_here(SCRIPT)
    weights = check(project, done)
    project.check_pictures(SCRIPT, others=["weights.pt"])
    first, second, *_, last = done.stdout.splitlines()
    assert first.startswith("MNIST could be neither read from 'data' nor downloaded: ")
    assert second.startswith("Training with 600 images of DRAWN on "), "the first is one line"
    assert second.endswith("outputs/01_ddpm_toy") and "outputs/01_ddpm_toy" in last
    assert "1800/1800" in done.stderr and "60/60" in done.stderr, "two bars, to the end"
    losses = [float(loss) for loss in re.findall(r"loss=([\d.]+)", done.stderr)]
    assert 0 < losses[-1] < 0.6 < losses[0] < 1.5
    assert len(notes) == 1 and notes[0].startswith("DRAWN, ") and "MNIST" not in notes[0]
    assert "90 training steps" in notes[0]
    # The saved weights can be loaded, as the README does, and sample.
    toy = load(SCRIPT)
    model = toy.SimpleUNet(1, 8)
    model.load_state_dict(weights)
    ddpm = toy.SimpleDDPM(model, toy.linear_beta_schedule(60), (1, 28, 28), "cpu")
    assert ddpm.sample(n=2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST", "MINST"])
def test_a_chosen_dataset_is_never_replaced(project, name):
    """Neither one that cannot be downloaded nor one that does not exist."""
    project.edit(SCRIPT, DATASET=name)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "Training" not in done.stderr
    line, *more = done.stdout.splitlines()
    assert line.startswith(f"{name} could be neither read from 'data' nor downloaded: ")
    assert not more, "one line is enough"
    assert not (project.folder / "outputs").exists()


def test_fashion_mnist_damaged_and_intact(project, notes):
    project.lay_mnist(*draw_digits(65, seed=1), "FashionMNIST")
    file = project.folder / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    intact = file.read_bytes()
    file.write_bytes(intact[:1000])
    project.prepare(SCRIPT, DATASET="FashionMNIST")
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert done.stdout.startswith("FashionMNIST could be neither read from 'data' nor downloaded")
    assert "Traceback" not in done.stderr
    assert file.read_bytes() == intact[:1000], "left alone"
    assert not (project.folder / "outputs").exists()
    file.write_bytes(intact)
    done = project.run_here(SCRIPT)
    check(project, done)
    assert "65 images of FashionMNIST" in done.stdout and notes[0].startswith("FashionMNIST, ")


def test_cifar10(project, notes):
    project.lay_cifar10(100)
    project.prepare(SCRIPT, DATASET="CIFAR10")
    done = project.run_without_md5(SCRIPT)
    assert check(project, done)["conv_in.weight"].shape[1] == 3, "it learns colours"
    assert "100 images of CIFAR10" in done.stdout and notes[0].startswith("CIFAR10, ")


@pytest.mark.parametrize(
    ("constants", "steps"),
    [
        ({"T": 12, "BASE_CH": 20}, 3),
        ({"T": 3, "BATCH_SIZE": 1, "BASE_CH": 1}, 43),
        ({"BATCH_SIZE": 999, "EPOCHS": 2, "LEARNING_RATE": 1e-4, "SEED": 5}, 2),
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, notes, constants, steps):
    project.prepare(SCRIPT, **constants)
    check(project, project.run_here(SCRIPT))
    assert f"{steps} training steps" in notes[0]
    for name in constants.keys() & {"T", "BASE_CH", "SEED"}:
        assert f"{name} = {constants[name]}" in notes[0]


def test_same_seed_same_pictures_other_seed_other_pictures(project, figures):
    pictures, weights = [], []
    for seed in (0, 0, 1):
        project.prepare(SCRIPT, SEED=seed)
        assert project.run_here(SCRIPT).returncode == 0
        pictures.append(figures["samples.png"].axes[0].images[0].get_array())
        state = project.state(SCRIPT, "weights.pt")
        weights.append(torch.cat([w.flatten() for w in state.values()]))
    assert np.array_equal(pictures[0], pictures[1]) and torch.equal(weights[0], weights[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("prefix", ["", "~/"])
def test_folders_can_be_changed(project, tmp_path, monkeypatch, prefix):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    folders = {"DATA_DIR": f"{prefix}images", "OUT_DIR": f"{prefix}my pictures/today"}
    project.prepare(SCRIPT, **folders)
    base = home if prefix else project.folder
    (project.folder / "data").rename(base / "images")
    before = {p.name for p in project.folder.iterdir()}
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "43 images of MNIST" in done.stdout and "my pictures/today" in done.stdout
    assert sorted(p.name for p in (base / "my pictures/today").iterdir()) == FILES
    new = {p.name for p in project.folder.iterdir()} - before
    assert new == (set() if prefix else {"my pictures"}), "nothing anywhere else"


@pytest.mark.parametrize("step", [1, 3])
def test_ctrl_c_in_training_samples_with_what_was_learned(project, notes, step):
    """Also in the first step, which can take long: some devices compile their kernels then."""
    (project.folder / "data").mkdir()  # remains empty
    project.prepare(SCRIPT, DATASET="DRAWN")
    with ctrl_c(step):
        done = project.run_here(SCRIPT)
    check(project, done)
    assert "Training ended early" in done.stdout and ": samples.png, denoising.png" in done.stdout
    assert "600 images of DRAWN" in done.stdout and f"{step - 1} training steps" in notes[0]
    assert "5/5" in done.stderr and "Traceback" not in done.stderr
