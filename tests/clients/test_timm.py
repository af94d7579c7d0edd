"""timm's scripts, of its repository: they know nothing of the variants, and `timm-etf run` runs them unchanged."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch

from tests import commands
from timm_etf import frames

CLONE = Path(os.environ.get("TIMM_CLONE", ""))
if "TIMM_CLONE" not in os.environ:
    pytest.skip("TIMM_CLONE names no clone of timm's repository", allow_module_level=True)

CLIENT = "timm"
_, SCRIPTS, _ = (CLONE / "timm" / "version.py").read_text().split("'")
VERSION = f"{timm.__version__}, scripts of {SCRIPTS}"


def trained(images: Path, out: Path, *options: object) -> dict[str, dict[str, torch.Tensor]]:
    """Train for an epoch, with decay; what the checkpoint holds."""
    model = ("--model", "test_resnet_etf", "--num-classes", 5, "--img-size", 32, "--device", "cpu")
    training = ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 16, "--lr", 0.1, "--weight-decay", 0.1)
    there = ("--data-dir", images, "--workers", 0, "--output", out, "--experiment", "run")
    commands.run("run", CLONE / "train.py", *model, *training, *there, *options, check=True)
    return torch.load(out / "run" / "last.pth.tar", weights_only=False)


def test_train_and_validate(images: Path, tmp_path: Path) -> None:
    """train.py with `--model-ema` leaves the frame alone; validate.py gives plain timm's top-1"""
    checkpoint = trained(images, tmp_path, "--model-ema", "--model-ema-decay", 0.5)
    fresh = timm.create_model("test_resnet_etf", num_classes=5)
    for key in ("state_dict", "state_dict_ema"):
        assert checkpoint[key].keys() == timm.create_model("test_resnet", num_classes=5).state_dict().keys()
        assert torch.equal(checkpoint[key]["fc.weight"], fresh.fc.weight)
        assert not checkpoint[key]["fc.bias"].any()
    assert len(checkpoint["optimizer"]["state"]) == len(list(fresh.parameters()))
    top1 = []
    for name in ("test_resnet", "test_resnet_etf"):
        model = ("--model", name, "--num-classes", 5, "--img-size", 32, "--device", "cpu", "--workers", 0)
        weights = ("--checkpoint", tmp_path / "run" / "last.pth.tar", "--data-dir", images)
        done = commands.run("run", CLONE / "validate.py", *model, *weights, check=True)
        top1 += re.findall(r'"top1": ([\d.]+)', done.stdout)
    assert len(top1) == 2
    assert top1[0] == top1[1]


def test_torchscript(images: Path, tmp_path: Path) -> None:
    """train.py with `--torchscript` writes a checkpoint that the plain architecture and the variant load"""
    weights = trained(images, tmp_path, "--torchscript")["state_dict"]
    for name in ("test_resnet", "test_resnet_etf"):
        net = timm.create_model(name, num_classes=5)
        net.load_state_dict(weights)
        assert frames.is_simplex(net.fc.weight)


def test_head_init_bias(images: Path, tmp_path: Path) -> None:
    """train.py with `--head-init-bias -2` gives a checkpoint that the variant refuses, because of that bias"""
    weights = trained(images, tmp_path, "--head-init-bias", -2)["state_dict"]
    with pytest.raises(RuntimeError, match=r"fc\.bias is not zero"):
        timm.create_model("test_resnet_etf", num_classes=5).load_state_dict(weights)
