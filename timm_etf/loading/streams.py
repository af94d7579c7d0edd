"""Data that can only be read from its start on: its order, and its division among processes and loader workers."""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from timm_etf.data.seeded import random_states
from timm_etf.errors import UsageError


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


def num_shards(reader: Any) -> int | None:
    """Shards of a stream; None for tfds, which divides samples if there are too few shards.

    Raises:
        ValueError: If hfids has no such split; timm's reader notices when it is read from.
        FileNotFoundError: If wds has no such shard in a local folder; timm's reader goes on without it.
    """
    if _is_hfids(reader):
        return reader.builder.as_streaming_dataset(split=reader.split).num_shards
    filenames = getattr(reader.split_info, "filenames", None)
    if filenames is None:
        return None
    if os.path.isdir(reader.root):
        for name in filenames:
            if not os.path.exists(os.path.join(reader.root, name)):
                raise FileNotFoundError(f"there is no {name} in {reader.root}")
    return len(filenames)


def divide(dataset: Any, rank: int, world_size: int, workers: int) -> None:
    """Give each process, and each of its workers, its own shards of a training stream, by the reader's own rule.

    Args:
        dataset: timm's data set around a reader.
        rank: Number of this process among `world_size`; the first one warns of an uneven division.
        world_size: Number of processes.
        workers: Loader workers of each.

    Raises:
        UsageError: If there are fewer shards than workers: some would have nothing to read.
    """
    reader = dataset.reader
    reader.dist_rank, reader.dist_num_replicas = rank, world_size
    dataset.set_loader_cfg(num_workers=workers)
    if (shards := num_shards(reader)) is None:
        return
    # Where datasets cannot divide shards among processes evenly, it gives each process every n-th sample of them all.
    sharing = 1 if _is_hfids(reader) and shards % world_size else world_size
    workers = max(1, workers)
    readers = sharing * workers
    among = f"{sharing} processes x {workers} workers" if sharing > 1 else f"{workers} workers"
    if shards < readers:
        most = shards // sharing
        fix = f"use --workers {most}" if most else "start fewer processes, or write more shards"
        raise UsageError(f"The training data has {shards} shards, too few for {among}: {fix}.")
    if rank == 0 and (more := shards % readers):
        even = [n for n in range(1, shards // sharing + 1) if shards % (sharing * n) == 0]
        fix = f"--workers {min(even, key=lambda n: abs(n - workers))}" if even else "no number of --workers"
        share = more * (shards // readers + 1 - shards / readers) / shards
        print(
            f"warning: {shards} shards are not evenly divided among {among}: about {share:.1%} of the images are left "
            f"out of an epoch, and as many are repeated; {fix} divides them evenly.",
            file=sys.stderr,
        )


def share_out(dataset: Any, rank: int, world_size: int) -> None:
    """Give each process its own part of a validation stream: none is padded or dropped, and parts may differ in size.

    Args:
        dataset: timm's data set around a reader.
        rank: Number of this process among `world_size`.
        world_size: Number of processes.
    """
    reader = dataset.reader
    if _is_hfids(reader):
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        return
    # The other readers pad or drop samples if they know of other processes: they are told that they are alone.
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    shards = getattr(reader.split_info, "filenames", ())
    if len(shards) >= world_size:
        reader.split_info = dataclasses.replace(reader.split_info, filenames=shards[rank::world_size])
    else:
        dataset.reader = _EveryNth(reader, rank, world_size)


def _is_hfids(reader: Any) -> bool:
    return type(reader).__name__ == "ReaderHfids"  # importing the class would import datasets for every stream


class _EveryNth:
    """Reader that keeps every n-th sample of a stream, for those that cannot be divided in any other way."""

    def __init__(self, reader: Any, rank: int, world_size: int) -> None:
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.reader), self.rank, None, self.world_size)
