"""The constants at the head of 02 to 05: nonsense ends at once, with one line that names it."""

import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import EACH_STEP, inside, load, scripts

from utils import visualize

NAMES = [path.name for path in scripts()[1:]]
CHECKED = pytest.mark.parametrize("script", NAMES)
NONSENSE = -1, None, {"a": 1}, object, math.nan, 1e99
MORE_NONSENSE = {
    "IMAGE_SIZE BASE_CH NUM_BLOCKS BATCH_SIZE LATENT_CH VAE_CH": [0, 2.5, "32", (1,)],
    "T": [0, 1, 2.5, "5"],
    "SAMPLE_STEPS DDIM_STEPS": [0, 2.5, 1001],
    "DOWNSAMPLE": [0, 1, 2.5, 16],
    "SEED": [2.5, 2**63, "0"],
    "CHANNEL_MULT": [(), [], 0, (1, 0), (1, "2"), (1, 2000.5), "12"],
    "ATTENTION_AT": [0, (-1,), (7.5,), ((7,),), "7"],
    "EPOCHS VAE_EPOCHS SAVE_EVERY": [0, -0.5, math.inf, [], "1"],
    "LEARNING_RATE": [0, 2.0, math.inf, "0.02"],
    "DROPOUT EMA_DECAY P_UNCOND": [1.0, -0.5, ()],
    "GUIDANCE_SCALE KL_WEIGHT": [-0.5, math.inf, "3"],
    "ETA GUIDE_ABOVE GUIDE_BELOW": [1.5, -0.5],
    "FLIP COMPILE": [0, 1, "no"],
    "SCHEDULE": ["sine", 1, []],
    "OUT_DIR": [[], 2.5],
}
MORE_NONSENSE = {name: values for key, values in MORE_NONSENSE.items() for name in key.split()}


class Code(str):
    """Python code for Project.edit, which writes the repr of a value."""

    __repr__ = str.__str__


def constants(module):
    """The names in capitals that a script's first section defines, with their values."""
    head = Path(module.__file__).read_text(encoding="utf-8").split("# %% ")[1]
    names = re.findall(r"(?m)^([A-Z]\w*) = ", head)
    return {name: getattr(module, name) for name in names if name != "ON_GPU"}


@CHECKED
def test_nonsense_ends_with_one_line_that_names_it(tmp_path, script):
    module = load(script)
    found, accepted = constants(module), []
    limited = [name for names, *_ in module.LIMITS for name in names.split()]
    others = {"SCHEDULE", "OUT_DIR", "OUT_DIR_02", "DATASET", "DATA_DIR"}  # not in LIMITS
    assert sorted(limited) == sorted({*found} - others), "each is checked, once"
    with inside(tmp_path):
        for name in [*limited, "SCHEDULE", "OUT_DIR"]:
            for value in [*NONSENSE, *MORE_NONSENSE[name]]:
                try:
                    module.check({**found, name: value})
                except SystemExit as end:
                    allowed = ".+" if name == "OUT_DIR" else "(it must be|use one of) .+"
                    line = rf"{name} = {re.escape(repr(value))} does not work: {allowed}\."
                    assert re.fullmatch(line, end.code), end.code
                else:
                    accepted.append((name, value))
    assert accepted == []
    assert not any(tmp_path.iterdir()), "nothing is made before all constants are known to work"


@CHECKED
def test_the_checks_come_before_any_work(project, script):
    """Sampling takes at most T steps, whatever T is."""
    name = {"02": "T", "03": "SAMPLE_STEPS"}.get(script[:2], "DDIM_STEPS")
    project.edit(script, **{"T": 5, "EPOCHS": 1e-9, name: 1 if name == "T" else 6})
    done = project.run_here(script)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert re.match(rf"{name} = [16] does not work: it must be .+ (2|1 to 5)\b", done.stderr)
    assert not (project.folder / "data").exists() and not (project.folder / "outputs").exists()


def test_a_vae_of_other_sizes_is_refused_in_one_line(project):
    project.prepare(NAMES[-1], DOWNSAMPLE=3)
    done = project.run_here(NAMES[-1])
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("DOWNSAMPLE = 3 ") and project.outputs(NAMES[-1]) == []


@CHECKED
def test_numbers_of_numpy_become_plain_python(project, monkeypatch, figures, script):
    """Otherwise PyTorch would not read the checkpoint again."""
    project.prepare(script, SAVE_EVERY=EACH_STEP)
    plain = constants(load(project.folder / script))
    numbers = {n: v for n, v in plain.items() if not isinstance(v, str)}
    project.edit(script, **{n: Code(f"np.array({v!r})[()]") for n, v in numbers.items()})
    monkeypatch.setattr(visualize, "save_results", lambda *_: sys.exit(0))  # that is enough
    done = project.run_here(script)
    assert done.returncode == 0 and "samples_step_000001.png" in figures, done.stderr
    for file in project.outputs(script):
        settings = project.state(script, file)["settings"]
        for name, value in numbers.items():
            assert settings[name] == value and type(settings[name]) is type(value), name


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(project, monkeypatch):
    (project.folder / "a file").write_text("precious", encoding="utf-8")
    project.edit("02_ddpm.py", OUT_DIR="a file/outputs")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("OUT_DIR = 'a file/outputs' does not work: ")
    assert (project.folder / "a file").read_text(encoding="utf-8") == "precious"

    def read_only(dir):
        raise OSError(f"{dir} is read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    project.edit("02_ddpm.py", OUT_DIR="a")
    done = project.run_here("02_ddpm.py")
    assert done.stderr == "OUT_DIR = 'a' does not work: a is read-only.\n" and done.stdout == ""
    assert not (project.folder / "data").exists()


def test_the_interval_of_guidance_is_not_backwards(project):
    project.edit("03_conditional_ddpm.py", GUIDE_ABOVE=0.7, GUIDE_BELOW=0.3)
    done = project.run_here("03_conditional_ddpm.py")
    line = "GUIDE_BELOW = 0.3 does not work: it must be a number, 0.7 to 1.\n"
    assert done.stderr == line and not (project.folder / "outputs").exists()


def test_a_tilde_is_the_home_folder(project, tmp_path, monkeypatch, figures):
    """In the names of all folders; 04 has one more than the others."""
    home, of_04 = tmp_path / "home", "04_ddim_fast_sampling.py"
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(home))
    project.prepare("02_ddpm.py", DATA_DIR="~/data", OUT_DIR="~/a/b")
    home.mkdir()
    (project.folder / "data").rename(home / "data")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert "43 images of MNIST" in done.stdout and (home / "a" / "b" / "checkpoint.pt").exists()
    project.edit(of_04, DATA_DIR="~/data", OUT_DIR="~/c", OUT_DIR_02="~/a/b", DDIM_STEPS=2)
    monkeypatch.setattr(visualize, "save_results", lambda *_: sys.exit(0))  # that is enough
    done = project.run_here(of_04)
    assert done.returncode == 0 and (home / "c").is_dir(), done.stderr
    assert f"Using the network in {home / 'a' / 'b' / 'checkpoint.pt'}, " in done.stdout
    assert not any((project.folder / name).exists() for name in ("data", "outputs", "~"))


def test_python_without_asserts_does_the_same(project, monkeypatch, figures):
    """Compiled as by `python -O`, which would first compile all of PyTorch anew."""
    monkeypatch.setattr(runpy, "compile", partial(compile, optimize=1), raising=False)
    path, script = project.folder / NAMES[0], NAMES[0]
    project.prepare(script)
    path.write_text(path.read_text(encoding="utf-8") + "\nassert False\n", encoding="utf-8")
    done = project.run_here(script)
    assert done.returncode == 0, done.stderr
    assert project.state(script)["seen"] == 43 and "loss.png" in figures
    project.edit(script, T=1)
    done = project.run_here(script)
    assert done.returncode == 1 and done.stderr.startswith("T = 1 does not work: it must be ")
