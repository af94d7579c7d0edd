"""Runs that start from weights that are there."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_etf
from tests.pretrain.runs import config, weights
from timm_etf import UsageError, frames, hub
from timm_etf.pretrain.loop import pretrain


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with a classifier of 1,000 classes."""
    torch.manual_seed(5)
    return hub.export(timm.create_model("test_resnet"), tmp_path_factory.mktemp("ready") / "export")


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("model", ["test_resnet_etf", "test_resnet"])
def test_the_backbone_is_that_of_the_weights_and_the_classifier_is_not(
    images: Path, ready: Path, tmp_path: Path, kind: str, model: str
) -> None:
    init = f"local-dir:{ready}" if kind == "folder" else str(ready / "model.safetensors")
    pretrain(config(images, tmp_path / "run", model=model, init=init, lr=1e-30, weight_decay=0.0))
    ours, theirs = weights(tmp_path / "run"), load_file(ready / "model.safetensors")
    moved = {k for k in ours if ours[k].shape != theirs[k].shape or not torch.allclose(ours[k], theirs[k], atol=1e-6)}
    assert {k for k in moved if "running" not in k and "num_batches" not in k} == {"fc.weight", "fc.bias"}
    if model == "test_resnet_etf":
        assert torch.equal(ours["fc.weight"], frames.simplex(5, 96).float())
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert recipe["init"] == init


def test_weights_that_are_published_are_found_by_name(images: Path, tmp_path: Path) -> None:
    # These lie in the package: a name of timm's registry that needs no network.
    model = "resnet10t_etf"
    settings = {"model": model, "init": "resnet10t_etf.icons400", "lr": 1e-30, "weight_decay": 0.0}
    source = timm_etf.create_model("resnet10t_etf.icons400", pretrained=True)
    pretrain(config(images, tmp_path / "run", **settings))
    ours = weights(tmp_path / "run")
    assert torch.allclose(ours["conv1.0.weight"], source.state_dict()["conv1.0.weight"], atol=1e-6)


def test_a_resumed_run_does_not_start_again(images: Path, ready: Path, tmp_path: Path) -> None:
    init = f"local-dir:{ready}"
    settings = {"init": init, "epochs": 2}
    pretrain(config(images, tmp_path / "straight", **settings))
    pretrain(config(images, tmp_path / "run", **settings))
    (newest,) = (tmp_path / "run" / "checkpoints").glob("epoch-0002*")
    newest.rename(tmp_path / "away")
    pretrain(config(images, tmp_path / "run", **settings, resume=True))
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_colour_backbone_serves_grey_images(images: Path, ready: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run", init=f"local-dir:{ready}", in_chans=1, lr=1e-30))
    colour = load_file(ready / "model.safetensors")["conv1.0.weight"]
    grey = colour.sum(1, keepdim=True)  # timm's rule: a grey image as three equal channels
    assert torch.allclose(weights(tmp_path / "run")["conv1.0.weight"], grey, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init": "no_such_model"}, r"Cannot start from no_such_model \(.*\): check its name"),
        ({"init": "local-dir:nowhere"}, r"Cannot start from local-dir:nowhere \(.*\): check its name"),
        ({"init": "x", "pretrained": True}, "--pretrained and --init both name weights"),
    ],
)
def test_what_cannot_be_started_from(images: Path, tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_or_damaged_ones(images: Path, ready: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"do not fit: .* needs the same architecture"):
        pretrain(config(images, tmp_path / "run", model="resnet10t_etf", init=f"local-dir:{ready}"))
    with pytest.raises(UsageError, match=r"Cannot start from .*'img_size'"):
        pretrain(config(images, tmp_path / "run", model="test_vit_etf", img_size=160, init=f"local-dir:{ready}"))
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes((ready / "model.safetensors").read_bytes()[:999])
    with pytest.raises(UsageError, match="Cannot start from"):
        pretrain(config(images, tmp_path / "run", init=str(broken)))
    save_file({"fc.weight": torch.zeros(5, 96)}, broken)
    with pytest.raises(UsageError, match="do not fit"):
        pretrain(config(images, tmp_path / "run", init=str(broken)))
    assert not (tmp_path / "run").exists()
