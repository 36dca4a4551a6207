"""04_ddim_fast_sampling.py as a person meets it; what it shares with 02 is tested there."""

import re
import shutil

import numpy as np
import torch
from conftest import load
from PIL import Image

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
    "T": 10,
    "DDIM_STEPS": 5,
    "BASE_CH": 8,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
    "PREVIEW_EVERY": 1,
}


def prepare(project, count=200, script=SCRIPT, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    values = {**SMALL, **constants}
    if script != SCRIPT:
        del values["DDIM_STEPS"]
    project.edit(script, **values)


def test_from_start_to_pictures(project):
    prepare(project, T=20, DDIM_STEPS=7)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == sorted([*FILES, "samples_epoch_001.png"])
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    # The table names each sampler with its calls, seconds and speed-up.
    rows = [line.split() for line in done.stdout.splitlines() if re.search(r"[0-9] x$", line)]
    assert [int(row[-4]) for row in rows] == [20, *(10, 15, 20) * 3]
    assert all(float(row[-3]) > 0 for row in rows) and float(rows[0][-2]) == 1.0
    assert "DDPM" in rows[0] and "DPM-Solver++(2M)" in rows[-1]


def test_the_training_of_02_is_used_where_the_settings_agree(project):
    prepare(project, script="02_ddpm.py", EPOCHS=1)
    assert project.run_here("02_ddpm.py").returncode == 0
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    before = theirs.read_bytes()
    prepare(project, EPOCHS=1)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert str(theirs) in done.stdout and "Epoch" not in done.stderr
    assert theirs.read_bytes() == before
    assert set(FILES) <= set(project.outputs(SCRIPT)), "with a checkpoint of its own"
    # Other steps need no other training, and give other pictures.
    folder = project.folder / "outputs" / "04_ddim_fast_sampling"
    files = [folder / name for name in ("checkpoint.pt", "samples.png")]
    checkpoint, samples = (file.read_bytes() for file in files)
    project.edit(SCRIPT, DDIM_STEPS=10, ETA=1.0)
    assert project.run_here(SCRIPT).returncode == 0
    assert files[0].read_bytes() == checkpoint and files[1].read_bytes() != samples


def test_what_of_02_does_not_fit_is_left_alone(tmp_path, capsys):
    script = load(SCRIPT)
    own, other = tmp_path / "04", tmp_path / "02"
    own.mkdir(), other.mkdir()
    theirs = other / "checkpoint.pt"
    script.save_atomically({"settings": {"SEED": 0}}, theirs)
    good = theirs.read_bytes()
    for contents, settings in (good, {"SEED": 1}), (good[:50], {"SEED": 0}):
        theirs.write_bytes(contents)
        script.adopt_checkpoint(own, other, settings, 0, 1)
        assert f"Training anew: {theirs} is damaged or has other" in capsys.readouterr().out
        assert theirs.read_bytes() == contents and not list(own.iterdir())
    theirs.write_bytes(good)
    script.adopt_checkpoint(own, other, {"SEED": 0}, 0, 1)
    assert torch.load(own / "checkpoint.pt", weights_only=True) == {"settings": {"SEED": 0}}


def test_an_unfinished_training_of_02_goes_on_in_a_file_of_its_own(project):
    prepare(project, script="02_ddpm.py")
    prepare(project)
    assert project.run_here("02_ddpm.py").returncode == 0
    theirs = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    finished = torch.load(theirs, weights_only=True)

    def interrupt():  # leave a checkpoint from the middle of the training
        shutil.rmtree(project.folder / "outputs")
        text = (project.folder / "02_ddpm.py").read_text(encoding="utf-8")
        text = text.replace("while self.step < self.total_steps", "while self.step < 4")
        (project.folder / "02_ddpm.py").write_text(text, encoding="utf-8")

    project.run_here("02_ddpm.py", interrupt)
    before = theirs.read_bytes()
    assert torch.load(theirs, weights_only=True)["step"] == 4
    done = project.run_here(SCRIPT)
    assert done.returncode == 0 and "Going on from step 4 of 8" in done.stdout, done.stderr
    assert theirs.read_bytes() == before
    own = project.folder / "outputs" / "04_ddim_fast_sampling" / "checkpoint.pt"
    ours = torch.load(own, weights_only=True)
    for name, weight in finished["averaged"].items():
        assert torch.equal(ours["averaged"][name], weight), name


def test_with_very_few_noise_steps(project):
    prepare(project, T=2, DDIM_STEPS=1)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert set(FILES) <= set(project.outputs(SCRIPT))


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    path = project.folder / "outputs" / "04_ddim_fast_sampling" / "interpolation.png"
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 20, "in colour"
