"""What public sources say of the named targets, and what no source was found for.

None of the data was opened for it: pages and code that describe it were read. What is opened is compared with this.
"""

from dataclasses import dataclass, replace

from timm_etf.data.catalogue import HUB, VTAB, Target
from timm_etf.data.torchvision_sets import PREFIX

SOURCES = {
    "VTAB": "https://github.com/google-research/task_adaptation/tree/master/task_adaptation/data",
    "CLIP_benchmark": "https://github.com/LAION-AI/CLIP_benchmark/blob/main/clip_benchmark/webdataset_builder.py",
    "fusion_bench": "https://github.com/tanganke/fusion_bench/tree/main/config/dataset/image_classification",
    "mmpretrain": "https://github.com/open-mmlab/mmpretrain/tree/main/mmpretrain/datasets",
    "mteb": "https://github.com/embeddings-benchmark/mteb",
    "ssl-transfer": "https://github.com/linusericsson/ssl-transfer/blob/main/linear.py",
    "TFDS": "https://www.tensorflow.org/datasets/catalog/overview",
    "tinker-cookbook": "https://github.com/thinking-machines-lab/tinker-cookbook",
    "torchvision": "https://docs.pytorch.org/vision/stable/datasets.html",
}
"""Where they are; "Hub" is the page of the target's own repository."""


@dataclass(frozen=True)
class Facts:
    """What is known of a named target.

    Attributes:
        classes: Number of them, of `bins` where the target joins some.
        fit: Images to fit and choose on, before any draw.
        test: Images to score.
        read: Names of the sources, `Hub` or of `SOURCES`, of each of splits, columns, classes, images and metric.
        open: What no source was found for.
    """

    classes: int
    fit: int
    test: int
    read: dict[str, str]
    open: str = ""


def _read(splits: str, columns: str, classes: str, images: str, metric: str = "ssl-transfer") -> dict[str, str]:
    return {"splits": splits, "columns": columns, "classes": classes, "images": images, "metric": metric}


_EVEN = "metric: top-1 is chosen here, for its classes are of about one size"

_NAMED = {
    "cifar10": Facts(10, 50_000, 10_000, _read("Hub", "Hub", "Hub, VTAB", "VTAB, TFDS")),
    "cifar100": Facts(100, 50_000, 10_000, _read("Hub", "Hub", "Hub, VTAB", "VTAB, TFDS")),
    "stl10": Facts(10, 5_000, 8_000, _read("Hub, mteb", "mteb, fusion_bench", "TFDS", "TFDS", ""), _EVEN),
    "flowers102": Facts(102, 2_040, 6_149, _read("Hub", "tinker-cookbook", "VTAB", "Hub, VTAB")),
    "cars": Facts(196, 8_144, 8_041, _read("Hub", "tinker-cookbook", "VTAB", "torchvision, VTAB")),
    "aircraft": Facts(100, 6_667, 3_333, _read("Hub", "Hub", "Hub, torchvision", "Hub, mmpretrain")),
    "pets": Facts(37, 3_680, 3_669, _read("Hub, fusion_bench", "fusion_bench", "VTAB", "TFDS, VTAB")),
    "dtd": Facts(47, 3_760, 1_880, _read("Hub", "Hub", "Hub, VTAB", "VTAB"), "which official partition"),
    "cub": Facts(
        200,
        5_994,
        5_794,
        _read("Hub", "", "TFDS, VTAB", "Hub, VTAB", ""),
        f"columns: only code that reads `image` and `label`; {_EVEN}",
    ),
    "food101": Facts(101, 75_750, 25_250, _read("Hub", "mteb, fusion_bench", "torchvision", "Hub, VTAB")),
    "caltech101": Facts(
        102,
        3_060,
        6_084,
        _read("tinker-cookbook", "tinker-cookbook", "VTAB", "VTAB"),
        "its own page; whether its 30 training images of each class are those of VTAB",
    ),
    "sun397": Facts(
        397, 19_850, 19_850, _read("Hub", "fusion_bench", "mmpretrain", "Hub, mmpretrain"), "which official partition"
    ),
    "eurosat": Facts(
        10,
        21_600,
        2_700,
        _read("Hub", "Hub", "Hub", "Hub", ""),
        f"there is no official split, and 2,700 of its 27,000 images are in neither; {_EVEN}",
    ),
}

_TASK = _read("Hub", "CLIP_benchmark, mteb", "VTAB", "VTAB", "VTAB")

_VTAB = {
    **{f"vtab-{n}": replace(_NAMED[n], read=_NAMED[n].read | {"metric": "VTAB"}) for n in HUB if f"vtab-{n}" in VTAB},
    "vtab-svhn": Facts(10, 73_257, 26_032, _read("fusion_bench", "fusion_bench", "VTAB", "VTAB", "VTAB")),
    "vtab-sun397": Facts(397, 87_003, 21_750, _read("Hub", "mteb", "VTAB", "Hub, VTAB", "VTAB")),
    "vtab-patch-camelyon": Facts(2, 262_144, 32_768, _TASK),
    "vtab-eurosat": Facts(10, 16_200, 5_400, _TASK),
    "vtab-resisc45": Facts(45, 18_900, 6_300, _TASK),
    "vtab-diabetic-retinopathy": Facts(5, 35_126, 42_670, _TASK, "images: the Hub's page counts a part of them"),
    "vtab-clevr-count": Facts(8, 63_000, 15_000, _TASK),
    "vtab-clevr-distance": Facts(6, 63_000, 15_000, _TASK),
    "vtab-dmlab": Facts(6, 65_550, 22_735, _TASK, "images: the Hub's page counts a part of them"),
    "vtab-dsprites-location": Facts(16, 589_824, 73_728, _TASK),
    "vtab-dsprites-orientation": Facts(16, 589_824, 73_728, _TASK),
    "vtab-smallnorb-azimuth": Facts(18, 24_300, 12_150, _TASK),
    "vtab-smallnorb-elevation": Facts(9, 24_300, 12_150, _TASK),
}

FACTS = _NAMED | _VTAB
"""Of every target that is named in the catalogue and is on the Hub."""


def otherwise(target: Target, classes: int, test: int) -> str:
    """What of an opened target is not as it was found described, in a sentence; empty if it is, or nothing is known.

    Args:
        target: The target.
        classes: Its number of classes.
        test: Its number of test images.
    """
    known, named = FACTS.get(target.name), (HUB | VTAB).get(target.name)
    fields = ("bins",) if target.location.startswith(PREFIX) else ("location", "test", "label", "bins")
    if known is None or any(getattr(target, f) != getattr(named, f) for f in fields):
        return ""
    expected = {"classes": (known.classes, classes), "test images": (known.test, test)}
    wrong = [f"{here:,} {what}, and {said:,} were expected" for what, (said, here) in expected.items() if here != said]
    return f"{target.name} has {'; '.join(wrong)}: it is not the data set of the literature" if wrong else ""
