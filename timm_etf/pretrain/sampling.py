"""Which images a process trains on, in which order and with which random augmentation: functions of the seed."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from timm_etf.data.seeded import random_states


class EpochSampler(Sampler[int]):
    """Shuffled batches of one process, a function of (seed, epoch, step) alone.

    Every epoch permutes all samples with a generator of its own and splits them into steps of batch_size x world_size;
    the rest, less than one step, is left out of this epoch. So a run that continues at any step sees what it would
    have seen, and no sample twice.

    An item is `epoch * num_samples + index`, from which `timm_etf.data.seeded.SeededDataset` recovers both.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size
        self.seed = seed
        self.epoch = self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return self.num_samples // (self.batch_size * self.world_size)

    def start_at(self, epoch: int, step: int) -> None:
        """Make the next iteration that epoch's, from that step on."""
        self.epoch, self.first_step = epoch, step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        steps = order[: self.steps_per_epoch * self.batch_size * self.world_size]
        mine = steps.view(self.steps_per_epoch, self.world_size, self.batch_size)[self.first_step :, self.rank]
        return iter((mine.flatten() + self.epoch * self.num_samples).tolist())

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.batch_size


class SeededStream(IterableDataset[Any]):
    """A stream whose order and random augmentation depend on (seed, rank, epoch) and the number of workers alone.

    Args:
        dataset: timm's data set around a reader; it learns of the epoch before the workers start.
        seed: The run's seed.
        rank: Number of this process among those that train.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank, self.epoch = dataset, seed, rank, 0

    def start_at(self, epoch: int) -> None:
        """Make the next iteration that epoch's."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)
        # The readers make their shuffle buffers once, and those go on from where the last epoch left them.
        self.dataset.reader.ds = None
        self.dataset.reader.worker_seed = self.loader_seed

    @property
    def loader_seed(self) -> int:
        """Seed for the loader, from which its workers have theirs and, in their turn, shuffle."""
        return hash((self.seed, self.rank, self.epoch)) % 2**63

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        samples, end = iter(self.dataset), object()
        for number in itertools.count():
            with random_states(self.seed, self.rank, self.epoch, worker.id if worker else 0, number):
                sample = next(samples, end)
            if sample is end:
                return
            yield sample
