"""What the embedded data sets must be: large enough, without leaks between their splits, readable, reproducible."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from numpy.typing import NDArray
from PIL import Image

from tests import commands
from tests.data.conftest import BUILD
from timm_etf import UsageError
from timm_etf.data import build_pictograms, build_targets

HELD_OUT = {
    "pictograms": "validation",
    "pictograms-novel": "test",
    "letters-greek": "test",
    "letters-cyrillic": "test",
    "mnist-5k": "test",
}
BY_FAMILY = [name for name in HELD_OUT if name != "mnist-5k"]
NEAR_COPY = 0.975


def classes(folder: Path) -> dict[str, set[str]]:
    return {split.name: {c.name for c in split.iterdir()} for split in folder.iterdir() if split.is_dir()}


def pixels(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))])


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Unit vectors of 16 x 16 means, without their mean: their dot products are correlations."""
    n, side, _ = images.shape
    block = side // 16
    vectors = images.reshape(n, 16, block, 16, block).mean(axis=(2, 4)).reshape(n, -1)
    vectors -= vectors.mean(axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_source_has_many_classes_each_in_both_splits(root: Path) -> None:
    by_split = classes(root / "pictograms")
    assert by_split.keys() == {"train", "validation"}
    assert by_split["train"] == by_split["validation"]
    assert len(by_split["train"]) >= 150
    assert len(list((root / "pictograms").glob("*/*/*.png"))) >= 4000


@pytest.mark.parametrize(
    ("name", "fewest_classes", "fewest_images"),
    [
        ("pictograms-novel", 80, 800),
        ("letters-greek", 24, 1000),
        ("letters-cyrillic", 32, 1000),
        ("mnist-5k", 10, 5000),
    ],
)
def test_targets_have_every_class_in_both_splits(
    root: Path, name: str, fewest_classes: int, fewest_images: int
) -> None:
    by_split = classes(root / name)
    assert by_split.keys() == {"train", "test"}
    assert by_split["train"] == by_split["test"]
    assert len(by_split["train"]) >= fewest_classes
    assert len(list((root / name).glob("*/*/*.png"))) >= fewest_images


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_record_counts_what_is_there(root: Path, name: str) -> None:
    record = json.loads((root / name / "dataset.json").read_text())
    for split, labels in classes(root / name).items():
        assert record["classes"][split] == len(labels)
        assert record["images"][split] == len(list((root / name / split).glob("*/*.png")))


@pytest.mark.parametrize("name", BY_FAMILY)
def test_no_family_is_on_both_sides(root: Path, name: str) -> None:
    families = json.loads((root / name / "dataset.json").read_text())["families"]
    trained, held_out = set(families["train"]), set(families[HELD_OUT[name]])
    assert trained
    assert held_out
    assert not trained & held_out
    # The files say the same as the record.
    longest_first = sorted(trained | held_out, key=len, reverse=True)
    for split in ("train", HELD_OUT[name]):
        for path in (root / name / split).glob("*/*.png"):
            assert next(f for f in longest_first if path.name.startswith(f"{f}-")) in families[split]


@pytest.mark.parametrize("name", HELD_OUT)
def test_no_picture_is_both_trained_on_and_tested(root: Path, name: str) -> None:
    trained, held_out = pixels(root / name / "train"), pixels(root / name / HELD_OUT[name])
    assert not {p.tobytes() for p in trained} & {p.tobytes() for p in held_out}


@pytest.mark.parametrize("name", ["pictograms", "pictograms-novel"])
def test_no_pictogram_is_nearly_one_of_the_other_split(root: Path, name: str) -> None:
    trained = thumbnails(pixels(root / name / "train"))
    held_out = thumbnails(pixels(root / name / HELD_OUT[name]))
    assert (held_out @ trained.T).max() < NEAR_COPY


def test_the_novel_target_shares_neither_names_nor_pictures_with_the_source(root: Path) -> None:
    source, novel = root / "pictograms", root / "pictograms-novel"
    assert not classes(source)["train"] & classes(novel)["train"]
    seen = np.concatenate([pixels(source / s) for s in ("train", "validation")])
    new = np.concatenate([pixels(novel / s) for s in ("train", "test")])
    assert (thumbnails(new) @ thumbnails(seen).T).max() < NEAR_COPY


@pytest.mark.parametrize("name", HELD_OUT)
def test_images_are_grey_with_dark_ink_on_white_and_a_margin(root: Path, name: str) -> None:
    images = np.concatenate([pixels(root / name / split) for split in classes(root / name)])
    assert images.dtype == np.uint8
    assert images.shape[1:] == (64, 64)
    assert (images.min(axis=(1, 2)) < 128).all()
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert (border > 200).mean() > 0.999


def test_names_are_no_logos_letters_or_digits(root: Path) -> None:
    labels = classes(root / "pictograms")["train"] | classes(root / "pictograms-novel")["train"]
    assert not {
        label for label in labels if re.fullmatch(r"[a-wyz]|\d+|.*(github|apple|google|facebook|python).*", label)
    }


@pytest.mark.parametrize("name", HELD_OUT)
def test_licences_name_every_family_and_package(root: Path, name: str) -> None:
    text = (root / name / "LICENSES.md").read_text()
    record = json.loads((root / name / "dataset.json").read_text())
    for family in set().union(*record["families"].values()):
        assert f"| {family} |" in text
    for package, version in record["packages"].items():
        assert f"{package} {version}" in text


@pytest.mark.slow  # a killed build, below, is compared with the same folder
def test_two_processes_write_the_same_bytes(copies: tuple[Path, Path]) -> None:
    first, second = (files(root) for root in copies)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_second_call_changes_nothing(root: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert build_pictograms(root) == root / "pictograms"
    assert build_targets(root) == {name: root / name for name in HELD_OUT if name != "pictograms"}
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_a_killed_build_leaves_no_half_folder_and_the_next_one_succeeds(root: Path, tmp_path: Path) -> None:
    process = commands.Command(tmp_path, code=BUILD)
    while process.poll() is None and not any(tmp_path.glob(".*pictograms*/train")):
        time.sleep(0.01)
    process.kill()
    assert not (tmp_path / "pictograms").exists()
    assert list(tmp_path.iterdir())
    build_pictograms(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictograms", "pictograms-novel"]
    assert files(tmp_path / "pictograms") == files(root / "pictograms")


@pytest.mark.parametrize("record", [None, "{}", "[1]", '{"name": "someone else\'s"}', "no json"])
def test_a_folder_of_someone_else_is_refused_and_kept(tmp_path: Path, record: str | None) -> None:
    other = tmp_path / "pictograms"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    if record is not None:
        (other / "dataset.json").write_text(record)
    with pytest.raises(UsageError, match="choose another root"):
        build_pictograms(tmp_path)
    assert (other / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("package", ["qtawesome", pytest.param("mlxtend", marks=pytest.mark.slow)])
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path, package: str) -> None:
    """In a process whose site-packages really lack the package and its metadata."""
    site = tmp_path / "site"
    site.mkdir()
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.lower().startswith(package):
            (site / path.name).symlink_to(path)
    import timm_etf

    code = (
        f"import sys; sys.path[:0] = {[str(Path(timm_etf.__file__).parents[1]), str(site)]!r}\n"
        "from timm_etf.errors import one_line_errors\nfrom timm_etf.data.build import letters_and_digits\n"
        # Without the pictograms that the other test needs to fail on.
        + ("letters_and_digits.build_pictograms = lambda root: None\n" if package == "mlxtend" else "")
        + f"with one_line_errors():\n    letters_and_digits.build_targets({str(tmp_path / 'out')!r})"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'timm_etf[demo]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_importing_the_builders_loads_no_drawing_package() -> None:
    code = (
        "import sys; import timm_etf; before = set(sys.modules); import timm_etf.data\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'PIL', 'matplotlib', 'mlxtend', 'fontTools', 'qtawesome', 'sklearn'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", HELD_OUT)
def test_timm_reads_them(root: Path, name: str) -> None:
    record = json.loads((root / name / "dataset.json").read_text())
    for split, count in record["images"].items():
        data = timm.data.create_dataset("", root=str(root / name), split=split)
        assert len(data) == count
        assert len(data.reader.class_to_idx) == record["classes"][split]


@pytest.mark.parametrize("name", HELD_OUT)
def test_datasets_reads_the_same_splits(root: Path, name: str, tmp_path: Path) -> None:
    """Also guards the class names: `datasets` would take validation/train/ (a locomotive) for training images."""
    import datasets

    data = datasets.load_dataset("imagefolder", data_dir=str(root / name), cache_dir=str(tmp_path))
    record = json.loads((root / name / "dataset.json").read_text())
    assert {split: len(d) for split, d in data.items()} == record["images"]
    assert data["train"].features["label"].num_classes == record["classes"]["train"]
