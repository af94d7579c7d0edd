"""Nearest neighbours by cosine, weighted by similarity; number and temperature chosen on validation images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timm_etf.features.extract import Features
from timm_etf.geometry import of_neighbours
from timm_etf.transfer.result import Result, fit_and_validation

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2)
"""A neighbour of similarity s has exp(s / temperature) votes (Wu et al. 2018, arXiv 1805.01978)."""

TREATMENT = "unit length"

MOST_QUERIES = 20_000
"""Validation images that choose, at most; the report says where there were more."""

_QUERIES, _NEIGHBOURS = 1024, 1 << 16
"""Similarities held at once. Memory is that of the features, whatever their number, and of one such block."""


def knn(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    distance: Tensor | None = None,
) -> Result:
    """Classify each test image by the training images nearest to it.

    Args:
        train: Features to be neighbours.
        test: Features to score.
        validation: Features that choose; by default a random fifth of every class of `train`. They are neighbours, too,
            in the end.
        seed: Seed of that fifth.
        device: Where to compute.
        distance: Of the classes, [K, K].

    Returns:
        The result on every test image; `chosen` has the number of neighbours and the temperature, `order` whether test
        images have near classes around them, where classes have distances.
    """
    both, held = fit_and_validation(train, validation, seed)
    x, y, x_test = (torch.from_numpy(array).to(device) for array in (both.x, both.y, test.x))
    val = np.flatnonzero(held)
    fit = val if held.all() else np.flatnonzero(~held)
    treatment = TREATMENT
    if len(val) > MOST_QUERIES:
        treatment += f"; chosen by {MOST_QUERIES:,} of {len(val):,} validation images"
        val = np.sort(np.random.default_rng(seed).choice(val, MOST_QUERIES, replace=False))
    classes = len(both.class_names)
    settings = [(k, t) for k in NEIGHBOURS for t in TEMPERATURES if k <= len(fit)]
    rows, queries = (torch.from_numpy(numbers).to(device) for numbers in (fit, val))
    votes = vote(x, y, x[queries], classes, settings, rows)
    right = (votes == y[queries]).sum(1).cpu().numpy()
    k, temperature = settings[int(right.argmax())]
    predicted = vote(x, y, x_test, classes, [(k, temperature)])[0].cpu().numpy()
    order = {}
    if distance is not None:
        some = slice(None, None, -(-len(test.y) // MOST_QUERIES))
        order = of_neighbours(x_test[some], torch.from_numpy(test.y[some]).to(device), distance)
    correct = (predicted == test.y).astype(np.float32)
    return Result(correct, test.y, treatment, {"k": k, "temperature": temperature}, order)


def vote(
    x: Tensor,
    y: Tensor,
    queries: Tensor,
    num_classes: int,
    settings: Sequence[tuple[int, float]],
    rows: Tensor | None = None,
) -> Tensor:
    """Class with the most votes, for every setting at once.

    Args:
        x: Features of the neighbours, [n, d].
        y: Their class numbers, [n].
        queries: Features to classify, [m, d].
        num_classes: K.
        settings: Pairs of a number of neighbours, at most n, and a temperature.
        rows: Numbers of those of `x` that count; by default all.

    Returns:
        Class numbers, [settings, m].
    """
    most = max(k for k, _ in settings)
    queries = torch.nn.functional.normalize(queries)
    count = len(x) if rows is None else len(rows)
    similar: list[Tensor] = []
    nearest: list[Tensor] = []
    for start in range(0, count, _NEIGHBOURS):
        numbers = torch.arange(start, min(start + _NEIGHBOURS, count), device=x.device)
        numbers = numbers if rows is None else rows[numbers]
        part = torch.nn.functional.normalize(x[numbers]).T
        for i, block in enumerate(queries.split(_QUERIES)):
            similarity, place = (block @ part).topk(min(most, len(numbers)), dim=1)
            if start == 0:
                similar.append(similarity)
                nearest.append(numbers[place])
            else:
                both = torch.cat([similar[i], similarity], dim=1)
                similar[i], kept = both.topk(min(most, both.shape[1]), dim=1)
                nearest[i] = torch.cat([nearest[i], numbers[place]], dim=1).gather(1, kept)
    answers = []
    for similarity, numbers in zip(similar, nearest, strict=True):
        labels = y[numbers]
        votes = similarity.new_zeros(len(settings), len(labels), num_classes)
        for total, (k, temperature) in zip(votes, settings, strict=True):
            # Relative to the nearest, which changes no order and cannot overflow.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            total.scatter_add_(1, labels[:, :k], weights)
        answers.append(votes.argmax(2))
    return torch.cat(answers, dim=1)
