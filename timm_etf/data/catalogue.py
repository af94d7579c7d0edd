"""Named transfer targets: where they are, which splits count, and how their accuracy is reported.

Splits and metrics follow Kornblith et al. 2019 (arXiv 1805.08974, table 1): mean per-class accuracy where classes
are of uneven size, top-1 elsewhere.
"""

from dataclasses import dataclass
from typing import Literal

from timm_etf.data.build import offline
from timm_etf.data.build.letters_and_digits import NAMES as EMBEDDED

Metric = Literal["top1", "mean_per_class"]
METRICS = {"top1": "top-1", "mean_per_class": "mean per class"}


@dataclass(frozen=True)
class Target:
    """A labelled data set to transfer to.

    Attributes:
        name: What it is called in tables.
        location: Image folder, folder of parquet files, or data set id on the Hub.
        config: Configuration of a Hub data set.
        train: Split to fit on.
        test: Split to score.
        validation: Split that chooses hyper-parameters; empty for a random fifth of each class of `train`.
        image: Column of the images (not used for image folders).
        label: Column of the labels (not used for image folders).
        metric: `top1` or `mean_per_class`.
        hflip: Whether a mirrored image is still of its class, for fine-tuning.
        group: Group of targets that a report also gives the mean of, such as `near` or `far`.
        tree: File or folder of a tree of its classes, see `timm_etf.frames.ClassTree.read`; empty for none.
    """

    name: str
    location: str
    config: str = ""
    train: str = "train"
    test: str = "test"
    validation: str = ""
    image: str = "image"
    label: str = "label"
    metric: Metric = "top1"
    hflip: bool = True
    group: str = ""
    tree: str = ""


HUB = {
    t.name: t
    for t in (
        Target("cifar10", "uoft-cs/cifar10", image="img"),
        Target("cifar100", "uoft-cs/cifar100", image="img", label="fine_label"),
        Target("stl10", "tanganke/stl10"),
        Target("flowers102", "dpdl-benchmark/oxford_flowers102", validation="validation", metric="mean_per_class"),
        Target("cars", "tanganke/stanford_cars"),
        Target("aircraft", "Donghyun99/FGVC-Aircraft", validation="val", label="variation", metric="mean_per_class"),
        Target("pets", "timm/oxford-iiit-pet", metric="mean_per_class"),
        Target("dtd", "tanganke/dtd"),
        Target("cub", "Donghyun99/CUB-200-2011"),
        Target("food101", "ethz/food101", test="validation"),
        Target("caltech101", "dpdl-benchmark/caltech101", metric="mean_per_class"),
        Target("sun397", "tanganke/sun397"),
        Target("eurosat", "tanganke/eurosat"),
    )
}
"""Targets on the Hub. A column or split that a repository has renamed since is given with the target, such as
`aircraft,label=variant`."""

SUITES = {"offline": tuple(offline.TARGETS), "embedded": EMBEDDED, "hub": tuple(HUB)}
"""Targets that one word stands for; those of `offline` and `embedded` are built by `timm-etf data build`."""
