"""Random augmentation as a function of a seed and an image's place, whoever loads it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededDataset(Dataset[Any]):
    """Images whose random augmentation depends on (seed, epoch, index) alone: not on workers, processes or a resume.

    Args:
        dataset: A map-style data set with its transform.
        seed: Of the augmentation.

    An item is `epoch * len(dataset) + index`.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> Any:
        with random_states(self.seed, item):
            return self.dataset[item % len(self.dataset)]


@contextmanager
def random_states(*seed: int) -> Iterator[None]:
    """Seed every generator that an augmentation draws from (timm's crop: Python's), and put them back afterwards."""
    number = hash(seed) % 2**63  # integers hash alike in every process
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
