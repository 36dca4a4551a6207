"""What the tests share: load a script as a module, or edit and run it as a person would."""

import contextlib
import importlib.util
import io
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
# In the background a shell has Ctrl-C ignored, and whatever is started there inherits that. The
# scripts that the tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


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

        before: functions to call first. Returns returncode, stdout and stderr like `run`.
        """
        path, out, err = str(self.folder / script), io.StringIO(), io.StringIO()
        returncode = 0
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with inside(self.folder), streams[0], streams[1]:
            for function in before:
                function()
            try:
                runpy.run_path(path, run_name="__main__")
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
        assert {"denoising.gif", "denoising.png", "loss.png", "samples.png"} <= set(names)
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


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
