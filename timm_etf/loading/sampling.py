"""Which images a process trains on, and in which order: a function of the seed."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Shuffled batches of one process, a function of (seed, epoch, batch) alone.

    Every pass permutes all samples with a generator of its own; an epoch is one pass or several. It is cut into batches
    of batch_size x world_size, and each process takes its share of each; the rest, less than one such batch, is left
    out of this epoch. So a run that continues at any batch sees what it would have seen, and batches of several
    processes are those of one process that accumulates them.

    An item is `round * num_samples + index`, from which `timm_etf.data.seeded.SeededDataset` recovers the index; no two
    items of a run are alike.

    Args:
        num_samples: Samples of the data set.
        batch_size: Samples of a batch on each process.
        rank: Number of this process among `world_size`.
        world_size: Number of processes.
        seed: Of the permutations.
        passes: Permutations in an epoch.
        repeats: Times that a sample follows itself. A pass then takes that many times fewer samples, as timm's
            RepeatAugSampler does, and neighbouring processes see different augmentations of a sample.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        *,
        passes: int = 1,
        repeats: int = 1,
    ) -> None:
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size
        self.seed, self.passes, self.repeats = seed, passes, repeats
        self.epoch = self.first_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.passes * self.num_samples // (self.batch_size * self.world_size)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Make the next iteration that epoch's, from that batch on."""
        self.epoch, self.first_batch = epoch, batch

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.passes
        order = torch.cat([self._pass(number) for number in range(first, first + self.passes)])
        n, b, w = self.batches_per_epoch, self.batch_size, self.world_size
        whole = order[: n * b * w]
        # Two processes have the batches that one accumulates; augmentations of one sample go to several processes.
        cut = whole.view(n, w, b) if self.repeats == 1 else whole.view(n, b, w).transpose(1, 2)
        mine = cut[self.first_batch :, self.rank]
        # Batch by batch: Python's integers take five times the memory of the tensor's.
        return chain.from_iterable(map(torch.Tensor.tolist, mine))

    def _pass(self, number: int) -> torch.Tensor:
        """Items of a pass over the samples, counted from the start of the run."""
        n, generator = self.num_samples, torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        drawn = torch.randperm(n, generator=generator)
        rounds = torch.arange(self.repeats) + number * self.repeats
        return (drawn[: -(-n // self.repeats), None] + rounds * n).flatten()[:n]

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.first_batch) * self.batch_size
