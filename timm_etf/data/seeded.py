"""Images whose random augmentation is a function of a seed and their place, whoever loads them."""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededDataset(Dataset[Any]):
    """Images whose random augmentation depends on (seed, epoch, index) alone: not on workers, processes or a resume.

    timm's crop draws from Python's generator, other transforms from NumPy's and torch's: each is seeded for one image
    and put back afterwards.

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
        seed = hash((self.seed, item)) % 2**63  # integers hash alike in every process
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.default_generator.manual_seed(seed)
                return self.dataset[item % len(self.dataset)]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
