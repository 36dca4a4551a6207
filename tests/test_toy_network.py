"""The network of 01: shapes, dependence on t, and that it can learn."""

import pytest
import torch
from conftest import load

toy = load("01_ddpm_toy.py")
CPU = torch.device("cpu")
ALPHAS_CUMPROD = torch.cumprod(1 - toy.linear_beta_schedule(1000), dim=0).float()


def make_model(channels=1, base_ch=8, random=True):
    """A network; `random` also fills the layers that start at zero and would hide everything."""
    torch.manual_seed(0)
    model = toy.SimpleUNet(channels, base_ch, ALPHAS_CUMPROD)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_ddpm(T, base_ch=8, image_shape=(1, 8, 8)):
    torch.manual_seed(0)
    betas = toy.linear_beta_schedule(T)
    model = toy.SimpleUNet(1, base_ch, torch.cumprod(1 - betas, dim=0).float())
    return toy.DDPM(model, betas, image_shape, CPU)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (1, 32), (3, 64)])
@pytest.mark.parametrize("base_ch", [1, 8, 20])
def test_output_has_the_shape_of_the_input(channels, side, base_ch):
    model = make_model(channels, base_ch)
    x_t = torch.randn(2, channels, side, side)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_prediction_depends_on_image_and_timestep():
    model = make_model()
    x_t = torch.randn(1, 1, 28, 28)
    answer = model(x_t, torch.tensor([10]))
    assert (model(x_t, torch.tensor([500])) - answer).abs().max() > 1e-3
    assert (model(x_t + 0.1, torch.tensor([10])) - answer).abs().max() > 1e-3


def test_images_in_a_batch_do_not_influence_each_other():
    model = make_model()
    x_t, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 10, 500, 999])
    together = model(x_t, t)
    for i in range(4):
        alone = model(x_t[i : i + 1], t[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-3, rtol=1e-3)


def test_skip_connections_carry_the_finest_detail():
    """One changed pixel must be able to change the prediction for that pixel most of all."""
    model = make_model()
    x_t = torch.randn(1, 1, 28, 28, requires_grad=True)
    model(x_t, torch.tensor([100]))[0, 0, 13, 13].backward()
    gradient = x_t.grad[0, 0].abs()
    assert gradient[10:17, 10:17].mean() > 2 * gradient.mean()


def test_timestep_embedding():
    t = torch.arange(1000)
    embedding = toy.timestep_embedding(t, 32)
    assert embedding.shape == (1000, 32)
    assert torch.allclose(embedding[0], torch.tensor([0.0] * 16 + [1.0] * 16))
    assert torch.allclose(embedding[:, 0], t.float().sin(), atol=1e-4)
    assert torch.cdist(embedding, embedding).fill_diagonal_(9).min() > 0.1, "no two steps alike"


def test_overfits_one_small_batch():
    """Four images, seen over and over: the loss must fall far, and sampling must give them back."""
    ddpm = make_ddpm(T=100, base_ch=32)
    originals = (torch.rand(4, 1, 8, 8) > 0.5).byte() * 255
    losses = toy.train(ddpm, originals.repeat(16, 1, 1, 1), 400, 64, 0.02)
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    samples = ddpm.sample(n=32)
    distances = torch.cdist(samples.flatten(1), originals.flatten(1).float() / 127.5 - 1)
    nearest, which = distances.min(dim=1)
    assert (nearest < 3).float().mean() > 0.9, "two random images are about 11 apart"
    assert len(which.unique()) == 4, "each of the four comes up"


def test_untrained_network_is_the_best_guess_for_unit_gaussian_pixels():
    """E[ε | x_t] = √(1−ᾱ_t) · x_t for data from N(0, 1); training only has to learn the rest."""
    model = make_model(random=False)
    x_t, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 400, 999])
    expected = (1 - ALPHAS_CUMPROD[t]).sqrt().view(-1, 1, 1, 1) * x_t
    assert torch.allclose(model(x_t, t), expected, atol=1e-6)


def test_sampling_gives_no_gradients_and_follows_the_seed():
    ddpm = make_ddpm(T=10)
    torch.manual_seed(1)
    first = ddpm.sample(n=2)
    torch.manual_seed(1)
    assert torch.equal(ddpm.sample(n=2), first)
    assert not torch.equal(ddpm.sample(n=2), first)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_device_is_picked_by_what_is_there(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert toy.pick_device().type == expected
