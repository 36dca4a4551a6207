"""What is each improvement of 02 worth? `python tests/benchmark.py ladder` runs this.

It trains 02's network by the recipe of 01, adds one improvement after the other, and then takes
each of them alone out of the full recipe. All rows have the same seed, images in the same order,
and MINUTES of training each: at the start, the time of a training step of every row is measured,
the rows by turns, which gives the number of steps of each row. So whatever else the machine does
later may delay a row, but does not change its result. 02's own sampler draws the samples in
SAMPLING_STEPS steps. Whatever is ready is kept in `outputs/benchmark/ladder/`.
"""

import copy
import math
import random
import statistics
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from figures import bars
from tqdm import tqdm

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

    At the end come the one that 02 has on a CPU, and the full one with and without averaged weights
    after half of the training, when the learning rate is still high.
    """
    recipe, recipes = dict(TEXTBOOK), {"the textbook": dict(TEXTBOOK)}
    for name, change in CHANGES.items():
        recipe |= change
        recipes[f"+ {name}"] = dict(recipe)
    for name, change in CHANGES.items():
        recipes[f"all, without {name}"] = {**recipe, **{key: TEXTBOOK[key] for key in change}}
    recipes["all, attention in the middle only"] = {**recipe, "attention": "in the middle"}
    on_a_cpu = {**recipes["all, without v"], "attention": "in the middle"}
    recipes["02 on a CPU: ε, attention in the middle only"] = on_a_cpu
    halfway = {**recipe, "halfway": True}
    recipes["all, halfway"] = halfway
    recipes["all, halfway, without averaged weights"] = {**halfway, "averaged": False}
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
        self.ddpm = script.DDPM.build(settings, device)
        self.model = self.ddpm.model
        if recipe["predicts"] == "v":
            self.ddpm.predict = partial(predict_from_v, self.ddpm)
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
    v_pred = ddpm.predict_noise(x_t, t)
    signal, spread = math.sqrt(ddpm.alpha_bars[t]), math.sqrt(1 - ddpm.alpha_bars[t])
    return signal * x_t - spread * v_pred, spread * x_t + signal * v_pred


def seconds_per_step(script, recipes, images):
    """Return the time of a training step of each recipe, measured by turns."""
    times = {name: [] for name in recipes}
    runs = {name: Run(script, recipe, images, 1000) for name, recipe in recipes.items()}
    for _ in tqdm(range(ROUNDS), "Measuring steps"):
        for name, run in runs.items():
            run.train_step()
            start = time.perf_counter()
            run.train_step()
            run.train_step()
            times[name].append((time.perf_counter() - start) / 2)
    return {name: statistics.median(some) for name, some in times.items()}


def train(run, name):
    """Return the last and the averaged weights at the end of a run, and after half of it."""
    kept = {}
    for step in tqdm(range(run.total_steps), name, unit=" steps"):
        if step == run.total_steps // 2:
            kept["last, halfway"] = copy.deepcopy(run.model.state_dict())
            kept["averaged, halfway"] = copy.deepcopy(run.averaged.state_dict())
        run.train_step()
    return kept | {"last": run.model.state_dict(), "averaged": run.averaged.state_dict()}


def ladder(benchmark, judge):
    """Train, sample and score all rows, print the table, draw it."""
    script = benchmark.load(benchmark.SCRIPTS["02"])
    method = benchmark.code_of(benchmark.SCRIPTS["02"], only_method=True)
    folder = benchmark.OUT_DIR / "ladder"
    images = benchmark.MNIST(benchmark.ROOT / "data", train=True, download=True).data[:, None]
    recipes = rows()
    trainings = {same_training(recipe): recipe for recipe in recipes.values()}
    measure = partial(seconds_per_step, script, trainings, images)
    seconds = benchmark.kept(folder / "seconds_per_step.pt", str(MINUTES), measure)
    table, distances = [], {}
    for name, recipe in recipes.items():
        training = same_training(recipe)
        run = Run(script, recipe, images, round(MINUTES * 60 / seconds[training]))
        digest = benchmark.digest_of(method, training, str(run.total_steps))
        trained = benchmark.kept(folder / f"{training}.pt", digest, partial(train, run, training))
        weights = "averaged" if recipe["averaged"] else "last"
        weights += ", halfway" if "halfway" in recipe else ""
        run.model.load_state_dict(trained[weights])
        run.model.eval()
        samples = benchmark.draw(
            f"samples, {training}, {weights}",
            benchmark.digest_of(method, training, trained[weights]),
            lambda n, _, ddpm=run.ddpm: ddpm.sample(n, SAMPLING_STEPS),
            folder,
        )
        scores = judge.score(samples)
        distances[name] = scores["Fréchet distance"]
        times = {"steps": f"{run.total_steps:,}", "ms per step": f"{1000 * seconds[training]:.0f}"}
        table.append({"recipe": name, **times, **benchmark.in_words(scores)})
    title = f"What each improvement of 02 is worth, after {MINUTES} minutes of training"
    benchmark.print_table(title, table)
    print(f"On {benchmark.processor()}, SEED = {SEED}; {SAMPLING_STEPS} sampling steps.")
    note = f"MNIST, {benchmark.COUNT:,} samples each by {SAMPLING_STEPS} steps, SEED = {SEED}"
    label, path = "Fréchet distance to MNIST (lower is better)", benchmark.OUT_DIR / "ladder.png"
    print(f"Saved {bars(distances, path, title, label, note, other_from=1 + len(CHANGES))}")
