"""Vectors that a run reserves for classes to come."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import timm_etf
from tests.pretrain.runs import config, lines
from timm_etf import UsageError, frames
from timm_etf.geometry import ClassMoments, collapse
from timm_etf.pretrain.data import open_task
from timm_etf.pretrain.loop import pretrain


@pytest.mark.parametrize("model", ["test_resnet_etf", "test_resnet"])
def test_reserved_classes_count_nowhere_and_are_exported(images: Path, tmp_path: Path, model: str) -> None:
    # Nothing is learned, so that among many reserved vectors one would win if they counted.
    pretrain(config(images, tmp_path / "run", model=model, reserve=40, lr=1e-30, weight_decay=0.0))
    export = f"local-dir:{tmp_path / 'run' / 'export'}"
    net = timm.create_model(export, pretrained=True).eval()
    assert net.num_classes == 45
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    x, y = zip(*dataset, strict=True)
    labels = torch.tensor(y)
    with torch.no_grad():
        features = torch.cat([net.forward_head(net.forward_features(image[None]), pre_logits=True) for image in x])
        logits = net.get_classifier()(features)
    hits = logits[:, :5].argmax(1) == labels
    assert (logits.argmax(1) >= 5).any()  # or this would test nothing
    weight = net.get_classifier().weight
    expected = collapse(ClassMoments.of(features, labels, 5), weight[:5])
    expected |= {"top1": 100 * hits.float().mean().item(), "top5": 100.0}
    expected["loss"] = torch.nn.functional.cross_entropy(logits[:, :5], labels).item()
    line = lines(tmp_path / "run")[-1]
    assert {k: line[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    found = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert found["label_names"] == [*(f"class{k}" for k in range(5)), *(f"reserved {i}" for i in range(1, 41))]
    if model == "test_resnet":
        return
    net = timm_etf.create_model(export, pretrained=True).eval()
    assert torch.equal(net.fc.weight, frames.simplex(45, 96).float())
    assert (found["etf"]["taken"], net.fc.taken) == (5, 5)
    timm_etf.grow_classifier(net, ["class5"])
    assert net.pretrained_cfg["label_names"][5:8] == ["class5", "reserved 1", "reserved 2"]
    # A run that goes on with the classifier: all that it has are its own classes and those it reserves.
    settings = {"init": export, "keep_classifier": True, "reserve": 40, "lr": 1e-30}
    pretrain(config(images, tmp_path / "more", **settings))
    again = timm_etf.create_model(f"local-dir:{tmp_path / 'more' / 'export'}", pretrained=True)
    assert torch.equal(again.fc.weight, net.fc.weight)
    assert again.fc.taken == 5


def test_a_run_goes_on_with_more_classes_on_the_reserved_vectors(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "old", reserve=3))
    export = f"local-dir:{tmp_path / 'old' / 'export'}"
    # A class that comes first by name, and one of the old ones without further images.
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for split in ("train", "validation"):
        (data / split / "class2").rename(data / split / "aardvark")
    settings = {"init": export, "keep_classifier": True, "reserve": 2}
    pretrain(config(data, tmp_path / "new", **settings))
    found = json.loads((tmp_path / "new" / "export" / "config.json").read_text())
    assert found["label_names"] == [*(f"class{k}" for k in range(5)), "aardvark", "reserved 1", "reserved 2"]
    old, new = (timm_etf.create_model(f"local-dir:{tmp_path / n / 'export'}", pretrained=True) for n in ("old", "new"))
    assert torch.equal(new.fc.weight, old.fc.weight)
    assert (old.fc.taken, new.fc.taken) == (5, 6)
    by_age(images, data, tmp_path / "new", export)
    task = open_task(config(data, tmp_path / "x", **settings), first=[f"class{k}" for k in range(5)])
    for split in (task.train, task.val):
        labels = {Path(path).parent.name: label for path, label in split.reader.samples}
        assert labels == {"class0": 0, "class1": 1, "class3": 3, "class4": 4, "aardvark": 5}
    with pytest.raises(UsageError, match="--keep-classifier needs the same classes: --reserve says"):
        pretrain(config(data, tmp_path / "more", **settings | {"reserve": 3}))


def by_age(images: Path, data: Path, run: Path, export: str) -> None:
    """Old and new classes in the run's log, and the nearest class mean of the features it began with, beside it."""
    names = json.loads((run / "export" / "config.json").read_text())["label_names"]
    first, last = lines(run)
    net = timm.create_model(export, pretrained=True).eval()
    final = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()

    def seen(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = {name: i for i, name in enumerate(names)}
        dataset = timm.data.create_dataset("", root=str(data / split), class_map=numbers)
        dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
        x, y = zip(*dataset, strict=True)
        return torch.stack(x), torch.tensor(y)

    def accuracies(right: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        old, new = (100 * right[part].double().mean().item() for part in (y < 5, y >= 5))
        return {"top1_old": old, "top1_new": new, "harmonic": 2 * old * new / (old + new) if old + new else 0.0}

    (x, y), (x_val, y_val) = seen("train"), seen("validation")
    with torch.no_grad():
        x, features = (net.forward_head(net.forward_features(i), pre_logits=True).double() for i in (x, x_val))
        answers = final(x_val)[:, :6].argmax(1)
    means = torch.stack([x[y == k].mean(0) if k in y else torch.full((x.shape[1],), torch.inf) for k in range(6)])
    nearest = torch.stack([(features - mean).norm(dim=1) for mean in means], 1).argmin(1)
    assert first["nearest_mean"] == pytest.approx(accuracies(nearest == y_val, y_val))
    found = json.loads((run / "results.json").read_text())["source"]
    assert found["nearest_mean"] == first["nearest_mean"]
    expected = accuracies(answers == y_val, y_val)
    for told in (last, found):
        assert {k: told[k] for k in expected} == pytest.approx(expected)
    assert found["before"]["top1_new"] == first["top1_new"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reserve": -1}, r"--reserve must be in \[0, inf\)"),
        ({"hierarchy": Path("x")}, "--hierarchy and --distill say which classes there are: leave out --reserve"),
        ({"distill": "x"}, "--hierarchy and --distill say which classes there are: leave out --reserve"),
        ({"num_classes": 7}, "not --num-classes 7: leave it out .and use --reserve for classes to come"),
    ],
)
def test_what_does_not_go_with_reserving_is_refused(
    images: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **{"reserve": 2} | changes))
