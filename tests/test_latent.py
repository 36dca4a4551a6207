"""05's autoencoder and its diffusion on latents, against closed forms."""

import copy
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


def make_vae(shape=(1, 28, 28), latent_ch=4, random=True):
    torch.manual_seed(0)
    vae = script.VAE(shape, 8, latent_ch)
    for parameter in vae.parameters():
        if random and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return vae.eval()


# %% The autoencoder


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 32, 32), (3, 28, 28)])
@pytest.mark.parametrize("latent_ch", [1, 4])
def test_shapes(shape, latent_ch):
    vae = make_vae(shape, latent_ch)
    x = torch.rand(5, *shape) * 2 - 1
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (5, latent_ch, 8, 8)
    assert vae.decode(mean).shape == x.shape
    reconstruction, mean_again, _ = vae(x)
    assert reconstruction.shape == x.shape and torch.equal(mean_again, mean)


@pytest.mark.parametrize(
    ("side", "downsample", "small"),
    [
        (28, 4, 8),
        (32, 4, 8),
        (64, 2, 32),
        (64, 4, 16),
        (64, 8, 8),
        (50, 4, 14),
        (13, 2, 8),
        (5, 8, 2),
    ],
)
def test_any_size_and_factor(side, downsample, small):
    """Latents have an even side, so that the U-Net can halve it; padding is cut off again."""
    vae = script.VAE((3, side, side), 4, 2, downsample).eval()
    x = torch.rand(2, 3, side, side) * 2 - 1
    assert vae.latent_shape == (2, small, small)
    assert vae.encode(x)[0].shape == (2, *vae.latent_shape)
    assert vae.decode(vae.encode(x)[0]).shape == x.shape
    convolutions = [layer.stride[0] for layer in vae.encoder.down if isinstance(layer, nn.Conv2d)]
    assert math.prod(convolutions) == downsample
    vae.encoder, vae.decoder = nn.Identity(), nn.Identity()
    padded = torch.cat(vae.encode(torch.cat([x, x], dim=1)), dim=1)
    assert padded.shape[-1] == downsample * small
    assert torch.equal(vae.reconstruct(padded)[:, :3], x)


def test_decoded_images_are_in_range_but_reconstructions_in_training_are_not_clamped():
    vae = make_vae()
    z = 100 * torch.randn(4, 4, 8, 8)
    assert vae.decode(z).min() >= -1 and vae.decode(z).max() <= 1
    assert vae.reconstruct(z).abs().max() > 1


def test_every_pixel_reaches_the_latents_and_comes_back_at_its_place():
    vae = make_vae()
    x = torch.zeros(1, 1, 28, 28, requires_grad=True)
    vae.encode(x)[0].sum().backward()
    assert (x.grad != 0).all()
    # Padding and cropping undo each other: with layers that change nothing, images come back.
    vae.encoder, vae.decoder = nn.Identity(), nn.Identity()
    x = torch.randn(2, 2, 28, 28)
    padded = torch.cat(vae.encode(x), dim=1)
    assert padded.shape == (2, 2, 32, 32)
    assert torch.equal(vae.reconstruct(padded), x)


def test_loss_is_squared_error_and_kl_divergence_per_value():
    x, reconstruction = torch.randn(6, 1, 28, 28), torch.randn(6, 1, 28, 28)
    mean, log_variance = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    wanted = (x - reconstruction).square().mean() + 0.3 * kl.sum() / 6 / 784
    loss = script.vae_loss(x, reconstruction, mean, log_variance, 0.3)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    nothing = torch.zeros_like(mean)
    assert script.vae_loss(x, x, nothing, nothing, 0.3).item() == 0
    less = script.vae_loss(x, x, mean, log_variance, 0.1)
    assert script.vae_loss(x, x, mean, log_variance, 0.2).item() == pytest.approx(2 * less.item())


def test_reparameterisation_lets_gradients_through_to_mean_and_deviation():
    vae = make_vae()
    reconstruction, mean, log_variance = vae(torch.randn(8, 1, 28, 28).clamp(-1, 1))
    for latent in mean, log_variance:
        (gradient,) = torch.autograd.grad(reconstruction.square().sum(), latent, retain_graph=True)
        assert gradient.abs().max() > 0


def test_latents_are_drawn_with_their_deviation():
    vae = make_vae()
    vae.encode = lambda x: (torch.full((500, 4, 8, 8), 3.0), torch.full((500, 4, 8, 8), -2.0))
    drawn = []
    vae.reconstruct = drawn.append
    vae(torch.zeros(500, 1, 28, 28))
    assert drawn[0].mean().item() == pytest.approx(3, abs=0.01)
    assert drawn[0].std().item() == pytest.approx(math.exp(-1), rel=0.01)


# %% Scaling


def test_scaled_latents_have_unit_variance():
    vae = make_vae()
    images = torch.randint(0, 256, (700, 1, 28, 28), dtype=torch.uint8)
    mean, deviation, scale = script.encode_all(vae, images, 64)
    assert mean.shape == deviation.shape == (700, 4, 8, 8)
    drawn = mean + deviation * torch.randn_like(mean)
    assert (drawn * scale).std().item() == pytest.approx(1, abs=0.01)
    one, log_variance = vae.encode(script.to_batch(images[600:601]))
    assert torch.allclose(mean[600:601], one, atol=1e-5)
    assert torch.allclose(deviation[600:601], (log_variance / 2).exp(), atol=1e-5)


# %% Diffusion


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z_t, t):
        return self.function(z_t, t)


class PlainVAE(nn.Module):
    """Latents are the image's own values."""

    def encode(self, x):
        return x, torch.full_like(x, -30.0)

    def decode(self, z):
        return z


def make(function, T=1000, scale=1.0, vae=None, shape=(4, 8, 8)):
    betas = script.cosine_beta_schedule(T)
    model = Network(function)
    return script.LatentDiffusion(model, vae or PlainVAE(), scale, betas, shape, CPU)


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
    ldm.model = Network(oracle(ldm.alphas_cumprod))
    images = ldm.sample(60, 200, eta)
    assert images.mean().item() == pytest.approx(MEAN / 0.5, abs=0.06)
    assert images.std().item() == pytest.approx(STD / 0.5, rel=0.05)


def test_no_clamp_touches_the_latents():
    """A latent of 5 survives, in a step and in the whole way."""
    ldm = make(None)
    ldm.model = Network(v_of(5, ldm.alphas_cumprod))
    _, z_0_pred = ldm.ddim_step(torch.randn(3, 4, 8, 8), 600, 500, 0.0)
    assert torch.allclose(z_0_pred, torch.tensor(5.0), atol=1e-4)
    assert torch.allclose(ldm.sample(3, 20), torch.tensor(5.0), atol=1e-4)


def test_the_right_v_gives_the_latent_and_the_noise_that_were_mixed():
    ldm = make(None)
    z_0, noise = torch.randn(2, 3, 4, 8, 8)
    z_0, asked = MEAN + 3 * z_0, []
    right = v_of(z_0, ldm.alphas_cumprod)
    ldm.model = Network(lambda z_t, t: asked.append(t) or right(z_t, t))
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
    betas = getattr(script, f"{schedule}_beta_schedule")(1000)
    network = Network(lambda z_t, t: 4 * torch.sin(3 * z_t + t.view(-1, 1, 1, 1) / 100))
    ldm = script.LatentDiffusion(network, PlainVAE(), 1.0, betas, (4, 8, 8), CPU)
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
        noise = torch.randn_like(z_t)
        answer = network(z_t, torch.full((3,), t))
        theirs = scheduler.step(answer, t, z_t, eta, variance_noise=noise)
        assert torch.allclose(ours, theirs.prev_sample, atol=1e-5), t
        assert torch.allclose(z_0_pred, theirs.pred_original_sample, atol=1e-5), t


def test_scale_is_applied_on_the_way_in_and_undone_on_the_way_out():
    ldm = make(None, scale=0.25)
    x = torch.randn(3, 4, 8, 8)
    assert torch.allclose(ldm.encode(x), 0.25 * x)
    assert torch.allclose(ldm.decode(ldm.encode(x)), x)
    vae = make_vae((4, 8, 8))
    ldm = make(None, scale=0.25, vae=vae)
    mean, log_variance = vae.encode(x)
    draw = torch.randn_like(mean)
    wanted = 0.25 * (mean + (log_variance / 2).exp() * draw)
    assert torch.allclose(ldm.encode(x, draw), wanted, atol=1e-6)


def test_loss_of_the_oracle_is_the_unavoidable_one():
    ldm = make(None)
    ldm.model = Network(oracle(ldm.alphas_cumprod))
    z_0 = MEAN + STD * torch.randn(4000, 4, 2, 2)
    # Var[z_0 | z_t] = (1−ᾱ) STD² / (ᾱ STD² + 1 − ᾱ), and v = (√ᾱ z_t − z_0) / √(1−ᾱ)
    a = ldm.alphas_cumprod.double()
    wanted = (STD**2 / (a * STD**2 + 1 - a)).mean().item()
    assert ldm.loss(z_0).item() == pytest.approx(wanted, rel=0.03)
    best = ldm.model.function
    ldm.model = Network(lambda z_t, t: best(z_t, t) + 0.5)
    assert ldm.loss(z_0).item() == pytest.approx(wanted + 0.5**2, rel=0.03)


def test_from_a_noisy_latent_on():
    """The steps are 04's early ones; the first is that of t, the last ends at the clean latent."""
    asked = []

    def function(z_t, t):
        asked.append(t[0].item())
        return oracle(ldm.alphas_cumprod)(z_t, t)

    ldm = make(function)
    z_0 = torch.full((2, 4, 8, 8), MEAN)
    t = torch.full((2,), 300)
    z_t = script.q_sample(z_0, t, torch.randn_like(z_0), ldm.alphas_cumprod)
    ldm.denoise(z_t, 300, np.int64(7), np.float32(1))
    assert asked == [300, 293, 274, 243, 200, 145, 78]
    of_04 = load("04_ddim_fast_sampling.py").DDIM
    assert [*asked, -1] == of_04.timesteps(types.SimpleNamespace(T=301), 7, "early")
    asked.clear()
    ldm.denoise(z_t, 300, 301)
    assert asked == [*range(300, -1, -1)]
    for eta in -0.1, 2, float("nan"):
        with pytest.raises(ValueError, match="eta = "):
            ldm.sample(2, eta=eta)
    with pytest.raises(ValueError, match="1 to 6"):
        ldm.denoise(z_t, 5, 7)
    ldm.model = Network(v_of(5, ldm.alphas_cumprod))
    latents = ldm.denoise(z_t, 300, 7)
    assert torch.allclose(latents, torch.tensor(5.0), atol=1e-4)
    for steps in 0, 1001, 2.5, "x":
        with pytest.raises(ValueError, match="ddim_steps = "):
            ldm.sample(2, steps)


def test_frames_are_images():
    ldm = make(lambda z_t, t: z_t, vae=make_vae(), scale=0.5)
    frames = []
    images = ldm.sample(3, 5, frames=frames)
    assert [t for t, _, _ in frames] == [999, 958, 838, 638, 358, -1]
    assert all(x.shape == y.shape == (3, 1, 28, 28) for _, x, y in frames)
    assert torch.equal(frames[-1][1], images)


# %% Two stages, two files

SETTINGS = {
    "DATASET": "DRAWN",
    "IMAGE_SHAPE": (1, 28, 28),
    "LATENT_SHAPE": (4, 8, 8),
    "LATENT_CH": 4,
    "VAE_CH": 8,
    "DOWNSAMPLE": 4,
    "VAE_EPOCHS": 1,
    "KL_WEIGHT": 0.002,
    "T": 30,
    "SCHEDULE": "linear",
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "ATTENTION_AT": (8,),
    "DROPOUT": 0.0,
    "FLIP": False,
    "EPOCHS": 1,
    "BATCH_SIZE": 32,
    "LEARNING_RATE": 0.02,
    "EMA_DECAY": 0.999,
    "SAVE_EVERY": 99,
    "PREVIEW_EVERY": 99,
    "SEED": 0,
}


def train_vae(images, path, **changes):
    torch.manual_seed(0)
    vae = script.VAE((1, 28, 28), 8, 4)
    return script.train_vae(vae, images, {**SETTINGS, **changes}, path, 0, 1)


def test_the_autoencoder_learns_and_its_digest_tells_weights_apart(tmp_path):
    images = script.draw_digits(192)[0][:, None]
    trained = train_vae(images, tmp_path / "vae.pt", BATCH_SIZE=16, VAE_EPOCHS=3)
    x = script.to_batch(images)
    with torch.no_grad():
        error = (trained.decode(trained.encode(x)[0]) - x).square().mean()
    assert error < 0.6 * (x - x.mean(0)).square().mean(), "far better than the mean image"
    digest = script.digest_of(trained)
    assert digest == script.digest_of(copy.deepcopy(trained))
    weight = trained.decoder.conv_out.bias
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert digest != script.digest_of(trained), "the last bit of one weight counts"


@pytest.mark.parametrize(("size", "other"), [(40, 16), (60, 50), (30, 60)])
def test_a_finished_autoencoder_stays_as_it_is_with_another_batch_size(tmp_path, size, other):
    """Otherwise the second stage, trained on the latents of the old one, would be lost."""
    images = script.draw_digits(200)[0][:, None]
    path = tmp_path / "vae.pt"
    digest = script.digest_of(train_vae(images, path, BATCH_SIZE=size))
    changes = {"BATCH_SIZE": other, "LEARNING_RATE": 0.01, "EPOCHS": 7, "SAVE_EVERY": 1}
    assert digest == script.digest_of(train_vae(images, path, **changes))


def test_stage_1_does_not_care_about_settings_of_stage_2_but_about_its_own(tmp_path):
    images = script.draw_digits(64)[0][:, None]
    path = tmp_path / "vae.pt"
    before = script.digest_of(train_vae(images, path))
    again = train_vae(images, path, BASE_CH=16, T=7, SCHEDULE="cosine", EPOCHS=9)
    assert script.digest_of(again) == before
    contents = path.read_bytes()
    for name in "KL_WEIGHT", "VAE_CH", "LATENT_CH", "DATASET", "VAE_EPOCHS":
        with pytest.raises(SystemExit, match=f"{name} was .* and now is 99"):
            train_vae(images, path, **{name: 99})
    assert path.read_bytes() == contents


def test_a_checkpoint_describes_itself(tmp_path, monkeypatch):
    """Network, autoencoder, scale and schedule are those in the file, not those of the script."""
    vae = make_vae()
    state = {"settings": SETTINGS, "extras": {"vae": vae.state_dict(), "scale": 0.25}}
    fresh = script.LatentDiffusion.build(state, CPU)
    assert any(weight.requires_grad for weight in fresh.model.parameters()), "to be trained"
    assert not any(weight.requires_grad for weight in fresh.vae.parameters()), "trained already"
    for parameter in fresh.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "checkpoint.pt"
    script.save_atomically({**state, "averaged": fresh.model.state_dict()}, path)
    monkeypatch.setattr(script, "pick_device", lambda: CPU)
    for name, value in {"BASE_CH": 99, "VAE_CH": 99, "T": 5, "LATENT_CH": 1}.items():
        monkeypatch.setattr(script, name, value)
    ldm = script.load(path)
    assert isinstance(ldm, script.LatentDiffusion)
    assert ldm.T == 30 and ldm.scale == 0.25 and ldm.latent_shape == (4, 8, 8)
    linear = torch.cumprod(1 - script.linear_beta_schedule(30), 0).float()
    assert torch.equal(ldm.alphas_cumprod, linear)
    for one, other in (ldm.model, fresh.model), (ldm.vae, vae):
        assert not one.training and not any(w.requires_grad for w in one.parameters())
        for name, weight in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], weight), name
    x = script.to_batch(script.draw_digits(3)[0][:, None])
    assert torch.allclose(ldm.encode(x), 0.25 * vae.encode(x)[0], atol=1e-5)
    assert ldm.sample(2, 5).shape == (2, 1, 28, 28)


# %% Test images and the bill


def test_drawn_test_images_are_others():
    images = script.draw_digits(100)[0][:, None]
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


def test_training_cost_counts_what_is_kept():
    weight = torch.ones(1000, requires_grad=True)
    seconds, megabytes = script.training_cost(lambda: weight.exp().sum())
    assert megabytes == pytest.approx(0.004) and 0 < seconds < 1
