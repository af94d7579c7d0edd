"""Intervals: over test images by bootstrap, over seeds by Student's t."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bootstrap(values: ArrayLike, draws: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Means of resamples with replacement.

    A resample's mean depends only on how often each distinct value is drawn, and those numbers are multinomial: so the
    cost does not grow with the number of samples, only with that of distinct values.

    Args:
        values: Shape [n].
        draws: Number of resamples.
        seed: Seed of the draws.

    Returns:
        Means, float64 of shape [draws].

    Example:
        >>> means = bootstrap([0.0] * 900 + [1.0] * 100)
        >>> bool(abs(means.mean() - 0.1) < 0.001), bool(abs(means.std() - 0.3 / 1000**0.5) < 0.001)
        (True, True)
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = counts.sum()
    picks = np.random.default_rng(seed).multinomial(n, counts / n, size=draws)
    return picks @ distinct / n


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent repetitions by Student's t; None for fewer than two.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = _t_quantile(n - 1) * error
    return mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: the root of its distribution function, integrated by Simpson's rule."""

    def inside(t: float) -> float:  # probability of (-t, t)
        angle = math.atan(t / math.sqrt(freedom))  # t = sqrt(f) tan(angle) makes the density a power of a cosine
        grid = np.linspace(0, angle, 2001)
        values = np.cos(grid) ** (freedom - 1)
        simpson = (values[0] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum() + values[-1]) * angle / 2000 / 3
        return 2 * simpson * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def log_odds(accuracy: float, n: int) -> float:
    """Log odds of an accuracy in percent, kept half an image away from 0 and 1 (the summary of Sariyildiz et al. 2023).

    Example:
        >>> round(log_odds(75.0, 1000), 4), round(log_odds(100.0, 1000), 2)
        (1.0986, 7.6)
    """
    p = min(max(accuracy / 100, 0.5 / n), 1 - 0.5 / n)
    return math.log(p / (1 - p))
