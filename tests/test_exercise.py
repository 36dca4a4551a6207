"""An exercise: write the heart of 01 yourself. Which of your three functions is right?

    python -m pytest tests/test_exercise.py --file my_01.py

Copy 01_ddpm_toy.py to my_01.py, delete the bodies of `q_sample`, `loss` and `p_sample`, write them
again from the README or the paper, and run this command. Without `--file`, it looks at 01 itself.
"""

import importlib.util
import math

import pytest
import torch


@pytest.fixture
def mine(request):
    """The learner's file as a module, and a SimpleDDPM for images of 2 × 2 pixels, T = 50."""
    path = request.config.getoption("--file")
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    betas = torch.linspace(0.01, 0.2, 50, dtype=torch.float64)
    return module, module.SimpleDDPM(None, betas, (1, 2, 2), "cpu")


def test_q_sample(mine):
    """x_t holds the image times √ᾱ_t and the noise times √(1−ᾱ_t), each with the t of its image."""
    module, ddpm = mine
    x_0, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 20, 49])
    x_t = module.q_sample(x_0, t, noise, ddpm.alphas_cumprod)
    for i, step in enumerate(t.tolist()):
        kept = math.prod(1 - beta for beta in ddpm.betas[: step + 1].tolist())
        expected = math.sqrt(kept) * x_0[i] + math.sqrt(1 - kept) * noise[i]
        assert torch.allclose(x_t[i], expected, atol=1e-4), f"at t = {step}"


def test_loss(mine):
    """The mean squared error of the predicted noise; t is random, from 0 to T - 1."""
    _, ddpm = mine
    x_0, asked = torch.randn(2000, 1, 2, 2), []

    def knows_the_images(x_t, t):
        asked.append(t)
        kept = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - kept.sqrt() * x_0) / (1 - kept).sqrt() + 0.5  # ... and is off by 0.5

    ddpm.model = knows_the_images
    assert ddpm.loss(x_0).item() == pytest.approx(0.25, abs=1e-3), "the error is 0.5 everywhere"
    assert asked[0].shape == (2000,), "a t for each image"
    assert sorted(asked[0].unique().tolist()) == list(range(50)), "every t from 0 to T - 1"
    ddpm.model = lambda x_t, t: torch.zeros_like(x_t)
    assert ddpm.loss(x_0).item() == pytest.approx(1, abs=0.1), "the noise has variance 1"


def test_p_sample(mine):
    """Algorithm 2, line 4: a mean, and noise of variance β_t except in the last step."""
    _, ddpm = mine
    x_t, noise_pred = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    ddpm.model = lambda x, t: noise_pred.expand(x.shape)
    many = 40_000
    for t in 0, 1, 30, 49:
        result = ddpm.p_sample(x_t.expand(many, 1, 2, 2), t)
        x_prev = result[0] if isinstance(result, tuple) else result
        alpha, kept = 1 - ddpm.betas[t].item(), ddpm.alphas_cumprod[t].item()
        mean = (x_t - (1 - alpha) / math.sqrt(1 - kept) * noise_pred) / math.sqrt(alpha)
        assert torch.allclose(x_prev.mean(0), mean[0], atol=0.02), f"the mean at t = {t}"
        expected = math.sqrt(1 - alpha) if t > 0 else 0
        assert x_prev.std(0).mean().item() == pytest.approx(expected, rel=0.02, abs=1e-4), t
