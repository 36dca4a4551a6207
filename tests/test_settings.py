"""The constants at the head of 02 to 05: nonsense ends at once, with one line that names it."""

import ast
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside, load, scripts

import utils.interpolation
import utils.visualize
from utils.visualize import draw_digits

CHECKED = scripts()[1:]  # 01 leaves its constants to PyTorch
NONSENSE = -1, None, [], {"a": 1}, object, math.nan
MORE_NONSENSE = {
    "IMAGE_SIZE": [0, "32", 2.5, math.inf],
    "T": [0, 1, 2.5, "1000"],
    "SCHEDULE": ["sine", 1],
    "BASE_CH": [0, "32", 2.5],
    "CHANNEL_MULT": [(), (1, 0), (1, "2"), 2, "12", (1, 2.5)],
    "NUM_BLOCKS": [0, 1.5],
    "ATTENTION_AT": [14, (-1,), "14", (7.5,)],
    "DROPOUT": [1.0, -0.5, "0"],
    "FLIP": [0, 1, "no"],
    "EPOCHS": [0, 2.5, math.inf],
    "BATCH_SIZE": [0, 2.5],
    "LEARNING_RATE": [0, 2.0, "0.02", math.inf],
    "EMA_DECAY": [1.0, -0.5],
    "SAVE_EVERY": [0, -0.5, "1"],
    "PREVIEW_EVERY": [0, -0.5, "1"],
    "COMPILE": [0, 1],
    "SEED": [2.5, "0"],
    "P_UNCOND": [0, 1.0, -0.5],
    "GUIDANCE_SCALE": [-0.5, math.inf, "3"],
    "SAMPLE_STEPS": [0, 2.5],
    "DDIM_STEPS": [0, 2.5],
    "ETA": [1.5, -0.5],
    "LATENT_CH": [0, 2.5],
    "VAE_CH": [0, 2.5],
    "VAE_EPOCHS": [0, 2.5],
    "KL_WEIGHT": [1000, -0.5],
}
SENSE = {"ATTENTION_AT": [[]]}  # what of NONSENSE makes sense for some
SMALL = {
    "T": 5,
    "SAMPLE_STEPS": 2,
    "DDIM_STEPS": 2,
    "BASE_CH": 4,
    "VAE_CH": 4,
    "ATTENTION_AT": (7,),
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "VAE_EPOCHS": 1,
    "EPOCHS": 1,
    "BATCH_SIZE": 60,
}


class Code(str):
    """Python code for Project.edit, which writes the repr of a value."""

    __repr__ = str.__str__


def constants(path):
    """The names in capitals that a script's first section defines, with their values."""
    text = path.read_text(encoding="utf-8").split("# %% 2. ")[0]
    found = [n.targets[0].id for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    module = load(path.name)
    return {n: getattr(module, n) for n in found if n.isupper() and n != "ON_GPU"}


def prepare(project, script, **others):
    """Lay out 65 digits as MNIST and make the script small; others: constants, if it has them."""
    project.lay_mnist(*draw_digits(65, seed=1))
    found = constants(project.folder / script)
    values = {**SMALL, **others}
    project.edit(script, **{name: value for name, value in values.items() if name in found})


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_nonsense_ends_with_one_line_that_names_it(tmp_path, path):
    module, found = load(path.name), constants(path)
    assert set(found) == {n for names, _, _ in module.CHECKS for n in names.split()}
    accepted, start = [], time.monotonic()
    with inside(tmp_path):
        for name in found:
            for value in [*NONSENSE, *MORE_NONSENSE.get(name, [])]:
                if value in SENSE.get(name, []):
                    continue
                try:
                    module.check_settings({**found, name: value})
                except SystemExit as end:
                    shown = "|".join(re.escape(repr(v)) for v in (value, ()))  # [] may become ()
                    expected = rf"{name} = ({shown}) does not work: it must be .+\."
                    assert re.fullmatch(expected, end.code), end.code
                else:
                    accepted.append((name, value))
    assert accepted == []
    assert not any(tmp_path.iterdir()), "nothing is made before all constants are known to work"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_the_checks_come_before_any_work(project, path):
    """Also of what only fits or does not fit together with another constant."""
    project.edit(path.name, EPOCHS=0)
    done = project.run_here(path.name)
    assert done.returncode == 1
    assert done.stderr == "EPOCHS = 0 does not work: it must be a whole number from 1.\n"
    assert not (project.folder / "data").exists() and not (project.folder / "outputs").exists()
    assert done.stdout == ""
    prepare(project, path.name, CHANNEL_MULT=(1, 2, 2, 2, 2))
    done = project.run_here(path.name)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"CHANNEL_MULT = .* halves .* too often: shorten it\.", done.stderr)


@pytest.mark.parametrize("path", CHECKED[1:], ids=lambda p: p.name)
def test_more_steps_of_sampling_than_t_are_refused_before_the_training(project, path):
    name = "SAMPLE_STEPS" if path.name[:2] == "03" else "DDIM_STEPS"
    prepare(project, path.name, **{name: 6})
    done = project.run_here(path.name)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name} = 6 ")
    assert "checkpoint.pt" not in project.outputs(path.name)


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_numpy_becomes_plain_python(tmp_path, path):
    module, found = load(path.name), constants(path)
    given = dict(found)
    for name, value in found.items():
        if isinstance(value, bool | int | float | tuple):
            given[name] = np.array(value)[()]  # a scalar of NumPy; of a tuple an array
    assert isinstance(given["BATCH_SIZE"], np.integer)
    with inside(tmp_path):
        settings = module.check_settings(given)
    for name, value in found.items():
        if "_DIR" not in name:
            assert settings[name] == value and type(settings[name]) is type(value), name


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_a_run_with_numbers_of_numpy_leaves_a_readable_checkpoint(project, monkeypatch, path):
    """With previews, but without drawing what they and the figures would show."""
    drawn = []
    for name in {*utils.visualize.__all__} - {"draw_digits"}:
        monkeypatch.setattr(utils.visualize, name, lambda *_, name=name, **__: drawn.append(name))
    monkeypatch.setattr(utils.interpolation, "transition_gif", lambda *_: None)
    numbers = {
        "LEARNING_RATE": Code("np.float64(0.02)"),
        "BATCH_SIZE": Code("np.int64(60)"),
        "CHANNEL_MULT": Code("np.array([1, 2])"),
        "T": Code("np.int64(5)"),
        "SEED": Code("np.int64(0)"),
        "PREVIEW_EVERY": Code("np.float64(1e-9)"),
        "GUIDANCE_SCALE": Code("np.float32(2.0)"),
        "SAMPLE_STEPS": Code("np.int64(2)"),
        "DDIM_STEPS": Code("np.int64(2)"),
        "ETA": Code("np.float32(0.5)"),
        "LATENT_CH": Code("np.int64(4)"),
        "VAE_CH": Code("np.int64(4)"),
        "VAE_EPOCHS": Code("np.int64(1)"),
        "KL_WEIGHT": Code("np.float64(0.002)"),
    }
    prepare(project, path.name, EPOCHS=Code("np.int64(2)"), **numbers)
    done = project.run_here(path.name)
    assert done.returncode == 0, done.stderr
    assert "sample_grid" in drawn and "save_results" in drawn, "the preview, the end"
    for name in project.outputs(path.name):
        if name.endswith(".pt"):
            file = project.folder / "outputs" / path.stem / name
            settings = torch.load(file, weights_only=True)["settings"]
            assert settings["LEARNING_RATE"] == 0.02 and type(settings["BATCH_SIZE"]) is int
    project.edit(path.name, CHANNEL_MULT=(1, 2), T=5, BATCH_SIZE=60, LEARNING_RATE=0.01)
    again = project.run_here(path.name)
    assert again.returncode == 0, again.stderr
    assert "checkpoint.pt, step 2 of 2." in again.stdout


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(project, path):
    (project.folder / "a file").write_text("precious", encoding="utf-8")
    project.edit(path.name, OUT_DIR="a file/outputs")
    done = project.run_here(path.name)
    assert done.returncode == 1
    file = repr(Path("a file/outputs"))
    expected = f"OUT_DIR = {file} does not work: it must be a folder in which files can be made.\n"
    assert done.stderr == expected
    assert (project.folder / "a file").read_text(encoding="utf-8") == "precious"
    assert not (project.folder / "data").exists()


@pytest.mark.parametrize("path", CHECKED, ids=lambda p: p.name)
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, path):
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(tmp_path))
    module = load(path.name)
    given = dict(constants(path))
    for name in given:
        if "_DIR" in name:
            given[name] = f"~/{name}"
    settings = module.check_settings(given)
    for name in given:
        if "_DIR" in name:
            assert settings[name] == tmp_path / name
    assert (tmp_path / "OUT_DIR").is_dir()


def test_a_run_with_all_folders_in_the_home_folder(project, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(home))
    prepare(project, "02_ddpm.py", OUT_DIR="~/results", DATA_DIR="~/data")
    (project.folder / "data").rename(home / "data")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert "65 images of MNIST" in done.stdout
    assert (home / "results" / "checkpoint.pt").exists() and (home / "results/loss.png").exists()
    assert not (project.folder / "outputs").exists() and not (project.folder / "~").exists()
