"""02_ddpm.py as a person meets it: run, stop, resume, share among processes, do something wrong."""

import re

import numpy as np
import pytest
import torch
from conftest import EACH_STEP, PICTURES, assert_learned_the_same, ctrl_c

SCRIPT = "02_ddpm.py"
FILES = sorted([*PICTURES, "checkpoint.pt", "loss_per_timestep.png", "nearest.png"])


def test_from_start_to_pictures_and_again(project, trained, real_figures):
    project.prepare(SCRIPT, SAVE_EVERY=EACH_STEP)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "43 images of MNIST; 10 classes: 0, 1, 2, 3" in done.stdout
    assert re.search(r"[\d,]+ parameters, on ", done.stdout)
    assert "outputs/02_ddpm" in done.stdout.replace("\\", "/"), "it says where the files are"
    assert re.search(r"Training: 100%.* 43/43 .*images/s", done.stderr)
    previews = ["samples_step_000001.png", "samples_step_000002.png"]
    assert project.outputs(SCRIPT) == sorted(FILES + previews), "nothing half-written"
    project.check_pictures(SCRIPT, others=["checkpoint.pt"])
    # Without previews, training gives the same to the last bit.
    assert_learned_the_same(project.state(SCRIPT), trained.state(SCRIPT))

    folder = project.folder_of(SCRIPT)
    before = {name: (folder / name).read_bytes() for name in FILES}
    again = project.run_here(SCRIPT)
    assert again.returncode == 0, again.stderr
    assert re.search(r"Resuming from .*checkpoint\.pt, after 43 of 43 images\.", again.stdout)
    for name in FILES:
        assert (folder / name).read_bytes() == before[name], f"{name} is the same as before"

    project.edit(SCRIPT, SCHEDULE="linear")  # another diffusion: left alone
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1
    assert "SCHEDULE was 'cosine' and now is 'linear'" in refused.stderr
    assert refused.stderr.startswith("Cannot resume from ") and refused.stderr.count("\n") == 1
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_interrupted_it_arrives_at_the_same_weights(project, figures):
    """Ctrl-C in a step changes no bit of any weight; tests/drills.py has kill -9 at any moment.

    After `python -i`, the model is there to play with, without dropout.
    """
    project.prepare(SCRIPT, EPOCHS=3, DROPOUT=0.5, SAVE_EVERY=EACH_STEP)
    assert project.run_here(SCRIPT).returncode == 0
    undisturbed = project.state(SCRIPT)
    (project.folder_of(SCRIPT) / "checkpoint.pt").unlink()
    with ctrl_c(step=4):
        stopped = project.run_here(SCRIPT)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    message = "\nStopped. The same command resumes from the last checkpoint, if any.\n"
    assert stopped.stderr.endswith(message)
    assert project.state(SCRIPT)["seen"] == 60
    done = project.run_here(SCRIPT)
    assert re.search(r"Resuming from .*, after 60 of 129 images\.", done.stdout), done.stderr
    assert_learned_the_same(project.state(SCRIPT), undisturbed)
    ddpm = project.names["ddpm"]
    assert ddpm.sample(n=5).shape == (5, 1, 28, 28) and not ddpm.model.training


def test_two_processes_share_the_work(project, figures):
    """The same total batch: the same loss within noise, one bar, equal weights on both."""
    project.prepare(SCRIPT, EPOCHS=10)
    (project.folder / "run.py").write_text(
        "import os, runpy, torch, utils.visualize\n"
        "utils.visualize._save = lambda *_: None\n"
        "torch.set_num_threads(1)\n"
        f"result = runpy.run_path('{SCRIPT}', run_name='__main__')\n"
        "torch.save(result['model'].state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n"
    )
    options = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"
    done = project.run(*options, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("43 images of MNIST") == 1, "one process prints"
    assert done.stderr.count("Training:   0%") == 1, "one bar"
    state = project.state(SCRIPT)
    ranks = [torch.load(project.folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert_learned_the_same(*ranks)
    assert_learned_the_same(ranks[0], state["model"])
    # Alone, the same number of steps, with other noise.
    (project.folder_of(SCRIPT) / "checkpoint.pt").unlink()
    assert project.run_here(SCRIPT).returncode == 0
    alone = project.state(SCRIPT)
    assert sum(alone["losses"][-6:]) < 0.85 * sum(alone["losses"][:6]), "it learns"
    assert state["seen"] == alone["seen"] == 430
    ours, theirs = (sum(s["losses"][-10:]) / 10 for s in (state, alone))
    assert ours == pytest.approx(theirs, rel=0.15)
    assert not torch.equal(ranks[0]["conv_in.weight"], alone["model"]["conv_in.weight"])


def test_cifar10(project, figures):
    project.lay_cifar10(100)
    project.prepare(SCRIPT, DATASET="CIFAR10")
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "100 images of CIFAR10" in done.stdout
    settings = project.state(SCRIPT)["settings"]
    assert settings["FLIP"] is True and settings["DROPOUT"] == 0.1, "what suits photographs"


@pytest.mark.parametrize(
    "constants",
    [
        {"T": 2, "BASE_CH": 1, "ATTENTION_AT": (), "BATCH_SIZE": 65, "EPOCHS": 0.5},
        {"SCHEDULE": "linear", "BASE_CH": 10, "CHANNEL_MULT": (2, 1, 3), "NUM_BLOCKS": 2, "T": 3},
        {"ATTENTION_AT": 14, "CHANNEL_MULT": 1, "FLIP": True, "EMA_DECAY": 0.5, "T": 2},
    ],
    ids=str,
)
def test_any_constant_can_be_changed(project, figures, constants):
    project.prepare(SCRIPT, **constants)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert set(figures) == {name for name in FILES if name.endswith(".png")}


def test_other_seed_other_pictures(project, figures):
    pictures = []
    for seed in (0, 1):
        project.prepare(SCRIPT, SEED=seed, OUT_DIR=f"outputs/{seed}")
        assert project.run_here(SCRIPT).returncode == 0
        pictures.append(figures["samples.png"].axes[0].images[0].get_array())
    assert not np.array_equal(*pictures)
