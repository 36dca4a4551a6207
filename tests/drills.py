"""The heavy drills: what a careless user or a failing machine does to the scripts, for real.

    python -m pytest tests/drills.py -v

takes long, most of it for the kills; `pytest tests` leaves it out. In each drill the script runs
as a program of its own, something goes wrong, and then: nothing that was good is gone or broken,
and the same command, run again, succeeds. Needs Linux or macOS.
"""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import gpu
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_learned_the_same, wait_for
from PIL import Image

SCRIPTS = [path.name for path in sorted(ROOT.glob("0*_*.py"))]
TRAINERS = SCRIPTS[1:]  # those that save checkpoints
KILLS = 20  # random moments at which each of them is killed in training
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
STOPPED = "Stopped. The same command resumes from the last checkpoint, if any."


def prepare(project, script, count=300, **constants):
    """Two epochs of 30 steps each, unless constants say otherwise; in 05, also in stage 1."""
    constants = {"EPOCHS": 2, "BATCH_SIZE": 10, **constants}
    if not script.startswith("01"):
        constants.setdefault("SAVE_EVERY", 0.005)  # minutes; each save also draws a preview
    if script.startswith("05"):
        constants.setdefault("VAE_EPOCHS", 2)
    project.prepare(script, count, **constants)
    (project.folder / "limited.py").write_text(LIMITED, encoding="utf-8")


def contents_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_intact(before, after):
    """Of two contents of a folder: the same files, with the same weights and whole pictures."""
    assert after.keys() == before.keys()
    for name, data in before.items():
        assert after[name] == data or name.endswith((".png", ".gif")), f"{name} was overwritten"
        if after[name] != data:  # a new picture, made before something went wrong
            Image.open(io.BytesIO(after[name])).load()


def saved(project, script):
    """The files of weights by name; reading them proves that they are whole."""
    files = sorted(project.folder_of(script).glob("*.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def assert_equal_files(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        assert_learned_the_same(one[name], other[name])


def finish(project, script):
    """The same command once more: it succeeds and leaves whole pictures and weights, no more."""
    done = project.run(script)
    assert done.returncode == 0, done.stderr
    assert saved(project, script)
    names = project.outputs(script)
    killed = [name for name in names if re.fullmatch(r"\..+\.(png|gif|pt)\.\d+\.part", name)]
    project.check_pictures(script, others=[*killed, *(n for n in names if n.endswith(".pt"))])
    return done


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return request.param


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def test_kill_9_at_random_moments(project, trainer):
    """Whenever it is killed: whole files, never a step back, in the end the same to the last bit.

    Nor do previews, of which the run that is killed makes more, have an influence.
    """
    epochs = {"EPOCHS": 30} | ({"VAE_EPOCHS": 15} if trainer.startswith("05") else {})
    prepare(project, trainer, count=100, **epochs)  # 10 steps each
    started = time.monotonic()
    finish(project, trainer)
    longest = (time.monotonic() - started) / 2
    undisturbed = saved(project, trainer)
    total = sum(state["seen"] for state in undisturbed.values())
    project.folder_of(trainer).rename(project.folder / "undisturbed")
    prepare(project, trainer, **epochs, SAVE_EVERY=0.005)  # minutes
    moments, killed, seen = random.Random(trainer), Counter(), 0
    while min(killed[name] for name in undisturbed) < KILLS // len(undisturbed):
        process = project.start(trainer)
        wait_for(process, "images/s")
        try:
            process.wait(moments.uniform(0, moments.choice([2, longest])))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate(timeout=60)
        before, found = seen, saved(project, trainer)
        seen = sum(state["seen"] for state in found.values())
        assert seen >= before, "steps were lost"
        if seen < total:  # 05 is in stage 2 if there is a checkpoint.pt, and otherwise in stage 1
            killed[min(found, default="nothing saved yet")] += 1
            continue
        assert_equal_files(found, undisturbed)
        for name in found:  # start from scratch
            (project.folder_of(trainer) / name).unlink()
        seen = 0
    finish(project, trainer)
    assert_equal_files(saved(project, trainer), undisturbed)
    print(f"{trainer} was killed in training, after it had saved: {dict(killed)}")


@pytest.mark.parametrize(
    "trainer, name",
    [*((trainer, "checkpoint.pt") for trainer in TRAINERS), (TRAINERS[-1], "vae.pt")],
)
def test_kill_9_while_it_saves(project, trainer, name):
    """It stops in the middle of writing the file, and there the blow falls."""
    prepare(project, trainer, EPOCHS=8)
    folder = project.folder_of(trainer)
    process = project.start(trainer)  # a first, whole checkpoint
    while not (folder / name).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    path = project.folder / trainer
    text = path.read_text(encoding="utf-8")
    write = "            torch.save(state, file)\n"
    assert text.count(write) == 1
    half = (
        "            file.write(bytes(5000))\n"
        "            file.flush()\n"
        "            print('half', path.name, file=sys.stderr, flush=True)\n"
        "            __import__('time').sleep(100)\n"
    )
    path.write_text(text.replace(write, half), encoding="utf-8")
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}
    for _ in range(2):
        process = project.start(trainer)
        wait_for(process, f"half {name}")
        process.kill()
        process.communicate()
        half_file = folder / f".{name}.{process.pid}.part"
        assert half_file.stat().st_size == 5000, "killed in the middle"
        assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before
    path.write_text(text, encoding="utf-8")
    done = finish(project, trainer)
    assert f"Resuming from {folder.relative_to(project.folder) / name}" in done.stdout


@pytest.mark.parametrize("moment", ["training", "sampling"])
def test_ctrl_c(project, script, moment):
    slow = {"training": {"EPOCHS": 6}, "sampling": {"EPOCHS": 1}}[moment]
    if moment == "sampling" and script[:2] in ("01", "02", "03"):
        slow["T"] = 50
    prepare(project, script, **slow)
    process = project.start(script)
    sampling = "DDIM" if script[:2] in ("04", "05") else "Sampling"
    seen = wait_for(process, {"training": "loss=", "sampling": sampling}[moment])
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    found = saved(project, script)
    assert found, "what was learned is kept"
    if script.startswith("01") and moment == "training":
        assert process.returncode == 0 and "ended early" in output, "01 goes on to sampling"
        project.check_pictures(script, others=["weights.pt"])
    elif script.startswith("01"):
        assert process.returncode != 0
    else:
        assert process.returncode != 0 and "Traceback" not in seen + errors, errors
        errors = errors.replace("\x1b[A", "")  # a preview's bar was below: the cursor moves up
        lines = [line.strip() for line in re.split(r"[\r\n]+", errors) if "%|" not in line]
        lines = [line for line in lines if line]
        assert lines == [STOPPED], "one line besides the bars"
        assert max(state["seen"] for state in found.values()) > 0
    done = finish(project, script)
    assert script.startswith("01") or "Resuming from" in done.stdout


@pytest.mark.parametrize("what", ["weights", "pictures"])
def test_full_disk(project, script, what):
    """No file may grow beyond a limit: as good as a full disk, and needs no rights.

    What there is no room for: the weights of more epochs than before, or the pictures.
    """
    prepare(project, script)
    finish(project, script)
    folder = project.folder_of(script)
    before = contents_of(folder)
    largest = max(len(data) for name, data in before.items() if name.endswith(".pt"))
    size = {"weights": largest // 2, "pictures": 5000}[what]
    if what == "weights":
        prepare(project, script, EPOCHS=3)
    done = project.run("limited.py", "size", str(size), script)
    after = contents_of(folder)
    if script.startswith("01"):  # trains anew each time, and never reads its weights again
        assert done.returncode != 0
        before.pop("weights.pt"), after.pop("weights.pt")
    elif what == "pictures":  # each of them costs a line, and the others are drawn
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("could not be written: [Errno 27] File too large") > 3
    else:
        assert done.returncode != 0 and "File too large" in done.stderr, done.stderr
        for name in [name for name in after if name.endswith(".part")]:
            assert len(after.pop(name)) <= size
    assert_intact(before, after)
    again = finish(project, script)
    if not script.startswith("01"):
        assert "Resuming from" in again.stdout
        state = project.state(script)
        assert state["seen"] == 10 * len(state["losses"]) == 300 * (3 if what == "weights" else 2)


def test_out_of_memory(project, script):
    """A batch of 3,000 images under a limit: what was saved is intact, smaller batches work."""
    normal = {"EPOCHS": 1}
    if script.startswith("05"):  # its first stage is over when memory runs out
        normal |= {"VAE_EPOCHS": 1, "BASE_CH": 32}
    prepare(project, script, count=3000, **normal)
    finish(project, script)
    before = contents_of(project.folder_of(script))
    greedy = {"BATCH_SIZE": 3000, "EPOCHS": 2}
    if script.startswith("01"):
        greedy["BASE_CH"] = 64
    prepare(project, script, **{**normal, **greedy})
    done = project.run("limited.py", "memory", str(4 * 10**8), script)
    assert done.returncode != 0
    assert "memory" in done.stderr.lower(), done.stderr
    assert_intact(before, contents_of(project.folder_of(script)))
    prepare(project, script, **{**normal, "EPOCHS": 2})
    done = finish(project, script)
    assert script.startswith("01") or "Resuming from" in done.stdout


def test_a_folder_that_cannot_be_written_to(project):
    read_only = "/proc" if os.path.exists("/proc") else "/System"  # also for root
    for out_dir in read_only, f"{read_only}/deeper/still":
        project.edit("02_ddpm.py", OUT_DIR=out_dir)
        done = project.run("02_ddpm.py")
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 1 and line.startswith(f"OUT_DIR = {out_dir!r} does not work: ")
        assert not done.stdout and not (project.folder / "data").exists(), "before data are loaded"


def test_kill_9_while_it_saves_a_picture(project, script):
    prepare(project, script, EPOCHS=1)
    process = project.start(script)
    partial_seen = False
    while process.poll() is None and not partial_seen:
        if list(project.folder_of(script).glob(".*.png.*.part")):
            process.kill()
            partial_seen = True
        time.sleep(0.001)
    process.communicate(timeout=60)
    assert partial_seen
    for picture in project.folder_of(script).glob("*.png"):
        Image.open(picture).load()
    finish(project, script)


def test_two_processes_of_one_training(project, trainer):
    """As torchrun starts them on a machine with two GPUs, here on the CPU."""
    prepare(project, trainer)
    options = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", trainer
    done = project.run(*options)
    assert done.returncode == 0, done.stderr
    trained = saved(project, trainer)
    project.check_pictures(trainer, others=list(trained))
    printed = [line for line in done.stdout.splitlines() if "parameters" in line]
    assert len(printed) == 1, "one process prints"
    assert {(state["seen"], len(state["losses"])) for state in trained.values()} == {(600, 60)}
    again = finish(project, trainer)  # alone: nothing is left to train
    assert "checkpoint.pt, after 600 of 600 images" in again.stdout
    assert_equal_files(saved(project, trainer), trained)


def test_same_seed_same_pictures_other_seed_other_pictures(project, script):
    """Trained anew each time; but for the table of seconds every file is equal to the byte."""
    pictures = []
    for run, seed in enumerate((0, 0, 1)):
        prepare(project, script, SEED=seed, OUT_DIR=f"outputs/{run}", EPOCHS=1)
        done = project.run(script)
        assert done.returncode == 0, done.stderr
        files = (project.folder / "outputs" / str(run)).iterdir()
        pictures.append({f.name: f for f in files if f.name != "speed.png" and f.suffix != ".pt"})
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
        "    import multiprocessing as mp\n"
        "    worker = mp.get_context('spawn').Process(target=linear_beta_schedule, args=(5,))\n"
        "    worker.start(), worker.join(), print('worker', worker.exitcode)\n"
    )
    head, run = text.split('if __name__ == "__main__":\n')
    text = f'{head}if __name__ == "__main__":\n{planted}{run}'
    path.write_text(text, encoding="utf-8")
    done = project.run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("worker 0") == 1
    trainings = done.stderr.count("Training:   0%")
    assert trainings == 1 + script.startswith("05"), "only the script itself trains"


def test_from_another_folder_without_a_display(project, script, tmp_path, monkeypatch):
    """Data are looked for in the current folder, and results saved there; here one with a space."""
    prepare(project, script, EPOCHS=1)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")  # wants a window, and there is no screen
    elsewhere = tmp_path / "some where else"
    elsewhere.mkdir()
    (project.folder / "data").rename(elsewhere / "data")
    files = {file: file.read_bytes() for file in project.folder.glob("*.*")}
    command, environment = project.command(str(project.folder / script))
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "300 images" in done.stdout
    assert {file: file.read_bytes() for file in project.folder.glob("*.*")} == files
    assert not (project.folder / "outputs").exists() and not (project.folder / "data").exists()
    assert sorted(file.name for file in elsewhere.iterdir()) == ["data", "outputs"]
    project.folder = elsewhere
    project.check_pictures(script, others=list(saved(project, script)))


def test_the_benchmark_in_small(project):
    """All its tables, of five tiny networks and 20 samples each; the second time nothing is run."""
    for name in SCRIPTS:  # some samplers take 100 steps
        prepare(project, name, T=100, EPOCHS=1, BASE_CH=4, BATCH_SIZE=60)
        if name[:2] in ("04", "05"):
            project.edit(name, DDIM_STEPS=10)
    (project.folder / "tests").mkdir()
    for name in "benchmark.py", "figures.py", "ladder.py":
        shutil.copy(ROOT / "tests" / name, project.folder / "tests")
    project.edit("tests/benchmark.py", COUNT=20, SCALES=(1, 2))
    done = project.run("tests/benchmark.py", timeout=1800)
    assert done.returncode == 0, done.stderr
    tables = [table.splitlines() for table in re.findall(r"(?m)(?:^\|.*\n)+", done.stdout)]
    assert [len(table) - 2 for table in tables] == [2, 29, 7, 12, 6], "rows below the head"
    for line in tables[-1][2:-1]:
        command, wall_time, memory, parameters, speed, *_ = line.strip("|").split(" | ")
        assert re.match(r"\d+ min \d+ s", wall_time) and re.fullmatch(r"[\d.]+ GB", memory), line
        assert re.fullmatch(r"\d+|as 02", speed) and re.match(r"[\d,]+", parameters), line
        assert ("02" in speed) == (SCRIPTS[3] in command)
    assert tables[-1][-1].startswith("| real test images |")
    assert sum(line.count(" × |") for line in tables[1]) == 10, "seconds and speed-up, as 04 says"
    made = sorted(p.name for p in (project.folder / "outputs" / "benchmark").glob("*.png"))
    assert made == ["all_scripts.png", "guidance_trade_off.png", "samplers.png"]
    again = project.run("tests/benchmark.py", timeout=600)

    def untimed(text):  # the seventh cell: seconds for 16 images
        return re.sub(r"(?m)^(\| `python(?:[^|]*\|){6})[^|]*\|", r"\1", text)

    assert untimed(again.stdout) == untimed(done.stdout) != done.stdout
    assert "Running" not in again.stderr


def test_the_check_of_a_gpu_without_one(tmp_path):
    """It says so and ends, or does every job on the CPU and leaves its tables and pictures."""
    command = [sys.executable, gpu.__file__, "--out", str(tmp_path)]
    options = {"capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **options)
    assert done.returncode == 1 and "--rehearse does without" in done.stdout
    done = subprocess.run([*command, "--rehearse"], **options)
    logs = "".join(log.read_text(encoding="utf-8")[-2000:] for log in tmp_path.glob("log/*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for number, (job, _) in gpu.JOBS.items():
        title = f"{number}. {job.__doc__.splitlines()[0]}"
        assert re.search(rf"## {re.escape(title)}\n[^#]*\nok after", table), title
    pictures = {path.name for path in tmp_path.glob("*.png")}
    expected = {f"5_{script.removesuffix('.py')}.png" for script in SCRIPTS}
    assert expected | {"4_03_conditional_ddpm.png", "6_02_ddpm.png"} <= pictures
    for picture in pictures:
        Image.open(tmp_path / picture).load()
