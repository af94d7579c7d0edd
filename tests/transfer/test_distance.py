"""Distances of targets from the source, against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import spearmanr

from timm_etf import UsageError
from timm_etf.transfer.distance import frechet_distance, proxy_a_distance, rank_correlation


def test_proxy_a_distance_is_0_for_one_distribution_and_2_for_disjoint_ones() -> None:
    rng = np.random.default_rng(0)
    x, same = rng.normal(size=(2, 2000, 16))
    assert proxy_a_distance(x, same) < 0.1
    assert proxy_a_distance(x, same + 3) > 1.99
    one = x.copy()
    one[:, 0] += 2  # two Gaussians two deviations apart: the best error is that of half the distance, 15.9 %
    assert proxy_a_distance(same, one) == pytest.approx(2 * (1 - 2 * 0.1587), abs=0.08)


def test_sides_of_unequal_size_count_alike() -> None:
    rng = np.random.default_rng(1)
    assert proxy_a_distance(rng.normal(size=(4000, 4)), rng.normal(size=(401, 4))) < 0.3


def moments(rng: np.random.Generator, d: int) -> tuple[np.ndarray, np.ndarray]:
    root = rng.normal(size=(d, d))
    return rng.normal(size=d), root @ root.T / d


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_is_that_of_gaussians_with_these_moments(d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(2):  # samples whose moments are exactly those that were asked for
        mean, covariance = moments(rng, d)
        z = rng.normal(size=(50, d))
        z -= z.mean(0)
        z = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False)))).T
        samples.append((mean, covariance, mean + z @ np.linalg.cholesky(covariance).T))
    (mean_a, cov_a, a), (mean_b, cov_b, b) = samples
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9, abs=1e-9)


def test_sides_of_unequal_size_in_class_order_are_cut_evenly() -> None:
    classes = np.repeat(np.arange(10.0), 100)[:, None]  # as features come: one class after the other
    few = classes[::4]
    assert frechet_distance(classes, few) < 0.05
    assert frechet_distance(classes, few) == frechet_distance(few, classes)


def test_fewer_images_than_features() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 64))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(64)


def test_rank_correlation_is_scipys_with_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(3)
    distance = rng.random(9)
    gain = distance + 0.2 * rng.normal(size=(5, 9))
    found, (low, high) = rank_correlation(distance, gain)
    assert found == pytest.approx(spearmanr(distance, gain.mean(0)).statistic)
    assert -1 <= low < found < high <= 1
    assert rank_correlation(distance, -gain)[0] == pytest.approx(-found)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="one width"):
        proxy_a_distance(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(UsageError, match="at least four"):
        frechet_distance(np.zeros((9, 3)), np.zeros((3, 3)))
