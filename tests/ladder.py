"""What is each improvement of 02 worth? `python tests/benchmark.py ladder` runs this.

It trains 02's network by the recipe of 01, adds one improvement after the other, and then takes
each of them alone out of the full recipe. All rows have the same seed, images in the same order,
and MINUTES of training each: at the start the time of a training step of every row is measured, the
rows by turns, and says how many steps a row gets. So what else the machine does later may delay a
row, but does not change its result. Whatever is ready is kept in `outputs/benchmark/ladder/`.

The samples are drawn by 02's own sampler in SAMPLING_STEPS of its T steps.
"""

import copy
import json
import math
import random
import statistics
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from utils.visualize import bars

MINUTES = 8
SAMPLING_STEPS = 50
ROUNDS = 20  # of measuring the time of a step
SEED = 0
ADAM_RATE = 0.004  # the highest, as in 01, and as 02 gives Adam
TEXTBOOK = {
    "attention": "nowhere",
    "schedule": "linear",
    "averaged": False,
    "predicts": "noise",
    "optimizer": "Adam",
}
CHANGES = {  # in the order of the ladder
    "attention": {"attention": "at 14 × 14 and in the middle"},
    "cosine schedule": {"schedule": "cosine"},
    "averaged weights": {"averaged": True},
    "v": {"predicts": "v"},
    "Muon": {"optimizer": "Muon"},
}


def rows():
    """Return the recipes by name: up the ladder, then the full one without each of its parts.

    Also the full one with less attention; the one that 02 has on a CPU; and the full one with and
    without averaged weights after half of the training, when the learning rate is still high.
    """
    recipe, recipes = dict(TEXTBOOK), {"the textbook": dict(TEXTBOOK)}
    for name, change in CHANGES.items():
        recipe |= change
        recipes[f"+ {name}"] = dict(recipe)
    for name, change in CHANGES.items():
        recipes[f"all, without {name}"] = {**recipe, **{key: TEXTBOOK[key] for key in change}}
    recipes["all, attention in the middle only"] = {**recipe, "attention": "in the middle"}
    on_a_cpu = {**recipe, "attention": "in the middle", "predicts": "noise"}
    recipes["02 on a CPU: ε, attention in the middle only"] = on_a_cpu
    recipes["all, halfway"] = {**recipe, "halfway": True}
    recipes["all, halfway, without averaged weights"] = {
        **recipe,
        "halfway": True,
        "averaged": False,
    }
    return recipes


def same_training(recipe):
    """Return the part of a recipe on which the training depends, as text."""
    return ", ".join(f"{key} {recipe[key]}" for key in TEXTBOOK if key != "averaged")


def seed_of(*parts):
    """Return a seed made of SEED and these parts: the same for all rows."""
    return random.Random(repr((SEED, *parts))).getrandbits(63)


class Run:
    """One training run by a recipe with the definitions of 02 (`script`, a module)."""

    def __init__(self, script, recipe, images, total_steps):
        torch.manual_seed(SEED)
        self.script, self.recipe, self.images = script, recipe, images
        self.total_steps, self.step = total_steps, 0
        device = script.pick_device()
        settings = {name: getattr(script, name, None) for name in script.NETWORK}
        settings |= {"T": script.T, "SCHEDULE": recipe["schedule"], "IMAGE_SHAPE": (1, 28, 28)}
        settings["ATTENTION_AT"] = (14,) if "14" in recipe["attention"] else ()
        self.ddpm = script.DDPM.build({"settings": settings}, device)
        self.model = self.ddpm.model
        if recipe["attention"] == "nowhere":
            self.model.middle_1.attention = nn.Identity()
        self.averaged = script.copy.deepcopy(self.model).eval().requires_grad_(False)
        inner, outer = script.split_weights(self.model)
        if recipe["optimizer"] == "Adam":
            inner, outer = [], [*inner, *outer]
        adam = torch.optim.Adam(outer, betas=(0.9, 0.99), fused=True)
        self.rates = {adam: ADAM_RATE}
        if inner:
            self.rates[script.Muon(inner, lr=0)] = script.LEARNING_RATE

    def loss(self, x_0):
        if self.recipe["predicts"] == "noise":
            return self.ddpm.loss(x_0)
        t = torch.randint(self.ddpm.T, (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0)
        x_t = self.script.q_sample(x_0, t, noise, self.ddpm.alphas_cumprod)
        alpha_bar_t = self.ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        # Salimans & Ho 2022, arXiv:2202.00512:  v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0
        v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0
        return F.mse_loss(self.model(x_t, t), v)

    def train_step(self):
        size = self.script.BATCH_SIZE
        torch.manual_seed(seed_of("step", self.step))
        epoch, number = divmod(self.step, len(self.images) // size)
        generator = torch.Generator().manual_seed(seed_of("order", epoch))
        order = torch.randperm(len(self.images), generator=generator)
        index = order[number * size :][:size]
        loss = self.loss(self.script.to_batch(self.images[index]))
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rise = (self.step + 1) / (0.05 * self.total_steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * self.step / self.total_steps)
        for optimizer, rate in self.rates.items():
            optimizer.param_groups[0]["lr"] = rate * min(rise, fall)
            optimizer.step()
        self.step += 1
        self.script.update_average(self.averaged, self.model, self.step, self.script.EMA_DECAY)
        return loss.item()


def predict_from_v(ddpm, x_t, t):
    """Do what 02's `predict` does, with a network that returns v: Salimans & Ho, appendix D."""
    v_pred = ddpm.model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    signal, spread = math.sqrt(ddpm.alpha_bars[t]), math.sqrt(1 - ddpm.alpha_bars[t])
    return signal * x_t - spread * v_pred, spread * x_t + signal * v_pred


def respaced(run, weights):
    """Return 02's sampler for SAMPLING_STEPS of the T steps: Improved DDPM, section 4."""
    run.model.load_state_dict(weights)
    run.model.eval()
    timesteps = torch.linspace(0, run.ddpm.T - 1, SAMPLING_STEPS).round().long()
    alphas_cumprod = run.ddpm.alphas_cumprod.double().cpu()[timesteps]
    before = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    timesteps = timesteps.to(run.ddpm.device)

    def model(x_t, t):
        return run.model(x_t, timesteps[t])

    ddpm = run.script.DDPM(model, 1 - alphas_cumprod / before, (1, 28, 28), run.ddpm.device)
    if run.recipe["predicts"] == "v":
        ddpm.predict = partial(predict_from_v, ddpm)
    return ddpm


def seconds_per_step(script, recipes, images, folder):
    """Return the time of a training step of each recipe, measured by turns; once, then kept."""
    path = folder / "seconds_per_step.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    times = {name: [] for name in recipes}
    runs = {name: Run(script, recipe, images, 1000) for name, recipe in recipes.items()}
    for _ in tqdm(range(ROUNDS), "Measuring steps"):
        for name, run in runs.items():
            run.train_step()
            start = time.perf_counter()
            run.train_step()
            run.train_step()
            times[name].append((time.perf_counter() - start) / 2)
    times = {name: statistics.median(some) for name, some in times.items()}
    path.write_text(json.dumps(times), encoding="utf-8")
    return times


def train(script, recipe, images, steps, path, digest):
    """Return the last and the averaged weights after so many steps and after half; kept at path."""
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["digest"] == digest and kept["steps"] == steps:
            return kept
    run, kept = Run(script, recipe, images, steps), {"digest": digest, "steps": steps}
    for step in tqdm(range(steps), path.stem, unit=" steps"):
        if step == steps // 2:
            kept |= {"last, halfway": copy.deepcopy(run.model.state_dict())}
            kept |= {"averaged, halfway": copy.deepcopy(run.averaged.state_dict())}
        run.train_step()
    kept |= {"last": run.model.state_dict(), "averaged": run.averaged.state_dict()}
    torch.save(kept, path)
    return kept


def ladder(benchmark, judge):
    """Train, sample and score all rows, print the table, draw it."""
    script = benchmark.load(benchmark.SCRIPTS["02"])
    method = benchmark.code_of(benchmark.SCRIPTS["02"], only_method=True)
    folder = benchmark.OUT_DIR / "ladder"
    folder.mkdir(parents=True, exist_ok=True)
    images = benchmark.MNIST(benchmark.ROOT / "data", train=True, download=True).data[:, None]
    recipes = rows()
    trainings = {same_training(recipe): recipe for recipe in recipes.values()}
    seconds = seconds_per_step(script, trainings, images, folder)
    table, distances = [], {}
    for name, recipe in recipes.items():
        training = same_training(recipe)
        steps = round(MINUTES * 60 / seconds[training])
        digest = benchmark.digest_of(method, training)
        kept = train(script, recipe, images, steps, folder / f"{training}.pt", digest)
        weights = "averaged" if recipe["averaged"] else "last"
        weights += ", halfway" if "halfway" in recipe else ""
        ddpm = respaced(Run(script, recipe, images, steps), kept[weights])
        samples = benchmark.draw(
            f"samples, {training}, {weights}",
            benchmark.digest_of(method, training, kept[weights]),
            lambda n, _, ddpm=ddpm: ddpm.sample(n),
            folder,
        )
        scores = judge.score(samples)
        distances[name] = scores["Fréchet distance"]
        times = {"steps": f"{steps:,}", "ms per step": f"{1000 * seconds[training]:.0f}"}
        table.append({"recipe": name, **times, **benchmark.in_words(scores)})
    title = f"What each improvement of 02 is worth, after {MINUTES} minutes of training"
    benchmark.print_table(title, table)
    print(f"On {benchmark.processor()}, SEED = {SEED}; {SAMPLING_STEPS} sampling steps.")
    note = f"MNIST, {benchmark.COUNT:,} samples each by {SAMPLING_STEPS} steps, SEED = {SEED}"
    label, path = "Fréchet distance to MNIST (lower is better)", benchmark.OUT_DIR / "ladder.png"
    print(f"Saved {bars(distances, path, title, label, note, other_from=1 + len(CHANGES))}")
