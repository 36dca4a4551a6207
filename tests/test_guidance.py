"""03's class conditioning and classifier-free guidance, against closed forms and on bad labels."""

import numpy as np
import pytest
import torch
from conftest import load
from torch import nn

script = load("03_conditional_ddpm.py")
CPU = torch.device("cpu")
DIGITS = [*"0123456789"]
NULL = 10  # no digit in particular


class Recorder:
    """A "network" that answers with a function of (x_t, t, labels) and notes what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, x_t, t, class_label):
        self.asked.append((x_t, t, class_label))
        return self.function(x_t, t, class_label)


def make(network, T=1000, image_shape=(1, 2, 2), p_uncond=0.1, schedule="cosine", names=DIGITS):
    network = network if isinstance(network, nn.Module) else Recorder(network)
    betas = script.SCHEDULES[schedule](T)
    return script.GuidedDDPM(network, betas, image_shape, CPU, p_uncond, names)


def make_model(num_classes=10):
    """A network without zeros in it: the layers that start at zero would hide everything."""
    torch.manual_seed(0)
    sizes = (1, 8, 8), 8, (1, 2), 1, (4,), 0.0, torch.float32
    model = script.ConditionalUNet(*sizes, num_classes=num_classes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def two_answers(x_t, t, labels):
    """0.3 · x for labelled images, 0.7 · x for those without."""
    return torch.where((labels == NULL).view(-1, 1, 1, 1), 0.7 * x_t, 0.3 * x_t)


# %% The network


def test_prediction_depends_on_the_label_in_every_image_by_itself():
    model = make_model()
    x_t, t = torch.randn(1, 1, 8, 8).expand(11, 1, 8, 8), torch.full((11,), 500)
    answers = model(x_t, t, torch.arange(11)).flatten(1)
    assert torch.cdist(answers, answers).fill_diagonal_(9).min() > 1e-2, "no two labels alike"
    alone = model(x_t[:1], t[:1], torch.tensor([7]))
    assert torch.allclose(answers[7], alone.flatten(), atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_embeddings_may_stand_in_for_labels(precision):
    model, ddpm = make_model(), make(make_model())
    model.precision = ddpm.model.precision = precision
    x_t, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 500), torch.tensor([3, 8, NULL])
    embeddings = model.label_embedding.weight[labels]
    assert torch.equal(model(x_t, t, embeddings), model(x_t, t, labels))
    assert model(x_t, t, labels).dtype == torch.float32
    guided = (ddpm.predict_noise(x_t, 500, c, 3.0) for c in (labels, embeddings))
    assert torch.equal(*guided)


@pytest.mark.parametrize("num_classes", [1, 2, 37])
def test_there_is_an_embedding_for_each_class_and_one_for_none(num_classes):
    names = [f"class {i}" for i in range(num_classes)]
    ddpm = make(make_model(num_classes), T=10, image_shape=(1, 8, 8), names=names)
    assert len(ddpm.model.label_embedding.weight) == num_classes + 1
    x_t, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    answers = [ddpm.model(x_t, t, torch.tensor([c])) for c in (num_classes - 1, num_classes)]
    assert not torch.allclose(*answers, atol=1e-3)
    assert ddpm.null_label == num_classes
    assert ddpm.sample(2, names[-1]).shape == (2, 1, 8, 8)


def test_labels_reach_the_optimizer_that_embeddings_need():
    model = make_model()
    for_muon, for_adam = script.split_weights(model)
    assert any(weight is model.label_embedding.weight for weight in for_adam)
    assert not any(weight is model.label_embedding.weight for weight in for_muon)


# %% Training


@pytest.mark.parametrize("p_uncond", [0.0, 0.1, 1.0])
def test_labels_are_withheld_image_by_image_at_the_stated_rate_and_at_every_step(p_uncond):
    ddpm = make(two_answers, T=20, p_uncond=p_uncond)
    labels = torch.arange(10).repeat(100)
    for _ in range(20):
        ddpm.loss(torch.zeros(1000, 1, 2, 2), labels)
    shares = []
    for _, _, seen in ddpm.model.asked:
        withheld = seen == NULL
        shares.append(withheld.float().mean().item())
        assert torch.equal(seen[~withheld], labels[~withheld]), "the others are told the truth"
    # 20,000 images: standard error 0.0021; 1,000 of one batch: 0.0095
    assert sum(shares) / 20 == pytest.approx(p_uncond, abs=0.01)
    assert all(abs(share - p_uncond) < 0.05 for share in shares), "never all of a batch or none"
    assert p_uncond == 0.1 or set(shares) == {p_uncond}
    counts = torch.cat([t for _, t, _ in ddpm.model.asked]).bincount()
    expected = 20_000 * (torch.arange(20) * 2 + 1) / 20**2  # large t more often, as in 02
    assert torch.allclose(counts.float(), expected, rtol=0.1, atol=40)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("off", [0.0, 0.5])
def test_loss_is_the_squared_error_of_the_noise(schedule, off):
    """A network that knows the images answers with ε; one that is off by 0.5 errs by 0.25."""
    x_0, labels = torch.randn(400, 1, 2, 2).clamp(-1, 1), torch.arange(400) % 10

    def network(x_t, t, labels):
        a = torch.tensor(ddpm.alpha_bars, dtype=torch.float64)[t].view(-1, 1, 1, 1)
        return ((x_t.double() - a.sqrt() * x_0) / (1 - a).sqrt()).float() + off

    ddpm = make(network, schedule=schedule)
    assert ddpm.loss(x_0, labels).item() == pytest.approx(off**2, abs=1e-5)


# %% Guidance


@pytest.mark.parametrize("scale", [0, 0.5, 1, 2, 3.0, 7, 10])
def test_guidance_is_linear_in_the_two_predictions(scale):
    """(1 + w) cond − w uncond with w = s − 1, the paper's form."""
    ddpm, w = make(two_answers), scale - 1
    x_t, labels, null = torch.randn(4, 1, 2, 2), torch.tensor([1, 2, 3, 4]), torch.full((4,), NULL)
    expected = (1 + w) * 0.3 * x_t - w * 0.7 * x_t
    noise_pred = ddpm.predict_noise(x_t, 300, labels, scale)
    assert torch.allclose(noise_pred, expected, atol=0 if scale in (0, 1) else 1e-5)
    assert len(ddpm.model.asked) == (1 if scale == 1 else 2), "one answer would cancel out"
    for (x, t, seen), wanted in zip(ddpm.model.asked, (labels, null)):
        assert torch.equal(x, x_t) and torch.equal(t, torch.full((4,), 300))
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3.0])
def test_guidance_acts_only_in_the_interval(scale):
    """Kynkäänniemi et al. 2024: outside it s = 1; s < 1, which mixes in no label, stays itself."""
    ddpm, x_t = make(two_answers, T=20), torch.randn(4, 1, 2, 2)
    for t in range(20):
        noise_pred = ddpm.predict_noise(x_t, t, torch.arange(4), scale, (0.25, 0.6))
        acting = scale if t in range(5, 12) else min(scale, 1)
        assert torch.allclose(noise_pred, (0.7 - 0.4 * acting) * x_t, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 1, 7])
@pytest.mark.parametrize("scale", [0, 1, 3.0])
def test_sampling_is_that_of_02_with_the_guided_noise(scale, steps):
    """GuidedDDPM inherits it: the tests of 02's steps are tests of these."""
    assert script.GuidedDDPM.p_sample is script.DDPM.p_sample
    assert script.GuidedDDPM.predict is script.DDPM.predict
    ddpm, labels = make(two_answers, T=20), [1, 2, 3, 4]
    plain = script.DDPM(
        lambda x_t, t: (0.7 + scale * (0.3 - 0.7)) * x_t,
        script.cosine_beta_schedule(20),
        (1, 2, 2),
        CPU,
    )
    images, frames = [], []
    for sample in (
        lambda: ddpm.sample(4, labels, scale, steps, frames, interval=(0, 1)),
        lambda: plain.sample(4, steps),
    ):
        torch.manual_seed(3)
        images.append(sample())
    assert torch.allclose(*images, atol=1e-5)
    assert ddpm.model.asked[0][2].tolist() == labels
    assert len(frames) == (steps or 20) + 1 and torch.equal(frames[-1][1], images[0])
    for steps in 0, 21, 2.5:
        with pytest.raises(ValueError, match="steps: it must be a whole number, 1 to T = 20"):
            ddpm.sample(4, labels, scale, steps)


def test_without_labels_it_is_the_unconditional_model_whatever_the_scale():
    samples = []
    for labels, scale in (None, 3.0), (None, 0), (NULL, 0), ([NULL] * 5, 1):
        torch.manual_seed(1)
        ddpm = make(two_answers, T=10)
        samples.append(ddpm.sample(5, labels, scale))
        assert all((asked[2] == NULL).all() for asked in ddpm.model.asked)
        assert len(ddpm.model.asked) == (10 if scale == 1 or labels is None else 20)
    assert all(torch.equal(sample, samples[0]) for sample in samples)


def gaussian_classes(alphas_cumprod):
    """Classes 0 and 1 from N(−0.5, 0.1²) and N(+0.5, 0.1²), equally often: ε in closed form."""

    def noise_pred(x_t, t, labels):
        a = alphas_cumprod[t].double().view(-1, 1, 1, 1)
        x = x_t.double()
        variance = a * 0.01 + 1 - a
        means = [-0.5 * a.sqrt(), 0.5 * a.sqrt()]
        # E[ε | x_t, class] = √(1−ᾱ) (x_t − √ᾱ μ) / (ᾱ σ² + 1 − ᾱ), pixels independent
        by_class = [(1 - a).sqrt() * (x - mean) / variance for mean in means]
        log_density = [-((x - mean) ** 2).sum((1, 2, 3), True) / (2 * variance) for mean in means]
        share = torch.sigmoid(log_density[1] - log_density[0])  # P(class 1 | x_t)
        both = share * by_class[1] + (1 - share) * by_class[0]
        labels = labels.view(-1, 1, 1, 1)
        guess = torch.where(labels == 0, by_class[0], by_class[1])
        return torch.where(labels == NULL, both, guess).float()

    return noise_pred


@pytest.mark.parametrize("steps", [None, 50])
def test_oracle_sampling_lands_on_the_component_that_was_asked_for(steps):
    ddpm, n = make(None, T=200, image_shape=(1, 1, 1)), 4000
    ddpm.model = gaussian_classes(ddpm.alphas_cumprod)
    free = ddpm.sample(n, steps=steps).flatten()
    assert (free > 0).float().mean() == pytest.approx(0.5, abs=0.04), "both, equally often"
    for label, mean in (0, -0.5), (1, 0.5):
        samples = ddpm.sample(n, label, guidance_scale=1, steps=steps).flatten()
        assert ((samples > 0) == (label == 1)).float().mean() > 0.995
        assert samples.mean().item() == pytest.approx(mean, abs=0.02)
        # Long steps leave too little variance: β̃ is exact for a single image (DDPM section 3.2).
        assert samples.std().item() == pytest.approx(0.1, rel=0.25 if steps else 0.15)
        guided = ddpm.sample(n, label, guidance_scale=5, steps=steps).flatten()
        assert ((guided > 0) == (label == 1)).all()
        assert abs(guided.mean()) > abs(samples.mean()) + 0.005, "further from the other class"


# %% Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, [NULL] * 3),
        (7, [7] * 3),
        ("7", [7] * 3),
        ([1, 2, 3], [1, 2, 3]),
        (["1", 2, NULL], [1, 2, NULL]),
        (range(3), [0, 1, 2]),
        (torch.tensor([4, 5, 6]), [4, 5, 6]),
        (torch.tensor(4), [4] * 3),
        (np.int64(7), [7] * 3),
        (np.array([1, 2, 3]), [1, 2, 3]),
    ],
    ids=str,
)
def test_labels_by_number_name_list_or_tensor(labels, expected):
    assert script.to_labels(labels, 3, DIGITS).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 12])
def test_labels_of_any_number_of_classes(count):
    names = ["cat", "dog", *(f"animal {i}" for i in range(10))][:count]
    assert script.to_labels(names, count, names).tolist() == list(range(count))
    assert script.to_labels([names[-1], 0], 2, names).tolist() == [count - 1, 0]
    assert script.to_labels(["2", "10", 2, 0], 4, ["1", "10", "2"]).tolist() == [2, 1, 2, 0]
    for none in None, count:
        assert script.to_labels(none, 2, names).tolist() == [count, count]
    for bad in count + 1, "horse", "0":
        with pytest.raises(ValueError, match="there is no class"):
            script.to_labels(bad, 2, names)


@pytest.mark.parametrize("bad", [-1, 11, "cat", 2.5, None, [3]], ids=str)
def test_a_label_that_does_not_exist_is_named(bad):
    for labels in [[1, bad, 2], bad][: 1 if bad in (None, [3]) else 2]:
        with pytest.raises(ValueError, match="there is no class") as error:
            script.to_labels(labels, 3, DIGITS)
        assert repr(bad) in str(error.value) and "0, 1, 2, 3" in str(error.value)


@pytest.mark.parametrize("labels", [[1, 2], [], torch.tensor([1, 2, 3, 4]), torch.randn(2, 32)])
def test_a_count_that_does_not_match_is_an_error(labels):
    with pytest.raises(ValueError, match=f"{len(labels)} labels for n = 3 images"):
        script.to_labels(labels, 3, DIGITS)
