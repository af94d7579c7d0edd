"""Writing drawings as an ordinary image folder, `split/class/name.png`, once and whole."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_etf.atomic import atomic_folder, write_json, write_text
from timm_etf.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUILDER_VERSION = 1
"""Raised when the builders write other images than before from the same packages."""

SIZE = 64
"""Side of a drawing in pixels."""

_DRAWN_SIZE = 128
_INK_SIZE = 56


@dataclass(frozen=True)
class Origin:
    """Where drawings come from.

    Attributes:
        family: Project that drew them; drawings of one family never occur in two splits of a data set.
        package: PyPI package that ships them.
        licence: SPDX name of the drawings' licence.
        url: Home of the project.
    """

    family: str
    package: str
    licence: str
    url: str


@dataclass(frozen=True)
class Item:
    """One image: where it goes and its pixels, uint8 of shape [SIZE, SIZE], 255 is paper and 0 ink."""

    split: str
    label: str
    family: str
    name: str
    pixels: "NDArray[np.uint8]"


def package_folder(package: str, module: str) -> Path:
    """Folder of an installed package, found without importing it (some would import a GUI toolkit).

    Raises:
        UsageError: If it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"The embedded images need {package}: pip install 'timm_etf[demo]'")
    return Path(spec.submodule_search_locations[0])


def fit(ink: Any) -> "NDArray[np.uint8] | None":
    """Scale a drawing so that its ink fills the box, centred on white paper.

    Args:
        ink: PIL image of mode L, 255 where there is ink.

    Returns:
        Pixels of shape [SIZE, SIZE], 0 where there is ink, or None if the drawing is empty.
    """
    import numpy as np
    from PIL import Image

    box = ink.point(lambda v: 255 * (v > 16)).getbbox()
    if box is None:
        return None
    ink = ink.crop(box)
    scale = _INK_SIZE / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.LANCZOS)
    paper = Image.new("L", (SIZE, SIZE))
    paper.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
    return 255 - np.asarray(paper)


def glyph(font: Any, character: str) -> "NDArray[np.uint8] | None":
    """Draw one character of a PIL font, as `fit` does; None if it is empty or the font's program is broken."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (2 * _DRAWN_SIZE, 2 * _DRAWN_SIZE))
    try:
        ImageDraw.Draw(image).text((_DRAWN_SIZE // 2, _DRAWN_SIZE // 4), character, font=font, fill=255)
    except OSError:  # FreeType: some fonts carry invalid hinting programs for single glyphs
        return None
    return fit(image)


def open_font(path: Path) -> Any:
    """PIL font at the size that `glyph` draws."""
    from PIL import ImageFont

    return ImageFont.truetype(str(path), _DRAWN_SIZE, layout_engine=ImageFont.Layout.BASIC)


def build(folder: Path, origins: Iterable[Origin], items: Callable[[], Iterable[Item]]) -> Path:
    """Write a data set, unless the same builder wrote it there before from the same packages.

    Args:
        folder: Where it goes: `folder/split/label/family-name.png`, `dataset.json` and `LICENSES.md`.
        origins: Where its drawings come from.
        items: Makes the images; called only if the data set is not there.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder holds something else, or a package is not installed.
    """
    origins = sorted(origins, key=lambda o: o.family)
    try:
        packages = {p: version(p) for p in sorted({o.package for o in origins})}
    except PackageNotFoundError as e:
        raise UsageError(f"The embedded images need {e.name}: pip install 'timm_etf[demo]'") from None
    made_from = {"name": folder.name, "builder": BUILDER_VERSION, "packages": packages}
    if folder.exists():
        found = _record(folder)
        if found is None or found.get("name") != folder.name or "builder" not in found:
            raise UsageError(f"{folder} exists and is not a built data set: move it, or choose another root.")
        if all(found.get(k) == v for k, v in made_from.items()):
            return folder
    with atomic_folder(folder) as new:
        summary = _write(new, items())
        write_json(new / "dataset.json", made_from | summary)
        rows = [f"| {o.family} | {o.licence} | {o.package} {packages[o.package]} | {o.url} |" for o in origins]
        table = "\n".join(["| family | licence | package | project |", "|---|---|---|---|", *rows])
        write_text(new / "LICENSES.md", f"# {folder.name}\n\nThese images are drawn from:\n\n{table}\n")
    return folder


def _record(folder: Path) -> dict[str, Any] | None:
    """What a builder wrote about the folder; None if there is no such thing."""
    try:
        record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _write(folder: Path, items: Iterable[Item]) -> dict[str, Any]:
    from PIL import Image

    digest = hashlib.sha256()
    counts: dict[str, Counter[str]] = {}
    families: dict[str, set[str]] = {}
    for item in sorted(items, key=lambda i: (i.split, i.label, i.family, i.name)):
        path = folder / item.split / item.label / f"{item.family}-{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.pixels).save(path)
        digest.update(path.relative_to(folder).as_posix().encode() + item.pixels.tobytes())
        counts.setdefault(item.split, Counter())[item.label] += 1
        families.setdefault(item.split, set()).add(item.family)
    return {
        "images": {split: c.total() for split, c in counts.items()},
        "classes": {split: len(c) for split, c in counts.items()},
        "families": {split: sorted(f) for split, f in families.items()},
        "sha256": digest.hexdigest(),
    }
