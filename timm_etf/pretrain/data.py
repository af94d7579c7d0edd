"""Training and validation batches from any timm data set, the same images on any number of processes."""

import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset
from tqdm import tqdm

from timm_etf.errors import UsageError
from timm_etf.pretrain.config import PretrainConfig

_logger = logging.getLogger(__name__)

CHECKED_IMAGES = 20_000
"""Images decoded before training starts: all of a small set, an even sample of a larger one."""


@dataclass(frozen=True)
class Splits:
    """The two splits, before they know the model's transforms."""

    train: Dataset[Any]
    val: Dataset[Any]
    num_classes: int
    class_names: list[str] | None


def open_splits(config: PretrainConfig) -> Splits:
    """Open both splits and check that they make a classification task.

    Raises:
        UsageError: If a split is missing or empty, has fewer than two classes, or validates on classes that are not
            trained on.
    """
    train = _open(config, config.train_split, is_training=True)
    val = _open(config, config.val_split, is_training=False)
    train_classes, val_classes = _class_to_idx(train), _class_to_idx(val)
    if train_classes and val_classes and train_classes != val_classes:
        unknown = sorted(set(val_classes) - set(train_classes))
        if unknown:
            raise UsageError(
                f"{len(unknown)} classes of the {config.val_split!r} split are not in {config.train_split!r} "
                f"({', '.join(map(str, unknown[:3]))} ...): both splits need the same class folders."
            )
        # timm numbers the classes of each folder by itself, so a class missing here would shift all others.
        val = _open(config, config.val_split, is_training=False, class_map=train_classes)
    root = getattr(getattr(train, "reader", None), "root", None)
    if config.dataset == "folder" and root is not None and root == getattr(val.reader, "root", None):
        raise UsageError(
            f"{config.data_dir} has no folders {config.train_split!r} and {config.val_split!r}: "
            "put the class folders of each split into its own, or name them with --train-split and --val-split."
        )
    num_classes = config.num_classes or len(train_classes)
    if num_classes == 0:
        raise UsageError(f"{config.dataset} does not tell its number of classes: give it with --num-classes.")
    if num_classes < 2:
        raise UsageError(f"{config.data_dir or config.dataset} has one class only; a classifier needs at least two.")
    if len(train_classes) > num_classes:
        raise UsageError(f"The data has {len(train_classes)} classes, more than --num-classes {num_classes}.")
    names = sorted(train_classes, key=train_classes.__getitem__) if train_classes else None
    return Splits(train, val, num_classes, [str(n) for n in names] if names else None)


def _open(config: PretrainConfig, split: str, *, is_training: bool, class_map: Any = None) -> Any:
    name = "" if config.dataset == "folder" else config.dataset
    num_samples = None
    if name.startswith("hfids/") and "|" in split:  # timm's wds reader takes the length of a stream like this by itself
        split, _, number = split.partition("|")
        num_samples = int(number) if number.isdecimal() else None
    root = str(config.data_dir) if config.data_dir else None
    if not name and not Path(root or "").exists():
        raise UsageError(f"No data at {root}: give the folder that holds {config.train_split!r} with --data-dir.")
    try:
        return timm.data.create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            class_map=class_map,
            batch_size=config.batch_size,
            seed=config.seed,
            num_samples=num_samples,
            input_img_mode="L" if config.in_chans == 1 else "RGB",
        )
    except Exception as e:  # every reader has its own kinds of errors, from a missing module to a wrong split name
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UsageError(f"Cannot open the {split!r} split of {name or root}: {reason}") from e


def _class_to_idx(dataset: Any) -> dict[Any, int]:
    reader = getattr(dataset, "reader", dataset)
    return dict(getattr(reader, "class_to_idx", None) or {})


def check_images(*datasets: Any) -> None:
    """Decode the images of map-style data sets once (an even sample beyond `CHECKED_IMAGES`).

    timm's data set replaces an image that it cannot read by the next one; found here, it stops the run before it has
    cost anything, and no validation score rests on a replaced image.

    Raises:
        UsageError: Naming the unreadable images.
    """
    readers = [d.reader for d in datasets if hasattr(d, "reader") and not isinstance(d, IterableDataset)]
    checks = [(reader, i) for reader in readers for i in range(len(reader))]
    checks = checks[:: max(1, -(-len(checks) // CHECKED_IMAGES))]
    bar = partial(tqdm, total=len(checks), desc="checking images", unit="img", leave=False, disable=None)
    with ThreadPoolExecutor() as pool:
        bad = [problem for problem in bar(pool.map(_unreadable, checks)) if problem]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UsageError(f"Unreadable image: {bad[0]}{more}. Replace or remove it.")


def _unreadable(item: tuple[Any, int]) -> str | None:
    reader, index = item
    try:
        source, _ = reader[index][:2]
        with source, Image.open(source) as image:
            image.load()
    except Exception as e:  # a decoder may raise anything on hostile bytes
        return f"{reader.filename(index, absolute=True)} ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
    return None


class EpochSampler(Sampler[int]):
    """Shuffled batches of one process, a function of (seed, epoch, step) alone.

    Every epoch permutes all samples with a generator of its own and splits them into steps of batch_size x world_size;
    the rest, less than one step, is left out of this epoch. So a run that continues at any step sees what it would
    have seen, and no sample twice.

    An item is `epoch * num_samples + index`, from which `SeededDataset` recovers both.
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


class SeededDataset(Dataset[Any]):
    """Images whose random augmentation depends on (seed, epoch, index) alone: not on workers, processes or a resume."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> Any:
        seed = hash((self.seed, item)) % 2**63  # integers hash alike in every process
        python_state, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            sample = self.dataset[item % len(self.dataset)]
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        return sample


class _EveryNth:
    """Reader that keeps every n-th sample of a stream, so that n processes see each sample once between them."""

    def __init__(self, reader: Any, rank: int, world_size: int) -> None:
        # The reader's own split over processes pads or drops samples: it is told that it is alone.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.reader), self.rank, None, self.world_size)


class TrainLoader:
    """Training batches of one process; `epoch(e, first_step)` iterates over them."""

    def __init__(self, dataset: Any, config: PretrainConfig, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.sampler: EpochSampler | None = None
        num_samples = len(dataset)
        if isinstance(dataset, IterableDataset):
            dataset.set_loader_cfg(num_workers=config.workers)  # type: ignore[attr-defined]
            num_samples = dataset.reader.num_samples  # type: ignore[attr-defined]
            self.loader = _loader(dataset, config, drop_last=True)
        else:
            self.sampler = EpochSampler(num_samples, config.batch_size, rank, world_size, config.seed)
            self.loader = _loader(SeededDataset(dataset, config.seed), config, sampler=self.sampler, drop_last=True)
        self.num_samples = num_samples
        self.steps_per_epoch = num_samples // (config.batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"{num_samples} training images do not fill one step of {config.batch_size} x {world_size} processes: "
                f"use --batch-size {max(1, num_samples // world_size)} or less."
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Any]:
        """Batches (images, targets) of the given epoch, from `first_step` on."""
        if self.sampler is not None:
            self.sampler.start_at(epoch, first_step)
            return iter(self.loader)
        # A stream cannot be entered in the middle: what was seen before is read again and dropped.
        self.dataset.set_epoch(epoch)
        return islice(iter(self.loader), first_step, self.steps_per_epoch)


def val_loader(dataset: Any, config: PretrainConfig, rank: int, world_size: int) -> DataLoader[Any]:
    """Validation batches of one process: every sample occurs once over all processes, none is padded or dropped."""
    if isinstance(dataset, IterableDataset):
        dataset.reader = _EveryNth(dataset.reader, rank, world_size)  # type: ignore[attr-defined]
        return _loader(dataset, config)
    return _loader(Subset(dataset, range(rank, len(dataset), world_size)), config)


def _loader(dataset: Any, config: PretrainConfig, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.workers > 0,
        worker_init_fn=_ignore_signals,
        # Its own generator, so that making an iterator leaves the model's random state alone.
        generator=torch.Generator(),
        **kwargs,
    )


def _ignore_signals(worker: int) -> None:
    """Let the main process alone answer Ctrl-C and SIGTERM: it saves a checkpoint while the workers still serve it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def transforms(config: PretrainConfig, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """timm's training and validation transforms.

    Args:
        config: Augmentation settings.
        data_config: Input size, interpolation, mean, std and crop, as `timm.data.resolve_data_config` gives them.

    Returns:
        Training transform, validation transform.
    """
    shared = {k: data_config[k] for k in ("input_size", "interpolation", "mean", "std")}
    train = timm.data.create_transform(
        **shared,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter if config.in_chans == 3 else None,  # type: ignore[arg-type]
        auto_augment=config.auto_augment,
        re_prob=config.reprob,
    )
    val = timm.data.create_transform(**shared, crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"])
    return train, val
