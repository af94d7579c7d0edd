"""Which families nothing trains on."""

import hashlib
from collections.abc import Mapping


def held_out(images: Mapping[str, int], seed: int, share: float = 0.2) -> set[str]:
    """Families that together hold at least `share` of the images, the same on every machine.

    Families that hold more than `share` by themselves stay in training: a test of one family would say little.

    Args:
        images: Number of images by family.
        seed: Another seed holds out other families.
        share: In (0, 1).

    Returns:
        The families held out; never all of them.

    Example:
        >>> sorted(held_out({"a": 10, "b": 10, "c": 10, "d": 10, "e": 60}, seed=0))
        ['a', 'd']
    """
    total = sum(images.values())
    order = sorted(images, key=lambda f: hashlib.sha256(f"{seed}:{f}".encode()).digest())
    chosen: set[str] = set()
    for name in order:
        if sum(images[f] for f in chosen) >= share * total or len(chosen) == len(images) - 1:
            break
        if images[name] <= share * total or len(images) == 2:
            chosen.add(name)
    return chosen
