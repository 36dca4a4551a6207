"""02_ddpm.py as a person meets it: run, stop, go on, share among processes, do something wrong."""

import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import load, wait_for
from PIL import Image

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
    "T": 10,
    "BASE_CH": 8,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
    "PREVIEW_EVERY": 1,
}


def prepare(project, count=200, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def read_checkpoint(project):
    path = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    return torch.load(path, weights_only=True)


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


def test_from_start_to_pictures_and_again(project):
    prepare(project, count=600, EPOCHS=3)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"600 images of MNIST, [\d,]+ parameters, on ", done.stdout)
    assert str(project.folder) in done.stdout, "it says where the files are"
    assert "Epoch 3/3" in done.stderr and "images/s" in done.stderr and "loss=" in done.stderr
    previews = ["samples_epoch_001.png", "samples_epoch_002.png"]
    assert project.outputs(SCRIPT) == FILES + previews
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    folder = project.folder / "outputs" / "02_ddpm"
    before = {name: (folder / name).read_bytes() for name in FILES}
    losses = read_checkpoint(project)["losses"]
    assert len(losses) == 36 and sum(losses[-6:]) < 0.7 * sum(losses[:6])

    again = project.run_here(SCRIPT)
    assert again.returncode == 0, again.stderr
    assert "Epoch" not in again.stderr and "Sampling" in again.stderr, "straight to sampling"
    for name in FILES:
        assert (folder / name).read_bytes() == before[name], f"{name} is the same as before"


@pytest.mark.skipif(sys.platform == "win32", reason="signals that Windows has not")
def test_interrupted_it_arrives_at_the_same_weights(project):
    """Ctrl-C at a random moment: the last bit of every weight must not notice.

    tests/drills.py does the same with kill -9, 20 times to each script.
    """
    prepare(project, count=600, EPOCHS=5, BATCH_SIZE=20, PREVIEW_EVERY=9)
    assert project.run_here(SCRIPT).returncode == 0
    undisturbed = read_checkpoint(project)
    folder = project.folder / "outputs" / "02_ddpm"
    folder.rename(folder.with_name("undisturbed"))
    moments = random.Random(0)
    middle_of_an_epoch = 0
    for number, name in enumerate(["SIGINT", "SIGINT"]):
        process = project.start(SCRIPT)
        wait_for(process, f"Epoch {number + 1}/5")  # the later, the further: never the end
        time.sleep(moments.uniform(0.1, 0.4))
        process.send_signal(getattr(signal, name))
        _output, errors = process.communicate(timeout=60)
        assert process.returncode != 0, f"attempt {number} ended before it was disturbed"
        assert "Traceback" not in errors
        if name == "SIGINT":
            step = int(re.search(r"Stopped at step (\d+) of 150", errors)[1])
            assert read_checkpoint(project)["step"] == step
            middle_of_an_epoch += step % 30 > 0
    assert middle_of_an_epoch > 0
    assert project.run_here(SCRIPT).returncode == 0
    disturbed = read_checkpoint(project)
    for state in disturbed, undisturbed:
        del state["extras"]  # what the figures show of the first epoch
    assert_identical(disturbed, undisturbed)
    pixels = [
        (folder.with_name(n) / "samples.png").read_bytes() for n in ("undisturbed", "02_ddpm")
    ]
    assert pixels[0] == pixels[1]


def test_a_checkpoint_of_other_settings_is_left_alone(project):
    prepare(project)
    assert project.run_here(SCRIPT).returncode == 0
    path = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    before, pictures = path.read_bytes(), (path.parent / "samples.png").read_bytes()
    project.edit(SCRIPT, EPOCHS=5, SCHEDULE="linear")
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "EPOCHS was 2 and now is 5" in done.stderr and "'cosine'" in done.stderr
    assert "BASE_CH" not in done.stderr, "only those that differ"
    assert str(path) in done.stderr and "OUT_DIR" in done.stderr
    assert path.read_bytes() == before
    assert (path.parent / "samples.png").read_bytes() == pictures
    # What the message proposes works.
    project.edit(SCRIPT, OUT_DIR=str(project.folder / "outputs" / "another"))
    assert project.run_here(SCRIPT).returncode == 0
    assert (project.folder / "outputs" / "another" / "checkpoint.pt").exists()
    assert path.read_bytes() == before


class Malicious:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "malicious"])
def test_a_file_that_is_no_checkpoint_gets_a_clear_error(project, monkeypatch, kind):
    prepare(project)
    path = project.folder / "outputs" / "02_ddpm" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    monkeypatch.chdir(project.folder)
    if kind == "truncated":
        torch.save({"settings": {}, "model": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "foreign":
        torch.save({"conv_in.weight": torch.zeros(8, 1, 3, 3)}, path)  # as 01 saves its weights
    elif kind == "malicious":
        torch.save({"settings": Malicious()}, path)
    else:
        path.write_text("hello" if kind == "text" else "")
    before = path.read_bytes()
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert "is damaged or is no checkpoint of this script" in done.stderr
    assert str(path) in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert path.read_bytes() == before and project.outputs(SCRIPT) == ["checkpoint.pt"]
    assert not (project.folder / "executed").exists()


def test_nan_in_the_data_stops_the_run_and_keeps_the_last_good_checkpoint(project):
    """One image turns into NaN between the first epoch and the second."""
    prepare(project, count=200, EPOCHS=3)
    text = (project.folder / SCRIPT).read_text(encoding="utf-8")
    planted = '    for epoch in trainer.run(out_dir / "checkpoint.pt"):\n'
    assert planted in text
    text = text.replace(
        planted, f"    images = images.float()\n{planted}        images[7] = torch.nan\n"
    )
    (project.folder / SCRIPT).write_text(text, encoding="utf-8")
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "NaN or infinite" in message and "LEARNING_RATE = 0.02" in message
    state = read_checkpoint(project)
    assert state["step"] == 4, "the first epoch"
    assert all(torch.isfinite(w).all() for w in state["model"].values())


def test_two_processes_share_the_work(project):
    """The same total batch: the same loss within noise, one bar, equal weights on both."""
    prepare(project, count=1000, EPOCHS=3, BATCH_SIZE=50, PREVIEW_EVERY=9, T=10)
    assert project.run_here(SCRIPT).returncode == 0
    alone = read_checkpoint(project)
    project.edit(SCRIPT, OUT_DIR="outputs/two")
    (project.folder / "run.py").write_text(
        "import os, runpy, torch\n"
        "torch.set_num_threads(1)\n"
        f"result = runpy.run_path('{SCRIPT}', run_name='__main__')\n"
        "torch.save(result['model'].state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n"
    )
    options = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"
    done = project.run(*options, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1,000 images of MNIST") == 1, "one process speaks"
    assert done.stderr.count("Epoch 3/3:   0%") == 1, "one bar"
    state = torch.load(project.folder / "outputs/two/checkpoint.pt", weights_only=True)
    assert state["step"] == alone["step"] == 60
    ours, theirs = (sum(s["losses"][-20:]) / 20 for s in (state, alone))
    assert ours == pytest.approx(theirs, rel=0.1)
    ranks = [torch.load(project.folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert_identical(*ranks)
    assert_identical(ranks[0], state["model"])
    assert not torch.equal(ranks[0]["conv_in.weight"], alone["model"]["conv_in.weight"])


def test_a_batch_that_processes_cannot_share_is_refused():
    script = load(SCRIPT)
    settings = vars(script)
    script.check_settings(settings, world=2)
    with pytest.raises(SystemExit, match=r"BATCH_SIZE = \d+ cannot be shared by 3 processes"):
        script.check_settings(settings, world=3)


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of CIFAR10" in done.stdout
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    settings = read_checkpoint(project)["settings"]
    assert settings["FLIP"] is True and settings["DROPOUT"] == 0.1, "what suits photographs"


@pytest.mark.parametrize(
    "constants",
    [
        {"T": 2},
        {"SCHEDULE": "linear", "T": 60},
        {"BASE_CH": 1},
        {"BASE_CH": 20, "CHANNEL_MULT": (2, 1, 3), "NUM_BLOCKS": 2},
        {"ATTENTION_AT": ()},
        {"ATTENTION_AT": (28,), "CHANNEL_MULT": (1,)},
        {"DROPOUT": 0.5, "FLIP": True, "EMA_DECAY": 0.5},
        {"BATCH_SIZE": 1, "EPOCHS": 1},
        {"BATCH_SIZE": 65, "SEED": 5, "LEARNING_RATE": 1e-4},
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, constants):
    prepare(project, count=65, **{"T": 5, "EPOCHS": 1, **constants})
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])


def test_a_batch_larger_than_the_data_is_refused(project):
    prepare(project, count=65, BATCH_SIZE=66)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1
    assert done.stderr.startswith("BATCH_SIZE = 66 is more than the 65 images")
    assert project.outputs(SCRIPT) == []


def test_other_seed_other_pictures(project):
    pictures = []
    for seed in (0, 1):
        out_dir = str(project.folder / "outputs" / str(seed))
        prepare(project, count=65, EPOCHS=1, T=5, SEED=seed, OUT_DIR=out_dir)
        assert project.run_here(SCRIPT).returncode == 0
        with Image.open(project.folder / f"outputs/{seed}/samples.png") as picture:
            pictures.append(np.asarray(picture.convert("L"))[100:-100])
    assert not np.array_equal(*pictures)


def test_the_trained_model_is_there_to_play_with(project):
    """python -i 02_ddpm.py, then ddpm.sample(n=16); no dropout in it."""
    prepare(project, count=65, DROPOUT=0.5, EPOCHS=1)
    question = (
        "x = ddpm.sample(n=16); print(tuple(x.shape), bool((x.abs() <= 1).all()))\n"
        "print('training mode:', ddpm.model.training)\n"
    )
    done = project.run("-i", SCRIPT, stdin=question)
    assert "(16, 1, 28, 28) True" in done.stdout, done.stderr
    assert "training mode: False" in done.stdout
