"""Every constant of every script: nonsense ends at once, with one line that names it."""

import ast
import math
import time

import pytest
from conftest import load, scripts

NOT_TO_BE_SET = {"ON_GPU", "ROOT"}  # as the comments beside them say
NONSENSE = -1, None, "nonsense", 2.5, [], {}, True
FOR_NUMBERS = 10**9, -0.5
MORE_NONSENSE = {
    "DATASET": ["MNITS", "mnist", ("MNIST",)],
    "T": [0, 1],
    "SCHEDULE": ["sine"],
    "BASE_CH": [0, "32"],
    "CHANNEL_MULT": [(), (1, 0), (1, "2"), 2, (1, 2, 2, 2, 2, 2)],
    "NUM_BLOCKS": [0],
    "ATTENTION_AT": [14, (-1,), "14", (7.5,)],
    "DROPOUT": [1.0],
    "FLIP": [0, 1],
    "EPOCHS": [0],
    "BATCH_SIZE": [0],
    "LEARNING_RATE": [0, 2.0],
    "EMA_DECAY": [1.0],
    "PREVIEW_EVERY": [0],
    "COMPILE": [0],
    "P_UNCOND": [0, 1.0],
    "DDIM_STEPS": [0, 1001],
    "ETA": [1.5],
    "LATENT_CH": [0],
    "VAE_CH": [0],
    "VAE_EPOCHS": [0],
    "KL_WEIGHT": [1000],
}
SENSE = {  # what of NONSENSE and FOR_NUMBERS makes sense for some
    "FLIP": (True,),
    "COMPILE": (True,),
    "DATA_DIR": ("nonsense",),
    "OUT_DIR": ("nonsense",),
    "OUT_DIR_02": ("nonsense",),
    "GUIDANCE_SCALE": (2.5,),
    "KL_WEIGHT": (2.5,),
    "SEED": (10**9,),
}


def constants(path):
    """The names in capitals that a script's first section defines, with their values."""
    text = path.read_text(encoding="utf-8").split("# %% 2. ")[0]
    found = [n.targets[0].id for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    module = load(path.name)
    return {n: getattr(module, n) for n in found if n.isupper() and n not in NOT_TO_BE_SET}


@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_nonsense_ends_at_once_with_one_line_that_names_it(project, path):
    original = (project.folder / path.name).read_text(encoding="utf-8")
    found = constants(path)
    assert {"DATASET", "BASE_CH", "EPOCHS", "BATCH_SIZE", "T", "SEED", "OUT_DIR"} <= set(found)
    tried = 0
    for name, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        values = [*NONSENSE, *MORE_NONSENSE.get(name, []), *(FOR_NUMBERS if is_number else [])]
        for nonsense in values:
            if any(nonsense is sense for sense in SENSE.get(name, ())):
                continue
            (project.folder / path.name).write_text(original, encoding="utf-8")
            project.edit(path.name, **{name: nonsense})
            start = time.monotonic()
            done = project.run_here(path.name)
            assert time.monotonic() - start < 1
            lines = done.stderr.strip().splitlines()
            assert done.returncode == 1 and len(lines) == 1, (name, nonsense, done.stderr)
            assert lines[0].startswith(f"{name} = {nonsense!r} "), lines[0]
            assert "must" in lines[0] or "is not" in lines[0] or "cannot" in lines[0], lines[0]
            tried += 1
    assert tried > 70
    assert not (project.folder / "data").exists() and not (project.folder / "outputs").exists()


@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_numbers_that_are_none_are_refused(path):
    check_setting = load(path.name).check_setting
    for value in math.nan, math.inf, -math.inf:
        with pytest.raises(SystemExit, match=r"LEARNING_RATE = .* must be a number, 1e-07 to 1"):
            check_setting("LEARNING_RATE", value, (int, float), 1e-7, 1)
    check_setting("LEARNING_RATE", 1, (int, float), 1e-7, 1)


@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(project, path):
    (project.folder / "a file").write_text("precious", encoding="utf-8")
    project.edit(path.name, OUT_DIR="a file/outputs")
    script = str(project.folder / "a file")
    project.edit(path.name, OUT_DIR=f"{script}/outputs")
    done = project.run_here(path.name)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"OUT_DIR = '{script}/outputs' does not work: "), done.stderr
    assert (project.folder / "a file").read_text(encoding="utf-8") == "precious"
    assert not (project.folder / "data").exists()
