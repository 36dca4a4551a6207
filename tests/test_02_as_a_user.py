"""02_ddpm.py as a person meets it: run, stop, go on, share among processes, do something wrong."""

import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import wait_for
from PIL import Image

import utils.visualize
from utils.visualize import draw_digits

SCRIPT = "02_ddpm.py"
FILES = [
    "checkpoint.pt",
    "denoising.gif",
    "denoising.png",
    "loss.png",
    "loss_per_timestep.png",
    "samples.png",
]
SMALL = {
    "T": 5,
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 2, 4),
    "NUM_BLOCKS": 1,
    "ATTENTION_AT": (7,),
    "EPOCHS": 2,
    "BATCH_SIZE": 20,
}
EACH_STEP = 1e-9  # minutes
FIGURES = "save_results", "timestep_losses"  # not drawn where there is nothing to learn from them


def prepare(project, count=200, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def read_checkpoint(project, folder="02_ddpm"):
    return torch.load(project.folder / "outputs" / folder / "checkpoint.pt", weights_only=True)


def flat(tree, name=""):
    """All leaves of nested dicts, lists and tuples, by their path."""
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list | tuple):
        pairs = enumerate(tree)
    else:
        return {name: tree}
    return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}


def assert_identical(first, second):
    """Every weight, average, optimizer state and loss is equal to the last bit."""
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for key in first:
        if isinstance(first[key], torch.Tensor):
            assert torch.equal(first[key], second[key]), key
        else:
            assert first[key] == second[key], key


def test_from_start_to_pictures_and_again(project, monkeypatch):
    prepare(project, count=240, PREVIEW_EVERY=0.4)
    ticks = iter(range(10**9))
    with monkeypatch.context() as patch:  # each look at the clock takes a second
        patch.setattr(time, "monotonic", lambda: float(next(ticks)))
        done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"240 images of MNIST, [\d,]+ parameters, on ", done.stdout)
    assert "outputs/02_ddpm" in done.stdout.replace("\\", "/"), "it says where the files are"
    assert re.search(r"Training: 100%.* 480/480 .*images/s", done.stderr)
    previews = [name for name in project.outputs(SCRIPT) if name not in FILES]
    assert project.outputs(SCRIPT) == sorted(FILES + previews), "nothing half-written"
    steps = [int(re.fullmatch(r"samples_step_(\d{6})\.png", name)[1]) for name in previews]
    assert 1 <= len(steps) <= 4 and min(steps) > 0 and max(steps) < 24
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    folder = project.folder / "outputs" / "02_ddpm"
    before = {name: (folder / name).read_bytes() for name in FILES}
    state = read_checkpoint(project)
    losses = state["losses"]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.85 * sum(losses[:6])

    again = project.run_here(SCRIPT)
    assert again.returncode == 0, again.stderr
    assert "Sampling" in again.stderr and "step 24 of 24" in again.stdout
    for name in FILES:
        assert (folder / name).read_bytes() == before[name], f"{name} is the same as before"

    project.edit(SCRIPT, SCHEDULE="linear")  # another diffusion: left alone
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1
    assert "SCHEDULE was 'cosine' and now is 'linear'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert {name: (folder / name).read_bytes() for name in FILES} == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals that Windows has not")
def test_interrupted_it_arrives_at_the_same_weights(project, monkeypatch):
    """Ctrl-C at a random moment: the last bit of every weight must not notice.

    tests/drills.py does the same with kill -9, many times to each script. Afterwards the model is
    there to play with, without dropout: python -i.
    """
    prepare(project, count=100, EPOCHS=4, BATCH_SIZE=10, DROPOUT=0.5)
    with monkeypatch.context() as patch:
        for name in FIGURES:
            patch.setattr(utils.visualize, name, lambda *_, **__: None)
        assert project.run_here(SCRIPT).returncode == 0
    folder = project.folder / "outputs" / "02_ddpm"
    folder.rename(folder.with_name("undisturbed"))
    project.edit(SCRIPT, SAVE_EVERY=EACH_STEP)
    process = project.start(SCRIPT)
    wait_for(process, "Training:")
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0.05, 0.2))
    process.send_signal(signal.SIGINT)
    _output, errors = process.communicate(timeout=60)
    assert process.returncode != 0, "it ended before it was disturbed"
    assert "Traceback" not in errors
    assert "\nStopped. The same command goes on from the last checkpoint.\n" in errors
    step = read_checkpoint(project)["step"]
    assert 0 < step < 40

    question = (
        "x = ddpm.sample(n=16); print(tuple(x.shape), bool((x.abs() <= 1).all()))\n"
        "print('training mode:', ddpm.model.training)\n"
    )
    project.edit(SCRIPT, SAVE_EVERY=1)
    done = project.run("-i", SCRIPT, stdin=question)
    assert re.search(rf"Going on from .*, step {step} of 40\.", done.stdout), done.stderr
    assert "(16, 1, 28, 28) True" in done.stdout and "training mode: False" in done.stdout
    disturbed, undisturbed = read_checkpoint(project), read_checkpoint(project, "undisturbed")
    for state in disturbed, undisturbed:
        del state["settings"]["SAVE_EVERY"]
    assert_identical(disturbed, undisturbed)


def test_two_processes_share_the_work(project, monkeypatch):
    """The same total batch: the same loss within noise, one bar, equal weights on both."""
    prepare(project, count=400, EPOCHS=1)
    for name in FIGURES:
        monkeypatch.setattr(utils.visualize, name, lambda *_, **__: None)
    assert project.run_here(SCRIPT).returncode == 0
    alone = read_checkpoint(project)
    project.edit(SCRIPT, OUT_DIR="outputs/two")
    (project.folder / "run.py").write_text(
        "import os, runpy, torch, utils.visualize\n"
        "utils.visualize.save_results = lambda *_: None\n"
        "torch.set_num_threads(1)\n"
        f"result = runpy.run_path('{SCRIPT}', run_name='__main__')\n"
        "torch.save(result['model'].state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n"
    )
    options = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"
    done = project.run(*options, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("400 images of MNIST") == 1, "one process speaks"
    assert done.stderr.count("Training:   0%") == 1, "one bar"
    state = read_checkpoint(project, "two")
    assert state["step"] == alone["step"] == 20
    ours, theirs = (sum(s["losses"][-10:]) / 10 for s in (state, alone))
    assert ours == pytest.approx(theirs, rel=0.15)
    ranks = [torch.load(project.folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert_identical(*ranks)
    assert_identical(ranks[0], state["model"])
    assert not torch.equal(ranks[0]["conv_in.weight"], alone["model"]["conv_in.weight"])


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **{**SMALL, "EPOCHS": 1})
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of CIFAR10" in done.stdout
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    settings = read_checkpoint(project)["settings"]
    assert settings["FLIP"] is True and settings["DROPOUT"] == 0.1, "what suits photographs"


@pytest.mark.parametrize(
    "constants",
    [
        {"T": 2, "BASE_CH": 1, "ATTENTION_AT": (), "BATCH_SIZE": 65},
        {"SCHEDULE": "linear", "BASE_CH": 10, "CHANNEL_MULT": (2, 1, 3), "NUM_BLOCKS": 2},
        {"ATTENTION_AT": (28,), "CHANNEL_MULT": (1,), "FLIP": True, "SEED": 5, "EMA_DECAY": 0.5},
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, constants):
    prepare(project, count=65, **{"T": 3, "EPOCHS": 1, **constants})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])


def test_other_seed_other_pictures(project):
    pictures = []
    for seed in (0, 1):
        prepare(project, count=40, EPOCHS=1, T=3, SEED=seed, OUT_DIR=f"outputs/{seed}")
        assert project.run_here(SCRIPT).returncode == 0
        with Image.open(project.folder / f"outputs/{seed}/samples.png") as picture:
            pictures.append(np.asarray(picture.convert("L"))[100:-100])
    assert not np.array_equal(*pictures)
