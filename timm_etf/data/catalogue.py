"""Named transfer targets: where they are, which splits count, and how their accuracy is reported.

Splits and metrics follow Kornblith et al. 2019 (arXiv 1805.08974, table 1): mean per-class accuracy where classes
are of uneven size, top-1 elsewhere; those of `vtab-1k` Zhai et al. 2019 (arXiv 1910.04867): 1,000 images to fit and
choose on, top-1. `checked` has what public sources say of each.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

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
        train_images: So many images to fit and choose on, drawn once; 0 for all.
        bins: So many classes that labels in an order, numbered from 0, are joined into; 0 leaves them.
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
    train_images: int = 0
    bins: int = 0
    tree: str = ""


HUB = {
    t.name: t
    for t in (
        Target("cifar10", "uoft-cs/cifar10", image="img"),
        Target("cifar100", "uoft-cs/cifar100", image="img", label="fine_label"),
        Target("stl10", "tanganke/stl10"),
        Target("flowers102", "dpdl-benchmark/oxford_flowers102", validation="validation", metric="mean_per_class"),
        Target("cars", "tanganke/stanford_cars"),
        # Its column `label` has the 70 families.
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
`cars,label=NAME`."""

_NATURAL = ("caltech101", "cifar100", "dtd", "flowers102", "pets")


def _vtab(name: str, location: str, group: str, **more: Any) -> Target:
    return Target(f"vtab-{name}", location, group=group, train_images=1000, **more)


def _shards(name: str, folder: str, group: str, **more: Any) -> Target:
    """A task that CLIP_benchmark has converted, with VTAB's own training and test images."""
    return _vtab(name, f"clip-benchmark/wds_vtab-{folder}", group, image="webp", label="cls", **more)


VTAB = {
    t.name: t
    for t in (
        *(
            replace(HUB[n], name=f"vtab-{n}", metric="top1", group="natural", train_images=1000)  # the rest as above
            for n in _NATURAL
        ),
        _vtab("svhn", "ufldl-stanford/svhn", "natural", config="cropped_digits", hflip=False),
        _vtab("sun397", "dpdl-benchmark/sun397", "natural", validation="validation"),
        _shards("patch-camelyon", "pcam", "specialised"),
        _shards("eurosat", "eurosat", "specialised"),
        _shards("resisc45", "resisc45", "specialised"),
        _shards("diabetic-retinopathy", "diabetic_retinopathy", "specialised"),
        _shards("clevr-count", "clevr_count_all", "structured"),
        _shards("clevr-distance", "clevr_closest_object_distance", "structured"),
        _shards("dmlab", "dmlab", "structured"),
        _shards("dsprites-location", "dsprites_label_x_position", "structured", bins=16, hflip=False),
        _shards("dsprites-orientation", "dsprites_label_orientation", "structured", bins=16, hflip=False),
        _shards("smallnorb-azimuth", "smallnorb_label_azimuth", "structured", hflip=False),
        _shards("smallnorb-elevation", "smallnorb_label_elevation", "structured"),
    )
}
"""Tasks of VTAB-1k. The repositories do not say which 1,000 images VTAB takes, so others are drawn."""

NOWHERE = {
    "vtab-kitti-distance": "no repository with its training images is known: give a folder of them, labelled as "
    "task_adaptation's kitti.py labels closest_vehicle_distance, as FOLDER,name=vtab-kitti-distance,train_images=1000"
}
"""Tasks of VTAB-1k that no data set was found for, and what helps."""

SUITES = {
    "offline": tuple(offline.TARGETS),
    "embedded": EMBEDDED,
    "hub": tuple(HUB),
    "vtab-1k": (*VTAB, *NOWHERE),
}
"""Targets that one word stands for; those of `offline` and `embedded` are built by `timm-etf data build`."""
