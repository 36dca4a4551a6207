"""The Trainer of 02: averages, learning rate, randomness, saving, going on, what it refuses."""

import math
import os

import pytest
import torch
from conftest import load

script = load("02_ddpm.py")
CPU = torch.device("cpu")
SETTINGS = {
    "T": 50,
    "EPOCHS": 4,  # of 5 steps
    "BATCH_SIZE": 8,
    "LEARNING_RATE": 0.02,
    "EMA_DECAY": 0.9999,
    "SEED": 0,
    "SAVE_EVERY": 1,
    "PREVIEW_EVERY": 5,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it on: clock["now"], in seconds."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(script, "now", lambda: clock["now"])
    return clock


@pytest.fixture
def make(tmp_path, clock):
    """Return a function that makes a Trainer of 40 images; each of its steps takes 25 seconds."""

    def make(images=None, precision=torch.float32, rank=0, world=1, fixed=("T",), **settings):
        torch.manual_seed(0)
        betas = script.cosine_beta_schedule(50)
        model = script.UNet((1, 8, 8), 8, (1,), 1, (), 0.1, precision)
        images = (torch.rand(40, 1, 8, 8) * 255).byte() if images is None else images
        ddpm = script.DDPM(model, betas, images.shape[1:], CPU)

        def loss(index):
            clock["now"] += 25
            return ddpm.loss(script.to_batch(images[index]))

        settings, path = {**SETTINGS, **settings}, tmp_path / "checkpoint.pt"
        return script.Trainer(model, loss, len(images), settings, fixed, path, rank, world)

    return make


def some_loss(trainer):
    return sum(weight.sum() for weight in trainer.model.parameters())


def finish(trainer):
    for _ in trainer.run():
        torch.randn(3)  # what happens at a preview takes no part
    return trainer


def saved(trainer):
    return torch.load(trainer.path, weights_only=True)


def assert_same_weights(one, other):
    for name in "model", "averaged":
        for a, b in zip(getattr(one, name).parameters(), getattr(other, name).parameters()):
            assert torch.equal(a, b)


# %% The average, the learning rate, the optimizers


def test_average_is_the_mean_of_the_recent_weights(make):
    """Against the definition: a weighted mean of all weights so far, the weights adding to 1."""
    trainer = make(EPOCHS=12)
    weights = [trainer.model.conv_in.weight.detach().clone()]
    for _ in range(50):
        trainer.train_step()
        weights.append(trainer.model.conv_in.weight.detach().clone())
    shares = torch.zeros(51)
    shares[0] = 1.0
    for step in range(1, 51):
        decay = min(0.9999, (1 + step) / (10 + step))
        shares *= decay
        shares[step] = 1 - decay
    expected = sum(s * w for s, w in zip(shares, weights))
    assert torch.allclose(trainer.averaged.conv_in.weight, expected, atol=1e-6)
    assert shares[0] < 1e-3, "the random weights of the start are forgotten"
    assert not torch.allclose(trainer.averaged.conv_in.weight, weights[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("step", "ema_decay", "decay"), [(1, 0.9999, 2 / 11), (80, 0.9999, 0.9), (1000, 0.5, 0.5)]
)
def test_average_reaches_back_over_a_ninth_of_the_steps_or_as_ema_decay_says(
    step, ema_decay, decay
):
    averaged, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = [w.detach().clone() for w in averaged.parameters()]
    script.update_average(averaged, model, step, ema_decay)
    for old, new, average in zip(before, model.parameters(), averaged.parameters()):
        assert torch.allclose(average, decay * old + (1 - decay) * new, atol=1e-7)


def test_learning_rate_rises_then_falls_to_zero(make):
    trainer = make(EPOCHS=40)  # 200 steps
    trainer.loss = lambda index: trainer.model.conv_in.bias.sum()
    trainer.muon.step = lambda: None  # only its rate counts here
    rates = []
    while trainer.step < trainer.total_steps:
        trainer.model.zero_grad(set_to_none=True)
        trainer.train_step()
        rates.append(trainer.muon.param_groups[0]["lr"])
        assert trainer.adam.param_groups[0]["lr"] == pytest.approx(rates[-1] / 5)
    assert rates[0] == pytest.approx(0.02 / 10) and rates[4] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.02, rel=0.02) and 8 <= rates.index(max(rates)) <= 10
    assert rates[100] == pytest.approx(0.01) and 0 < rates[-1] < 5e-6
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_gradients_are_clipped(make):
    """A loss scaled by 10,000 gives gradients of norm 1, which the averages hold a share of."""
    trainer = make()
    good = trainer.loss
    trainer.loss = lambda index: 1e4 * good(index)
    trainer.train_step()
    gradients = [s["exp_avg"] / 0.1 for s in trainer.adam.state.values()]
    gradients += [s["average"] / 0.05 for s in trainer.muon.state.values()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm == pytest.approx(1.0, rel=1e-3)


def test_each_weight_has_one_optimizer(make):
    """Muon for matrices inside the network, Adam for vectors and both ends."""
    trainer = make()
    muon = trainer.muon.param_groups[0]["params"]
    adam = trainer.adam.param_groups[0]["params"]
    assert sorted(map(id, [*muon, *adam])) == sorted(map(id, trainer.model.parameters()))
    assert all(w.ndim > 1 for w in muon)
    ends = {trainer.model.conv_in.weight, trainer.model.conv_out.weight}
    assert {w for w in adam if w.ndim > 1} == ends


@pytest.mark.parametrize("where", ["everywhere", "in one optimizer"])
def test_float16_leaves_weights_alone_whose_gradients_are_infinite(make, where):
    trainer = make(precision=torch.float16)
    trainer.train_step()  # the optimizers have something to remember
    before = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    scale = trainer.scaler.get_scale()
    if where == "everywhere":
        trainer.loss = lambda index: 1e36 * some_loss(trainer)
    else:
        trainer.loss = lambda index: 1e36 * trainer.model.conv_in.weight.sum() + some_loss(trainer)
    trainer.train_step()
    adam = {id(w) for w in trainer.adam.param_groups[0]["params"]}
    for name, w in trainer.model.named_parameters():
        assert torch.isfinite(w).all()
        if where == "everywhere" or id(w) in adam:
            assert torch.equal(before[name], w)
    assert trainer.step == 2 and trainer.scaler.get_scale() == scale / 2
    trainer.loss = lambda index: 0.01 * some_loss(trainer)
    trainer.train_step()
    assert all(torch.isfinite(w).all() for w in trainer.model.parameters())


# %% Randomness


def seen_by(trainer):
    """Return the list to which every further step adds the indices of its images."""
    seen, good = [], trainer.loss
    trainer.loss = lambda index: seen.append(index) or good(index)
    return seen


def test_every_step_draws_its_images_from_all(make):
    trainer, seen = make(EPOCHS=20, SAVE_EVERY=1000), []
    trainer.loss = lambda index: seen.append(index) or some_loss(trainer)
    trainer.muon.step = trainer.adam.step = lambda: None
    finish(trainer)
    assert len(seen) == 100 and all(len(index) == 8 for index in seen)
    counts = torch.bincount(torch.cat(seen), minlength=40)
    assert len(counts) == 40 and counts.min() > 4 and counts.max() < 45  # 20 expected
    assert not torch.equal(seen[0], seen[1])


def test_processes_share_every_batch_and_the_first_one_saves(make):
    seen = {}
    for rank in 2, 1, 0:
        trainer = make(rank=rank, world=3, EPOCHS=1)
        seen[rank] = seen_by(trainer)
        finish(trainer)
        assert trainer.path.exists() == (rank == 0)
        assert not trainer.recent and len(trainer.losses) == 5
    assert all(len(index) == 3 for indices in seen.values() for index in indices), "8 / 3, up"
    assert not torch.equal(seen[0][0], seen[1][0])


def test_step_noise_depends_on_step_seed_and_process_only(make):
    def noise(step, seed=0, rank=0):
        trainer = make(SEED=seed, rank=rank)
        trainer.step = step
        drawn = []
        trainer.loss = lambda index: drawn.append(torch.randn(4)) or some_loss(trainer)
        torch.randn(step)  # whatever went before
        trainer.train_step()
        return drawn[0]

    assert torch.equal(noise(3), noise(3))
    different = [noise(3), noise(4), noise(3, seed=1), noise(3, rank=1)]
    assert len({tuple(d.tolist()) for d in different}) == 4


# %% Saving and going on


def test_saves_and_previews_come_by_the_clock(make, clock):
    """SAVE_EVERY and PREVIEW_EVERY are minutes; the end is saved always, and has no preview."""
    trainer = make(SAVE_EVERY=1, PREVIEW_EVERY=2.5)
    saves, previews = [], []
    trainer.save = lambda: saves.append(trainer.step)
    for _ in trainer.run():
        previews.append(trainer.step)
        clock["now"] += 90  # a preview takes its time: the next one comes 2.5 minutes later
    assert previews == [7, 14]  # 7 · 25 s > 150 s
    assert saves == [3, 6, 8, 11, 14, 15, 18, 20]
    trainer = make(SAVE_EVERY=9, PREVIEW_EVERY=500 / 60)  # the last step ends after 500 seconds
    trainer.save = lambda: saves.append(trainer.step)
    saves.clear()
    assert list(trainer.run()) == [] and saves == [20]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_it_learns_in_every_precision_and_goes_on_exactly(make, capsys, precision):
    images = torch.full((40, 1, 8, 8), 255, dtype=torch.uint8)  # easy to learn
    options = {"images": images, "precision": precision, "EPOCHS": 8}
    one = make(**options)
    assert one.scaler.is_enabled() == (precision == torch.float16)
    finish(one)
    assert len(one.losses) == 40 and sum(one.losses[-10:]) < 0.7 * sum(one.losses[:10])
    one.path.unlink()
    two = make(**options, PREVIEW_EVERY=6)
    next(two.run())
    assert two.step == 15 and saved(two)["step"] == 15
    two.train_step()  # done, but not saved when the power went
    assert capsys.readouterr().out == ""
    three = make(**options)
    assert capsys.readouterr().out == f"Going on from {three.path}, step 15 of 40.\n"
    assert three.step == 15 and three.losses == one.losses[:15]
    finish(three)
    if precision == torch.float16:  # the scaler begins anew, and may round otherwise
        assert three.losses == pytest.approx(one.losses, rel=0.02)
    else:
        assert three.losses == one.losses
        assert_same_weights(one, three)


def test_interrupted_between_saves_it_repeats_what_is_lost(make):
    one = finish(make())
    one.path.unlink()
    two = make(PREVIEW_EVERY=4)
    next(two.run())
    assert two.step == 10 and saved(two)["step"] == 9
    del two
    three = make()
    assert three.step == 9
    finish(three)
    assert three.losses == one.losses
    assert_same_weights(one, three)


def test_more_epochs_train_on_and_the_learning_rate_may_change(make):
    first = finish(make(EPOCHS=2))
    trainer = make(EPOCHS=3, LEARNING_RATE=0.01, SAVE_EVERY=7, EMA_DECAY=0.5)
    assert trainer.step == 10 and trainer.total_steps == 15
    finish(trainer)
    assert len(trainer.losses) == 15 and trainer.losses[:10] == first.losses
    assert saved(trainer)["step"] == 15 and saved(trainer)["settings"]["LEARNING_RATE"] == 0.01
    assert trainer.muon.param_groups[0]["lr"] < 0.001, "of the new run"
    fewer = make(EPOCHS=1)
    before = fewer.path.read_bytes()
    finish(fewer)
    assert fewer.path.read_bytes() == before, "fewer epochs: nothing left to do"


@pytest.mark.parametrize("size", [3, 7, 16, 1000])
def test_another_batch_size_goes_on_at_the_same_share(make, size):
    """Also where it does not divide the number of images: what was finished stays finished."""
    trainer = make()
    trainer.step = trainer.total_steps
    trainer.save()
    other = make(BATCH_SIZE=size)
    assert other.step == other.total_steps == max(1, 160 // size)
    trainer.step = trainer.total_steps // 2
    trainer.save()
    other = make(BATCH_SIZE=size)
    assert other.step == other.total_steps // 2
    seen = seen_by(other)
    finish(other)
    assert len(seen) == (other.total_steps + 1) // 2
    assert all(len(index) == size for index in seen)


def test_fewer_images_than_a_batch_are_enough(make):
    trainer = make(BATCH_SIZE=500)
    assert trainer.total_steps == 1
    finish(trainer)
    assert len(trainer.losses) == 1


def test_extras_are_kept(make):
    trainer = make()
    trainer.extras["curve"] = ([1, 2], [0.5, 0.25])
    trainer.save()
    assert make().extras == {"curve": ([1, 2], [0.5, 0.25])}


def test_other_fixed_settings_are_refused_and_the_file_is_left_alone(make):
    trainer = make()
    trainer.save()
    before = trainer.path.read_bytes()
    expected = (
        rf"^Cannot go on from {trainer.path}: T was 50 and now is 60\. To start from scratch, "
    )
    with pytest.raises(SystemExit, match=expected + r"delete the file or set another OUT_DIR\.$"):
        make(T=60)
    assert make(T=60, fixed=("SEED",)).step == 0, "only what is fixed"
    assert trainer.path.read_bytes() == before and os.listdir(trainer.path.parent) == [
        "checkpoint.pt"
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_program_before_anything_is_saved(make, bad):
    trainer = make()
    good = trainer.loss
    trainer.loss = lambda index: good(index) * (bad if trainer.step == 7 else 1)
    with pytest.raises(SystemExit, match=r"NaN or infinite before step 9.*LEARNING_RATE = 0\.02"):
        finish(trainer)
    state = saved(trainer)
    assert state["step"] == 6 and all(torch.isfinite(w).all() for w in state["model"].values())
    assert make().step == 6, "and one can go on from there"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_noticed_even_if_the_loss_is_finite(make, bad):
    trainer = make()
    trainer.recent.append(torch.tensor(1.0))
    with torch.no_grad():
        trainer.model.conv_in.weight[0, 0, 0, 0] = bad
    with pytest.raises(SystemExit, match="NaN or infinite"):
        trainer.save()
    assert not trainer.path.exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "checkpoint.pt"
    script.save_atomically({"a": 1}, path)
    before = path.read_bytes()
    assert os.listdir(tmp_path) == ["checkpoint.pt"]

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full_disk)
        with pytest.raises(OSError, match="no space left"):
            script.save_atomically({"a": 2}, path)
    assert path.read_bytes() == before
    script.save_atomically({"a": 3}, path)  # what the failed one has left does not matter
    assert torch.load(path, weights_only=True) == {"a": 3}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_all_is_on_the_disk_before_the_old_file_is_replaced(tmp_path, monkeypatch):
    path, order, fsync = tmp_path / "checkpoint.pt", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: order.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda partial, _: order.append(partial.read_bytes()))
    script.save_atomically({"a": torch.zeros(1000)}, path)
    assert order[0] == "fsync" and len(order) == 2 and not path.exists()
    (tmp_path / "whole").write_bytes(order[1])
    assert torch.equal(torch.load(tmp_path / "whole", weights_only=True)["a"], torch.zeros(1000))


# %% What the training and its figures use


def test_flip_mirrors_about_half_of_the_images():
    images = torch.zeros(1000, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255  # bright on the left
    assert torch.equal(script.to_batch(images)[..., 0], torch.ones(1000, 3, 4))
    flipped = script.to_batch(images, flip=True)
    right = flipped[:, 0, 0, 3] == 1
    assert 400 < right.sum() < 600
    assert (flipped[right][..., 0] == -1).all() and (flipped[~right][..., 0] == 1).all()


class Zero(torch.nn.Module):
    def forward(self, x_t, t):
        return torch.zeros_like(x_t)


def test_loss_per_timestep_is_the_error_at_each_timestep():
    """A network that answers 0 is wrong by the noise itself, at every t, in the mean by 1."""
    ddpm = script.DDPM(Zero(), script.cosine_beta_schedule(50), (1, 8, 8), CPU)
    images = torch.zeros(300, 1, 8, 8)
    timesteps, errors, ideal = script.loss_per_timestep(ddpm, images, count=10)
    assert timesteps[0] == 0 and timesteps[-1] == 48
    assert len(timesteps) == len(errors) == len(ideal) == 10
    assert all(error == pytest.approx(1, rel=0.05) for error in errors)
    assert max(ideal) < 1e-6, "there is but one image"
    other = torch.cat([images, torch.ones(1, 1, 8, 8)])
    _, _, ideal = script.loss_per_timestep(ddpm, other, count=10)
    assert max(ideal[:5]) < 1e-6 < max(ideal), "in strong noise it might be the other one"
    assert script.loss_per_timestep(ddpm, images, count=10)[1] == errors, "always the same noise"


def test_loss_per_timestep_is_the_loss_at_that_timestep(monkeypatch):
    """By the network's own loss, with its t and its noise held fixed."""
    torch.manual_seed(0)
    model = script.UNet((1, 8, 8), 8, (1,), 1, (), 0.0, torch.float32).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    ddpm = script.DDPM(model, script.cosine_beta_schedule(50), (1, 8, 8), CPU)
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    timesteps, errors, _ = script.loss_per_timestep(ddpm, images, count=5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    for timestep, error in zip(timesteps, errors):
        monkeypatch.setattr(torch, "randint", lambda *_, t=timestep, **__: torch.full((64,), t))
        assert error == pytest.approx(ddpm.loss(images).item(), rel=1e-3)


@pytest.mark.parametrize("alpha_bar_t", [1e-6, 0.01, 0.3, 0.9, 0.9999])
def test_ideal_x_0_is_the_mean_of_the_posterior(alpha_bar_t):
    """Bayes' rule in plain numbers, image by image."""
    images, x_t = torch.rand(7, 1, 2, 2) * 2 - 1, torch.randn(3, 1, 2, 2)
    x_t[0] = alpha_bar_t**0.5 * images[4] + 0.1 * (1 - alpha_bar_t) ** 0.5
    for x, ours in zip(x_t, script.ideal_x_0(x_t, alpha_bar_t, images)):
        noises = [(x - alpha_bar_t**0.5 * image) / (1 - alpha_bar_t) ** 0.5 for image in images]
        logs = torch.stack([-(noise.double() ** 2).sum() / 2 for noise in noises])
        weights = (logs - logs.max()).exp() / (logs - logs.max()).exp().sum()
        expected = sum(weight * image for weight, image in zip(weights, images))
        assert torch.allclose(ours, expected.float(), atol=2e-3)


def test_no_prediction_is_better_than_the_ideal_one():
    """Not in the mean over all images and much noise: the ideal one pushed aside is worse."""
    torch.manual_seed(0)
    images = torch.rand(5, 1, 2, 2) * 2 - 1
    x_0, noise = images.repeat(4000, 1, 1, 1), torch.randn(20_000, 1, 2, 2)
    x_t = 0.5**0.5 * (x_0 + noise)
    ideal = script.ideal_x_0(x_t, 0.5, images)
    best = (x_0 - ideal).square().mean()
    assert 0.05 < best < 1
    for other in 0.95 * ideal, 1.05 * ideal, ideal + 0.05, ideal + 0.05 * x_t, x_t:
        assert (x_0 - other).square().mean() > best


def test_samples_in_parts_are_all_there():
    calls = []

    def sample(n, frames):
        calls.append((n, frames))
        return torch.full((n, 1, 2, 2), float(len(calls)))

    frames = []
    images = script.sample_in_parts(sample, 7, 3, frames)
    assert images[:, 0, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 3]
    assert [n for n, _ in calls] == [3, 3, 1]
    assert calls[0][1] is frames and calls[1][1] is calls[2][1] is None
