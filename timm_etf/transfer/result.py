"""What a protocol found on one target with one model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_etf.data.catalogue import Metric
from timm_etf.features.extract import Features
from timm_etf.report.statistics import bootstrap, percentiles


@dataclass(frozen=True)
class Result:
    """One protocol's outcome on every test image.

    Attributes:
        correct: How often each test image was classified correctly, in [0, 1] (a mean over draws), float32 [n].
        y: Its class number, int64 [n].
        treatment: What was done to the features, or how the model was trained, in words.
        chosen: Hyper-parameters that validation chose.
        order: How bad mistakes are and who is near whom, by name, where the target's classes have a tree.
    """

    correct: NDArray[np.float32]
    y: NDArray[np.int64]
    treatment: str
    chosen: dict[str, Any] = field(default_factory=dict)
    order: dict[str, float] = field(default_factory=dict)

    def accuracy(self, metric: Metric = "top1") -> float:
        """Accuracy in percent."""
        return 100 * float((self.correct * sample_weights(self.y, metric)).mean())

    def interval(self, metric: Metric = "top1", *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the accuracy over test images, in percent."""
        return percentiles(resampled(100 * self.correct, self.y, metric, draws=draws, seed=seed))


def sample_weights(y: NDArray[np.int64], metric: Metric) -> NDArray[np.float64]:
    """Weights of mean 1 that turn a mean over images into the metric: equal, or equal in sum for every class."""
    if metric == "top1":
        return np.ones(len(y))
    counts = np.bincount(y)
    return len(y) / (np.count_nonzero(counts) * counts[y])


def resampled(
    values: NDArray[Any], y: NDArray[np.int64], metric: Metric, *, draws: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """The metric of resampled test images.

    For a mean per class, images are resampled within their classes: the classes and their sizes are the target's.

    Args:
        values: Of each test image, [n].
        y: Its class number, [n].
        metric: How the images count.
        draws: Number of resamples.
        seed: Seed of the draws.

    Returns:
        float64 of shape [draws].
    """
    return bootstrap(values, draws, seed, strata=y if metric == "mean_per_class" else None)


def paired_difference(
    a: Result, b: Result, metric: Metric = "top1", *, draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Accuracy of `b` less that of `a` on the same test images, with its 95 % bootstrap interval, in percentage points.

    Both models see the same resampled images, so what is common to them cancels.
    """
    difference = 100 * (b.correct.astype(np.float64) - a.correct)
    interval = percentiles(resampled(difference, a.y, metric, draws=draws, seed=seed))
    return float((difference * sample_weights(a.y, metric)).mean()), interval


def validation_mask(y: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Mask of a random fifth of each class, rounded; a class of one or two images keeps them all for the fit."""
    shuffled = np.random.default_rng(seed).permutation(len(y))
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    counts = np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(y), dtype=bool)
    held[by_class] = place < np.repeat(np.rint(counts / 5), counts)
    return held


def fit_and_validation(train: Features, validation: Features | None, seed: int) -> tuple[Features, NDArray[np.bool_]]:
    """All images to fit on in the end, and which of them choose the hyper-parameters before."""
    if validation is None:
        held = validation_mask(train.y, seed)
        if not held.any():  # three images in no class: what is fitted is also what chooses
            held[:] = True
        return train, held
    both = Features(np.concatenate([train.x, validation.x]), np.concatenate([train.y, validation.y]), train.class_names)
    return both, np.arange(len(both.y)) >= len(train.y)
