"""04's samplers: against diffusers, against closed forms, and against DDPM's own."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import load
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

script = load("04_ddim_fast_sampling.py")
CPU = torch.device("cpu")
schedules = pytest.mark.parametrize("schedule", ["cosine", "linear"])


class Network:
    """A "network" that answers with ε, a function of (x_t, t, ᾱ_t), and counts its calls."""

    def __init__(self, function, alphas_cumprod):
        self.function, self.alphas_cumprod, self.calls = function, alphas_cumprod, []

    def __call__(self, x_t, t):
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


def make(function, T=1000, schedule="cosine", shape=(1, 4, 4)):
    betas = script.SCHEDULES[schedule](T)
    network = Network(function, torch.cumprod(1 - betas, dim=0))
    return script.DDIM(network, betas, shape, CPU), betas


def exact(ddim, x_T):
    """Where the differential equation takes x_T (float64) if the data are N(MEAN, STD²)."""
    alpha_bar = ddim.alpha_bars[ddim.T - 1]
    spread = math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + STD * (x_T - math.sqrt(alpha_bar) * MEAN) / spread


# %% Timesteps


def test_fifty_and_ten_of_a_thousand_are_those_of_the_docstring():
    ddim, _ = make(oracle)
    assert ddim.timesteps(50, "even") == [*range(999, 0, -20), -1]
    early = ddim.timesteps(50, "early")
    assert early[:3] == [999, 998, 995] and early[-3:] == [75, 38, -1] and len(early) == 51
    late, early = (ddim.timesteps(10, spacing) for spacing in ("late", "early"))
    assert late == [i + round(990 * (i / 10) ** 2) - 1 for i in range(10, -1, -1)]
    assert early == [998 - t for t in reversed(late)], "mirror images"
    with pytest.raises(KeyError):
        ddim.timesteps(10, "odd")


@pytest.mark.parametrize("T", [1, 2, 7, 100])
@pytest.mark.parametrize("spacing", ["even", "early", "late"])
def test_any_number_of_steps_falls_strictly_from_the_last_to_the_clean_image(T, spacing):
    ddim, _ = make(oracle, T, "linear")
    for steps in range(1, T + 1):
        timesteps = ddim.timesteps(steps, spacing)
        assert len(timesteps) == steps + 1 and timesteps[0] == T - 1 and timesteps[-1] == -1
        gaps = [a - b for a, b in pairwise(timesteps)]
        gaps = gaps[::-1] if spacing == "late" else gaps
        assert min(gaps) >= 1, "no step twice"
        # The lengths are equal or grow, up to rounding.
        assert all(b - a >= -1 for a, b in pairwise(gaps))
        assert max(gaps) - min(gaps) <= 1 if spacing == "even" else gaps[-1] >= gaps[0]
    assert ddim.timesteps(T, spacing) == [*range(T - 1, -2, -1)]


def test_bad_numbers_of_steps_and_bad_eta():
    ddim, x_0 = make(oracle)[0], torch.zeros(2, 1, 4, 4)
    for steps in 0, -1, 1001, 2.5, "50", None:
        for call in ddim.ddim_sample, ddim.ddim_invert, ddim.dpm_solver_sample:
            with pytest.raises(ValueError, match="a whole number, 1 to T = 1000"):
                call(x_0 if call == ddim.ddim_invert else 2, steps)
    for eta in -0.1, 1.1, float("nan"), 2:
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
@schedules
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_that_of_diffusers(function, schedule, eta):
    """Where the number of steps divides T; elsewhere diffusers steps back by T // steps."""
    ddim, betas = make(function, schedule=schedule)
    scheduler = DDIMScheduler(trained_betas=betas.numpy(), timestep_spacing="trailing")
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # theirs has float32's digits
    for steps in 1, 10, 50, 300, 999, 1000:
        scheduler.set_timesteps(steps)
        timesteps = ddim.timesteps(steps, "even")
        assert timesteps[:-1] == scheduler.timesteps.tolist()
        if 1000 % steps:
            continue
        for i in sorted({0, 1 % steps, steps // 2, steps - 1}):
            t, t_prev = timesteps[i], timesteps[i + 1]
            x_t = torch.randn(3, 1, 4, 4, dtype=torch.float64)
            torch.manual_seed(7)
            ours, x_0_pred = ddim.ddim_step(x_t, t, t_prev, eta)
            torch.manual_seed(7)
            noise = torch.randn_like(x_t)
            answer = ddim.model(x_t, torch.full((3,), t))
            theirs = scheduler.step(
                *(answer, t, x_t, eta), use_clipped_model_output=True, variance_noise=noise
            )
            assert torch.allclose(ours, theirs.prev_sample, rtol=0, atol=1e-9), (steps, t)
            x_0 = theirs.pred_original_sample
            assert torch.allclose(x_0_pred, x_0, rtol=0, atol=1e-9), (steps, t)


@pytest.mark.parametrize("steps", [1, 2, 5, 15, 30])
@schedules
def test_dpm_solver_is_that_of_diffusers(schedule, steps):
    ddim, betas = make(gentle, schedule=schedule)
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
@schedules
def test_eta_1_is_ddpm(function, schedule):
    """In single steps and in long ones, and with all steps also in whole samples."""
    ddim, betas = make(function, T=200, schedule=schedule)
    ddpm = script.DDPM(ddim.model, betas, ddim.image_shape, CPU)
    for t, t_prev in (199, 198), (198, 197), (100, 99), (199, 100), (50, 7), (1, 0), (0, -1):
        x_t = torch.randn(4, 1, 4, 4)
        torch.manual_seed(3)
        ours, x_0_pred = ddim.ddim_step(x_t, t, t_prev, eta=1.0)
        torch.manual_seed(3)
        theirs, their_x_0_pred = ddpm.p_sample(x_t, t, t_prev)
        assert torch.equal(x_0_pred, their_x_0_pred)
        assert x_0_pred.abs().max() == 1 or function is oracle, "the clamp acts"
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), t
    if function is oracle:  # the wild answer magnifies the last digits from step to step
        torch.manual_seed(5)
        ours = ddim.ddim_sample(8, 200, eta=1.0)
        torch.manual_seed(5)
        assert torch.allclose(ours, ddpm.sample(8), rtol=0, atol=1e-5)


# %% Against the closed form


def errors(sampler, ddim, counts, **options):
    """How far even steps end from the exact images, by the number of steps."""
    torch.manual_seed(0)
    x_T, found = torch.randn(6, 1, 4, 4, dtype=torch.float64), {}
    for steps in counts:
        images = sampler(6, steps, x_T=x_T, spacing="even", **options)
        found[steps] = (images - exact(ddim, x_T)).abs().max().item()
    return found


@schedules
def test_ddim_error_falls_like_one_over_steps(schedule):
    ddim, _ = make(oracle, schedule=schedule)
    error = errors(ddim.ddim_sample, ddim, (5, 20, 100, 300, 999, 1000), eta=0.0)
    assert error[5] > 2 * error[20] and error[20] > 3.5 * error[100] and error[100] < 0.05
    # Also where the count does not divide T: no step too short or too long, no jump.
    assert error[300] < 0.45 * error[100] and error[999] < 0.45 * error[300]
    assert error[999] == pytest.approx(error[1000], rel=0.05)


def test_dpm_solver_error_falls_faster():
    ddim, _ = make(oracle)
    first = errors(ddim.ddim_sample, ddim, (10, 20, 40, 80), eta=0.0)
    second = errors(ddim.dpm_solver_sample, ddim, first)
    assert all(second[steps] < first[steps] for steps in first)
    assert second[80] < 0.1 * second[20], "second order: a quarter for twice the steps"


# %% Sampling and back


def test_calls_and_shapes_and_frames():
    ddim, _ = make(oracle, shape=(3, 4, 6))
    frames = []
    images = ddim.ddim_sample(n=5, ddim_steps=120, frames=frames)
    assert images.shape == (5, 3, 4, 6) and torch.equal(frames[-1][1], images)
    assert [t for t, _, _ in frames] == [*ddim.timesteps(120, "early")[:-1:3], -1]
    for steps, spacing, sample in (
        (120, "early", ddim.ddim_sample),
        (10, "late", partial(ddim.ddim_sample, spacing="late")),
        (15, "early", ddim.dpm_solver_sample),
        (50, "even", partial(ddim.dpm_solver_sample, spacing="even")),
    ):
        ddim.model.calls.clear()
        assert sample(2, steps).shape == (2, 3, 4, 6)
        assert ddim.model.calls == ddim.timesteps(steps, spacing)[:-1]
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
