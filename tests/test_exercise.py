"""An exercise: write the heart of 01 yourself. Which of your three functions is right?

    python -m pytest tests/test_exercise.py --file my_01.py

Copy 01_ddpm_toy.py to my_01.py, delete the bodies of `q_sample`, `loss` and `p_sample`, write them
again from the README or the paper, and run this command. Without `--file`, it looks at 01 itself.
"""

import importlib.util
import math
import re

import pytest
import torch
from conftest import ROOT

from utils import visualize
from utils.visualize import draw_digits


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


# %% Flow matching: the change of 01 in .github/exercises.md


def change(text, diff):
    """Replace each block of lines with "-" by the lines with "+" below it."""
    for old, new in re.findall(r"(?m)((?:^-.*\n)+)((?:^\+.*\n)*)", diff):
        old, new = (re.sub(r"(?m)^.", "", block) for block in (old, new))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def flow(project):
    """01 after the change, in the project's folder."""
    answers = (ROOT / ".github" / "exercises.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"(?ms)^```diff\n(.*?)^```$", answers)
    path = project.folder / "01_ddpm_toy.py"
    path.write_text(change(path.read_text("utf-8"), diff), encoding="utf-8")
    return path


def test_flow_matching_learns_the_velocity_of_a_straight_path(flow):
    """If the network knows the image, the loss is 0, and sampling leads straight to the image."""
    spec = importlib.util.spec_from_file_location("flow", flow)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ddpm = module.SimpleDDPM(None, torch.linspace(0.01, 0.2, 50).double(), (1, 2, 2), "cpu")
    x_0, stages = torch.rand(500, 1, 2, 2) * 2 - 1, []

    def velocity(x_t, t):
        s = (t + 1).view(-1, 1, 1, 1) / 50  # x_t = (1−s) · x_0 + s · ε, so ε − x_0 is this:
        return (x_t - x_0[: len(x_t)]) / s

    ddpm.model = velocity
    assert ddpm.loss(x_0).item() < 1e-6
    x_1 = module.q_sample(x_0, torch.full((500,), 49), torch.ones_like(x_0), ddpm.alphas_cumprod)
    assert torch.allclose(x_1, torch.ones_like(x_0), atol=1e-6), "at the last t, only noise"
    assert torch.allclose(ddpm.sample(n=8, frames=stages), x_0[:8], atol=1e-4)
    assert all(torch.allclose(x_0_pred, x_0[:8], atol=1e-4) for _, _, x_0_pred in stages)


def test_flow_matching_runs_as_01_does(flow, project, monkeypatch):
    monkeypatch.setattr(visualize, "draw_digits", lambda: draw_digits(600))
    project.prepare("01_ddpm_toy.py", T=60, BASE_CH=8, EPOCHS=3, DATASET="DRAWN")
    done = project.run_here("01_ddpm_toy.py")
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss=([\d.]+)", done.stderr)]
    assert 0 < losses[-1] < 0.8 * losses[0]
    project.check_pictures("01_ddpm_toy.py", others=["weights.pt"])
