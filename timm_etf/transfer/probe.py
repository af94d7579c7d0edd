"""Linear probe: multinomial logistic regression on frozen features, its weight decay chosen on a validation split."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.transfer.features import Features

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths tried: lambda in mean loss + lambda/2 |W|^2, on standardised features."""


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

    Features are standardised with the training split's mean and deviation. The weight decay is the best of
    `WEIGHT_DECAYS` on a random fifth of every class of the training split; the model is then fitted again on all of
    it. The test split decides nothing.

    Args:
        train: Features to fit on.
        test: Features to score.
        seed: Seed of the validation fifth.

    Returns:
        The result on every test image.

    Raises:
        UsageError: If the two splits have different classes.
    """
    if train.class_to_idx != test.class_to_idx:
        odd = sorted(set(train.class_to_idx) ^ set(test.class_to_idx))
        raise UsageError(f"Both splits of a target need the same classes; only one has {', '.join(odd[:3])}.")
    num_classes = len(train.class_to_idx)
    mean, deviation = train.x.mean(axis=0), train.x.std(axis=0)
    # A feature that is constant in training carries nothing: it becomes 0 instead of a division by 0.
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0).astype(np.float32)
    x, x_test = (torch.from_numpy((f.x - mean) * scale) for f in (train, test))
    y = torch.from_numpy(train.y)
    held = torch.from_numpy(_fifth_of_every_class(train.y, seed))
    weights = None
    scores = []
    for weight_decay in WEIGHT_DECAYS:  # from strong to weak, each fit starting at the one before
        weights = fit_logistic(x[~held], y[~held], num_classes, weight_decay, start=weights)
        scores.append((_logits(x[held], weights).argmax(1) == y[held]).double().mean().item())
    best = WEIGHT_DECAYS[int(np.argmax(scores))]
    predicted = _logits(x_test, fit_logistic(x, y, num_classes, best)).argmax(1).numpy()
    return Probe(predicted == test.y, best, num_classes)


def fit_logistic(x: Tensor, y: Tensor, num_classes: int, weight_decay: float, start: Tensor | None = None) -> Tensor:
    """Minimise mean cross-entropy + weight_decay/2 |W|^2 by L-BFGS; the bias is not penalised.

    Args:
        x: Features, float of shape [n, d].
        y: Class numbers in [0, num_classes), int64 of shape [n].
        num_classes: K.
        weight_decay: At least 0.
        start: Where to start, [K, d + 1]; zero by default.

    Returns:
        Weights and, in the last column, biases: [K, d + 1].
    """
    weights = torch.zeros(num_classes, x.shape[1] + 1, dtype=x.dtype) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=200,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(_logits(x, weights), y)
        loss = loss + weight_decay / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(objective)
    return weights.detach()


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T)


def _fifth_of_every_class(y: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Mask of a random fifth of each class, rounded; a class of one or two images keeps them all for the fit."""
    shuffled = np.random.default_rng(seed).permutation(len(y))
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    counts = np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(y), dtype=bool)
    held[by_class] = place < np.repeat(np.rint(counts / 5), counts)
    return held


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
