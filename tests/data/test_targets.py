"""Named targets: what is said of them, and targets of few images."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import write_images
from tests.data import targets_page
from timm_etf import UsageError
from timm_etf.data.catalogue import HUB, NOWHERE, VTAB, Target
from timm_etf.data.checked import FACTS, SOURCES, otherwise
from timm_etf.data.drawing import draw
from timm_etf.data.images import Images, find_targets, open_splits


def test_the_page_is_written_from_the_catalogue() -> None:
    page = targets_page.PAGE.read_text(encoding="utf-8")
    assert targets_page.written(page) == page


@pytest.mark.parametrize("name", FACTS)
def test_everything_said_of_a_target_has_a_source_or_is_open(name: str) -> None:
    facts = FACTS[name]
    for aspect, sources in facts.read.items():
        assert set(filter(None, sources.split(", "))) <= {"Hub", *SOURCES}
        assert sources or aspect in facts.open


def test_every_named_target_is_described() -> None:
    assert FACTS.keys() == HUB.keys() | VTAB.keys()
    assert len(HUB) == 13
    assert {f"vtab-{name}" for name in HUB} & VTAB.keys() < VTAB.keys()


def test_vtab_has_nineteen_tasks_and_says_which_it_has_not() -> None:
    targets, missing = find_targets(["vtab-1k"], Path("data"))
    assert [t.name for t in targets] == list(VTAB)
    assert missing == NOWHERE
    assert Counter(t.group for t in targets) == {"natural": 7, "specialised": 4, "structured": 8 - len(NOWHERE)}
    assert {(t.metric, t.train_images) for t in targets} == {("top1", 1000)}


def test_a_data_set_that_is_another_is_told() -> None:
    pets = HUB["pets"]
    assert otherwise(pets, 37, 3669) == ""
    assert otherwise(pets, 37, 3660) == (
        "pets has 3,660 test images, and 3,669 were expected: it is not the data set of the literature"
    )
    assert "38 classes, and 37 were expected; 3,660 test images" in otherwise(replace(pets, group="far"), 38, 3660)
    assert otherwise(replace(pets, test="other"), 2, 3660) == ""  # asked for
    assert otherwise(Target("pets", "my/pets"), 2, 3660) == ""


# Few images


@given(st.lists(st.integers(0, 6), min_size=8, max_size=60), st.integers(7, 60), st.integers(0, 9))
def test_a_draw_has_every_class(labels: list[int], count: int, seed: int) -> None:
    y = np.array(labels)
    if count > len(y):
        with pytest.raises(UsageError, match=f"asks for {count} of {len(y)} images"):
            draw(y, count, every_class=True)
        return
    rows = draw(y, count, every_class=True, seed=seed)
    assert len(set(rows.tolist())) == count
    assert (np.diff(rows) > 0).all()
    assert set(y[rows].tolist()) == set(labels)


def test_a_draw_takes_every_image_as_often() -> None:
    y = np.repeat([0, 1, 2], [4, 4, 12])
    counts = np.bincount(np.concatenate([draw(y, 5, seed=s) for s in range(2000)]), minlength=20)
    assert abs(counts / 2000 - 5 / 20).max() < 0.05  # five standard deviations


def shown(images: Images) -> list[bytes]:
    return [images.read(i, "RGB").tobytes() for i in range(len(images))]


def test_a_target_of_few_images(tmp_path: Path) -> None:
    write_images(tmp_path / "bars", "train", 12)
    write_images(tmp_path / "bars", "test", 3)
    (target,), _ = find_targets([f"{tmp_path}/bars,train_images=20"], tmp_path)
    whole, few = open_splits(replace(target, train_images=0)), open_splits(target)
    assert whole.validation is None
    assert few.validation is not None
    assert (len(few.train), len(few.validation), len(few.test)) == (16, 4, len(whole.test))
    assert set(few.train.labels.tolist()) == set(range(5))
    of_whole = dict(zip(shown(whole.train), whole.train.labels.tolist(), strict=True))
    drawn = [*shown(few.train), *shown(few.validation)]
    assert len(set(drawn)) == 20
    assert [of_whole[pixels] for pixels in drawn] == [*few.train.labels.tolist(), *few.validation.labels.tolist()]
    assert few.train.where(3) in {str(path) for path in whole.train.source}
    assert len({s.fingerprint for s in (whole.train, few.train, few.validation)}) == 3
    assert open_splits(target).train.fingerprint == few.train.fingerprint
    apart = open_splits(replace(target, validation="test", test="train"))
    assert apart.validation is not None
    assert set(shown(apart.validation)) < set(shown(whole.test))


@pytest.mark.parametrize(
    ("few", "message"),
    [
        ("train_images=3", "at least 5"),
        ("bins=1", "at least 2"),
        ("bins=x", "whole number"),
        ("bins=6", "has 5 classes"),
    ],
)
def test_too_few_and_too_many(tmp_path: Path, few: str, message: str) -> None:
    write_images(tmp_path / "bars", "train", 2)
    write_images(tmp_path / "bars", "test", 2)
    with pytest.raises(UsageError, match=message):
        open_splits(find_targets([f"{tmp_path}/bars,{few}"], tmp_path)[0][0])
    with pytest.raises(UsageError, match="bars: train_images leaves 4 images to fit on for 5 classes"):
        open_splits(find_targets([f"{tmp_path}/bars,train_images=5"], tmp_path)[0][0])


def shards(folder: Path, labels: dict[str, list[int]]) -> Path:
    """Data as CLIP_benchmark's converter writes it: tar files of NUMBER.webp and NUMBER.cls."""
    folder.mkdir()
    for split, classes in labels.items():
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for number, label in enumerate(classes):
                pixels = io.BytesIO()
                Image.new("RGB", (8, 8), (6 * label, 0, 0)).save(pixels, "webp", lossless=True)
                for kind, content in (("cls", str(label).encode()), ("webp", pixels.getvalue())):
                    about = tarfile.TarInfo(f"s{number:07}.{kind}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    return folder


def test_orientations_in_shards_are_joined_as_vtab_joins_them(tmp_path: Path) -> None:
    location = shards(tmp_path / "angles", {"train": list(range(40)) * 2, "test": [39, 3, 2, 11]})
    splits = open_splits(replace(VTAB["vtab-dsprites-orientation"], location=str(location), train_images=50))
    assert len(splits.train.class_names) == 16
    angle = [splits.test.read(i, "RGB").getpixel((0, 0))[0] // 6 for i in range(4)]
    assert angle == [39, 3, 2, 11]
    assert splits.test.labels.tolist() == [int(a // (40 / 16)) for a in angle]  # tf.math.floordiv by classes / bins
    for i in range(len(splits.train)):
        red = splits.train.read(i, "RGB").getpixel((0, 0))[0]
        assert splits.train.labels[i] == int(red // 6 // 2.5)
