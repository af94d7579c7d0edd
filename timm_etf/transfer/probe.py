"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on validation images."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_etf.features.extract import Features
from timm_etf.transfer.logistic import logistic_path
from timm_etf.transfer.result import Result, fit_and_validation

STRENGTHS = tuple(np.logspace(-6, 5, 45).tolist())
"""Strengths tried, as in Kornblith et al. 2019: lambda in sum of cross-entropies + lambda/2 |W|^2, or 1/C."""

TREATMENT = "standardised with the training images' mean and deviation"


def linear_probe(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
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

    Returns:
        The result on every test image; `chosen` has the strength.
    """
    both, held = fit_and_validation(train, validation, seed)
    fitted = ~held if not held.all() else held
    x, x_test = standardised(both.x, both.x[fitted], device=device), None
    y = torch.from_numpy(both.y).to(device)
    fit, val = (torch.from_numpy(m).to(device) for m in (fitted, held))
    classes = len(both.class_names)
    path = logistic_path(x[fit], y[fit], classes, STRENGTHS)
    scores = [(logits(x[val], w).argmax(1) == y[val]).sum().item() for w in path]
    best = max(s for s, score in zip(STRENGTHS, scores, strict=True) if score == max(scores))
    del path, x
    x, x_test = (standardised(f.x, both.x, device=device) for f in (both, test))
    predicted = logits(x_test, logistic_path(x, y, classes, [best])[0]).argmax(1).cpu().numpy()
    return Result((predicted == test.y).astype(np.float32), test.y, TREATMENT, {"strength": best})


def standardised(x: NDArray[np.float32], reference: NDArray[np.float32], *, device: str | torch.device) -> Tensor:
    """Features less the reference's mean, over its deviation; 0 where the reference is constant."""
    mean, deviation = reference.mean(axis=0), reference.std(axis=0)
    # A feature that is constant in training carries nothing: it becomes 0 instead of a division by 0.
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0).astype(np.float32)
    return torch.from_numpy((x - mean) * scale).to(device)


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """Logits [n, K] of features [n, d] under weights and biases [K, d + 1]."""
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T)
