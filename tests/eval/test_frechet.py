"""The Frechet distance against closed forms, SciPy and the nuclear norm."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from eval.frechet import frechet_distance
from eval.statistics import Moments


def moments_of(data):
    moments = Moments(data.shape[1])
    moments.update(data)
    return moments


def samples(n, dim, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    white = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return scale * white @ mixing + 0.1 * seed


def gaussian(mean, covariance, n=1000):
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments.of(n, mean, covariance * (n - 1))


def test_diagonal_gaussians_have_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    result = frechet_distance(gaussian([0, 0, 0], a.diag()), gaussian([1, 2, 3], b.diag()))
    # |m|^2 = 14; sum (sqrt a - sqrt b)^2 = 1 + 1 + 1
    assert result.value == pytest.approx(17, rel=1e-12)
    assert result.mean_term == pytest.approx(14, rel=1e-12) and result.method == "cholesky"


@pytest.mark.parametrize("dim", [5, 60])
def test_full_rank_equals_scipy(dim):
    x, y = samples(500, dim, 1), samples(400, dim, 2, 1.3)
    s1, s2 = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    mean = float((x.mean(0) - y.mean(0)).square().sum())
    expected = mean + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    result = frechet_distance(moments_of(x), moments_of(y))
    assert result.method == "cholesky" and result.rank == dim
    assert result.value == pytest.approx(expected, rel=1e-9)


def exact_by_nuclear_norm(x, y):
    """tr (S1 S2)^(1/2) is the sum of the singular values of Xc Yc', which squares nothing."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    traces = xc.square().sum() / (len(x) - 1) + yc.square().sum() / (len(y) - 1)
    cross = torch.linalg.svdvals(xc @ yc.T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    return float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 80), (80, 30), (2, 50), (30, 400), (400, 30)])
def test_fewer_samples_than_dimensions_is_exact(n, m):
    dim = 120
    x, y = samples(n, dim, 1), samples(m, dim, 2)
    result = frechet_distance(moments_of(x), moments_of(y))
    assert result.value == pytest.approx(exact_by_nuclear_norm(x, y), rel=1e-9)
    assert result.method == "pivoted cholesky"
    assert result.rank == min(n, m) - 1


def test_a_set_has_no_distance_to_itself_with_or_without_full_rank():
    for n in (20, 500):
        moments = moments_of(samples(n, 50, 3))
        assert frechet_distance(moments, moments).value < 1e-9


def test_constant_features_do_not_matter():
    x, y = samples(300, 10, 1), samples(300, 10, 2)
    x[:, 3] = y[:, 3] = 0.0
    result = frechet_distance(moments_of(x), moments_of(y))
    assert result.method == "pivoted cholesky" and result.rank == 9
    assert result.value == pytest.approx(exact_by_nuclear_norm(x, y), rel=1e-10)


def test_the_distance_is_symmetric_and_ignores_rotations():
    x, y = samples(200, 30, 1), samples(150, 30, 2)
    rotation = torch.linalg.qr(samples(30, 30, 9)).Q
    value = frechet_distance(moments_of(x), moments_of(y)).value
    assert frechet_distance(moments_of(y), moments_of(x)).value == pytest.approx(value, rel=1e-10)
    turned = frechet_distance(moments_of(x @ rotation), moments_of(y @ rotation)).value
    assert turned == pytest.approx(value, rel=1e-10)


def test_moving_a_set_adds_the_squared_length_of_the_move():
    x, y = samples(200, 30, 1), samples(150, 30, 2)
    y = y - y.mean(0) + x.mean(0)
    move = torch.full((30,), 0.5, dtype=torch.float64)
    still = frechet_distance(moments_of(x), moments_of(y)).value
    moved = frechet_distance(moments_of(x), moments_of(y + move)).value
    assert moved - still == pytest.approx(30 * 0.25, rel=1e-9)


def test_too_few_samples_and_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(moments_of(samples(1, 4, 0)), moments_of(samples(9, 4, 0)))
    with pytest.raises(ValueError, match="5 and 4 dimensions"):
        frechet_distance(moments_of(samples(9, 5, 0)), moments_of(samples(9, 4, 0)))
    broken = samples(9, 4, 0)
    broken[3, 1] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(moments_of(samples(9, 4, 1)), moments_of(broken))
