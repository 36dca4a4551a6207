"""The formulas of the scripts against derivations of our own and against diffusers."""

import math

import pytest
import torch
from conftest import load
from diffusers import DDPMScheduler
from torch import nn

toy = load("01_ddpm_toy.py")
full = load("02_ddpm.py")
SCHEDULES = {"linear": toy.linear_beta_schedule, "cosine": full.cosine_beta_schedule}
CPU = torch.device("cpu")


class Fixed(nn.Module):
    """A "network" that answers with a given function of (x_t, t); it has no weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, t):
        return self.function(x_t, t)


def make(function, T=1000, image_shape=(1, 2, 2), schedule="linear"):
    return toy.DDPM(Fixed(function), SCHEDULES[schedule](T), image_shape, CPU)


def gaussian_oracle(alphas_cumprod, mean, covariance):
    """The best possible noise prediction for data from N(mean, covariance), in closed form.

    x_t = √ᾱ x_0 + √(1−ᾱ) ε is Gaussian too, with covariance C = ᾱ Σ + (1−ᾱ) I, and ε has covariance
    √(1−ᾱ) I with it; hence E[ε | x_t] = √(1−ᾱ) C⁻¹ (x_t − √ᾱ μ).
    """

    def noise_pred(x_t, t):
        a = alphas_cumprod[t[0]].double()
        c = a * covariance + (1 - a) * torch.eye(len(mean), dtype=torch.float64)
        residual = x_t.flatten(1).double() - a.sqrt() * mean
        solved = (1 - a).sqrt() * torch.linalg.solve(c, residual.T).T
        return solved.view_as(x_t).float()

    return noise_pred


# %% Schedule


def test_linear_schedule_is_the_papers_and_that_of_diffusers():
    betas = toy.linear_beta_schedule(1000)
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[-1].item() == pytest.approx(0.02)
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert (betas.float() - theirs.betas).abs().max() < 1e-8
    ddpm = make(None)
    assert (ddpm.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-6


@pytest.mark.parametrize("T", [10, 50, 1000, 4000])
def test_cosine_schedule_is_the_papers_and_that_of_diffusers(T):
    betas = full.cosine_beta_schedule(T)
    theirs = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2")
    assert (betas.float() - theirs.betas).abs().max() < 1e-6
    # Eq. 17 itself; the clip at 0.999 only touches the last step.
    for t in range(1, T):  # the paper's t, 1 ... T
        f, f_0 = (math.cos((x / T + 0.008) / 1.008 * math.pi / 2) ** 2 for x in (t, 0))
        assert torch.cumprod(1 - betas, 0)[t - 1].item() == pytest.approx(f / f_0, rel=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [2, 5, 10, 20, 50, 100, 400, 1000, 4000])
def test_every_chain_length_ends_in_noise(T, schedule):
    """√ᾱ_T is 0.006 in the paper. An unscaled schedule would leave 0.78 at T = 50."""
    ddpm = make(None, T, schedule=schedule)
    assert ddpm.alphas_cumprod.shape == (T,)
    assert (ddpm.alphas_cumprod.diff() < 0).all()
    assert ddpm.alphas_cumprod[-1].sqrt() < 0.05
    for table in (ddpm.posterior_std, ddpm.mean_factor_x_0, ddpm.mean_factor_x_t):
        assert torch.isfinite(table).all()


# %% Forward process


def test_q_sample_in_one_jump_equals_many_single_steps():
    """Mean and variance of q(x_t | x_0), Eq. 4, from iterating q(x_t | x_{t-1}), Eq. 2."""
    table = make(None).alphas_cumprod
    betas = toy.linear_beta_schedule(1000)
    factor, variance = 1.0, 0.0
    for t in range(1000):
        factor = math.sqrt(1 - betas[t].item()) * factor
        variance = (1 - betas[t].item()) * variance + betas[t].item()
        if t in (0, 1, 10, 100, 500, 999):
            one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
            step = torch.tensor([t])
            signal = toy.q_sample(one, step, zero, table).mean().item()
            spread = toy.q_sample(zero, step, one, table).mean().item()
            assert signal == pytest.approx(factor, abs=1e-6)
            assert spread == pytest.approx(math.sqrt(variance), abs=1e-6)


def test_q_sample_takes_a_timestep_for_each_image():
    table = make(None).alphas_cumprod
    x_0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    t = torch.tensor([0, 500, 999])
    together = toy.q_sample(x_0, t, noise, table)
    for i in range(3):
        alone = toy.q_sample(x_0[i : i + 1], t[i : i + 1], noise[i : i + 1], table)
        assert torch.equal(together[i : i + 1], alone)


# %% Loss (Algorithm 1)


def test_training_draws_every_timestep():
    seen = []

    def record(x_t, t):
        seen.append(t.clone())
        return torch.zeros_like(x_t)

    ddpm = make(record, T=20)
    for _ in range(50):
        ddpm.loss(torch.zeros(64, 1, 2, 2))
    counts = torch.bincount(torch.cat(seen), minlength=20)
    assert len(counts) == 20
    assert counts.min() > 100 and counts.max() < 230  # 160 expected, each way over 4 sigma
    assert all(len(t.unique()) > 1 for t in seen), "each image has a timestep of its own"


def test_loss_is_the_squared_error_of_unit_noise_weighted_by_one_over_root_alpha_bar():
    """With black images x_t is √(1−ᾱ) ε, so the noise can be read off what the network is given."""
    seen = []

    def record(x_t, t):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    ddpm = make(record)
    loss = ddpm.loss(torch.zeros(4000, 1, 2, 2)).item()
    x_t, t = seen[0]
    a = ddpm.alphas_cumprod[t]
    noise = x_t / (1 - a).sqrt().view(-1, 1, 1, 1)
    assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05
    expected = (noise.square().mean(dim=(1, 2, 3)) * a**-0.5).mean().item()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_loss_is_zero_for_the_true_noise():
    x_0 = torch.rand(8, 1, 2, 2) * 2 - 1

    def true_noise(x_t, t):
        a = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    ddpm = make(true_noise)
    assert ddpm.loss(x_0).item() < 1e-6


# %% One reverse step (Algorithm 2)


@pytest.mark.parametrize("t", [1, 2, 50, 500, 998, 999])
def test_posterior_from_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians, without Eq. 7, on a fine grid."""
    ddpm = make(None)
    betas = toy.linear_beta_schedule(1000)
    a, a_prev = torch.cumprod(1 - betas, 0)[[t, t - 1]]
    x_0 = 0.4
    x_t = a.sqrt() * x_0 + 0.7 * (1 - a).sqrt()
    centre, width = a_prev.sqrt() * x_0, (1 - a_prev).sqrt()
    x_prev = centre + width * torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    # log q(x_t | x_{t-1}) + log q(x_{t-1} | x_0), each up to a constant
    log_density = -((x_t - (1 - betas[t]).sqrt() * x_prev) ** 2) / (2 * betas[t])
    log_density += -((x_prev - centre) ** 2) / (2 * (1 - a_prev))
    weights = torch.softmax(log_density, 0)
    mean = (weights * x_prev).sum().item()
    std = (weights * (x_prev - mean) ** 2).sum().sqrt().item()
    ours = ddpm.mean_factor_x_0[t] * x_0 + ddpm.mean_factor_x_t[t] * x_t
    assert ours.item() == pytest.approx(mean, abs=1e-5)
    assert ddpm.posterior_std[t].item() == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 10, 500, 998, 999])
def test_reverse_step_equals_that_of_diffusers(t, schedule):
    x_t = torch.randn(4, 1, 2, 2)
    noise_pred = torch.randn(4, 1, 2, 2)
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    theirs = DDPMScheduler(1000, beta_schedule=name, variance_type="fixed_small", clip_sample=True)
    torch.manual_seed(1)
    expected = theirs.step(noise_pred, t, x_t)
    torch.manual_seed(1)
    x_prev, x_0_pred = make(lambda x, t: noise_pred, schedule=schedule).p_sample(x_t, t)
    # diffusers computes its tables in float32, where 1 − ᾱ loses digits at small t.
    tolerance = 2e-4 if t < 10 else 2e-5
    assert (x_prev - expected.prev_sample).abs().max() < tolerance
    assert (x_0_pred - expected.pred_original_sample).abs().max() < tolerance


@pytest.mark.parametrize("t", [1, 10, 300])
def test_unclamped_mean_is_line_4_of_algorithm_2(t):
    """Where the clamp has nothing to do, Eq. 7 with x̂_0 is the paper's line 4."""
    ddpm = make(lambda x, t: 0.1 * x)
    x_t = torch.full((1, 1, 2, 2), 0.2)
    torch.manual_seed(3)
    x_prev, x_0_pred = ddpm.p_sample(x_t, t)
    assert x_0_pred.abs().max() < 1
    torch.manual_seed(3)
    z = torch.randn_like(x_t)
    beta, a = toy.linear_beta_schedule(1000)[t], ddpm.alphas_cumprod[t]
    mean = (x_t - beta / (1 - a).sqrt() * 0.1 * x_t) / (1 - beta).sqrt()
    assert (x_prev - (mean + ddpm.posterior_std[t] * z)).abs().max() < 1e-5


def test_no_noise_in_the_last_step_and_noise_in_all_others():
    ddpm = make(lambda x, t: torch.zeros_like(x))
    x_t = torch.rand(2, 1, 2, 2) - 0.5
    for t in (0, 1, 999):
        torch.manual_seed(1)
        first, x_0_pred = ddpm.p_sample(x_t, t)
        torch.manual_seed(2)
        second, _ = ddpm.p_sample(x_t, t)
        assert torch.equal(first, second) == (t == 0)
        if t == 0:
            assert torch.equal(first, x_0_pred), "the last step ends on x̂_0 itself"


def test_clamp_is_used_for_the_next_image():
    """A wild prediction must not reach x_prev: the mean is made of the clamped x̂_0."""
    ddpm = make(lambda x, t: torch.full_like(x, -1e6))
    x_prev, x_0_pred = ddpm.p_sample(torch.zeros(1, 1, 2, 2), 999)
    assert x_0_pred.abs().max() == 1
    assert x_prev.abs().max() < 6


# %% The whole sampler


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_oracle_sampling_reproduces_a_gaussian(schedule):
    """With the exact noise prediction, sampling gives back the data's mean and covariance."""
    mean = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
    root = 0.2 * torch.tensor(
        [[1, 0, 0, 0], [0.8, 0.5, 0, 0], [0, 0.3, 0.7, 0], [-0.5, 0, 0.2, 0.4]], dtype=torch.float64
    )
    covariance = root @ root.T
    ddpm = make(None, schedule=schedule)
    ddpm.model = Fixed(gaussian_oracle(ddpm.alphas_cumprod, mean, covariance))
    samples = ddpm.sample(n=40_000).flatten(1).double()
    # Standard error of the mean is 0.001, of the covariances below 0.0004; T = 1000 adds a bias of
    # about 2 % of the variances, as the posterior variance is right only for data in one point.
    assert (samples.mean(0) - mean).abs().max() < 0.006
    assert (torch.cov(samples.T) - covariance).abs().max() < 0.04 * covariance.max()


def test_sample_has_the_promised_shape_range_and_frames():
    ddpm = make(lambda x, t: 0.5 * x, T=20, image_shape=(3, 4, 4))
    frames = []
    samples = ddpm.sample(n=5, frames=frames)
    assert samples.shape == (5, 3, 4, 4)
    assert samples.abs().max() <= 1
    steps = [t for t, _, _ in frames]
    assert steps[0] == 19 and steps[-1] == -1 and steps == sorted(steps, reverse=True)
    assert torch.equal(frames[-1][1], samples)
    assert ddpm.sample().shape == (16, 3, 4, 4)
