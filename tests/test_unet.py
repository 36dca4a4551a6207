"""The network of 02: shapes, attention where it was asked for, dependence on t, precision."""

import math

import pytest
import torch
from conftest import load

script = load("02_ddpm.py")


def make_model(
    shape=(1, 28, 28), base_ch=8, ch_mult=(1, 2, 2), num_blocks=1, attention_at=(14, 16), **options
):
    """A network without zeros in it: the layers that start at zero would hide everything."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "precision": torch.float32, **options}
    model = script.UNet(shape, base_ch, ch_mult, num_blocks, attention_at, **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    return model.eval()


def blocks(model):
    return [m for m in model.modules() if isinstance(m, script.ResBlock)]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 30, 30), (1, 7, 7)])
@pytest.mark.parametrize(
    "form", [(8, (1, 2, 2), 1), (5, (2, 1, 3), 2), (1, (1,), 1), (1, 8 * (1,), 1)]
)
def test_output_has_the_shape_of_the_input(shape, form):
    model, x_t = make_model(shape, *form), torch.randn(2, *shape)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_the_drawing_shows_the_network():
    """28 × 28: one block, on the way up; 14 × 14: one on each side; 7 × 7: one, then the middle."""
    model, passed = make_model(base_ch=32, ch_mult=(1 / 4, 1, 2), attention_at=()), []
    for block in blocks(model):
        hook = lambda module, args, out: passed.append((args[0].shape[1], *out.shape[1:3]))  # noqa: E731
        block.register_forward_hook(hook)
    model(torch.randn(1, 1, 28, 28), torch.tensor([5]))
    down, middle, up = [(32, 32, 14), (64, 64, 7)], 2 * [(64, 64, 7)], [(64, 32, 14), (16, 8, 28)]
    assert passed == [*down, *middle, *up], "channels in and out, and the side"


@pytest.mark.parametrize(
    ("shape", "attention_at", "expected"),
    [
        ((1, 28, 28), (14, 16), {14}),
        ((3, 32, 32), (14, 16), {16}),
        ((1, 28, 28), (28, 7), {28, 7}),
        ((3, 30, 30), (8, 15), {8, 15}),  # 30 / 4, rounded up
        ((1, 28, 28), (), set()),
    ],
)
def test_attention_is_where_it_was_asked_for(shape, attention_at, expected):
    """Seen by the sides of the images that really pass through each block's attention."""
    model = make_model(shape, attention_at=attention_at)
    sides = {True: set(), False: set()}
    for block in blocks(model):
        has = isinstance(block.attention, script.Attention)
        if block in (model.middle_1, model.middle_2):
            assert has == (block is model.middle_1), "the middle always has it, once"
        else:
            hook = lambda module, args, out, has=has: sides[has].add(out.shape[-1])  # noqa: E731
            block.register_forward_hook(hook)
    model(torch.randn(1, *shape), torch.tensor([5]))
    assert sides[True] == expected
    assert sides[False] == {math.ceil(shape[1] / n) for n in (1, 2, 4)} - expected


def test_attention_is_softmax_of_scaled_products():
    attention = script.Attention(128)  # two heads of 64
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    x = torch.randn(2, 128, 4, 4)
    query, key, value = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)  # (B, 128, 16)
    heads = []
    for q, k, v in zip(query.split(64, 1), key.split(64, 1), value.split(64, 1)):
        weights = torch.softmax(torch.einsum("bdi,bdj->bij", q, k) / math.sqrt(64), dim=-1)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v))
    expected = x + attention.out(torch.cat(heads, dim=1).view(2, 128, 4, 4))
    assert attention.heads == 2
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_attention_reaches_across_the_image_where_convolutions_do_not():
    def reach(attention_at):
        model = make_model((1, 64, 64), ch_mult=(1, 1), attention_at=attention_at)
        model.middle_1.attention = torch.nn.Identity()
        for norm in model.modules():  # GroupNorm, too, carries a little from everywhere
            if isinstance(norm, torch.nn.GroupNorm):
                norm.forward = lambda x: x
        x_t = torch.randn(1, 1, 64, 64, requires_grad=True)
        model(x_t, torch.tensor([100]))[0, 0, 0, 0].backward()
        return x_t.grad[0, 0, 63, 63].abs().item()

    assert reach(()) == 0
    assert reach((32,)) > 0


def test_prediction_depends_on_image_and_timestep_in_every_block():
    model, x_t, t = make_model(), torch.randn(1, 1, 28, 28), torch.tensor([10])
    assert (model(x_t + 0.1, t) - model(x_t, t)).abs().max() > 1e-3
    for block in blocks(model):
        x = torch.randn(1, block.norm_1.num_channels, 4, 4)
        answers = [
            block(x, model.time(script.timestep_embedding(s, model.time[0].in_features)))
            for s in (t, t + 500)
        ]
        assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_images_in_a_batch_do_not_influence_each_other():
    model = make_model()
    x_t, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 10, 500, 999])
    together = model(x_t, t)
    for i in range(4):
        alone = model(x_t[i : i + 1], t[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)


def test_at_first_every_block_is_its_shortcut_and_the_answer_is_zero():
    torch.manual_seed(0)
    model = script.UNet((1, 28, 28), 8, (1, 2, 2), 1, (14,), 0.0, torch.float32)
    for block in blocks(model):
        x = torch.randn(2, block.norm_1.num_channels, 4, 4)
        assert torch.equal(block(x, torch.randn(2, 32)), block.shortcut(x))
    x_t, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 400, 999])
    assert torch.equal(model(x_t, t), torch.zeros_like(x_t))


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, x_t, t = make_model(dropout=0.5), torch.randn(1, 1, 28, 28), torch.tensor([10])
    assert torch.equal(model(x_t, t), model(x_t, t))
    model.train()
    assert not torch.equal(model(x_t, t), model(x_t, t))


def test_group_norm_divides_any_width():
    for ch in (1, 3, 8, 12, 20, 64):
        groups = script.GroupNorm(ch).num_groups
        assert ch % groups == 0 and (groups == 1 or ch / groups >= 8), "as in its docstring"
    assert script.GroupNorm(64).num_groups == 8


def test_group_norm_keeps_16_bits_and_is_pytorchs():
    norm, x = script.GroupNorm(16), torch.randn(2, 16, 4, 4)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), expected, atol=0.05)


def test_lower_precision_changes_little_and_answers_in_float32():
    exact, rounded = make_model(), make_model(precision=torch.bfloat16)
    x_t, t = torch.randn(2, 1, 28, 28), torch.tensor([10, 900])
    difference = (exact(x_t, t) - rounded(x_t, t)).abs().max()
    assert rounded(x_t, t).dtype == torch.float32
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", False, torch.float32),
        ("mps", False, torch.float32),
    ],
)
def test_precision_is_picked_by_the_hardware(monkeypatch, device, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert script.best_precision(torch.device(device)) == expected


def test_a_block_is_what_its_docstring_says():
    """Two convolutions, conditioned on t by a scale and a shift, and a shortcut."""
    torch.manual_seed(0)
    block = script.ResBlock(8, 16, 12, dropout=0.0)
    torch.nn.init.normal_(block.conv_2.weight, std=0.1)
    x, time = torch.randn(2, 8, 5, 5), torch.randn(2, 12)
    silu, mean = torch.nn.functional.silu, lambda h: h.mean((2, 3, 4), keepdim=True)

    def normed(h):  # groups of 8 channels
        h = h.view(2, -1, 8, 5, 5)
        return ((h - mean(h)) / (mean((h - mean(h)) ** 2) + 1e-5).sqrt()).flatten(1, 2)

    scale, shift = block.time(time)[:, :16, None, None], block.time(time)[:, 16:, None, None]
    h = block.conv_1(silu(normed(x)))
    expected = block.shortcut(x) + block.conv_2(silu((1 + scale) * normed(h) + shift))
    assert torch.allclose(block(x, time), expected, atol=1e-5)


def test_skips_carry_the_detail_past_the_coarse_levels():
    model = make_model()
    for layer in model.grow:  # nothing comes up from below
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    x_t, t = torch.randn(2, 1, 28, 28), torch.tensor([100, 200])
    assert (model(x_t, t) - model(x_t + 0.1 * torch.randn_like(x_t), t)).abs().max() > 1e-3
