"""Icons of some 150 sets: class = what the icon is called, domain = who drew it.

`icons-400` is to pretrain on and `icons-novel` to transfer to. Both come from one ranking of names, so that no class is
in both, and in both the same families are held out of training.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from timm_etf.data.build import image_folder
from timm_etf.data.build.duplicates import without_copies
from timm_etf.data.build.image_folder import SIZE, Item, Origin
from timm_etf.data.build.offline.held_out import held_out
from timm_etf.data.build.offline.registries import Registries
from timm_etf.data.build.pictograms import canonical_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

PACKAGE, VERSION = "@iconify/json", "2.2.535"
SOURCE_CLASSES, NOVEL_CLASSES = 400, 120

_ORDER = ("validation", "train", "test", "train-novel")
_NOT_PICTOGRAMS = re.compile("Emoji|Flags|Logos|Brands", re.IGNORECASE)
_LOGOS = frozenset({"android", "airplay", "behance", "dribbble", "skype"})
_FAMILIES = {
    # Sets of one hand, or grown out of another set, whose names do not begin alike.
    **dict.fromkeys(("material", "ic", "mdi"), "material"),
    **dict.fromkeys(("bx", "bxs", "bxl", "boxicons"), "boxicons"),
    **dict.fromkeys(("uil", "uim", "uis", "uit"), "unicons"),
    **dict.fromkeys(("ion", "famicons"), "ionicons"),
    **dict.fromkeys(("fa", "la"), "fontawesome"),
    **dict.fromkeys(("feather", "lucide", "fe"), "lucide"),
    **dict.fromkeys(("pixel", "pixelarticons", "memory"), "pixel"),
}


def family(prefix: str) -> str:
    """Who drew an icon set: the first word of its prefix without a version, and known relatives together.

    Example:
        >>> family("material-symbols-light"), family("mdi"), family("fa6-solid"), family("tabler")
        ('material', 'material', 'fontawesome', 'tabler')
    """
    word = re.sub(r"^fa\d$", "fa", prefix.split("-")[0])
    return _FAMILIES.get(word, word)


def allowed(licence: str) -> bool:
    """Whether images under this licence (an SPDX name) may be drawn: neither GPL nor non-commercial nor unknown."""
    return bool(licence) and not re.search("GPL|NC", licence)


def build_icons(root: Path, registries: Registries, seed: int) -> dict[str, Path]:
    """Build `icons-400` (train, validation) and `icons-novel` (train, test) in `root`, unless they are there.

    Raises:
        Unavailable: If npm cannot fetch the icons.
    """

    @cache
    def both() -> tuple[list[Origin], list[Item], list[Item]]:
        return _select(registries.npm(PACKAGE, VERSION), seed)

    packages = {PACKAGE: VERSION, "seed of the split": str(seed)}
    return {
        "icons-400": image_folder.build(root / "icons-400", packages, lambda: both()[:2]),
        "icons-novel": image_folder.build(root / "icons-novel", packages, lambda: (both()[0], both()[2])),
    }


def _select(package: Path, seed: int) -> tuple[list[Origin], list[Item], list[Item]]:
    collections = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    sets = {
        prefix: info
        for prefix, info in collections.items()
        if not info.get("palette")
        and not info.get("hidden")
        and allowed(info["license"].get("spdx", ""))
        and not _NOT_PICTOGRAMS.search(info.get("category", "") + prefix)
    }
    by_label: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
    for prefix in sets:
        for name, svg in read_set(package, prefix).items():
            label = canonical_name(name)
            if label and label not in _LOGOS:
                by_label[label].append((family(prefix), prefix, name, svg))
    unseen = held_out(Counter(hand for icons in by_label.values() for hand, *_ in icons), seed, share=0.15)

    def rank(label: str) -> tuple[int, int, str]:
        return -len({f for f, *_ in by_label[label]}), -len(by_label[label]), label

    ranked = [la for la in sorted(by_label, key=rank) if len({f in unseen for f, *_ in by_label[la]}) == 2]
    chosen = ranked[: SOURCE_CLASSES + NOVEL_CLASSES]
    items = []
    with tqdm(total=sum(len(by_label[la]) for la in chosen), desc="drawing icons", unit="img", leave=False) as bar:
        for number, label in enumerate(chosen):
            outside, inside = ("validation", "train") if number < SOURCE_CLASSES else ("test", "train-novel")
            for hand, prefix, name, svg in sorted(by_label[label]):
                bar.update()
                if (pixels := draw_icon(svg)) is not None:
                    items.append(Item(outside if hand in unseen else inside, label, hand, f"{prefix}-{name}", pixels))
    items = without_copies(items, _ORDER)
    origins = [
        Origin(prefix, PACKAGE, info["license"]["spdx"], info.get("author", {}).get("url", ""))
        for prefix, info in sets.items()
    ]
    source = [i for i in items if i.split in ("train", "validation")]
    novel = [i.in_split(i.split.removesuffix("-novel")) for i in items if i.split in ("test", "train-novel")]
    return origins, complete(source, "validation"), complete(novel, "test")


def complete(items: Iterable[Item], outside: str) -> list[Item]:
    """The images of classes that are left in both splits."""
    items = list(items)
    classes = [{i.label for i in items if (i.split == outside) == side} for side in (False, True)]
    return [i for i in items if i.label in classes[0] & classes[1]]


def read_set(package: Path, prefix: str) -> dict[str, str]:
    """SVG documents of an Iconify set, by icon name."""
    data: dict[str, Any] = json.loads((package / "json" / f"{prefix}.json").read_text(encoding="utf-8"))

    def document(icon: dict[str, Any]) -> str:
        left, top = (icon.get(k, data.get(k, 0)) for k in ("left", "top"))
        width, height = (icon.get(k, data.get(k, 16)) for k in ("width", "height"))
        body = icon["body"].replace("currentColor", "#000")
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {links} viewBox="{left} {top} {width} {height}">{body}</svg>'

    return {name: document(icon) for name, icon in data["icons"].items() if not icon.get("hidden")}


def render(svg: str, size: int) -> "Image | None":
    """Draw an SVG document as an RGBA image of `size` pixels; None if it cannot be drawn."""
    from io import BytesIO

    import resvg_py
    from PIL import Image

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    except ValueError:  # not SVG that the renderer understands
        return None
    return Image.open(BytesIO(bytes(png))).convert("RGBA")


def draw_icon(svg: str) -> "NDArray[np.uint8] | None":
    """Draw an icon as dark ink that fills the box, grey [SIZE, SIZE]; None if it is empty."""
    image = render(svg, SIZE)
    return None if image is None else image_folder.fit(image.getchannel("A"))
