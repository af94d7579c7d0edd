"""Nearest neighbours by cosine, weighted by similarity; number and temperature chosen on validation images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timm_etf.features.extract import Features
from timm_etf.transfer.result import Result, fit_and_validation

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2)
"""A neighbour of similarity s has exp(s / temperature) votes (Wu et al. 2018, arXiv 1805.01978)."""

TREATMENT = "unit length"

_BLOCK = 1024


def knn(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Result:
    """Classify each test image by the training images nearest to it.

    Args:
        train: Features to be neighbours.
        test: Features to score.
        validation: Features that choose; by default a random fifth of every class of `train`. They are neighbours, too,
            in the end.
        seed: Seed of that fifth.
        device: Where to compute.

    Returns:
        The result on every test image; `chosen` has the number of neighbours and the temperature.
    """
    both, held = fit_and_validation(train, validation, seed)
    x, x_test = (torch.nn.functional.normalize(torch.from_numpy(f.x).to(device)) for f in (both, test))
    y = torch.from_numpy(both.y).to(device)
    val = torch.from_numpy(held).to(device)
    fit = ~val if not held.all() else val
    classes = len(both.class_names)
    settings = [(k, t) for k in NEIGHBOURS for t in TEMPERATURES if k <= int(fit.sum())]
    votes = vote(x[fit], y[fit], x[val], classes, settings)
    right = (votes == y[val]).sum(1).cpu().numpy()
    k, temperature = settings[int(right.argmax())]
    predicted = vote(x, y, x_test, classes, [(k, temperature)])[0].cpu().numpy()
    return Result((predicted == test.y).astype(np.float32), test.y, TREATMENT, {"k": k, "temperature": temperature})


def vote(x: Tensor, y: Tensor, queries: Tensor, num_classes: int, settings: Sequence[tuple[int, float]]) -> Tensor:
    """Class with the most votes, for every setting at once.

    Args:
        x: Unit features of the neighbours, [n, d].
        y: Their class numbers, [n].
        queries: Unit features to classify, [m, d].
        num_classes: K.
        settings: Pairs of a number of neighbours, at most n, and a temperature.

    Returns:
        Class numbers, [settings, m].
    """
    most = max(k for k, _ in settings)
    answers = []
    for block in queries.split(_BLOCK):  # the similarities of a block fit into memory, those of all need not
        similarity, nearest = (block @ x.T).topk(most, dim=1)
        labels = y[nearest]
        votes = similarity.new_zeros(len(settings), len(block), num_classes)
        for total, (k, temperature) in zip(votes, settings, strict=True):
            # Relative to the nearest, which changes no order and cannot overflow.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            total.scatter_add_(1, labels[:, :k], weights)
        answers.append(votes.argmax(2))
    return torch.cat(answers, dim=1)
