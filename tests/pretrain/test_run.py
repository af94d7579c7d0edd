import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_etf
from tests.pretrain.test_errors import config
from timm_etf import FixedClassifier, UsageError, frames
from timm_etf.geometry import ClassMoments, collapse
from timm_etf.pretrain.loop import pretrain

ARGUMENTS = (
    "--epochs 6 --warmup-epochs 1 --batch-size 8 --img-size 32 --workers 0 --opt adamw --lr 0.003 "
    "--scale 0.8 1 --hflip 0 --model-kwargs drop_rate=0.2"
).split()


def command(images: Path, out: Path, *more: str) -> list[str]:
    verb = [sys.executable, "-m", "timm_etf.pretrain", "--model", "test_resnet_etf"]
    return [*verb, "--data-dir", str(images), "--out", str(out), *ARGUMENTS, *more]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    subprocess.run(command(images, out), check=True, capture_output=True, timeout=120)
    return out


def test_a_run_learns_and_leaves_what_it_promises(straight: Path) -> None:
    log = lines(straight)
    assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["top1"] > 60  # five classes: 20 % is chance
    assert all(record["count"] == 37 for record in log)
    assert {p.name for p in straight.iterdir()} == {"run.json", "log.jsonl", "checkpoints", "results.json", "export"}
    run = json.loads((straight / "run.json").read_text())
    assert run["fixed_classifiers"] == ["fc"]
    assert run["settings"]["architecture"] == "test_resnet_etf"
    net = timm_etf.create_model(f"local-dir:{straight / 'export'}", pretrained=True)
    assert isinstance(net.fc, FixedClassifier)
    assert torch.equal(net.fc.weight, frames.simplex(5, 96).float())
    results = json.loads((straight / "results.json").read_text())
    assert results["source"]["top1"] == log[-1]["top1"]


def _validate_by_hand(run: Path, images: Path) -> dict[str, float]:
    """Accuracy in percent and the geometry of the features, one image at a time, with plain timm's model."""
    net = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    x, y = zip(*dataset, strict=True)
    with torch.no_grad():
        features = torch.cat([net.forward_head(net.forward_features(image[None]), pre_logits=True) for image in x])
        hits = (net.fc(features).argmax(1) == torch.tensor(y)).float()
    geometry = collapse(ClassMoments.of(features, torch.tensor(y)), net.fc.weight)
    return {"top1": 100 * hits.mean().item(), **geometry}


def test_accuracy_and_geometry_are_those_of_the_exported_model_in_plain_timm(straight: Path, images: Path) -> None:
    expected = _validate_by_hand(straight, images)
    assert {k: lines(straight)[-1][k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGTERM, "0"), (signal.SIGINT, "2")])
def test_interrupted_and_resumed_is_the_straight_run(
    images: Path, straight: Path, tmp_path: Path, signum: signal.Signals, workers: str
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(images, out, "--workers", workers), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _wait_for_checkpoint(out, process)
    os.killpg(process.pid, signum)  # the loader's processes receive it too, as they do from a terminal
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "The same command with --resume continues from it." in stderr
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert not (out / "export").exists()
    assert not checkpoint.name.startswith("epoch-0006")
    subprocess.run(command(images, out, "--resume"), check=True, capture_output=True, timeout=120)
    ours, theirs = weights(out), weights(straight)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    # Not only the weights: the losses too, which are a mean over steps before and after the interruption.
    assert [r["train_loss"] for r in lines(out)] == [r["train_loss"] for r in lines(straight)]


def test_killed_leaves_nothing_half_written_and_resumes(images: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(images, out), stderr=subprocess.DEVNULL)
    _wait_for_checkpoint(out, process)
    process.kill()
    process.wait()
    json.loads((out / "run.json").read_text())
    whole = [p for p in (out / "checkpoints").iterdir() if p.name.startswith("epoch-")]
    assert whole
    for checkpoint in whole:
        assert load_file(checkpoint / "model.safetensors")
        json.loads((checkpoint / "position.json").read_text())
    # What a kill in the middle of a save leaves: it is ignored and cleaned away.
    (out / "checkpoints" / ".unfinished-epoch-0009-step-000000").mkdir(exist_ok=True)
    subprocess.run(command(images, out, "--resume"), check=True, capture_output=True, timeout=120)
    assert [r["epoch"] for r in lines(out)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(v, weights(straight)[k]) for k, v in weights(out).items())
    assert not list(out.rglob(".unfinished*"))


def test_a_write_that_fails_is_one_line_and_loses_nothing(images: Path, tmp_path: Path) -> None:
    import resource

    # Room for the log and the weights of the first checkpoint, not for its optimizer state: as on a full disk.
    out = tmp_path / "run"
    size = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=5).parameters()) * 4

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * size), int(1.5 * size)))

    done = subprocess.run(
        command(images, out), capture_output=True, text=True, check=False, timeout=120, preexec_fn=limit
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Cannot write (")
    assert "Traceback" not in done.stderr
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith("epoch-")]
    subprocess.run(command(images, out, "--resume"), check=True, capture_output=True, timeout=120)
    assert [r["epoch"] for r in lines(out)] == [1, 2, 3, 4, 5, 6]


def _wait_for_checkpoint(out: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 90
    while not list((out / "checkpoints").glob("epoch-*")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_count_every_image_once_and_agree(images: Path, tmp_path: Path, launcher: str) -> None:
    # accelerate 1.15 starts one process for this command unless there is an MPI; torchrun really starts two.
    launch = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no".split(),
    }[launcher]
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command(images, out, "--epochs", "2")[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("37 validation images") == 1  # one process speaks
    (last,) = lines(out)[-1:]
    assert last["count"] == 37
    expected = _validate_by_hand(out, images)
    assert {k: last[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    run = json.loads((out / "run.json").read_text())
    if launcher == "torchrun":
        assert (run["settings"]["processes"], run["steps_per_epoch"]) == (2, 122 // 16)
    elif run["settings"]["processes"] == 1:
        assert "accelerate launched a single process" in done.stderr


def test_two_processes_are_interrupted_and_resumed_exactly(images: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    straight, out = tmp_path / "straight", tmp_path / "run"
    subprocess.run([*launch, *command(images, straight)[1:]], check=True, capture_output=True, env=env, timeout=120)
    process = subprocess.Popen([*launch, *command(images, out)[1:]], stderr=subprocess.DEVNULL, env=env)
    _wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    process.wait(timeout=60)
    assert not (out / "export").exists()
    subprocess.run(
        [*launch, *command(images, out, "--resume")[1:]], check=True, capture_output=True, env=env, timeout=120
    )
    assert all(torch.equal(v, weights(straight)[k]) for k, v in weights(out).items())


def test_resume_of_another_run_is_refused(images: Path, straight: Path) -> None:
    settings = {"epochs": 6, "warmup_epochs": 1, "batch_size": 8, "opt": "adamw", "lr": 0.003, "resume": True}
    settings |= {"model_kwargs": ("drop_rate=0.2",), "scale": (0.8, 1.0), "hflip": 0.0}
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
    for changes, says in (
        ({"model": "test_resnet"}, "architecture 'test_resnet_etf', now it is 'test_resnet'"),
        ({"num_classes": 7}, "num_classes 5, now it is 7"),
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
    assert found["source"]["train_seconds"] == pytest.approx(2 * 122 / line["images_per_second"], abs=0.1)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run"))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match=r"Cannot read the checkpoint .*: restore it, or start again"):
        pretrain(config(images, tmp_path / "run", resume=True))


def test_both_heads_start_from_the_same_backbone(images: Path, tmp_path: Path) -> None:
    # With a learning rate near zero the runs end where they started.
    for name, head in (("fixed", "etf"), ("free", "learned")):
        pretrain(config(images, tmp_path / name, model="test_resnet", head=head, lr=1e-30, weight_decay=0.0))
    ours, theirs = weights(tmp_path / "fixed"), weights(tmp_path / "free")
    assert ours.keys() == theirs.keys()
    differ = {k for k in ours if not torch.allclose(ours[k], theirs[k], atol=1e-20, rtol=0)}
    assert differ == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("kind", ["hfds-folder", "hfds-parquet", "hfids-parquet", "wds"])
def test_timms_other_readers(images: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"model": "test_resnet", "head": "etf", "data_dir": None, "num_classes": None}
    if kind == "hfds-folder":
        changes["dataset"] = f"hfds/{images}"
    elif kind == "wds":
        changes |= {"dataset": "wds/x", "data_dir": _shards(images, tmp_path / "wds"), "num_classes": 5}
        changes |= {"train_split": "train-0000.tar|122", "val_split": "validation-0000.tar|37"}
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


def _shards(images: Path, root: Path) -> Path:
    import webdataset

    root.mkdir()
    for split in ("train", "validation"):
        with webdataset.TarWriter(str(root / f"{split}-0000.tar")) as tar:
            for number, path in enumerate(sorted((images / split).rglob("*.png"))):
                label = str(int(path.parent.name[-1])).encode()
                tar.write({"__key__": f"{number:05d}", "png": path.read_bytes(), "cls": label})
    return root
