"""Intervals: over test images by bootstrap, over trainings by Student's t, and over both."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, without the import of all distributions


def bootstrap(
    values: ArrayLike, draws: int = 2000, seed: int = 0, *, strata: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Means of resamples with replacement.

    A resample's mean depends only on how often each distinct value is drawn, and those numbers are multinomial: so the
    cost does not grow with the number of samples, only with that of distinct values.

    Args:
        values: Shape [n].
        draws: Number of resamples.
        seed: Seed of the draws.
        strata: Stratum of each value, [n]. Each is resampled by itself, so that its size stays, and the mean is that of
            the strata's means: accuracy per class has no variation from the sizes of the classes.

    Returns:
        Means, float64 of shape [draws].

    Example:
        >>> means = bootstrap([0.0] * 900 + [1.0] * 100)
        >>> bool(abs(means.mean() - 0.1) < 0.001), bool(abs(means.std() - 0.3 / 1000**0.5) < 0.001)
        (True, True)
    """
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    if strata is None:
        return _means_of_resamples(values, draws, rng)
    ordered = values[np.argsort(strata, kind="stable")]
    parts = np.split(ordered, np.cumsum(np.unique(strata, return_counts=True)[1])[:-1])
    return sum((_means_of_resamples(part, draws, rng) for part in parts), np.zeros(draws)) / len(parts)


def _means_of_resamples(values: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    distinct, counts = np.unique(values, return_counts=True)
    n = counts.sum()
    return rng.multinomial(n, counts / n, size=draws) @ distinct / n


def percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile interval of resampled means."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
    half = float(stdtrit(n - 1, 0.975)) * error
    return mean - half, mean + half


def in_quadrature(estimate: float, one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """95 % interval of an estimate with two independent errors, from its 95 % interval under each of them alone.

    The distances from the estimate to the ends are added as squares, each side by itself (Howe 1974, J. Amer. Statist.
    Assoc. 69, 789; Zou and Donner 2008, Statist. Med. 27, 1693). It is exact where one error outweighs the other, and
    keeps Student's t for the one that is known from few repetitions. Resampling three trainings instead would give
    two thirds of their variance and a normal's tails. What images and trainings have in common only together (one
    training's luck with one image) is in both intervals: the result is a little wide rather than narrow.

    Example:
        >>> in_quadrature(1.0, (-2.0, 4.0), (-3.0, 5.0))
        (-4.0, 6.0)
    """
    low, high = (math.hypot(estimate - a, estimate - b) for a, b in zip(one, other, strict=True))
    return estimate - low, estimate + high


def log_odds(accuracy: float, n: int) -> float:
    """Log odds of an accuracy in percent, kept half an image away from 0 and 1 (the summary of Sariyildiz et al. 2023).

    Example:
        >>> round(log_odds(75.0, 1000), 4), round(log_odds(100.0, 1000), 2)
        (1.0986, 7.6)
    """
    p = min(max(accuracy / 100, 0.5 / n), 1 - 0.5 / n)
    return math.log(p / (1 - p))
