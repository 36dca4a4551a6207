"""What only a GPU can show, in nine minutes: one command, one file of tables, and pictures.

    python tests/gpu.py                # all jobs, in the order below
    python tests/gpu.py 3 4            # some of them; the first one, the machine, always runs
    python tests/gpu.py --rehearse     # all of them in miniature on a CPU, in half a minute

It needs one NVIDIA GPU and the packages of requirements.txt; job 3 compares with diffusers if that
is installed. MNIST and CIFAR-10 are in `data/` (see --data). The scripts download what is missing,
and that counts towards the time of a job.

1   names of the GPU and the versions
2   16 bits train about as well as 32; 02, 03 and 05 compute the same on CPU and GPU
3   time and memory of a training step: diffusers' U-Net, 02 with Adam, and 02 with Muon
4   03 on CIFAR-10, alone on the GPU, for about four minutes
5   each script with its GPU settings, but fewer steps
6   02 is killed in training, and resumes on the GPU, the CPU, and the GPU again
7   what loss and gradients of 05 cost on pixels and on latents

Each job is a function that runs in a process of its own with a time limit. Later jobs may use the
time that earlier ones did not need. A job that fails or takes too long is noted with the last line
of its log, the rows that it had found are kept, and the next job starts. After each job, the
results so far are in `outputs/gpu/` (see --out): the tables in `gpu.md`, the samples of each script
beside it, and everything that was printed in `log/`.
"""

import argparse
import contextlib
import copy
import gc
import importlib
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import timeit
import traceback
from pathlib import Path
from statistics import fmean as mean
from time import monotonic as now
from time import sleep

if __name__ == "__mp_main__":  # in the process of a job; the one that starts it needs no torch
    import torch
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ON_GPU = DEVICE.type == "cuda"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts find `utils` beside them; so must this file
SCRIPTS = {path.name[:2]: path.name for path in sorted(ROOT.glob("0*_*.py"))}
SAMPLERS = {"02": "DDPM", "03": "GuidedDDPM", "05": "LatentDiffusion"}
MINIATURE = {  # the constants of the rehearsal
    **{"DATASET": "DRAWN", "T": 2, "EPOCHS": 1, "BATCH_SIZE": 16, "BASE_CH": 4, "NUM_BLOCKS": 1},
    **{"CHANNEL_MULT": (1, 2), "DDIM_STEPS": 2, "SAMPLE_STEPS": 2, "VAE_CH": 4, "VAE_EPOCHS": 1},
}
# The training steps that job 3 compares with the first of them; `make_step` looks for the words.
VARIANTS = "diffusers, Adam", "02, Adam", "02, Muon"


# %% 1. The parent: starts the jobs, ends them in time, writes the results

# Processes fork from one that has imported torch, which takes seconds, but has not used the GPU.
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")


def in_words(value):
    """Return a cell of a table: numbers with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")


def last_line(text):
    """Return the last line that is not empty; a progress bar begins again after each return."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1][:300] if lines else ""


def as_markdown(results):
    """Return results, {title of a job: what it found}, as tables in Markdown."""
    lines = ["# The scripts on a GPU"]
    for title, job in results.items():
        columns = list(dict.fromkeys(key for row in job["rows"] for key in row))
        table = [columns, ["---"] * len(columns)] if columns else []
        table += [[in_words(row.get(column, "")) for column in columns] for row in job["rows"]]
        lines += ["", f"## {title}", "", *(f"| {' | '.join(cells)} |" for cells in table)]
        lines += ["", job["outcome"], *(f"Picture: `{name}`." for name in job["pictures"])]
    return "\n".join(lines) + "\n"


def run_job(number, function, seconds, options):
    """Run a job in a process of its own; return its rows, its pictures, and how it ended."""
    rows, status, started = {}, "too slow", now()
    options.deadline, log = started + seconds, options.out / "log" / f"{number}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    receiver, sender = CONTEXT.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = CONTEXT.Process(target=do_job, args=(function, log, folder, options, sender))
        process.start()
        sender.close()  # the process has its own: when that closes, the process has ended
        try:
            while receiver.poll(max(0, options.deadline - now())):
                rows.update([receiver.recv()])
        except (EOFError, OSError):
            process.join(10)
            status = "failed" if process.exitcode else "ok"
        finally:  # also after Ctrl-C: kill it, and all that it has started
            with contextlib.suppress(AttributeError, ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        pictures = keep_pictures(number, Path(folder), options.out)
    error = "" if status == "ok" else last_line(log.read_text("utf-8", errors="replace"))
    outcome = f"{status} after {now() - started:.0f} of {seconds:.0f} seconds. {error}".rstrip()
    return {"rows": [*rows.values()], "pictures": pictures, "status": status, "outcome": outcome}


def keep_pictures(number, folder, out):
    """Copy the samples of each script in a folder, or the newest preview; return the names."""
    found = {}
    for outputs in folder.glob("outputs/*"):
        for path in [*sorted(outputs.glob("samples_step_*.png")), *outputs.glob("samples.png")]:
            found[f"{number}_{outputs.name}.png"] = path  # the last of them
    return sorted(shutil.copy(path, out / name).name for name, path in found.items())


def run_jobs(jobs, options):
    """Run jobs, {number: (function, seconds)}, one after the other; return what they found.

    Time is no object in the rehearsal: the computer may be busy.
    """
    results, left_over = {}, 500.0 if options.rehearse else 0.0
    for number, (function, seconds) in jobs.items():
        title = f"{number}. {function.__doc__.splitlines()[0]}"
        print(title, end=" ", flush=True)
        job = results[title] = run_job(number, function, seconds + left_over, options)
        left_over = max(0.0, options.deadline - now())
        print(job["outcome"])
        (options.out / "gpu.md").write_text(as_markdown(results), encoding="utf-8")
        if function is machine and job["status"] != "ok":
            break
    return results


# %% 2. The children: do a job, and send at once what they find


def do_job(function, log, folder, options, sender):
    """Do a job in an empty folder, and print to a log; after an error, exit with status 1."""
    if os.name == "posix":
        os.setsid()  # a process group of its own: killpg ends all that it starts
    sys.stdout = sys.stderr = log.open("w", buffering=1, encoding="utf-8")
    for descriptor in 1, 2:  # also what is not printed by Python
        os.dup2(sys.stdout.fileno(), descriptor)
    os.chdir(folder)
    sys.path.insert(0, folder)
    if options.any_md5:  # take any files for CIFAR-10
        torchvision.datasets.cifar.check_integrity = lambda *_: True
    rows = []
    function(lambda **cells: add_row(rows, sender, **cells), options)
    sys.exit("; ".join(row["problem"] for row in rows if "problem" in row) or 0)


@contextlib.contextmanager
def add_row(rows, sender, **cells):
    """Add a row to the table, to be filled in the body; an error there ends only this row."""
    rows.append(cells)
    number = len(rows)
    sender.send((number, cells))
    try:
        yield cells
    except ImportError as error:  # of what is optional
        cells["skipped"] = str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        cells["problem"] = last_line(f"{type(error).__name__}: {error}")
    sender.send((number, cells))


def wait_for_gpu():
    """Wait until the GPU, which runs behind Python, has finished: a number has to come from it."""
    torch.ones((), device=DEVICE).item()


def forget_memory():
    """Measure the highest use of memory from here on, without what earlier scripts left behind."""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """Return the most that tensors took on the GPU since `forget_memory`, as a cell of a row."""
    return {"GB": torch.cuda.max_memory_allocated() / 1e9} if ON_GPU else {}


def best_time(step, count):
    """Return the seconds of a step(): the best of three timings, after one that does not count."""

    def steps():
        for _ in range(count):
            step()
        wait_for_gpu()

    return min(timeit.repeat(steps, number=1, repeat=4)[1:]) / count


def prepare(options, number, **constants):
    """Copy a script here with other constants at its head, as a person would set them."""
    constants = options.constants | constants

    def edit(line):
        return f"{line[1]} = {constants[line[1]]!r}" if line[1] in constants else line[0]

    path = Path(SCRIPTS[number])
    text = re.sub(r"(?m)^([A-Z][A-Z_]*) = .*$", edit, (ROOT / path).read_text("utf-8"))
    if constants.get("DATASET") == "DRAWN":  # few of them: drawing takes time
        text = text.replace("draw_digits()", "draw_digits(200)")
    path.write_text(text, encoding="utf-8")
    return path


def load(options, number, **constants):
    """Import a script with other constants at its head: definitions only, no run."""
    torch.set_float32_matmul_precision("high")  # as in the scripts
    return importlib.import_module(prepare(options, number, **constants).stem)


def run_script(path, options):
    """Run a script in this process; return the seconds, and the folder with its results."""
    from utils import visualize

    if options.rehearse:  # small figures are quick
        visualize.STYLE |= {"savefig.dpi": 50, "figure.constrained_layout.use": False}
    started = now()
    runpy.run_path(str(path), run_name="__main__")
    return now() - started, Path("outputs") / path.stem


def build(number, module, shape, device, **changes):
    """Return a script's untrained sampler for images of this shape, and its settings.

    changes: constants other than those of the module. 03 gets ten classes.
    """
    changes |= {"IMAGE_SHAPE": shape, "CLASS_NAMES": [*"0123456789"]}
    settings = module.check(vars(module))[0] | changes
    torch.manual_seed(settings["SEED"])
    return getattr(module, SAMPLERS[number]).build(settings, device), settings


def train_for(steps, module, number, data):
    """Train a script's network with its `train`; return the losses, and the seconds of a step.

    data: images, uint8 (N, C, H, W), and in 03 labels. The first fifth of the steps is not timed.
    """
    sampler, settings = build(number, module, tuple(data[0].shape[1:]), DEVICE)
    path, first, times, count = Path(tempfile.mkdtemp(dir=".")), steps // 5, [], len(data[0])

    def loss(index):
        if len(times) in (first, steps - 1):
            wait_for_gpu()
        times.append(now())
        images, *labels = (part[index] for part in data)
        return sampler.loss(module.to_batch(images, module.FLIP), *labels)

    settings["EPOCHS"] = (steps * settings["BATCH_SIZE"] - 0.5) / count
    _, losses = module.train(sampler.model, loss, count, settings, (), path / "checkpoint.pt")
    return losses, (times[-1] - times[first]) / (steps - 1 - first)


# %% 3. The jobs


def machine(add_row, options):
    """The machine"""
    if not ON_GPU and not options.rehearse:
        sys.exit("PyTorch finds no NVIDIA GPU; --rehearse does without.")
    cells = {"PyTorch": str(torch.__version__), "Python": sys.version.split()[0]}
    if ON_GPU:
        gpu = torch.cuda.get_device_properties(0)
        cells |= {"GPU": gpu.name, "GiB": gpu.total_memory / 2**30, "CUDA": torch.version.cuda}
    with add_row(**cells):
        # A GPU that this PyTorch does not support is found, but its first product fails.
        square = torch.eye(64, device=DEVICE)
        assert (square @ square).sum().item() == 64, "the GPU computes something else"


def agreement(add_row, options):
    """Losses in each precision, and relative differences of CPU and GPU in float32"""
    module, steps, losses = load(options, "02"), 10 if options.rehearse else 200, {}
    images = module.load_dataset(module.DATASET, module.DATA_DIR, 0)[0].to(DEVICE)
    for name in "float32", "bfloat16", "float16":
        with add_row(what=f"02 in {name}".replace("float32", "float32 (TF32)"), steps=steps) as row:
            forget_memory()
            module.best_precision = lambda _, name=name: getattr(torch, name)
            losses[name], seconds = train_for(steps, module, "02", [images])
            difference = mean(abs(a / b - 1) for a, b in zip(losses[name][:20], losses["float32"]))
            row |= {"ms": 1000 * seconds, "last losses": mean(losses[name][-50:])}
            row |= {"difference of the first losses": difference} | peak_memory()
            assert difference < 0.1, "it learns something else"
    torch.backends.cudnn.allow_tf32 = False  # all digits
    draw_on_cpu()
    for number in SAMPLERS:
        with add_row(what=SCRIPTS[number]) as row:
            module = load(options, number)
            torch.set_float32_matmul_precision("highest")
            module.best_precision = lambda _: torch.float32
            on_cpu, on_gpu = (compute(number, module, d) for d in (torch.device("cpu"), DEVICE))
            for name, result in on_cpu.items():
                row[name] = ((on_gpu[name] - result).norm() / result.norm()).item()
            assert all(row[name] < 1e-5 for name in on_cpu), "less than five digits agree"


def draw_on_cpu():
    """Let random numbers come from the CPU's generator, so that all devices get the same."""
    for original in torch.rand, torch.randn, torch.randint:

        def draw(*arguments, device="cpu", original=original, **options):
            return original(*arguments, **options).to(device)

        setattr(torch, original.__name__, draw)
    torch.randn_like = lambda x: torch.randn(x.shape, device=x.device)


def compute(number, module, device):
    """Return a small network's prediction, its gradients and samples, on the CPU."""
    sampler, _ = build(number, module, (1, 28, 28), device, BASE_CH=16, T=40)
    weights = [*sampler.model.parameters()]
    for weight in weights:  # many begin as zeros, with which half of the network would not count
        weight.data += 0.05 * torch.randn(weight.shape, device=device)
    images = torch.rand(4, 1, 28, 28, device=device) * 2 - 1
    x_0 = sampler.encode(images) if number == "05" else images
    # labels and a guidance scale
    condition = [torch.arange(4, device=device), 2.0] if number == "03" else []
    _, prediction = sampler.predict(torch.randn_like(x_0), 20, *condition)
    sampler.loss(x_0, *condition[:1]).backward()
    found = {"prediction": prediction, "samples": sampler.sample(4, *condition, 10)}
    found |= {"gradients": torch.cat([weight.grad.flatten() for weight in weights])}
    return {name: result.detach().cpu().double() for name, result in found.items()}


def training_step(add_row, options):
    """A training step on images of 28 × 28 pixels, the best of three timings"""
    module, count = load(options, "02"), 1 if options.rehearse else 15
    widths, side, times = ((4,), 64, {}) if options.rehearse else ((64, 128), 8192, {})
    with add_row(network="a product of large matrices", BASE_CH="") as row:
        a, b = torch.randn(2, side, side, device=DEVICE).to(module.best_precision(DEVICE))
        peak = 2 * side**3 / best_time(lambda: a @ b, count)
        row |= {"TFLOP/s": peak / 1e12, "share of peak": 1.0}
    for width, variant in [(width, variant) for width in widths for variant in VARIANTS]:
        with add_row(network=variant, BASE_CH=width) as row:
            step = None  # releases the network before this one
            forget_memory()
            step, operations, size = make_step(variant, width, module)
            times[width, variant] = seconds = best_time(step, count)
            row |= {"weights": size, "ms": 1000 * seconds, "images/s": module.BATCH_SIZE / seconds}
            speed, first = operations / seconds, times.get((width, VARIANTS[0]))
            row |= {"TFLOP/s": speed / 1e12, "share of peak": speed / peak} | peak_memory()
            row |= {"times as fast as diffusers": first / seconds} if first else {}


def make_step(variant, width, module):
    """Return a training step of a variant, its operations, and the number of its weights.

    With Muon, the step does what 02's `train` does; otherwise the same with Adam for all weights.
    """
    sampler, settings = build("02", module, (1, 28, 28), DEVICE, BASE_CH=width)
    net = sampler.model
    if "diffusers" in variant:
        net, sampler.model = their_unet(width, module, settings)
    x_0 = torch.rand(module.BATCH_SIZE, 1, 28, 28, device=DEVICE) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        sampler.loss(x_0).backward()
    inner, outer = module.split_weights(net) if "Muon" in variant else ([], net.parameters())
    optimizers = [torch.optim.Adam(outer, 2e-4, betas=(0.9, 0.99), fused=True)]
    optimizers += [module.Muon(inner, lr=1e-3)] if inner else []
    averaged = copy.deepcopy(net).eval().requires_grad_(False)

    def step():
        net.zero_grad()
        sampler.loss(x_0).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        module.update_average(averaged, net, 1, 0.999)

    return step, counter.get_total_flops(), sum(weight.numel() for weight in net.parameters())


def their_unet(width, module, settings):
    """Return diffusers' U-Net with the widths of 02's, and a function to call it like 02's.

    It has more blocks: at full resolution on the way down, and one more per level on the way up.
    """
    from diffusers import UNet2DModel

    levels, blocks = settings["CHANNEL_MULT"], settings["NUM_BLOCKS"]
    kinds = ["Attn" * (28 // 2**i in settings["ATTENTION_AT"]) for i in range(len(levels))]
    sizes = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "layers_per_block": blocks}
    sizes |= {"block_out_channels": tuple(round(width * mult) for mult in levels)}
    sizes |= {"down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds)}
    sizes |= {"up_block_types": tuple(f"{kind}UpBlock2D" for kind in kinds[::-1])}
    sizes |= {"attention_head_dim": min(64, width), "norm_num_groups": max(1, width // 8)}
    net = UNet2DModel(**sizes).to(DEVICE, memory_format=module.best_layout(DEVICE))
    forward = torch.autocast(DEVICE.type, module.best_precision(DEVICE), ON_GPU)(net.forward)
    return net, lambda x_t, t: forward(x_t, t).sample.float()


def cifar10(add_row, options):
    """03 on CIFAR-10, for as long as the time limit allows"""
    constants = {"DATASET": "DRAWN" if options.rehearse else "CIFAR10"}
    module, steps = load(options, "03", **constants), 5 if options.rehearse else 100
    with add_row(what="the first steps alone", steps=steps) as row:
        data = [x.to(DEVICE) for x in module.load_dataset(module.DATASET, module.DATA_DIR, 0)[:2]]
        losses, seconds = train_for(steps, module, "03", data)
        row |= {"ms": 1000 * seconds, "last losses": mean(losses)}
    # 45 seconds for samples and figures, and a tenth of the rest for previews and checkpoints.
    steps = steps if options.rehearse else 0.9 * max(1, options.deadline - now() - 45) / seconds
    constants |= {"EPOCHS": steps * module.BATCH_SIZE / len(data[0])}
    with add_row(what=f"{constants['EPOCHS']:.2f} epochs") as row:
        forget_memory()
        path = prepare(options, "03", SAVE_EVERY=1, **constants)
        row["seconds"], outputs = run_script(path, options)
        losses = torch.load(outputs / "checkpoint.pt", weights_only=True)["losses"]
        row |= {"steps": len(losses), "last losses": mean(losses[-100:])} | peak_memory()


def all_scripts(add_row, options):
    """Each script with its GPU settings, but T = 100 and a short run on MNIST; 04 samples only"""
    for number, script in SCRIPTS.items():
        with add_row(script=script) as row:
            forget_memory()
            # about 50 steps, and a whole epoch of 01
            short = {"T": 100, "EPOCHS": 1 if number == "01" else 0.1, "VAE_EPOCHS": 0.1}
            path = prepare(options, number, **{} if options.rehearse else short)
            row["seconds"], outputs = run_script(path, options)
            pictures = {file.name for file in outputs.iterdir() if file.suffix in (".png", ".gif")}
            row |= {"pictures": len(pictures)} | peak_memory()
            assert pictures >= {"samples.png", "loss.png", "denoising.png", "denoising.gif"}


def relay(add_row, options):
    """02 killed in training, then resumed on the GPU, the CPU, and the GPU again"""
    constants = {"DATASET": "DRAWN", "T": 20, "BASE_CH": 8, "BATCH_SIZE": 16}
    constants |= {"NUM_BLOCKS": 1, "ATTENTION_AT": (14,)}  # as on a CPU: defaults differ there
    checkpoint, gpu = Path("outputs/02_ddpm/checkpoint.pt"), DEVICE.type
    for leg, device in enumerate([gpu, gpu] if options.rehearse else [gpu, gpu, "cpu", gpu]):
        with add_row(run="resumed" if leg else "killed", device=device) as row:
            changes = {"EPOCHS": 10 + leg, "SAVE_EVERY": 2 if leg else 0.001}
            path, started = prepare(options, "02", **constants, **changes), now()
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
            environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            command, pipes = [sys.executable, str(path)], {"stdout": -1, "stderr": -2}
            process = subprocess.Popen(command, env=environment, encoding="utf-8", **pipes)
            while not leg and process.poll() is None:
                sleep(0.1)
                if checkpoint.exists():
                    process.kill()  # somewhere after the first checkpoint
            text, row["seconds"] = process.communicate()[0], now() - started
            print(text)
            row["after"] = "".join(re.findall(r"Resuming .* after ([\d,]+ of [\d,]+) images", text))
            right = process.returncode == 0 and row["after"] if leg else process.returncode
            assert right and checkpoint.exists() and f"on {device}" in text, last_line(text)


def latents(add_row, options):
    """The U-Net of 05 for images of 128 × 128 pixels, on pixels and on latents"""
    import benchmark  # beside this file

    module, (side, batch) = load(options, "05"), (16, 2) if options.rehearse else (128, 16)
    _, settings = build("05", module, (3, side, side), DEVICE)
    for found in benchmark.costs_of_05(module, settings, DEVICE, (side,), batch):
        with add_row(**{name or "what": cell for name, cell in found.items()}):
            pass


JOBS = {  # the functions, and the seconds that they may take, 540 in all
    **{1: (machine, 60), 2: (agreement, 70), 3: (training_step, 45), 4: (cifar10, 200)},
    **{5: (all_scripts, 90), 6: (relay, 50), 7: (latents, 25)},
}


# %% 4. Run


def parse(arguments):
    parser = argparse.ArgumentParser(description="What only a GPU can show: see the file's head.")
    parser.add_argument("jobs", nargs="*", type=int, help="some of the jobs only")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="for results")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="MNIST and CIFAR-10")
    parser.add_argument("--any-md5", action="store_true", help="take any files for CIFAR-10")
    options = parser.parse_args(arguments)
    options.constants = MINIATURE if options.rehearse else {}
    options.constants |= {"DATA_DIR": str(options.data.resolve())}
    return options


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.rehearse:
        # Tiny networks: threads that wait for each other would cost time.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if os.name == "posix":
        CONTEXT.set_forkserver_preload(["torch", "torchvision", "utils.visualize"])
    chosen = sorted({1, *options.jobs} if options.jobs else JOBS)
    results = run_jobs({number: JOBS[number] for number in chosen}, options)
    sys.exit(any(job["status"] != "ok" for job in results.values()))
