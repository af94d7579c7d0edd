"""Few-shot: logistic regression on a handful of training images per class, over many draws of them."""

import numpy as np
import torch

from timm_etf.errors import UsageError
from timm_etf.features.extract import Features
from timm_etf.transfer.logistic import logistic_path
from timm_etf.transfer.probe import logits
from timm_etf.transfer.result import Result

SHOTS = (1, 5, 10)
DRAWS = 10

TREATMENT = "less the mean of the few images, unit length"
STRENGTH = 1.0
"""lambda in sum of cross-entropies + lambda/2 |W|^2; fixed, because so few images can choose nothing."""


def fewshot(
    train: Features,
    test: Features,
    shots: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Result:
    """Fit on `shots` random training images of every class and score on `test`, `draws` times.

    A class that has fewer gives all it has; `chosen` says how many such classes there are.

    Args:
        train: Features to draw from.
        test: Features to score.
        shots: Images per class.
        draws: Number of draws; the result is their mean.
        seed: Seed of the draws.
        device: Where to compute.

    Returns:
        The mean result on every test image.

    Raises:
        UsageError: If most classes have fewer training images than `shots`.
    """
    counts = np.bincount(train.y, minlength=len(train.class_names))
    present = np.flatnonzero(counts)
    fewer = [train.class_names[k] for k in present if counts[k] < shots]
    if 2 * len(fewer) > len(present):
        raise UsageError(
            f"{len(fewer)} of {len(present)} classes have fewer than {shots} training images, such as {fewer[0]!r}."
        )
    rng = np.random.default_rng(seed)
    x_test, y_test = torch.from_numpy(test.x).to(device), torch.from_numpy(test.y).to(device)
    correct = torch.zeros(len(test.y), device=device)
    for _ in range(draws):
        # Sort by class, at random within each, and take the first few of every class.
        order = np.lexsort((rng.random(len(train.y)), train.y))
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[place < shots]
        support = torch.from_numpy(train.x[rows]).to(device)
        mean = support.mean(0)
        support, queries = (torch.nn.functional.normalize(x - mean) for x in (support, x_test))
        y = torch.from_numpy(train.y[rows]).to(device)
        weights = logistic_path(support, y, len(train.class_names), [STRENGTH])[0]
        correct += logits(queries, weights).argmax(1) == y_test
    return Result(
        (correct / draws).cpu().numpy(), test.y, TREATMENT, {"draws": draws, "classes_with_fewer": len(fewer)}
    )
