"""The heavy drills: what a careless user or a failing machine does to the scripts, for real.

    python -m pytest tests/drills.py -v

takes about half an hour on two CPU cores; `pytest tests` leaves it out. In each drill the script
runs as a program of its own, something goes wrong, and then: no traceback, nothing that was good is
gone or broken, and the same command, run again, succeeds. Needs Linux or macOS.
"""

import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, load, wait_for
from PIL import Image

from utils.visualize import draw_digits

SCRIPTS = [path.name for path in sorted(ROOT.glob("0*_*.py"))]
TRAINERS = SCRIPTS[1:]  # those that save checkpoints
SMALL = {"T": 20, "BASE_CH": 8, "EPOCHS": 4, "BATCH_SIZE": 20}
MORE = {
    "02": {"CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1},
    "03": {"CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1},
    "04": {"CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1, "DDIM_STEPS": 5},
    "05": {"VAE_CH": 4, "VAE_EPOCHS": 4, "DDIM_STEPS": 5},
}
# Runs a script under a limit: "size", of bytes in a file; "memory", of bytes beyond PyTorch's own.
LIMITED = """
import resource, runpy, signal, sys
kind, limit, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if kind == "size":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more is an error, as on a full disk
sys.argv = [script]
import torch, torchvision, utils.visualize
kinds = {"size": resource.RLIMIT_FSIZE, "memory": resource.RLIMIT_AS}
if kind == "memory":
    limit += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(kinds[kind], (limit, limit))
runpy.run_path(script, run_name="__main__")
"""


def prepare(project, script, count=600, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(script, **{**SMALL, **MORE.get(script[:2], {}), **constants})
    (project.folder / "limited.py").write_text(LIMITED, encoding="utf-8")


def folder_of(project, script):
    return project.folder / "outputs" / script.removesuffix(".py")


def saved(project, script):
    """The files of weights by name; reading them proves that they are whole."""
    files = sorted(folder_of(project, script).glob("*.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def weights(contents):
    """Only what the training has made: not the figures' curves, not when they were made."""
    keys = contents.keys() & {"model", "averaged"} or contents.keys()
    return {f"{k}.{n}": w for k in keys for n, w in as_dict(contents[k]).items()}


def as_dict(value):
    return value if isinstance(value, dict) else {"": value}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        a, b = weights(one[name]), weights(other[name])
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)


def finish(project, script):
    """The same command once more: it succeeds and leaves whole pictures and weights."""
    done = project.run(script)
    assert done.returncode == 0, done.stderr
    names = project.outputs(script)
    leftovers = [name for name in names if name.endswith((".part", ".pt"))]
    project.check_pictures(script, others=leftovers)
    return done


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return request.param


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def test_kill_9_at_20_random_moments(project, trainer):
    """Whenever it is killed: whole files, a step further each time, in the end the same weights."""
    prepare(project, trainer, count=100, EPOCHS=60)  # 5 steps each: there is much saving
    finish(project, trainer)
    undisturbed = saved(project, trainer)
    folder_of(project, trainer).rename(project.folder / "undisturbed")
    moments, killed, steps = random.Random(trainer), 0, [0]
    while killed < 20:
        process = project.start(trainer)
        wait_for(process, "images/s")
        try:
            process.wait(moments.uniform(0, 3))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate(timeout=60)
        found = saved(project, trainer)
        steps.append(sum(contents["step"] for contents in found.values()))
        assert steps[-1] >= steps[-2], "nothing is lost"
        if process.returncode == 0:  # done before it was killed: start anew
            assert_same_weights(found, undisturbed)
            for name in found:
                (folder_of(project, trainer) / name).unlink()
            steps = [0]
    finish(project, trainer)
    assert_same_weights(saved(project, trainer), undisturbed)
    print(f"{trainer}: killed {killed} times, at steps {steps}")


def test_kill_9_while_it_saves(project, trainer):
    """The checkpoint is written so slowly that the blow falls into the middle of it."""
    prepare(project, trainer, EPOCHS=12)
    process = project.start(trainer)  # a first, whole checkpoint
    while not list(folder_of(project, trainer).glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    path = project.folder / trainer
    text = path.read_text(encoding="utf-8")
    write = "            file.write(buffer.getbuffer())\n"
    assert text.count(write) == 1
    slow = (
        "            for part in buffer.getvalue()[::-1].split(b'P'):\n"
        "                file.write(part)\n"
        "                file.flush()\n"
        "                __import__('time').sleep(0.001)\n"
    )
    path.write_text(text.replace(write, slow), encoding="utf-8")
    before = {p.name: p.read_bytes() for p in folder_of(project, trainer).glob("*.pt")}
    for _ in range(3):
        process = project.start(trainer)
        while not any(p.stat().st_size for p in folder_of(project, trainer).glob(".*.pt.*.part")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert list(folder_of(project, trainer).glob(".*.part")), "it was killed in the middle"
        assert {p.name: p.read_bytes() for p in folder_of(project, trainer).glob("*.pt")} == before
    path.write_text(text, encoding="utf-8")
    minute_ago = time.time() - 100
    for leftover in folder_of(project, trainer).glob(".*.part"):
        os.utime(leftover, (minute_ago, minute_ago))
    finish(project, trainer)
    assert not list(folder_of(project, trainer).glob(".*.part")), "it cleans up"


@pytest.mark.parametrize("moment", ["training", "sampling"])
def test_ctrl_c(project, script, moment):
    slow = {"training": {"EPOCHS": 1000}, "sampling": {"T": 20_000, "EPOCHS": 1}}[moment]
    if moment == "sampling" and script[:2] in ("04", "05"):
        slow["DDIM_STEPS"] = 20_000
    prepare(project, script, **slow)
    process = project.start(script)
    sampling = "DDIM" if "DDIM_STEPS" in slow else "Sampling"
    wait_for(process, {"training": "loss=", "sampling": sampling}[moment])
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    if moment == "training" and script.startswith("01"):
        assert process.returncode == 0 and "ended early" in output
    else:
        assert process.returncode != 0 and "Stop" in errors
    found = saved(project, script)
    assert found, "what was learned is kept"
    if not script.startswith("01"):
        assert max(contents["step"] for contents in found.values()) > 0
    prepare(project, script, OUT_DIR="outputs/again")
    assert project.run(script).returncode == 0


@pytest.mark.parametrize("limit", ["nothing fits", "weights fit"])
def test_full_disk(project, script, limit):
    """No file may grow beyond a limit: as good as a full disk, and needs no rights."""
    prepare(project, script)
    finish(project, script)
    folder = folder_of(project, script)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    largest = max(len(data) for name, data in before.items() if name.endswith(".pt"))
    if limit == "nothing fits" and script != "01_ddpm_toy.py":  # 01 always trains anew
        for name in [name for name in before if name.endswith(".pt")]:
            before.pop(name)
            (folder / name).unlink()
    size = {"nothing fits": 5000, "weights fit": largest}[limit]
    done = project.run("limited.py", "size", str(size), script)
    new = {p.name: p.read_bytes() for p in folder.iterdir()}
    if done.returncode == 0:  # the pictures are no larger than the weights
        assert max(map(len, new.values())) <= size
    else:
        assert "Traceback" not in done.stderr, done.stderr
        message = done.stderr.strip().splitlines()[-1]
        assert "File too large" in message and "What was saved before is whole" in message
    for name, data in before.items():
        assert new[name] == data or len(new[name]) <= size, name
    assert not [name for name in new if name.endswith(".part")]
    finish(project, script)


def test_out_of_memory(project, script):
    """A batch of 600 images with many channels under a limit: the real error of PyTorch."""
    wide = {"BATCH_SIZE": 600, "BASE_CH": 256, "T": 5}
    if script.startswith("05"):
        wide["VAE_CH"] = 128  # for the first stage
    prepare(project, script, **wide)
    done = project.run("limited.py", "memory", str(10**9), script)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("Not enough memory: reduce BATCH_SIZE or BASE_CH"), message
    prepare(project, script)
    finish(project, script)


def test_two_runs_at_once(project, script):
    """Both start from nothing. One finishes; the other finishes too, or says why it does not."""
    prepare(project, script, EPOCHS=6)
    finish(project, script)
    alone = saved(project, script)
    folder_of(project, script).rename(project.folder / "alone")
    processes = [project.start(script) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    for (_, errors), code in zip(ends, codes):
        assert "Traceback" not in errors, errors
        assert code == 0 or "Another run has written" in errors, errors
    assert 0 in codes
    assert_same_weights(saved(project, script), alone)
    finish(project, script)


def test_kill_9_while_it_saves_a_picture(project, script):
    prepare(project, script, EPOCHS=1)
    process = project.start(script)
    partial_seen = False
    while process.poll() is None:
        if list(folder_of(project, script).glob(".*.png.*.part")):
            process.kill()
            partial_seen = True
    process.communicate(timeout=60)
    for picture in folder_of(project, script).glob("*.png"):
        Image.open(picture).load()
    assert partial_seen
    assert project.run(script).returncode == 0


def test_two_processes_of_one_training(project, trainer):
    """As torchrun starts them on a machine with two GPUs, here on the CPU."""
    prepare(project, trainer)
    options = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", trainer
    done = project.run(*options)
    assert done.returncode == 0, done.stderr
    project.check_pictures(trainer, others=[n for n in project.outputs(trainer) if ".pt" in n])
    printed = [line for line in done.stdout.splitlines() if "parameters" in line]
    assert len(printed) == 1 + trainer.startswith("05"), "one process speaks for all"
    again = finish(project, trainer)  # alone: nothing is left to train
    assert "Epoch" not in again.stderr


def test_same_seed_same_pictures_other_seed_other_pictures(project, script):
    """Trained anew each time; but for the tables of seconds every file is equal to the byte."""
    pictures, timed = [], ("speed.png", "cost.png")
    for run, seed in enumerate((0, 0, 1)):
        prepare(project, script, SEED=seed, OUT_DIR=f"outputs/{run}", EPOCHS=2)
        done = project.run(script)
        assert done.returncode == 0, done.stderr
        files = (project.folder / "outputs" / str(run)).iterdir()
        pictures.append({f.name: f for f in files if f.name not in timed and f.suffix != ".pt"})
    assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) >= 4
    for name, file in pictures[0].items():
        assert file.read_bytes() == pictures[1][name].read_bytes(), name
    one, other = (np.asarray(Image.open(p["samples.png"]).convert("L")) for p in pictures[1:])
    # Between the title and the note, which names the seed.
    assert one.shape != other.shape or not np.array_equal(one[100:-100], other[100:-100])


def test_started_by_spawn_the_scripts_do_not_train_again(project, script):
    """As on Windows and macOS, where each worker process reads the script once more."""
    prepare(project, script, EPOCHS=1)
    path = project.folder / script
    text = path.read_text(encoding="utf-8")
    planted = (
        "    import multiprocessing\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=pick_device)\n"
        "    worker.start(), worker.join(), print('worker', worker.exitcode)\n"
    )
    head, run = text.split('if __name__ == "__main__":\n')
    text = f'{head}if __name__ == "__main__":\n{planted}{run}'
    path.write_text(text, encoding="utf-8")
    done = project.run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("worker 0") == 1
    assert len(re.findall(r"parameters", done.stdout)) == 1 + script.startswith("05")


def test_from_another_folder_without_a_display(project, script, tmp_path, monkeypatch):
    prepare(project, script, EPOCHS=1)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")  # wants a window, and there is no screen
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command, environment = project.command(str(project.folder / script))
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(elsewhere.iterdir())
    project.check_pictures(script, others=[n for n in project.outputs(script) if ".pt" in n])
    assert load(script).__doc__
