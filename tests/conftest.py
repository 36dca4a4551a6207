"""What the tests share: load a script as a module, or edit and run it as a person would."""

import contextlib
import importlib.util
import io
import itertools
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks: threads that wait for each other cost time
os.environ["USE_LIBUV"] = "0"  # PyTorch for Windows has torchrun's network library not built in

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts find `utils` beside them; so must the tests

from utils import visualize  # noqa: E402
from utils.visualize import STYLE, draw_digits  # noqa: E402

# In the background a shell has Ctrl-C ignored, and whatever is started there inherits that. The
# scripts that the tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    toy = str(ROOT / "01_ddpm_toy.py")
    parser.addoption("--file", default=toy, help="the file that test_exercise.py looks at")


# Small settings for all scripts: a run trains for a few steps in a second.
SMALL = {
    "T": 5,
    "IMAGE_SIZE": 16,
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "ATTENTION_AT": (7,),
    "EPOCHS": 1,
    "BATCH_SIZE": 20,
    "SAMPLE_STEPS": 2,
    "DDIM_STEPS": 2,
    "VAE_CH": 2,
    "VAE_EPOCHS": 1,
}
EACH_STEP = 1e-9  # minutes, for SAVE_EVERY
PICTURES = ["denoising.gif", "denoising.png", "loss.png", "samples.png"]  # of every script


def scripts():
    return sorted(ROOT.glob("0*_*.py"))


def load(name):
    """Import a script by its file name, which is no legal module name: definitions only, no run."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(process, text):
    """Read what a process writes to stderr until it has written text, and return it."""
    seen = ""
    while text not in seen:
        letter = process.stderr.read(1)
        assert letter, f"it ended before it wrote {text!r}: {seen[-2000:]}"
        seen += letter
    return seen


def assert_learned_the_same(one, other):
    """Two checkpoints are equal to the last bit, whatever the settings in them."""
    one, other = ({**state, "settings": {}} for state in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@contextlib.contextmanager
def ctrl_c(step):
    """Press Ctrl-C in this training step of whatever runs here; steps are counted from 1."""
    steps = itertools.count(1)

    def zero_grad(optimizer):
        if next(steps) == step:
            raise KeyboardInterrupt
        torch.optim.Optimizer.zero_grad(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "zero_grad", zero_grad)
        try:
            yield
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C ended everything")  # otherwise it would end pytest, too


@contextlib.contextmanager
def inside(folder):
    """Make folder the current one for a while: contextlib.chdir, which Python 3.10 lacks."""
    back = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(back)


class Project:
    """A copy of the scripts in a folder of its own, to edit and run."""

    def __init__(self, folder):
        self.folder = folder
        for script in scripts():
            shutil.copy(script, folder)
        shutil.copytree(ROOT / "utils", folder / "utils")

    def edit(self, script, **constants):
        """Set constants at the head of a script, as a person does in an editor."""
        path = self.folder / script
        text = path.read_text(encoding="utf-8")
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
            assert count == 1, f"{script} has no constant {name} at its head"
        path.write_text(text, encoding="utf-8")

    def prepare(self, script, count=43, **constants):
        """Edit a script to SMALL settings and these; if there are no data, lay digits as MNIST."""
        if not (self.folder / "data").exists():
            self.lay_mnist(*draw_digits(count, seed=1))
        text = (self.folder / script).read_text(encoding="utf-8")
        small = {n: v for n, v in SMALL.items() if re.search(rf"(?m)^{n} = ", text)}
        self.edit(script, **{**small, **constants})

    def folder_of(self, script):
        """The folder in which a script leaves its results by default."""
        return self.folder / "outputs" / Path(script).stem

    def state(self, script, name="checkpoint.pt"):
        """The contents of a checkpoint that a script has left."""
        return torch.load(self.folder_of(script) / name, weights_only=True)

    def command(self, *arguments):
        """The command and the environment to run Python here."""
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        environment.pop("DISPLAY", None)
        return [sys.executable, *arguments], environment

    def run(self, *arguments, stdin="", timeout=300):
        """Run `python ARGUMENTS` in the folder and return the finished process."""
        command, environment = self.command(*arguments)
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )

    def run_here(self, script, *before):
        """The same in this process, which saves the seconds that importing torch takes.

        before: functions to call first. Returns returncode, stdout and stderr like `run`; in
        `self.names` is what a person finds after `python -i`.
        """
        path, out, err = str(self.folder / script), io.StringIO(), io.StringIO()
        returncode = 0
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with inside(self.folder), streams[0], streams[1]:
            for function in before:
                function()
            try:
                self.names = runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                returncode = end.code if isinstance(end.code, int) else 1
                print(end.code, file=err)
        return subprocess.CompletedProcess([path], returncode, out.getvalue(), err.getvalue())

    def run_without_md5(self, script):
        """The same with torchvision taking any file for what it is called."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
            return self.run_here(script)

    def start(self, *arguments):
        """Start `python ARGUMENTS` and return the running process, its output in pipes."""
        command, environment = self.command(*arguments)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def outputs(self, script):
        """The sorted names of what a script has left in its folder of outputs."""
        folder = self.folder / "outputs" / Path(script).stem
        return sorted(p.name for p in folder.iterdir()) if folder.exists() else []

    def check_pictures(self, script, others=()):
        """Assert that the outputs are whole, not empty pictures, and `others`, and nothing else."""
        folder = self.folder / "outputs" / Path(script).stem
        names = self.outputs(script)
        assert set(PICTURES) <= set(names)
        for name in names:
            if name in others:
                continue
            assert name.endswith((".png", ".gif")), f"what is {name}?"
            with Image.open(folder / name) as picture:
                pixels = np.asarray(picture.convert("L"))
                assert min(pixels.shape) > 80 and pixels.std() > 5, f"{name} is empty"
        with Image.open(folder / "denoising.gif") as animation:
            assert animation.n_frames > 2
            first = np.asarray(animation.convert("L")).astype(float)
            animation.seek(animation.n_frames - 1)
            assert np.abs(np.asarray(animation.convert("L")) - first).mean() > 5

    def lay_mnist(self, images, labels, name="MNIST"):
        """Write images, uint8 (n, 28, 28), and labels in MNIST's own file format."""
        raw = self.folder / "data" / name / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for split in ("train", "t10k"):
            head = b"".join(i.to_bytes(4, "big") for i in (2051, len(images), 28, 28))
            (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
            head = b"".join(i.to_bytes(4, "big") for i in (2049, len(labels)))
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.byte().numpy().tobytes())

    def lay_cifar10(self, count=100):
        """Write `count` images of random colour in CIFAR-10's own file format.

        torchvision compares md5 sums, which such files cannot match: run scripts with
        `run_without_md5`.
        """
        raw = self.folder / "data" / "cifar-10-batches-py"
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            colours = rng.integers(0, 256, (count // 5, 3, 1), dtype=np.uint8)
            data = colours.repeat(1024, axis=2).reshape(-1, 3072)
            labels = ((np.arange(len(data)) + i) % 10).tolist()
            (raw / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        meta = {"label_names": [f"class {i}" for i in range(10)]}
        (raw / "batches.meta").write_bytes(pickle.dumps(meta))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A Project, cut off from the network."""
    for name in "http", "https", "HTTP", "HTTPS":  # nothing listens there: downloads fail at once
        monkeypatch.setenv(f"{name}_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    return Project(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A Project in which 02 to 05 have been run, on 43 digits: leave it as you find it."""
    project = Project(tmp_path_factory.mktemp("trained"))
    for script in reversed(scripts()[1:]):  # 04 before 02, whose network it would use
        project.prepare(script.name)
        done = project.run_here(script.name)
        assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(scope="session", autouse=True)
def quick_figures():
    """Draw figures small and without fitting their parts: most tests do not look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 50)
        patch.setitem(STYLE, "figure.constrained_layout.use", False)
        yield


@pytest.fixture
def real_figures(monkeypatch):
    """Draw figures as a user gets them."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 130)
    monkeypatch.setitem(STYLE, "figure.constrained_layout.use", True)


@pytest.fixture
def figures(monkeypatch):
    """Figures by file name, kept instead of written, which takes most of the time."""
    kept = {}
    monkeypatch.setattr(visualize, "_save", lambda fig, path: kept.update({path.name: fig}))
    monkeypatch.setattr(visualize, "_save_gif", lambda *_, **__: None)
    return kept


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
