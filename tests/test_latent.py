"""05's autoencoder and its diffusion on latents, against closed forms."""

import math
import types

import numpy as np
import pytest
import torch
import torchvision
from conftest import load
from diffusers import DDIMScheduler
from torch import nn

from utils.visualize import draw_digits

script = load("05_latent_diffusion.py")
CPU = torch.device("cpu")


def make_vae(shape=(1, 28, 28), latent_ch=4, downsample=4):
    torch.manual_seed(0)
    vae = script.VAE(shape, 8, latent_ch, downsample)
    for parameter in vae.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return vae.eval()


# %% The autoencoder


@pytest.mark.parametrize(
    ("shape", "latent_ch", "downsample", "small"),
    [
        ((1, 28, 28), 4, 4, 8),
        ((1, 28, 28), 1, 4, 8),
        ((3, 32, 32), 4, 4, 8),
        ((3, 64, 64), 2, 2, 32),
        ((3, 64, 64), 2, 8, 8),
        ((3, 50, 50), 2, 4, 14),
        ((3, 13, 13), 2, 2, 8),
        ((1, 5, 5), 2, 8, 2),
    ],
)
def test_any_size_and_factor(shape, latent_ch, downsample, small):
    """Latents have an even side, so that the U-Net can halve it; padding is cut off again."""
    vae = make_vae(shape, latent_ch, downsample)
    x = (torch.rand(2, *shape) * 2 - 1).requires_grad_()
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (2, latent_ch, small, small)
    assert vae.latent_shape == mean.shape[1:] and vae.decode(mean).shape == x.shape
    reconstruction, mean_again, _ = vae(x)
    assert reconstruction.shape == x.shape and torch.equal(mean_again, mean)
    mean.sum().backward()
    assert (x.grad != 0).all(), "every pixel reaches the latents"
    strides = [layer.stride[0] for layer in vae.encoder.down if isinstance(layer, nn.Conv2d)]
    assert math.prod(strides) == downsample
    # Padding and cropping undo each other: with layers that change nothing, images come back.
    vae.encoder, vae.decoder = nn.Identity(), nn.Identity()
    padded = torch.cat(vae.encode(torch.cat([x, x], dim=1)), dim=1)
    assert padded.shape[-1] == downsample * small
    assert torch.equal(vae.reconstruct(padded)[:, : shape[0]], x)


@pytest.mark.parametrize("downsample", [1, 3, 16])
def test_another_factor_ends_with_one_line(downsample):
    with pytest.raises(SystemExit, match=f"DOWNSAMPLE = {downsample} does not work: use 2, 4 or 8"):
        make_vae(downsample=downsample)


def test_decoded_images_are_in_range_but_reconstructions_in_training_are_not_clamped():
    vae, z = make_vae(), 100 * torch.randn(4, 4, 8, 8)
    assert vae.decode(z).abs().max() <= 1 < vae.reconstruct(z).abs().max()


def test_loss_is_squared_error_and_kl_divergence_per_value():
    x, reconstruction = torch.randn(2, 6, 1, 28, 28)
    mean, log_variance = torch.randn(2, 6, 4, 8, 8)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    wanted = (x - reconstruction).square().mean() + 0.3 * kl.sum() / 6 / 784
    loss = script.vae_loss(x, reconstruction, mean, log_variance, 0.3)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    nothing = torch.zeros_like(mean)
    assert script.vae_loss(x, x, nothing, nothing, 0.3).item() == 0


def test_latents_are_drawn_with_their_deviation_and_let_gradients_through():
    vae = make_vae()
    reconstruction, mean, log_variance = vae(torch.randn(8, 1, 28, 28).clamp(-1, 1))
    for latent in mean, log_variance:
        (gradient,) = torch.autograd.grad(reconstruction.square().sum(), latent, retain_graph=True)
        assert gradient.abs().max() > 0
    vae.encode = lambda x: (torch.full((500, 4, 8, 8), 3.0), torch.full((500, 4, 8, 8), -2.0))
    vae.reconstruct = lambda z: z
    drawn, _, _ = vae(torch.zeros(500, 1, 28, 28))
    assert drawn.mean().item() == pytest.approx(3, abs=0.01)
    assert drawn.std().item() == pytest.approx(math.exp(-1), rel=0.01)


def test_the_autoencoder_learns(tmp_path):
    x = script.to_batch(draw_digits(192)[0][:, None])
    settings = {"BATCH_SIZE": 16, "EPOCHS": 3, "LEARNING_RATE": 0.02, "EMA_DECAY": 0.999}
    settings |= {"SEED": 0, "SAVE_EVERY": 99}
    vae = script.VAE((1, 28, 28), 4, 4)
    trained, _ = script.train(
        vae,
        lambda index: script.vae_loss(x[index], *vae(x[index]), 0.002),
        len(x),
        settings,
        (),
        tmp_path / "vae.pt",
    )
    with torch.no_grad():
        error = (trained.decode(trained.encode(x)[0]) - x).square().mean()
    assert error < 0.6 * (x - x.mean(0)).square().mean(), "far better than the mean image"


# %% The scale of the latents


def test_drawn_latents_have_variance_1_by_a_scale_that_is_saved_with_the_weights():
    vae, images = make_vae(), torch.randint(0, 256, (700, 1, 28, 28), dtype=torch.uint8)
    assert vae.scale == 1
    mean, deviation = script.encode_all(vae, images, 64)
    assert mean.shape == deviation.shape == (700, 4, 8, 8)
    drawn = mean + deviation * torch.randn_like(mean)
    assert (drawn * vae.scale).std().item() == pytest.approx(1, abs=0.01)
    assert abs(vae.scale - 1) > 0.1 and not vae.scale.requires_grad
    one, log_variance = vae.encode(script.to_batch(images[600:601]))
    assert torch.allclose(mean[600:601], one, atol=1e-5)
    assert torch.allclose(deviation[600:601], (log_variance / 2).exp(), atol=1e-5)
    other = make_vae()
    other.load_state_dict(vae.state_dict())
    assert other.scale == vae.scale
    script.encode_all(other, images, 64)
    assert other.scale == vae.scale, "it does not depend on an earlier one"


def test_scale_is_applied_on_the_way_in_and_undone_on_the_way_out():
    vae, x = make_vae(), torch.rand(3, 1, 28, 28) * 2 - 1
    vae.scale.fill_(0.25)
    ldm, (mean, log_variance) = make(None, vae=vae), vae.encode(x)
    draw = torch.randn_like(mean)
    assert torch.allclose(ldm.encode(x), 0.25 * mean)
    wanted = 0.25 * (mean + (log_variance / 2).exp() * draw)
    assert torch.allclose(ldm.encode(x, draw), wanted, atol=1e-6)
    assert torch.allclose(ldm.decode(ldm.encode(x)), vae.decode(mean), atol=1e-5)
    assert not torch.allclose(vae.decode(mean), vae.decode(4 * mean), atol=1e-2)


# %% Diffusion


def make(function, T=1000, scale=1.0, vae=None, schedule="cosine"):
    """Diffusion with a function of (z_t, t) as its network; without a VAE, latents are images."""
    nothing = types.SimpleNamespace(latent_shape=(4, 8, 8), decode=lambda z: z, scale=scale)
    return script.LatentDiffusion(function, vae or nothing, script.SCHEDULES[schedule](T), CPU)


MEAN, STD = 2.0, 0.8  # of latents whose v is known exactly; far outside of [-1, 1]


def oracle(alphas_cumprod):
    """E[v | z_t] = √ᾱ E[ε | z_t] − √(1−ᾱ) E[z_0 | z_t], values independent from N(MEAN, STD²)."""

    def v(z_t, t):
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        rest = (z_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        noise, z_0 = (1 - a).sqrt() * rest, MEAN + a.sqrt() * STD**2 * rest
        return a.sqrt() * noise - (1 - a).sqrt() * z_0

    return v


def v_of(z_0, alphas_cumprod):
    """The v of known latents: z_t = √ᾱ z_0 + √(1−ᾱ) ε gives ε, and v = √ᾱ ε − √(1−ᾱ) z_0."""

    def v(z_t, t):
        a = alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        noise = (z_t.double() - a.sqrt() * z_0) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * z_0).to(z_t.dtype)

    return v


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_with_an_oracle_gives_the_right_latents(eta):
    ldm = make(None, scale=0.5)
    ldm.model = oracle(ldm.alphas_cumprod)
    images = ldm.sample(60, 200, eta)
    assert images.mean().item() == pytest.approx(MEAN / 0.5, abs=0.06)
    assert images.std().item() == pytest.approx(STD / 0.5, rel=0.05)


def test_the_right_v_gives_the_latent_and_the_noise_that_were_mixed():
    ldm, asked = make(None), []
    z_0, noise = torch.randn(2, 3, 4, 8, 8)
    z_0 = MEAN + 3 * z_0
    right = v_of(z_0, ldm.alphas_cumprod)
    ldm.model = lambda z_t, t: asked.append(t) or right(z_t, t)
    for t in 0, 10, 700, 998, 999:
        z_t = script.q_sample(z_0, torch.full((3,), t), noise, ldm.alphas_cumprod)
        z_0_pred, noise_pred = ldm.predict(z_t, t)
        assert torch.equal(asked[-1], torch.full((3,), t))
        # At t = 0 the test's own ε is a small difference, divided by 0.006.
        assert torch.allclose(z_0_pred, z_0, atol=1e-4)
        assert torch.allclose(noise_pred, noise, atol=1e-3 if t == 0 else 1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_is_that_of_diffusers(schedule, eta):
    def network(z_t, t):
        return 4 * torch.sin(3 * z_t + t.view(-1, 1, 1, 1) / 100)

    ldm, betas = make(network, schedule=schedule), script.SCHEDULES[schedule](1000)
    scheduler = DDIMScheduler(
        trained_betas=betas.numpy(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # theirs has float32's digits
    scheduler.set_timesteps(50)
    for t in 999, 979, 499, 39, 19:
        z_t = torch.randn(3, 4, 8, 8)
        torch.manual_seed(7)
        ours, z_0_pred = ldm.ddim_step(z_t, t, t - 20, eta)
        torch.manual_seed(7)
        noise, answer = torch.randn_like(z_t), network(z_t, torch.full((3,), t))
        theirs = scheduler.step(answer, t, z_t, eta, variance_noise=noise)
        assert torch.allclose(ours, theirs.prev_sample, atol=1e-5), t
        assert torch.allclose(z_0_pred, theirs.pred_original_sample, atol=1e-5), t


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_loss_of_the_oracle_is_the_unavoidable_one(off):
    ldm = make(None)
    best = oracle(ldm.alphas_cumprod)
    ldm.model = lambda z_t, t: best(z_t, t) + off
    z_0 = MEAN + STD * torch.randn(4000, 4, 2, 2)
    # Var[z_0 | z_t] = (1−ᾱ) STD² / (ᾱ STD² + 1 − ᾱ), and v = (√ᾱ z_t − z_0) / √(1−ᾱ)
    a = ldm.alphas_cumprod.double()
    often = 2 * torch.arange(len(a)) + 1  # t = T · √u
    wanted = ((STD**2 / (a * STD**2 + 1 - a)) * often).sum().item() / often.sum().item()
    assert ldm.loss(z_0).item() == pytest.approx(wanted + off**2, rel=0.03)


def test_from_a_noisy_latent_on():
    """The steps are 04's early ones; the first is that of t, the last ends at the clean latent."""
    ldm, asked = make(None), []
    right = v_of(5, ldm.alphas_cumprod)
    ldm.model = lambda z_t, t: asked.append(t[0].item()) or right(z_t, t)
    z_0, noise = torch.full((2, 4, 8, 8), 5.0), torch.randn(2, 4, 8, 8)
    z_t = script.q_sample(z_0, torch.full((2,), 300), noise, ldm.alphas_cumprod)
    latents = ldm.denoise(z_t, 300, np.int64(7), np.float32(1))
    assert torch.allclose(latents, z_0, atol=1e-4)
    assert asked == [300, 293, 274, 243, 200, 145, 78]
    of_04 = load("04_ddim_fast_sampling.py").DDIM
    assert [*asked, -1] == of_04.timesteps(types.SimpleNamespace(T=301), 7, "early")
    asked.clear()
    ldm.denoise(z_t, 300, 301)
    assert asked == [*range(300, -1, -1)]


def test_bad_numbers_of_steps_and_bad_eta():
    ldm = make(None)
    for eta in -0.1, 2, float("nan"):
        with pytest.raises(ValueError, match="eta = "):
            ldm.sample(2, eta=eta)
    for steps in 0, 1001, 2.5, "x":
        with pytest.raises(ValueError, match=r"ddim_steps = .* a whole number, 1 to 1000"):
            ldm.sample(2, steps)
    with pytest.raises(ValueError, match="1 to 6"):
        ldm.denoise(torch.zeros(2, 4, 8, 8), 5, 7)


def test_frames_are_images():
    ldm, frames = make(lambda z_t, t: z_t, vae=make_vae()), []
    images = ldm.sample(3, 5, frames=frames)
    assert [t for t, _, _ in frames] == [999, 958, 838, 638, 358, -1]
    assert all(x.shape == y.shape == (3, 1, 28, 28) for _, x, y in frames)
    assert torch.equal(frames[-1][1], images)


# %% Test images


def test_drawn_test_images_are_others():
    images = draw_digits(100)[0][:, None]
    kept, test = script.hold_out(images, "DRAWN", "nowhere")
    assert kept is images and test.shape == (1000, 1, 28, 28) and test.dtype == torch.uint8
    assert not (test[:, None] == images[None, :50]).flatten(2).all(2).any()


def test_those_of_a_dataset_are_its_own(project, monkeypatch):
    data, (images, labels) = project.folder / "data", draw_digits(50, seed=3)
    project.lay_mnist(images, labels)
    train = torch.zeros(7, 1, 28, 28)
    kept, test = script.hold_out(train, "MNIST", data)
    assert kept is train and torch.equal(test, images[:, None])
    project.lay_cifar10(50)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    kept, test = script.hold_out(train, "CIFAR10", data)
    assert kept is train and test.shape == (10, 3, 32, 32) and test.dtype == torch.uint8
    assert (test == test[:, :, :1, :1]).all(), "each image is of one colour"


@pytest.mark.parametrize("name", ["holiday/", "celeba/", "MNIST/", "DRAWN/"])  # folders
def test_of_ones_own_images_every_twentieth_is_kept_back(name):
    for count in 1, 39, 40, 41, 25_000:
        images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        kept, test = script.hold_out(images, name, "nowhere")
        numbers = test[:, 0, 0, 0].tolist()
        assert numbers == list(range(0, count, 20))[:1000]
        assert len(kept) == count - math.ceil(count / 20)
        assert not set(numbers) & set(kept[:, 0, 0, 0].tolist())
