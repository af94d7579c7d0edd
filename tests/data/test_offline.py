"""The offline suite, built from small packages that a stand-in for npm hands out; nothing is downloaded."""

import gzip
import json
import os
import pickle
import stat
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import commands
from timm_etf import UsageError
from timm_etf.data import build_offline
from timm_etf.data.build.duplicates import without_copies
from timm_etf.data.build.image_folder import Item
from timm_etf.data.build.offline import TARGETS, emoji, glyphs, icons
from timm_etf.data.build.offline.held_out import held_out
from timm_etf.data.build.offline.registries import Registries, Unavailable
from timm_etf.data.build.offline.small_images import load_arrays, read_idx

LICENCES = ["MIT"] * 10 + ["GPL-3.0", "CC-BY-NC-4.0"]


def shape(number: int, hand: int) -> str:
    """A drawing of class `number` in a hand of its own: bars whose places are the class, and their widths the hand."""
    bars = [x for x in range(8) if number * 37 >> x & 1] or [number % 8]
    return "".join(f'<rect x="{3 * x}" y="{hand % 7}" width="{1 + hand % 3}" height="{10 + hand}"/>' for x in bars)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `npm` on the path that packs folders of this machine, and a package of twelve icon sets for it."""
    package = tmp_path / "registry" / "@iconify" / "json" / "package"
    (package / "json").mkdir(parents=True)
    names = [f"thing{k}" for k in range(40)]
    collections = {}
    for hand, licence in enumerate(LICENCES):
        prefix = f"set{chr(97 + hand)}"
        collections[prefix] = {"license": {"spdx": licence}, "author": {"url": f"https://{prefix}.test"}}
        found = {f"{n}-outline": {"body": shape(k, hand)} for k, n in enumerate(names) if (k + hand) % 11}
        data = {"icons": found | {"github": {"body": shape(1, 1)}}, "width": 24, "height": 24}
        (package / "json" / f"{prefix}.json").write_text(json.dumps(data))
    (package / "collections.json").write_text(json.dumps(collections))
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, tarfile, pathlib\n"
        "name, _, version = sys.argv[-1].rpartition('@')\n"
        f"source = pathlib.Path({str(tmp_path / 'registry')!r}) / name / 'package'\n"
        "if not source.exists():\n"
        "    print('npm error code E404\\nnpm error 404 Not Found', file=sys.stderr); sys.exit(1)\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--pack-destination') + 1])\n"
        "with tarfile.open(folder / 'p.tgz', 'w:gz') as t: t.add(source, 'package')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "registry"


def test_icons_are_split_by_hand_and_no_class_is_in_both_sets(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icons, "SOURCE_CLASSES", 25)
    monkeypatch.setattr(icons, "NOVEL_CLASSES", 10)
    built, missing = build_offline(tmp_path / "data")
    assert set(built) == {"icons-400", "icons-novel", "mnist-5k"}
    assert set(missing) == set(TARGETS) - set(built)
    assert missing["kanji"] == "needs apt-cache: it comes with Debian and Ubuntu"
    assert "404" in missing["emoji-identity"] or "E404" in missing["emoji-identity"]
    records = {name: json.loads((built[name] / "dataset.json").read_text()) for name in ("icons-400", "icons-novel")}
    classes = {
        name: {split: {p.name for p in (built[name] / split).iterdir()} for split in record["images"]}
        for name, record in records.items()
    }
    assert classes["icons-400"]["train"] == classes["icons-400"]["validation"]
    assert classes["icons-novel"]["train"] == classes["icons-novel"]["test"]
    assert not classes["icons-400"]["train"] & classes["icons-novel"]["train"]
    assert "github" not in classes["icons-400"]["train"]
    outside = {name: set(r["families"].get("validation", r["families"].get("test"))) for name, r in records.items()}
    inside = {f for r in records.values() for f in r["families"]["train"]}
    assert not (outside["icons-400"] | outside["icons-novel"]) & inside
    licences = (built["icons-400"] / "LICENSES.md").read_text()
    assert "GPL" not in licences
    assert "NC" not in licences
    assert "https://seta.test" in licences
    assert not list((tmp_path / "data").glob(".*"))
    assert build_offline(tmp_path / "data")[0] == built  # from what is there


def test_another_seed_holds_out_other_hands(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons, "SOURCE_CLASSES", 25)
    held = []
    for seed in range(3):
        folder = icons.build_icons(tmp_path / str(seed), Registries(tmp_path / f"d{seed}"), seed)["icons-400"]
        held.append(tuple(json.loads((folder / "dataset.json").read_text())["families"]["validation"]))
    assert len(set(held)) > 1


def test_without_any_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"needs npm: install Node.js"):
        Registries(tmp_path / "d").npm("left-pad", "1.0.0")
    (tmp_path / "icons-400").mkdir()
    with pytest.raises(UsageError, match="exists and is not a built data set"):
        icons.build_icons(tmp_path, Registries(tmp_path / "d"), 0)


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = tmp_path / "evil.tgz"
    (tmp_path / "x").write_text("x")
    with tarfile.open(evil, "w:gz") as tar:
        link = tarfile.TarInfo("package/out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        tar.add(tmp_path / "x", "package/out/inside")
        tar.add(tmp_path / "x", "../../escaped")
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n/bin/cp {evil} .\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    with pytest.raises(Unavailable, match=r"is to go to ../../escaped"):
        Registries(tmp_path / "d").npm("evil", "1")
    assert not (tmp_path / "escaped").exists()
    assert not (tmp_path / "inside").exists()  # through the link, which is left out


class Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch owned",)


def test_a_pickle_holds_arrays_of_numbers_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for protocol in (3, 4):
        np.testing.assert_array_equal(load_arrays(pickle.dumps(array, protocol)), array)
    for value in (Hostile(), np.array([Hostile()]), np.array([1, "a"], dtype=object), [1, 2], "text", print):
        with pytest.raises(Unavailable, match="refused"):
            load_arrays(pickle.dumps(value))
    with pytest.raises(Unavailable, match="refused"):
        load_arrays(pickle.dumps(array, 4)[:-20])
    assert not (tmp_path / "owned").exists()


def test_idx_files(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "a.gz").write_bytes(gzip.compress(header + images.tobytes()))
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), images)


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 100), min_size=2, max_size=12),
    st.integers(0, 50),
)
def test_something_is_held_out_and_something_left(images: dict[str, int], seed: int) -> None:
    total = sum(images.values())
    chosen = held_out(images, seed, share=0.25)
    assert chosen < set(images)
    if chosen and len(images) > 2:
        assert max(images[f] for f in chosen) <= 0.25 * total
        # No more than the share and the family that went over it.
        assert sum(images[f] for f in chosen) <= 0.5 * total
    if sum(n for n in images.values() if n <= 0.25 * total) >= 0.5 * total and len(images) > 3:
        assert sum(images[f] for f in chosen) >= 0.25 * total


def test_copies_leave_training_rather_than_the_test() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64), dtype=np.uint8).repeat(1, 0) for _ in range(4)]
    smooth = [np.kron(p[:8, :8], np.ones((8, 8), np.uint8)) for p in pictures]
    items = [
        Item("train", "a", "f", "0", smooth[0]),
        Item("test", "a", "g", "1", smooth[0]),
        Item("train", "b", "f", "2", smooth[1]),
    ]
    near = np.clip(smooth[2].astype(int) + rng.integers(-40, 40, (64, 64)), 0, 255).astype(np.uint8)
    items += [Item("train", "c", "f", "3", smooth[2]), Item("train", "c", "f", "4", near)]
    assert {i.name for i in without_copies(items, ("test", "train"))} >= {"1", "2", "3"}
    assert "0" not in {i.name for i in without_copies(items, ("test", "train"))}


def test_scripts_have_no_two_classes_of_one_shape() -> None:
    assert len(set(glyphs.SCRIPTS["kanji"])) == 80
    assert len(glyphs.SCRIPTS["hiragana"]) == 73
    folded = Counter(c.lower() for c in glyphs.SCRIPTS["armenian"])
    assert len(folded) == 38
    assert len(set(glyphs.FONTS)) == len(glyphs.FONTS)


def test_emoji_of_one_motif_stay_together() -> None:
    man, woman, person = "1f468-200d-1f680", "1f469-200d-1f680", "1f9d1-200d-1f680"
    assert len({emoji._motif(code) for code in (man, woman, person)}) == 1
    assert emoji._motif("1f600") != emoji._motif("1f601")
    assert emoji._code("2764-FE0F") == "2764"


def test_families_of_relatives() -> None:
    assert icons.family("mdi-light") == icons.family("ic") == icons.family("material-symbols")
    assert icons.family("f7") == "f7"
    assert not icons.allowed("GPL-2.0-or-later")
    assert not icons.allowed("CC-BY-NC-SA-4.0")
    assert not icons.allowed("")
    assert icons.allowed("CC-BY-SA-4.0")


def test_a_drawing_of_an_icon() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><rect x="2" y="2" width="5" height="10"/></svg>'
    pixels = icons.draw_icon(svg)
    assert pixels.shape == (64, 64)
    assert (pixels[4:60] < 128).any(axis=0).sum() == pytest.approx(28, abs=1)  # filled to 56 pixels, half as wide
    assert icons.draw_icon('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"/>') is None
    assert icons.draw_icon("not svg") is None
    assert Image.fromarray(pixels).mode == "L"


def test_the_wheel_of_animals_is_only_read(tmp_path: Path) -> None:
    wheel = tmp_path / "animal.whl"
    images = np.zeros((50, 784), np.uint8)
    images[:, ::7] = np.arange(50, dtype=np.uint8)[:, None]
    labels = np.repeat(np.arange(5), 10)
    with zipfile.ZipFile(wheel, "w") as z:
        for part, value in (("data", images), ("label", labels)):
            name = f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz"
            z.writestr(name, gzip.compress(pickle.dumps(value)))
        z.writestr("animal_mnist/__init__.py", "raise SystemExit('imported')")

    class Local(Registries):
        def _wheel(self, name: str, version: str) -> Path:
            return wheel

    from timm_etf.data.build.offline.small_images import build_animals

    folder = build_animals(tmp_path, Local(tmp_path / "d"), 0)["animal-mnist"]
    assert json.loads((folder / "dataset.json").read_text())["images"] == {"test": 10, "train": 40}
    with Image.open(next((folder / "test" / "3").iterdir())) as image:
        assert image.size == (28, 28)


def test_the_command_says_what_is_missing_and_what_is_next(npm: Path, tmp_path: Path) -> None:
    path = {"PATH": os.environ["PATH"]}  # with the fixture's npm in it
    done = commands.run("data", "build", "offline", "--root", "here", cwd=tmp_path, env=path, check=True)
    assert "not built: fashion-mnist: needs apt-cache" in done.stdout
    assert "next: timm-etf transfer" in done.stdout
    assert (tmp_path / "here" / "icons-400" / "train").is_dir()
