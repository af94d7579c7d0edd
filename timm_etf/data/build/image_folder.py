"""Writing drawings as an ordinary image folder, `split/class/name.png`, once and whole."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from timm_etf.atomic import UNFINISHED, atomic_folder, write_json, write_text
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
        package: Package that ships them.
        licence: SPDX name of the drawings' licence.
        url: Home of the project.
    """

    family: str
    package: str
    licence: str
    url: str


@dataclass(frozen=True)
class Item:
    """One image: where it goes and its pixels, uint8 [h, w] (255 is paper, 0 is ink) or [h, w, 3] in colour."""

    split: str
    label: str
    family: str
    name: str
    pixels: "NDArray[np.uint8]"

    def in_split(self, split: str) -> "Item":
        """The same image in another split."""
        return replace(self, split=split)


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


def open_font(path: Path, index: int = 0) -> Any:
    """PIL font at the size that `glyph` draws; `index` chooses from a collection."""
    from PIL import ImageFont

    return ImageFont.truetype(str(path), _DRAWN_SIZE, index=index, layout_engine=ImageFont.Layout.BASIC)


def installed(origins: Iterable[Origin]) -> dict[str, str]:
    """Versions of the PyPI packages that drawings come from.

    Raises:
        UsageError: If one is not installed.
    """
    try:
        return {p: version(p) for p in sorted({o.package for o in origins})}
    except PackageNotFoundError as e:
        raise UsageError(f"The embedded images need {e.name}: pip install 'timm_etf[demo]'") from None


def build(
    folder: Path, packages: Mapping[str, str], make: Callable[[], tuple[Iterable[Origin], Iterable[Item]]]
) -> Path:
    """Write a data set, unless the same builder wrote it there before from the same packages.

    Args:
        folder: Where it goes: `folder/split/label/family-name.png`, `dataset.json` and `LICENSES.md`.
        packages: Versions of the packages its drawings come from, and whatever else decides what is drawn.
        make: Gives the drawings' origins and the images; called only if the data set is not there.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder holds something else.
    """
    made_from = {"name": folder.name, "builder": BUILDER_VERSION, "packages": dict(packages)}
    if folder.exists():
        found = _record(folder)
        if found is None or found.get("name") != folder.name or "builder" not in found:
            raise UsageError(f"{folder} exists and is not a built data set: move it, or choose another root.")
        if all(found.get(k) == v for k, v in made_from.items()):
            return folder
    origins, items = make()
    with atomic_folder(folder) as new:
        summary = _write(new, items)
        write_json(new / "dataset.json", made_from | summary)
        rows = [
            f"| {o.family} | {o.licence} | {o.package} {packages[o.package]} | {o.url} |"
            for o in sorted(origins, key=lambda o: o.family)
        ]
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
    items = sorted(items, key=lambda i: (i.split, i.label, i.family, i.name))
    for item in tqdm(items, desc=f"writing {folder.name.removeprefix(UNFINISHED)}", unit="img", leave=False):
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
