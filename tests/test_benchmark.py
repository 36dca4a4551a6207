"""The scores of tests/benchmark.py, where the answer is known."""

import benchmark
import pytest
import torch


def gaussian(count, size):
    return torch.randn(count, size, dtype=torch.float64)


def test_frechet_distance_of_known_gaussians():
    a = gaussian(4000, 5)
    assert benchmark.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert benchmark.frechet_distance(a, a + 2) == pytest.approx(5 * 2**2, rel=1e-6)
    wanted = (a.mean(0).square().sum() + a.T.cov().trace()).item()  # |μ|² + tr Σ · (2 − 1)²
    assert benchmark.frechet_distance(a, 2 * a) == pytest.approx(wanted, rel=1e-6)


def test_precision_and_recall_tell_good_from_diverse():
    real, narrow, far = gaussian(500, 2), 0.1 * gaussian(500, 2), 20 + gaussian(500, 2)
    assert benchmark.share_among(narrow, real) > 0.95 and benchmark.share_among(real, narrow) < 0.2
    assert benchmark.share_among(far, real) == 0 == benchmark.share_among(real, far)
    assert benchmark.share_among(real, real) == 1


def test_spread_within_classes():
    labels = torch.arange(600) % 3
    features = gaussian(600, 4) + 100 * labels[:, None]  # far apart, but not within a class
    spread = benchmark.spread_within_classes(features, labels)
    wide = benchmark.spread_within_classes(2 * features, labels)
    assert wide == pytest.approx(2 * spread) and 1 < spread < 4


def test_samples_come_in_parts_and_are_kept_while_the_weights_are_the_same(tmp_path):
    firsts = []

    def sample(n, first):
        firsts.append((n, first))
        return torch.randn(n, 1)

    samples = benchmark.draw("x", "weights 1", sample, tmp_path, size=300)
    assert firsts == [(300, 0), (300, 300), (300, 600), (100, 900)] and len(samples) == 1000
    assert not torch.equal(samples[:100], samples[300:400])
    assert torch.equal(samples, benchmark.draw("x", "weights 1", sample, tmp_path))
    assert len(firsts) == 4, "not drawn again"
    again = benchmark.draw("x", "weights 2", sample, tmp_path, size=300)
    assert len(firsts) == 8 and torch.equal(samples, again), "drawn again, from the same seed"
