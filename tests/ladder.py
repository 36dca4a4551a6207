"""What is each improvement of 02 worth? `python tests/benchmark.py ladder` runs this.

It trains DDPM's own recipe on a network of DDPM's shape, adds one improvement of 02 after the
other, and then takes each of them alone out of the full recipe. Every row has the same MINUTES of
training on one core, and three seeds, which set the initial weights, images, t and noise. The time
of a training step is measured at the start, by turns, once for each combination that costs
differently, and sets the number of steps. So whatever else the machine does later may delay a row,
but does not change its result. The learning rate of each optimizer is the best of RATES, by the
first seed. 04's sampler draws the samples, in SAMPLING_STEPS early steps, with new noise (η = 1).
Whatever is ready is kept in `outputs/benchmark/ladder/`.
"""

import copy
import math
import statistics
import time
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn as nn
import torch.nn.functional as F
from figures import bars
from tqdm import tqdm

MINUTES = 2
SEEDS = 0, 1, 2
RATES = {"Adam": (0.001, 0.002, 0.004, 0.008), "Muon": (0.01, 0.02, 0.04)}
COUNT = 2000  # samples of each training run
SAMPLING_STEPS = 25
ROUNDS = 20  # of measuring the time of a step
TEXTBOOK = {
    "network": "DDPM's",
    "schedule": "linear",
    "t": "uniform",
    "weights": "last",
    "optimizer": "Adam",
    "attention": "nowhere",
    "predicts": "noise",
}
CHANGES = {  # in the order of the ladder
    "thin network": {"network": "thin"},
    "cosine schedule": {"schedule": "cosine"},
    "large t more often": {"t": "large"},
    "averaged weights": {"weights": "averaged"},
    "Muon": {"optimizer": "Muon"},
    "attention": {"attention": "in the middle"},
}


def rows():
    """Return the recipes by name: up the ladder, then the full one without each of its parts."""
    recipe, recipes = dict(TEXTBOOK), {"the textbook": dict(TEXTBOOK)}
    for name, change in CHANGES.items():
        recipe |= change
        recipes[f"+ {name}"] = dict(recipe)
    for name, change in CHANGES.items():
        recipes[f"all, without {name}"] = {**recipe, **{key: TEXTBOOK[key] for key in change}}
    return recipes | {"all, but predicting v": {**recipe, "predicts": "v"}}


def training_of(recipe):
    """Return the part of a recipe on which the training depends, as text."""
    return ", ".join(f"{key} {value}" for key, value in recipe.items() if key != "weights")


def cost_of(recipe):
    """Return the part of a recipe on which the time of a training step depends, as text."""
    return ", ".join(f"{key} {recipe[key]}" for key in ("network", "optimizer", "attention"))


# %% Training


class WideUNet(nn.Module):
    """A U-Net for MNIST in DDPM's shape: appendix B, but 16, 32, 64 channels, one block per level.

    Every output on the left is a skip.

    28 × 28   conv_in (16) → block (16) ───── 2 skips ────→ 2 blocks (16) → conv_out
    14 × 14     └ shrink (16) → block (32) ── 2 skips ────→ 2 blocks (32) → grow ┘
     7 × 7          └ shrink (32) → block (64) ─ 2 skips ─→ 2 blocks (64) → grow ┘
                                    └→ middle_1 → middle_2 ┘
    """

    def __init__(self, script, base_ch=16):
        super().__init__()
        self.embed, dim = script.timestep_embedding, 4 * base_ch
        a, b, c = base_ch, 2 * base_ch, 4 * base_ch

        def block(in_ch, out_ch, attention=False):
            return script.ResBlock(in_ch, out_ch, dim, 0.0, attention)

        self.time = nn.Sequential(nn.Linear(b, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.conv_in = nn.Conv2d(1, a, 3, padding=1)
        self.shrink = nn.ModuleList(nn.Conv2d(ch, ch, 3, stride=2, padding=1) for ch in (a, b))
        self.down = nn.ModuleList(block(*ch) for ch in ((a, a), (a, b), (b, c)))
        self.middle_1, self.middle_2 = block(c, c, attention=True), block(c, c)
        sizes = ((2 * c, c), (c + b, c)), ((c + b, b), (b + a, b)), ((b + a, a), (2 * a, a))
        self.up = nn.ModuleList(nn.ModuleList(block(*ch) for ch in level) for level in sizes)
        self.grow = nn.ModuleList(nn.Conv2d(ch, ch, 3, padding=1) for ch in (c, b))
        self.norm_out = nn.GroupNorm(8, a)
        self.conv_out = script.zero_init(nn.Conv2d(a, 1, 3, padding=1))

    def forward(self, x_t, t):
        time = self.time(self.embed(t, self.time[0].in_features))
        h, time, skips = self.conv_in(x_t), F.silu(time), []
        for level, block in enumerate(self.down):
            skips.append(h)
            if level > 0:
                h = self.shrink[level - 1](h)
                skips.append(h)
            h = block(h, time)
        skips = [*skips, h]
        h = self.middle_2(self.middle_1(h, time), time)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.grow[level - 1](F.interpolate(h, scale_factor=2))
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time)
        return self.conv_out(F.silu(self.norm_out(h)))


class Run:
    """One training run by a recipe with the definitions of 02 (`script`, a module)."""

    def __init__(self, script, recipe, images, total_steps, rate, seed):
        torch.manual_seed(seed)
        self.script, self.recipe, self.images, self.seed = script, recipe, images, seed
        self.total_steps, self.rate, self.step = total_steps, rate, 0
        settings = {name: getattr(script, name, None) for name in script.NETWORK}
        settings |= {"T": script.T, "SCHEDULE": recipe["schedule"], "IMAGE_SHAPE": (1, 28, 28)}
        self.ddpm = script.DDPM.build(settings, torch.device("cpu"))
        if recipe["network"] == "DDPM's":
            self.ddpm.model = WideUNet(script).to(memory_format=torch.channels_last)
        self.model = self.ddpm.model
        if recipe["attention"] == "nowhere":
            self.model.middle_1.attention = nn.Identity()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        inner, outer = script.split_weights(self.model)
        if recipe["optimizer"] == "Adam":
            inner, outer = [], [*inner, *outer]
        # Adam beside Muon has a fifth of its rate, as in 02.
        adam = torch.optim.Adam(outer, betas=(0.9, 0.99), fused=True)
        self.rates = {adam: rate / 5 if inner else rate}
        if inner:
            self.rates[script.Muon(inner, lr=0)] = rate

    def loss(self, x_0):
        if self.recipe["t"] == "large" and self.recipe["predicts"] == "noise":
            return self.ddpm.loss(x_0)
        t = self.script.random_timesteps(len(x_0), self.ddpm.T, "cpu")
        if self.recipe["t"] == "uniform":
            t = torch.randint(self.ddpm.T, (len(x_0),))
        noise = torch.randn_like(x_0)
        x_t = self.script.q_sample(x_0, t, noise, self.ddpm.alphas_cumprod)
        alpha_bar_t = self.ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        if self.recipe["predicts"] == "noise":
            return F.mse_loss(self.model(x_t, t), noise)
        # Salimans & Ho 2022, arXiv:2202.00512:  v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0
        v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0
        return F.mse_loss(self.model(x_t, t), v)

    def train_step(self):
        torch.manual_seed(hash((self.seed, self.step)))
        index = torch.randint(len(self.images), (self.script.BATCH_SIZE,))
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


class FromV(nn.Module):
    """Predicts ε with a network that returns v: Salimans & Ho, appendix D."""

    def __init__(self, model, alphas_cumprod):
        super().__init__()
        self.model, self.alphas_cumprod = model, alphas_cumprod

    def forward(self, x_t, t):
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar_t).sqrt() * x_t + alpha_bar_t.sqrt() * self.model(x_t, t)


def seconds_per_step(script, images):
    """Return the time of a training step by cost_of, measured by turns."""
    recipes = {cost_of(recipe): recipe for recipe in rows().values()}
    runs = {cost: Run(script, recipe, images, 1000, 0, 0) for cost, recipe in recipes.items()}
    times = {cost: [] for cost in runs}
    for _ in tqdm(range(ROUNDS), "Measuring steps"):
        for cost, run in runs.items():
            start = time.perf_counter()
            run.train_step()
            times[cost].append(time.perf_counter() - start)
    return {cost: statistics.median(some) for cost, some in times.items()}


class Ladder:
    """Trains, samples and scores, and keeps the results; benchmark: that module."""

    def __init__(self, benchmark, judge):
        torch.set_num_threads(1)
        self.benchmark, self.judge, self.folder = benchmark, judge, benchmark.OUT_DIR / "ladder"
        self.script, self.ddim = (benchmark.load(benchmark.SCRIPTS[n]) for n in ("02", "04"))
        self.method = benchmark.code_of(benchmark.SCRIPTS["02"], only_method=True)
        mnist = benchmark.MNIST(benchmark.ROOT / "data", train=True, download=True)
        self.images = mnist.data[:, None]
        measure = partial(seconds_per_step, self.script, self.images)
        self.seconds = benchmark.kept(self.folder / "seconds_per_step.pt", self.method, measure)

    def steps(self, recipe):
        return round(MINUTES * 60 / self.seconds[cost_of(recipe)])

    def sampler(self, recipe, rate, seed):
        """Return 04's sampler with the network that this recipe, learning rate and seed trains."""
        total = self.steps(recipe)
        run = Run(self.script, recipe, self.images, total, rate, seed)
        name = f"{training_of(recipe)}, rate {rate:g}, seed {seed}"

        def train():
            for _ in tqdm(range(total), name, unit=" steps"):
                run.train_step()
            return {"last": run.model.state_dict(), "averaged": run.averaged.state_dict()}

        trained = self.benchmark.kept(self.folder / f"{name}.pt", f"{self.method}, {total}", train)
        run.model.load_state_dict(trained[recipe["weights"]])
        model = run.model.eval()
        if recipe["predicts"] == "v":
            model = FromV(model, run.ddpm.alphas_cumprod)
        betas = self.script.SCHEDULES[recipe["schedule"]](self.script.T)
        return self.ddim.DDIM(model, betas, (1, 28, 28), torch.device("cpu"))

    def score(self, recipe, rate, seed):
        """Return the scores of COUNT samples."""
        sampler = self.sampler(recipe, rate, seed)
        name = f"{training_of(recipe)}, rate {rate:g}, seed {seed}, {recipe['weights']}"
        digest = self.benchmark.digest_of(self.method, sampler.model.state_dict())

        def sample(n, _):
            return sampler.ddim_sample(n, SAMPLING_STEPS, eta=1, spacing="early")

        samples = self.benchmark.draw(f"samples, {name}", digest, sample, self.folder, count=COUNT)
        return self.judge.score(samples)

    def best_rates(self):
        """Print the distance at all learning rates; return the best one of each optimizer."""
        recipes = rows()
        table, best = [], {}
        for optimizer, name in ("Adam", "the textbook"), ("Muon", "+ Muon"):
            distances = {
                rate: self.score(recipes[name], rate, SEEDS[0])["Fréchet distance"]
                for rate in RATES[optimizer]
            }
            best[optimizer] = min(distances, key=distances.get)
            for rate, distance in distances.items():
                row = {"recipe": name, "learning rate": rate, "Fréchet distance": f"{distance:.2f}"}
                table.append(row)
        self.benchmark.print_table(f"Learning rates, seed {SEEDS[0]}", table)
        return best

    def print_rows(self, rates):
        """Print the scores of all rows, mean and range over SEEDS, and draw the distances."""
        table, distances = [], {}
        for name, recipe in rows().items():
            rate, cost = rates[recipe["optimizer"]], 1000 * self.seconds[cost_of(recipe)]
            scores = [self.score(recipe, rate, seed) for seed in SEEDS]
            distances[name] = [score["Fréchet distance"] for score in scores]
            row = {"recipe": name, "steps": f"{self.steps(recipe):,}", "ms per step": f"{cost:.0f}"}
            mean = {key: statistics.fmean(score[key] for score in scores) for key in scores[0]}
            row |= self.benchmark.in_words(mean)
            low, high = min(distances[name]), max(distances[name])
            row["Fréchet distance"] += f" ({low:.2f} to {high:.2f})"
            table.append(row)
        title = f"What each improvement of 02 is worth, after {MINUTES} minutes of one core"
        self.benchmark.print_table(title, table)
        cpu = f"On {self.benchmark.processor()}, seeds {SEEDS}, learning rates {rates}"
        print(f"{cpu}; {COUNT:,} samples each, {SAMPLING_STEPS} early steps, η = 1.")
        note = f"MNIST; {COUNT:,} samples in {SAMPLING_STEPS} steps; dots: {len(SEEDS)} seeds"
        label, path = "Fréchet distance to MNIST (lower is better)", "ladder.png"
        path = self.benchmark.OUT_DIR / path
        print(f"Saved {bars(distances, path, title, label, note, other_from=1 + len(CHANGES))}")

    def who_draws_what(self, rates, middle=500):
        """Print the scores of samples whose large and small t belong to different networks.

        One network was trained with uniform t, the other with large t more often, for as long.
        """
        full, table = rows()["+ attention"], []
        networks = {"uniform": {**full, "t": "uniform"}, "large t": full}
        for above, below in product(networks, networks):
            scores = []
            for seed in SEEDS:
                pair = [
                    self.sampler(networks[name], rates["Muon"], seed) for name in (above, below)
                ]

                @torch.no_grad()
                def sample(n, _, pair=pair):
                    x_t = torch.randn(n, 1, 28, 28)
                    for t, t_prev in pairwise(pair[0].timesteps(SAMPLING_STEPS, "early")):
                        x_t, _ = pair[t < middle].ddim_step(x_t, t, t_prev, 1)
                    return x_t

                weights = [some.model.state_dict() for some in pair]
                digest = self.benchmark.digest_of(self.method, str(middle), *weights)
                name = f"samples, {above} above, {below} below {middle}, seed {seed}"
                samples = self.benchmark.draw(name, digest, sample, self.folder, count=COUNT)
                scores.append(self.judge.score(samples))
            distances = [score["Fréchet distance"] for score in scores]
            mean = {key: statistics.fmean(score[key] for score in scores) for key in scores[0]}
            words = self.benchmark.in_words(mean)
            words["Fréchet distance"] += f" ({min(distances):.2f} to {max(distances):.2f})"
            row = {f"t >= {middle} by": above, f"t < {middle} by": below, **words}
            table.append(row)
        self.benchmark.print_table("Samples by two networks: training with which t", table)


def ladder(benchmark, judge):
    """Print the tables and draw the figure."""
    whole = Ladder(benchmark, judge)
    rates = whole.best_rates()
    whole.print_rows(rates)
    whole.who_draws_what(rates)
