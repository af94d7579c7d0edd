import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests import commands
from timm_etf import UsageError
from timm_etf.data.images import Splits
from timm_etf.features.extract import Layers, layer_names
from timm_etf.transfer import Target, extract, features_of, load, open_splits


@pytest.fixture
def splits(images: Path) -> Splits:
    return open_splits(Target("bars", str(images), test="validation"))


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["timm_etf.features.extract"], "CHUNK", 16)


def test_they_are_what_the_classifier_receives(splits: Splits, net: torch.nn.Module, images: Path) -> None:
    got = features_of(net, splits.test, workers=0, batch_size=8)
    assert got.x.shape == (37, 96)
    assert got.x.dtype == np.float32
    assert np.bincount(got.y).tolist() == [7, 8, 7, 8, 7]
    assert got.class_names == tuple(f"class{k}" for k in range(5))
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    received = []
    net.fc.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    with torch.no_grad():
        net.eval()(dataset[20][0][None])
    np.testing.assert_allclose(received[0][0].numpy(), got.x[20], atol=1e-5)


def test_they_are_computed_once_and_a_stopped_extraction_continues(
    splits: Splits, net: torch.nn.Module, tmp_path: Path
) -> None:
    folder = extract(net, splits.train, tmp_path, workers=0)
    whole, files = load(folder), sorted(folder.glob("*.safetensors"))
    assert len(files) == 8  # 122 images
    times = [f.stat().st_mtime_ns for f in files]
    assert extract(net, splits.train, tmp_path, workers=0) == folder
    assert [f.stat().st_mtime_ns for f in files] == times
    (folder / "features.json").unlink()
    files[3].unlink()
    (folder / ".48.tmp").write_bytes(b"half")
    extract(net, splits.train, tmp_path, workers=0)
    assert [f.stat().st_mtime_ns for f in files[:3]] == times[:3]
    np.testing.assert_array_equal(load(folder).x, whole.x)


def test_other_weights_images_transforms_or_layers_are_other_features(
    splits: Splits, net: torch.nn.Module, tmp_path: Path
) -> None:
    def folder(**kwargs: object) -> Path:
        return extract(net, splits.test, tmp_path, workers=0, **kwargs)

    first = folder()
    assert folder(precision="bf16") != first
    assert folder(layers=Layers(2)) != first
    net.pretrained_cfg["mean"] = (0.1, 0.1, 0.1)
    changed = {first, folder()}
    with torch.no_grad():
        net.bn1.running_mean += 1
    changed.add(folder())
    image = Path(splits.test.source[0])
    before = image.stat().st_mtime
    os.utime(image, (before + 5, before + 5))
    again = open_splits(splits.target).test
    os.utime(image, (before, before))
    changed.add(extract(net, again, tmp_path, workers=0))
    assert len(changed) == 4


def test_several_depths(splits: Splits, net: torch.nn.Module, tmp_path: Path) -> None:
    folder = extract(net, splits.test, tmp_path, layers=Layers(3), workers=0)
    names = layer_names(folder)
    assert names[-1] == "pre_logits"
    assert len(names) == 4
    np.testing.assert_array_equal(load(folder).x, features_of(net, splits.test, workers=0).x)
    maps = net.forward_intermediates(torch.zeros(1, 3, 160, 160), intermediates_only=True)
    assert load(folder, names[0]).x.shape == (37, maps[0].shape[1])
    # timm's last map of a ResNet, pooled, is what the head pools.
    np.testing.assert_allclose(load(folder, names[2]).x, load(folder).x, atol=1e-5)
    vit = timm.create_model("test_vit", num_classes=0)
    folder = extract(vit, splits.test, tmp_path, layers=Layers(2), workers=0)
    assert load(folder, layer_names(folder)[0]).x.shape == (37, 64)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_stored_as_float32(splits: Splits, net: torch.nn.Module, precision: str) -> None:
    exact, got = (features_of(net, splits.test, workers=0, precision=p).x for p in ("fp32", precision))
    assert got.dtype == np.float32
    assert 0 < np.abs(got - exact).max() < 0.05 * np.abs(exact).max()


def test_grey_cmyk_and_broken_images(tmp_path: Path, net: torch.nn.Module) -> None:
    for k in range(2):
        folder = tmp_path / "train" / str(k)
        folder.mkdir(parents=True)
        pixels = np.full((40, 40, 3), 100 * k, np.uint8)
        for mode in ("RGB", "L", "CMYK", "RGBA", "P", "I;16"):
            image = Image.new("I;16", (40, 40)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
            image.save(folder / f"{mode[0] + mode[-1]}.{'jpg' if mode == 'CMYK' else 'png'}")
    whole = (tmp_path / "train" / "0" / "RB.png").read_bytes()
    (tmp_path / "train" / "0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "1" / "text.png").write_text("not an image")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    got = features_of(net, open_splits(Target("odd", str(tmp_path))).train, workers=0)
    assert len(got.x) == 12
    assert [Path(u.split(" (")[0]).name for u in got.unreadable] == ["cut.png", "text.png"]
    assert np.bincount(got.y).tolist() == [6, 6]


def test_damaged_weights_leave_nothing_behind(splits: Splits, net: torch.nn.Module, tmp_path: Path) -> None:
    torch.nn.init.constant_(net.conv1[0].weight, float("nan"))
    with pytest.raises(UsageError, match=r"37 of 37 images of bars \(validation\) have features that are not finite"):
        extract(net, splits.test, tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_nothing_readable(tmp_path: Path, net: torch.nn.Module) -> None:
    for k in range(2):
        (tmp_path / "train" / str(k)).mkdir(parents=True)
        (tmp_path / "train" / str(k) / "a.png").write_text("no")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(UsageError, match="None of the 2 images"):
        features_of(net, open_splits(Target("odd", str(tmp_path))).train, workers=0)


TWO = """
import sys, torch, timm
from pathlib import Path
import timm_etf.features.extract
from timm_etf.transfer import Target, extract, open_splits
timm_etf.features.extract.CHUNK = 16
state = timm_etf.features.extract.processes()
torch.manual_seed(0)
net = timm.create_model("test_resnet", num_classes=10)
split = open_splits(Target("bars", sys.argv[1], test="validation")).train
mine = []
read = type(split).read
type(split).read = lambda self, i, mode: (mine.append(i), read(self, i, mode))[1]
folder = extract(net, split, Path(sys.argv[2]), workers=0)
(Path(sys.argv[2]) / f"seen{state.process_index}.txt").write_text(f"{folder.name} {mine}")
"""


def test_two_processes_read_each_image_once_and_find_the_same(
    splits: Splits, net: torch.nn.Module, images: Path, tmp_path: Path
) -> None:
    import ast

    alone, shared = extract(net, splits.train, tmp_path / "alone", workers=0), tmp_path / "shared"
    shared.mkdir()
    commands.run_ranks(2, images, shared, code=TWO)
    seen = [(shared / f"seen{r}.txt").read_text().split(" ", 1) for r in range(2)]
    assert {name for name, _ in seen} == {alone.name}
    parts = [ast.literal_eval(text) for _, text in seen]
    assert min(map(len, parts)) > 40
    assert sorted(parts[0] + parts[1]) == list(range(122))
    for part in sorted(alone.glob("*.safetensors")):
        assert part.read_bytes() == (shared / alone.name / part.name).read_bytes()
    assert json.loads((alone / "features.json").read_text()) == json.loads(
        (shared / alone.name / "features.json").read_text()
    )
