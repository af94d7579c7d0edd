"""Data that can only be read from its start on: its order, and its division among processes and loader workers."""

import dataclasses
import io
import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image
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
        self.dataset, self.seed, self.rank, self.epoch, self.seen = dataset, seed, rank, 0, 0

    def start_at(self, epoch: int, seen: int = 0) -> None:
        """Make the next iteration that epoch's, without the first samples that each worker has given, `seen` of them.

        What a shuffle buffer holds then may be from anywhere before, so these are read again, but not decoded.
        """
        self.epoch, self.seen = epoch, seen
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
        place = worker.id if worker else 0
        samples, end = iter(self.dataset), object()
        if self.seen:
            self._read_again(samples, told=self.rank == place == 0)
        for number in itertools.count(self.seen):
            with random_states(self.seed, self.rank, self.epoch, place, number):
                sample = next(samples, end)
            if sample is end:
                return
            yield sample

    def _read_again(self, samples: Iterator[Any], *, told: bool) -> None:
        _leave_undecoded(self.dataset.reader, self.seen)
        transform, self.dataset.transform = self.dataset.transform, None
        next(samples, None)  # fills the shuffle buffer, which takes longer
        started = time.monotonic()
        for number in range(1, self.seen):
            next(samples, None)
            if told and (spent := time.monotonic() - started) > 2:
                told, seconds = False, spent / number * (self.seen - number)
                what = f"{self.seen} images that each worker gave before are read again, to find the next"
                print(f"{what}: about {seconds:.0f} s", file=sys.stderr)
        self.dataset.transform = transform


def _leave_undecoded(reader: Any, count: int) -> None:
    """Have a reader give anything in place of its first images; tfds decodes them all the same.

    Args:
        reader: timm's, in the process that reads, where it has not begun.
        count: Number of images. A broken one counts, though wds leaves it out where it decodes it.
    """
    left = iter(range(count))  # over all passes of a worker that repeats its shards
    if _is_hfids(reader):
        reader._lazy_init()
        reader.ds = _Undecoded(reader.ds, left)
    elif type(reader).__name__ == "ReaderWds":
        with io.BytesIO() as file:
            Image.new("RGB", (1, 1)).save(file, "ppm")
            blank = {reader.input_key.partition(";")[0]: file.getvalue()}

        def blanks(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for sample in samples:
                yield sample if next(left, None) is None else sample | blank

        reader._lazy_init()
        reader.ds.pipeline.insert(-2, blanks)  # after it come decoding and renaming


class _Undecoded:
    """A Hugging Face data set in its order, which repeats its first sample while any are `left`."""

    def __init__(self, dataset: Any, left: Iterator[int]) -> None:
        self.features, self.left, self.first = dataset.features, left, None
        self.rows = dataset.decode(False).with_format("arrow")  # tables of one row, which cost next to nothing

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that epoch's."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if next(self.left, None) is None or self.first is None:
                self.first = self.features.decode_example(row.to_pylist()[0])
            yield self.first


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
