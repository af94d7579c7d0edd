"""Random augmentation as a function of a seed and an image's place, whoever loads it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info


class SeededDataset(Dataset[Any]):
    """Images whose random augmentation depends on (seed, item) alone: not on workers, processes or a resume.

    Args:
        dataset: A map-style data set with its transform.
        seed: Of the augmentation.

    An item is `round * len(dataset) + index`: in every round an image is augmented anew.
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
    """Seed every generator that an augmentation draws from (timm's crop: Python's), and put them back afterwards.

    A loader's worker keeps them as they are: nothing else there draws from them, and putting back costs ten times as
    much as seeding.
    """
    number = hash(seed) % 2**63  # integers hash alike in every process
    states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.random.get_rng_state())
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.random.set_rng_state(states[2])
