"""The trained networks of tests/weights: they fit the code, and do what the README says of them.

`python tests/benchmark.py weights` writes them from finished runs of 02 and 03, with the classifier
that judges here, too. After a change of a network, that is to be done again.
"""

import functools

import benchmark
import conftest
import pytest
import torch

load = functools.cache(conftest.load)


@pytest.fixture(scope="module")
def read():
    """A function that returns how probable the classifier's readings of images are, and they."""
    model = benchmark.Classifier()
    model.load_state_dict(torch.load(benchmark.WEIGHTS / "classifier.pt", weights_only=True))
    return lambda images: benchmark.look(model.eval(), images)[1].max(dim=1)


def trained(script, sampler, of="02_ddpm"):
    return getattr(load(script), sampler).load(benchmark.WEIGHTS / of / "checkpoint.pt")


def test_the_files_are_small_and_as_default_runs_leave_them():
    for number in "02", "03":
        script = benchmark.SCRIPTS[number]
        path = benchmark.WEIGHTS / script.removesuffix(".py") / "checkpoint.pt"
        state, module = torch.load(path, weights_only=True), load(script)
        assert path.stat().st_size < 1_000_000
        if module.ON_GPU:
            continue  # where the defaults are others
        assert state["settings"]["DATASET"] == "MNIST"
        assert len(state["losses"]) == state["seen"] / module.BATCH_SIZE == 60_000 * 8 / 64
        for name in (*module.NETWORK, "T", "SCHEDULE", "SEED", "EPOCHS"):
            assert state["settings"][name] == getattr(module, name), name


def test_the_digits_of_02_are_digits_with_its_sampler_and_with_that_of_04(read):
    ddpm, ddim = trained("02_ddpm.py", "DDPM"), trained("04_ddim_fast_sampling.py", "DDIM")
    torch.manual_seed(0)
    for samples in ddpm.sample(64, steps=100), ddim.ddim_sample(64, ddim_steps=50):
        probable, digits = read(samples)
        assert (probable > 0.8).double().mean() > 0.8
        assert len(digits.unique()) >= 9


def test_03_draws_the_digit_that_is_asked_for(read):
    ddpm = trained("03_conditional_ddpm.py", "GuidedDDPM", of="03_conditional_ddpm")
    labels = torch.arange(40) % 10
    torch.manual_seed(0)
    _, digits = read(ddpm.sample(40, labels, steps=50))
    assert (digits == labels).sum() >= 38


def test_04_finds_the_noise_of_a_digit_and_comes_back():
    ddim, errors = trained("04_ddim_fast_sampling.py", "DDIM"), []
    torch.manual_seed(0)
    x_0 = ddim.ddim_sample(16, ddim_steps=20)
    for steps in 10, 50:
        noise = ddim.ddim_invert(x_0, steps)
        back = ddim.ddim_sample(x_T=noise, ddim_steps=steps, eta=0, spacing="even")
        errors.append((back - x_0).abs().mean().item())
    assert errors[1] < 0.04 and errors[1] < errors[0] / 2
