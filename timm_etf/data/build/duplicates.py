"""Pictures that occur twice: the same drawing under two weights, names or families."""

from collections.abc import Sequence

from timm_etf.data.build.image_folder import Item

_COPY, _NEAR_COPY = 0.99, 0.97


def without_copies(items: Sequence[Item], order: Sequence[str]) -> list[Item]:
    """Drop every drawing that looks like an earlier one.

    Two drawings are alike if their centred 16 x 16 thumbnails have a cosine above 0.99, or above 0.97 where one of
    them would be trained on and the other tested.

    Args:
        items: Grey images, all of one size, a multiple of 16.
        order: Split names. A copy is taken out of the later split, so held-out splits come before training splits.

    Returns:
        The items that stay, sorted by `order`.
    """
    import numpy as np

    items = sorted(items, key=lambda i: order.index(i.split))
    splits = np.array([order.index(i.split) for i in items])
    side = items[0].pixels.shape[0] // 16 if items else 1
    vectors = np.empty((len(items), 256), dtype=np.float32)
    for row, item in enumerate(items):
        vectors[row] = item.pixels.reshape(16, side, 16, side).mean(axis=(1, 3)).ravel()
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    keep = np.ones(len(items), dtype=bool)
    for start in range(0, len(items), 1024):  # blocks bound the memory of the product
        stop = min(start + 1024, len(items))
        alike = vectors[start:stop] @ vectors[:stop].T
        alike[splits[start:stop, None] != splits[:stop]] += _COPY - _NEAR_COPY
        keep[start:stop] = ~np.tril(alike > _COPY, k=start - 1).any(axis=1)
    return [item for item, kept in zip(items, keep, strict=True) if kept]
