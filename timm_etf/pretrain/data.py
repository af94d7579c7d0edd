"""Training and validation batches from any timm data set, the same images on any number of processes."""

import copy
import hashlib
import os
import platform
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import timm.data
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from timm_etf.data.images import refuse_linked_folders
from timm_etf.data.samples import PackedSamples
from timm_etf.data.seeded import SeededDataset
from timm_etf.errors import UsageError, first_line
from timm_etf.frames import ClassTree
from timm_etf.loading.loader import Loader
from timm_etf.loading.sampling import EpochSampler
from timm_etf.loading.streams import SeededStream, divide, num_shards, share_out
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.processes import any_problem
from timm_etf.ready import from_first

ALL_CHECKED, SAMPLE_CHECKED = 20_000, 5000
"""Images decoded before training starts: all of so small a set, or an even sample of a larger one, which finds what has
spoilt one image of a thousand 99 times of 100."""

MOST_HELD_OUT = 5000
"""Images of a folder without splits that are held out for validation; a tenth, if that is fewer."""


@dataclass(frozen=True)
class Task:
    """What to train and to validate on: timm's data sets, before they know the model's transforms."""

    train: Dataset[Any]
    val: Dataset[Any]
    num_classes: int
    """Those of the data and those that are reserved."""
    class_names: list[str] | None
    held_out: str | None = None
    """Hash of the names of the images that are held out, where a folder without splits was divided."""


def open_task(config: PretrainConfig, answers: int | None = None, first: Sequence[str] = ()) -> Task:
    """Open both splits and check that they make a classification task.

    Args:
        config: The run's settings.
        answers: Number of classes of a teacher, whose answers take the place of the images' own classes.
        first: Classes that have the first numbers, as they had before, whether there are images of them or not; unless
            the data has as many and names none of them: then they are the same under other names, in their order.

    Raises:
        UsageError: If a split is missing or empty, has fewer than two classes, or validates on classes that are not
            trained on.
    """
    if answers:
        return _open_unlabelled(config, answers)
    train = _open(config, config.train_split, is_training=True)
    val = _open(config, config.val_split, is_training=False)
    mine = _class_to_idx(train)
    numbers = {name: i for i, name in enumerate(dict.fromkeys([*first, *map(str, mine)]))}
    renamed = len(first) == len(mine) and not config.reserve and not set(first) & set(mine)
    if first and not renamed and numbers != mine:
        train = _open(config, config.train_split, is_training=True, class_map=numbers)
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
    num_classes = config.num_classes or len(train_classes)
    if num_classes == 0:
        raise UsageError(f"{config.dataset} does not tell its number of classes: give it with --num-classes.")
    if num_classes < 2:
        raise UsageError(f"{config.data_dir or config.dataset} has one class only; a classifier needs at least two.")
    if train_classes and len(train_classes) != num_classes:
        raise UsageError(
            f"The data has {len(train_classes)} classes, not --num-classes {num_classes}: leave it out"
            f"{' (and use --reserve for classes to come)' if num_classes > len(train_classes) else ''}."
        )
    names = sorted(train_classes, key=train_classes.__getitem__) if train_classes else None
    return Task(train, val, num_classes + config.reserve, [str(n) for n in names] if names else None)


def open_on_all(config: PretrainConfig, *more: Any) -> Task:
    """`open_task` on every process. The main one alone lists a folder, which takes a network disk minutes.

    Raises:
        UsageError: As `open_task`, on every process; or if one does not see the folder.
    """
    if config.dataset != "folder":
        return open_task(config, *more)
    task = from_first(lambda: open_task(config, *more))
    missing = "" if os.path.exists(str(config.data_dir)) else f"No data at {config.data_dir} on {platform.node()}"
    if problem := any_problem(missing):
        raise UsageError(f"{problem}: every machine needs it there.")
    return task


def _open_unlabelled(config: PretrainConfig, num_classes: int) -> Task:
    """Images to which a teacher gives the answers; those of a folder without splits are divided."""
    if config.num_classes not in (None, num_classes):
        fix = f"--distill learns the {num_classes} classes of {config.distill}"
        raise UsageError(f"{fix}: leave out --num-classes.")
    if config.dataset != "folder" or {config.train_split, config.val_split} <= set(_folders(config)):
        train = _open(config, config.train_split, is_training=True)
        return _without_labels(train, _open(config, config.val_split, is_training=False), num_classes)
    mode = "L" if config.in_chans == 1 else "RGB"
    try:
        train, val = (timm.data.ImageDataset(str(config.data_dir), input_img_mode=mode) for _ in range(2))
    except RuntimeError as e:
        raise UsageError(f"Cannot take images from {config.data_dir} ({first_line(e)}): check --data-dir.") from None
    samples = train.reader.samples
    refuse_linked_folders([path for path, _ in samples])
    if len(samples) < 2:
        raise UsageError(f"{config.data_dir} holds one image; two are needed, one of them to be held out.")
    random.Random(config.seed).shuffle(samples)
    held_out = min(MOST_HELD_OUT, max(1, len(samples) // 10))
    train.reader.samples, val.reader.samples = PackedSamples(samples[held_out:]), PackedSamples(samples[:held_out])
    names = "\n".join(os.path.relpath(path, config.data_dir) for path, _ in samples)
    task = _without_labels(train, val, num_classes)
    return replace(task, held_out=hashlib.sha256(f"{held_out}\n{names}".encode(errors="surrogateescape")).hexdigest())


def class_tree(config: PretrainConfig, names: list[str] | None) -> ClassTree | None:
    """Tree of the classes of these names, if the run has one.

    Raises:
        UsageError: If it lacks one of them, is none, or the classes have no names.
    """
    if config.hierarchy is None:
        return None
    if not names:
        raise UsageError(
            f"--hierarchy needs the names of the classes, and {config.dataset} does not tell: leave it out."
        )
    return ClassTree.read(config.hierarchy, names, config.hierarchy_gamma)


def _without_labels(train: Any, val: Any, num_classes: int) -> Task:
    """Their own class numbers may be beyond the teacher's, and mixup would look at them."""
    train.target_transform = val.target_transform = _no_label
    return Task(train, val, num_classes, None)


def _no_label(target: Any) -> int:
    return 0


def _open(config: PretrainConfig, split: str, *, is_training: bool, class_map: Any = None) -> Any:
    name = "" if config.dataset == "folder" else config.dataset
    num_samples = None
    if name.startswith("hfids/") and "|" in split:  # timm's wds reader takes the length of a stream like this by itself
        split, _, number = split.partition("|")
        num_samples = int(number) if number.isdecimal() else None
    root = str(config.data_dir) if config.data_dir else None
    folders = None if name else _folders(config)
    try:
        dataset = timm.data.create_dataset(
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
        if isinstance(dataset, IterableDataset):
            num_shards(dataset.reader)  # type: ignore[attr-defined] # it finds what is missing
    except Exception as e:  # every reader has its own kinds of errors, from a missing module to a wrong split name
        raise UsageError(f"Cannot open the {split!r} split of {name or root}: {first_line(e)}") from e
    if folders is not None:
        if os.path.realpath(dataset.reader.root) == os.path.realpath(str(root)):
            # timm found no such folder, and took the images of all splits.
            there = f"it holds {', '.join(folders[:10])}" if folders else "it holds no folders"
            option = "--train-split" if is_training else "--val-split"
            fix = f"put images into {split}/CLASS, or name another folder of classes with {option}"
            raise UsageError(f"{root} has no folder {split!r} ({there}): {fix}.")
        if isinstance(dataset.reader, ReaderImageFolder):  # and not a .tar file
            refuse_linked_folders([path for path, _ in dataset.reader.samples])
            dataset.reader.samples = PackedSamples(dataset.reader.samples)
    return dataset


def _folders(config: PretrainConfig) -> list[str]:
    """Names of the folders in --data-dir."""
    assert config.data_dir is not None  # see PretrainConfig.check
    try:
        return sorted(entry.name for entry in os.scandir(config.data_dir) if entry.is_dir())
    except FileNotFoundError:
        fix = f"give the folder that holds {config.train_split!r} with --data-dir"
        raise UsageError(f"No data at {config.data_dir}: {fix}.") from None
    except OSError as e:
        raise UsageError(f"Cannot read --data-dir {config.data_dir} ({e.strerror}).") from None


def _class_to_idx(dataset: Any) -> dict[Any, int]:
    reader = getattr(dataset, "reader", dataset)
    return dict(getattr(reader, "class_to_idx", None) or {})


def check_images(*datasets: Any) -> None:
    """Decode the images of map-style data sets once (an even sample beyond `ALL_CHECKED`).

    timm's data set replaces an image that it cannot read by the next one; found here, it stops the run before it has
    cost anything, and no validation score rests on a replaced image.

    Raises:
        UsageError: Naming the unreadable images.
    """
    readers = [d.reader for d in datasets if hasattr(d, "reader") and not isinstance(d, IterableDataset)]
    images = sum(map(len, readers))
    step = 1 if images <= ALL_CHECKED else -(-images // SAMPLE_CHECKED)
    checks = [(reader, i) for reader in readers for i in range(0, len(reader), step)]
    parts = [checks[start : start + 64] for start in range(0, len(checks), 64)]  # handing a thread one costs as much
    bar = tqdm(total=len(checks), desc="checking images", unit="img", leave=False, disable=None)
    bad: list[str] = []
    with bar, ThreadPoolExecutor() as pool:
        for problems in pool.map(lambda part: [*map(_unreadable, part)], parts):
            bad += filter(None, problems)
            bar.update(len(problems))
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UsageError(f"Unreadable image: {bad[0]}{more}. Replace or remove it.")


def _unreadable(item: tuple[Any, int]) -> str | None:
    reader, index = item
    try:
        source, _ = reader[index][:2]
        with source, Image.open(source) as image:
            image.draft(image.mode, (1, 1))  # reads all of a JPEG, but computes an eighth of its rows
            image.load()
    except Exception as e:  # a decoder may raise anything on hostile bytes
        return f"{reader.filename(index, absolute=True)} ({first_line(e)})"
    return None


class TrainLoader:
    """Training batches of one process, as many on each; `epoch(e, first_batch)` iterates over them.

    Args:
        dataset: timm's data set, with a transform to uint8 tensors.
        config: The run's settings.
        rank: Number of this process among `world_size`.
        world_size: Number of processes.

    Raises:
        UsageError: If the images do not fill one batch, or a stream cannot be divided among the processes.
    """

    def __init__(self, dataset: Any, config: PretrainConfig, rank: int, world_size: int) -> None:
        self.config, self.rank, self.passes = config, rank, max(1, config.epoch_repeats)
        self.dataset, self.world_size = dataset, world_size
        images_per_batch = config.batch_size * world_size
        self.source: EpochSampler | SeededStream
        if isinstance(dataset, IterableDataset):
            if config.aug_repeats > 1:
                raise UsageError(
                    "--aug-repeats needs data in any order, and a stream has its own: leave it out, or use a folder or "
                    "--dataset hfds/NAME."
                )
            divide(dataset, rank, world_size, config.workers)
            self.num_samples = dataset.reader.num_samples  # type: ignore[attr-defined]
            # A stream ends its passes by itself; only whole batches of each are taken.
            self.batches_per_epoch = self.passes * (self.num_samples // images_per_batch)
            self.source = SeededStream(dataset, config.seed, rank)
            # Its workers are started anew for every pass: they shuffle with what they were seeded with at their start.
            self.loader = Loader(
                self.source, config.batch_size, config.workers, persistent_workers=False, drop_last=True
            )
        else:
            self.num_samples = len(dataset)
            self.source = EpochSampler(
                self.num_samples,
                config.batch_size,
                rank,
                world_size,
                config.seed,
                passes=self.passes,
                repeats=max(1, config.aug_repeats),
            )
            self.batches_per_epoch = self.source.batches_per_epoch
            seeded = SeededDataset(dataset, config.seed)
            self.loader = Loader(seeded, config.batch_size, config.workers, sampler=self.source, drop_last=True)
        if self.batches_per_epoch == 0:
            raise UsageError(
                f"{self.num_samples} training images do not fill one batch of {config.batch_size} x {world_size} "
                f"processes: use --batch-size {max(1, self.num_samples // world_size)} or less."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may accumulate fewer batches than the others."""
        return -(-self.batches_per_epoch // self.config.grad_accum_steps)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Any]:
        """Batches of the given epoch, from `first_batch` on, until there are `batches_per_epoch` of them.

        Yields:
            Images uint8 [B, C, H, W], class numbers int64 [B].

        Raises:
            UsageError: If a stream ends before: another process would wait for this one.
        """
        done = first_batch
        for done, batch in enumerate(self._batches(epoch, first_batch), first_batch + 1):  # noqa: B007
            yield batch
        if done != self.batches_per_epoch:
            raise UsageError(
                f"{self.config.train_split!r} ended after {done} of {self.batches_per_epoch} batches of an epoch: give "
                f"its true number of images, as in --train-split '{self.config.train_split.partition('|')[0]}|NUMBER'."
            )

    def still(self, data_config: dict[str, Any]) -> Loader:
        """Batches of the training images as validation sees them: each once, over all processes; to be closed."""
        dataset: Any = copy.copy(self.dataset)
        if isinstance(dataset, IterableDataset):  # whose reader is told for good how to divide and to shuffle
            dataset = _open(self.config, self.config.train_split, is_training=False)
        dataset.transform = transforms(self.config, data_config)[1]
        return val_loader(dataset, self.config, self.rank, self.world_size)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[Any]:
        if isinstance(self.source, EpochSampler):
            self.source.start_at(epoch, first_batch)
            yield from self.loader
            return
        per_pass = self.batches_per_epoch // self.passes
        workers = max(1, self.config.workers)
        for number in range(first_batch // per_pass, self.passes):
            seen = max(0, first_batch - number * per_pass)
            self.source.start_at(epoch * self.passes + number, seen // workers * self.config.batch_size)
            self.loader.generator.manual_seed(self.source.loader_seed)
            # Workers give batches in turn, from the first on: the others go first once more, and theirs are dropped.
            yield from islice(self.loader, seen % workers, per_pass - seen // workers * workers)


def val_loader(dataset: Any, config: PretrainConfig, rank: int, world_size: int) -> Loader:
    """Validation batches of one process: every sample occurs once over all processes, none is padded or dropped."""
    if isinstance(dataset, IterableDataset):
        share_out(dataset, rank, world_size)
        return Loader(dataset, config.batch_size, config.workers)
    share = Subset(dataset, range(rank, len(dataset), world_size))
    return Loader(share, config.batch_size, config.workers)


def transforms(config: PretrainConfig, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """timm's training and validation transforms up to uint8 tensors [C, H, W]; `Pixels` does the rest, on the device.

    Args:
        config: Augmentation settings.
        data_config: Input size, interpolation, mean, std and crop, as `timm.data.resolve_data_config` gives them.

    Returns:
        Training transform, validation transform.
    """
    shared = {k: data_config[k] for k in ("input_size", "interpolation", "mean", "std")} | {"use_prefetcher": True}
    train = timm.data.create_transform(
        **shared,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter if config.in_chans == 3 else None,  # type: ignore[arg-type]
        auto_augment=config.auto_augment,
    )
    val = timm.data.create_transform(**shared, crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"])
    return train, val


def mixup(config: PretrainConfig, num_classes: int) -> timm.data.Mixup | None:
    """timm's mixup and cutmix, if the run has any; its targets are probabilities, smoothed already."""
    if not (config.mixup or config.cutmix):
        return None
    smoothing = config.smoothing if config.loss == "cross_entropy" else 0.0
    return timm.data.Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes)
