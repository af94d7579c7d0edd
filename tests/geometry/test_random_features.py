import numpy as np
import pytest

from timm_etf import UsageError
from timm_etf.geometry.random_features import Activation, Point, random_feature_regression, scaled


def mixture(n: int, p: int, seed: int, spread: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes of Gaussian samples with means 2 apart and covariances (1 -+ spread / sqrt p) I / p."""
    rng = np.random.default_rng(seed)
    sign = np.where(np.arange(n) < n // 2, -1.0, 1.0)
    mean = np.zeros(p)
    mean[0] = 2 / np.sqrt(p)
    scale = np.sqrt((1 + sign * spread / np.sqrt(p)) / p)
    return sign[:, None] * mean + scale[:, None] * rng.normal(size=(n, p)), sign


@pytest.mark.parametrize("a0", [0.0, 0.7])
def test_the_kernel_is_the_expectation_over_weights(a0: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)) / 2, rng.normal(size=(4, 5)) / 2
    sigma = Activation(0.6, 0.8, a0)
    w = rng.normal(size=(5, 1_000_000))
    assert sigma.kernel(a, b) == pytest.approx(sigma(a @ w) @ sigma(b @ w).T / w.shape[1], abs=0.03)


def test_the_kernel_tends_to_its_equivalent() -> None:
    # arXiv 2110.01899, theorem 1: the gap of the centred kernels in operator norm falls like 1 / sqrt p.
    sigma, gaps = Activation(0.5, 1.0), []
    for p in (100, 400, 1600):
        x, sign = mixture(p, p, 0, spread=3.0)
        centre = np.eye(p) - 1 / p
        mean = np.zeros(p)
        mean[0] = 2 / np.sqrt(p)
        z = x - sign[:, None] * mean
        classes = (sign[:, None] == np.array([-1.0, 1.0])).astype(float)
        phi = np.square(z).sum(1) - (1 + sign * 3 / np.sqrt(p))
        t = np.array([-3.0, 3.0])  # tr(C_a - C) / sqrt p
        pair = np.outer(1 + t / np.sqrt(p), 1 + t / np.sqrt(p))  # tr(C_a C_b) / p
        a = np.block([[np.outer(t, t) + 2 * pair, t[:, None]], [t[None], np.ones((1, 1))]])
        v = np.hstack([classes / np.sqrt(p), phi[:, None]])
        d0, d1, d2 = sigma.coefficients(tau=1.0)
        equivalent = d1 * x @ x.T + d2 * v @ a @ v.T + d0 * np.eye(p)
        gap = centre @ (sigma.kernel(x, x) - equivalent) @ centre
        gaps.append(np.linalg.norm(gap, 2) / np.linalg.norm(centre @ equivalent @ centre, 2))
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[0] / gaps[2] > 2  # 4 in the limit
    assert gaps[2] < 0.1


def grid(p: int, draws: int) -> list[Point]:
    """24 points: linear to strongly quadratic, from fewer random features than samples to more, two penalties."""
    n, points = p * 4 // 3, []
    (x, y), (x_test, y_test) = mixture(n, p, 0, 2.0), mixture(n, p, 1, 2.0)
    for a2 in (0.0, 0.25, 0.5, 1.0):
        points += random_feature_regression(
            x, y, x_test, y_test, a2=a2, num_features=(n // 2, n, 2 * n), gammas=(0.1, 1.0), draws=draws
        )
    return points


def test_theory_is_within_the_simulations_and_nears_their_mean() -> None:
    gaps = []
    for p, draws in ((48, 200), (192, 40)):
        points = grid(p, draws)
        assert len(points) == 24
        assert all(point.band[0] <= point.theory <= point.band[1] for point in points)
        gaps.append(np.mean([abs(point.theory / point.simulated - 1) for point in points]))
    assert gaps[0] / gaps[1] > 1.5  # 2 in the limit: the gap falls like 1 / sqrt p
    assert gaps[1] < 0.02


def test_one_hot_outputs_are_the_sum_of_their_columns() -> None:
    (x, y), (x_test, y_test) = mixture(60, 20, 0), mixture(40, 20, 1)
    options = {"a2": 0.3, "num_features": [50], "gammas": [0.5], "draws": 2}
    hot, hot_test = (np.stack([v > 0, v < 0], 1) - 0.5 for v in (y, y_test))
    [both] = random_feature_regression(x, hot, x_test, hot_test, **options)
    parts = [random_feature_regression(x, hot[:, i], x_test, hot_test[:, i], **options)[0] for i in range(2)]
    assert both.theory == pytest.approx(sum(p.theory for p in parts))
    assert both.simulated == pytest.approx(sum(p.simulated for p in parts))


def test_samples_are_scaled_and_bad_settings_refused() -> None:
    x, _ = scaled(np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 9 + 4, np.zeros((2, 7)))
    assert np.square(x).sum(1).mean() == pytest.approx(1)
    with pytest.raises(UsageError, match="must be positive"):
        random_feature_regression(x, x[:, 0], x, x[:, 0], a2=0.0, num_features=[3], gammas=[0.0])
