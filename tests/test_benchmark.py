"""The scores of tests/benchmark.py, where the answer is known, and tests/ladder.py in small."""

import itertools
import re
from functools import partial
from types import SimpleNamespace

import benchmark
import ladder
import pytest
import torch


def gaussian(count, size):
    return torch.randn(count, size, dtype=torch.float64)


def test_frechet_distance_of_known_gaussians():
    a = gaussian(4000, 5)
    assert benchmark.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert benchmark.frechet_distance(a, a + 2) == pytest.approx(5 * 2**2, rel=1e-6)
    wanted = (a.mean(0).square().sum() + a.T.cov().trace()).item()  # |μ|² + tr Σ · (2 − 1)²
    assert benchmark.frechet_distance(a, 2 * a) == pytest.approx(wanted, rel=1e-6)


def test_precision_and_recall_tell_good_from_diverse():
    real, narrow, far = gaussian(500, 2), 0.1 * gaussian(500, 2), 20 + gaussian(500, 2)
    assert benchmark.share_among(narrow, real) > 0.95 and benchmark.share_among(real, narrow) < 0.2
    assert benchmark.share_among(far, real) == 0 == benchmark.share_among(real, far)
    assert benchmark.share_among(real, real) == 1


def test_spread_within_classes():
    labels = torch.arange(600) % 3
    features = gaussian(600, 4) + 100 * labels[:, None]  # far apart, but not within a class
    spread = benchmark.spread_within_classes(features, labels)
    wide = benchmark.spread_within_classes(2 * features, labels)
    assert wide == pytest.approx(2 * spread) and 1 < spread < 4


def test_real_images_are_in_a_random_order_and_with_their_own_labels(monkeypatch):
    """MNIST's test images are ordered by writer: neighbours are alike."""
    data, asked = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28), []
    mnist = SimpleNamespace(data=data, targets=torch.arange(200))
    monkeypatch.setattr(benchmark, "MNIST", lambda _, train, **__: asked.append(train) or mnist)
    images, labels = benchmark.read_mnist(train=False)
    assert images.shape == (200, 1, 28, 28) and images.min() == -1
    assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round(), labels.float())
    assert 70 < labels[:100].double().mean() < 130, "the first half comes from all of them"
    assert torch.equal(labels.sort().values, torch.arange(200))
    torch.manual_seed(1)
    assert torch.equal(labels, benchmark.read_mnist(train=False)[1]), "always the same order"
    assert torch.equal(benchmark.read_mnist(train=True)[1], torch.arange(200))
    assert asked == [False, False, True]


def test_04_is_scored_with_the_network_that_it_sampled_with(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    of_02 = tmp_path / "outputs" / "02_ddpm" / "checkpoint.pt"
    own = tmp_path / "outputs" / "04_ddim_fast_sampling" / "checkpoint.pt"
    assert benchmark.path_of("04_ddim_fast_sampling.py") == of_02
    own.parent.mkdir(parents=True)
    own.touch()
    assert benchmark.path_of("04_ddim_fast_sampling.py") == own
    assert benchmark.path_of("02_ddpm.py") == of_02


def test_real_images_are_scored_by_thousands_each_among_the_next(monkeypatch):
    judge, pairs = object.__new__(benchmark.Judge), []
    judge.test_features = torch.arange(10_000.0)[:, None]
    monkeypatch.setattr(benchmark, "read_mnist", lambda train: (judge.test_features, None))

    def score(images, labels=None, real=None):
        pairs.append((images[0].item(), real[0].item(), len(images), len(real)))
        return {"first": images[0].item()}

    judge.score = score
    assert judge.score_real() == {"first": 4500}
    assert pairs == [(1000 * i, 1000 * (i + 1) % 10_000, 1000, 1000) for i in range(10)]


def test_guidance_is_scored_with_the_samples_of_03s_network(tmp_path, monkeypatch):
    """An oracle in place of it: pixels of class c are from N(c / 10 - 0.5, 0.1²).

    "No class" is the one around 0. The best ε of two such classes differ by a multiple of the
    difference of their means; so a scale of s moves the mean to s times its place, as far as
    pixels go. In place of the judge, the mean of each class.
    """
    script = benchmark.load(benchmark.SCRIPTS["03"])

    def network(x_t, t, labels):
        assert t.shape == labels.shape == (len(x_t),)
        a = ddpm.alphas_cumprod[t].double().view(-1, 1, 1, 1)
        mean = torch.where(labels == 10, 0.0, labels / 10 - 0.5).view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * 0.01 + 1 - a)).float()

    names = [*"0123456789"]
    betas, results = script.linear_beta_schedule(200), {}
    ddpm = script.GuidedDDPM(network, betas, (1, 2, 2), torch.device("cpu"), 0.1, names)

    def score(images, labels):
        means = [images[labels == label].mean().item() for label in range(10)]
        return {"means": means, "spread": 1.0}

    for name, value in {
        "OUT_DIR": tmp_path,
        "draw": partial(benchmark.draw, folder=tmp_path, size=333),  # begins with various labels
        "SCALES": (0, 1, 2),
        "read_mnist": lambda train: (None, torch.arange(60_000) % 10),
        "read_checkpoint": lambda *_: (ddpm, {"averaged": {}}, "digest"),
        "cost_of": lambda *_: {},
        "trade_off": lambda scores, *_, **__: results.update(scores),
        "in_words": dict,
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    row, samples = benchmark.benchmark_03(SimpleNamespace(score=score))
    inside, everywhere = results.values()
    assert len(samples) == benchmark.COUNT
    assert list(inside) == [0, 1, 2] and sorted(everywhere) == [1, 2]
    assert row["means"] == inside[script.GUIDANCE_SCALE]["means"]
    place = torch.arange(10) / 10 - 0.5
    for scale, means in {0: inside[0], 1: inside[1], 2: everywhere[2]}.items():
        wanted = (scale * place).clamp(-1, 1).tolist()
        assert means["means"] == pytest.approx(wanted, abs=0.04), scale
    # Guidance in a part of the steps goes less far: the last steps return to the class.
    near, far = (torch.tensor(scores[2]["means"]).abs() for scores in (inside, everywhere))
    assert (near < far - 0.1)[place.abs() > 0.15].all()


def test_samples_come_in_parts_and_are_kept_while_the_weights_are_the_same(tmp_path):
    firsts = []

    def sample(n, first):
        firsts.append((n, first))
        return torch.randn(n, 1)

    samples, again, others = (
        benchmark.draw("x", weights, sample, tmp_path, size=300) for weights in ("1", "1", "2")
    )
    assert firsts == 2 * [(300, 0), (300, 300), (300, 600), (100, 900)], "not drawn again for 1"
    assert len(samples) == 1000 and not torch.equal(samples[:100], samples[300:400])
    assert torch.equal(samples, again) and torch.equal(samples, others), "from the same seed"
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_cost_of_diffusion_on_pixels_and_latents():
    weight = torch.ones(1000, requires_grad=True)
    seconds, megabytes = benchmark.training_cost(lambda: weight.exp().sum())
    assert megabytes == pytest.approx(0.004) and 0 < seconds < 1, "what is kept is counted"
    module = benchmark.load(benchmark.SCRIPTS["05"])
    settings = {"T": 5, "SCHEDULE": "cosine", "IMAGE_SHAPE": (3, 9, 9), "BASE_CH": 8}
    settings |= {"NUM_BLOCKS": 1, "VAE_CH": 4, "LATENT_CH": 2, "DOWNSAMPLE": 4}
    rows = benchmark.costs_of_05(module, settings, torch.device("cpu"), sides=(32, 64), batch=4)
    assert [row[""] for row in rows[4:]] == [
        "64 × 64: ms for loss and gradients of 4 images",
        "64 × 64: MB for its gradients",
        "64 × 64: ms per image, 5 steps",
        "64 × 64: ms for loss and gradients of the VAE",
    ]
    assert float(rows[5]["pixels"]) > 3 * float(rows[1]["pixels"]), "four times as many pixels"
    assert float(rows[5]["pixels"]) > 3 * float(rows[5]["latents"])
    assert float(rows[5]["ratio"].removesuffix(" ×")) > 3 and rows[7]["pixels"] == ""


def test_comments_and_docstrings_do_not_count_as_code(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    text = (
        '"""A script."""\n# %% 1. Settings\nT = 5\n\n\n'
        "# %% 3. Steps\ndef f():\n    return 1\n\n\n# %% 4. Training\nx = 1\n"
    )

    def changes(old, new):
        codes = []
        for version in text, text.replace(old, new):
            (tmp_path / "a.py").write_text(version)
            codes.append((benchmark.code_of("a.py"), benchmark.code_of("a.py", True)))
        return [one != other for one, other in zip(*codes)]  # of everything, of the method

    assert changes("A script", "The script") == [False, False]
    assert changes("return 1", "return 1  # one") == [False, False]
    assert changes("    return", '    """One."""\n    return') == [False, False]
    assert changes("return 1", "return 2") == [True, True]
    assert changes("T = 5", "T = 6") == [True, False]


def test_a_run_is_measured_once_and_again_when_the_script_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "OUT_DIR", tmp_path / "outputs" / "benchmark")
    text = (
        "from pathlib import Path\n"
        "folder = Path('outputs/02_x')\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'samples.png').touch()\n"
        "memory = bytearray(200_000_000)\n"
        "for n in 50, 100:\n"
        "    print(f'Training: {n:3}%|##| {n}/100 [0:01<0:00, {n}.50 images/s]', end='\\r')\n"
        "print()\n"
        "print('Training:   9%|##| 9/100 [0:01<0:01, 9.00 images/s, loss=0.1]', end='\\r')\n"
        "print('Training: 100%|##| 100/100 [0:01<0:00, 987.32 images/s, loss=0.1]')\n"
        "print('Sampling: 100%|##| 20/20 [0:01<0:00, 11.00 steps/s]')\n"
    )
    weights = {"a": torch.zeros(1000, 2), "b": torch.zeros(34)}

    def cost_of(script):
        (tmp_path / "02_x.py").write_text(script)
        return benchmark.cost_of("02_x.py", weights)

    cost = cost_of(text)
    assert cost["images/s in training"] == "987" and cost["parameters"] == "2,034"
    assert cost["wall time"].startswith("0 min") and cost["peak memory"] in ("0.2 GB", "0.3 GB")
    log = tmp_path / "outputs" / "benchmark" / "run_02.log"
    log.unlink()
    assert cost_of(text) == cost and not log.exists(), "not run again"
    assert cost_of(text.replace("987", "988"))["images/s in training"] == "988"
    # Only the rest of a training that had been stopped is no measure of the whole.
    resumed = "print('Resuming from a/checkpoint.pt, after 7 of 9 images.')\n"
    assert cost_of(text + resumed)["wall time"] == "not known"
    # A run that was not started from here: its outputs count, its time is not known.
    log.with_suffix(".pt").unlink()
    assert cost_of(text)["wall time"] == "not known"
    (tmp_path / "03_x.py").write_text("raise ValueError('broken')")
    with pytest.raises(SystemExit, match=r"(?s)03_x.py failed:.*broken"):
        benchmark.run("03_x.py")


def test_distance_to_the_nearest():
    b = torch.randn(12_000, 3)
    a = b[[0, 11_999, 6000]] + torch.tensor([[0.0, 0.0, 0.0], [1e-4, 0, 0], [0, 2e-4, 0]])
    expected = torch.tensor([0.0, 1e-4, 2e-4])
    assert torch.allclose(benchmark.distance_to_nearest(a, b), expected, atol=2e-3)
    assert benchmark.distance_to_nearest(a + 100, b).min() > 100


@pytest.mark.parametrize("alpha_bar_t", [1e-6, 0.3, 0.9999])
def test_ideal_x_0_is_the_mean_of_the_posterior(alpha_bar_t):
    """Bayes' rule in plain numbers, image by image. No other prediction has a smaller error."""
    images, x_t = torch.rand(7, 1, 2, 2) * 2 - 1, torch.randn(3, 1, 2, 2)
    x_t[0] = alpha_bar_t**0.5 * images[4] + 0.1 * (1 - alpha_bar_t) ** 0.5
    for x, ours in zip(x_t, benchmark.ideal_x_0(x_t, alpha_bar_t, images)):
        noises = [(x - alpha_bar_t**0.5 * image) / (1 - alpha_bar_t) ** 0.5 for image in images]
        logs = torch.stack([-(noise.double() ** 2).sum() / 2 for noise in noises])
        weights = (logs - logs.max()).exp() / (logs - logs.max()).exp().sum()
        expected = sum(weight * image for weight, image in zip(weights, images))
        assert torch.allclose(ours, expected.float(), atol=2e-3)


# %% The ladder


@pytest.fixture
def small_02(monkeypatch, tmp_path):
    """02 with a tiny network, 40 black images, and a clock by which a step takes 20 ms."""
    script = benchmark.load(benchmark.SCRIPTS["02"])
    clock = SimpleNamespace(perf_counter=partial(next, itertools.count(step=0.02)))
    mnist = SimpleNamespace(data=torch.zeros(40, 28, 28, dtype=torch.uint8))
    for module, values in (
        (script, {"BASE_CH": 8, "BATCH_SIZE": 4, "T": 50}),
        (benchmark, {"OUT_DIR": tmp_path, "MNIST": lambda *_, **__: mnist}),
        (ladder, {"MINUTES": 0.001, "SAMPLING_STEPS": 3, "ROUNDS": 1, "time": clock, "COUNT": 3}),
        (ladder, {"SEEDS": (0, 1), "RATES": {"Adam": (0.001, 0.002), "Muon": (0.02,)}}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    return script


def test_ladder_adds_one_thing_at_a_time_and_takes_each_out_alone():
    recipes = list(ladder.rows().values())
    textbook, *up = recipes[: 1 + len(ladder.CHANGES)]
    assert textbook == ladder.TEXTBOOK
    for before, after in zip([textbook, *up], up):
        assert sum(before[key] != after[key] for key in textbook) == 1
    for without in recipes[len(up) + 1 : 2 * len(up) + 1]:
        changed = [key for key in textbook if without[key] != up[-1][key]]
        assert len(changed) == 1 and without[changed[0]] == textbook[changed[0]]


def test_ladder_prints_its_tables_and_trains_only_once(small_02, capsys, monkeypatch, tmp_path):
    recipes, shown = ladder.rows(), []
    names = "the textbook", "+ thin network", "+ averaged weights", "+ attention"
    monkeypatch.setattr(ladder, "CHANGES", {})
    kept = {name: recipes[name] for name in (*names, "+ Muon", "all, but predicting v")}
    monkeypatch.setattr(ladder, "rows", lambda: kept)
    judge = SimpleNamespace(
        score=lambda x: shown.append(x) or {"Fréchet distance": x.mean().item()}
    )
    ladder.ladder(benchmark, judge)
    out = capsys.readouterr().out
    tables = [t.splitlines()[2:] for t in re.findall(r"(?m)(?:^\|.*\n)+", out)]
    assert [len(table) for table in tables] == [3, 6, 4]
    assert all(f"| {name} | 3 | 20 | " in out for name in kept)
    first, same = tables[1][0], tables[2][3]
    assert re.search(r" -?\d\.\d\d \(-?\d\.\d\d to -?\d\.\d\d\) \|$", first), "mean and range"
    assert same.startswith("| large t | large t |")
    assert same.split(" | ")[-1] == tables[1][3].split(" | ")[-1], (
        "one network, so the same samples"
    )
    assert all(x.shape == (3, 1, 28, 28) and x.abs().max() <= 1 for x in shown)
    trainings = {*(tmp_path / "ladder").glob("network*.pt")}
    # textbook: 2 seeds, a rate more; thin, cosine ... large t: 2 each; full recipe with uniform t
    assert len(trainings) == 3 + 2 * 6 and (tmp_path / "ladder.png").exists()
    monkeypatch.setattr(ladder.Run, "train_step", lambda self: 1 / 0)
    ladder.ladder(benchmark, judge)
    assert capsys.readouterr().out == out


def test_a_recipe_is_what_it_says(small_02):
    script, images = small_02, torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    recipes = ladder.rows()
    textbook = ladder.Run(script, recipes["the textbook"], images, 10, 0.004, 0)
    assert isinstance(textbook.model, ladder.WideUNet) and [*textbook.rates.values()] == [0.004]
    assert isinstance(textbook.model.middle_1.attention, torch.nn.Identity)
    assert sum(p.numel() for p in ladder.WideUNet(script).parameters()) == 667_649, "02's, once"
    full = ladder.Run(script, recipes["+ attention"], images, 10, 0.02, 0)
    assert isinstance(full.model, script.UNet) and sorted(full.rates.values()) == [0.004, 0.02]
    assert isinstance(full.model.middle_1.attention, script.Attention)
    beta = script.linear_beta_schedule(50)[0].item()
    assert textbook.ddpm.alpha_bars[0] == pytest.approx(1 - beta) != full.ddpm.alpha_bars[0]
    seen = []
    for run in textbook, full:
        run.model.forward = run.ddpm.model = lambda x, t: seen.append(t) or torch.zeros_like(x)
        run.loss(torch.zeros(4000, 1, 2, 2))
    shares = [(t < 25).double().mean().item() for t in seen]
    assert shares == [pytest.approx(1 / 2, abs=0.03), pytest.approx(1 / 4, abs=0.01)]


def test_ladder_learns_v_where_it_says_so(small_02):
    """A network that knows images of one grey answers with v = √ᾱ ε − √(1−ᾱ) x_0."""
    run = ladder.Run(small_02, ladder.rows()["all, but predicting v"], None, 10, 0.02, 0)
    x_0 = torch.full((2000, 1, 2, 2), 0.5)

    def v(x_t, t):
        a = run.ddpm.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        noise = (x_t - a.sqrt() * 0.5) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * 0.5).float()

    run.model.forward = v
    assert run.loss(x_0).item() == pytest.approx(0, abs=1e-6)
    noise, t = torch.randn_like(x_0), torch.full((2000,), 20)
    x_t = small_02.q_sample(x_0, t, noise, run.ddpm.alphas_cumprod)
    noise_pred = ladder.FromV(v, run.ddpm.alphas_cumprod)(x_t, t)
    assert torch.allclose(noise_pred, noise, atol=1e-3)
