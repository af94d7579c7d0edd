"""What accelerate brings: precision, compilation, trackers."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import timm_etf
from tests import commands
from tests.pretrain.runs import arguments, config, lines, weights
from timm_etf.pretrain.loop import pretrain

SHORT = ("--epochs", 2, "--warmup-epochs", 0)


def test_bfloat16(images: Path, tmp_path: Path) -> None:
    for amp in ("no", "bf16"):
        commands.run(*arguments(images, tmp_path / amp, *SHORT, "--amp", amp), check=True)
    exact, rounded = lines(tmp_path / "no"), lines(tmp_path / "bf16")
    assert exact[0]["train_loss"] != rounded[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.05)
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights(tmp_path / "bf16").values())


@pytest.mark.slow
def test_compilation_that_the_launcher_asks_for(images: Path, tmp_path: Path) -> None:
    # With a term that looks into the model, and a resume after the last epoch.
    command = arguments(images, tmp_path / "run", *SHORT, "--feature-entropy", 0.1)
    env = {"ACCELERATE_DYNAMO_BACKEND": "eager"}
    commands.run(*command, env=env, check=True)
    shutil.rmtree(tmp_path / "run" / "export")
    commands.run(*command, "--resume", env=env, check=True)
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert net.fc.frame == "simplex"
    commands.run(*arguments(images, tmp_path / "plain", *SHORT, "--feature-entropy", 0.1), check=True)
    ours, theirs = lines(tmp_path / "run"), lines(tmp_path / "plain")
    assert [x["train_loss"] for x in ours] == pytest.approx([x["train_loss"] for x in theirs], rel=1e-3)


def test_a_tracker_receives_every_epoch(images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    commands.run(*arguments(images, tmp_path / "run", *SHORT, "--tracker", "tensorboard"), check=True)
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    events = EventAccumulator(str(file)).Reload()
    assert [e.step for e in events.Scalars("top1")] == [1, 2]
    assert [e.value for e in events.Scalars("top1")] == pytest.approx([x["top1"] for x in lines(tmp_path / "run")])


def test_a_tracker_that_fails_costs_no_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(self: Accelerator, *args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Accelerator, "log", lost)  # accelerate's trackers reach the network from there
    pretrain(config(images, tmp_path / "run", epochs=2, tracker="tensorboard"))
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]
    assert capsys.readouterr().err.count("the tracker missed epoch") == 2
