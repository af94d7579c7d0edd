"""Ridge regression on random features: simulated, and its test error as random-matrix theory predicts it.

With linear random features (a2 = 0) the kernel does not see how the classes' covariances differ, which is the account
of neural collapse in arXiv 2402.18614; with a quadratic part it does.

Legend: n training samples, m test samples, p features, N random features, k outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from timm_etf.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Activation:
    """sigma(t) = a2 t^2 + a1 t + a0.

    Example:
        >>> Activation(a2=0.5).coefficients(tau=2.0)
        (2.0, 1.0, 0.25)
    """

    a2: float
    a1: float = 1.0
    a0: float = 0.0

    def __call__(self, t: Array) -> Array:
        """Value at every entry."""
        return (self.a2 * t + self.a1) * t + self.a0

    def coefficients(self, tau: float) -> tuple[float, float, float]:
        """d_0, d_1 and d_2 of the kernel's equivalent (arXiv 2110.01899) for samples of mean squared norm tau."""
        return 2 * (tau * self.a2) ** 2, self.a1**2, self.a2**2

    def kernel(self, a: Array, b: Array) -> Array:
        """E[sigma(w'a) sigma(w'b)] for w ~ N(0, I), between the rows of `a` and `b`.

        With r = a'b: a2^2 (|a|^2 |b|^2 + 2 r^2) + a1^2 r + a2 a0 (|a|^2 + |b|^2) + a0^2.
        """
        r = a @ b.T
        s, t = np.square(a).sum(1)[:, None], np.square(b).sum(1)
        return self.a2**2 * (s * t + 2 * r * r) + self.a1**2 * r + self.a2 * self.a0 * (s + t) + self.a0**2


@dataclass(frozen=True)
class Point:
    """Test error for one number of random features and one regularisation.

    Attributes:
        num_features: N.
        gamma: Ridge penalty.
        theory: Deterministic equivalent of the test error.
        simulated: Its mean over draws of the random features.
        band: Smallest and largest of the draws.
    """

    num_features: int
    gamma: float
    theory: float
    simulated: float
    band: tuple[float, float]


def random_feature_regression(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    x_test: NDArray[np.floating],
    y_test: NDArray[np.floating],
    *,
    a2: float,
    a1: float = 1.0,
    a0: float = 0.0,
    num_features: Sequence[int],
    gammas: Sequence[float],
    draws: int = 10,
    seed: int = 0,
) -> list[Point]:
    """Test mean squared error of ridge regression on sigma(W x), W Gaussian of shape [N, p].

    The weights are b = (S S' / n + gamma I)^-1 S y / n with S = sigma(W X) of shape [N, n]. Beside the simulation
    stands the deterministic equivalent of Louart, Liao and Couillet (2018, arXiv 1702.05419), which needs no draw.

    Args:
        x: Training samples [n, p], of mean squared norm about 1 (see `scaled`).
        y: Their labels, [n] or [n, k]: +-1, or one-hot less its mean.
        x_test: Test samples [m, p].
        y_test: Their labels.
        a2: Quadratic coefficient of sigma.
        a1: Linear one.
        a0: Constant one.
        num_features: Values of N.
        gammas: Positive penalties.
        draws: Simulations at each N.
        seed: Of the draws.

    Returns:
        A point for every N and gamma, N outermost.

    Raises:
        UsageError: If a penalty, N or the number of draws is not positive.
    """
    if min(gammas) <= 0 or min(num_features) < 1 or draws < 1:
        raise UsageError("Penalties, numbers of random features and draws must be positive.")
    data = [np.asarray(v, np.float64).reshape(len(v), -1) for v in (x, y, x_test, y_test)]
    sigma, rng = Activation(a2, a1, a0), np.random.default_rng(seed)
    predict = _Theory(sigma, *data)
    points = []
    for count in num_features:
        errors = np.array([_simulate(sigma, rng, count, gammas, *data) for _ in range(draws)])
        for gamma, found in zip(gammas, errors.T, strict=True):
            band = (float(found.min()), float(found.max()))
            points.append(Point(count, gamma, predict(count, gamma), float(found.mean()), band))
    return points


def scaled(*samples: NDArray[np.floating]) -> list[Array]:
    """Samples less the mean of the first ones, over the root of their mean squared norm.

    Example:
        >>> scaled(np.array([[3.0, 0], [-3, 0]]), np.array([[6.0, 3]]))[1]
        array([[2., 1.]])
    """
    mean = samples[0].astype(np.float64).mean(0)
    size = np.sqrt(np.square(samples[0] - mean).sum(1).mean())
    return [(s - mean) / size for s in samples]


def _simulate(
    sigma: Activation,
    rng: np.random.Generator,
    count: int,
    gammas: Sequence[float],
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
) -> list[float]:
    """Test error at every gamma with one draw of W; one decomposition, of the smaller Gram matrix, serves them all."""
    w = rng.normal(size=(x.shape[1], count))
    s, s_test, n = sigma(x @ w), sigma(x_test @ w), len(x)
    if count < n:
        values, basis = np.linalg.eigh(s.T @ s / n)
        target, seen = basis.T @ (s.T @ y) / n, s_test @ basis
    else:
        values, basis = np.linalg.eigh(s @ s.T / n)
        target, seen = basis.T @ y, s_test @ (s.T @ basis) / n
    shrunk = (target / (values.clip(min=0) + gamma)[:, None] for gamma in gammas)
    return [float(np.square(y_test - seen @ b).sum(1).mean()) for b in shrunk]


class _Theory:
    """The deterministic equivalent on one data set, in the eigenbasis of the kernel."""

    def __init__(self, sigma: Activation, x: Array, y: Array, x_test: Array, y_test: Array) -> None:
        self.values, basis = np.linalg.eigh(sigma.kernel(x, x))
        self.values = self.values.clip(min=0)
        self.y, self.y_test = basis.T @ y, y_test
        self.cross = basis.T @ sigma.kernel(x, x_test)
        self.test_trace = _diagonal(sigma, x_test).sum()

    def __call__(self, count: int, gamma: float) -> float:
        n, m = len(self.y), len(self.y_test)
        delta = 0.0
        for _ in range(10_000):
            q = 1 / (count / n * self.values / (1 + delta) + gamma)
            delta, last = float(self.values @ q) / n, delta
            if abs(delta - last) <= 1e-12 * (1 + delta):
                break
        psi = count / n / (1 + delta)
        ratio = psi * self.values * q
        cross = psi * self.cross
        bias = np.square(self.y_test - cross.T @ (q[:, None] * self.y)).sum() / m
        noise = (psi * self.values * q**2) @ np.square(self.y).sum(1) / count / (1 - (ratio**2).sum() / count)
        spread = psi * self.test_trace - ((1 + gamma * q) * q) @ np.square(cross).sum(1)
        return float(bias + noise * spread / m)


def _diagonal(sigma: Activation, x: Array) -> Array:
    """Diagonal of `sigma.kernel(x, x)`."""
    s = np.square(x).sum(1)
    return 3 * sigma.a2**2 * s * s + (sigma.a1**2 + 2 * sigma.a2 * sigma.a0) * s + sigma.a0**2
