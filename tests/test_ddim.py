"""04's samplers: against diffusers, against closed forms, and against DDPM's own."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import load
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import nn

script = load("04_ddim_fast_sampling.py")
CPU = torch.device("cpu")


class Network(nn.Module):
    """A "network" that answers with ε, a function of (x_t, t, ᾱ_t), and counts its calls."""

    def __init__(self, function, alphas_cumprod):
        super().__init__()
        self.function, self.alphas_cumprod, self.calls = function, alphas_cumprod, []

    def forward(self, x_t, t):
        assert (t == t[0]).all() and t.dtype == torch.int64 and len(t) == len(x_t)
        self.calls.append(t[0].item())
        alpha_bar_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return self.function(x_t.double(), t, alpha_bar_t).to(x_t.dtype)


MEAN, STD = 0.1, 0.2  # of the Gaussian "images" whose noise the oracle knows exactly


def oracle(x_t, t, alpha_bar_t):
    """E[ε | x_t] for independent pixels from N(MEAN, STD²)."""
    variance = alpha_bar_t * STD**2 + 1 - alpha_bar_t
    return (1 - alpha_bar_t).sqrt() * (x_t - alpha_bar_t.sqrt() * MEAN) / variance


def wild(x_t, t, alpha_bar_t):
    """An answer that depends on everything and drives x̂_0 far out of range."""
    return 1.3 * torch.sin(3 * x_t + t.view(-1, 1, 1, 1) / 100) + 0.2 * x_t


def gentle(x_t, t, alpha_bar_t):
    """An answer that keeps x̂_0 = 0.5 · sin(...) within the range, so that no clamp acts."""
    x_0 = 0.5 * torch.sin(3 * x_t + t.view(-1, 1, 1, 1) / 100)
    return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()


def make(function, T=1000, schedule=None, shape=(1, 4, 4)):
    betas = (schedule or script.cosine_beta_schedule)(T)
    network = Network(function, torch.cumprod(1 - betas, dim=0))
    return script.DDIM(network, betas, shape, CPU), betas


def exact(ddim, x_T):
    """Where the differential equation takes x_T (float64) if the data are N(MEAN, STD²)."""
    alpha_bar = ddim.alpha_bars[ddim.T - 1]
    spread = math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + STD * (x_T - math.sqrt(alpha_bar) * MEAN) / spread


# %% Timesteps


def test_fifty_of_a_thousand_are_those_of_the_docstring():
    ddim, _ = make(oracle)
    assert ddim.timesteps(50, "even") == [*range(999, 0, -20), -1]
    early = ddim.timesteps(50, "early")
    assert early[:3] == [999, 998, 995] and early[-3:] == [75, 38, -1] and len(early) == 51


@pytest.mark.parametrize("steps", [10, 50, 300, 999, 1000])
def test_timesteps_are_those_of_diffusers(steps):
    ddim, _ = make(oracle)
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert ddim.timesteps(steps, "even")[:-1] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("spacing", ["even", "early", "late"])
def test_any_number_of_steps_falls_strictly_from_the_last_to_the_clean_image(T, spacing):
    ddim, _ = make(oracle, T, script.linear_beta_schedule)
    for steps in range(1, T + 1):
        timesteps = ddim.timesteps(steps, spacing)
        assert len(timesteps) == steps + 1 and timesteps[0] == T - 1 and timesteps[-1] == -1
        gaps = [a - b for a, b in itertools.pairwise(timesteps)]
        gaps = gaps[::-1] if spacing == "late" else gaps
        assert min(gaps) >= 1, "no step twice"
        # The lengths are equal or grow, up to rounding.
        assert all(b - a >= -1 for a, b in itertools.pairwise(gaps))
        assert max(gaps) - min(gaps) <= 1 if spacing == "even" else gaps[-1] >= gaps[0]
    assert ddim.timesteps(T, spacing) == [*range(T - 1, -2, -1)]


def test_early_and_late_spacing_are_mirror_images_with_short_steps_at_one_end():
    ddim, _ = make(oracle)
    late, early = (ddim.timesteps(10, spacing) for spacing in ("late", "early"))
    assert late == [i + round(990 * (i / 10) ** 2) - 1 for i in range(10, -1, -1)]
    assert early == [998 - t for t in reversed(late)]
    assert early[:3] == [999, 988, 957] and late[-3:] == [41, 10, -1]
    with pytest.raises(KeyError):
        ddim.timesteps(10, "odd")
    ddim.ddim_sample(2, 10, spacing="late")
    assert ddim.model.calls == late[:-1]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "50", None])
def test_bad_numbers_of_steps(steps):
    ddim, _ = make(oracle)
    for call in (
        lambda: ddim.ddim_sample(2, steps),
        lambda: ddim.ddim_invert(torch.zeros(2, 1, 4, 4), steps),
        lambda: ddim.dpm_solver_sample(2, steps),
    ):
        with pytest.raises(ValueError, match="a whole number, 1 to T = 1000"):
            call()
    assert ddim.model.calls == []


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), 2])
def test_bad_eta(eta):
    ddim, _ = make(oracle)
    with pytest.raises(ValueError, match="eta = "):
        ddim.ddim_sample(2, 10, eta)
    assert ddim.model.calls == []


def test_numbers_of_numpy():
    ddim, _ = make(oracle)
    images = []
    for steps, eta in (10, 1.0), (np.int64(10), np.float32(1)), (np.int32(10), np.int64(1)):
        torch.manual_seed(0)
        images.append(ddim.ddim_sample(2, steps, eta))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    ddim.ddim_invert(torch.zeros(2, 1, 4, 4), np.int64(7))
    ddim.dpm_solver_sample(2, np.int64(7))
    assert len(ddim.model.calls) == 30 + 7 + 7
    ddim.ddim_sample(2, 1000, np.float32(1))  # no root of a number just below zero


# %% Against diffusers


@pytest.mark.parametrize("function", [wild, gentle])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_that_of_diffusers(function, schedule, eta):
    """Where the number of steps divides T; elsewhere diffusers steps back by T // steps."""
    schedule = getattr(script, f"{schedule}_beta_schedule")
    ddim, betas = make(function, schedule=schedule)
    scheduler = DDIMScheduler(
        trained_betas=betas.numpy(), timestep_spacing="trailing", clip_sample=True
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # theirs has float32's digits
    for steps in 1, 10, 50, 1000:
        scheduler.set_timesteps(steps)
        timesteps = ddim.timesteps(steps, "even")
        for i in sorted({0, 1 % steps, steps // 2, steps - 1}):
            t, t_prev = timesteps[i], timesteps[i + 1]
            x_t = torch.randn(3, 1, 4, 4, dtype=torch.float64)
            torch.manual_seed(7)
            ours, _ = ddim.ddim_step(x_t, t, t_prev, eta)
            torch.manual_seed(7)
            noise = torch.randn_like(x_t)
            answer = ddim.model(x_t, torch.full((3,), t))
            theirs = scheduler.step(
                *(answer, t, x_t, eta), use_clipped_model_output=True, variance_noise=noise
            )
            assert torch.allclose(ours, theirs.prev_sample, rtol=0, atol=1e-9), (steps, t)


@pytest.mark.parametrize("steps", [2, 5, 15, 30])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_dpm_solver_is_that_of_diffusers(schedule, steps):
    ddim, betas = make(gentle, schedule=getattr(script, f"{schedule}_beta_schedule"))
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas.numpy(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    x_T = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    ours = ddim.dpm_solver_sample(3, steps, x_T)
    scheduler.set_timesteps(timesteps=list(ddim.model.calls))  # they may be chosen freely
    assert scheduler.timesteps.tolist() == ddim.model.calls
    # Their √(1−ᾱ) / √ᾱ has float32's digits, and the cosine schedule's first step divides by 5e-5.
    sigmas = [math.sqrt(1 / ddim.alpha_bars[t] - 1) for t in [*ddim.model.calls, -1]]
    assert torch.allclose(scheduler.sigmas, torch.tensor(sigmas), rtol=1e-4)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    assert len(ddim.model.calls) == steps and ddim.model.calls[0] == 999
    x_t = x_T
    for t in scheduler.timesteps:
        answer = ddim.model(x_t, torch.full((3,), t.item()))
        x_t = scheduler.step(answer, t, x_t).prev_sample
    assert torch.allclose(ours, x_t, rtol=0, atol=1e-5), "theirs rounds x_t to float32"


# %% Against DDPM


@pytest.mark.parametrize("function", [wild, oracle])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_eta_1_over_all_steps_is_ddpm(function, schedule):
    """The means agree as functions of x_t, the spreads as numbers, and whole samples with them."""
    ddim, betas = make(function, T=200, schedule=getattr(script, f"{schedule}_beta_schedule"))
    ddpm = script.DDPM(ddim.model, betas, ddim.image_shape, CPU)
    for t in 199, 198, 100, 1, 0:
        x_t = torch.randn(4, 1, 4, 4)
        torch.manual_seed(3)
        ours, x_0_pred = ddim.ddim_step(x_t, t, t - 1, eta=1.0)
        torch.manual_seed(3)
        theirs, their_x_0_pred = ddpm.p_sample(x_t, t)
        assert torch.equal(x_0_pred, their_x_0_pred)
        assert x_0_pred.abs().max() == 1 or function is oracle, "the clamp acts"
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), t
    if function is oracle:  # the wild answer magnifies the last digits from step to step
        torch.manual_seed(5)
        ours = ddim.ddim_sample(8, 200, eta=1.0)
        torch.manual_seed(5)
        assert torch.allclose(ours, ddpm.sample(8), rtol=0, atol=1e-5)


def test_sigma_is_ddpms_posterior_deviation_in_double_precision(monkeypatch):
    ddim, betas = make(gentle)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    x_t = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for t in 1, 10, 500, 998, 999:
        before = alphas_cumprod[t - 1]
        wanted = ((1 - before) / (1 - alphas_cumprod[t]) * betas[t]).sqrt().item()
        x_prev = []
        for fill in torch.zeros_like, torch.ones_like:
            monkeypatch.setattr(torch, "randn_like", fill)
            x_prev.append(ddim.ddim_step(x_t, t, t - 1, eta=1.0)[0])
        assert (x_prev[1] - x_prev[0]).mean().item() == pytest.approx(wanted, rel=1e-9)


# %% Against the closed form


def errors(sample, ddim, counts, x_T):
    wanted = exact(ddim, x_T)
    return {steps: (sample(steps) - wanted).abs().max().item() for steps in counts}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddim_error_falls_like_one_over_steps(schedule):
    ddim, _ = make(oracle, schedule=getattr(script, f"{schedule}_beta_schedule"))
    x_T = torch.randn(6, 1, 4, 4, dtype=torch.float64)

    def sample(steps):
        return ddim.ddim_sample(6, steps, 0.0, x_T, spacing="even")

    error = errors(sample, ddim, (5, 20, 100, 300, 999, 1000), x_T)
    assert error[5] > 2 * error[20] and error[20] > 3.5 * error[100] and error[100] < 0.05
    # Also where the count does not divide T: no step too short or too long, no jump.
    assert error[300] < 0.45 * error[100] and error[999] < 0.45 * error[300]
    assert error[999] == pytest.approx(error[1000], rel=0.05)


def test_dpm_solver_error_falls_faster():
    ddim, _ = make(oracle)
    x_T = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    counts = 10, 20, 40, 80

    def ddim_sample(steps):
        return ddim.ddim_sample(6, steps, 0.0, x_T, spacing="even")

    first = errors(ddim_sample, ddim, counts, x_T)
    second = errors(lambda s: ddim.dpm_solver_sample(6, s, x_T, "even"), ddim, counts, x_T)
    assert all(second[s] < first[s] for s in counts)
    assert second[80] < 0.1 * second[20], "second order: a quarter for twice the steps"


def test_no_film_of_noise_is_left():
    """The last step ends at x̂_0 itself, for every sampler and every eta."""

    def zero_image(x_t, t, alpha_bar_t):
        return x_t / (1 - alpha_bar_t).sqrt()  # says: the image is 0, all is noise

    ddim, _ = make(zero_image)
    for images in (
        ddim.ddim_sample(4, 7, eta=0.0),
        ddim.ddim_sample(4, 7, eta=1.0),
        ddim.ddim_sample(4, 1),
        ddim.dpm_solver_sample(4, 7),
        ddim.dpm_solver_sample(4, 1),
    ):
        assert images.abs().max() < 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_right_noise_gives_back_the_image(schedule):
    """A network that answers with the noise that was mixed in: also by DDPM's own predict."""
    x_0, noise = torch.randn(2, 8, 1, 4, 4, dtype=torch.float64)
    x_0 = x_0.clamp(-1, 1)
    ddim, betas = make(lambda *_: noise, schedule=getattr(script, f"{schedule}_beta_schedule"))
    for t in 0, 10, 700, 998, 999:
        a = torch.cumprod(1 - betas, dim=0)[t]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        for x_0_pred, noise_pred in ddim.predict(x_t, t), script.DDPM.predict(ddim, x_t, t):
            assert torch.allclose(x_0_pred, x_0, rtol=0, atol=1e-9), t
            assert torch.allclose(noise_pred, noise, rtol=0, atol=1e-9), t


def test_noise_is_recomputed_after_the_clamp():
    ddim, _ = make(wild)
    x_t = torch.randn(8, 1, 4, 4)
    x_0_pred, noise_pred = ddim.predict(x_t, 700)
    assert x_0_pred.abs().max() == 1, "the clamp acts"
    a = ddim.alpha_bars[700]
    again = math.sqrt(a) * x_0_pred + math.sqrt(1 - a) * noise_pred
    assert torch.allclose(again, x_t, rtol=0, atol=1e-6)


# %% Sampling and back


def test_calls_and_shapes_and_frames():
    ddim, _ = make(oracle, shape=(3, 4, 6))
    frames = []
    images = ddim.ddim_sample(n=5, ddim_steps=120, frames=frames)
    assert images.shape == (5, 3, 4, 6) and len(ddim.model.calls) == 120
    assert ddim.model.calls == ddim.timesteps(120, "early")[:-1]
    assert [t for t, _, _ in frames] == [*ddim.timesteps(120, "early")[:-1:3], -1]
    assert torch.equal(frames[-1][1], images)
    ddim.model.calls.clear()
    assert ddim.dpm_solver_sample(n=2, steps=15).shape == (2, 3, 4, 6)
    assert ddim.model.calls == ddim.timesteps(15, "early")[:-1]
    ddim.model.calls.clear()
    ddim.dpm_solver_sample(n=2, steps=50, spacing="even")
    assert ddim.model.calls == ddim.timesteps(50, "even")[:-1]
    assert ddim.sample(n=1).shape == (1, 3, 4, 6)
    assert ddim.ddim_sample().shape == (16, 3, 4, 6)
    # Unless told otherwise, 50 early steps with η = 1, which keep the quality of all steps.
    assert ddim.model.calls[-50:] == ddim.timesteps(50, "early")[:-1]
    x_T = torch.randn(2, 3, 4, 6)
    assert not torch.equal(ddim.ddim_sample(x_T=x_T), ddim.ddim_sample(x_T=x_T))


def test_eta_0_is_a_function_of_the_noise_and_eta_1_is_not():
    ddim, _ = make(oracle)
    x_T = torch.randn(4, 1, 4, 4)
    for sample in (
        lambda: ddim.ddim_sample(4, 20, eta=0.0, x_T=x_T),
        lambda: ddim.dpm_solver_sample(4, 20, x_T),
    ):
        assert torch.equal(sample(), sample())
    renewed = [ddim.ddim_sample(4, 20, eta=1.0, x_T=x_T) for _ in range(2)]
    assert (renewed[0] - renewed[1]).abs().mean() > 0.1
    torch.manual_seed(1)
    first = ddim.ddim_sample(4, 20, eta=1.0, x_T=x_T)
    torch.manual_seed(1)
    assert torch.equal(first, ddim.ddim_sample(4, 20, eta=1.0, x_T=x_T))


def test_both_etas_give_the_right_distribution():
    ddim, _ = make(oracle)
    for eta in 0.0, 1.0:
        images = ddim.ddim_sample(500, 400, eta)
        assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert images.std().item() == pytest.approx(STD, rel=0.05)


def test_invert_then_sample_comes_back_the_better_the_more_steps():
    ddim, _ = make(oracle)
    x_0 = MEAN + STD * torch.randn(6, 1, 4, 4, dtype=torch.float64)
    error = {}
    for steps in 5, 20, 100, 300, 1000:
        x_T = ddim.ddim_invert(x_0, steps)
        back = ddim.ddim_sample(6, steps, 0.0, x_T, spacing="even")
        error[steps] = (back - x_0).abs().mean().item()
    assert error[5] > 2 * error[20] > 4 * error[100] and error[100] < 0.02
    assert error[300] < error[100] and error[1000] < 0.003
    # and the noise is the one that the differential equation gives
    x_T = ddim.ddim_invert(x_0, 1000)
    assert (exact(ddim, x_T) - x_0).abs().max() < 0.01
    assert x_T.std().item() == pytest.approx(1, abs=0.2)
    # The network is asked at the beginning of each step; the first one starts from x_0 itself.
    ddim.model.calls.clear()
    ddim.ddim_invert(x_0, 50)
    assert ddim.model.calls == [0, *range(19, 980, 20)]
    seen, predict = [], ddim.predict
    ddim.predict = lambda x_t, t: seen.append(x_t) or predict(x_t, t)
    ddim.ddim_invert(x_0, 2)
    a, b = ddim.alpha_bars[0], ddim.alpha_bars[499]
    noise = oracle(x_0, None, torch.tensor(a, dtype=torch.float64))
    assert torch.allclose(seen[1], math.sqrt(b) * x_0 + math.sqrt(1 - b) * noise, atol=1e-9)
