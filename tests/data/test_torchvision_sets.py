"""torchvision's data sets on disk, as their archives unpack."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from timm_etf import UsageError
from timm_etf.data.catalogue import HUB
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
    with pytest.raises(UsageError, match=rf"^{name} \(.*download=True\)\"$") as e:
        open_splits(target)
    assert "\n" not in str(e.value)


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchvision:mnist is not known here; there are cifar10"):
        find_targets(["torchvision:mnist"], tmp_path)
