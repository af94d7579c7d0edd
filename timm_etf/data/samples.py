"""A folder's list of images without an object for each, which every loader worker would come to copy."""

import os
from collections.abc import Sequence

import numpy as np


class PackedSamples(Sequence[tuple[str, int]]):
    """Paths and class numbers as timm's folder reader lists them, in one run of bytes and two arrays.

    A forked worker shares its parent's memory until either writes to it, and counting references to a path is writing.

    Args:
        samples: Path and class number of each image.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        paths = [os.fsencode(path) for path, _ in samples]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)])
        self._labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override] # no slices
        i = range(len(self))[index]  # negative ones too, and an IndexError at the end
        return os.fsdecode(self._paths[self._ends[i] : self._ends[i + 1]]), int(self._labels[i])
