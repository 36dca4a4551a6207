"""How good, how fast, how large? Runs the five scripts, scores their digits, prints the tables.

    python tests/benchmark.py            # all five, or e.g. `python tests/benchmark.py 02 04`
    python tests/benchmark.py ladder     # what each improvement of 02 is worth: see ladder.py
    python tests/benchmark.py weights    # writes tests/weights from the runs of 02 and 03

It runs each script as it is, unless it has a finished run of it, and prints the README's tables in
Markdown. It needs Linux or macOS, MNIST in `data/` or a network to download it, and on two cores
without a GPU some four hours. Whatever is ready is kept in `outputs/benchmark/` for the next time,
as long as weights and scripts are the same. The time of a run that was not started from here, or
that resumed from a checkpoint, is not known.
The digits are judged by a classifier, trained on MNIST here within two minutes:

Fréchet distance   between the Gaussians that fit the classifier's 128 features of the samples and
                   of MNIST's 60,000 training images; as FID does it with the features of Inception
                   (Heusel et al. 2017, arXiv:1706.08500). Lower is better; it depends on the number
                   of samples, and is not comparable with FID.
precision, recall  share of the samples that lie among the real images, and of the real images that
                   lie among the samples: within the distance of some image to its third neighbour
                   (Kynkäänniemi et al. 2019, arXiv:1904.06991; here among 1,000 real test images,
                   there 50,000 in the features of VGG-16). How good, how diverse.
confident          share of the samples that the classifier reads with a probability above 0.8
read as asked      share of the samples that the classifier takes for the digit that was asked for
spread             mean distance between two samples of the same digit; real test images have 1
"""

import ast
import copy
import hashlib
import importlib
import math
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts find `utils` beside them; so must this file
from figures import quality_by_steps, trade_off  # noqa: E402
from ladder import ladder  # noqa: E402

from utils.visualize import image_table  # noqa: E402

OUT_DIR = ROOT / "outputs" / "benchmark"
WEIGHTS = ROOT / "tests" / "weights"
SCALES = 0, 1, 1.25, 1.5, 2, 3, 5  # of guidance in 03; 0 and 1 come first
FEW = 10, 20, 50, 100  # steps of 04's samplers
COUNT = 1000  # samples to score, and real images to compare them with
SEED = 123  # of the samples' noise, and of the order of the real images
TIME = "seconds for 16 images"
# Starts a program and says how much memory it took at most. In a small process of its own, for what
# starts a program counts as the program's memory.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak memory", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
SCRIPTS = {path.name[:2]: path.name for path in sorted(ROOT.glob("0*_*.py"))}


# %% The judge


class Classifier(nn.Module):
    """Read digits (B, 1, 28, 28) in [-1, 1]: return 128 features and 10 logits of each."""

    def __init__(self):
        super().__init__()

        def block(in_ch, out_ch):
            convolution = nn.Conv2d(in_ch, out_ch, 3, padding=1)
            return convolution, nn.BatchNorm2d(out_ch), nn.ReLU(), nn.MaxPool2d(2)

        layers = *block(1, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(1152, 128)
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        features = self.features(x)
        return features, self.head(F.dropout(features, 0.5, self.training))


def read_mnist(train):
    """Return MNIST's images, float (N, 1, 28, 28) in [-1, 1], and labels (N,).

    Test images come in a random order, always the same: in the file they are ordered by writer, and
    the first thousand would be no fair sample of all.
    """
    data = MNIST(ROOT / "data", train=train, download=True)
    images, labels = data.data[:, None].float() / 127.5 - 1, data.targets
    if not train:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        images, labels = images[order], labels[order]
    return images, labels


def train_classifier(epochs=4, batch_size=128):
    """Return a classifier trained on MNIST."""
    images, labels = read_mnist(train=True)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    total = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    with tqdm(total=total, desc="Training the classifier", unit=" steps") as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(batch_size):
                # Shifted by up to two pixels: samples are not centred as exactly as MNIST is.
                right, down = torch.randint(-2, 3, (2,)).tolist()
                x = images[index].roll((down, right), (2, 3))
                loss = F.cross_entropy(model(x)[1], labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


@torch.no_grad()
def look(model, images):
    """Return the features (N, 128), float64, and probabilities (N, 10) of images."""
    answers = [model(part) for part in images.float().cpu().clamp(-1, 1).split(1000)]
    features = torch.cat([features for features, _ in answers]).double()
    return features, torch.cat([logits for _, logits in answers]).softmax(1)


class Judge:
    """The classifier with what it thinks of MNIST; trained at the first use, and then kept."""

    def __init__(self):
        self.model = Classifier().eval()
        weights = kept(OUT_DIR / "classifier.pt", "", lambda: train_classifier().state_dict())
        self.model.load_state_dict(weights)
        self.train_features, _ = look(self.model, read_mnist(train=True)[0])
        images, labels = read_mnist(train=False)
        self.test_features, guesses = look(self.model, images)
        self.test_labels = labels
        self.accuracy = (guesses.argmax(1) == labels).double().mean().item()

    def score(self, images, labels=None, real=None):
        """Return the scores of images (N, 1, 28, 28) in [-1, 1] by name.

        labels: what was asked. real: features that precision and recall compare with; unless given,
        those of the first N test images.
        """
        features, guesses = look(self.model, images)
        real = self.test_features[: len(features)] if real is None else real
        confident = (guesses.max(1).values > 0.8).double().mean().item()
        scores = {
            "Fréchet distance": frechet_distance(features, self.train_features),
            "precision": share_among(features, real),
            "recall": share_among(real, features),
            "confident": confident,
        }
        if labels is not None:
            scores["read as asked"] = (guesses.argmax(1) == labels).double().mean().item()
            real_spread = spread_within_classes(self.test_features, self.test_labels)
            scores["spread"] = spread_within_classes(features, labels) / real_spread
        return scores

    def score_real(self):
        """Return the mean scores of ten random thousands of real images, each among the next."""
        thousands = read_mnist(train=False)[0].split(COUNT)
        references = self.test_features.roll(-COUNT, 0).split(COUNT)
        scores = [self.score(some, real=next_) for some, next_ in zip(thousands, references)]
        return {name: fmean(score[name] for score in scores) for name in scores[0]}


def kept(path, digest, make):
    """Return what make() returns, from path if it has been kept there with the same digest."""
    if path.exists():
        known = torch.load(path, map_location="cpu", weights_only=True)
        if known.get("digest") == digest:
            return known["result"]
    known = {"digest": digest, "result": make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"{path.name}.part")  # an interruption leaves no half file
    torch.save(known, partial_file)
    os.replace(partial_file, path)
    return known["result"]


def frechet_distance(a, b):
    """Return |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 √(Σ_a Σ_b)) of features a (N, D) and b (M, D)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # tr √(Σ_a Σ_b): the sum of the roots of its eigenvalues, which are real and not negative.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * root).item()


def share_among(a, b, k=3):
    """Return the share of a (N, D) within the distance of some b (M, D) to its k-th neighbour."""
    radius = torch.cdist(b, b).kthvalue(k + 1, dim=1).values  # the first is the point itself
    return (torch.cdist(a, b) <= radius).any(dim=1).double().mean().item()


def distance_to_nearest(a, b):
    """Return the distance of each of a (N, D) to the nearest of b (M, D)."""
    return torch.stack([torch.cdist(a, some).min(dim=1).values for some in b.split(5000)]).amin(0)


def spread_within_classes(features, labels):
    """Return the mean distance between two images of the same class, averaged over the classes."""
    groups = [features[labels == label] for label in labels.unique()]
    return torch.stack([torch.pdist(group).mean() for group in groups]).mean().item()


# %% The scripts


def load(script):
    """Import a script by its file name: definitions only, no run."""
    return importlib.import_module(Path(script).stem)


def folder_of(script):
    return ROOT / "outputs" / Path(script).stem


def code_of(script, only_method=False):
    """Return what a script does: its syntax without comments and docstrings, as text.

    only_method: schedule, networks, loss and sampler, on which samples of given weights depend.
    """
    text = (ROOT / script).read_text(encoding="utf-8")
    if only_method:
        text = re.search(r"(?ms)^# %% 3\. .*?(?=^# %% \d\. Training)", text)[0]
    tree = ast.parse(text)
    for node in ast.walk(tree):
        can_have_one = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if can_have_one and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def digest_of(*parts):
    """Return a few letters that change with any of the parts: text, or weights by name."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            for name, weight in part.items():
                digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def run(script):
    """Run a script to its end, unless that has been done, and return what it took.

    That is {"seconds", "megabytes", "output"}, or {} if it was run, but not from here.
    """
    record, samples = OUT_DIR / f"run_{script[:2]}.pt", folder_of(script) / "samples.png"
    if samples.exists() and not record.exists():
        return {}
    if not samples.exists():
        record.unlink(missing_ok=True)
    return kept(record, digest_of(code_of(script)), partial(measure, script))


def measure(script):
    """Run a script to its end and return what it took."""
    OUT_DIR.mkdir(parents=True, exist_ok=True)
    path, start = OUT_DIR / f"run_{script[:2]}.log", time.monotonic()
    print(f"Running {script}: see {path}", file=sys.stderr)
    with path.open("w", encoding="utf-8") as log:
        command = [sys.executable, "-c", MEASURE, sys.executable, script]
        status = subprocess.call(command, cwd=ROOT, stdout=log, stderr=log)
    seconds, output = time.monotonic() - start, path.read_text(encoding="utf-8")
    if status:
        sys.exit(f"{script} failed:\n{output[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    megabytes = int(re.search(r"peak memory (\d+)", output)[1]) * unit / 1e6
    return {"seconds": seconds, "megabytes": megabytes, "output": output}


def cost_of(script, *networks):
    """Return the columns of the main table that say what a run of the script took."""
    known, parameters = run(script), [sum(w.numel() for w in n.values()) for n in networks]
    output, speed = known.get("output", ""), "not known"
    # The last state of the last bar of training: of 05 that is stage 2.
    for found in re.findall(r"Training: 100%.* ([\d.]+) images/s", output):
        speed = f"{float(found):.0f}"
    minutes, seconds = divmod(round(known.get("seconds", 0)), 60)
    whole = known and "Resuming from" not in output
    wall_time = f"{minutes} min {seconds} s" if whole else "not known"
    if "Using the network in" in output:
        wall_time, speed = f"{wall_time}, with 02's network", "as 02"
    return {
        "command": f"`python {script}`",
        "wall time": wall_time,
        "peak memory": f"{known['megabytes'] / 1000:.1f} GB" if known else "not known",
        "parameters": " + ".join(f"{count:,}" for count in parameters),
        "images/s in training": speed,
    }


def path_of(script):
    """Return where the network is that a script samples with: 04 may have taken that of 02."""
    own, of_02 = folder_of(script) / "checkpoint.pt", folder_of(SCRIPTS["02"]) / "checkpoint.pt"
    return of_02 if script == SCRIPTS["04"] and not own.exists() else own


def read_checkpoint(script, sampler):
    """Return a script's sampler, a class, the contents of its checkpoint, and a digest of both."""
    run(script)
    path = path_of(script)
    if not path.exists():
        sys.exit(f"There is no {path}: delete {folder_of(script)}, and it will be made anew.")
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["settings"]["DATASET"] != "MNIST":
        sys.exit(f"{path} was not trained on MNIST, for which the scores are made.")
    digest = digest_of(code_of(script, only_method=True), state["averaged"])
    return sampler.load(path), state, digest


def draw(name, digest, sample, folder=OUT_DIR, size=250, seed=SEED, count=None):
    """Return COUNT (or count) samples, drawn by sample(n, first) in parts after seeding once.

    They are kept in folder under this name while weights and scripts have this digest.
    """

    count = count or COUNT

    def make():
        torch.manual_seed(seed)
        parts = [sample(min(size, count - first), first) for first in range(0, count, size)]
        return torch.cat(parts).cpu()

    return kept(folder / f"{name}.pt", f"{digest}, {count}", make)


def row_of(script, networks, sampler, sample, scores):
    """Return a row of the main table; networks: weights by name; sampler: the name of sample."""
    cost, start = cost_of(script, *networks), time.monotonic()
    sample(16, 0).cpu()  # waits for a GPU
    seconds = f"{time.monotonic() - start:.1f}"
    return {**cost, "sampler": sampler, TIME: seconds, **in_words(scores)}


def print_table(title, rows):
    """Print rows, dicts with the same keys, as a table in Markdown."""
    print(f"\n{title}:\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


def in_words(scores):
    """Return scores as strings, as the tables show them."""
    percentages = {"confident", "read as asked"}
    return {
        name: f"{100 * value:.1f} %" if name in percentages else f"{value:.2f}"
        for name, value in scores.items()
    }


def row_of_ddpm(judge, script, ddpm, weights, digest):
    """Return the row of a script that samples by DDPM in all T steps, and the samples."""

    def sample(n, first):
        return ddpm.sample(n)

    samples = draw(f"{script[:7]}_{ddpm.T}", digest, sample)
    sampler = f"DDPM, {ddpm.T} steps"
    return row_of(script, [weights], sampler, sample, judge.score(samples)), samples


def benchmark_01(judge):
    """Score 01 by its own sampler: return its row of the main table, and the samples."""
    script = SCRIPTS["01"]
    module = load(script)
    run(script)
    path = folder_of(script) / "weights.pt"
    weights = torch.load(path, weights_only=True, map_location="cpu")
    betas = module.linear_beta_schedule(module.T)
    model = module.SimpleUNet(1, module.BASE_CH)
    model.load_state_dict(weights)
    ddpm = module.SimpleDDPM(model, betas, (1, 28, 28), "cpu")
    digest = digest_of(code_of(script, only_method=True), weights)
    return row_of_ddpm(judge, script, ddpm, weights, digest)


def benchmark_02(judge):
    """Score 02 by its own sampler: return its row of the main table, and the samples."""
    script = SCRIPTS["02"]
    ddpm, state, digest = read_checkpoint(script, load(script).DDPM)
    row, samples = row_of_ddpm(judge, script, ddpm, state["averaged"], digest)
    train, test = (read_mnist(train=some)[0].flatten(1) for some in (True, False))
    of_samples = distance_to_nearest(samples.flatten(1), train)
    of_test = distance_to_nearest(test[: len(samples)], train)
    share = (of_samples < of_test.median()).double().mean().item()
    lines = (
        f"\nDoes 02 invent? {100 * share:.0f} % of {len(samples):,} samples are nearer a training",
        f"image than half of the test images do. Mean distance: {of_samples.mean():.2f}, of test",
        f"images {of_test.mean():.2f}; the nearest sample lies {of_samples.min():.2f} away.",
    )
    print(*lines)
    return row, samples


def benchmark_03(judge):
    """Score 03 at several guidance scales, print a table and draw it; return its row, and samples.

    In SAMPLE_STEPS steps, as in its figures: all T of them would take more than an hour. The labels
    are those of 1,000 random training images, so each digit is as frequent as in MNIST.
    """
    script = SCRIPTS["03"]
    module = load(script)
    ddpm, state, digest = read_checkpoint(script, module.GuidedDDPM)
    every_label = read_mnist(train=True)[1]
    order = torch.randperm(len(every_label), generator=torch.Generator().manual_seed(SEED))
    labels = every_label[order[:COUNT]]
    steps, default, rows, curves = module.SAMPLE_STEPS, module.GUIDANCE_SCALE, [], {}
    interval = module.GUIDE_ABOVE, module.GUIDE_BELOW

    def guided(n, first, scale=default, interval=interval):
        return ddpm.sample(n, labels[first : first + n], scale, steps, interval=interval)

    inside = f"{interval[0]:g} ≤ t/T < {interval[1]:g}"
    for where, some, scales in (inside, interval, SCALES), ("every t", (0, 1), SCALES[2:]):
        for scale in scales:
            name = f"03_{steps}_steps_scale_{scale:g}_{some[0]:g}_to_{some[1]:g}"
            drawn = draw(name, digest, partial(guided, scale=scale, interval=some))
            scores = curves.setdefault(where, {})[scale] = judge.score(drawn, labels)
            acts = "" if scale <= 1 else where
            rows.append({"guidance scale": f"{scale:g}", "acts at": acts, **in_words(scores)})
            if (scale, some) == (default, interval):
                samples = drawn
    print_table(f"What guidance gives and takes, {steps} steps", rows)
    curves["every t"][1] = curves[inside][1]  # no guidance is the same everywhere
    note = f"MNIST, {COUNT:,} samples each, {steps} steps, seed {SEED}"
    print(f"Saved {trade_off(curves, OUT_DIR / 'guidance_trade_off.png', note=note)}")
    scores = {k: v for k, v in curves[inside][default].items() if k != "spread"}
    sampler = f"DDPM, {steps} steps, scale {default:g}"
    return row_of(script, [state["averaged"]], sampler, guided, scores), samples


def benchmark_04(judge):
    """Score each sampler of 04, print a table and draw it; return its main row, and samples."""
    script = SCRIPTS["04"]
    module = load(script)
    ddim, state, digest = read_checkpoint(script, module.DDIM)
    output = run(script).get("output", "")
    rows, curves, default_name = [], {}, f"DDIM, η = {module.ETA:g}, early"
    samplers = [("DDPM", lambda n, _: ddim.sample(n), (ddim.T,))]
    for spacing, steps in {"even": FEW, "early": FEW, "late": FEW[:2]}.items():
        for eta in 0, 1:
            sampler = partial(ddim.ddim_sample, eta=eta, spacing=spacing)
            samplers.append((f"DDIM, η = {eta}, {spacing}", sampler, steps))
        sampler = partial(ddim.dpm_solver_sample, spacing=spacing)
        samplers.append((f"DPM-Solver++(2M), {spacing}", sampler, steps[:3]))
    for name, sampler, all_steps in samplers:
        for steps in all_steps:
            file, key = f"04_{name}_{steps}".replace(", η = ", "_eta_").replace(", ", "_"), digest
            if name == "DDPM" and path_of(script) == path_of(SCRIPTS["02"]):
                file = f"02_ddpm_{steps}"  # network and sampler of 02, to the last character
                key = digest_of(code_of(SCRIPTS["02"], only_method=True), state["averaged"])
            samples = draw(file, key, lambda n, _, s=steps, sample=sampler: sample(n, s))
            scores = judge.score(samples)
            curves.setdefault(name, {})[steps] = scores["Fréchet distance"]
            if (name, steps) == (default_name, module.DDIM_STEPS):
                default, default_samples = scores, samples
            printed = name.removesuffix(", early").replace("η", "eta")
            # The script's own table: sampler, network evaluations, seconds for 64 images, speed-up
            pattern = rf"(?m)^ *{re.escape(printed)}  +{steps}  +([\d.]+)  +(.+) x$"
            seconds, speedup = (re.findall(pattern, output) or [("", "")])[0]
            calls = {"sampler": name, "network evaluations": steps}
            times = {"seconds for 64 images": seconds, "speed-up": speedup and f"{speedup} ×"}
            rows.append({**calls, **times, **in_words(scores)})
    print_table("The samplers of 04", rows)
    note = f"MNIST, {COUNT:,} samples each, seed {SEED}"
    (distance,) = curves.pop("DDPM").values()

    def sample_by_default(n, _):
        return ddim.ddim_sample(n, module.DDIM_STEPS, module.ETA)

    five = [default["Fréchet distance"]]
    for seed in range(SEED + 1, SEED + 5):
        again = draw(f"04_default_seed_{seed}", digest, sample_by_default, seed=seed)
        five.append(judge.score(again)["Fréchet distance"])
    drawn = ", ".join(f"{distance:.2f}" for distance in five)
    print(f"The default sampler of 04 with five seeds: Fréchet distance {drawn}")
    early = {name.removesuffix(", early"): c for name, c in curves.items() if "early" in name}
    real = judge.score_real()["Fréchet distance"]
    levels = {f"DDPM, {ddim.T} steps": distance, "real test images": real}
    picture, draws = OUT_DIR / "samplers.png", (module.DDIM_STEPS, five[1:])
    print(f"Saved {quality_by_steps(early, levels, draws, picture, note=f'{note}, early steps')}")
    why_noise_helps(judge, ddim, digest)
    why_early_steps_help(judge, ddim, digest)
    sampler = f"DDIM, {module.DDIM_STEPS} steps"
    row = row_of(script, [state["averaged"]], sampler, sample_by_default, default)
    return row, default_samples


def ideal_x_0(x_t, alpha_bar_t, images):
    """Return the best possible x̂_0 of x_t (B, C, H, W), if x_0 is one of images (N, C, H, W).

    The squared error is smallest for the mean of all images, each weighted by the probability that
    x_t came from it: the less noise it takes to turn an image into x_t, the more probable that
    image is (Karras et al. 2022, arXiv:2206.00364, Eq. 57). On average, no network can do better.
    At large t, this is a mean of many images, which a network can learn. At small t, it is a single
    image, and a network that did as well would have memorised it.
    """
    signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    # ε = (x_t − √ᾱ_t · x_0) / √(1−ᾱ_t) has the density exp(−‖ε‖² / 2), up to a constant.
    noise_norm = torch.cdist(x_t.flatten(1) / signal, images.flatten(1)) * signal / spread  # (B, N)
    probability = (-noise_norm.square() / 2).softmax(dim=1)
    return (probability @ images.flatten(1)).view_as(x_t)


def why_noise_helps(judge, ddim, digest, steps=50):
    """Print how good `steps` early steps are with new noise in a part of them, or no network.

    The ideal denoiser knows 5,000 training images, which its samples repeat: what is left of the
    distance is that of 1,000 of these images.
    """
    images, _ = read_mnist(train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    images = images[order[:5000]].to(ddim.device)

    def ideal(x_t, t):
        alpha_bar_t = ddim.alpha_bars[t[0].item()]
        x_0 = ideal_x_0(x_t, alpha_bar_t, images)
        return (x_t - alpha_bar_t**0.5 * x_0) / (1 - alpha_bar_t) ** 0.5

    oracle = copy.copy(ddim)
    oracle.model = ideal
    middle, rows = ddim.T // 2, []
    for name, sampler, where, noisy in (
        ("network", ddim, "everywhere", range(ddim.T)),
        ("network", ddim, "nowhere", ()),
        ("network", ddim, f"for t >= {middle}", range(middle, ddim.T)),
        ("network", ddim, f"for t < {middle}", range(middle)),
        ("ideal denoiser", oracle, "everywhere", range(ddim.T)),
        ("ideal denoiser", oracle, "nowhere", ()),
    ):

        @torch.no_grad()
        def sample(n, _, sampler=sampler, noisy=noisy):
            x_t = torch.randn(n, *sampler.image_shape, device=sampler.device)
            for t, t_prev in pairwise(sampler.timesteps(steps, "early")):
                x_t, _ = sampler.ddim_step(x_t, t, t_prev, int(t in noisy))
            return x_t

        file = f"04_{name}_noise_{where}".replace(">=", "from").replace("<", "below")
        samples = draw(file.replace(" ", "_"), digest, sample)
        rows.append({"predictions of": name, "new noise": where, **in_words(judge.score(samples))})
    scores = in_words(judge.score(images[:COUNT]))
    rows.append({"predictions of": "(1,000 of its images)", "new noise": "", **scores})
    print_table(f"Why new noise helps: {steps} early steps, η = 1 or 0", rows)


def why_early_steps_help(judge, ddim, digest, steps=10):
    """Print how good `steps` even steps are if the first x̂_0, magnified error, is left out.

    In its place, the sampler gets the mean image, which is the best prediction from pure noise.
    """
    mean, rows = read_mnist(train=True)[0].mean(dim=0).to(ddim.device), []
    from_mean = copy.copy(ddim)

    def predict(x_t, t):
        if t < ddim.T - 1:
            return ddim.predict(x_t, t)
        signal, spread = math.sqrt(ddim.alpha_bars[t]), math.sqrt(1 - ddim.alpha_bars[t])
        return mean.expand_as(x_t), (x_t - signal * mean) / spread

    from_mean.predict = predict
    for eta in 0, 1:
        for first, sampler, spacing in (
            ("the network's", ddim, "even"),
            ("the mean image", from_mean, "even"),
            ("the network's", ddim, "early"),
            ("the mean image", from_mean, "early"),
        ):
            file = f"04_first_{first}_{spacing}_{eta}".replace(" ", "_").replace("'", "")
            sample = partial(sampler.ddim_sample, eta=eta, spacing=spacing)
            samples = draw(file, digest, lambda n, _, sample=sample: sample(n, steps))
            row = {"η": eta, "steps": f"{steps}, {spacing}", "first x̂_0": first}
            rows.append({**row, **in_words(judge.score(samples))})
    print_table("Why early steps help: the first prediction", rows)


def training_cost(loss):
    """Return seconds and megabytes of loss() and its gradients, without the optimizers.

    The memory is what the network stores to compute gradients, weights included. Gradients,
    optimizers and averaged weights add three to four times the size of the weights.
    """
    stored = {}

    def keep(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    loss().backward()  # the first step is slow: it does not count
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
    result.backward()
    result.item()  # a GPU runs behind: wait, or the time would include the step above
    start = time.monotonic()
    count = 10 if result.is_cuda else 2
    for _ in range(count):
        result = loss()
        result.backward()
    result.item()  # waits until a GPU is done
    return (time.monotonic() - start) / count, sum(stored.values()) / 1e6


def costs_of_05(module, settings, device, sides=(32, 64, 128), batch=4):
    """Return the rows of a table, dicts: what diffusion costs on pixels and on latents.

    Both U-Nets have BASE_CH channels at each position, and attention only in their middle, at half
    the side; latents have DOWNSAMPLE² times fewer positions.
    """
    rows, steps, layout = [], min(10, settings["T"]), module.best_layout(device)
    betas = module.SCHEDULES[settings["SCHEDULE"]](settings["T"])
    network = settings["BASE_CH"], (1, 2), settings["NUM_BLOCKS"], (), 0.0
    for side in sides:
        x = torch.rand(batch, settings["IMAGE_SHAPE"][0], side, side, device=device) * 2 - 1
        no_vae = SimpleNamespace(latent_shape=x.shape[1:], decode=lambda z: z, scale=1)
        vae = module.VAE(x.shape[1:], *[settings[name] for name in module.AUTOENCODER])
        vae.to(device, memory_format=layout)
        costs = []
        for codec in no_vae, vae:
            model = module.UNet(codec.latent_shape, *network, module.best_precision(device))
            model.to(device, memory_format=layout)
            ldm = module.LatentDiffusion(model, codec, betas, device)
            data = torch.randn(batch, *codec.latent_shape, device=device)
            seconds, megabytes = training_cost(partial(ldm.loss, data))
            ldm.sample(1, 1).cpu()  # the first evaluation is slow: it does not count
            start = time.monotonic()
            ldm.sample(1, steps).cpu()
            costs.append([1000 * seconds, megabytes, 1000 * (time.monotonic() - start)])
        what = f"ms for loss and gradients of {batch} images", "MB for its gradients"
        for name, pixels, latents in zip((*what, f"ms per image, {steps} steps"), *costs):
            cells = f"{pixels:.0f}", f"{latents:.0f}", f"{pixels / latents:.1f} ×"
            rows.append([f"{side} × {side}: {name}", *cells])
        seconds, _ = training_cost(lambda x=x, vae=vae: module.vae_loss(x, *vae(x), 0.002))
        name = f"{side} × {side}: ms for loss and gradients of the VAE"
        rows.append([name, "", f"{1000 * seconds:.0f}", ""])
    return [dict(zip(("", "pixels", "latents", "ratio"), row)) for row in rows]


def benchmark_05(judge):
    """Score 05, print its table of costs; return the row of the main table, and the samples."""
    script = SCRIPTS["05"]
    module = load(script)
    ldm, state, digest = read_checkpoint(script, module.LatentDiffusion)
    steps, networks = module.DDIM_STEPS, [dict(ldm.vae.named_parameters()), state["averaged"]]

    def sample(n, first):
        return ldm.sample(n, steps)

    samples = draw(f"05_ddim_{steps}", digest_of(digest, state["vae"]), sample)
    measure = partial(costs_of_05, module, state["settings"], ldm.device)
    rows = kept(OUT_DIR / "05_costs.pt", digest_of(code_of(script)), measure)
    print_table("05: the same U-Net on pixels and on latents", rows)
    return row_of(script, networks, f"DDIM, {steps} steps", sample, judge.score(samples)), samples


def save_weights(judge):
    """Write what tests/weights holds, in 16 bits: the networks of 02 and 03, and the classifier."""

    def halved(weights):
        return {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}

    files = {"classifier.pt": halved(judge.model.state_dict())}
    for number in "02", "03":
        path = folder_of(SCRIPTS[number]) / "checkpoint.pt"
        state = torch.load(path, weights_only=True, map_location="cpu")
        kept_of_it = {name: state[name] for name in ("settings", "seen", "losses")}
        kept_of_it["averaged"] = halved(state["averaged"])
        files[f"{folder_of(SCRIPTS[number]).name}/checkpoint.pt"] = kept_of_it
    for name, contents in files.items():
        path = WEIGHTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes, sha256 {digest}")


BENCHMARKS = dict(
    zip(SCRIPTS, (benchmark_01, benchmark_02, benchmark_03, benchmark_04, benchmark_05))
)


def processor():
    """Return the name of the processor, how many of its cores PyTorch uses, and the GPU if any."""
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} cores{gpu}"


if __name__ == "__main__":
    if sys.argv[1:] == ["ladder"]:
        sys.exit(ladder(sys.modules[__name__], Judge()))
    if sys.argv[1:] == ["weights"]:
        sys.exit(save_weights(Judge()))
    numbers = sys.argv[1:] or list(BENCHMARKS)
    if not set(numbers) <= set(BENCHMARKS):
        numbered = "] [".join(BENCHMARKS)
        sys.exit(f"Usage: python tests/benchmark.py ladder, or weights, or [{numbered}]")
    for number in numbers:
        run(SCRIPTS[number])
    judge = Judge()
    rows, samples = map(list, zip(*(BENCHMARKS[number](judge) for number in numbers)))
    nothing = dict.fromkeys(rows[0], "")
    rows.append({**nothing, "command": "real test images", **in_words(judge.score_real())})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table("The five scripts", [{key: row.get(key, "") for key in columns} for row in rows])
    print(
        f"On {processor()}; Python {platform.python_version()}, PyTorch {torch.__version__}. Real "
        f"MNIST, the scripts' own settings and SEED; {COUNT:,} samples after "
        f"torch.manual_seed({SEED}), 250 at a time. The classifier reads "
        f"{100 * judge.accuracy:.2f} % of MNIST's test images correctly."
    )
    shown = {SCRIPTS[number]: some[:14] for number, some in zip(numbers, samples)}
    note = f"MNIST, the first 14 of the {COUNT:,} samples that are scored, seed {SEED}"
    picture = OUT_DIR / "all_scripts.png"
    print(f"Saved {image_table(shown, picture, (), 'What each script makes', note)}")
