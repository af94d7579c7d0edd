"""When checkpoints are written, which are kept, and what a resume does with damaged ones."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import commands
from tests.pretrain.runs import arguments, assert_same, config, lines, wait_for_checkpoint, weights
from timm_etf.pretrain.loop import pretrain

EVERYTHING = ("--grad-accum-steps", 2, "--model-ema", "--model-ema-decay", 0.9, "--mixup", 0.2, "--reprob", 0.3)
EVERYTHING += ("--clip-grad", 1.0, "--drop-path", 0.1, "--layer-decay", 0.9, "--checkpoint-steps", 3)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that has a state of its own, never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    commands.run(*arguments(images, out, *EVERYTHING, "--checkpoint-hist", 100), check=True)
    return out


def test_checkpoints_come_every_so_many_steps_and_after_each_epoch(straight: Path) -> None:
    # 122 images are 15 batches of 8, and 8 steps of two, the last of one.
    inside = [f"epoch-{epoch:04d}-step-{step:06d}" for epoch in range(6) for step in (3, 6)]
    assert names(straight) == sorted([*inside, *(f"epoch-{epoch:04d}-step-000000" for epoch in range(1, 7))])


def test_a_run_goes_on_from_each_of_its_checkpoints(images: Path, straight: Path, tmp_path: Path) -> None:
    for name in ("epoch-0000-step-000003", "epoch-0005-step-000006"):
        out = tmp_path / name
        shutil.copytree(straight, out)
        for other in names(out):
            if other > name:
                shutil.rmtree(out / "checkpoints" / other)
        shutil.rmtree(out / "export")
        commands.run(*arguments(images, out, *EVERYTHING, "--resume", "--workers", 2), check=True)
        assert_same(out, straight)


def test_a_truncated_checkpoint_is_told_and_the_one_before_is_used(
    images: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    newest = out / "checkpoints" / names(out)[-1]
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "position.json"):
        content = (newest / file).read_bytes()
        (newest / file).write_bytes(content[: len(content) // 2])
        shutil.rmtree(out / "export")
        done = commands.run(*arguments(images, out, *EVERYTHING, "--resume"), check=True)
        said = f"warning: Cannot read the checkpoint {newest} ("
        assert [line for line in done.stderr.splitlines() if said in line and "going back to the one before" in line]
        assert_same(out, straight)
        assert load_file(newest / "model.safetensors")  # and the run has written it again


def test_the_newest_and_the_best_are_kept(images: Path, tmp_path: Path) -> None:
    # The last epochs ruin what the first have learned.
    settings = {"epochs": 5, "lr": 0.05, "sched": "none", "checkpoint_hist": 2, "checkpoint_steps": 5}
    pretrain(config(images, tmp_path / "run", **settings))
    top1 = [line["top1"] for line in lines(tmp_path / "run")]
    best = 1 + top1.index(max(top1))
    newest = ["epoch-0004-step-000005", "epoch-0005-step-000000"]
    assert names(tmp_path / "run") == sorted({f"epoch-{best:04d}-step-000000", *newest})


def test_the_best_epoch_can_be_exported(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4, "lr": 0.05, "sched": "none"}
    last = pretrain(config(images, tmp_path / "run", **settings))
    top1 = [line["top1"] for line in lines(tmp_path / "run")]
    last_weights = weights(tmp_path / "run")
    best = pretrain(config(images, tmp_path / "run", **settings, export="best", resume=True))
    assert last["source"]["top1"] == top1[-1]
    assert best["source"]["top1"] == pytest.approx(max(top1))
    assert f"epoch-{1 + top1.index(max(top1)):04d}" in best["source"]["exported"]
    checkpoint = tmp_path / "run" / "checkpoints" / f"epoch-{1 + top1.index(max(top1)):04d}-step-000000"
    exported, saved = weights(tmp_path / "run"), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(exported[k], saved[k]) for k in exported)
    assert top1[-1] == max(top1) or any(not torch.equal(exported[k], last_weights[k]) for k in exported)


def test_minutes_between_checkpoints(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run", checkpoint_minutes=1e-6, checkpoint_hist=100))
    assert names(tmp_path / "run") == [*(f"epoch-0000-step-{s:06d}" for s in range(1, 7)), "epoch-0001-step-000000"]


def test_a_schedulers_warning_before_the_first_step_asks_the_same(images: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from timm_etf import cli
from timm_etf.pretrain import data

opened = data.open_task

def warned(*arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    return opened(*arguments)

data.open_task = warned
cli.main()
"""
    done = commands.run(*arguments(images, tmp_path / "run"), code=code)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        75,
        "Stopped before the first step; the same command starts again.",
    )
    assert not (tmp_path / "run").exists()


def test_a_schedulers_warning_saves_and_asks_to_be_queued_again(images: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = commands.Command(*arguments(images, out, *EVERYTHING, "--workers", 2))
    wait_for_checkpoint(out, command)
    command.send_signal_to_group(signal.SIGUSR1)
    assert command.wait() == 75
    assert "The same command with --resume continues from it." in command.stderr
    commands.run(*arguments(images, out, *EVERYTHING, "--resume"), check=True)
    assert_same(out, straight)


@pytest.mark.slow
def test_two_processes_agree_on_when_to_save(images: Path, tmp_path: Path) -> None:
    # One clock has struck; the other process would not save by itself.
    more = [("--checkpoint-minutes", 1e-6), ("--checkpoint-minutes", 60)]
    ranks = commands.start_ranks(
        2, *arguments(images, tmp_path / "run", "--epochs", 2, "--batch-size", 4, "--checkpoint-hist", 100), more=more
    )
    for command in ranks:
        assert command.wait() == 0, command.stderr
    saved = names(tmp_path / "run")
    assert "epoch-0000-step-000010" in saved
    position = json.loads((tmp_path / "run" / "checkpoints" / saved[0] / "position.json").read_text())
    assert position["step"] == 10
