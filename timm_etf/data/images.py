"""Labelled images of a target, whatever they are stored as, and the checks that its splits belong together."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timm_etf import specs
from timm_etf.data import torchvision_sets
from timm_etf.data.catalogue import HUB, METRICS, NOWHERE, SUITES, VTAB, Target
from timm_etf.data.drawing import draw
from timm_etf.errors import UsageError, first_line
from timm_etf.frames import ClassTree


@dataclass(frozen=True)
class Images:
    """One split: images that are decoded on demand, and labels.

    Attributes:
        name: Target and split, for messages.
        labels: Class numbers, int64 of shape [n].
        class_names: Class names by number.
        fingerprint: Changes when the images or labels may have changed.
        source: Paths of image files, a `datasets.Dataset` of encoded images, or a `torchvision_sets.Source`.
        column: Column of the images in a data set.
        rows: Places in `source`, int64 of shape [n]; None for all of them in order.
    """

    name: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    fingerprint: str
    source: Any
    column: str = ""
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, mode: str) -> Image.Image:
        """Decode an image, as "RGB" or "L"; raises whatever its decoder raises."""
        row = self._row(index)
        if isinstance(self.source, torchvision_sets.Source):
            return self.source[row].convert(mode)
        if not self.column:
            with Image.open(self.source[row]) as image:
                return image.convert(mode)
        item = self.source[row][self.column]
        with Image.open(BytesIO(item["bytes"]) if item["bytes"] else item["path"]) as image:
            return image.convert(mode)

    def where(self, index: int) -> str:
        """How a message names an image."""
        row = self._row(index)
        is_row = self.column or isinstance(self.source, torchvision_sets.Source)
        return f"row {row} of {self.name}" if is_row else str(self.source[row])

    def take(self, rows: NDArray[np.int64]) -> "Images":
        """Those images alone, in that order."""
        fingerprint = hashlib.sha256(self.fingerprint.encode() + rows.tobytes()).hexdigest()
        places = rows if self.rows is None else self.rows[rows]
        return replace(self, labels=self.labels[rows], fingerprint=fingerprint, rows=places)

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])


@dataclass(frozen=True)
class Splits:
    """A target's splits, numbered alike; `validation` and `tree` are None if the target has none of its own."""

    target: Target
    train: Images
    validation: Images | None
    test: Images
    tree: ClassTree | None = None

    def __iter__(self) -> Any:
        return iter([s for s in (self.train, self.validation, self.test) if s is not None])


def find_targets(texts: Sequence[str], data_root: Path) -> tuple[list[Target], dict[str, str]]:
    """Targets of a command line, without opening them.

    Args:
        texts: Each a name of the catalogue, a suite, an image folder, a folder of parquet files, a Hub data set id or
            `torchvision:NAME`, whose files are in `data_root`; with any field of `Target` behind it:
            `DATA,test=validation,metric=mean_per_class`.
        data_root: Folder that `timm-etf data build` filled.

    Returns:
        The targets, and for each that is not on this machine the reason.

    Raises:
        UsageError: If a name or field is unknown, a folder is missing, or two targets have one name.
    """
    targets: list[Target] = []
    missing: dict[str, str] = {}
    for text in texts:
        first, arguments = specs.split(text)
        changes = _changes(text, arguments)
        names = SUITES.get(first, (first,))
        for name in names:
            target = _find(name, data_root)
            if target is None:
                suite = next((s for s in ("offline", "embedded") if name in SUITES[s]), "")
                build = f"not built in {data_root}: timm-etf data build {suite} --root {data_root}"
                missing[name] = NOWHERE.get(name, build)
            else:
                target = replace(target, **changes)
                targets += [target] if target not in targets else []
    counts = {t.name: sum(o.name == t.name for o in targets) for t in targets}
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"Two targets are called {twice[0]!r}: name one, as in {twice[0]},name=OTHER")
    return targets, missing


def _changes(spec: str, arguments: dict[str, str]) -> dict[str, Any]:
    known = {f.name for f in fields(Target)} - {"location"}
    changes: dict[str, Any] = dict(arguments)
    if unknown := [k for k in changes if k not in known]:
        raise UsageError(f"{spec!r}: a target has no {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if changes.get("metric", "top1") not in METRICS:
        raise UsageError(f"{spec!r}: the metric is one of {', '.join(METRICS)}.")
    if "hflip" in changes:
        changes["hflip"] = specs.value(changes["hflip"])
        if changes["hflip"] not in (True, False):
            raise UsageError(f"{spec!r}: hflip is yes or no.")
    for number, least in (("train_images", 5), ("bins", 2)):
        if number in changes:
            if not changes[number].isdecimal() or int(changes[number]) < least:
                raise UsageError(f"{spec!r}: {number} is a whole number, at least {least}.")
            changes[number] = int(changes[number])
    return changes


def _find(name: str, data_root: Path) -> Target | None:
    if name.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.find(name.removeprefix(torchvision_sets.PREFIX), data_root)
    if name in NOWHERE:
        return None
    if found := HUB.get(name) or VTAB.get(name):
        return found
    if name in SUITES["offline"] + SUITES["embedded"]:
        folder = data_root / name
        return Target(name, str(folder), hflip=False) if (folder / "dataset.json").exists() else None
    if Path(name).is_dir():
        return Target(Path(name).resolve().name, name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Target(name.split("/")[1], name)
    known = ", ".join([*SUITES, *SUITES["offline"], *HUB])
    raise UsageError(f"No target {name!r}: neither a folder, nor owner/name on the Hub, nor one of {known}.")


def open_splits(target: Target) -> Splits:
    """Open a target's splits and number their classes alike, by name.

    Raises:
        UsageError: If a split, column or label is missing, a test class has no training images, there is one class,
            `bins` or `train_images` ask for more than there is, or the tree lacks a class.
    """
    is_folder = (Path(target.location) / target.train).is_dir()
    target = _with_a_test_split(target) if is_folder else target
    is_torchvision = target.location.startswith(torchvision_sets.PREFIX)
    opener = _open_torchvision if is_torchvision else _open_folder if is_folder else _open_arrow
    train = opener(target, target.train)
    validation = opener(target, target.validation) if target.validation else None
    test = opener(target, target.test)
    for split in (s for s in (train, validation, test) if s is not None):
        if not len(split):
            raise UsageError(f"{split.name} has no images: name another split, as in {target.name},test=validation")
        if (split.labels < 0).any():
            count = int((split.labels < 0).sum())
            raise UsageError(
                f"{count} of {len(split)} labels of {split.name} are negative: a split without public labels cannot be "
                f"used; name another, as in {target.name},test=validation"
            )
    if len(set(train.labels.tolist())) < 2:
        raise UsageError(f"{train.name} has images of one class only; a transfer target needs at least two.")
    aligned = [None if s is None else _renumber(s, train) for s in (validation, test)]
    assert aligned[1] is not None
    splits = Splits(target, train, aligned[0], aligned[1])
    splits = _joined(splits) if target.bins else splits
    if target.tree:
        splits = replace(splits, tree=ClassTree.read(target.tree, splits.train.class_names))
    return _drawn(splits) if target.train_images else splits


def _joined(splits: Splits) -> Splits:
    """With so many classes as `bins`, each of neighbours of the target's own."""
    bins, count = splits.target.bins, len(splits.train.class_names)
    if not 2 <= bins <= count:
        raise UsageError(f"{splits.target.name} has {count} classes: bins is from 2 to that.")

    def join(split: Images) -> Images:
        fingerprint = hashlib.sha256(f"{split.fingerprint} {bins}".encode()).hexdigest()
        names = tuple(map(str, range(bins)))
        return replace(split, labels=split.labels * bins // count, class_names=names, fingerprint=fingerprint)

    validation = splits.validation and join(splits.validation)
    return replace(splits, train=join(splits.train), validation=validation, test=join(splits.test))


def _drawn(splits: Splits) -> Splits:
    """With `train_images` images: four fifths to fit on, and the rest, of the validation split if any, to choose by."""
    target, train, count = splits.target, splits.train, splits.target.train_images
    try:
        fitted = draw(train.labels, count - count // 5, every_class=True)
        others = train.take(np.setdiff1d(np.arange(len(train)), fitted))
        choosing = others if splits.validation is None else splits.validation
        return replace(splits, train=train.take(fitted), validation=choosing.take(draw(choosing.labels, count // 5)))
    except UsageError as e:
        raise UsageError(f"{target.name}: {e}.") from None


def _with_a_test_split(target: Target) -> Target:
    """An image folder as it is pretrained on has its held-out images in `validation`, or `val`: its test split."""
    folder = Path(target.location)
    if target.test != "test" or (folder / "test").is_dir():
        return target
    held_out = [name for name in ("validation", "val") if target.validation != name and (folder / name).is_dir()]
    return replace(target, test=held_out[0]) if held_out else target


def _renumber(split: Images, train: Images) -> Images:
    """The split with the training split's class numbers."""
    number = {name: k for k, name in enumerate(train.class_names)}
    trained = set(train.labels.tolist())
    used = [split.class_names[k] for k in np.unique(split.labels)]
    strange = [n for n in used if n not in number]
    if strange:
        raise UsageError(
            f"{train.name} and {split.name} name their classes differently: {len(strange)} of {len(used)} are only in "
            f"the latter, such as {strange[0]!r} (the former has {train.class_names[0]!r})."
        )
    if untrained := [n for n in used if number[n] not in trained]:
        raise UsageError(f"Class {untrained[0]!r} of {split.name} has no training images ({len(untrained)} such).")
    table = np.array([number.get(name, -1) for name in split.class_names])
    return replace(split, labels=table[split.labels], class_names=train.class_names)


def _open_folder(target: Target, split: str) -> Images:
    import timm.data.readers

    folder = Path(target.location) / split
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}: a target needs one for each of its splits (see {target.name},test=...).")
    try:
        reader: Any = timm.data.readers.create_reader("", root=str(folder))
    except (RuntimeError, ValueError) as e:
        raise UsageError(f"{folder} holds no images in class folders: {str(e).splitlines()[0]}") from None
    paths = [path for path, _ in reader.samples]
    labels = np.array([label for _, label in reader.samples], dtype=np.int64)
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    refuse_linked_folders(paths)
    if len(names) < 2 and labels.size:
        raise UsageError(f"{folder} has one class folder only; images belong into one folder for each class.")
    digest = hashlib.sha256()
    for path in paths:
        about = Path(path).stat()
        digest.update(f"{path.removeprefix(str(folder))}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return Images(f"{target.name} ({split})", labels, tuple(map(str, names)), digest.hexdigest(), paths)


def refuse_linked_folders(paths: Sequence[str]) -> None:
    """Refuse image files that one link shows twice; timm follows a link to a folder above until the system has enough.

    Raises:
        UsageError: Naming the two folders.
    """
    real: dict[str, str] = {}
    for folder in dict.fromkeys(path.rpartition(os.sep)[0] for path in paths):
        first = real.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise UsageError(f"{folder} and {first} are one folder, whose images would count twice: remove the link.")


def _open_torchvision(target: Target, split: str) -> Images:
    labels, names, fingerprint, source = torchvision_sets.open_split(target, split)
    return Images(f"{target.name} ({split})", labels, tuple(names), fingerprint, source)


def _open_arrow(target: Target, split: str) -> Images:
    import datasets

    name = f"{target.name} ({split})"
    try:
        data: Any = datasets.load_dataset(target.location, target.config or None, split=split)
    except Exception as e:  # a builder may raise anything: no such repository, split or network, damaged files
        raise UsageError(f"Cannot open {name} of {target.location}: {first_line(e)}") from e
    for field, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        column = getattr(target, field)
        if column in data.column_names:
            continue
        # A repository may have renamed its column since: the only one of its kind is it.
        of_kind = [name for name, feature in data.features.items() if isinstance(feature, kind)]
        if len(of_kind) != 1:
            fix = f"{target.name},{field}=COLUMN"
            raise UsageError(f"{name} has no column {column!r}: give it as {fix} ({', '.join(data.column_names)}).")
        target = replace(target, **{field: of_kind[0]})
    values = data[target.label][:]
    feature = data.features[target.label]
    if isinstance(feature, datasets.ClassLabel):
        labels, names = np.array([-1 if v is None else v for v in values], dtype=np.int64), list(feature.names)
    else:
        kept = sorted({v for v in values if v is not None and v != -1})
        number = {v: k for k, v in enumerate(kept)}
        labels, names = np.array([number.get(v, -1) for v in values], dtype=np.int64), [str(v) for v in kept]
    files = [(f["filename"], Path(f["filename"]).stat().st_size) for f in data.cache_files]
    about = json.dumps([target.location, target.config, split, files, len(data), target.image, target.label])
    encoded = data.cast_column(target.image, datasets.Image(decode=False))
    return Images(name, labels, tuple(names), hashlib.sha256(about.encode()).hexdigest(), encoded, target.image)
