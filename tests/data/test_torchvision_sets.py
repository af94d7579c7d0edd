"""torchvision's data sets on disk, as their archives unpack."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from timm_etf import UsageError
from timm_etf.data.catalogue import HUB
from timm_etf.data.checked import otherwise
from timm_etf.data.images import find_targets, open_splits
from timm_etf.data.torchvision_sets import SETS
from timm_etf.features.extract import features_of


def picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 0, 0)).save(path)


def pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, count in (("trainval", 3), ("test", 2)):
        lines = []
        for label, breed in ((1, "Abyssinian"), (2, "american_bulldog")):
            for i in range(count):
                name = f"{breed}_{split}{i}"
                picture(folder / "images" / f"{name}.jpg", 100 * label)
                lines.append(f"{name} {label} 1 1")
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def test_pets_as_torchvision_unpacks_them(tmp_path: Path) -> None:
    pets(tmp_path)
    (target,), missing = find_targets(["torchvision:pets,group=near"], tmp_path)
    assert not missing
    assert (target.name, target.metric, target.group) == ("pets", "mean_per_class", "near")
    splits = open_splits(target)
    assert splits.train.class_names == ("Abyssinian", "American Bulldog")
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert splits.validation is None
    assert abs(np.asarray(splits.test.read(3, "RGB"))[0, 0, 0] - 200) < 5  # JPEG
    assert splits.train.fingerprint != splits.test.fingerprint
    assert open_splits(target).train.fingerprint == splits.train.fingerprint
    (tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_test0.jpg").write_bytes(b"")
    import timm

    features = features_of(timm.create_model("test_resnet", num_classes=0), splits.test, workers=0)
    assert len(features.x) == 3
    assert "row 0 of pets (test)" in features.unreadable[0]
    assert open_splits(target).test.fingerprint != splits.test.fingerprint  # what was damaged is read again


def listed(root: Path, kind: str) -> None:
    """Two classes, with two images to train on, one to choose by and one to score, where torchvision looks for them."""
    names = {s: [f"{k}{s}{i}" for k in "ab" for i in range(2 if s == "train" else 1)] for s in ("train", "val", "test")}
    base = root / {"dtd": "dtd/dtd", "aircraft": "fgvc-aircraft-2013b/data", "food101": "food-101"}[kind]
    (base / "meta").mkdir(parents=True)
    (base / "labels").mkdir()
    (base / "variants.txt").write_text("a\nb\n")
    for split, of in names.items():
        for name in of:
            folder = base / "images" / ("" if kind == "aircraft" else name[0])
            picture(folder / f"{name}.jpg", 100 if name[0] == "a" else 200)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(f"{n[0]}/{n}.jpg" for n in of))
        (base / f"images_variant_{split}.txt").write_text("\n".join(f"{n} {n[0]}" for n in of))
        paths = {k: [f"{k}/{n}" for n in of if n[0] == k] for k in "ab"}
        (base / "meta" / f"{split}.json").write_text(json.dumps(paths))


@pytest.mark.parametrize("kind", ["dtd", "aircraft", "food101"])
def test_lists_of_images_as_torchvision_unpacks_them(tmp_path: Path, kind: str) -> None:
    listed(tmp_path, kind)
    splits = open_splits(find_targets([f"torchvision:{kind}"], tmp_path)[0][0])
    assert splits.train.class_names == ("a", "b")
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert (splits.validation is None) == (kind == "food101")
    assert [abs(np.asarray(splits.test.read(i, "RGB"))[0, 0, 0] - level) < 5 for i, level in ((0, 100), (1, 200))]
    assert f"{kind} has 2 classes, and {HUB_CLASSES[kind]} were expected" in otherwise(splits.target, 2, 2)


HUB_CLASSES = {"dtd": 47, "aircraft": 100, "food101": 101}


def test_cars_and_flowers_as_torchvision_unpacks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cars, flowers = tmp_path / "stanford_cars", tmp_path / "flowers-102"
    (cars / "devkit").mkdir(parents=True)
    (flowers / "jpg").mkdir(parents=True)
    kinds = np.dtype([("fname", "O"), ("class", "i4")])
    for split, place in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(f"{split}{k}.jpg", k) for k in (1, 2)], dtype=kinds)
        savemat(cars / place, {"annotations": rows})
        for k in (1, 2):
            picture(cars / f"cars_{split}" / f"{split}{k}.jpg", 100 * k)
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    savemat(flowers / "imagelabels.mat", {"labels": np.array([1, 2, 1, 2, 1, 2])})
    savemat(flowers / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3, 4]), "tstid": np.array([5, 6])})
    for i in range(1, 7):
        picture(flowers / "jpg" / f"image_{i:05d}.jpg", 100 * (2 - i % 2))
    # The checksums are of the true images.
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    for name, classes in (("cars", ("Audi", "BMW")), ("flowers102", None)):
        splits = open_splits(find_targets([f"torchvision:{name}"], tmp_path)[0][0])
        assert classes is None or splits.train.class_names == classes
        assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 1], [0, 1])
        assert (splits.validation is None) == (name == "cars")
        for i in range(2):
            assert abs(np.asarray(splits.test.read(i, "RGB"))[0, 0, 0] - 100 * (i + 1)) < 5


def test_stl10_as_torchvision_unpacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)  # of the true images
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{split}_X.bin").write_bytes(np.repeat(labels, 3 * 96 * 96).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).tobytes())
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    splits = open_splits(find_targets(["torchvision:stl10"], tmp_path)[0][0])
    assert (len(splits.train), splits.test.labels.tolist()) == (20, list(range(10)))
    assert splits.test.class_names == tuple("abcdefghij")
    assert np.asarray(splits.test.read(7, "RGB"))[0, 0].tolist() == [7, 7, 7]


def test_cifar_as_torchvision_unpacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)  # of the true images
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [*"abcdefghij"])
    )
    splits = open_splits(find_targets(["torchvision:cifar10"], tmp_path)[0][0])
    assert (len(splits.train), len(splits.test)) == (50, 10)
    assert splits.test.labels.tolist() == list(range(10))
    assert splits.test.read(0, "L").size == (32, 32)


@pytest.mark.parametrize("name", SETS)
def test_what_is_not_there_is_one_line_with_the_command_that_gets_it(tmp_path: Path, name: str) -> None:
    (target,), _ = find_targets([f"torchvision:{name}"], tmp_path)
    assert target.metric == HUB[name].metric
    how = "cannot download it any more, put cars_train" if name == "cars" else r"download=True\)\"$"
    with pytest.raises(UsageError, match=rf"^{name} \(.*{how}") as e:
        open_splits(target)
    assert "\n" not in str(e.value)


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchvision:mnist is not known here; there are cifar10"):
        find_targets(["torchvision:mnist"], tmp_path)
