"""Which of many labelled images a target of few takes."""

import numpy as np
from numpy.typing import NDArray

from timm_etf.errors import UsageError


def draw(labels: NDArray[np.int64], count: int, *, every_class: bool = False, seed: int = 0) -> NDArray[np.int64]:
    """Draw images at random: classes have their shares, up to chance.

    Args:
        labels: Class numbers, int64 of shape [n].
        count: How many to draw.
        every_class: Draw one of each class first: no protocol learns a class that it has no image of.
        seed: Of the draw.

    Returns:
        Their places in ascending order, int64 of shape [count].

    Raises:
        UsageError: If there are fewer images, or more classes where each is to have one.

    Example:
        >>> draw(np.array([0] * 9 + [1]), 4, every_class=True).tolist()
        [2, 4, 6, 9]
    """
    if count > len(labels):
        raise UsageError(f"train_images asks for {count} of {len(labels)} images")
    order = np.random.default_rng(seed).permutation(len(labels))
    if every_class:
        _, first = np.unique(labels[order], return_index=True)
        if len(first) > count:
            raise UsageError(f"train_images leaves {count} images to fit on for {len(first)} classes")
        order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:count])
