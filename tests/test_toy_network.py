"""The network of 01 and its training: shapes, dependence on t, and that it can learn."""

import pytest
import torch
from conftest import load
from torch import nn

toy = load("01_ddpm_toy.py")
CPU = torch.device("cpu")


def make_model(channels=1, base_ch=8):
    """A network without zeros in it: the layers that start at zero would hide everything."""
    model = toy.SimpleUNet(channels, base_ch)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def make_ddpm(T, base_ch=8, image_shape=(1, 8, 8)):
    model = toy.SimpleUNet(image_shape[0], base_ch)
    return toy.SimpleDDPM(model, toy.linear_beta_schedule(T), image_shape, CPU)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("base_ch", [1, 8, 20])
def test_output_has_the_shape_of_the_input(channels, side, base_ch):
    model, x_t = make_model(channels, base_ch), torch.randn(2, channels, side, side)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_prediction_depends_on_image_and_timestep_and_on_no_other_image():
    model = make_model()
    x_t, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 10, 500, 999])
    together = model(x_t, t)
    for i in range(4):
        x, step = x_t[i : i + 1], t[i : i + 1]
        alone = model(x, step)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-3, rtol=1e-3)
        for other in model(x, (step + 400) % 1000), model(torch.randn_like(x), step):
            assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("cut", "before"), [("up_28", "conv_in"), ("up_14", "down_14")])
def test_skip_connections_lead_past_the_lower_levels(cut, before):
    """With the way up from below cut off, what comes before still matters: through the skip."""
    model = make_model()
    torch.nn.init.zeros_(getattr(model, cut).weight)
    model(torch.randn(1, 1, 28, 28), torch.tensor([100])).square().sum().backward()
    assert getattr(model, before).weight.grad.abs().max() > 1e-3
    assert model.block_7b.conv_2.weight.grad.abs().max() == 0, "the way up is cut off"


def test_timestep_embedding():
    t = torch.arange(1000)
    embedding = toy.timestep_embedding(t, 32)
    assert embedding.shape == (1000, 32)
    assert torch.allclose(embedding[0], torch.tensor([0.0] * 16 + [1.0] * 16))
    assert torch.allclose(embedding[:, 0], t.float().sin(), atol=1e-4)
    assert torch.cdist(embedding, embedding).fill_diagonal_(9).min() > 0.1, "no two steps alike"


def test_new_network_knows_nothing_and_says_so():
    """One answer to everything, near 0, the mean of all noise: the loss is the noise's variance."""
    ddpm = make_ddpm(T=1000, image_shape=(1, 28, 28))
    answers = ddpm.model(torch.randn(2, 1, 28, 28), torch.tensor([0, 999]))
    assert answers.unique().numel() == 1 and answers.abs().max() < 0.25
    assert ddpm.loss(torch.zeros(64, 1, 28, 28)).item() == pytest.approx(1, abs=0.1)


def test_loss_reaches_every_weight():
    """All weights get a gradient; only those before a layer that starts at zero wait for a step."""
    ddpm = make_ddpm(T=100, image_shape=(3, 8, 8))
    optimizer = torch.optim.Adam(ddpm.model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        ddpm.loss(torch.rand(8, 3, 8, 8)).backward()
        optimizer.step()
    for name, weight in ddpm.model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


class Recorder:
    """Stands in for a SimpleDDPM: notes what it is trained with; can press Ctrl-C."""

    def __init__(self, interrupt_at=None):
        self.model, self.batches, self.interrupt_at = nn.Linear(1, 1), [], interrupt_at

    def loss(self, x_0):
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt
        self.batches.append(x_0)
        return self.model.weight.square().sum()


def test_training_shows_each_image_once_per_epoch_in_another_order():
    images = torch.arange(0, 250, 25).byte().view(10, 1, 1, 1)  # ten images of one pixel
    ddpm = Recorder()
    losses = toy.simple_train(ddpm, images, epochs=2, batch_size=4, learning_rate=0.01)
    assert [len(batch) for batch in ddpm.batches] == [4, 4, 2] * 2, "the last batch may be smaller"
    epochs = torch.cat(ddpm.batches).flatten().view(2, 10)
    for epoch in epochs:
        assert torch.allclose(epoch.sort().values, images.flatten().float() / 127.5 - 1)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 100])
def test_training_can_have_any_number_of_steps(steps):
    losses = toy.simple_train(Recorder(), torch.zeros(steps, 1, 1, 1).byte(), 1, 1, 0.01)
    assert len(losses) == steps


def test_ctrl_c_ends_training_and_keeps_what_was_learned(capsys):
    ddpm = Recorder(interrupt_at=5)
    try:
        losses = toy.simple_train(ddpm, torch.zeros(10, 1, 1, 1).byte(), 3, 4, 0.01)
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C ended everything")  # instead of ending pytest too
    assert len(losses) == 5
    assert "Training ended early" in capsys.readouterr().out


def test_overfits_one_small_batch():
    """Four images, seen over and over: the loss must fall far, and sampling must give them back."""
    ddpm = make_ddpm(T=100, base_ch=32, image_shape=(1, 4, 4))
    originals = (torch.rand(4, 1, 4, 4) > 0.5).byte() * 255
    losses = toy.simple_train(ddpm, originals.repeat(8, 1, 1, 1), 180, 32, 0.01)
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    samples = ddpm.sample(n=32)
    distances = torch.cdist(samples.flatten(1), originals.flatten(1).float() / 127.5 - 1)
    nearest, which = distances.min(dim=1)
    assert (nearest < 2).float().mean() > 0.9, "two random images are about 5.6 apart"
    assert len(which.unique()) == 4, "each of the four comes up"


def test_sampling_gives_no_gradients_and_follows_the_seed():
    ddpm = make_ddpm(T=10)
    torch.manual_seed(1)
    first = ddpm.sample(n=2)
    torch.manual_seed(1)
    assert torch.equal(ddpm.sample(n=2), first)
    assert not torch.equal(ddpm.sample(n=2), first)
    assert not first.requires_grad
