"""examples/study: its arms, its report, and images that are decoded once."""

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st

from tests import commands
from tests.pretrain.runs import arguments, config, lines
from timm_etf.atomic import write_json
from timm_etf.data import images as target_images
from timm_etf.features import extract
from timm_etf.pretrain import data
from timm_etf.pretrain.config import PretrainConfig

STUDY = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import in_memory  # noqa: E402

IN_MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import in_memory
in_memory.start(Path(sys.argv[2]), 1)
del sys.argv[1:3]
in_memory.cli.main()
"""

STUDY_OF_ONE = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import in_memory
with ProcessPoolExecutor(1, get_context("spawn"), in_memory.start, (Path(sys.argv[2]), 1)) as pool:
    pool.submit(in_memory.run, sys.argv[4:], Path(sys.argv[3])).result()
"""


def test_every_arm_can_be_trained(tmp_path: Path) -> None:
    study = runpy.run_path(str(STUDY / "study.py"))
    assert len(study["ARMS"]) == 24
    for arm in study["ARMS"].values():
        for name, family in study["FAMILIES"].items():
            if arm.whitened and name != "resnet10t":
                continue
            options = [*arm.options(name), *study["COMMON"].split(), *family.options.split()]
            folders = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
            tyro.cli(PretrainConfig, args=[*options, *folders]).check()


def test_the_plan_counts_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), "--data-root", "DATA", "--plan", "--rate", "1000"])
    scope = runpy.run_path(str(STUDY / "study.py"))
    main = scope["main"]
    main()
    said = capsys.readouterr().out
    assert "  simplex, CE, projector: 5 seeds\n" in said
    assert "60 trainings to tune and 60 to compare are left: 21,670,080 images" in said
    assert "about 6.0 hours" in said
    done = tmp_path / "train" / "learned+CE-64-0.1-0"
    done.mkdir(parents=True)
    (done / "results.json").touch()
    main()
    assert "60 trainings to tune and 59 to compare are left" in capsys.readouterr().out
    shutil.copy(STUDY / "results.json", tmp_path)  # of what this has, nothing is done again
    main()
    known = json.loads((STUDY / "results.json").read_text())["arms"]
    told = [known[name] for name in [*scope["ARMS"]][: scope["HEADLINE_ARMS"]] if name in known]
    tuned = sum(top1 is not None for arm in told for top1 in arm["tuned"].values())
    measured = sum(bool(arm["runs"].get(str(seed), {}).get("transfer")) for arm in told for seed in range(5))
    assert f"{60 - tuned} trainings to tune and {60 - measured} to compare are left" in capsys.readouterr().out


def save(folder: Path, results: object) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)


def test_arms_beside_the_headline_are_halved_by_the_source_and_then_by_targets(tmp_path: Path) -> None:
    scope = runpy.run_path(str(STUDY / "study.py"))
    names = [*scope["ARMS"]][scope["HEADLINE_ARMS"] :][:7]
    options = argparse.Namespace(out=tmp_path, family="resnet10t", all=False, arms=["learned, CE", *names], seeds=5)
    vars(options).update(epochs=4, data_root=Path("DATA"), targets=["kanji"], pretrain=[], finetune=0, finetune_steps=1)
    study = scope["Study"](options)
    for place, name in enumerate(names):  # the last is the best on the source
        for batch, lr in study.family.grid:
            source = {"source": {"top1": 50 + place + (batch == 128) + lr}}
            save(study.folder("tune", name, batch, lr), source)
    screening = study.screening()
    assert [job.out.name for job in screening] == [study.folder("", name, 128, 0.4).name for name in names[:2:-1]]
    assert study.left() == ["learned, CE"]
    for place, job in enumerate(screening):  # and the worst on the targets
        targets = {"armenian": {"models": {"a": {"accuracy": 60.0 + place}}}}
        save(job.out, {"protocols": {"knn": {"targets": targets}}})
    assert study.left() == ["learned, CE", *names[3:5]]
    training = [job.out for job in study.training()]
    assert len(training) == 5 + 2 * 3
    study.write_results()
    shutil.rmtree(tmp_path / "tune")
    shutil.rmtree(tmp_path / "screen")
    again = scope["Study"](options)
    assert again.left() == ["learned, CE", *names[3:5]]
    assert not again.screening()
    assert [job.out for job in again.training()] == training


def test_trainings_with_what_is_no_longer_an_arms_best_are_done_again(tmp_path: Path) -> None:
    scope = runpy.run_path(str(STUDY / "study.py"))
    shutil.copy(STUDY / "results.json", tmp_path)
    options = argparse.Namespace(out=tmp_path, family="resnet10t", all=False, arms=["learned, CE"], seeds=5)
    vars(options).update(epochs=4, data_root=Path("DATA"), targets=["kanji"], pretrain=[], finetune=0, finetune_steps=1)
    study = scope["Study"](options)
    assert not study.training()
    save(study.folder("tune", "learned, CE", 512, 0.4), {"source": {"top1": 99.0}})
    assert [job.out.name for job in study.training()] == [f"learned+CE-512-0.4-{seed}" for seed in range(5)]
    study.write_results()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["finetune_steps"] == 100  # nothing has been fine-tuned with another number
    told = results["arms"]["learned, CE"]
    assert told["chosen"] == {"batch_size": 512, "lr": 0.4}
    assert told["runs"] == {}
    options.family = "convnext_atto"
    with pytest.raises(SystemExit, match=r"is of resnet10t: give another OUT, or --family resnet10t"):
        scope["Study"](options)


def test_the_table_of_the_readme_is_that_of_the_studies() -> None:
    scope = runpy.run_path(str(STUDY / "report.py"))
    recipe, twins = scope["RECIPE"], scope["TWINS"]
    first = [*twins.items(), (recipe, "learned, CE"), (recipe, "whitened, CE"), ("simplex, CE", "learned, CE")]
    for folder, compared in ((STUDY, first), (STUDY / "convnext_atto", [(recipe, "learned, CE")])):
        findings = scope["Findings"](json.loads((folder / "results.json").read_text()))
        for arm, other in compared:
            differences = [findings.difference(arm, other, p, "headline") for p in ("knn", "1-shot", "probe")]
            cells = " | ".join(scope["shown"](each).replace(", ", " (") + ")" for each in differences)
            assert f" | {cells} |" in (STUDY.parent.parent / "README.md").read_text()


@pytest.mark.parametrize("family", [STUDY, STUDY / "convnext_atto", STUDY / "finetuned"])
def test_the_report_is_that_of_its_results(tmp_path: Path, family: Path) -> None:
    shutil.copy(family / "results.json", tmp_path)
    runpy.run_path(str(STUDY / "report.py"))["main"](tmp_path)
    assert (tmp_path / "report.md").read_text() == (family / "report.md").read_text()
    assert (tmp_path / "waterfall.png").stat().st_size > 5000


@pytest.mark.parametrize("missing", ["learned, NONL, projector", "learned, CE, projector"])
def test_a_study_that_is_not_done_has_a_report(tmp_path: Path, missing: str) -> None:
    told = json.loads((STUDY / "results.json").read_text())
    for run in told["arms"][missing]["runs"].values():  # trained, and not measured yet
        run.pop("transfer", None)
    (tmp_path / "results.json").write_text(json.dumps(told))
    runpy.run_path(str(STUDY / "report.py"))["main"](tmp_path)
    assert (tmp_path / "waterfall.png").stat().st_size > 5000


@given(st.floats(0.05, 1), st.floats(0, 1), st.floats(1, 3), st.integers(0, 99))
def test_boxes_are_of_the_area_and_shape_that_were_asked_for(low: float, more: float, ratio: float, seed: int) -> None:
    scale = (low, low + more * (1 - low))
    left, top, width, height = in_memory.boxes(64, scale, (1 / ratio, ratio), in_memory.seeded(seed)).T
    whole = (width == 1) & (height == 1)
    area, aspect = width * height, width / height
    assert ((area >= scale[0] - 1e-4) & (area <= scale[1] + 1e-4) | whole).all()
    assert ((aspect >= 1 / ratio - 1e-4) & (aspect <= ratio + 1e-4)).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-6).all()
    assert (top + height <= 1 + 1e-6).all()


def test_a_crop_is_that_part_of_the_image() -> None:
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)  # the column of each pixel
    image = torch.cat([ramp, ramp.mT], 1).round().byte()
    box = torch.tensor([[0.25, 0.5, 0.5, 0.25]])
    found = in_memory.crops(image, box, 16)[0]
    columns = 64 * (0.25 + 0.5 * (torch.arange(16) + 0.5) / 16) - 0.5
    rows = 64 * (0.5 + 0.25 * (torch.arange(16) + 0.5) / 16) - 0.5
    torch.testing.assert_close(found, torch.stack([columns.expand(16, 16), rows.expand(16, 16).T]), atol=1e-3, rtol=0)


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(in_memory, "folder", tmp_path / "decoded")
    return tmp_path / "decoded"


def test_training_sees_the_images_in_the_loops_order_and_continues_exactly(images: Path, decoded: Path) -> None:
    settings = config(images, decoded / "run", hflip=0.0, color_jitter=0.0, img_size=24, epoch_repeats=2)
    task = data.open_task(settings)
    ours = in_memory.Training(task.train, settings, 0, 1)
    batches = list(ours.epoch(1))
    task.train.transform = data.transforms(settings, timm.data.resolve_data_config({"img_size": 24}))[0]  # type: ignore[attr-defined]
    theirs = data.TrainLoader(task.train, settings, 0, 1)
    assert len(batches) == theirs.batches_per_epoch
    assert torch.equal(torch.cat([y for _, y in batches]), torch.cat([y for _, y in theirs.epoch(1)]))
    assert batches[0][0].shape == (16, 3, 24, 24)
    later = next(islice(ours.epoch(1, 3), 1))
    assert torch.equal(later[0], batches[3][0])
    assert not torch.equal(next(ours.epoch(0))[0], batches[0][0])


def test_features_are_those_of_any_loader(images: Path, decoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    targets, _ = target_images.find_targets([str(images)], images)
    split = target_images.open_splits(targets[0]).train
    expected = extract.features_of(model, split, batch_size=50, workers=0)
    monkeypatch.setattr(extract, "DataLoader", in_memory.features_loader)
    for _ in range(2):  # decoding, and what is decoded
        found = extract.features_of(model, split, batch_size=50, workers=0)
        assert (found.x == expected.x).all()
        assert (found.y == expected.y).all()


@pytest.mark.slow
def test_commands_train_and_fine_tune_with_images_in_memory(images: Path, tmp_path: Path) -> None:
    places = (STUDY, tmp_path / "decoded")
    training = arguments(images, tmp_path / "run", "--color-jitter", 0)
    commands.run(*places, *training, code=IN_MEMORY, check=True)
    assert lines(tmp_path / "run")[-1]["top1"] > 60
    model = f"a=local-dir:{tmp_path / 'run' / 'export'}"
    tuning = ("transfer", "--models", model, "--targets", images, "--out", tmp_path / "out")
    budget = "--protocols finetune --finetune-steps 10 --seeds 1 --workers 0".split()
    commands.run(*places, *tuning, *budget, code=IN_MEMORY, check=True)
    assert len(list((tmp_path / "decoded").glob("*.npy"))) == 5  # training, validation; crops; splits of the target


def test_trainings_of_a_study_that_is_killed_save_and_end(images: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    training = arguments(images, tmp_path / "run", "--color-jitter", 0, "--epochs", 10_000)
    script = [sys.executable, "-c", STUDY_OF_ONE, STUDY, tmp_path / "decoded", log, *training]
    with subprocess.Popen(list(map(str, script))) as study:
        while not (log.exists() and "epoch 2/" in log.read_text()):
            assert study.poll() is None
            time.sleep(0.2)
        workers = psutil.Process(study.pid).children(recursive=True)
        study.kill()
    assert workers
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert "--resume" in log.read_text().splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints").is_dir()
