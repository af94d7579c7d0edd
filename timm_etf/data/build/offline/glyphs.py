"""Characters of three scripts in the fonts that Debian packages: class = code point, domain = font family."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from timm_etf.data.build import image_folder
from timm_etf.data.build.duplicates import without_copies
from timm_etf.data.build.image_folder import Item, Origin
from timm_etf.data.build.offline.held_out import held_out
from timm_etf.data.build.offline.icons import complete
from timm_etf.data.build.offline.registries import Registries, debian_versions

_FIRST_YEAR = (
    "一右雨円王音下火花貝学気九休玉金空月犬見五口校左三山子四糸字耳七車手十出女小上森人水正生青夕石赤千川先早草足村大男竹中虫町天田土二日入"
    "年白八百文木本名目立力林六"
)
SCRIPTS = {
    # Glyphs are scaled to their ink, so whatever differs in size alone is one class: a letter is its small and its
    # capital form, and the small kana are left out.
    "armenian": [chr(c) for c in (*range(0x531, 0x557), *range(0x561, 0x587))],
    "hiragana": [chr(c) for c in range(0x3042, 0x3094) if chr(c) not in "ぃぅぇぉっゃゅょゎ"],
    "kanji": sorted(_FIRST_YEAR),  # the 80 of the first school year
}

FONTS = tuple(
    f"fonts-{name}"
    for name in (
        "noto-core dejavu-core dejavu-extra liberation freefont-ttf cantarell lato roboto-unhinted open-sans "
        "linuxlibertine gfs-didot croscore crosextra-carlito crosextra-caladea ebgaramond hack-ttf firacode "
        "inconsolata comfortaa quicksand oxygen urw-base35 junicode sil-gentiumplus sil-charis sil-doulos sil-andika "
        "anonymous-pro paratype play jura league-spartan breip femkeklaver rufscript sjfonts seto "
        "ipafont-gothic ipafont-mincho vlgothic aoyagi-kouzan-t kouzan-mouhitsu klee yusei-magic mplus dotgothic16 "
        "rampart reggae rocknroll stick train misaki hanazono horai-umefont sawarabi-gothic sawarabi-mincho "
        "motoya-l-cedar motoya-l-maruberi yozvox-yozfont komatuna monapo takao-gothic takao-mincho aoyagi-soseki "
        "umeplus wqy-zenhei wqy-microhei arphic-ukai arphic-uming"
    ).split()
)
_FAMILIES = {
    # Packages with glyphs of one hand, or grown out of another package's.
    **dict.fromkeys(("ipafont-gothic", "ipafont-mincho", "takao-gothic", "takao-mincho", "monapo"), "ipa"),
    **dict.fromkeys(("mplus", "vlgothic", "umeplus", "komatuna", "horai-umefont"), "mplus"),
    **dict.fromkeys(("aoyagi-kouzan-t", "kouzan-mouhitsu", "aoyagi-soseki"), "aoyagi"),
    **dict.fromkeys(("sawarabi-gothic", "sawarabi-mincho"), "sawarabi"),
    **dict.fromkeys(("motoya-l-cedar", "motoya-l-maruberi"), "motoya"),
    **dict.fromkeys(("arphic-ukai", "arphic-uming"), "arphic"),
    **dict.fromkeys(("noto-core", "open-sans", "wqy-microhei", "wqy-zenhei"), "noto"),
    **dict.fromkeys(("dejavu-core", "dejavu-extra"), "dejavu"),
    **dict.fromkeys(("liberation", "croscore"), "liberation"),
    **dict.fromkeys(("sil-gentiumplus", "sil-charis", "sil-doulos", "sil-andika"), "sil"),
    **dict.fromkeys(("freefont-ttf", "urw-base35"), "urw"),
}
_ORDER = ("test", "train")


def build_glyphs(root: Path, registries: Registries, seed: int, script: str) -> dict[str, Path]:
    """Build the data set of one of `SCRIPTS` in `root` (train, test), unless it is there.

    Raises:
        Unavailable: If apt cannot fetch the fonts.
    """
    versions = debian_versions(FONTS)
    packages = versions | {"seed of the split": str(seed)}

    def make() -> tuple[list[Origin], list[Item]]:
        folder = registries.debian(tuple(versions))
        glyphs = list(_draw(folder, script))
        unseen = held_out(Counter(g.family for g in glyphs), seed, share=0.25)
        items = [g.in_split("test" if g.family in unseen else "train") for g in glyphs]
        drawn = {g.family for g in glyphs}
        origins = [_origin(folder, p) for p in versions if _family(p) in drawn]
        return origins, complete(without_copies(items, _ORDER), "test")

    return {script: image_folder.build(root / script, packages, make)}


def _family(package: str) -> str:
    name = package.removeprefix("fonts-")
    return _FAMILIES.get(name, name)


def _origin(folder: Path, package: str) -> Origin:
    text = (folder / package / "usr/share/doc" / package / "copyright").read_text(encoding="utf-8", errors="replace")
    # Only the paragraphs about the fonts: those about the packaging often have a licence of their own.
    stanzas = [s for s in re.split(r"\n\s*\n", text) if re.search(r"^Files: *(?!debian/)", s, flags=re.MULTILINE)]
    licences = sorted(set(re.findall(r"^License: *(\S.*)$", "\n\n".join(stanzas), flags=re.MULTILINE)))
    (source,) = re.findall(r"^Source: *(\S+)", text, flags=re.MULTILINE)[:1] or [""]
    return Origin(package, package, "; ".join(licences) or f"see the copyright file of {package}", source)


def _draw(folder: Path, script: str) -> Iterator[Item]:
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    characters = SCRIPTS[script]
    points = {ord(c) for c in characters}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".ttc") and not p.is_symlink())
    for path in tqdm(files, desc=f"drawing {script}", unit="font", leave=False):
        try:
            fonts = TTCollection(path, lazy=True).fonts if path.suffix == ".ttc" else [TTFont(path, lazy=True)]
            covering = [i for i, font in enumerate(fonts) if points <= set(font.getBestCmap() or {})]
        except TTLibError:
            continue
        for index in covering:
            font = image_folder.open_font(path, index)
            for character in characters:
                if (pixels := image_folder.glyph(font, character)) is not None:
                    package = path.relative_to(folder).parts[0]
                    name = f"{path.stem}-{index}-{ord(character):04x}"
                    yield Item("", f"U+{ord(character.lower()):04X}", _family(package), name, pixels)
