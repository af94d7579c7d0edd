"""Targets that torchvision knows, with its official splits and checksums, where their files are on this machine."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_etf.data.catalogue import HUB, Target
from timm_etf.errors import UsageError, first_line

PREFIX = "torchvision:"

SETS = {
    "cifar10": ("CIFAR10", "train", "", "test"),
    "cifar100": ("CIFAR100", "train", "", "test"),
    "stl10": ("STL10", "train", "", "test"),
    "flowers102": ("Flowers102", "train", "val", "test"),
    "cars": ("StanfordCars", "train", "", "test"),
    "aircraft": ("FGVCAircraft", "train", "val", "test"),
    "pets": ("OxfordIIITPet", "trainval", "", "test"),
    "dtd": ("DTD", "train", "val", "test"),
    "food101": ("Food101", "train", "", "test"),
}
"""Class in torchvision.datasets, and its splits to fit on, to choose by (none: a fifth of those) and to score."""

NOT_DOWNLOADED = {
    "StanfordCars": "torchvision cannot download it any more, put cars_train, cars_test, devkit and "
    "cars_test_annos_withlabels.mat into its folder stanford_cars, or take cars, which is on the Hub"
}
"""What to do where `download=True` is no help."""


def find(name: str, data_root: Path) -> Target:
    """The target of a name in `SETS`, scored as the one of the Hub.

    Raises:
        UsageError: For another name.
    """
    if name not in SETS:
        raise UsageError(f"{PREFIX}{name} is not known here; there are {', '.join(SETS)}.")
    kind, train, validation, test = SETS[name]
    return replace(
        HUB[name], location=PREFIX + kind, config=str(data_root), train=train, validation=validation, test=test
    )


class Source:
    """Images of a torchvision data set by index, as `Images.read` takes them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Image.Image:
        image: Image.Image = self.dataset[index][0]
        return image


def open_split(target: Target, split: str) -> tuple[np.ndarray, list[str], str, Source]:
    """Labels, class names, fingerprint and images of a split.

    Raises:
        UsageError: If its files are not there or damaged, with the command that downloads them.
    """
    import torchvision

    kind, root = target.location.removeprefix(PREFIX), target.config
    how = {"train": split == "train"} if kind.startswith("CIFAR") else {"split": split}
    try:
        dataset = getattr(torchvision.datasets, kind)(root, **how)
    except (RuntimeError, ValueError, OSError) as e:
        options = ", ".join(f"{k}={v!r}" for k, v in how.items())
        fetch = f"from torchvision.datasets import {kind}; {kind}({root!r}, {options}, download=True)"
        get = NOT_DOWNLOADED.get(kind, f'get it with python -c "{fetch}"')
        raise UsageError(f"{target.name} ({split}) is not in {root} ({first_line(e)}): {get}") from None
    found = next(
        v for k in ("_labels", "targets", "labels", "_samples") if (v := getattr(dataset, k, None)) is not None
    )
    labels = np.array([item[-1] if isinstance(item, tuple) else item for item in found], dtype=np.int64)
    names = getattr(dataset, "classes", None) or range(labels.max() + 1)  # flowers have had none in older versions
    about = json.dumps([kind, split, root, torchvision.__version__, labels.tolist(), _stamps(dataset)])
    return labels, [str(name) for name in names], hashlib.sha256(about.encode()).hexdigest(), Source(dataset)


def _stamps(dataset: Any) -> list[tuple[int, int]]:
    """Size and time of the files of a split's images, so that one that is mended is read again; none of arrays."""
    files: Any = next((v for k in ("_image_files", "_images", "_samples") if (v := getattr(dataset, k, None))), [])
    paths = (Path(item[0] if isinstance(item, tuple) else item) for item in files)
    return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in paths if path.exists())]
