import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_etf
from tests import commands
from tests.pretrain.runs import arguments, assert_same, config, lines, wait_for_checkpoint, weights
from timm_etf import FixedClassifier, UsageError, frames
from timm_etf.geometry import ClassMoments, collapse
from timm_etf.pretrain.loop import pretrain


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    commands.run(*arguments(images, out), check=True)
    return out


def test_a_run_learns_and_leaves_what_it_promises(straight: Path) -> None:
    log = lines(straight)
    assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["top1"] > 60  # five classes: 20 % is chance
    assert all(record["count"] == 37 for record in log)
    promised = {"run.json", "config.yaml", "log.jsonl", "curves.png", "checkpoints", "results.json", "export"}
    assert {p.name for p in straight.iterdir()} == promised
    run = json.loads((straight / "run.json").read_text())
    assert run["fixed_classifiers"] == ["fc"]
    assert run["settings"]["architecture"] == "test_resnet_etf"
    net = timm_etf.create_model(f"local-dir:{straight / 'export'}", pretrained=True)
    assert isinstance(net.fc, FixedClassifier)
    assert torch.equal(net.fc.weight, frames.simplex(5, 96).float())
    results = json.loads((straight / "results.json").read_text())
    assert results["source"]["top1"] == log[-1]["top1"]


def validate_by_hand(run: Path, images: Path) -> dict[str, float]:
    """Accuracy in percent and the geometry of the features, one image at a time, with plain timm's model."""
    net = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    x, y = zip(*dataset, strict=True)
    with torch.no_grad():
        features = torch.cat([net.forward_head(net.forward_features(image[None]), pre_logits=True) for image in x])
        hits = (net.get_classifier()(features).argmax(1) == torch.tensor(y)).float()
    geometry = collapse(ClassMoments.of(features, torch.tensor(y)), net.get_classifier().weight)
    return {"top1": 100 * hits.mean().item(), **geometry}


def test_accuracy_and_geometry_are_those_of_the_exported_model_in_plain_timm(straight: Path, images: Path) -> None:
    expected = validate_by_hand(straight, images)
    assert {k: lines(straight)[-1][k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_the_straight_run(
    images: Path, straight: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    out = tmp_path / "run"
    command = commands.Command(*arguments(images, out, "--workers", 2))
    wait_for_checkpoint(out, command)
    # The loader's processes receive it too, as they do from a terminal or a scheduler.
    command.send_signal_to_group(signum)
    assert command.wait(timeout=60) == 128 + signum
    assert "The same command with --resume continues from it." in command.stderr
    _assert_gone(command.pid)
    assert not (out / "export").exists()
    assert not list((out / "checkpoints").glob("epoch-0006*"))
    commands.run(*arguments(images, out, "--resume"), check=True)
    assert_same(out, straight)


def _assert_gone(group: int) -> None:
    """No process of the group runs after 15 seconds; one that has ended may still wait for its parent to notice."""
    deadline = time.monotonic() + 15
    while left := _running(group):
        assert time.monotonic() < deadline, f"processes of the command are left: {left}"
        time.sleep(0.1)


def _running(group: int) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = file.read_text().rpartition(") ")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if of_group == str(group) and state != "Z":
            found.append(f"{file.parent.name} ({state})")
    return found


def test_killed_leaves_nothing_half_written_and_resumes(images: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = commands.Command(*arguments(images, out))
    wait_for_checkpoint(out, command)
    command.kill()
    json.loads((out / "run.json").read_text())
    whole = [p for p in (out / "checkpoints").iterdir() if p.name.startswith("epoch-")]
    assert whole
    for checkpoint in whole:
        assert load_file(checkpoint / "model.safetensors")
        json.loads((checkpoint / "position.json").read_text())
    # What a kill in the middle of a save leaves: it is ignored and cleaned away.
    (out / "checkpoints" / ".unfinished-epoch-0009-step-000000").mkdir(exist_ok=True)
    commands.run(*arguments(images, out, "--resume"), check=True)
    assert [r["epoch"] for r in lines(out)] == [1, 2, 3, 4, 5, 6]
    assert_same(out, straight)
    assert not list(out.rglob(".unfinished*"))


def test_a_write_that_fails_is_one_line_and_loses_nothing(images: Path, tmp_path: Path) -> None:
    # Room for the log and the weights of the first checkpoint, not for its optimizer state: as on a full disk.
    out = tmp_path / "run"
    size = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=5).parameters()) * 4
    shorter = ("--epochs", 2, "--warmup-epochs", 0)
    done = commands.run(*arguments(images, out, *shorter), largest_file=int(1.5 * size))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Cannot write (")
    assert "Traceback" not in done.stderr
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith("epoch-")]
    commands.run(*arguments(images, out, *shorter, "--resume"), check=True)
    assert [r["epoch"] for r in lines(out)] == [1, 2]


def test_resume_of_another_run_is_refused(images: Path, straight: Path) -> None:
    settings = {"epochs": 6, "warmup_epochs": 1, "batch_size": 8, "opt": "adamw", "lr": 0.003, "resume": True}
    settings |= {"model_kwargs": ("drop_rate=0.2",), "scale": (0.8, 1.0), "hflip": 0.0}
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
    for changes, says in (
        ({"model": "test_resnet"}, "architecture 'test_resnet_etf', now it is 'test_resnet'"),
        ({"seed": 1}, "frame_seed 0, now it is 1"),
        ({"batch_size": 4}, "batch_size 8, now it is 4"),
    ):
        with pytest.raises(UsageError, match=f"Cannot resume .*: it was started with {says}"):
            pretrain(config(images, straight, **settings | changes))
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*")} == before


def test_a_run_stopped_before_its_validation_has_no_rate_for_that_epoch(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run", epochs=2))
    (line, last) = lines(tmp_path / "run")
    del last["images_per_second"]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (line, last)))
    found = pretrain(config(images, tmp_path / "run", epochs=2, resume=True))
    assert found["source"]["train_seconds"] == pytest.approx(2 * 112 / line["images_per_second"], abs=0.1)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run"))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match=r"Cannot read the checkpoint .*: restore it, or start again"):
        pretrain(config(images, tmp_path / "run", resume=True))


def test_both_heads_start_from_the_same_backbone(images: Path, tmp_path: Path) -> None:
    # With a learning rate near zero the runs end where they started.
    for name, model in (("fixed", "test_resnet_etf"), ("free", "test_resnet")):
        pretrain(config(images, tmp_path / name, model=model, lr=1e-30, weight_decay=0.0, seed=3))
    ours, theirs = weights(tmp_path / "fixed"), weights(tmp_path / "free")
    assert ours.keys() == theirs.keys()
    differ = {k for k in ours if not torch.allclose(ours[k], theirs[k], atol=1e-20, rtol=0)}
    assert differ == {"fc.weight", "fc.bias"}
    # The frame varies with the seed, unless it has one of its own.
    assert torch.equal(ours["fc.weight"], frames.simplex(5, 96, seed=3).float())
    assert json.loads((tmp_path / "fixed" / "run.json").read_text())["settings"]["frame_seed"] == 3
    pretrain(config(images, tmp_path / "own", lr=1e-30, weight_decay=0.0, seed=3, frame_seed=4))
    assert torch.equal(weights(tmp_path / "own")["fc.weight"], frames.simplex(5, 96, seed=4).float())


@pytest.mark.parametrize("kind", ["hfds-folder", "hfds-parquet", "hfids-parquet", "wds"])
def test_timms_other_readers(images: Path, shards: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"data_dir": None}
    if kind == "hfds-folder":
        changes["dataset"] = f"hfds/{images}"
    elif kind == "wds":
        changes |= {"dataset": "wds/x", "data_dir": shards, "num_classes": 5}
        changes |= {"train_split": "train-{0000..0001}.tar|122", "val_split": "validation-0000.tar|37"}
    else:
        changes["dataset"] = f"{kind.partition('-')[0]}/{_parquet(images, tmp_path / 'parquet')}"
        if kind.startswith("hfids"):  # a stream that does not know its length
            changes |= {"train_split": "train|122", "val_split": "validation|37", "num_classes": 5}
    results = pretrain(config(images, tmp_path / "run", **changes))
    assert results["source"]["count"] == 37


def _parquet(images: Path, root: Path) -> Path:
    import datasets

    (root / "data").mkdir(parents=True)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(images), cache_dir=str(root / "cache"))
    for split, data in loaded.items():
        data.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return root
