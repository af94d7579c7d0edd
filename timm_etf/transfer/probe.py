"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on validation images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_etf.features.extract import Features
from timm_etf.geometry import of_rankings
from timm_etf.transfer.logistic import logistic_path
from timm_etf.transfer.result import Result, fit_and_validation

STRENGTHS = tuple(np.logspace(-6, 5, 45).tolist())
"""Strengths tried, as in Kornblith et al. 2019: lambda in sum of cross-entropies + lambda/2 |W|^2, or 1/C."""

TREATMENT = "standardised with the training images' mean and deviation"

_BLOCK = 8192
"""Samples at once."""


def linear_probe(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    distance: Tensor | None = None,
) -> Result:
    """Fit L2-regularised logistic regression and score it on `test`.

    Every one of `STRENGTHS` is fitted on the training images and scored on the validation images; the strongest of the
    best is fitted again on both. The test images decide nothing.

    Args:
        train: Features to fit on.
        test: Features to score.
        validation: Features that choose the strength; by default a random fifth of every class of `train`.
        seed: Seed of that fifth.
        device: Where to compute.
        distance: Of the classes, [K, K].

    Returns:
        The result on every test image; `chosen` has the strength, `order` how bad mistakes are, where classes have
        distances.
    """
    both, held = fit_and_validation(train, validation, seed)
    fitted = ~held if not held.all() else held
    classes, y = len(both.class_names), torch.from_numpy(both.y).to(device)
    fit, val = (torch.from_numpy(m).to(device) for m in (fitted, held))
    statistics = _statistics(both.x, fitted)
    path = logistic_path(_standardised(both.x[fitted], statistics, device), y[fit], classes, STRENGTHS)
    x_val = _standardised(both.x[held], statistics, device)
    scores = [(logits(x_val, w).argmax(1) == y[val]).sum().item() for w in path]
    best = max(s for s, score in zip(STRENGTHS, scores, strict=True) if score == max(scores))
    del path, x_val
    statistics = _statistics(both.x)
    (weights,) = logistic_path(_standardised(both.x.copy(), statistics, device), y, classes, [best])
    z = logits(_standardised(test.x.copy(), statistics, device), weights).cpu()
    order = {} if distance is None else of_rankings(z, torch.from_numpy(test.y), distance)
    correct = (z.argmax(1).numpy() == test.y).astype(np.float32)
    return Result(correct, test.y, TREATMENT, {"strength": best}, order)


def _statistics(x: NDArray[np.float32], rows: NDArray[np.bool_] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean of the features [N, D] and what to multiply them by, [D]; of some rows alone, if they are given."""
    parts = [slice(start, start + _BLOCK) for start in range(0, len(x), _BLOCK)]  # no copy of all of them
    count = len(x) if rows is None else rows.sum()
    mean = sum(_rows(x, rows, part).sum(axis=0, dtype=np.float64) for part in parts) / count
    variance = sum(np.square(_rows(x, rows, part) - mean).sum(axis=0) for part in parts) / count
    deviation = np.sqrt(variance)
    # A feature that is constant in training carries nothing: it becomes 0 instead of a division by 0.
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0)
    return mean.astype(x.dtype), scale.astype(x.dtype)


def _rows(x: NDArray[Any], rows: NDArray[np.bool_] | None, part: slice) -> NDArray[Any]:
    return x[part] if rows is None else x[part][rows[part]]


def _standardised(
    x: NDArray[np.float32], statistics: tuple[NDArray[Any], NDArray[Any]], device: str | torch.device
) -> Tensor:
    """Features less the mean, times the scale; they are changed in place."""
    mean, scale = statistics
    x -= mean
    x *= scale
    return torch.from_numpy(x).to(device)


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """Logits [n, K] of features [n, d] under weights and biases [K, d + 1]."""
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T)
