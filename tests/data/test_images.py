from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_images
from timm_etf import UsageError
from timm_etf.data.catalogue import HUB, SUITES
from timm_etf.transfer import Target, find_targets, open_splits


def parquet(folder: Path, labels: dict[str, list[object]], feature: object) -> Path:
    for split, values in labels.items():
        images = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(len(values))]
        columns = datasets.Features({"picture": datasets.Image(), "kind": feature})
        data = datasets.Dataset.from_dict({"picture": images, "kind": values}, features=columns)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_names_suites_folders_and_ids(images: Path, tmp_path: Path) -> None:
    targets, missing = find_targets(
        ["flowers102", "offline", f"{images},test=validation,metric=mean_per_class", "org/name,label=kind,hflip=no"],
        tmp_path,
    )
    assert [t.name for t in targets] == ["flowers102", images.name, "name"]
    assert targets[0].validation == "validation"
    assert targets[1].metric == "mean_per_class"
    assert targets[2].hflip is False
    assert set(missing) == set(SUITES["offline"])
    assert f"timm-etf data build offline --root {tmp_path}" in missing["kanji"]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["cifar11"], "No target 'cifar11': neither a folder, nor owner/name on the Hub, nor one of offline"),
        (["cifar10,labels=x"], "a target has no 'labels'; it has bins, config, group, hflip, image"),
        (["cifar10,metric=f1"], "the metric is one of top1, mean_per_class"),
        (["cifar10", "a/cifar10"], "Two targets are called 'cifar10'"),
        (["/nowhere/at/all"], "No target '/nowhere/at/all'"),
    ],
)
def test_wrong_specs(specs: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_targets(specs, Path("data"))


def test_the_same_target_twice_counts_once() -> None:
    assert len(find_targets(["cifar10", "hub"], Path("data"))[0]) == len(HUB)


def test_parquet_with_class_names_strings_or_numbers(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["b", "a", "c"])
    folder = parquet(tmp_path / "named", {"train": [0, 1, 2, 0], "test": [2, 1]}, kind)
    target = Target("named", str(folder), image="picture", label="kind")
    splits = open_splits(target)
    assert splits.train.class_names == ("b", "a", "c")
    assert splits.test.labels.tolist() == [2, 1]
    assert np.asarray(splits.train.read(3, "L"))[0, 0] == 60
    # The test split lacks a class, so its own numbers are others.
    folder = parquet(tmp_path / "words", {"train": ["x", "y", "z"], "test": ["z", "x"]}, datasets.Value("string"))
    splits = open_splits(Target("words", str(folder), image="picture", label="kind"))
    assert splits.test.labels.tolist() == [2, 0]
    folder = parquet(tmp_path / "numbers", {"train": [7, 3, 9], "test": [9, 9]}, datasets.Value("int64"))
    splits = open_splits(Target("numbers", str(folder), image="picture", label="kind"))
    assert (splits.train.class_names, splits.test.labels.tolist()) == (("3", "7", "9"), [2, 2])


def test_fingerprints_tell_splits_and_columns_apart(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "p", {"train": [0, 1], "test": [0, 1]}, datasets.ClassLabel(names=["a", "b"]))
    target = Target("p", str(folder), image="picture", label="kind")
    one, two = open_splits(target), open_splits(target)
    assert one.train.fingerprint == two.train.fingerprint != one.test.fingerprint


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 2], [0, -1, -1], r"2 of 3 labels of t \(test\) are negative: a split without public labels"),
        ([0, 1, 1], [0, 2], r"Class 'c' of t \(test\) has no training images \(1 such\)"),
        ([1, 1, 1], [1], r"t \(train\) has images of one class only"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, train: list[int], test: list[int], message: str) -> None:
    folder = parquet(tmp_path / "p", {"train": train, "test": test}, datasets.ClassLabel(names=["a", "b", "c"]))
    with pytest.raises(UsageError, match=message):
        open_splits(Target("t", str(folder), image="picture", label="kind"))


def test_renamed_columns_are_found_by_their_kind(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "p", {"train": [0, 1], "test": [0, 1]}, datasets.ClassLabel(names=["a", "b"]))
    named, found = (
        open_splits(Target("p", str(folder), image="picture", label="kind")),
        open_splits(Target("p", str(folder))),
    )
    assert found.train.labels.tolist() == named.train.labels.tolist()
    assert found.train.class_names == ("a", "b")
    assert found.test.fingerprint == named.test.fingerprint
    assert found.train.read(1, "L").tobytes() == named.train.read(1, "L").tobytes()


def test_columns_and_splits_that_are_not_there(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "words", {"train": ["x", "y"], "test": ["x", "y"]}, datasets.Value("string"))
    with pytest.raises(UsageError, match=r"no column 'label': give it as p,label=COLUMN \(picture, kind\)"):
        open_splits(Target("p", str(folder)))
    folder = parquet(tmp_path / "p", {"train": [0, 1], "test": [0, 1]}, datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(UsageError, match=r"Cannot open p \(dev\)"):
        open_splits(Target("p", str(folder), image="picture", label="kind", test="dev"))
    with pytest.raises(UsageError, match=r"Cannot open cifar10 \(train\) of uoft-cs/cifar10"):
        open_splits(HUB["cifar10"])  # no network, and not in the cache


def test_folders_whose_classes_differ(tmp_path: Path, images: Path) -> None:
    write_images(tmp_path, "train", 2)
    write_images(tmp_path, "test", 2)
    (tmp_path / "test" / "class4").rename(tmp_path / "test" / "Class 4")
    with pytest.raises(
        UsageError, match="name their classes differently: 1 of 5 are only in the latter, such as 'Class 4'"
    ):
        open_splits(Target("bars", str(tmp_path)))
    for k in range(5):
        for image in (tmp_path / "train" / f"class{k}").iterdir():
            image.unlink()
    with pytest.raises(UsageError, match="holds no images in class folders"):
        open_splits(Target("bars", str(tmp_path)))
    with pytest.raises(UsageError, match=r"No folder .*dev"):
        open_splits(Target("bars", str(images), test="dev"))
    assert open_splits(Target("bars", str(images))).target.test == "validation"
    (tmp_path / "loop" / "train").mkdir(parents=True)
    (tmp_path / "loop" / "train" / "all").symlink_to(images / "train")
    (tmp_path / "loop" / "train" / "again").symlink_to(images / "train" / "class0")
    with pytest.raises(UsageError, match="whose images would count twice"):
        open_splits(Target("bars", str(tmp_path / "loop"), test="train"))
    # Images that lie in the split itself are of no class.
    (tmp_path / "flat" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "train" / "a.png")
    with pytest.raises(UsageError, match="one class"):
        open_splits(Target("flat", str(tmp_path / "flat"), test="train"))
