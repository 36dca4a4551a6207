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


def make_toy(function, T=1000, image_shape=(1, 2, 2)):
    return toy.SimpleDDPM(Fixed(function), toy.linear_beta_schedule(T), image_shape, CPU)


def make_full(function, T=1000, image_shape=(1, 2, 2), schedule="linear"):
    return full.DDPM(Fixed(function), SCHEDULES[schedule](T), image_shape, CPU)


both = pytest.mark.parametrize("make", [make_toy, make_full], ids=["01", "02"])


def gaussian_oracle(alphas_cumprod, mean, covariance):
    """The best possible noise prediction, float64, for data from N(mean, covariance).

    x_t = √ᾱ x_0 + √(1−ᾱ) ε is Gaussian too, with covariance C = ᾱ Σ + (1−ᾱ) I, and ε has covariance
    √(1−ᾱ) I with it; hence E[ε | x_t] = √(1−ᾱ) C⁻¹ (x_t − √ᾱ μ).
    """

    def noise_pred(x_t, t):
        a = alphas_cumprod[t[0]].double()
        c = a * covariance + (1 - a) * torch.eye(len(mean), dtype=torch.float64)
        residual = x_t.flatten(1).double() - a.sqrt() * mean
        solved = (1 - a).sqrt() * torch.linalg.solve(c, residual.T).T
        return solved.view_as(x_t)

    return noise_pred


# %% Schedule


def test_linear_schedule_is_the_papers_and_that_of_diffusers():
    betas = toy.linear_beta_schedule(1000)
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[-1].item() == pytest.approx(0.02)
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert (betas.float() - theirs.betas).abs().max() < 1e-8
    ddpm = make_toy(None)
    assert (ddpm.betas - theirs.betas).abs().max() < 1e-8
    assert (ddpm.alphas - theirs.alphas).abs().max() < 1e-6
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


lengths = pytest.mark.parametrize("T", [2, 5, 10, 20, 50, 100, 400, 1000, 4000])


def check_ends_in_noise(alphas_cumprod, T):
    """√ᾱ_T is 0.006 in the paper. An unscaled schedule would leave 0.78 at T = 50."""
    assert alphas_cumprod.shape == (T,)
    assert (alphas_cumprod.diff() < 0).all()
    assert 0 < alphas_cumprod[-1].sqrt() < 0.05


@lengths
def test_every_chain_length_of_01_ends_in_noise(T):
    ddpm = make_toy(None, T)
    assert ddpm.T == T
    check_ends_in_noise(ddpm.alphas_cumprod, T)
    for table in (ddpm.betas, ddpm.alphas):
        assert table.shape == (T,) and (table > 0).all() and (table < 1).all()
    assert torch.allclose(ddpm.alphas + ddpm.betas, torch.ones(T))


@pytest.mark.parametrize("schedule", SCHEDULES)
@lengths
def test_every_chain_length_of_02_ends_in_noise(T, schedule):
    ddpm = make_full(None, T, schedule=schedule)
    check_ends_in_noise(ddpm.alphas_cumprod, T)
    assert len(ddpm.betas) == T and all(0 < beta < 1 for beta in ddpm.betas)
    product = 1.0
    for t, beta in enumerate(ddpm.betas):
        product *= 1 - beta
        assert ddpm.alpha_bars[t] == pytest.approx(product, rel=1e-9)
        assert ddpm.alphas_cumprod[t].item() == pytest.approx(product, rel=1e-6)
    assert len(ddpm.alpha_bars) == T + 1 and ddpm.alpha_bars[-1] == 1
    samples = make_full(lambda x_t, t: 0.1 * x_t, T, schedule=schedule).sample(2)
    assert torch.isfinite(samples).all() and samples.abs().max() <= 1


# %% Forward process


def test_q_sample_in_one_jump_equals_many_single_steps():
    """Mean and variance of q(x_t | x_0), Eq. 4, from iterating q(x_t | x_{t-1}), Eq. 2."""
    table = make_toy(None).alphas_cumprod
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
    table = make_toy(None).alphas_cumprod
    x_0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    t = torch.tensor([0, 500, 999])
    together = toy.q_sample(x_0, t, noise, table)
    for i in range(3):
        alone = toy.q_sample(x_0[i : i + 1], t[i : i + 1], noise[i : i + 1], table)
        assert torch.equal(together[i : i + 1], alone)


# %% Loss (Algorithm 1)


@both
def test_training_draws_every_timestep(make):
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


@both
def test_loss_is_the_plain_squared_error_of_unit_noise(make):
    """Eq. 14, with no weight. With black images x_t is √(1−ᾱ) ε, so the noise can be read off."""
    seen = []

    def record(x_t, t):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    ddpm = make(record)
    loss = ddpm.loss(torch.zeros(4000, 1, 2, 2)).item()
    x_t, t = seen[0]
    noise = x_t / (1 - ddpm.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05
    assert loss == pytest.approx(noise.square().mean().item(), rel=1e-4)


@both
def test_loss_is_zero_for_the_true_noise(make):
    x_0 = torch.rand(8, 1, 2, 2) * 2 - 1

    def true_noise(x_t, t):
        a = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    ddpm = make(true_noise)
    assert ddpm.loss(x_0).item() < 1e-6


@pytest.mark.parametrize("t", [0, 1, 500, 990])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_02_finds_the_image_that_belongs_to_the_noise(t, schedule):
    x_0, noise = torch.rand(8, 1, 2, 2) * 2 - 1, torch.randn(8, 1, 2, 2)
    ddpm = make_full(lambda x_t, t: noise, schedule=schedule)
    x_t = full.q_sample(x_0, torch.full((8,), t), noise, ddpm.alphas_cumprod)
    x_0_pred, noise_pred = ddpm.predict(x_t, t)
    assert torch.equal(noise_pred, noise)
    # What float32 rounds off x_t is magnified by 1/√ᾱ.
    assert (x_0_pred - x_0).abs().max() < 2e-5 + 1e-6 / math.sqrt(ddpm.alpha_bars[t])


# %% One reverse step of 01: Algorithm 2 as printed, σ² = β, nothing clamped


@pytest.mark.parametrize("t", [0, 1, 10, 500, 998, 999])
def test_reverse_step_of_01_equals_that_of_diffusers(t):
    """Their "fixed_large" is σ² = β at every t > 0; neither adds noise at t = 0.

    diffusers has no exception here: not even at its t = 1, the last step with noise. (The one that
    OpenAI's code makes, β̃ of the second step in place of the first β, is for likelihoods only.)
    """
    x_t, noise_pred = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    theirs = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="fixed_large",
        clip_sample=False,
    )
    torch.manual_seed(1)
    expected = theirs.step(noise_pred, t, x_t)
    torch.manual_seed(1)
    x_prev, x_0_pred = make_toy(lambda x, t: noise_pred).p_sample(x_t, t)
    # They take β from a quotient of two ᾱ in float32, which costs digits where β is small.
    assert (x_prev - expected.prev_sample).abs().max() < (5e-4 if t < 100 else 5e-6)
    for_pictures = expected.pred_original_sample.clamp(-1, 1)
    assert (x_0_pred - for_pictures).abs().max() < 2e-5


@pytest.mark.parametrize("size", [0.1, 30])
@pytest.mark.parametrize("t", [0, 1, 2, 300, 998, 999])
def test_reverse_step_of_01_is_line_4_of_algorithm_2(t, size):
    """Line 4 in plain numbers, for a good prediction and for a wild one: 01 clamps neither."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    alpha_bar = math.prod(1 - beta for beta in betas[: t + 1])
    x_t, noise_pred = torch.randn(1, 1, 2, 2), size * torch.randn(1, 1, 2, 2)
    torch.manual_seed(3)
    x_prev, x_0_pred = make_toy(lambda x, t: noise_pred).p_sample(x_t, t)
    torch.manual_seed(3)
    z = torch.randn(1, 1, 2, 2) if t > 0 else torch.zeros(1, 1, 2, 2)
    for x, e, noise, ours in zip(*(a.flatten().tolist() for a in (x_t, noise_pred, z, x_prev))):
        mean = (x - betas[t] / math.sqrt(1 - alpha_bar) * e) / math.sqrt(1 - betas[t])
        assert ours == pytest.approx(mean + math.sqrt(betas[t]) * noise, abs=1e-5 * max(1, size))
    assert x_0_pred.abs().max() <= 1


def test_01_adds_no_noise_in_the_last_step_and_noise_of_variance_beta_in_all_others():
    ddpm = make_toy(lambda x, t: 0.1 * x)
    x_t = torch.rand(10_000, 1, 2, 2) - 0.5
    for t in (0, 1, 2, 500, 999):
        first, x_0_pred = ddpm.p_sample(x_t, t)
        second, _ = ddpm.p_sample(x_t, t)
        if t == 0:
            assert torch.equal(first, second)
            assert torch.allclose(first, x_0_pred, atol=1e-5), "the last step ends on x̂_0 itself"
        else:
            beta = toy.linear_beta_schedule(1000)[t].item()
            # 40,000 differences of two noises: their variance is 2 β, give or take 0.7 %.
            assert (first - second).var().item() == pytest.approx(2 * beta, rel=0.03)


# %% One reverse step of 02: Eq. 7 with the clamped x̂_0, σ² = β̃


@pytest.mark.parametrize("t", [1, 2, 50, 500, 998, 999])
def test_posterior_from_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians, without Eq. 7, on a fine grid."""
    ddpm = make_full(None)
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
    # The network says that the image is x_0.
    ddpm.model = Fixed(lambda x, t: torch.full_like(x, (x_t - a.sqrt() * x_0) / (1 - a).sqrt()))
    ours, _ = ddpm.p_sample(torch.full((10, 1, 100, 100), x_t.item()), t)
    # 100,000 draws: the standard errors are 0.003 and 0.002 of std.
    assert ours.mean().item() == pytest.approx(mean, abs=0.015 * std)
    assert ours.std().item() == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 10, 500, 998, 999])
def test_reverse_step_of_02_equals_that_of_diffusers(t, schedule):
    x_t = torch.randn(4, 1, 2, 2)
    noise_pred = torch.randn(4, 1, 2, 2)
    theirs = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        variance_type="fixed_small",
        clip_sample=True,
    )
    torch.manual_seed(1)
    expected = theirs.step(noise_pred, t, x_t)
    torch.manual_seed(1)
    x_prev, x_0_pred = make_full(lambda x, t: noise_pred, schedule=schedule).p_sample(x_t, t)
    # diffusers computes its tables in float32, where 1 − ᾱ loses digits at small t.
    tolerance = 2e-4 if t < 10 else 2e-5
    assert (x_prev - expected.prev_sample).abs().max() < tolerance
    assert (x_0_pred - expected.pred_original_sample).abs().max() < tolerance


@pytest.mark.parametrize("t", [1, 10, 300])
def test_unclamped_mean_of_02_is_line_4_of_algorithm_2(t):
    """Where the clamp has nothing to do, Eq. 7 with x̂_0 is the paper's line 4."""
    ddpm = make_full(lambda x, t: 0.1 * x)
    x_t = torch.full((1, 1, 2, 2), 0.2)
    torch.manual_seed(3)
    x_prev, x_0_pred = ddpm.p_sample(x_t, t)
    assert x_0_pred.abs().max() < 1
    torch.manual_seed(3)
    z = torch.randn_like(x_t)
    beta, a = toy.linear_beta_schedule(1000)[t], ddpm.alphas_cumprod[t]
    mean = (x_t - beta / (1 - a).sqrt() * 0.1 * x_t) / (1 - beta).sqrt()
    variance = (1 - ddpm.alpha_bars[t - 1]) / (1 - ddpm.alpha_bars[t]) * beta
    assert (x_prev - (mean + variance.sqrt() * z)).abs().max() < 1e-5


def test_02_adds_no_noise_in_the_last_step_and_noise_in_all_others():
    ddpm = make_full(lambda x, t: torch.zeros_like(x))
    x_t = torch.rand(2, 1, 2, 2) - 0.5
    for t in (0, 1, 999):
        torch.manual_seed(1)
        first, x_0_pred = ddpm.p_sample(x_t, t)
        torch.manual_seed(2)
        second, _ = ddpm.p_sample(x_t, t)
        assert torch.equal(first, second) == (t == 0)
        if t == 0:
            assert torch.equal(first, x_0_pred), "the last step ends on x̂_0 itself"


def test_clamp_of_02_is_used_for_the_next_image():
    """A wild prediction must not reach x_prev: the mean is made of the clamped x̂_0."""
    ddpm = make_full(lambda x, t: torch.full_like(x, -1e6))
    x_prev, x_0_pred = ddpm.p_sample(torch.zeros(1, 1, 2, 2), 999)
    assert x_0_pred.abs().max() == 1
    assert x_prev.abs().max() < 6


# %% The whole sampler


def test_oracle_sampling_with_01_reproduces_a_gaussian():
    """With the exact noise prediction, all 1000 steps give back the data's mean and covariance.

    Nearly: at every t the true variance of the step back lies between β̃ (data in one point) and β
    (data from N(0, 1)), and 01 takes β. Followed through the chain in plain numbers, variances come
    out 1.6, 1.5, 1.2 and 0.9 % too large for the four standard deviations below. With β̃ they would
    be 14, 7, 5 and 4 % too small. The mean is exact. (Below 0.02, less than three of 255 levels of
    grey, 01 is off the other way: there is no noise in the last step.)
    """
    stds = torch.tensor([0.05, 0.1, 0.15, 0.2], dtype=torch.float64)
    mean = torch.tensor([0.1, -0.2, 0.0, 0.15], dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    covariance = axes @ torch.diag(stds**2) @ axes.T
    ddpm = make_toy(None)
    oracle = gaussian_oracle(ddpm.alphas_cumprod, mean, covariance)
    ddpm.model = Fixed(lambda x_t, t: oracle(x_t, t).float())
    samples = ddpm.sample(n=40_000).flatten(1).double()
    assert samples.abs().max() < 1, "the clamp at the end had nothing to do"
    whitened = (samples - mean) @ axes / stds  # N(0, I) if all is right
    # Standard errors: 0.005 of a mean or a covariance, 0.007 of a variance.
    assert whitened.mean(0).abs().max() < 0.02
    assert (torch.cov(whitened.T) - torch.eye(4)).abs().max() < 0.04


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_oracle_sampling_with_02_reproduces_a_gaussian(schedule):
    """With the exact noise prediction, sampling gives back the data's mean and covariance."""
    mean = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
    root = 0.2 * torch.tensor(
        [[1, 0, 0, 0], [0.8, 0.5, 0, 0], [0, 0.3, 0.7, 0], [-0.5, 0, 0.2, 0.4]], dtype=torch.float64
    )
    covariance = root @ root.T
    ddpm = make_full(None, schedule=schedule)
    alphas_cumprod = torch.cumprod(1 - SCHEDULES[schedule](1000), 0)
    noise_pred = gaussian_oracle(alphas_cumprod, mean, covariance)
    ddpm.model = Fixed(lambda x_t, t: noise_pred(x_t, t).float())
    samples = ddpm.sample(n=40_000).flatten(1).double()
    # Standard error of the mean is 0.001, of the covariances below 0.0004; T = 1000 adds a bias of
    # about 2 % of the variances, as the posterior variance is right only for data in one point.
    assert (samples.mean(0) - mean).abs().max() < 0.006
    assert (torch.cov(samples.T) - covariance).abs().max() < 0.04 * covariance.max()


def test_sample_of_01_has_the_promised_shape_and_range():
    ddpm = make_toy(lambda x, t: -9 * x, T=20, image_shape=(3, 4, 4))
    samples = ddpm.sample(n=5)
    assert samples.shape == (5, 3, 4, 4)
    assert samples.abs().max() == 1, "a bad network leads far out of [-1, 1], and is cut off there"
    assert ddpm.sample().shape == (16, 3, 4, 4)


def test_sampling_with_01_begins_with_pure_noise():
    seen = []

    def record(x_t, t):
        seen.append(x_t)
        return x_t

    make_toy(record, T=3).sample(n=2500)
    assert seen[0].shape == (2500, 1, 2, 2)
    assert seen[0].mean().abs() < 0.05 and abs(seen[0].std() - 1) < 0.05


@pytest.mark.parametrize("T", [3, 20, 51, 150, 1000])
def test_frames_of_01_show_the_way(T):
    seen, frames = {}, []

    def record(x_t, t):
        seen[t[0].item()] = x_t
        return 0.5 * x_t

    ddpm = make_toy(record, T)
    ddpm.sample(n=2, frames=frames)
    assert sorted(seen, reverse=True) == list(seen) == list(range(T))[::-1], "each step once"
    steps = [t for t, _, _ in frames]
    assert min(T, 25) <= len(steps) <= 50
    assert steps == sorted(steps, reverse=True) and steps[-1] == 0
    assert steps[0] >= 0.9 * (T - 1), "it begins with noise"
    for t, x_t, x_0_pred in frames:
        assert torch.equal(x_t, seen[t])
        assert x_0_pred.shape == x_t.shape and x_0_pred.abs().max() <= 1


def test_sample_of_02_has_the_promised_shape_range_and_frames():
    ddpm = make_full(lambda x, t: 0.5 * x, T=20, image_shape=(3, 4, 4))
    frames = []
    samples = ddpm.sample(n=5, frames=frames)
    assert samples.shape == (5, 3, 4, 4)
    assert samples.abs().max() <= 1
    steps = [t for t, _, _ in frames]
    assert steps[0] == 19 and steps[-1] == -1 and steps == sorted(steps, reverse=True)
    assert torch.equal(frames[-1][1], samples)
    assert ddpm.sample().shape == (16, 3, 4, 4)
