"""`train` of 02: averages, learning rate, randomness, saving and resuming, and what it refuses."""

import io
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EACH_STEP, assert_learned_the_same, load

from utils import visualize

script = load("02_ddpm.py")
COUNT = 40  # images; an epoch has 5 steps
SETTINGS = {"T": 50, "EPOCHS": 4, "BATCH_SIZE": 8, "LEARNING_RATE": 0.02, "EMA_DECAY": 0.9999}
SETTINGS |= {"SEED": 0, "SAVE_EVERY": 1}  # minute; a step takes 25 seconds


def simple_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


def diffusion(precision=torch.float32):
    torch.manual_seed(0)
    model = script.UNet((1, 8, 8), 8, (1,), 1, (), 0.1, precision)
    return script.DDPM(model, script.cosine_beta_schedule(50), (1, 8, 8), "cpu")


def all_weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that calls `train`, by a clock of its own, run.clock, in seconds.

    Without ddpm, a simple network learns from random numbers and the indices of the images.
    see: called with each step's number in this call, its loss and the model; may return another
    loss. stop_at: the step in which someone presses Ctrl-C.
    """
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(script, "now", lambda: run.clock)

    def run(see=None, ddpm=None, stop_at=0, fixed=("T",), preview=None, extras=(), **settings):
        model, batches = ddpm.model if ddpm else simple_network(), []

        def step(index):
            run.clock += 25
            batches.append(index)
            if len(batches) == stop_at:
                raise KeyboardInterrupt
            white = torch.ones(len(index), 1, 8, 8)  # easy to learn
            x = torch.randn(len(index), 3) + index[:, None] / COUNT
            loss = ddpm.loss(white) if ddpm else model(x).square().mean()
            other = see and see(len(batches), loss, model)
            return loss if other is None else other

        settings = {**SETTINGS, **settings}
        done = script.train(model, step, COUNT, settings, fixed, path, preview, **dict(extras))
        return SimpleNamespace(model=model, averaged=done[0], losses=done[1], batches=batches)

    run.clock, run.path = 1000.0, path
    run.state = lambda: torch.load(path, weights_only=True)
    return run


# %% The average, the learning rate, the optimizers


def test_average_is_the_mean_of_the_recent_weights(run):
    """Against the definition: a weighted mean of all weights so far, the weights adding to 1."""
    weights = []
    done = run(lambda _, loss, model: weights.append(all_weights(model)), EPOCHS=10, EMA_DECAY=0.8)
    weights.append(all_weights(done.model))
    shares = torch.eye(51)[0]
    for step in range(1, 51):
        decay = min(0.8, (1 + step) / (10 + step))  # EMA_DECAY takes over at step 35
        shares *= decay
        shares[step] = 1 - decay
    expected = sum(s * w for s, w in zip(shares, weights, strict=True))
    assert torch.allclose(all_weights(done.averaged), expected, atol=1e-6)
    assert not any(weight.requires_grad for weight in done.averaged.parameters())
    assert not done.averaged.training


def test_each_weight_has_one_optimizer_and_the_rate_rises_then_falls_to_zero(run, monkeypatch):
    """Muon is for matrices inside the network, Adam for vectors and both ends."""
    groups = {script.Muon: [], torch.optim.Adam: []}
    for optimizer, seen in groups.items():
        monkeypatch.setattr(optimizer, "step", lambda o, s=seen: s.append({**o.param_groups[0]}))
    ddpm = diffusion()
    ddpm.loss, model = lambda x_0: ddpm.model.conv_in.bias.sum(), ddpm.model
    run(ddpm=ddpm, EPOCHS=40)
    muon, adam = (seen[0]["params"] for seen in groups.values())
    assert sorted(map(id, muon + adam)) == sorted(map(id, model.parameters()))
    assert all(w.ndim > 1 for w in muon)
    assert {w for w in adam if w.ndim > 1} == {model.conv_in.weight, model.conv_out.weight}
    rates, of_adam = ([group["lr"] for group in seen] for seen in groups.values())
    assert len(rates) == 200 and of_adam == pytest.approx([rate / 5 for rate in rates])
    assert rates[0] == pytest.approx(0.02 / 10) and rates[4] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.02, rel=0.02) and 8 <= rates.index(max(rates)) <= 10
    assert rates[100] == pytest.approx(0.01) and 0 < rates[-1] < 5e-6
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_gradients_are_clipped(run):
    """A loss scaled by 10,000 gives gradients of norm 1, which the averages hold a share of."""
    run(lambda _, loss, model: 1e4 * loss, EPOCHS=0.2)
    adam, muon = (run.state()[name]["state"].values() for name in ("adam", "muon"))
    gradients = [s["exp_avg"] / 0.1 for s in adam] + [s["average"] / 0.05 for s in muon]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert len(gradients) == 6 and norm == pytest.approx(1.0, rel=1e-3)


def test_float16_leaves_all_weights_alone_if_a_gradient_is_infinite(run):
    weights, scales = [], []

    def see(step, loss, model):
        weights.append(all_weights(model))
        if step == 3:  # only a gradient of Adam's becomes infinite; Muon has momentum
            loss = loss + 1e36 * model.conv_in.weight.sum()
        loss.register_hook(lambda gradient: scales.append(gradient.item()))  # what multiplies it
        return loss

    weights.append(all_weights(run(see, diffusion(torch.float16), EPOCHS=1).model))
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [True, True, False, True, True] and weights[-1].isfinite().all()
    assert scales == [scales[0]] * 3 + [scales[0] / 2] * 2


# %% Randomness


def test_every_step_draws_its_images_from_all(run):
    counts = torch.bincount(torch.cat(run(EPOCHS=20).batches), minlength=COUNT)
    assert len(counts) == COUNT and counts.min() > 4 and counts.max() < 45 and counts.sum() == 800


def test_a_step_is_random_by_its_number_the_seed_and_the_process_only(run, monkeypatch):
    """Processes share a batch; the first one saves and shows previews."""

    def batches(rank=0, world=1, waste=0, **settings):
        monkeypatch.setattr(script, "join_processes", lambda: (rank, world))
        run.path.unlink(missing_ok=True)
        settings, shown = {"EPOCHS": 1, "SAVE_EVERY": EACH_STEP, **settings}, []
        done = run(lambda *_: torch.manual_seed(waste) and None, preview=shown.append, **settings)
        assert run.path.exists() == bool(shown) == (rank == 0)
        return done.batches

    plain = batches()
    for same in batches(waste=1), batches(T=60, LEARNING_RATE=0.5), batches(BATCH_SIZE=20):
        assert all(torch.equal(a, b[:8]) for a, b in zip(plain, same))
    for other in plain[1:], batches(rank=1), batches(SEED=1):
        assert not any(torch.equal(a, b) for a, b in zip(plain, other))
    assert all(len(index) == 3 for index in batches(rank=2, world=3)), "8 / 3, up"


# %% Saving and resuming


def test_saves_and_previews_come_by_the_clock(run, monkeypatch):
    """SAVE_EVERY is in minutes; the end is saved always, and has no preview."""
    saves, previews, save = [], [], script.save

    def preview(step):
        assert run.state()["seen"] == 8 * step, "the preview shows the weights of its step"
        previews.append(step)
        run.clock += 90  # a preview takes its time: the next one comes 2.5 minutes after it

    monkeypatch.setattr(script, "save", lambda s, p: saves.append(s["seen"] // 8) or save(s, p))
    for every, expected in (2.5, [7, 14]), (EACH_STEP, [*range(1, 20)]), (1000, []):
        run(preview=preview, SAVE_EVERY=every)  # 7 · 25 s > 150 s
        assert previews == expected and saves == [*expected, 20]
        run.path.unlink()
        previews.clear(), saves.clear()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_it_learns_in_every_precision_and_resumes_exactly(run, capsys, precision):
    """Also where it ends between two checkpoints, and with previews in one run only."""
    one = run(ddpm=diffusion(precision), EPOCHS=6)
    assert len(one.losses) == 30 and sum(one.losses[-10:]) < 0.7 * sum(one.losses[:10])
    whole = run.state()
    run.path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(None, diffusion(precision), 17, preview=torch.randn, EPOCHS=6)
    state = run.state()
    assert state["seen"] == 15 * 8 and state["losses"] == one.losses[:15]
    assert capsys.readouterr().out == ""
    two = run(ddpm=diffusion(precision), EPOCHS=6)
    assert capsys.readouterr().out == f"Resuming from {run.path}, after 120 of 240 images.\n"
    assert len(two.batches) == 15
    if precision == torch.float16:  # the scaler begins anew, and may round otherwise
        assert two.losses == pytest.approx(one.losses, rel=0.02)
    else:
        assert_learned_the_same(run.state(), whole)


@pytest.mark.parametrize("epochs, size, steps", [(0.01, 500, 1), (0.5, 8, 3), (2.5, 8, 13)])
def test_epochs_may_be_a_fraction_and_a_batch_more_than_all(run, epochs, size, steps):
    done = run(EPOCHS=epochs, BATCH_SIZE=size)
    assert len(done.losses) == len(done.batches) == steps
    assert all(len(index) == size for index in done.batches)
    assert run.state()["seen"] == math.ceil(epochs * COUNT)


def test_more_epochs_train_on_and_the_learning_rate_may_change(run):
    first = run(EPOCHS=2)
    second = run(EPOCHS=3, LEARNING_RATE=0.01, SAVE_EVERY=7, EMA_DECAY=0.5)
    assert len(second.batches) == 5 and second.losses[:10] == first.losses
    state, before = run.state(), run.path.read_bytes()
    assert state["settings"]["LEARNING_RATE"] == 0.01 and state["losses"] == second.losses
    assert state["muon"]["param_groups"][0]["lr"] < 0.001, "of the new run"
    third = run(EPOCHS=1)
    assert third.batches == [] and third.losses == second.losses, "nothing is left to do"
    assert torch.equal(all_weights(third.averaged), all_weights(second.averaged))
    assert run.path.read_bytes() == before


@pytest.mark.parametrize("size", [3, 7, 16, 1000])
def test_another_batch_size_goes_on_at_the_same_number_of_images(run, size):
    """Also where it does not divide the number of images: what was finished stays finished."""
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=11, SAVE_EVERY=EACH_STEP)
    assert run.state()["seen"] == 80
    done = run(BATCH_SIZE=size)
    assert len(done.batches) == math.ceil(80 / size) == len(done.losses) - 10
    assert all(len(index) == size for index in done.batches)
    assert run.state()["seen"] == 160 and run().batches == []


def test_extras_are_kept_and_come_back(run):
    kept, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    kept(torch.randn(5, 2))  # its buffers, too, are now no others'
    run(extras={"vae": kept})
    run(extras={"vae": other})
    assert torch.equal(other.running_mean, kept.running_mean) and other.running_mean.any()


def test_what_does_not_match_is_refused_and_the_file_is_left_alone(run):
    run(EPOCHS=1)
    whole, hint = run.path.read_bytes(), "delete the file or set another OUT_DIR."
    changed = "ValueError: T was 50 and now is 60"
    for content, reason in (whole, changed), (b"", ".+Error:.*"), (b"hello", ".+Error:.+"):
        run.path.write_bytes(content)
        with pytest.raises(SystemExit) as end:
            run(T=60, EPOCHS=2)
        expected = rf"Cannot resume from (.+) \({reason}\)\. To start from scratch, {hint}"
        assert re.fullmatch(expected, end.value.code)[1] == str(run.path)
        assert os.listdir(run.path.parent) == ["checkpoint.pt"]
        assert run.path.read_bytes() == content
    run.path.write_bytes(whole)
    assert len(run(T=60, fixed=("SEED",), EPOCHS=2).batches) == 5, "only what is fixed"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "weight"])
def test_what_is_no_number_ends_the_program_before_it_reaches_the_file(run, where, bad):
    """A loss also where all weights are numbers, and a weight where all losses are."""

    def see(step, loss, model):
        if step == 9 and where == "weight":  # saved right after this step
            with torch.no_grad():
                model[0].bias[0] = bad
        return loss + bad if step == 8 and where == "loss" else loss

    with pytest.raises(SystemExit, match=r"NaN or infinite by step 9\..*LEARNING_RATE"):
        run(see)
    state = run.state()
    assert state["seen"] == 6 * 8 and all(w.isfinite().all() for w in state["model"].values())
    assert len(run().losses) == 20, "and one can resume from there"


class FullDisk(io.FileIO):
    def write(self, data):
        return no_space() if self.tell() + len(data) > 10_000 else super().write(data)


def no_space(*_):
    raise OSError("no space left")


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path, weights = tmp_path / "checkpoint.pt", torch.zeros(10_000)
    script.save({"a": 1}, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        write = Path, "open", lambda *file: io.BufferedWriter(FullDisk(*file))
        patch.setattr(*(write if failing == "write" else (os, failing, no_space)))
        with pytest.raises((OSError, RuntimeError)):  # the latter is PyTorch's
            script.save({"a": weights}, path)
    assert path.read_bytes() == before
    script.save({"a": weights}, path)  # what the failed one has left does not matter
    assert torch.equal(torch.load(path, weights_only=True)["a"], weights)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_all_is_on_the_disk_before_the_old_file_is_replaced(tmp_path, monkeypatch):
    path, synced, whole = tmp_path / "checkpoint.pt", [], []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda partial, _: whole.append(partial.read_bytes()))
    script.save({"a": torch.zeros(1000)}, path)
    assert synced == [len(whole[0])] and not path.exists()
    assert len(torch.load(io.BytesIO(whole[0]), weights_only=True)["a"]) == 1000


# %% What the training and its figures use


def test_flip_mirrors_about_half_of_the_images():
    images = torch.zeros(1000, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255  # bright on the left
    assert torch.equal(script.to_batch(images)[..., 0], torch.ones(1000, 3, 4))
    flipped = script.to_batch(images, flip=True)
    right = flipped[:, 0, 0, 3] == 1
    assert 400 < right.sum() < 600
    assert (flipped[right][..., 0] == -1).all() and (flipped[~right][..., 0] == 1).all()


def test_the_figure_of_losses_shows_the_loss_at_each_timestep(tmp_path, monkeypatch):
    """By the network's own loss, with its t and its noise held fixed."""
    ddpm, images = diffusion(), torch.rand(64, 1, 8, 8) * 2 - 1
    torch.nn.init.normal_(ddpm.model.eval().conv_out.weight, std=0.1)
    monkeypatch.setattr(visualize, "_save", lambda fig, path: fig)
    visits = torch.arange(50)
    lines = visualize.timestep_losses(ddpm, images, visits, tmp_path, count=5).axes[0].lines
    timesteps, errors = lines[0].get_data()
    assert [*timesteps] == [5, 15, 25, 35, 45]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    for timestep, error in zip(timesteps, errors):
        monkeypatch.setattr(
            script, "random_timesteps", lambda n, *_, t=timestep: torch.full((n,), t)
        )
        assert error == pytest.approx(ddpm.loss(images).item(), rel=1e-3)


def test_the_figure_of_losses_shows_which_t_training_visits(tmp_path, monkeypatch):
    ddpm = diffusion()
    monkeypatch.setattr(visualize, "_save", lambda fig, path: fig)
    monkeypatch.setattr(ddpm, "predict_noise", lambda x_t, t: torch.zeros_like(x_t))
    x_0, visits = torch.zeros(2, 1, 8, 8), script.random_timesteps(10**6, 50, "cpu")
    right = visualize.timestep_losses(ddpm, x_0, visits, tmp_path, count=5).axes[1]
    shares = {line.get_label(): line.get_ydata() for line in right.lines}
    assert shares["uniform t: visits"] == pytest.approx([20] * 5)
    assert shares["02: visits"] == pytest.approx([4, 12, 20, 28, 36], abs=0.5)
    assert shares["02: loss"] == pytest.approx(shares["02: visits"], rel=0.1), "an equal loss"


@pytest.mark.parametrize("T", [2, 3, 1000])
def test_large_t_come_more_often_and_each_batch_covers_them_all(T):
    """T · √u has the density 2t / T²; each n-th of a batch's t comes from an n-th of u."""
    t = torch.stack([script.random_timesteps(64, T, "cpu") for _ in range(2000)])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == T - 1
    for edge in {1, T // 2, T - 1}:
        share = (t < edge).double().mean().item()
        assert share == pytest.approx((edge / T) ** 2, abs=0.003), f"P(T · √u < {edge})"
    low, high = 64 * (t / T) ** 2, 64 * ((t + 1) / T) ** 2  # 64 · u was between these
    number = torch.arange(64)
    assert (high > number - 1e-3).all() and (low < number + 1 + 1e-3).all()


def test_the_largest_random_number_leads_to_the_last_t(monkeypatch):
    """Rounded, 64 times u may become 64."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert script.random_timesteps(64, 50, "cpu").max() == 49


def test_muon_is_jordans_for_each_matrix_by_itself():
    """In float64, matrix by matrix, by the polynomial on singular values; equal shapes too."""
    torch.manual_seed(0)
    shapes = (6, 4), (6, 4), (4, 2, 3, 3), (4, 18), (5, 5)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [weight.detach().double().clone() for weight in weights]
    averages = [torch.zeros_like(weight) for weight in expected]
    muon = script.Muon(weights, lr=0.1)
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(shapes[i])
            grad = weight.grad.double()
            averages[i] = 0.95 * averages[i] + 0.05 * grad
            nesterov = (0.05 * grad + 0.95 * averages[i]).flatten(1)
            u, sigma, v = torch.linalg.svd(nesterov, full_matrices=False)
            sigma = sigma / nesterov.norm()
            for _ in range(5):
                sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
            assert (sigma < 1.3).all()
            rows, columns = nesterov.shape
            step = 0.1 * max(1, rows / columns) ** 0.5 * u @ torch.diag(sigma) @ v
            expected[i] -= step.view_as(expected[i])
        muon.step()
    for weight, ours in zip(expected, weights):
        assert torch.allclose(weight.float(), ours, atol=1e-4)
