"""Everything that only a GPU can show, in nine minutes: one command, one table, the pictures.

    python tests/gpu.py                  # all steps; or some, e.g. `python tests/gpu.py 4 5`
    python tests/gpu.py --rehearse       # the same in miniature on a CPU, in about a minute

It needs one NVIDIA GPU, the packages of requirements.txt, and MNIST and CIFAR-10 in `data/` or a
network to download them. diffusers, pytest and a folder of images (`--images`, for step 6) are
optional: what needs them is skipped without them.

Steps, in order of value
1   each script with its GPU defaults and one epoch of MNIST: does it run, with what memory, samples
2   02 and 03 on CIFAR-10, both at once, as long as three minutes allow: their samples
3   02 killed in training, continued, continued on the CPU, and then on the GPU again
4   bfloat16, float16 and float32: speed and loss after 200 steps; what COMPILE costs and gains
5   a training step of 02 and of diffusers' U-Net of the same width, and the share of the GPU's peak
6   05 on a folder of images at 64 pixels; a training step at 128 pixels, on pixels and on latents
7   tests/test_devices.py; the same mathematics on CPU and GPU

Results are in `outputs/gpu/` (or `--out`) after each step: `gpu.md`, the same as `gpu.json`, the
pictures, and in `log/` what was printed. A step that fails or takes too long is noted in the table
and does not stop the others. Steps that are measured again replace the old results.

Each job is a process of its own with a time limit; time that one leaves over, the next ones may
use. Only the timings of steps 4 and 5 and of 128 pixels have the GPU to themselves; other speeds,
and the seconds that compiling takes, are those beside other jobs.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from time import monotonic as now
from time import sleep

# torch is imported in the functions that need it: the process that starts the others does not.
PROGRAM = Path(__file__).resolve()
ROOT = PROGRAM.parent.parent
sys.path.insert(0, str(ROOT))  # the scripts find `utils` beside them; so must this file
SCRIPTS = {path.name[:2]: path.name for path in sorted(ROOT.glob("0*_*.py"))}
TITLES = {
    0: "The machine",
    1: "The five scripts on MNIST, one epoch, four processes at once",
    2: "CIFAR-10, five processes at once",
    3: "Killed and continued",
    4: "Precision and COMPILE (02 on MNIST)",
    5: "A training step, 28 × 28 pixels",
    6: "Larger images: pixels and latents",
    7: "The same results on CPU and GPU",
}
MINIATURE = {  # constants for the rehearsal, of those that a script has
    **{"DATASET": "DRAWN", "T": 2, "EPOCHS": 1, "BATCH_SIZE": 16, "DDIM_STEPS": 2},
    **{"SAMPLE_STEPS": 2},
    **{"BASE_CH": 4, "CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1, "VAE_CH": 4, "VAE_EPOCHS": 1},
}
SAMPLERS = {"02": "DDPM", "03": "GuidedDDPM", "04": "DDIM", "05": "LatentDiffusion"}
GOOD = "ok", "skipped"


class Skipped(Exception):
    """Something optional is not there, or cannot be rehearsed."""


# %% 1. The parent: starts the jobs, ends them in time, writes the table


def write(path, text):
    """Write a text file by way of a temporary one: whatever interrupts it leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"{path.name}.part")
    partial_file.write_text(text, encoding="utf-8")
    os.replace(partial_file, path)


def in_words(value):
    """Return a cell of a table: numbers with about three digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return "" if value is None else str(value).replace("|", "/")
    if value == 0:
        return "0"
    if not math.isfinite(value) or abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def as_markdown(results):
    """Return all results, {name of a job: what it found}, as tables in Markdown."""
    machine = results.get("machine", {}).get("rows", [])
    lines = [", ".join(f"{key} {in_words(cell)}" for row in machine for key, cell in row.items())]
    for step, title in TITLES.items():
        jobs = {name: job for name, job in results.items() if job["step"] == step}
        rows = [row for job in jobs.values() for row in job["rows"]]
        if jobs and step > 0:
            lines += ["", f"### {step}. {title}"]
        if rows and step > 0:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            columns.sort(key="problem".__eq__)  # stable: that one comes last
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(in_words(row.get(c)) for c in columns)} |" for row in rows]
        notes = [
            f"- {name}: {job['status']} after {job['seconds']:.0f} s. {job['problem']}".rstrip()
            for name, job in jobs.items()
            if job["status"] != "ok"
        ]
        pictures = [f"`{picture}`" for job in jobs.values() for picture in job["pictures"]]
        lines += ["", *notes] if notes else []
        lines += ["", f"Pictures: {', '.join(pictures)}"] if pictures else []
    return "\n".join(lines) + "\n"


def start(names, seconds, options, program):
    """Start a process that does these jobs one after the other, in a process group of its own."""
    command = [sys.executable, str(program), "--jobs", ",".join(names), "--seconds", str(seconds)]
    for name in "out", "work", "data", "images":
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--rehearse"] * options.rehearse + ["--any-md5"] * options.any_md5
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if options.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = options.out / "log" / f"{names[0]}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            command,
            cwd=options.work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process):
    """Kill a process and all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def collect(name, step, ended, options):
    """Return what a job found out; ended: what to say if it did not come to its end by itself."""
    path = options.work / f"{name}.json"
    job = {"step": step, "status": "failed", "seconds": 0.0, "problem": "", "rows": []}
    if path.exists():
        job = json.loads(path.read_text(encoding="utf-8"))
    if job["status"] == "running" or not path.exists():
        job["status"], job["problem"] = ended if path.exists() else ("failed", "It did not start.")
        job["seconds"] = now() - job.pop("started", now())
    sources, job["pictures"] = job.pop("sources", {}), []
    for picture, source in sources.items():
        folder, pattern = Path(source).parent, Path(source).name
        previews = sorted(folder.glob("samples_*.png")) if pattern == "samples.png" else []
        found = [*previews, *folder.glob(pattern)]  # the finished picture, if there is one
        if found:
            shutil.copy(found[-1], options.out / picture)
            job["pictures"].append(picture)
    return job


def run_round(seconds, lanes, jobs, options, program):
    """Run lanes, lists of names of jobs, at the same time; return {name: what it found}."""
    deadline, results = now() + seconds, {}
    processes = [start(names, options.seconds, options, program) for names in lanes]
    try:
        for process, names in zip(processes, lanes):
            try:
                code = process.wait(max(0, deadline - now()))
                ended = "failed", f"Its process ended with {code}."
            except subprocess.TimeoutExpired:
                end(process)
                ended = "too slow", f"It was ended after {seconds:.0f} s."
            for name in names:
                results[name] = collect(name, jobs[name][0], ended, options)
    finally:  # also after Ctrl-C
        for process in processes:
            end(process)
    return results


def run_rounds(rounds, jobs, options, results, program=PROGRAM):
    """Run rounds, pairs of seconds and lanes, one after the other; add to results and write them.

    jobs: {name: (step, function)}, the same that `program` passes to `run_jobs`.
    """
    left_over = 0.0
    for number, (seconds, lanes) in enumerate(rounds, start=1):
        limit, started, options.seconds = seconds + left_over, now(), seconds
        names = [name for lane in lanes for name in lane]
        what = f"Round {number} of {len(rounds)}, at most {limit:.0f} s: {', '.join(names)}"
        print(what, flush=True)
        found = run_round(limit, lanes, jobs, options, program)
        left_over = max(0.0, limit - (now() - started))
        for name, job in found.items():
            print(f"    {name}: {job['status']}, {job['seconds']:.0f} s. {job['problem']}")
        results.update(found)
        write(options.out / "gpu.json", json.dumps(results, indent=1))
        write(options.out / "gpu.md", as_markdown(results))
        if results.get("machine", {"status": "ok"})["status"] != "ok":
            break
    return results


# %% 2. The children: do jobs, and write down at once what they find


class Report:
    """What a job finds out. It is saved with every row, so that a job that is killed keeps it."""

    def __init__(self, path, step):
        self.path = path
        self.found = {"step": step, "status": "running", "started": now(), "problem": ""}
        self.found |= {"rows": [], "sources": {}}
        self.save()

    def save(self):
        write(self.path, json.dumps(self.found))

    @contextlib.contextmanager
    def row(self, **cells):
        """Add a row to the table, to be filled in the body; an error in there ends only the row."""
        self.found["rows"].append(cells)
        self.save()
        try:
            yield cells
        except Skipped as reason:
            cells["problem"] = str(reason)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            cells["problem"] = in_one_line(error)
            self.found["problem"] = "See the table."
        self.save()

    def picture(self, name, source):
        """Have a file shown in the results as `name`, even if it comes to be later."""
        self.found["sources"][name] = str(source)
        self.save()


def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_jobs(names, jobs, options):
    """Do the jobs of these names one after the other; each leaves a file of its results."""
    for name in names:
        step, function = jobs[name]
        report, status = Report(options.work / f"{name}.json", step), "ok"
        print(f"\n=== {name}", flush=True)
        try:
            function(report, options)
            status = "failed" if report.found["problem"] else "ok"
        except Skipped as reason:
            status, report.found["problem"] = "skipped", str(reason)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            status, report.found["problem"] = "failed", in_one_line(error)
        report.found |= {"status": status, "seconds": now() - report.found.pop("started")}
        report.save()
        free_memory()
        if name == "machine" and status != "ok":
            break


# %% 3. Tools for measuring


def device_at_hand():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for_gpu():
    """Wait until the GPU, which runs behind, has done all that it was told; then read the clock."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory():
    """Give back what is no longer used, and measure the highest use of memory from here on."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """Return the most that tensors took on the GPU since `free_memory`, in GB, None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def time_steps(step, warm_up, count):
    """Return the seconds that step() takes, after some that do not count."""
    for _ in range(warm_up):
        step()
    wait_for_gpu()
    started = now()
    for _ in range(count):
        step()
    wait_for_gpu()
    return (now() - started) / count


def time_in_kernels(step):
    """Return how many ms the GPU is busy in step(), and with how many kernels; None on a CPU.

    If that is much less than the step takes, the GPU waits for Python to start the next kernel.
    """
    import torch

    if not torch.cuda.is_available():
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        wait_for_gpu()
    kernels = profile.key_averages()
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1000
    return busy, sum(kernel.count for kernel in kernels)


def constants_of(path):
    return re.findall(r"(?m)^([A-Z][A-Z_0-9]*) = ", path.read_text(encoding="utf-8"))


def prepare(options, folder, script, **constants):
    """Lay a copy of a script and of utils in a folder, set constants at its head, as a person does.

    In the rehearsal all others are those for a miniature, and few digits are drawn.
    """
    shutil.copytree(ROOT / "utils", folder / "utils", dirs_exist_ok=True)
    text, known = (ROOT / script).read_text(encoding="utf-8"), constants_of(ROOT / script)
    constants = {"DATA_DIR": str(options.data), **constants}
    if options.rehearse:
        constants = {**{k: v for k, v in MINIATURE.items() if k in known}, **constants}
        text = text.replace("draw_digits()", "draw_digits(32)")
    for name, value in constants.items():
        line = f"{name} = {value!r}"
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=line: line, text)
        if count != 1:
            raise ValueError(f"{script} has no constant {name} at its head")
    (folder / script).write_text(text, encoding="utf-8")
    return folder / script


def load_module(path):
    """Import a script by its file name, which is no legal module name: definitions only, no run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watch_bars(when_one_ends):
    """Call a function with the name, unit, count, seconds and rate of every progress bar to come.

    The rate leaves out the first quarter, in which a GPU is still getting ready.
    """
    import tqdm

    class Bar(getattr(tqdm.tqdm, "original", tqdm.tqdm)):
        original = getattr(tqdm.tqdm, "original", tqdm.tqdm)

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.marks = [(now(), self.n)]

        def update(self, n=1):
            super().update(n)
            self.marks.append((now(), self.n))

        def close(self):
            if not self.disable and self.n > self.marks[0][1]:
                wait_for_gpu()
                (begin, first), (later, some) = self.marks[0], self.marks[len(self.marks) // 4]
                bar = {"name": self.desc.strip(": "), "unit": self.unit.strip()}
                bar |= {"count": self.n - first, "seconds": now() - begin}
                bar["rate"] = (self.n - some) / max(now() - later, 1e-9)
                super().close()
                when_one_ends(bar)
            super().close()

    tqdm.tqdm = Bar  # the scripts take it from there


@contextlib.contextmanager
def inside(folder):
    """Work in a folder, as the scripts expect: their paths are relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_script(path, options):
    """Run a script in this process: it saves the seconds that importing torch takes."""
    import torchvision

    from utils import visualize

    if options.rehearse or options.any_md5:  # as if CIFAR-10's files were the original ones
        torchvision.datasets.cifar.check_integrity = lambda *_: True
    if options.rehearse:  # small figures, roughly laid out, are quick
        visualize.STYLE["savefig.dpi"] = 50
        visualize.STYLE["figure.constrained_layout.use"] = False
    with inside(path.parent):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise RuntimeError(f"{path.name} ended with {stopped.code}") from None


def checkpoint_of(path):
    return path.parent / "outputs" / path.stem / "checkpoint.pt"


def lay_cifar10(folder, count=100):
    """For the rehearsal: write images of random colour in CIFAR-10's own file format."""
    import numpy as np

    (folder / "cifar-10-batches-py").mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(0).integers(0, 256, (count // 5, 3, 1), dtype=np.uint8)
    batch = {"data": colours.repeat(1024, axis=2).reshape(-1, 3072)}
    batch["labels"] = [i % 10 for i in range(len(colours))]
    files = dict.fromkeys([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], batch)
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    for name, contents in files.items():
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(contents))


def lay_images(folder, count=32, side=64):
    """For the rehearsal: write a folder of two classes of pictures."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("left", "right")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(path)


def make_sampler(module, shape, device, **changes):
    """Return 02's untrained sampler for images of this shape, and its settings.

    changes: constants other than those of the module.
    """
    import torch

    settings = module.check(vars(module))[0] | {"IMAGE_SHAPE": shape, **changes}
    torch.manual_seed(settings["SEED"])
    torch.set_float32_matmul_precision("high")
    return module.DDPM.build(settings, device), settings


def training_step(sampler, net, x_0, module, muon=True):
    """Return a training step as in 02's `train`, with Muon or with Adam alone, on any network."""
    import torch

    weights = list(net.parameters())
    inner, outer = module.split_weights(net) if muon else ([], weights)
    optimizers = [torch.optim.Adam(outer, 2e-4, betas=(0.9, 0.99), fused=True)]
    optimizers += [module.Muon(inner, lr=1e-3)] if muon else []
    averaged = copy.deepcopy(net).eval().requires_grad_(False)

    def step():
        sampler.loss(x_0).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        module.update_average(averaged, net, 1, 0.999)

    return step


def some_images(count, shape, device):
    import torch

    return torch.rand(count, *shape, device=device) * 2 - 1


def compile_model(model, options):
    """Do what COMPILE = True does."""
    import torch

    if options.rehearse:
        raise Skipped("not rehearsed: needs a GPU")
    torch._dynamo.reset()  # no memory of other models, which could lead to another program
    model.compile()


# %% 4. The jobs


def machine(report, options):
    """Name the GPU and the versions, and see whether it computes at all."""
    import torch

    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    if options.rehearse:
        cells = {"Rehearsed on a CPU:": f"{os.cpu_count()} cores"} | versions
    elif not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no NVIDIA GPU. `--rehearse` needs none.")
    else:
        card = torch.cuda.get_device_properties(0)
        cells = {card.name: f"with {card.total_memory / 2**30:.1f} GiB"} | versions
        cells |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        cells["bfloat16:"] = torch.cuda.is_bf16_supported(including_emulation=False)
    with report.row(**cells):
        # A card that this PyTorch does not support is found, but its first product fails.
        square = torch.eye(64, device=device_at_hand())
        assert (square @ square).sum().item() == 64, "the GPU computes something else"


def download(report, options):
    """Fetch the datasets that are not there, so that no job has to."""
    import torchvision

    for name in missing_data(options):
        getattr(torchvision.datasets, name)(options.data, train=True, download=True)


def missing_data(options):
    folders = {"MNIST": "MNIST/raw", "CIFAR10": "cifar-10-batches-py"}
    return [name for name, folder in folders.items() if not (options.data / folder).exists()]


def script_on_mnist(number, report, options):
    """Step 1: run a script with its GPU defaults and one epoch; then sample from its file."""
    script, folder, bars, speeds = SCRIPTS[number], options.work / "mnist", [], []
    known = constants_of(ROOT / script)
    few = {name: 1 for name in ("EPOCHS", "VAE_EPOCHS") if name in known}
    path = prepare(options, folder, script, **few)
    with report.row(script=script) as row:

        def note(bar):
            bars.append(bar)
            if bar["unit"] == "images":
                speeds.append(float(bar["rate"]))
                row["training images/s"] = " + ".join(map(in_words, speeds))  # 05: VAE, diffusion
                report.save()

        watch_bars(note)
        report.picture(f"mnist_{number}.png", folder / "outputs" / path.stem / "samples.png")
        run_script(path, options)
        module = load_module(path)
        precision = getattr(module, "best_precision", None)
        row["precision"] = str(precision(device_at_hand()) if precision else "torch.float32")[6:]
        row["peak memory, GB"] = peak_memory()
        row.setdefault("training images/s", "none: 02's network")
        if number in ("01", "02"):  # all T steps: as long as the script itself took for 36 images
            bar = next(bar for bar in bars if bar["name"] == "Sampling")
            row |= {"images sampled": 36, "steps": bar["count"], "seconds": bar["seconds"]}
            row["sampled images/s"] = 36 / bar["seconds"]
    for method, sample in samplers_of(number, module, path).items():
        with report.row(script=f"{number}: {method}") as row:
            count = 4 if options.rehearse else 64
            seconds = time_steps(partial(sample, count), 0, 1)
            row |= {"images sampled": count, "steps": bars[-1]["count"]}
            row |= {"seconds": seconds, "sampled images/s": count / seconds}


def samplers_of(number, module, path):
    """Return functions from a number of images to that many, by name, for 03 to 05."""
    if number in ("01", "02"):
        return {}
    checkpoint = checkpoint_of(path)
    if not checkpoint.exists():  # 04 uses 02's
        checkpoint = checkpoint_of(path.with_name(SCRIPTS["02"]))
    sampler = getattr(module, SAMPLERS[number]).load(checkpoint)
    steps = getattr(module, "DDIM_STEPS", None)
    if number == "03":
        return {"with guidance": lambda n: sampler.sample(n, [i % 10 for i in range(n)], 2.0)}
    if number == "05":
        return {"DDIM": lambda n: sampler.sample(n, steps)}
    return {"DDIM": lambda n: sampler.ddim_sample(n, steps), "DDPM": sampler.sample}


def script_on_cifar10(number, report, options):
    """Step 2: train a script on CIFAR-10 as long as the time allows, and keep its samples."""
    import torch

    folder, name = options.work / f"cifar10_{number}", SCRIPTS[number]
    constants = {"DATASET": "CIFAR10"}
    if options.rehearse:
        lay_cifar10(options.data)
    with report.row(script=name) as row:
        # How fast is it? 03's network is as large as 02's.
        module = load_module(prepare(options, folder, SCRIPTS["02"], DATASET="CIFAR10"))
        batch = module.BATCH_SIZE
        shape, device = (3, 32, 32), device_at_hand()
        sampler, _ = make_sampler(module, shape, device)
        step = training_step(sampler, sampler.model, some_images(batch, shape, device), module)
        seconds = time_steps(step, *steps_for(options, 10, 30))
        # A third of the time is for starting, sampling and the figures.
        constants["EPOCHS"] = max(1, int(0.65 * options.seconds * batch / seconds / 50_000))
        if options.rehearse:
            constants["EPOCHS"] = 1
        row["epochs"] = constants["EPOCHS"]
        path = prepare(options, folder, name, SAVE_EVERY=1, PREVIEW_EVERY=1, **constants)
        outputs = checkpoint_of(path).parent
        report.picture(f"cifar10_{number}.png", outputs / "samples.png")
        if number == "03":
            report.picture("cifar10_03_guidance.png", outputs / "guidance.png")

        def note(bar):
            if bar["unit"] == "images":
                row["training images/s"] = bar["rate"]
                row["seconds of training"] = bar["seconds"]
                report.save()

        del sampler, step
        free_memory()
        watch_bars(note)
        run_script(path, options)
        losses = torch.load(checkpoint_of(path), map_location="cpu", weights_only=True)["losses"]
        row |= {"steps": len(losses), "loss, last 100": sum(losses[-100:]) / len(losses[-100:])}
        row["peak memory, GB"] = peak_memory()


def steps_for(options, warm_up, count):
    """Return how many steps warm up and how many are timed: one each in the rehearsal."""
    return (1, 1) if options.rehearse else (warm_up, count)


def relay(report, options):
    """Step 3: kill 02 in training; continue it on the GPU, on the CPU, and on the GPU again."""
    folder, script, epochs = options.work / "relay", SCRIPTS["02"], 8 if options.rehearse else 12
    constants = {"DATASET": "DRAWN", "T": 2 if options.rehearse else 50, "SAVE_EVERY": 0.005}
    constants |= {"BASE_CH": 8, "CHANNEL_MULT": (1, 2), "NUM_BLOCKS": 1, "BATCH_SIZE": 16}
    gpu = "cpu" if options.rehearse else "cuda"
    path = prepare(options, folder, script, EPOCHS=epochs, PREVIEW_EVERY=1000, **constants)
    text = path.read_text(encoding="utf-8").replace("draw_digits()", "draw_digits(1000)")
    path.write_text(text, encoding="utf-8")
    checkpoint, log = checkpoint_of(path), folder / "killed.txt"
    with report.row(run="killed (-9)", device=gpu) as row:
        started = now()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, script], cwd=folder, stdout=file, stderr=file
            )
        while not checkpoint.exists():
            if process.poll() is not None:
                raise RuntimeError(f"it ended before its first checkpoint: {tail(log)}")
            sleep(0.01)
        sleep(0.5)  # somewhere after that
        process.kill()
        row |= {"seconds": now() - started, "result": "a checkpoint is there"}
        if process.wait() == 0:
            row["result"] = "it was faster than the blow"
    legs = [gpu] if options.rehearse else [gpu, "cpu", gpu]
    for number, device in enumerate(legs):
        with report.row(run=f"continued, EPOCHS = {epochs + number}", device=device) as row:
            started = now()
            text = path.read_text(encoding="utf-8")
            text = re.sub(r"(?m)^EPOCHS = .*$", f"EPOCHS = {epochs + number}", text)
            path.write_text(text, encoding="utf-8")
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            done = subprocess.run(
                [sys.executable, script],
                **{"cwd": folder, "env": {**os.environ, **hidden}},
                **{"capture_output": True, "text": True, "encoding": "utf-8"},
            )
            print(done.stdout, done.stderr, flush=True)
            assert done.returncode == 0, f"it ended with {done.returncode}: {done.stderr[-300:]}"
            seen = re.search(r"Resuming from .*, after ([\d,]+) of ([\d,]+) images", done.stdout)
            assert seen, "it did not resume from the checkpoint"
            assert f"on {device}" in done.stdout, f"it did not run on {device}"
            row |= {"seconds": now() - started, "result": f"from image {seen[1]} to {seen[2]}"}
    report.picture("relay.png", checkpoint.with_name("samples.png"))


def tail(log):
    return log.read_text(encoding="utf-8", errors="replace")[-300:]


def start_of_compile(report, options):
    """Step 4: seconds until the first compiled training step; fills the compiler's cache, too."""
    module = load_module(prepare(options, options.work / "measured", SCRIPTS["02"]))
    for width in (4,) if options.rehearse else (64, 128):
        precision = str(module.best_precision(device_at_hand()))[6:]
        with report.row(precision=precision, BASE_CH=width, COMPILE=True) as row:
            shape, device = (1, 28, 28), device_at_hand()
            sampler, _ = make_sampler(module, shape, device, BASE_CH=width)
            compile_model(sampler.model, options)
            x_0 = some_images(module.BATCH_SIZE, shape, device)
            step = training_step(sampler, sampler.model, x_0, module)
            row["seconds to the first step"] = time_steps(step, 0, 1)


def precisions(report, options):
    """Step 4: speed and loss of a whole short training, in each precision."""
    import torch

    module = load_module(prepare(options, options.work / "measured", SCRIPTS["02"]))
    dataset = module.load_dataset(module.DATASET, options.data, module.IMAGE_SIZE)
    images = dataset[0][: 200 * module.BATCH_SIZE]
    for name, compiled in (
        ("bfloat16", False),
        ("float16", False),
        ("float32", False),
        ("bfloat16", True),
    ):
        with report.row(precision=name, BASE_CH=module.BASE_CH, COMPILE=compiled) as row:
            module.best_precision = lambda _, name=name: getattr(torch, name)
            free_memory()
            short_training(module, images, compiled, row, options)


def short_training(module, images, compiled, row, options):
    """Train 02's network for one epoch of images, uint8 (N, C, H, W), and fill the row."""
    count, started = len(images) // module.BATCH_SIZE, []
    device, path = device_at_hand(), options.work / "measured" / "checkpoint.pt"
    path.unlink(missing_ok=True)
    sampler, settings = make_sampler(module, tuple(images.shape[1:]), device, EPOCHS=1)
    if compiled:
        compile_model(sampler.model, options)
    images = images.to(device)

    def loss(index):
        if len(started) in (count // 10, count - 1):
            wait_for_gpu()
        started.append(now())
        return sampler.loss(module.to_batch(images[index]))

    _, losses = module.train(sampler.model, loss, len(images), settings, (), path)
    warm_up = count // 10
    row["steps/s"] = (count - 1 - warm_up) / (started[-1] - started[warm_up])
    row[f"loss after {count} steps"] = sum(losses[-50:]) / len(losses[-50:])
    row["peak memory, GB"] = peak_memory()


def their_unet(width, module, settings, device):
    """Return diffusers' U-Net of the same shape as 02's."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise Skipped("diffusers is not installed") from None
    import torch

    channels, side, _ = settings["IMAGE_SHAPE"]
    levels = range(len(settings["CHANNEL_MULT"]))
    attention = [side // 2**level in settings["ATTENTION_AT"] for level in levels]
    net = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=settings["NUM_BLOCKS"],
        block_out_channels=tuple(width * mult for mult in settings["CHANNEL_MULT"]),
        down_block_types=tuple(f"{'Attn' * a}DownBlock2D" for a in attention),
        up_block_types=tuple(f"{'Attn' * a}UpBlock2D" for a in reversed(attention)),
        attention_head_dim=min(64, width),
        norm_num_groups=math.gcd(8, width),
        dropout=settings["DROPOUT"],
    ).to(device, memory_format=module.best_layout(device))
    precision = module.best_precision(device)

    def model(x_t, t):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return net(x_t, t).sample.float()

    return net, model


def bf16_peak(options):
    """Return the operations per second of a large product of bfloat16 matrices."""
    import torch

    side, dtype = (256, torch.float32) if options.rehearse else (8192, torch.bfloat16)
    a, b = torch.randn(2, side, side, device=device_at_hand(), dtype=dtype)
    return 2 * side**3 / time_steps(lambda: a @ b, 3, 20)


def operations(loss):
    """Return how many operations a loss and its gradients take; a product and a sum are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def training_steps(report, options):
    """Step 5: 02's training step, the same with Adam alone, compiled, and that of diffusers."""
    module = load_module(prepare(options, options.work / "measured", SCRIPTS["02"]))
    peak = bf16_peak(options)
    with report.row(network="a product of large matrices", BASE_CH=None) as row:
        row |= {"TFLOP/s": peak / 1e12, "share of peak": 1.0}
    names, widths = (
        ("02, Muon", "02, Adam", "diffusers, Adam"),
        (4,) if options.rehearse else (64, 128),
    )
    for name, width in (
        *((name, width) for width in widths for name in names),
        *(("02, Muon, compiled", width) for width in widths),  # takes longest
    ):
        with report.row(network=name, BASE_CH=width) as row:
            free_memory()
            time_training_step(name, width, module, peak, row, options)
        compare_with_diffusers([row for row in report.found["rows"] if row["BASE_CH"] == width])


def compare_with_diffusers(rows):
    """Add to rows of the same width how many times as fast as diffusers they are."""
    timed = [row for row in rows if "ms" in row]
    for theirs in [row for row in timed if row["network"].startswith("diffusers")]:
        for row in timed:
            row["times diffusers' speed"] = theirs["ms"] / row["ms"]


def time_training_step(name, width, module, peak, row, options):
    """Time the training step of a network of this name and width, and fill the row."""
    device, batch, shape = device_at_hand(), module.BATCH_SIZE, (1, 28, 28)
    x_0 = some_images(batch, shape, device)
    sampler, settings = make_sampler(module, shape, device, BASE_CH=width)
    net = sampler.model
    if "diffusers" in name:
        net, sampler.model = their_unet(width, module, settings, device)
    flops = operations(lambda: sampler.loss(x_0))
    net.zero_grad()
    if "compiled" in name:
        compile_model(net, options)
    step = training_step(sampler, net, x_0, module, muon="Muon" in name)
    seconds = time_steps(step, *steps_for(options, 10, 40))
    busy, kernels = time_in_kernels(step)
    row |= {"million weights": sum(weight.numel() for weight in net.parameters()) / 1e6}
    row |= {"ms": 1000 * seconds, "images/s": batch / seconds}
    row |= {"ms in kernels": busy, "kernels": kernels}
    row |= {"TFLOP/s": flops / seconds / 1e12, "share of peak": flops / seconds / peak}
    row["peak memory, GB"] = peak_memory()


def own_images(report, options):
    """Step 6: 05 on a folder of images at 64 pixels."""
    if options.rehearse:
        lay_images(options.images)
    if not options.images.is_dir():
        raise Skipped(f"There is no folder {options.images.name} of images: see --images.")
    constants = {"DATASET": str(options.images), "IMAGE_SIZE": 64}
    if not options.rehearse:  # about 40 s with some thousand images
        constants |= {"VAE_EPOCHS": 12, "EPOCHS": 30}
    with report.row(what="05 at 64 × 64 pixels") as row:
        path = prepare(options, options.work / "images", SCRIPTS["05"], **constants)
        speeds, outputs = [], checkpoint_of(path).parent
        report.picture("images_05.png", outputs / "samples.png")
        report.picture("images_05_autoencoder.png", outputs / "autoencoder.png")

        def note(bar):
            if bar["unit"] == "images" and not bar["name"].startswith("Reading"):
                speeds.append(bar)
                row["VAE images/s"], row["images/s"] = speeds[0]["rate"], speeds[-1]["rate"]
                row["seconds of training"] = sum(speed["seconds"] for speed in speeds)
                report.save()

        watch_bars(note)
        run_script(path, options)
        row["peak memory, GB"] = peak_memory()


def pixels_or_latents(report, options):
    """Step 6: a training step of 05's U-Net at 128 pixels, on pixels and on latents."""
    folder, device = options.work / "latents", device_at_hand()
    module = load_module(prepare(options, folder, SCRIPTS["02"]))
    of_05 = load_module(prepare(options, folder, SCRIPTS["05"]))
    names = "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT"
    settings = {name: getattr(of_05, name) for name in names}
    side, batch = (32, 2) if options.rehearse else (128, 16)
    small = side // of_05.DOWNSAMPLE
    rows = []
    for what, shape in ("pixels", (3, side, side)), ("latents", (of_05.LATENT_CH, small, small)):
        sizes = " × ".join(map(str, (batch, *shape)))
        with report.row(what=f"05's U-Net on {what}, {sizes}") as row:
            sampler = step = None  # not both at once
            free_memory()
            sampler, _ = make_sampler(module, shape, device, **settings)
            step = training_step(sampler, sampler.model, some_images(batch, shape, device), module)
            seconds = time_steps(step, *steps_for(options, 5, 20))
            row |= {"ms per step": 1000 * seconds, "images/s": batch / seconds}
            row["peak memory, GB"] = peak_memory()
            rows.append(row)
    with report.row(what="pixels / latents") as row:
        for key in "ms per step", "peak memory, GB":
            pixels, latents = (other[key] for other in rows)
            row[key] = pixels / latents if latents else None


class Counter:
    """A plugin of pytest that counts how the tests came out."""

    def __init__(self):
        self.outcomes = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.append(report.outcome)


def device_tests(report, options):
    """Step 7: the tests of the branches for GPUs, on a machine that has one."""
    with report.row(what="tests/test_devices.py") as row:
        try:
            import pytest
        except ImportError:
            raise Skipped("pytest is not installed") from None
        path = ROOT / "tests" / "test_devices.py"
        if options.rehearse:  # the suite runs it anyway
            path = options.work / "test_nothing.py"
            path.write_text("def test_nothing():\n    pass\n")
        counter, arguments = Counter(), ["-q", "-p", "no:cacheprovider", str(path)]
        code = pytest.main([*arguments, f"--rootdir={path.parent}"], plugins=[counter])
        outcomes = dict.fromkeys(counter.outcomes)
        row["result"] = ", ".join(f"{counter.outcomes.count(o)} {o}" for o in outcomes)
        assert code == 0, "see the log"


def twins(number, module, device):
    """Return a script's sampler with the same random weights, on the CPU and on a device."""
    import torch

    settings = module.check(vars(module))[0]
    settings |= {"BASE_CH": 32, "T": 40, "IMAGE_SHAPE": (1, 28, 28)}
    settings |= {"CLASS_NAMES": [*"0123456789"]}  # for 03
    module.best_precision = lambda _: torch.float32
    build = getattr(module, SAMPLERS[number]).build
    samplers = [build(settings, d) for d in (torch.device("cpu"), device)]
    torch.manual_seed(0)
    # Many weights begin as zeros, with which half of the network would not count.
    weights = samplers[0].model.state_dict()
    weights = {name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}
    for sampler in samplers:
        sampler.model.load_state_dict(weights)
        sampler.model.eval().requires_grad_(False)
    return samplers


def gradients(sampler, module, x_0, t, noise):
    import torch

    model = sampler.model.requires_grad_(True)
    noise_pred = model(module.q_sample(x_0, t, noise, sampler.alphas_cumprod), t)
    (noise - noise_pred).square().mean().backward()
    return torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()])


def muon_step(sampler, module):
    """Return the weights after a step of Muon along the gradients that are there."""
    import torch

    weights = [weight for weight in sampler.model.parameters() if weight.ndim > 1]
    module.Muon(weights, lr=0.02).step()
    return torch.cat([weight.detach().flatten().cpu() for weight in weights])


def same_mathematics(report, options):
    """Step 7: networks, gradients, Muon and samplers give the same on the CPU and on the GPU."""
    import torch

    device = device_at_hand()
    torch.backends.cudnn.allow_tf32 = False  # all digits
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 4, 1, 28, 28, generator=generator).clamp(-1, 1)
    labels = torch.arange(4)
    modules = {
        number: load_module(prepare(options, options.work / "twins", SCRIPTS[number]))
        for number in ("02", "03", "04")
    }
    pairs = {number: twins(number, module, device) for number, module in modules.items()}
    of_02, t, steps = modules["02"], torch.tensor([0, 10, 20, 30]), 10
    for what, number, compute in (
        ("02: network", "02", lambda s, to: s.model(to(noise), to(t))),
        ("02: one step back", "02", lambda s, to: s.p_sample(to(noise), 0, -1)[1]),
        ("02: gradients", "02", lambda s, to: gradients(s, of_02, to(x_0), to(t), to(noise))),
        ("02: weights after a step of Muon", "02", lambda s, to: muon_step(s, of_02)),
        ("03: guided noise", "03", lambda s, to: s.predict_noise(to(noise), 20, to(labels), 3.0)),
        ("04: DDIM", "04", lambda s, to: s.ddim_sample(x_T=to(noise), ddim_steps=steps, eta=0)),
        ("04: DDIM inversion", "04", lambda s, to: s.ddim_invert(to(x_0), steps)),
    ):
        with report.row(what=what) as row:
            results = []
            for sampler in pairs[number]:
                result = compute(sampler, lambda tensor, s=sampler: tensor.to(s.device))
                results.append(result.detach().cpu().double())
            difference = ((results[1] - results[0]).norm() / results[0].norm()).item()
            row["relative difference"] = difference
            row["result"] = "same" if difference < 0.01 else "different"
            assert difference < 0.01, "CPU and GPU disagree"


JOBS = {
    "machine": (0, machine),
    "download": (0, download),
    **{f"script_{n}": (1, partial(script_on_mnist, n)) for n in SCRIPTS},
    **{f"cifar10_{n}": (2, partial(script_on_cifar10, n)) for n in ("02", "03")},
    "relay": (3, relay),
    "compile": (4, start_of_compile),
    "precisions": (4, precisions),
    "steps": (5, training_steps),
    "images": (6, own_images),
    "latents": (6, pixels_or_latents),
    "tests": (7, device_tests),
    "mathematics": (7, same_mathematics),
}
ROUNDS = (  # seconds, and what runs at the same time: each list is a process; 540 s in all
    (20, [["machine"]]),
    # The compiler works beside the scripts; steps 4 and 5 find its work in the cache.
    (180, [["script_02", "script_04"], ["script_03"], ["script_05", "script_01"], ["compile"]]),
    (180, [["cifar10_02"], ["cifar10_03"], ["relay"], ["images"], ["tests", "mathematics"]]),
    (60, [["precisions"]]),
    (80, [["steps"]]),
    (20, [["latents"]]),
)


# %% 5. Run


def rounds_of(options):
    """Return the rounds that are asked for; in the rehearsal one, with everything."""
    if options.rehearse:
        runs = [name for name, (step, _) in JOBS.items() if step < 3 and name != "download"]
        others = [name for name in JOBS if name not in (*runs, "relay", "download")]
        return [(240, [runs, others, ["relay"]])]
    wanted = {name for name, (step, _) in JOBS.items() if step in options.steps or step == 0}
    rounds = []
    for seconds, lanes in ROUNDS:
        lanes = [[name for name in lane if name in wanted] for lane in lanes]
        if any(lanes):
            rounds.append((seconds, [lane for lane in lanes if lane]))
    return rounds


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = [step for step in TITLES if step > 0]
    parser.add_argument("steps", nargs="*", type=int, help="some of the steps only")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="for results")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="MNIST and CIFAR-10")
    parser.add_argument("--images", type=Path, help="a folder of images; DATA/emoji unless given")
    parser.add_argument("--any-md5", action="store_true", help="take any files for CIFAR-10")
    for name in "--jobs", "--work", "--seconds":  # from the parent to its children
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not set(options.steps) <= set(steps):
        parser.error(f"steps are {steps[0]} to {steps[-1]}")
    options.partly, options.steps = bool(options.steps), options.steps or steps
    options.images = options.images or options.data / "emoji"
    for name in "out", "data", "images":
        setattr(options, name, getattr(options, name).expanduser().resolve())
    return options


def lead(options):
    """Run all that is asked for, print the table, and return 0 if everything went well."""
    options.out.mkdir(parents=True, exist_ok=True)
    old, results, started = options.out / "gpu.json", {}, now()
    if options.partly and old.exists():
        results = json.loads(old.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options.work = Path(folder).resolve()
        if options.rehearse:
            options.data, options.images = options.work / "data", options.work / "pictures"
        elif missing_data(options):  # takes as long as the network needs
            run_rounds([(1800, [["machine", "download"]])], JOBS, options, results)
        run_rounds(rounds_of(options), JOBS, options, results)
    print(f"\n{as_markdown(results)}\n{now() - started:.0f} s. Results: {options.out}")
    return 0 if all(job["status"] in GOOD for job in results.values()) else 1


def follow(options, jobs):
    """Do what the parent has asked this process for."""
    options.work, options.seconds = Path(options.work), float(options.seconds)
    run_jobs(options.jobs.split(","), jobs, options)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(follow(options, JOBS) if options.jobs else lead(options))
