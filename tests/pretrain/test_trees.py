"""Runs under a classifier that follows a tree of the classes."""

import json
from pathlib import Path

import pytest
import torch

import timm_etf
from tests.pretrain.runs import config
from timm_etf import UsageError
from timm_etf.frames import ClassTree
from timm_etf.pretrain.loop import pretrain


def test_a_run_follows_a_tree_and_keeps_it(images: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"class0": "a", "class1": "a", "class2": "b", "class3": "b", "class4": None}))
    settings = {"hierarchy": tree, "hierarchy_gamma": 1.5, "frame_seed": 4}
    pretrain(config(images, tmp_path / "run", **settings))
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    expected = ClassTree(("a/class0", "a/class1", "b/class2", "b/class3", "class4"), 1.5)
    assert net.fc.tree == expected
    assert torch.equal(net.fc.weight, expected.frame(96, seed=4).float())
    # A tree that says the same elsewhere is the same run's, another one is not.
    moved = tree.rename(tmp_path / "moved.json")
    pretrain(config(images, tmp_path / "run", **settings | {"hierarchy": moved}, resume=True))
    moved.write_text(moved.read_text().replace('"b"', '"c"'))
    with pytest.raises(UsageError, match="it was started with hierarchy"):
        pretrain(config(images, tmp_path / "run", **settings | {"hierarchy": moved}, resume=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "test_resnet"}, "--hierarchy makes a fixed classifier: use --model test_resnet_etf"),
        ({"model_kwargs": ("frame=simplex",)}, "--hierarchy says which frame: leave out"),
        ({"keep_classifier": True, "init": "x"}, "--hierarchy says which frame: leave out --keep-classifier"),
        ({"hierarchy_gamma": 0.0}, r"--hierarchy-gamma must be in \(0, inf\)"),
        ({"hierarchy": Path("nowhere")}, "Cannot read the class tree nowhere"),
        ({"hierarchy": Path(__file__).parent}, "lacks 5 of 5 classes"),
    ],
)
def test_a_tree_that_cannot_be_followed_is_refused(
    images: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **{"hierarchy": images / "train"} | changes))
    assert not (tmp_path / "run").exists()


def test_a_tree_needs_names(shards: Path, tmp_path: Path) -> None:
    splits = {"train_split": "train-{0000..0001}.tar|122", "val_split": "validation-0000.tar|37"}
    wds = {"dataset": "wds/x", "num_classes": 5, **splits}
    with pytest.raises(UsageError, match="--hierarchy needs the names of the classes"):
        pretrain(config(shards, tmp_path / "run", hierarchy=shards, **wds))
