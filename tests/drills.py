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
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, wait_for
from PIL import Image

from utils.visualize import draw_digits

SCRIPTS = [path.name for path in sorted(ROOT.glob("0*_*.py"))]
TRAINERS = SCRIPTS[1:]  # those that save checkpoints
KILLS = 20  # random moments at which each of them is killed
SMALL = {"T": 10, "BASE_CH": 8, "EPOCHS": 2, "BATCH_SIZE": 10}
OFTEN = {"SAVE_EVERY": 0.005}  # minutes: three times in a second
SLIM = {"CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1, "ATTENTION_AT": (), **OFTEN}
MORE = {
    "02": SLIM,
    "03": {"SAMPLE_STEPS": 5, **SLIM},
    "04": {"DDIM_STEPS": 5, **SLIM},
    "05": {"VAE_CH": 4, "VAE_EPOCHS": 2, "DDIM_STEPS": 5, **OFTEN},
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
STOPPED = "Stopped. The same command goes on from the last checkpoint."


def prepare(project, script, count=300, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(script, **{**SMALL, **MORE.get(script[:2], {}), **constants})
    (project.folder / "limited.py").write_text(LIMITED, encoding="utf-8")


def folder_of(project, script):
    return project.folder / "outputs" / script.removesuffix(".py")


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
    files = sorted(folder_of(project, script).glob("*.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def learned(checkpoint):
    """What the training has made: not the settings."""
    return {k: v for k, v in checkpoint.items() if k != "settings"}


def differences(one, other, where=""):
    """The places where two nested structures differ, to the last bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and one.keys() == other.keys():
        return [d for k in one for d in differences(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [
            d for i, pair in enumerate(zip(one, other)) for d in differences(*pair, f"{where}.{i}")
        ]
    return [] if one == other else [where]


def assert_learned_the_same(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        assert differences(learned(one[name]), learned(other[name]), name) == []


def finish(project, script):
    """The same command once more: it succeeds and leaves whole pictures and weights, no more."""
    done = project.run(script)
    assert done.returncode == 0, done.stderr
    assert saved(project, script)
    names = project.outputs(script)
    killed = [name for name in names if re.fullmatch(r"\..+\.(png|gif)\.\d+\.part", name)]
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

    Previews, which only the run that is killed makes, have no influence either.
    """
    prepare(project, trainer, count=100, EPOCHS=30)  # 10 steps each
    finish(project, trainer)
    undisturbed = saved(project, trainer)
    folder_of(project, trainer).rename(project.folder / "undisturbed")
    prepare(project, trainer, EPOCHS=30, PREVIEW_EVERY=0.02)
    moments, killed, steps, in_training = random.Random(trainer), 0, [0], 0
    while killed < KILLS:
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
        assert steps[-1] >= steps[-2], f"steps were lost: {steps}"
        whole = sum(contents["step"] for contents in undisturbed.values())
        in_training += steps[-1] < whole
        if process.returncode == 0:  # done before it was killed: start anew
            assert_learned_the_same(found, undisturbed)
        if process.returncode == 0 or steps[-1] == whole:
            for name in found:
                (folder_of(project, trainer) / name).unlink()
            steps = [0]
    finish(project, trainer)
    assert_learned_the_same(saved(project, trainer), undisturbed)
    assert in_training >= KILLS // 4, "it was killed too late: let it train longer"
    print(f"{trainer}: killed {killed} times, {in_training} of them in training")


@pytest.mark.parametrize(
    "trainer, name",
    [*((trainer, "checkpoint.pt") for trainer in TRAINERS), (TRAINERS[-1], "vae.pt")],
)
def test_kill_9_while_it_saves(project, trainer, name):
    """It stops in the middle of writing the file, and there the blow falls."""
    longer = {"vae.pt": {"VAE_EPOCHS": 8}, "checkpoint.pt": {"EPOCHS": 8}}[name]
    prepare(project, trainer, **longer)
    folder = folder_of(project, trainer)
    process = project.start(trainer)  # a first, whole checkpoint
    while not (folder / name).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    path = project.folder / trainer
    text = path.read_text(encoding="utf-8")
    write = "        file.write(buffer.getbuffer())\n"
    assert text.count(write) == 1
    half = (
        "        file.write(buffer.getbuffer()[:5000])\n"
        "        file.flush()\n"
        "        print('half', path.name, file=sys.stderr, flush=True)\n"
        "        __import__('time').sleep(100)\n"
    )
    path.write_text(text.replace(write, half), encoding="utf-8")
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}
    for _ in range(2):
        process = project.start(trainer)
        wait_for(process, f"half {name}")
        process.kill()
        process.communicate()
        assert (folder / f"{name}.part").stat().st_size == 5000, "killed in the middle"
        assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before
    path.write_text(text, encoding="utf-8")
    done = finish(project, trainer)  # which asserts that nothing stays behind
    assert f"Going on from {folder.relative_to(project.folder) / name}" in done.stdout


@pytest.mark.parametrize("moment", ["training", "sampling"])
def test_ctrl_c(project, script, moment):
    slow = {"training": {"EPOCHS": 6}, "sampling": {"EPOCHS": 1}}[moment]
    if moment == "sampling" and script[:2] in ("01", "02", "03"):
        slow["T"] = 50
    if moment == "training" and script.startswith("05"):
        slow["VAE_EPOCHS"] = 6
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
        lines = [line for line in re.split(r"[\r\n]+", errors) if line and "%|" not in line]
        assert lines == [STOPPED], "one line besides the bars"
        assert max(contents["step"] for contents in found.values()) > 0
    done = finish(project, script)
    assert script.startswith("01") or "Going on from" in done.stdout


@pytest.mark.parametrize("what", ["weights", "pictures"])
def test_full_disk(project, script, what):
    """No file may grow beyond a limit: as good as a full disk, and needs no rights.

    What there is no room for: the weights of more epochs than before, or the pictures.
    """
    prepare(project, script)
    finish(project, script)
    folder = folder_of(project, script)
    before = contents_of(folder)
    largest = max(len(data) for name, data in before.items() if name.endswith(".pt"))
    size = {"weights": largest // 2, "pictures": 5000}[what]
    if what == "weights":
        prepare(project, script, EPOCHS=3)
    done = project.run("limited.py", "size", str(size), script)
    assert done.returncode != 0
    after = contents_of(folder)
    if script.startswith("01"):  # trains anew each time, and never reads its weights again
        before.pop("weights.pt"), after.pop("weights.pt")
    else:
        assert "File too large" in done.stderr, done.stderr
        for name in [name for name in after if name.endswith(".pt.part")]:
            assert len(after.pop(name)) <= size
    assert_intact(before, after)
    again = finish(project, script)
    if not script.startswith("01"):
        assert "Going on from" in again.stdout
        steps = max(len(c["losses"]) for n, c in saved(project, script).items() if "vae" not in n)
        assert steps == 30 * (3 if what == "weights" else 2)


def test_out_of_memory(project, script):
    """A batch of 3,000 images under a limit: what was saved is intact, smaller batches work."""
    normal = {"EPOCHS": 1}
    if script.startswith("05"):  # its first stage is over when memory runs out
        normal |= {"VAE_EPOCHS": 1, "BASE_CH": 32}
    prepare(project, script, count=3000, **normal)
    finish(project, script)
    before = contents_of(folder_of(project, script))
    greedy = {"BATCH_SIZE": 3000, "EPOCHS": 2}
    if script.startswith("01"):
        greedy["BASE_CH"] = 64
    prepare(project, script, **{**normal, **greedy})
    done = project.run("limited.py", "memory", str(4 * 10**8), script)
    assert done.returncode != 0
    assert "memory" in done.stderr.lower(), done.stderr
    assert_intact(before, contents_of(folder_of(project, script)))
    prepare(project, script, **{**normal, "EPOCHS": 2})
    done = finish(project, script)
    assert script.startswith("01") or "Going on from" in done.stdout


@pytest.fixture
def forbidden_folder(tmp_path):
    """A folder in which nobody can make files: without rights, or, for root, mounted read-only."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        return folder.chmod(0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root cannot mount anything here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_out_dir_is_refused(project, trainer, out_dir):
    project.edit(trainer, OUT_DIR=str(out_dir))
    done = project.run(trainer)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("OUT_DIR = ") and str(out_dir) in lines[0]
    assert not done.stdout and not (project.folder / "data").exists(), "before data are loaded"


def test_a_folder_that_cannot_be_written_to(project, trainer, forbidden_folder):
    assert_out_dir_is_refused(project, trainer, forbidden_folder)
    assert_out_dir_is_refused(project, trainer, forbidden_folder / "deeper" / "still")


def test_a_file_in_the_place_of_the_folder(project, trainer):
    (project.folder / "taken").write_text("mine")
    assert_out_dir_is_refused(project, trainer, "taken")
    assert_out_dir_is_refused(project, trainer, "taken/deeper")
    assert (project.folder / "taken").read_text() == "mine"


def test_kill_9_while_it_saves_a_picture(project, script):
    prepare(project, script, EPOCHS=1)
    process = project.start(script)
    partial_seen = False
    while process.poll() is None and not partial_seen:
        if list(folder_of(project, script).glob(".*.png.*.part")):
            process.kill()
            partial_seen = True
        time.sleep(0.001)
    process.communicate(timeout=60)
    assert partial_seen
    for picture in folder_of(project, script).glob("*.png"):
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
    assert len(printed) == 1 + trainer.startswith("05"), "one process speaks for all"
    assert {contents["step"] for contents in trained.values()} == {60}
    again = finish(project, trainer)  # alone: nothing is left to train
    assert again.stdout.count("step 60 of 60") == len(trained)
    assert_learned_the_same(saved(project, trainer), trained)


def test_same_seed_same_pictures_other_seed_other_pictures(project, script):
    """Trained anew each time; but for the tables of seconds every file is equal to the byte."""
    pictures, timed = [], ("speed.png", "cost.png")
    for run, seed in enumerate((0, 0, 1)):
        prepare(project, script, SEED=seed, OUT_DIR=f"outputs/{run}", EPOCHS=1)
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
    for name in "benchmark.py", "ladder.py":
        shutil.copy(ROOT / "tests" / name, project.folder / "tests")
    project.edit("tests/benchmark.py", COUNT=20, SCALES=(1, 2))
    done = project.run("tests/benchmark.py", timeout=1800)
    assert done.returncode == 0, done.stderr
    tables = [table.splitlines() for table in re.findall(r"(?m)(?:^\|.*\n)+", done.stdout)]
    assert [len(table) - 2 for table in tables] == [2, 29, 7, 9, 6], "rows below the head"
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
