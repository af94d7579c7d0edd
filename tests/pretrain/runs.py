"""Small runs for the tests of pretraining, and what they leave."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import commands
from timm_etf.pretrain.config import PretrainConfig


def config(images: Path, out: Path, **changes: Any) -> PretrainConfig:
    """One epoch on the test images."""
    settings: dict[str, Any] = {
        "model": "test_resnet_etf",
        "data_dir": images,
        "out": out,
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 16,
        "img_size": 32,
        "workers": 0,
    }
    return PretrainConfig(**settings | changes)


def arguments(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    """A command that learns the test images in six epochs, with something random in every part of it."""
    fixed = (
        "--epochs 6 --warmup-epochs 1 --batch-size 8 --img-size 32 --workers 0 --opt adamw --lr 0.003 "
        "--scale 0.8 1 --hflip 0 --model-kwargs drop_rate=0.2"
    ).split()
    return ("pretrain", "--model", "test_resnet_etf", "--data-dir", data, "--out", out, *fixed, *more)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    # Not only the weights: the losses too, which are a mean over steps before and after an interruption.
    assert [r["train_loss"] for r in lines(run)] == [r["train_loss"] for r in lines(other)]


def wait_for_checkpoint(out: Path, command: commands.Command) -> None:
    deadline = time.monotonic() + 90
    while not list((out / "checkpoints").glob("epoch-*")):
        assert command.poll() is None, f"the run ended before its first checkpoint\n{command.stderr}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
