"""03's class conditioning and classifier-free guidance, against closed forms and on bad labels."""

import math

import numpy as np
import pytest
import torch
from conftest import load
from diffusers import DDPMScheduler
from torch import nn

script = load("03_conditional_ddpm.py")
CPU = torch.device("cpu")
DIGITS = [*"0123456789"]
NULL = 10  # no digit in particular


class Recorder(nn.Module):
    """A "network" that answers with a function of (x_t, t, labels) and notes what it was asked."""

    def __init__(self, function):
        super().__init__()
        self.function, self.asked = function, []

    def forward(self, x_t, t, class_label):
        self.asked.append((x_t, t, class_label))
        return self.function(x_t, t, class_label)


def make(function, T=1000, image_shape=(1, 2, 2), p_uncond=0.1, schedule=None):
    betas = (schedule or script.cosine_beta_schedule)(T)
    return script.GuidedDDPM(Recorder(function), betas, image_shape, CPU, p_uncond, DIGITS)


def make_model(random=True, num_classes=10):
    torch.manual_seed(0)
    sizes = (1, 8, 8), 8, (1, 2), 1, (4,), 0.0, num_classes
    model = script.ConditionalUNet(*sizes, torch.float32)
    for parameter in model.parameters():
        if random and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


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
    model = make_model()
    model.precision = precision
    x_t, t, labels = (
        torch.randn(3, 1, 8, 8),
        torch.tensor([0, 500, 999]),
        torch.tensor([3, 8, NULL]),
    )
    embeddings = model.label_embedding.weight[labels]
    assert torch.equal(model(x_t, t, embeddings), model(x_t, t, labels))
    assert model(x_t, t, labels).dtype == torch.float32


@pytest.mark.parametrize("num_classes", [1, 2, 37])
def test_there_is_an_embedding_for_each_class_and_one_for_none(num_classes):
    model = make_model(num_classes=num_classes)
    assert len(model.label_embedding.weight) == num_classes + 1
    x_t, t = torch.randn(1, 1, 8, 8), torch.tensor([500])
    answers = [model(x_t, t, torch.tensor([label])) for label in (num_classes - 1, num_classes)]
    assert not torch.allclose(*answers, atol=1e-3)
    betas = script.cosine_beta_schedule(10)
    names = [f"class {i}" for i in range(num_classes)]
    ddpm = script.GuidedDDPM(model, betas, (1, 8, 8), CPU, 0.1, names)
    assert ddpm.null_label == num_classes
    assert ddpm.sample(2, names[-1]).shape == (2, 1, 8, 8)


def test_labels_reach_the_optimizer_that_embeddings_need(tmp_path):
    model = make_model()
    settings = {"BATCH_SIZE": 5, "EPOCHS": 1}
    trainer = script.Trainer(model, None, 10, settings, (), tmp_path / "none.pt")
    adam = trainer.adam.param_groups[0]["params"]
    assert any(weight is model.label_embedding.weight for weight in adam)
    muon = trainer.muon.param_groups[0]["params"]
    assert not any(weight is model.label_embedding.weight for weight in muon)


# %% Training


def test_labels_are_withheld_image_by_image_at_the_stated_rate():
    ddpm = make(lambda x, t, c: torch.zeros_like(x), p_uncond=0.1)
    labels = torch.arange(10).repeat(100)
    for _ in range(20):
        ddpm.loss(torch.zeros(1000, 1, 2, 2), labels)
    shares = []
    for _, _, seen in ddpm.model.asked:
        withheld = seen == NULL
        shares.append(withheld.float().mean().item())
        assert torch.equal(seen[~withheld], labels[~withheld]), "the others are told the truth"
    # 20,000 images: standard error 0.0021; 1,000 of one batch: 0.0095
    assert sum(shares) / 20 == pytest.approx(0.1, abs=0.01)
    assert all(0.05 < share < 0.15 for share in shares), "never all of a batch or none"


def test_training_takes_every_step_equally_often():
    ddpm = make(lambda x, t, c: torch.zeros_like(x), T=20)
    ddpm.loss(torch.zeros(20_000, 1, 2, 2), torch.zeros(20_000, dtype=torch.int64))
    counts = ddpm.model.asked[0][1].bincount()
    assert len(counts) == 20 and counts.min() > 800 and counts.max() < 1200, "6 standard errors"


@pytest.mark.parametrize(("p_uncond", "expected"), [(0.0, False), (1.0, True)])
def test_all_or_none_can_be_withheld(p_uncond, expected):
    ddpm = make(lambda x, t, c: torch.zeros_like(x), p_uncond=p_uncond)
    ddpm.loss(torch.zeros(50, 1, 2, 2), torch.full((50,), 3))
    assert ((ddpm.model.asked[0][2] == NULL) == expected).all()


def noise_of(x_0, x_t, t, ddpm):
    """The noise ε in x_t of known images: x_t = √ᾱ x_0 + √(1−ᾱ) ε."""
    a = torch.tensor(ddpm.alpha_bars, dtype=torch.float64)[t].view(-1, 1, 1, 1)
    return ((x_t.double() - a.sqrt() * x_0.double()) / (1 - a).sqrt()).to(x_t.dtype)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_loss_is_zero_for_the_right_noise_and_as_large_as_its_error(schedule):
    """A network that knows the images answers with ε; one that is off by 0.5 errs by 0.25."""
    x_0, labels = torch.randn(400, 1, 2, 2).clamp(-1, 1), torch.arange(400) % 10
    for off in 0.0, 0.5:
        ddpm = make(None, schedule=getattr(script, f"{schedule}_beta_schedule"))
        ddpm.model = Recorder(lambda x_t, t, _, d=ddpm, off=off: noise_of(x_0, x_t, t, d) + off)
        assert ddpm.loss(x_0, labels).item() == pytest.approx(off**2, abs=1e-5)


# %% Guidance


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_right_noise_gives_a_step_back_to_the_image(schedule):
    x_0, noise = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    x_0, labels = x_0.clamp(-1, 1), torch.arange(5)
    ddpm = make(lambda *_: noise, schedule=getattr(script, f"{schedule}_beta_schedule"))
    for t in 0, 10, 700, 998, 999:
        a = ddpm.alpha_bars[t]
        x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise
        for scale in 1, 3.0:  # both answers are the same here, so guidance changes nothing
            ddpm.model.asked.clear()
            x_prev, x_0_pred = ddpm.p_sample(x_t, t, t - 1, labels, scale)
            _, asked_t, asked_labels = ddpm.model.asked[0]
            assert torch.equal(asked_t, torch.full((5,), t)) and torch.equal(asked_labels, labels)
            assert torch.allclose(x_0_pred, x_0, rtol=0, atol=1e-9), (t, scale)
            assert t > 0 or torch.allclose(x_prev, x_0, rtol=0, atol=1e-9), "the last step"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_step_back_is_that_of_diffusers(schedule):
    ddpm, betas = make(two_answers), getattr(script, f"{schedule}_beta_schedule")(1000)
    ddpm.alpha_bars = [*betas.neg().add(1).cumprod(0).tolist(), 1.0]
    scheduler = DDPMScheduler(trained_betas=betas.numpy(), clip_sample=True)
    scheduler.alphas_cumprod = torch.tensor(ddpm.alpha_bars[:-1], dtype=torch.float64)
    scheduler.alphas, scheduler.betas = 1 - betas, betas
    labels, clamped = torch.tensor([1, 2, 3, 4]), 0
    for t in 0, 1, 10, 500, 998, 999:
        for scale in 0, 1, 3.0:
            x_t = 2 * torch.randn(4, 1, 2, 2, dtype=torch.float64)
            torch.manual_seed(7)
            ours, x_0_pred = ddpm.p_sample(x_t, t, t - 1, labels, scale)
            torch.manual_seed(7)
            x_prev, x_0 = scheduler.step(
                (0.7 + scale * (0.3 - 0.7)) * x_t, t, x_t, return_dict=False
            )
            clamped += (x_0_pred.abs() == 1).sum().item()
            assert torch.allclose(x_0_pred, x_0, rtol=0, atol=1e-9), (t, scale)
            assert torch.allclose(ours, x_prev, rtol=0, atol=1e-9), (t, scale)
    assert 0 < clamped < 6 * 3 * 16, "the clamp acts on some"


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_long_steps_are_those_of_diffusers(steps):
    """Whole runs with every 20th step, say; diffusers calls these timesteps "trailing"."""
    ddpm = make(two_answers)
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=True
    )
    scheduler.set_timesteps(steps)
    torch.manual_seed(3)
    ours = ddpm.sample(4, 5, guidance_scale=2.0, steps=steps)
    torch.manual_seed(3)
    x = torch.randn(4, 1, 2, 2)
    for t in scheduler.timesteps:
        noise_pred = (0.7 + 2.0 * (0.3 - 0.7)) * x
        (x,) = scheduler.step(noise_pred, t, x, return_dict=False)[:1]
    asked = [t[0].item() for _, t, labels in ddpm.model.asked if labels[0] == 5]
    assert asked == scheduler.timesteps.tolist()
    assert torch.allclose(ours, x, atol=1e-3)


def test_more_steps_than_there_are_count_as_all_of_them():
    ddpm = make(two_answers, T=10)
    assert ddpm.sample(2, 3, steps=50).isfinite().all()
    assert [t[0].item() for _, t, labels in ddpm.model.asked if labels[0] == 3] == [
        *range(9, -1, -1)
    ]


def two_answers(x_t, t, labels):
    """0.3 · x for labelled images, 0.7 · x for those without."""
    return torch.where((labels == NULL).view(-1, 1, 1, 1), 0.7 * x_t, 0.3 * x_t)


def test_scale_1_is_the_conditional_and_0_the_unconditional_guess_exactly():
    model = make_model()
    ddpm = script.GuidedDDPM(model, script.cosine_beta_schedule(1000), (1, 8, 8), CPU, 0.1, DIGITS)
    x_t, t = torch.randn(4, 1, 8, 8), torch.full((4,), 300)
    labels, null = torch.tensor([1, 2, 3, 4]), torch.full((4,), NULL)
    conditional, free = (model(x_t, t, guess) for guess in (labels, null))
    assert torch.equal(ddpm.predict(x_t, 300, labels, 1)[1], conditional)
    assert torch.equal(ddpm.predict(x_t, 300, labels, 0)[1], free)
    assert not torch.allclose(conditional, free, atol=1e-2)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 2, 3.0, 7, 10])
def test_guidance_is_linear_in_the_two_guesses(scale):
    """(1 + w) cond − w uncond with w = s − 1, the paper's form."""
    ddpm = make(two_answers)
    x_t, t = torch.randn(4, 1, 2, 2), torch.tensor([0, 300, 700, 999])
    labels, null = torch.tensor([1, 2, 3, 4]), torch.full((4,), NULL)
    w = scale - 1
    expected = (1 + w) * 0.3 * x_t - w * 0.7 * x_t
    assert torch.allclose(ddpm.guided_noise(x_t, t, labels, scale), expected, atol=1e-5)
    asked = [labels, null]
    assert len(ddpm.model.asked) == len(asked)
    for (x, asked_t, seen), wanted in zip(ddpm.model.asked, asked):
        assert torch.equal(x, x_t) and torch.equal(asked_t, t) and torch.equal(seen, wanted)


def test_embeddings_are_guided_like_the_labels_they_belong_to():
    model = make_model()
    ddpm = script.GuidedDDPM(model, script.cosine_beta_schedule(1000), (1, 8, 8), CPU, 0.1, DIGITS)
    x_t, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 300), torch.tensor([1, 2, 3, 4])
    embeddings = model.label_embedding.weight[labels]
    by_labels = ddpm.guided_noise(x_t, t, labels, 3.0)
    assert torch.equal(ddpm.guided_noise(x_t, t, embeddings, 3.0), by_labels)


def test_without_labels_it_is_the_unconditional_model_whatever_the_scale():
    samples = []
    for labels, scale in ((None, 3.0), (None, 0), (NULL, 0), ([NULL] * 5, 1)):
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
    ddpm = make(None, T=200, image_shape=(1, 1, 1))
    ddpm.model = Recorder(gaussian_classes(ddpm.alphas_cumprod))
    n = 4000
    free = ddpm.sample(n, steps=steps).flatten()
    assert (free > 0).float().mean() == pytest.approx(0.5, abs=0.04), "both, equally often"
    for label, mean in ((0, -0.5), (1, 0.5)):
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
    for none in None, count:
        assert script.to_labels(none, 2, names).tolist() == [count, count]
    for bad in count + 1, "horse", "0":
        with pytest.raises(ValueError, match="there is no class"):
            script.to_labels(bad, 2, names)


def test_a_name_that_is_a_number_is_the_class_of_that_name():
    names = ["1", "10", "2"]  # as folders are sorted
    assert script.to_labels(["2", "10", 2, 0], 4, names).tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize("label", [-1, 11, "cat", 2.5, None, [3]], ids=str)
def test_a_label_that_does_not_exist_is_named(label):
    with pytest.raises(ValueError, match="there is no class") as error:
        script.to_labels([1, label, 2], 3, DIGITS)
    assert repr(label) in str(error.value) and "0, 1, 2, 3" in str(error.value)


def test_a_single_label_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"there is no class 2\.5"):
        script.to_labels(2.5, 3, DIGITS)


@pytest.mark.parametrize("labels", [[1, 2], [], torch.tensor([1, 2, 3, 4]), torch.randn(2, 32)])
def test_a_count_that_does_not_match_is_an_error(labels):
    with pytest.raises(ValueError, match=f"{len(labels)} labels for n = 3 images"):
        script.to_labels(labels, 3, DIGITS)
