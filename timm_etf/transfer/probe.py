"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on a validation split."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_etf.errors import UsageError
from timm_etf.transfer.features import Features

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths tried: lambda in mean loss + lambda/2 |w|^2, on standardised features."""


@dataclass(frozen=True)
class Probe:
    """Result of a probe.

    Attributes:
        correct: Whether each test image was classified correctly, bool of shape [n].
        weight_decay: The strength of the regularisation chosen.
        num_classes: Number of classes.
    """

    correct: NDArray[np.bool_]
    weight_decay: float
    num_classes: int

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float(self.correct.mean())

    def interval(self, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the accuracy over test images, in percent."""
        return _bootstrap(self.correct.astype(np.float64), draws, seed)


def linear_probe(train: Features, test: Features, *, seed: int = 0) -> Probe:
    """Fit L2-regularised logistic regression on `train` and score it on `test`.

    Features are standardised with the training split's mean and deviation. The strength of the regularisation is the
    best of `WEIGHT_DECAYS` on a random fifth of the training split, stratified by class where every class has two
    images; the model is then fitted again on all of it. The test split decides nothing.

    Args:
        train: Features to fit on.
        test: Features to score.
        seed: Seed of the validation fifth.

    Returns:
        The result on every test image.

    Raises:
        UsageError: If the two splits have different classes.
    """
    from sklearn.model_selection import train_test_split

    if train.class_to_idx != test.class_to_idx:
        odd = sorted(set(train.class_to_idx) ^ set(test.class_to_idx))
        raise UsageError(f"Both splits of a target need the same classes; only one has {', '.join(odd[:3])}.")
    mean, deviation = train.x.mean(axis=0), train.x.std(axis=0)
    # A feature that is constant in training carries nothing: it becomes 0 instead of a division by 0.
    scale = np.where(deviation > 1e-8, 1 / np.maximum(deviation, 1e-8), 0)
    x, x_test = (train.x - mean) * scale, (test.x - mean) * scale
    stratify = train.y if np.bincount(train.y).min() > 1 and len(train.y) >= 5 * len(train.class_to_idx) else None
    fit, held = train_test_split(np.arange(len(x)), test_size=0.2, random_state=seed, stratify=stratify)
    scores = [(_fit(x[fit], train.y[fit], w).predict(x[held]) == train.y[held]).mean() for w in WEIGHT_DECAYS]
    best = WEIGHT_DECAYS[int(np.argmax(scores))]
    correct = _fit(x, train.y, best).predict(x_test) == test.y
    return Probe(correct, best, len(train.class_to_idx))


def _fit(x: NDArray[np.float32], y: NDArray[np.int64], weight_decay: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's C multiplies the loss summed over samples.
    model = LogisticRegression(C=1 / (weight_decay * len(x)), max_iter=200)
    with warnings.catch_warnings():
        # Weakly regularised fits may stop at max_iter; the validation fifth judges them as they are.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


def paired_difference(a: Probe, b: Probe, *, draws: int = 2000, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Accuracy of `b` less that of `a` on the same test images, with its 95 % bootstrap interval, in percentage points.

    Both models see the same resampled images, so what is common to them cancels.
    """
    difference = b.correct.astype(np.float64) - a.correct.astype(np.float64)
    return 100 * float(difference.mean()), _bootstrap(difference, draws, seed)


def _bootstrap(values: NDArray[np.float64], draws: int, seed: int) -> tuple[float, float]:
    picks = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    low, high = np.percentile(100 * values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
