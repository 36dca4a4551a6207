"""How good are the digits? Scores of the trained scripts, and what guidance gives and takes.

    python 03_conditional_ddpm.py && python tests/benchmark.py 03
    python 04_ddim_fast_sampling.py && python tests/benchmark.py 04

needs real MNIST in `data/` and the checkpoints that the scripts leave. It prints the tables of the
README in Markdown and leaves pictures in `outputs/benchmark/`, and all samples that it has drawn:
stopped, it goes on there; with other weights or another script it draws anew. The images are judged
by a digit classifier, trained on MNIST here within two minutes and kept there as well:

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

import hashlib
import importlib.util
import os
import platform
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts find `utils` beside them; so must this file
from utils.visualize import trade_off  # noqa: E402

OUT_DIR = ROOT / "outputs" / "benchmark"
SCALES = 0, 1, 2, 3, 5, 7, 10
COUNT, SEED = 1000, 123  # samples to score, and the seed of their noise
CPU = torch.device("cpu")
DDIM_SCRIPT = "04_ddim_fast_sampling.py"  # samples for 03 as well, being faster


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
    """Return MNIST's images, float (N, 1, 28, 28) in [-1, 1], and labels (N,)."""
    data = MNIST(ROOT / "data", train=train, download=True)
    return data.data[:, None].float() / 127.5 - 1, data.targets


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
        path = OUT_DIR / "classifier.pt"
        OUT_DIR.mkdir(parents=True, exist_ok=True)
        self.model = Classifier().eval()
        if path.exists():
            self.model.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.model = train_classifier()
            save_atomically(self.model.state_dict(), path)
        self.train_features, _ = look(self.model, read_mnist(train=True)[0])
        images, labels = read_mnist(train=False)
        self.test_features, guesses = look(self.model, images)
        self.test_labels = labels
        self.accuracy = (guesses.argmax(1) == labels).double().mean().item()

    def score(self, images, labels=None):
        """Return the scores of images (N, 1, 28, 28) in [-1, 1] by name; labels: what was asked."""
        features, guesses = look(self.model, images)
        real = self.test_features[: len(features)]
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


def save_atomically(contents, path):
    """Save by way of a temporary file: whatever interrupts it leaves no half file behind."""
    partial_file = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(contents, partial_file)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


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


def spread_within_classes(features, labels):
    """Return the mean distance between two images of the same class, averaged over the classes."""
    groups = [features[labels == label] for label in labels.unique()]
    return torch.stack([torch.pdist(group).mean() for group in groups]).mean().item()


# %% The scripts


def load(name):
    """Import a script by its file name, which is no legal module name: definitions only, no run."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_checkpoint(script, module, network):
    """Return a script's network with averaged weights, a digest, and β; or say what to run."""
    path = ROOT / "outputs" / Path(script).stem / "checkpoint.pt"
    if not path.exists():
        sys.exit(f"There is no {path}: run `python {script}` first.")
    state = torch.load(path, weights_only=True, map_location="cpu")
    s = state["settings"]
    if s["DATASET"] != "MNIST":
        sys.exit(f"{path} was trained on {s['DATASET']}; the scores are made for MNIST.")
    schedules = {"cosine": module.cosine_beta_schedule, "linear": module.linear_beta_schedule}
    betas = schedules[s["SCHEDULE"]](s["T"])
    names = "BASE_CH", "CHANNEL_MULT", "NUM_BLOCKS", "ATTENTION_AT", "DROPOUT"
    architecture = [s[name] for name in names]
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    model = network((1, 28, 28), *architecture, alphas_cumprod)
    model.load_state_dict(state["averaged"])
    digest = hashlib.sha256((ROOT / script).read_bytes() + (ROOT / DDIM_SCRIPT).read_bytes())
    for name, weight in state["averaged"].items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return model.eval().to(memory_format=torch.channels_last), digest.hexdigest(), betas


def draw(name, digest, sample, folder=OUT_DIR, size=250):
    """Return COUNT samples, drawn by sample(n, first) in parts after seeding once.

    They are kept in folder under this name, and used again while weights and scripts have this
    digest.
    """
    path = folder / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["digest"] == digest and len(kept["samples"]) == COUNT:
            return kept["samples"]
    torch.manual_seed(SEED)
    parts = [sample(min(size, COUNT - first), first) for first in range(0, COUNT, size)]
    samples = torch.cat(parts)
    save_atomically({"digest": digest, "samples": samples}, path)
    return samples


def print_table(rows):
    """Print rows, dicts with the same keys, as a table in Markdown."""
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


def benchmark_03(judge):
    """Score 03 at several guidance scales by 50 DDIM steps, and at one by all its own steps."""
    script = "03_conditional_ddpm.py"
    module, ddim_module = load(script), load(DDIM_SCRIPT)
    model, digest, betas = read_checkpoint(script, module, module.ConditionalUNet)
    shape, labels = (1, 28, 28), torch.arange(COUNT) % 10
    ddpm = module.GuidedDDPM(model, betas, shape, CPU, 0.1, module.CLASS_NAMES["MNIST"])

    def by_ddim(n, first, scale):
        def guided(x_t, t):
            return ddpm.guided_noise(x_t, t, labels[first : first + n], scale)

        return ddim_module.DDIM(guided, betas, shape, CPU).ddim_sample(n, 50)

    rows, results = [], {}
    for scale in SCALES:
        samples = draw(f"03_ddim_50_scale_{scale}", digest, partial(by_ddim, scale=scale))
        results[scale] = judge.score(samples, labels)
        rows.append({"guidance scale": scale, "sampler": "DDIM, 50", **in_words(results[scale])})
        print(rows[-1], file=sys.stderr)

    def by_ddpm(n, first):
        return ddpm.sample(n, labels[first : first + n], 3.0)

    scores = judge.score(draw("03_ddpm_scale_3", digest, by_ddpm), labels)
    rows.append({"guidance scale": 3, "sampler": f"DDPM, {ddpm.T}", **in_words(scores)})
    print_table(rows)
    note = f"MNIST, {COUNT:,} samples each, DDIM with 50 steps, seed {SEED}"
    print(f"Saved {trade_off(results, OUT_DIR / 'guidance_trade_off.png', note=note)}")


def benchmark_04(judge):
    """Score each sampler of 04."""
    module = load(DDIM_SCRIPT)
    model, digest, betas = read_checkpoint(DDIM_SCRIPT, module, module.UNet)
    ddim = module.DDIM(model, betas, (1, 28, 28), CPU)
    rows = []
    for name, sampler, all_steps in (
        ("DDPM", lambda n, _: ddim.sample(n), (ddim.T,)),
        ("DDIM, η = 0", ddim.ddim_sample, (10, 15, 20, 50, 100)),
        ("DDIM, η = 1", partial(ddim.ddim_sample, eta=1.0), (10, 15, 20, 50, 100)),
        ("DPM-Solver++(2M)", ddim.dpm_solver_sample, (10, 15, 20)),
    ):
        for steps in all_steps:
            file = f"04_{name}_{steps}".replace(", η = ", "_eta_")
            samples = draw(file, digest, lambda n, _, s=steps, sample=sampler: sample(n, s))
            scores = in_words(judge.score(samples))
            rows.append({"sampler": name, "calls of the network": steps, **scores})
            print(rows[-1], file=sys.stderr)
    print_table(rows)


BENCHMARKS = {"03": benchmark_03, "04": benchmark_04}

if __name__ == "__main__":
    numbers = sys.argv[1:] or list(BENCHMARKS)
    if not set(numbers) <= set(BENCHMARKS):
        sys.exit(f"Usage: python tests/benchmark.py [{'] ['.join(BENCHMARKS)}]")
    judge = Judge()
    floor = judge.score(read_mnist(train=False)[0][:COUNT])
    print(
        f"Classifier: {100 * judge.accuracy:.2f} % of MNIST's test images read correctly; "
        f"{COUNT:,} real test images score a Fréchet distance of {floor['Fréchet distance']:.2f}. "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, seed {SEED}."
    )
    for number in numbers:
        BENCHMARKS[number](judge)
