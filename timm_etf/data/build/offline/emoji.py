"""Emoji in thirteen styles, in colour: which emoji it is (unseen styles), and what kind of thing (unseen emoji)."""

import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from timm_etf.data.build import image_folder
from timm_etf.data.build.image_folder import SIZE, Item, Origin
from timm_etf.data.build.offline import icons
from timm_etf.data.build.offline.held_out import held_out
from timm_etf.data.build.offline.icons import complete
from timm_etf.data.build.offline.registries import Registries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SHEETS = {
    # Styles whose pictures may be used; the same project's Apple and Facebook sheets have no such licence.
    "google": ("emoji-datasource-google", "16.0.0", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "twitter": ("emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
}
MIN_STYLES = 10
MIN_IMAGES = 100

_FAMILIES = {"noto": "google", "twemoji": "twitter"}
_SKIPPED = frozenset({"Flags", "Component"})
_PERSONS = frozenset("1f468 1f469 1f9d1 2640 2642 fe0f 200d".split())


def build_emoji(root: Path, registries: Registries, seed: int) -> dict[str, Path]:
    """Build `emoji-identity` and `emoji-subcategory` in `root` (train, test), unless they are there.

    Raises:
        Unavailable: If npm cannot fetch the pictures.
    """

    @cache
    def pictures() -> tuple[list[Origin], list[Item], dict[str, dict[str, Any]]]:
        return _pictures(registries)

    packages = {icons.PACKAGE: icons.VERSION} | {name: version for name, version, *_ in SHEETS.values()}
    packages["seed of the split"] = str(seed)
    return {
        "emoji-identity": image_folder.build(
            root / "emoji-identity", packages, lambda: (pictures()[0], _identity(pictures()[1], seed))
        ),
        "emoji-subcategory": image_folder.build(
            root / "emoji-subcategory", packages, lambda: (pictures()[0], _subcategory(*pictures()[1:], seed))
        ),
    }


def _identity(items: list[Item], seed: int) -> list[Item]:
    """Class = emoji, for those that at least `MIN_STYLES` styles draw; whole style families are held out."""
    styles = Counter(i.label for i in items)
    items = [i for i in items if styles[i.label] >= MIN_STYLES]
    unseen = held_out(Counter(i.family for i in items), seed, share=0.25)
    return complete([i.in_split("test" if i.family in unseen else "train") for i in items], "test")


def _subcategory(items: list[Item], table: dict[str, dict[str, Any]], seed: int) -> list[Item]:
    """Class = Unicode's subcategory; emoji are held out in all styles, and men with the women of the same picture."""
    by_class: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_class[table[item.label]["subcategory"]].append(item)
    chosen = []
    for name, members in by_class.items():
        if len(members) < MIN_IMAGES:
            continue
        unseen = held_out(Counter(_motif(i.label) for i in members), seed, share=0.25)
        for i in members:
            split = "test" if _motif(i.label) in unseen else "train"
            chosen.append(Item(split, name, i.family, f"{i.label}-{i.name}", i.pixels))
    return complete(chosen, "test")


def _motif(code: str) -> str:
    """An emoji without who does it: the woman astronaut is the man astronaut's picture with other hair."""
    return "-".join(p for p in code.split("-") if p not in _PERSONS) or "person"


def _pictures(registries: Registries) -> tuple[list[Origin], list[Item], dict[str, dict[str, Any]]]:
    package = registries.npm(icons.PACKAGE, icons.VERSION)
    folders = {style: registries.npm(*source[:2]) for style, source in SHEETS.items()}
    listed = json.loads((folders["google"] / "emoji.json").read_text(encoding="utf-8"))
    table = {_code(e["unified"]): e for e in listed if e["category"] not in _SKIPPED}
    sets = {
        prefix: info
        for prefix, info in json.loads((package / "collections.json").read_text(encoding="utf-8")).items()
        if info.get("category") == "Emoji" and icons.allowed(info["license"].get("spdx", ""))
    }
    codes = _codes_by_name(package, sets)
    items: list[Item] = []
    for prefix in tqdm(sets, desc="drawing emoji", unit="style", leave=False):
        seen = set()
        word = prefix.split("-")[0]
        for name, svg in icons.read_set(package, prefix).items():
            code = codes.get(name)
            if code in table and code not in seen and (image := icons.render(svg, SIZE)) is not None:
                seen.add(code)
                items.append(Item("", code, _FAMILIES.get(word, word), prefix, _on_white(image)))
    for style, folder in folders.items():
        items += _sheet(folder, style, table)
    origins = [
        Origin(prefix, icons.PACKAGE, info["license"]["spdx"], info.get("author", {}).get("url", ""))
        for prefix, info in sets.items()
    ] + [Origin(f"{style}-sheet", name, licence, url) for style, (name, _, licence, url) in SHEETS.items()]
    return origins, items, table


def _sheet(folder: Path, style: str, table: dict[str, dict[str, Any]]) -> list[Item]:
    from PIL import Image

    items = []
    for code, entry in table.items():
        path = folder / "img" / style / "64" / entry["image"]
        if path.exists():
            with Image.open(path) as image:
                items.append(Item("", code, style, f"{style}-sheet", _on_white(image.convert("RGBA"))))
    return items


def _code(points: str) -> str:
    """Code points in small letters, without the variation selector that some lists leave out."""
    return "-".join(p for p in points.lower().split("-") if p != "fe0f")


def _codes_by_name(package: Path, sets: dict[str, Any]) -> dict[str, str]:
    """Code points of icon names, from the sets that list them; the other sets use the same names."""
    codes: dict[str, str] = {}
    for prefix in sets:
        data = json.loads((package / "json" / f"{prefix}.json").read_text(encoding="utf-8"))
        for points, name in data.get("chars", {}).items():
            codes.setdefault(name, _code(points))
    return codes


def _on_white(image: "Image") -> "NDArray[np.uint8]":
    import numpy as np
    from PIL import Image

    paper = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(paper, image).convert("RGB").resize((SIZE, SIZE)))
