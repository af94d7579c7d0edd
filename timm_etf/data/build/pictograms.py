"""Pictograms: what icon families draw under one name. Class = name, domain = family, split by family.

Two data sets come from one ranking of names, so that no class is in both: `pictograms` to pretrain on and
`pictograms-novel` to transfer to. In both, whole families are held out of training.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from timm_etf.data.build import image_folder
from timm_etf.data.build.duplicates import without_copies
from timm_etf.data.build.image_folder import Item, Origin, package_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOURCE_CLASSES = 250
"""Most names in `pictograms`; the next `NOVEL_CLASSES` of the ranking are `pictograms-novel`."""

NOVEL_CLASSES = 110

ORDER = ("validation", "train", "test", "train-novel")
"""Held-out drawings first, so that a copy is taken out of training; the source before the target."""

HELD_OUT = frozenset({"lucide", "remix", "bootstrap", "codicon"})
"""Families that nothing trains on: `pictograms/validation` and `pictograms-novel/test`."""

ORIGINS = (
    Origin("bootstrap", "tkinter-icons-bs", "MIT", "https://icons.getbootstrap.com"),
    Origin("codicon", "QtAwesome", "CC-BY-4.0", "https://github.com/microsoft/vscode-codicons"),
    Origin("elusive", "QtAwesome", "OFL-1.1", "http://elusiveicons.com"),
    Origin("eva", "tkinter-icons-eva", "MIT", "https://akveo.github.io/eva-icons"),
    Origin("fluent", "tkinter-icons-fluent", "MIT", "https://github.com/microsoft/fluentui-system-icons"),
    Origin("fontawesome", "QtAwesome", "OFL-1.1", "https://fontawesome.com"),
    Origin("ionicons", "tkinter-icons-ion", "MIT", "https://ionic.io/ionicons"),
    Origin("lucide", "tkinter-icons-lucide", "ISC", "https://lucide.dev"),
    Origin("material", "tkinter-icons-gmi", "Apache-2.0", "https://fonts.google.com/icons"),
    Origin("mdi", "QtAwesome", "Apache-2.0", "https://pictogrammers.com/library/mdi"),
    Origin("phosphor", "QtAwesome", "MIT", "https://phosphoricons.com"),
    Origin("remix", "QtAwesome", "Apache-2.0", "https://remixicon.com"),
    Origin("typicons", "tkinter-icons-typicons", "OFL-1.1", "https://www.s-ings.com/typicons"),
)

_FONTS = (
    # family, module, font, table of names and code points. Logos (FontAwesome's brands) are left out.
    ("codicon", "qtawesome", "fonts/codicon-0*.ttf", "fonts/codicon-charmap-*.json"),
    ("elusive", "qtawesome", "fonts/elusiveicons-webfont-[0-9]*.ttf", "fonts/elusiveicons-webfont-charmap-*.json"),
    *(
        ("fontawesome", "qtawesome", f"fonts/{stem}-webfont-[0-9]*.ttf", f"fonts/{stem}-webfont-charmap-*.json")
        for stem in ("fontawesome5-regular", "fontawesome5-solid", "fontawesome6-regular", "fontawesome6-solid")
    ),
    ("mdi", "qtawesome", "fonts/materialdesignicons6-webfont-[0-9]*.ttf", "fonts/materialdesignicons6-*charmap-*.json"),
    ("phosphor", "qtawesome", "fonts/phosphor-[0-9]*.ttf", "fonts/phosphor-charmap-*.json"),
    ("remix", "qtawesome", "fonts/remixicon-[0-9]*.ttf", "fonts/remixicon-charmap-*.json"),
    ("bootstrap", "tkinter_icons_bs", "assets/bootstrap.ttf", "assets/glyphmap.json"),
    ("eva", "tkinter_icons_eva", "fonts/eva-icons.ttf", "glyphmap.json"),
    ("fluent", "tkinter_icons_fluent", "fonts/FluentSystemIcons-Filled.ttf", "glyphmap-filled.json"),
    ("fluent", "tkinter_icons_fluent", "fonts/FluentSystemIcons-Regular.ttf", "glyphmap-regular.json"),
    ("ionicons", "tkinter_icons_ion", "fonts/ionicons.ttf", "glyphmap.json"),
    ("lucide", "tkinter_icons_lucide", "fonts/lucide.ttf", "glyphmap.json"),
    ("material", "tkinter_icons_gmi", "fonts/MaterialIcons-Regular.ttf", "glyphmap-baseline.json"),
    ("material", "tkinter_icons_gmi", "fonts/MaterialIconsOutlined-Regular.otf", "glyphmap-outlined.json"),
    ("material", "tkinter_icons_gmi", "fonts/MaterialIconsRound-Regular.otf", "glyphmap-round.json"),
    ("material", "tkinter_icons_gmi", "fonts/MaterialIconsSharp-Regular.otf", "glyphmap-sharp.json"),
    ("typicons", "tkinter_icons_typicons", "fonts/typicons.ttf", "glyphmap.json"),
)

_PREFIXES = re.compile("^(ic-fluent-|icon-|ios-|md-|android-)")
_STYLES = frozenset(
    "outline outlined line fill filled solid bold duotone thin light rounded round sharp regular o alt variant twotone "
    "simple".split()
)
_SAME = {
    # Families name these differently and draw the same thing.
    **{"house": "home", "magnifying-glass": "search", "magnify": "search", "envelope": "mail", "email": "mail"},
    **{"photo": "image", "photograph": "image", "gear": "cog", "trash-can": "trash", "user-group": "users"},
    **{"account": "user", "person": "user", "pen": "pencil", "lightning": "bolt", "flash": "bolt"},
    **{"add": "plus", "close": "x", "xmark": "x", "times": "x", "x-mark": "x", "magnify-plus": "zoom-in"},
    **{"magnifying-glass-plus": "zoom-in", "magnify-minus": "zoom-out", "magnifying-glass-minus": "zoom-out"},
    **{"settings": "cog", "edit": "pencil", "airplane": "plane", "earth": "globe", "world": "globe"},
    **{"cart": "shopping-cart", "bar-chart": "chart-bar", "folder-add": "folder-plus", "add-circle": "plus-circle"},
    **{"cloud-arrow-down": "cloud-download", "cloud-arrow-up": "cloud-upload", "funnel": "filter"},
    **{"unlock": "lock-open", "eye-slash": "eye-off", "visibility": "eye", "television": "tv", "microphone": "mic"},
    **{"group": "users", "people": "users", "comment": "chat", "message": "chat", "notifications": "bell"},
    **{"map-marker": "map-pin", "place": "map-pin", "location": "map-pin", "help": "question", "luggage": "suitcase"},
    **{"paint-brush": "brush", "logout": "log-out", "sign-out": "log-out", "login": "log-in", "sign-in": "log-in"},
    **{"favorite": "heart", "extension": "puzzle", "call": "phone", "award": "medal"},
}
_SAME_IN = {
    # Words that one family uses for what all others call something else.
    **{("fluent", "alert"): "bell", ("fluent", "phone"): "mobile", ("bootstrap", "phone"): "mobile"},
    **{("bootstrap", "telephone"): "phone", ("fluent", "delete"): "trash", ("mdi", "delete"): "trash"},
    **{("material", "delete"): "trash"},
}
_NUMBERED = frozenset({"material", "mdi"})
"""Families that draw the number in a name (`forward_10`); elsewhere it is a size or a variant."""

_SPLIT_WORDS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"})
"""Not in a class name: `datasets` would read `validation/train/` (a locomotive) as a part of the training split."""
_BRANDS = re.compile(
    "(^|-)(apple|amazon|aws|bitcoin|chrome|discord|docker|dropbox|edge|ethereum|facebook|figma|firefox|git|github|"
    "gitlab|google|html5|instagram|linkedin|linux|medium|microsoft|npm|opera|paypal|pinterest|python|reddit|safari|slack|"
    "snapchat|spotify|steam|telegram|tiktok|trello|tumblr|twitch|twitter|vimeo|whatsapp|windows|wordpress|yahoo|youtube)(-|$)"
)


@dataclass(frozen=True)
class _Drawing:
    family: str
    label: str
    name: str
    draw: "Callable[[], NDArray[np.uint8] | None]"


def canonical_name(name: str, family: str = "") -> str | None:
    """Class of an icon's name, without the words that name a style; None for logos, letters, digits and splits.

    Example:
        >>> canonical_name("arrow_left-bold"), canonical_name("House-2-line"), canonical_name("github-fill")
        ('arrow-left', 'home', None)
    """
    words = _PREFIXES.sub("", re.sub(r"[^a-z0-9]+", "-", name.lower())).strip("-").split("-")
    while len(words) > 1 and (words[-1] in _STYLES or words[-1].isdigit()):
        words.pop()
    if not _SPLIT_WORDS.isdisjoint(words) or (family in _NUMBERED and re.search(r"[-_]\d+", name)):
        return None
    label = "-".join(words)
    label = _SAME_IN.get((family, label)) or _SAME.get(label, label)
    is_text = (len(words[0]) == 1 and label != "x") or words[0].isdigit() or words[0] in ("alpha", "numeric", "letter")
    return None if is_text or _BRANDS.search(label) else label


def build_pictograms(root: str | Path) -> Path:
    """Build `root/pictograms` (and `root/pictograms-novel`, its transfer target), unless they are there.

    Args:
        root: Folder that receives the data sets.

    Returns:
        `root/pictograms`, an image folder with `train` and `validation`: grey 64 x 64 PNGs, dark ink on white.

    Raises:
        UsageError: If a package of the `demo` extra is missing or something else is in the way.
    """
    root = Path(root)
    made: list[list[Item]] = []

    def both() -> list[list[Item]]:
        if not made:
            made.extend(_select())
        return made

    packages = image_folder.installed(ORIGINS)
    source = image_folder.build(root / "pictograms", packages, lambda: (ORIGINS, both()[0]))
    image_folder.build(root / "pictograms-novel", packages, lambda: (ORIGINS, both()[1]))
    return source


def _drawings() -> Iterator[_Drawing]:
    packages = {o.family: o.package for o in ORIGINS}
    for family, module, font_pattern, table_pattern in _FONTS:
        folder = package_folder(packages[family], module)
        (path,), (table,) = folder.glob(font_pattern), folder.glob(table_pattern)
        font = image_folder.open_font(path)
        for name, code in json.loads(table.read_text(encoding="utf-8")).items():
            if label := canonical_name(name, family):
                file = f"{path.stem}-{re.sub('[^A-Za-z0-9]+', '-', name)}".lower()
                point = code if isinstance(code, int) else int(code, 16)
                yield _Drawing(family, label, file, partial(image_folder.glyph, font, chr(point)))


def _select() -> tuple[list[Item], list[Item]]:
    """Images of both data sets: rank the names, draw them, and drop what occurs twice."""
    by_label: dict[str, list[_Drawing]] = defaultdict(list)
    for drawing in _drawings():
        by_label[drawing.label].append(drawing)

    def rank(label: str) -> tuple[int, int, str]:
        return -len({d.family for d in by_label[label]}), -len(by_label[label]), label

    ranked = [label for label in sorted(by_label, key=rank) if _spans_both_splits({d.family for d in by_label[label]})]
    items: list[Item] = []
    chosen = ranked[: SOURCE_CLASSES + NOVEL_CLASSES]
    bar = tqdm(total=sum(len(by_label[label]) for label in chosen), desc="drawing pictograms", unit="img", leave=False)
    with bar:
        for number, label in enumerate(chosen):
            held_out, trained = ("validation", "train") if number < SOURCE_CLASSES else ("test", "train-novel")
            for drawing in sorted(by_label[label], key=lambda d: (d.family, d.name)):
                pixels = drawing.draw()
                bar.update()
                if pixels is not None:
                    split = held_out if drawing.family in HELD_OUT else trained
                    items.append(Item(split, label, drawing.family, drawing.name, pixels))
    items = without_copies(items, ORDER)
    source = [i for i in items if i.split in ("train", "validation")]
    novel = [i.in_split(i.split.removesuffix("-novel")) for i in items if i.split in ("test", "train-novel")]
    return _complete(source, "validation"), _complete(novel, "test")


def _spans_both_splits(families: set[str]) -> bool:
    return bool(families & HELD_OUT) and len(families - HELD_OUT) >= 2


def _complete(items: list[Item], held_out: str) -> list[Item]:
    """The classes that still have a held-out drawing and two training families."""
    families: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in items:
        families[item.label].add((item.split, item.family))
    whole = {
        label
        for label, pairs in families.items()
        if any(s == held_out for s, _ in pairs) and sum(s == "train" for s, _ in pairs) >= 2
    }
    return [item for item in items if item.label in whole]
