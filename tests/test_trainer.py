"""The Trainer of 02: averaging, learning rate, randomness, resuming, and what it refuses."""

import math
import os

import pytest
import torch
from conftest import load

script = load("02_ddpm.py")
CPU = torch.device("cpu")
SETTINGS = {
    "EPOCHS": 4,
    "BATCH_SIZE": 8,
    "LEARNING_RATE": 0.02,
    "EMA_DECAY": 0.9999,
    "SEED": 0,
}


def make_trainer(images=None, precision=torch.float32, dropout=0.1, **settings):
    torch.manual_seed(0)
    betas = script.cosine_beta_schedule(50)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()
    model = script.UNet((1, 8, 8), 8, (1, 2), 1, (4,), dropout, alphas_cumprod, precision)
    images = (torch.rand(40, 1, 8, 8) * 255).byte() if images is None else images
    ddpm = script.DDPM(model, betas, images.shape[1:], CPU)
    settings = {**SETTINGS, **settings}
    return script.Trainer(
        model, lambda i: ddpm.loss(script.to_batch(images[i])), len(images), settings
    )


def some_loss(trainer):
    return sum(weight.sum() for weight in trainer.model.parameters())


def test_average_is_the_mean_of_the_recent_weights():
    """Against the definition: a weighted mean of all weights so far, the weights adding to 1."""
    trainer = make_trainer(EPOCHS=12)
    weights = [trainer.model.conv_in.weight.detach().clone()]
    for _ in range(50):
        trainer.train_step(torch.randint(40, (8,)))
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


def test_average_reaches_no_further_than_ema_decay_says():
    trainer = make_trainer(EMA_DECAY=0.5)
    before = trainer.averaged.conv_in.weight.clone()
    trainer.step = 1000
    trainer.total_steps = 2000
    trainer.train_step(torch.arange(8))
    expected = (before + trainer.model.conv_in.weight) / 2
    assert torch.allclose(trainer.averaged.conv_in.weight, expected, atol=1e-7)


def test_learning_rate_rises_then_falls_to_zero():
    trainer = make_trainer(EPOCHS=200)  # 1000 steps
    rates = []
    while trainer.step < trainer.total_steps:
        rates.append(trainer.learning_rate())
        trainer.step += 1
    assert rates[0] == pytest.approx(0.02 / 50) and rates[24] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.02, rel=0.01) and 45 <= rates.index(max(rates)) <= 50
    assert rates[500] == pytest.approx(0.01) and rates[-1] < 1e-6
    assert sorted(rates[50:], reverse=True) == rates[50:]


def test_every_epoch_shows_each_image_once_in_another_order():
    seen = []
    trainer = make_trainer(EPOCHS=3)
    trainer.loss = lambda index: seen.append(index) or some_loss(trainer)
    for _ in range(3):
        trainer.train_epoch()
    epochs = [torch.cat(seen[i : i + 5]) for i in (0, 5, 10)]
    assert len(seen) == 15
    for order in epochs:
        assert sorted(order.tolist()) == list(range(40))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_processes_divide_every_batch_among_them():
    seen = {}
    for rank in (0, 1):
        trainer = make_trainer()
        trainer.rank, trainer.world = rank, 2
        trainer.train_step = lambda index, rank=rank: seen.setdefault(rank, []).append(index)
        with pytest.raises(TypeError):  # the losses, which this train_step does not give
            trainer.train_epoch()
    for first, second in zip(seen[0], seen[1]):
        assert len(first) == len(second) == 4
        assert not set(first.tolist()) & set(second.tolist())


def test_step_noise_depends_on_step_seed_and_process_only():
    def noise(step, seed=0, rank=0):
        trainer = make_trainer(SEED=seed)
        trainer.step, trainer.rank = step, rank
        drawn = []
        trainer.loss = lambda index: drawn.append(torch.randn(4)) or some_loss(trainer)
        torch.randn(step)  # whatever went before
        trainer.train_step(torch.arange(8))
        return drawn[0]

    assert torch.equal(noise(3), noise(3))
    different = [noise(3), noise(4), noise(3, seed=1), noise(3, rank=1)]
    assert len({tuple(d.tolist()) for d in different}) == 4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_it_learns_in_every_precision_and_resumes_exactly(tmp_path, precision):
    path = tmp_path / "checkpoint.pt"
    images = (torch.rand(2, 1, 8, 8) > 0.5).byte().repeat(20, 1, 1, 1) * 255
    one, two = (make_trainer(images, precision, EPOCHS=20) for _ in range(2))
    assert one.scaler.is_enabled() == (precision == torch.float16)
    for _ in one.run(path):
        pass
    assert sum(one.losses[-10:]) < 0.6 * sum(one.losses[:10])
    path.unlink()
    for epoch in two.run(path):
        if epoch == 3:
            break
    resumed = make_trainer(images, precision, EPOCHS=20)
    resumed.resume(path)
    assert resumed.step == 15 and len(resumed.losses) == 15
    for _ in resumed.run(path):
        torch.randn(3)  # what happens between epochs takes no part
    assert resumed.losses == one.losses
    for name in ("model", "averaged"):
        for a, b in zip(getattr(one, name).parameters(), getattr(resumed, name).parameters()):
            assert torch.equal(a, b)


def test_a_checkpoint_that_another_run_has_written_is_not_overwritten(tmp_path):
    path = tmp_path / "checkpoint.pt"
    one, other = make_trainer(EPOCHS=3), make_trainer(EPOCHS=3)
    epochs = other.run(path)
    for _ in one.run(path):
        pass
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"Another run has written .*checkpoint\.pt"):
        next(epochs)
    assert path.read_bytes() == before
    resumed = make_trainer(EPOCHS=3)
    resumed.resume(path)
    resumed.save(path)  # this one knows it, and may


def test_nothing_to_resume_is_no_error(tmp_path):
    trainer = make_trainer()
    trainer.resume(tmp_path / "checkpoint.pt")
    assert trainer.step == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_program_before_anything_is_saved(tmp_path, bad):
    trainer = make_trainer()
    good = trainer.loss
    trainer.loss = lambda index: good(index) * (bad if trainer.step == 7 else 1)
    path = tmp_path / "checkpoint.pt"
    epochs = []
    with pytest.raises(SystemExit, match=r"NaN or infinite before step 10.*LEARNING_RATE = 0\.02"):
        for epoch in trainer.run(path):
            epochs.append(epoch)
    assert epochs == [1]
    state = torch.load(path, weights_only=True)
    assert state["step"] == 5 and all(torch.isfinite(w).all() for w in state["model"].values())


def test_weights_that_are_no_numbers_are_noticed_even_if_the_loss_is_finite():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.conv_in.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(SystemExit, match="NaN or infinite"):
        trainer.checked_mean([torch.tensor(1.0)])


def test_gradients_are_clipped():
    """A loss scaled by 10,000 gives gradients of norm 1, which the averages hold a share of."""
    trainer = make_trainer()
    good = trainer.loss
    trainer.loss = lambda index: 1e4 * good(index)
    trainer.train_step(torch.arange(8))
    gradients = [s["exp_avg"] / 0.1 for s in trainer.adamw.state.values()]
    gradients += [s["average"] / 0.05 for s in trainer.muon.state.values()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm == pytest.approx(1.0, rel=1e-3)


def test_each_weight_has_one_optimizer():
    """Muon for matrices inside the network, AdamW for vectors and both ends."""
    trainer = make_trainer()
    muon = trainer.muon.param_groups[0]["params"]
    adamw = trainer.adamw.param_groups[0]["params"]
    assert sorted(map(id, [*muon, *adamw])) == sorted(map(id, trainer.model.parameters()))
    assert all(w.ndim > 1 for w in muon)
    ends = {trainer.model.conv_in.weight, trainer.model.conv_out.weight}
    assert {w for w in adamw if w.ndim > 1} == ends


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    script.save_atomically({"a": 1}, path)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)  # when all is written, but not yet on the disk
    with pytest.raises(OSError, match="no space left"):
        script.save_atomically({"a": 2}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_flip_mirrors_about_half_of_the_images():
    images = torch.zeros(1000, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255  # bright on the left
    assert torch.equal(script.to_batch(images)[..., 0], torch.ones(1000, 3, 4))
    flipped = script.to_batch(images, flip=True)
    right = flipped[:, 0, 0, 3] == 1
    assert 400 < right.sum() < 600
    assert (flipped[right][..., 0] == -1).all() and (flipped[~right][..., 0] == 1).all()


def test_loss_per_timestep_is_the_error_at_each_timestep():
    """A network that answers 0 is wrong by the noise itself, at every t, in the mean by 1."""

    class Zero(torch.nn.Module):
        def forward(self, x_t, t):
            return torch.zeros_like(x_t)

    ddpm = script.DDPM(Zero(), script.cosine_beta_schedule(50), (1, 8, 8), CPU)
    timesteps, errors = script.loss_per_timestep(ddpm, torch.zeros(64, 1, 8, 8), count=10)
    assert timesteps[0] == 0 and timesteps[-1] == 48 and len(timesteps) == len(errors) == 10
    assert all(e == pytest.approx(1, abs=0.1) for e in errors)
    ddpm.model.forward = lambda x_t, t: x_t / (1 - ddpm.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    assert max(script.loss_per_timestep(ddpm, torch.zeros(64, 1, 8, 8))[1]) < 1e-6
