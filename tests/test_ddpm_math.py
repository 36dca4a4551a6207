"""The formulas of 01 and 02 against derivations of our own and against diffusers."""

import math
import operator
from itertools import accumulate, pairwise

import pytest
import torch
from conftest import load
from diffusers import DDPMScheduler

toy = load("01_ddpm_toy.py")
full = load("02_ddpm.py")
BETAS = {"linear": toy.linear_beta_schedule, "cosine": full.cosine_beta_schedule}
THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # as diffusers calls them
CPU = torch.device("cpu")
both = pytest.mark.parametrize("script", [toy, full], ids=["01", "02"])
schedules = pytest.mark.parametrize("schedule", BETAS)


def make(script, network, T=1000, image_shape=(1, 2, 2), schedule="linear"):
    """The sampler of 01 or 02 with a function of (x_t, t) as its network."""
    sampler = toy.SimpleDDPM if script is toy else full.DDPM
    return sampler(network, BETAS[schedule](T), image_shape, CPU)


def step_back(ddpm, x_t, t):
    """p_sample from t to t - 1, always with the same noise."""
    torch.manual_seed(1)
    return ddpm.p_sample(x_t, t, *[] if isinstance(ddpm, toy.SimpleDDPM) else [t - 1])


def recorder(answer):
    """A network that answers with a multiple of x_t, and the list of what it is asked."""
    asked = []
    return lambda x_t, t: asked.append((x_t, t)) or answer * x_t, asked


# %% Schedule


def test_linear_schedule_is_the_papers_and_that_of_diffusers():
    betas, ddpm = toy.linear_beta_schedule(1000), make(toy, None)
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    theirs = DDPMScheduler(1000, beta_schedule="linear")
    assert (betas.float() - theirs.betas).abs().max() < 1e-8
    assert (ddpm.betas - theirs.betas).abs().max() < 1e-8
    assert (ddpm.alphas - theirs.alphas).abs().max() < 1e-6
    assert (ddpm.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-6


@pytest.mark.parametrize("T", [10, 50, 1000, 4000])
def test_cosine_schedule_is_the_papers_and_that_of_diffusers(T):
    betas = full.cosine_beta_schedule(T)
    theirs = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2")
    assert (betas.float() - theirs.betas).abs().max() < 1e-6
    # Eq. 17 itself, with the paper's t, 1 ... T; the clip at 0.999 only touches the last step.
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T)]
    alphas_cumprod = torch.cumprod(1 - betas, 0)[:-1].tolist()
    assert alphas_cumprod == pytest.approx([value / f[0] for value in f[1:]], rel=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize(
    ("script", "schedule"),
    [(toy, "linear"), (full, "linear"), (full, "cosine")],
    ids=["01", "02-linear", "02-cosine"],
)
@pytest.mark.parametrize("T", [2, 5, 10, 20, 50, 100, 400, 1000, 4000])
def test_every_chain_length_ends_in_noise(T, script, schedule):
    """√ᾱ_T is 0.006 in the paper. An unscaled schedule would leave 0.78 at T = 50."""
    ddpm, betas = make(script, lambda x_t, t: 0.1 * x_t, T, schedule=schedule), BETAS[schedule](T)
    assert betas.shape == (T,) and (betas > 0).all() and (betas < 1).all()
    products = [*accumulate((1 - betas).tolist(), operator.mul)]
    assert ddpm.T == T and ddpm.alphas_cumprod.tolist() == pytest.approx(products, rel=1e-6)
    assert (ddpm.alphas_cumprod.diff() < 0).all() and 0 < ddpm.alphas_cumprod[-1].sqrt() < 0.05
    if script is toy:
        assert torch.allclose(ddpm.betas, betas.float(), atol=0)
        assert torch.allclose(ddpm.alphas, 1 - betas.float())
    else:
        assert ddpm.alpha_bars == pytest.approx([*products, 1], rel=1e-9)
    if T <= 100:
        samples = ddpm.sample(2)
        assert torch.isfinite(samples).all() and samples.abs().max() <= 1


# %% Forward process


def test_q_sample_in_one_jump_equals_many_single_steps():
    """Mean and variance of q(x_t | x_0), Eq. 4, from iterating q(x_t | x_{t-1}), Eq. 2."""
    table, factor, variance = make(toy, None).alphas_cumprod, 1.0, 0.0
    one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    for t, beta in enumerate(toy.linear_beta_schedule(1000).tolist()):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        if t in (0, 1, 10, 100, 500, 999):
            for x_0, noise, wanted in (one, zero, factor), (zero, one, math.sqrt(variance)):
                x_t = toy.q_sample(x_0, torch.tensor([t]), noise, table)
                assert torch.allclose(x_t, torch.tensor(wanted), atol=1e-6)


# %% Loss (Algorithm 1)


@both
def test_training_draws_every_timestep(script):
    network, asked = recorder(0)
    ddpm = make(script, network, T=20)
    for _ in range(50):
        ddpm.loss(torch.zeros(64, 1, 2, 2))
    counts = torch.bincount(torch.cat([t for _, t in asked]))
    assert len(counts) == 20
    expected = torch.full((20,), 160.0)
    if script.__name__ != "01_ddpm_toy":  # P(T · √u < t) = (t / T)²
        expected = 3200 * (torch.arange(20) * 2 + 1) / 20**2
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), "5 standard errors"
    assert all(len(t.unique()) > 1 for _, t in asked), "each image has a timestep of its own"


@both
@pytest.mark.parametrize("off", [0.0, 0.5])
def test_loss_is_the_plain_squared_error_of_unit_noise(script, off):
    """Eq. 14, with no weight: a network that knows the images answers with their noise + off."""
    x_0, seen = torch.rand(4000, 1, 2, 2) * 2 - 1, []

    def network(x_t, t):
        a = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        seen.append((x_t - a.sqrt() * x_0) / (1 - a).sqrt())
        return seen[0] + off

    ddpm = make(script, network)
    assert ddpm.loss(x_0).item() == pytest.approx(off**2, abs=1e-5)
    assert seen[0].mean().abs() < 0.05 and abs(seen[0].std() - 1) < 0.05


@pytest.mark.parametrize("a", [0.001, 0.3, 0.999])  # ᾱ
def test_one_prediction_has_five_names(a):
    """The table of the README: each from ε, and its squared error in units of that of ε."""
    x_0, noise, wrong = torch.randn(3, 2, 5000, dtype=torch.float64)[:, 0]
    x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * noise
    names = {  # from ε; by its own definition; weight
        "x_0": (lambda e: (x_t - (1 - a) ** 0.5 * e) / a**0.5, x_0, (1 - a) / a),
        "v": (
            lambda e: (e - (1 - a) ** 0.5 * x_t) / a**0.5,
            a**0.5 * noise - (1 - a) ** 0.5 * x_0,
            1 / a,
        ),
        # of log q(x_t | x_0), a Gaussian around √ᾱ · x_0
        "score": (lambda e: -e / (1 - a) ** 0.5, -(x_t - a**0.5 * x_0) / (1 - a), 1 / (1 - a)),
        "velocity": (
            lambda e: ((a**0.5 + (1 - a) ** 0.5) * e - x_t) / a**0.5,
            noise - x_0,
            (a**0.5 + (1 - a) ** 0.5) ** 2 / a,
        ),
    }
    for name, (convert, expected, weight) in names.items():
        assert torch.allclose(convert(noise), expected), name
        error = (convert(wrong) - expected).square().mean()
        assert torch.allclose(error, weight * (wrong - noise).square().mean()), name


# %% One step back


@schedules
def test_02_finds_the_image_that_belongs_to_the_noise(schedule):
    x_0, noise = torch.rand(8, 1, 2, 2) * 2 - 1, torch.randn(8, 1, 2, 2)
    ddpm = make(full, lambda x_t, t: noise, schedule=schedule)
    for t in 0, 1, 500, 990:
        x_t = full.q_sample(x_0, torch.full((8,), t), noise, ddpm.alphas_cumprod)
        x_0_pred, noise_pred = ddpm.predict(x_t, t)
        assert torch.equal(noise_pred, noise)
        # What float32 rounds off x_t is magnified by 1/√ᾱ.
        assert (x_0_pred - x_0).abs().max() < 2e-5 + 1e-6 / math.sqrt(ddpm.alpha_bars[t])


def test_step_of_01_is_that_of_diffusers():
    """Algorithm 2 as printed, nothing clamped, σ² = β: "fixed_large", also at the paper's t = 2.

    (The exception that OpenAI's code makes, β̃ of the second step in place of the first β, is for
    likelihoods only.)
    """
    theirs = DDPMScheduler(beta_schedule="linear", variance_type="fixed_large", clip_sample=False)
    for t in 0, 1, 10, 500, 998, 999:
        x_t, noise_pred = torch.randn(2, 4, 1, 2, 2)
        x_prev, x_0_pred = step_back(make(toy, lambda x, t, pred=noise_pred: pred), x_t, t)
        torch.manual_seed(1)
        expected = theirs.step(noise_pred, t, x_t)
        # They take β from a quotient of two ᾱ in float32, which costs digits where β is small.
        assert (x_prev - expected.prev_sample).abs().max() < (5e-4 if t < 100 else 5e-6)
        for_pictures = expected.pred_original_sample.clamp(-1, 1)
        assert (x_0_pred - for_pictures).abs().max() < 2e-5


@schedules
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_steps_of_02_are_those_of_diffusers(schedule, steps):
    """Eq. 7 with the clamped x̂_0 and σ² = β̃, for single steps and for long ones ("trailing")."""

    def network(x_t, t):  # drives some x̂_0 out of range
        return 1.3 * torch.sin(3 * x_t + t.view(-1, 1, 1, 1) / 100)

    ddpm, betas = make(full, network, schedule=schedule), BETAS[schedule](1000)
    theirs = DDPMScheduler(trained_betas=betas.numpy(), timestep_spacing="trailing")
    theirs.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # theirs has float32's digits
    theirs.one, clamped = torch.ones((), dtype=torch.float64), 0
    theirs.set_timesteps(steps)
    timesteps = [*theirs.timesteps.tolist(), -1]
    for i in {0, 1 % steps, steps // 2, max(0, steps - 2), steps - 1}:
        t, x_t = timesteps[i], 2 * torch.randn(4, 1, 2, 2, dtype=torch.float64)
        torch.manual_seed(1)
        x_prev, x_0_pred = ddpm.p_sample(x_t, t, timesteps[i + 1])
        torch.manual_seed(1)
        expected = theirs.step(network(x_t, torch.tensor([t])), t, x_t)
        assert torch.allclose(x_prev, expected.prev_sample, rtol=0, atol=1e-9), t
        assert torch.allclose(x_0_pred, expected.pred_original_sample, rtol=0, atol=1e-9), t
        clamped += (x_0_pred.abs() == 1).sum().item()
    assert clamped > 0, "the clamp acts"


@pytest.mark.parametrize("t", [0, 1, 2, 300, 998, 999])
@pytest.mark.parametrize(
    ("script", "size"), [(toy, 0.1), (toy, 30), (full, 0.1)], ids=["01", "01-wild", "02"]
)
def test_step_is_line_4_of_algorithm_2(t, script, size):
    """In plain numbers: in 01 also for a wild prediction, in 02 where the clamp does nothing.

    There is no noise in the last step, which so ends on x̂_0 itself.
    """
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    alpha_bar, before = (math.prod(1 - beta for beta in betas[:n]) for n in (t + 1, t))
    variance = betas[t] if script is toy else (1 - before) / (1 - alpha_bar) * betas[t]
    x_0, noise_pred = size * torch.randn(2, 1, 1, 2, 2)
    x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise_pred
    x_prev, x_0_pred = step_back(make(script, lambda x, t: noise_pred), x_t, t)
    torch.manual_seed(1)
    z = torch.randn(1, 1, 2, 2) if t > 0 else torch.zeros(1, 1, 2, 2)
    for x, e, noise, ours in zip(*(a.flatten().tolist() for a in (x_t, noise_pred, z, x_prev))):
        mean = (x - betas[t] / math.sqrt(1 - alpha_bar) * e) / math.sqrt(1 - betas[t])
        assert ours == pytest.approx(mean + math.sqrt(variance) * noise, abs=1e-5 * max(1, size))
    assert torch.allclose(x_0_pred, x_0.clamp(-1, 1), atol=2e-4 * max(1, size))
    assert t > 0 or torch.allclose(x_prev, x_0, atol=1e-5 * max(1, size))


@pytest.mark.parametrize(("t", "t_prev"), [(1, 0), (2, 1), (500, 499), (999, 998), (999, 600)])
def test_posterior_from_bayes_rule(t, t_prev):
    """q(x_prev | x_t, x_0) as the product of two Gaussians, without Eq. 7, on a fine grid."""
    a, a_prev = torch.cumprod(1 - toy.linear_beta_schedule(1000), 0)[[t, t_prev]]
    x_0 = 0.4
    x_t = a.sqrt() * x_0 + 0.7 * (1 - a).sqrt()
    centre, width = a_prev.sqrt() * x_0, (1 - a_prev).sqrt()
    x_prev = centre + width * torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    # log q(x_t | x_prev) + log q(x_prev | x_0), each up to a constant
    log_density = -((x_t - (a / a_prev).sqrt() * x_prev) ** 2) / (2 * (1 - a / a_prev))
    log_density += -((x_prev - centre) ** 2) / (2 * (1 - a_prev))
    weights = torch.softmax(log_density, 0)
    mean = (weights * x_prev).sum().item()
    std = (weights * (x_prev - mean) ** 2).sum().sqrt().item()
    # The network says that the image is x_0.
    ddpm = make(full, lambda x, t: torch.full_like(x, (x_t - a.sqrt() * x_0) / (1 - a).sqrt()))
    ours, _ = ddpm.p_sample(torch.full((10, 1, 100, 100), x_t.item()), t, t_prev)
    # 100,000 draws: the standard errors are 0.003 and 0.002 of std.
    assert ours.mean().item() == pytest.approx(mean, abs=0.015 * std)
    assert ours.std().item() == pytest.approx(std, rel=0.01)


# %% The whole sampler


@pytest.mark.parametrize(
    ("script", "schedule", "bias"),
    [
        (toy, "linear", [1.070, 1.064, 1.049, 1.038]),
        (full, "linear", [0.665, 0.796, 0.851, 0.882]),
        (full, "cosine", [0.778, 0.877, 0.914, 0.934]),
    ],
    ids=["01", "02-linear", "02-cosine"],
)
def test_sampling_with_an_oracle_reproduces_a_gaussian(script, schedule, bias):
    """With the best noise prediction, all 250 steps give back the data's mean and covariance.

    x_t = √ᾱ x_0 + √(1−ᾱ) ε is Gaussian with covariance C = ᾱ Σ + (1−ᾱ) I, and ε has covariance
    √(1−ᾱ) I with it; hence E[ε | x_t] = √(1−ᾱ) C⁻¹ (x_t − √ᾱ μ).
    The mean is exact. The true variance of a step back lies between β̃ (data in one point; 02) and
    β (data from N(0, 1); 01): followed through the chain in plain numbers, it ends too small or too
    large by the factors `bias`.
    """
    stds, mean = torch.tensor([0.05, 0.1, 0.15, 0.2]), torch.tensor([0.1, -0.2, 0.0, 0.15])
    axes = torch.linalg.qr(torch.randn(4, 4)).Q  # Σ = axes · diag(stds²) · axesᵀ

    def oracle(x_t, t):
        a = ddpm.alphas_cumprod[t[0]]
        residual = (x_t.flatten(1) - a.sqrt() * mean) @ axes
        return ((1 - a).sqrt() * residual / (a * stds**2 + 1 - a) @ axes.T).view_as(x_t)

    ddpm = make(script, oracle, T=250, schedule=schedule)
    samples = ddpm.sample(n=20_000).flatten(1)
    assert samples.abs().max() < 1, "a clamp at the end had nothing to do"
    whitened = (samples - mean) @ axes / stds
    # Standard errors: 0.007 of a mean or a covariance, 0.01 of a variance.
    assert whitened.mean(0).abs().max() < 0.025
    assert (whitened.T.cov() - torch.tensor(bias).diag()).abs().max() < 0.03


@both
def test_sample_begins_with_pure_noise_and_has_the_promised_shape_and_range(script):
    network, asked = recorder(-9)
    ddpm = make(script, network, T=20, image_shape=(3, 4, 4))
    samples = ddpm.sample(n=200)
    assert samples.shape == (200, 3, 4, 4) and ddpm.sample().shape == (16, 3, 4, 4)
    assert samples.abs().max() == 1, "a bad network leads far out of [-1, 1], and is cut off there"
    assert asked[0][0].mean().abs() < 0.05 and abs(asked[0][0].std() - 1) < 0.05


@pytest.mark.parametrize("T", [3, 20, 51, 150])
@both
def test_frames_show_the_way(script, T):
    network, asked = recorder(0.5)
    frames, ddpm = [], make(script, network, T)
    samples = ddpm.sample(n=2, frames=frames)
    seen = {t[0].item(): x_t for x_t, t in asked}
    assert [t[0].item() for _, t in asked] == [*range(T - 1, -1, -1)], "each step once"
    if script is full:
        t, x_t, x_0_pred = frames.pop()
        assert t == -1 and x_t is x_0_pred is samples
    steps = [t for t, _, _ in frames]
    assert min(T, 25) <= len(steps) <= 50
    assert steps == sorted(steps, reverse=True)
    assert steps[0] >= 0.9 * (T - 1), "it begins with noise"
    assert script is full or steps[-1] == 0
    for t, x_t, x_0_pred in frames:
        assert torch.equal(x_t, seen[t])
        assert x_0_pred.shape == x_t.shape and x_0_pred.abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 120, 999, 1000])
def test_02_samples_in_fewer_steps(steps):
    """From T - 1 to -1, the image; which steps lie between is for diffusers to say."""
    network, asked = recorder(0.1)
    ddpm, frames, theirs = make(full, network), [], DDPMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    way, p_sample = [], ddpm.p_sample
    ddpm.p_sample = lambda x_t, t, t_prev: way.append((t, t_prev)) or p_sample(x_t, t, t_prev)
    ddpm.sample(2, steps, frames)
    timesteps = [*theirs.timesteps.tolist(), -1]
    assert timesteps[0] == 999 and way == [*pairwise(timesteps)]
    assert [t[0].item() for _, t in asked] == timesteps[:-1]
    shown = [t for t, _, _ in frames]
    assert set(shown) <= set(timesteps) and shown[0] == 999 and shown[-1] == -1
    assert min(steps, 25) < len(shown) <= 51


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "50"])
def test_02_refuses_senseless_numbers_of_steps(steps):
    network, asked = recorder(0.1)
    with pytest.raises(ValueError, match=f"{steps!r} steps: .* a whole number, 1 to T = 1000"):
        make(full, network).sample(2, steps)
    assert not asked
