"""01_ddpm_toy.py as a person meets it: edit the constants, run the file, look at what it leaves."""

import re

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image

from utils.visualize import draw_digits

SCRIPT = "01_ddpm_toy.py"
FILES = ["denoising.gif", "denoising.png", "loss.png", "samples.png", "weights.pt"]
SMALL = {"T": 20, "BASE_CH": 8, "EPOCHS": 1, "BATCH_SIZE": 100}


def check_outputs(project):
    """Nothing missing, no temporary file left, and weights that are numbers."""
    assert project.outputs(SCRIPT) == FILES
    project.check_pictures(SCRIPT, others=["weights.pt"])
    folder = project.folder / "outputs" / "01_ddpm_toy"
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert all(torch.isfinite(w).all() for w in weights.values())
    return weights


def losses(output):
    """The mean losses of the beginning and of the end of training that the script prints."""
    found = re.search(r"Loss ([\d.]+) at first, ([\d.]+) at last", output)
    assert found, output
    return float(found[1]), float(found[2])


def lay_small_mnist(project, name="MNIST", count=600):
    project.lay_mnist(*draw_digits(count, seed=1), name)


def test_without_a_network_from_start_to_pictures(project):
    """MNIST cannot be had, and drawn digits take its place."""
    project.edit(SCRIPT, **{**SMALL, "T": 100})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "Going on with DRAWN digits" in line)
    assert "MNIST could be neither read" in line and str(project.folder) in line
    assert "20,000 images of DRAWN" in done.stdout
    assert str(project.folder) in done.stdout, "it says where the files are"
    assert "Training" in done.stderr and "images/s" in done.stderr and "loss=" in done.stderr
    assert "Sampling" in done.stderr and "100/100" in done.stderr
    first, last = losses(done.stdout)
    assert 0 < last < 0.5 * first
    weights = check_outputs(project)
    # What was saved can be loaded and is what sampled.
    model = load(SCRIPT).SimpleUNet(1, 8, torch.ones(100))
    model.load_state_dict(weights)


def test_drawn_digits_can_be_asked_for(tmp_path):
    images, labels, name = load(SCRIPT).load_images("DRAWN", tmp_path)
    assert images.shape == (20_000, 1, 28, 28) and labels.shape == (20_000,) and name == "DRAWN"
    assert images.dtype == torch.uint8 and not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_the_run_and_overwrites_nothing(project):
    lay_small_mnist(project, count=65)
    project.edit(SCRIPT, **{**SMALL, "T": 5})
    assert project.run_here(SCRIPT).returncode == 0
    folder = project.folder / "outputs" / "01_ddpm_toy"
    before = {name: (folder / name).read_bytes() for name in FILES}
    path = project.folder / SCRIPT
    text = path.read_text(encoding="utf-8")
    planted = "                loss = ddpm.loss(x_0)\n"
    assert text.count(planted) == 1
    nan = planted.replace("loss(x_0)", "loss(x_0) * (math.nan if len(losses) == 3 else 1)")
    path.write_text(text.replace(planted, nan), encoding="utf-8")
    project.edit(SCRIPT, BATCH_SIZE=10)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "NaN or infinite" in done.stderr and "LEARNING_RATE = 0.02" in done.stderr
    assert {name: (folder / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST"])
def test_a_chosen_data_set_is_never_replaced(project, name):
    project.edit(SCRIPT, DATASET=name, **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert name in done.stderr and "DRAWN" in done.stderr and "data" in done.stderr
    assert project.outputs(SCRIPT) == []


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of CIFAR10" in done.stdout
    check_outputs(project)


def test_fashion_mnist(project):
    lay_small_mnist(project, "FashionMNIST")
    project.edit(SCRIPT, DATASET="FashionMNIST", **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "600 images of FashionMNIST" in done.stdout
    check_outputs(project)


@pytest.mark.parametrize(
    "constants",
    [
        {"T": 2},
        {"T": 150},
        {"BASE_CH": 1},
        {"BASE_CH": 20},
        {"BATCH_SIZE": 1, "BASE_CH": 4},
        {"BATCH_SIZE": 999},
        {"BATCH_SIZE": 7, "LEARNING_RATE": 1e-4, "SEED": 5},
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, constants):
    lay_small_mnist(project, count=65)
    project.edit(SCRIPT, **{**SMALL, "T": 5, **constants})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    check_outputs(project)


def test_same_seed_same_pictures_other_seed_other_pictures(project):
    lay_small_mnist(project, count=200)
    pixels = []
    for seed in (0, 0, 1):
        project.edit(SCRIPT, SEED=seed, **{**SMALL, "T": 5})
        assert project.run_here(SCRIPT).returncode == 0
        path = project.folder / "outputs" / "01_ddpm_toy" / "samples.png"
        pixels.append(np.asarray(Image.open(path).convert("L"))[100:-100])
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_folders_can_be_changed_to_plain_strings(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    lay_small_mnist(project, count=65)
    (project.folder / "data").rename(project.folder / "images")
    project.edit(SCRIPT, DATA_DIR="images", OUT_DIR="my pictures/today", **{**SMALL, "T": 5})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "65 images of MNIST" in done.stdout
    assert sorted(p.name for p in (project.folder / "my pictures/today").iterdir()) == FILES


def test_a_damaged_file_is_named(project):
    lay_small_mnist(project, "FashionMNIST", count=65)
    file = project.folder / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    project.edit(SCRIPT, DATASET="FashionMNIST", **SMALL)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "FashionMNIST" in done.stderr and "delete them: they are damaged" in done.stderr
    assert len(file.read_bytes()) == 1000, "a person's file is left alone"
    assert project.outputs(SCRIPT) == []
