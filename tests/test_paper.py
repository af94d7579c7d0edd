"""examples/paper: its commands, how they are run, and what is read from their results."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from scipy import stats

from tests.conftest import write_images
from timm_etf import UsageError
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.recipe import with_recipe
from timm_etf.studies.geometry import Settings as Geometry
from timm_etf.studies.random_features import Settings as RandomFeatures
from timm_etf.transfer.run import Settings as Transfer

FOLDER = Path(__file__).parents[1] / "examples" / "paper"
sys.path.insert(0, str(FOLDER))

import findings  # noqa: E402
import paper  # noqa: E402

SETTINGS = {"transfer": Transfer, "geometry": Geometry, "random-features": RandomFeatures}


def options(root: Path, **changes: Any) -> argparse.Namespace:
    values = {"data_root": root, "data_dir": root / "data", "workers": 0, "pretrain": [], "rate": 100.0, "jobs": 1}
    return argparse.Namespace(**values | {"processes": 1, "target_heads": paper.TARGET_HEADS} | changes)


# Commands


@pytest.mark.parametrize(("scale", "architectures"), [("small", 1), ("full", 2)])
def test_the_commands_are_complete(tmp_path: Path, scale: str, architectures: int) -> None:
    stages = paper.Paper(tmp_path / "out", paper.SCALES[scale], options(tmp_path)).stages
    assert [len(jobs) for jobs in stages.values()] == [9 * architectures, 3 * architectures, 2 * architectures]
    for job in [job for jobs in stages.values() for job in jobs]:
        verb, *arguments = job.command
        settings = SETTINGS.get(verb, PretrainConfig)
        tyro.cli(settings, args=with_recipe(arguments) if verb == "pretrain" else arguments).check()  # type: ignore[attr-defined]
    heads = [tyro.cli(Transfer, args=job.command[1:]) for job in stages["transfer"][:3]]
    assert [len(t.targets) for t in heads] == ([5, 2, 2] if scale == "small" else [8, 8, 8])
    assert [(t.finetune_head, t.keep_models) for t in heads] == [("learned", True), ("etf", False), ("nearest", False)]


def test_the_processes_of_a_training_share_its_batch(tmp_path: Path) -> None:
    given = options(tmp_path, processes=8)
    (job, *_) = paper.Paper(tmp_path, paper.SCALES["full"], given).stages["pretraining"]
    assert tyro.cli(PretrainConfig, args=with_recipe(job.command[1:])).batch_size == 256 // 8


def test_the_plan_counts_what_is_there_and_measures_the_rate(tmp_path: Path) -> None:
    made = paper.Paper(tmp_path, paper.SCALES["small"], options(tmp_path, rate=100.0))
    assert "100 images/s, as --rate says" in made.plan()
    assert (
        f"9 trainings of 0.25 million images, 0 of them there: {9 * 12 * 21_163 / 100 / 3600:.1f} hours" in made.plan()
    )
    least = 9 * 4 * 9
    hours = f"{least * 6400 / 100 / 3600:.1f} hours"
    assert f"0 of them there, at least {least} fine-tunings of 100 steps left: {hours}" in made.plan()
    for job in [*made.stages["pretraining"][:2], made.stages["transfer"][1]]:
        job.out.mkdir(parents=True)
        (job.out / "results.json").write_text("{}")
    lines = [{"epoch": 0, "top1": 1.0}, *({"epoch": e, "images_per_second": 150.0 + 50 * e} for e in (1, 2))]
    (made.stages["pretraining"][0].out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "225 images/s, as measured in 2 epochs" in made.plan()
    assert f"2 of them there: {7 * 12 * 21_163 / 225 / 3600:.1f} hours" in made.plan()
    least = 9 * 4 * 7
    hours = f"{least * 6400 / 225 / 3600:.1f} hours"
    assert f"1 of them there, at least {least} fine-tunings of 100 steps left: {hours}" in made.plan()


def test_what_is_missing_is_told_before_any_training(tmp_path: Path) -> None:
    made = paper.Paper(tmp_path / "out", paper.SCALES["small"], options(tmp_path))
    with pytest.raises(UsageError, match=r"No folder .*/data/train: --data-dir"):
        made.check()
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"icons-novel is not built in .*; emoji-subcategory is not built"):
        made.check()


# How they are run

TOOL = """#!/usr/bin/env bash
given=$*
while [[ $1 != --out ]]; do shift; done
echo "+" >> {log}
trap 'echo "stopped $OMP_NUM_THREADS" >> {log}; exit 1' TERM
sleep {seconds} & wait $!
echo "-" >> {log}
if [[ $given == *{fails}* ]]; then exit 3; fi
mkdir -p "$2"; echo "{{}}" > "$2/results.json"
"""


def jobs(root: Path, count: int) -> list[Any]:
    return [paper.Job(["transfer", f"--number={i}"], root / f"job{i}") for i in range(count)]


def tool(root: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3, fails: str = "nothing") -> Path:
    log = root / "log"
    (root / "tool.sh").write_text(TOOL.format(log=log, seconds=seconds, fails=fails))
    monkeypatch.setenv("TIMM_ETF", f"bash {root / 'tool.sh'}")
    return log


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_so_many_run_side_by_side_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side: int
) -> None:
    log = tool(tmp_path, monkeypatch)
    for _ in range(2):
        paper.run(jobs(tmp_path, 5), options(tmp_path, jobs=side_by_side))
    running = np.cumsum([1 if line == "+" else -1 for line in log.read_text().split()])
    assert len(running) == 2 * 5
    assert running.max() == side_by_side
    assert [(tmp_path / f"job{i}" / "results.json").exists() for i in range(5)] == [True] * 5


def test_one_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tool(tmp_path, monkeypatch, fails="number=1")
    with pytest.raises(SystemExit, match=r"job1 ended with status 3, see .*job1\.log\. The same command continues"):
        paper.run(jobs(tmp_path, 3), options(tmp_path, jobs=2))
    assert not (tmp_path / "job2").exists() or "stopped" in log.read_text()


def test_what_failed_within_a_command_is_tried_again(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1)
    for told, done in (({"missing": {"SW: kanji": "cut"}}, False), ({"missing": {}}, True), ({}, True)):
        job.out.mkdir(exist_ok=True)
        (job.out / "results.json").write_text(json.dumps(told))
        assert job.done == done


def test_a_pretraining_that_was_stopped_is_resumed(tmp_path: Path) -> None:
    job = paper.Job(["pretrain", "--seed", "0"], tmp_path)
    assert "--resume" not in job.command
    (tmp_path / "run.json").write_text("{}")
    assert job.command == ["pretrain", "--seed", "0", "--out", str(tmp_path), "--resume"]
    assert "--resume" not in replace(job, arguments=["transfer"]).command


def test_a_signal_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tool(tmp_path, monkeypatch, seconds=60)
    (tmp_path / "icons-400" / "train").mkdir(parents=True)
    for target in paper.SCALES["small"].near + paper.SCALES["small"].far:
        (tmp_path / target).mkdir()
        (tmp_path / target / "dataset.json").write_text("{}")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    command = [tmp_path / "out", "--scale", "small", "--data-root", tmp_path, "--jobs", 2]
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, command)])

    def end_it() -> None:
        while not log.exists() or log.read_text().count("+") < 2:
            time.sleep(0.05)
        time.sleep(0.3)  # the tool's trap is set
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    threading.Thread(target=end_it, daemon=True).start()
    try:
        with pytest.raises(SystemExit, match="Stopped"):
            paper.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert log.read_text().count("stopped 7") == 2
    assert "9 trainings of 0.25 million images, 0 of them there" in capsys.readouterr().out


# What is read


def measured(root: Path, seeds: int = 3) -> dict[str, Any]:
    """Results of the commands, made up; gives the accuracies by target, label and training."""
    rng = np.random.default_rng(0)
    distances = {"a": 0.5, "b": 0.9, "c": 1.6, "d": 1.9}
    accuracy: dict[str, Any] = {}
    for name, head in (("transfer", "learned"), ("heads/etf", "etf")):
        accuracy[head] = {
            t: {
                la: (50 + gain * d + rng.normal(size=seeds)).tolist() for la, gain in zip("xyz", (0, 1, 2), strict=True)
            }
            for t, d in distances.items()
        }
        found = {
            t: {"models": {la: {"by_model": [{"accuracy": a} for a in runs]} for la, runs in of.items()}}
            for t, of in accuracy[head].items()
        }
        found["incomplete"] = {"models": {"x": {"by_model": [{"accuracy": 1.0}]}}}
        by_model = {
            la: {t: {"proxy_a": d, "frechet": s * 10**d} for t, d in distances.items()}
            for la, s in (("x", 1), ("y", 5))
        }
        told = {
            "settings": {"targets": ["/data/a,group=near", "b,group=near", "c,group=far", "d,group=far", "incomplete"]},
            "reference": "x",
            "protocols": {"finetune": {"targets": found}},
            "distance": {
                "by_model": by_model
                | {"neutral": {t: {"proxy_a": d / 2, "frechet": 9.0} for t, d in distances.items()}},
                "difference_over_distance": {
                    "finetune": {
                        "y": {"spearman": None, "interval": [None, None]},
                        "z": {"spearman": 0.8, "interval": [0.1, 1.0]},
                    }
                },
            },
            "missing": {"z: incomplete": "cut"},
            "seconds": {"features": 1800.0, "finetune": 5400.0},
        }
        told["settings"]["finetune_head"] = head  # type: ignore[index]
        write(root / name / "net", told)
    tests = {
        f"{la}{tuned}": [{"within": w / 100 + i / 1000, "within_share": w / 200, "nc1": 1.0} for i in range(seeds)]
        for la, w in zip("xyz", (16, 4, 1), strict=True)
        for tuned in ("", " tuned")
    }
    for seed in range(seeds):
        for la, top1 in zip("xyz", (70.0, 71.0, 69.0), strict=True):
            write(root / "pretrain" / f"net-{la}-{seed}", {"source": {"train_seconds": 400.0, "top1": top1 + seed}})
    write(root / "figure3" / "net", {"geometry": {"c": {"train": {}, "test": tests}}})
    return accuracy


def write(folder: Path, content: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_the_findings_are_those_of_the_results(tmp_path: Path) -> None:
    accuracy = measured(tmp_path)
    findings.main(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["net"]
    x, z = (np.array([accuracy["learned"][t][la] for t in "abcd"]) for la in "xz")
    design = np.stack([np.ones(4), [0.5, 0.9, 1.6, 1.9]], 1)
    slopes = np.linalg.lstsq(design, z - x, rcond=None)[0][1]
    half = stats.t.ppf(0.975, 2) * stats.sem(slopes)
    for kind in ("proxy_a", "frechet"):  # distances are 10^d and 5 x 10^d, so that both slopes are one
        told = found["slope"]["z"][kind]
        assert told["by_training"] == pytest.approx(slopes)
        assert told["interval"] == pytest.approx([slopes.mean() - half, slopes.mean() + half])
    assert found["slope"]["z"]["neutral"]["proxy_a"]["by_training"] == pytest.approx(2 * slopes)
    assert set(found["slope"]["z"]["neutral"]) == {"proxy_a"}  # in the other they are all as far
    assert found["accuracy"]["far"]["z"]["by_training"] == pytest.approx(z[2:].mean(0))
    assert found["hours_of_a_process"] == {"pretraining": 1.0, "transfer, learned": 2.0, "transfer, etf": 2.0}
    assert found["gain"]["z"]["far"]["by_training"] == pytest.approx((z - x)[2:].mean(0))
    assert found["targets"]["a"]["group"] == "near"
    assert "incomplete" not in found["targets"]
    etf = np.mean([np.subtract(accuracy["etf"][t]["z"], accuracy["learned"][t]["z"]) for t in "abcd"], axis=0)
    assert found["target_heads"]["classifiers"]["etf"]["z"]["less_learned"]["by_training"] == pytest.approx(etf)
    assert found["target_heads"]["classifiers"]["learned"]["z"]["less_learned"]["mean"] == 0
    text = (tmp_path / "claim.md").read_text()
    assert text.startswith("# net: 3 trainings of each method, 4 targets")
    low, high = slopes.mean() - half, slopes.mean() + half
    assert f"changes by {slopes.mean():+.1f} ({low:+.1f} to {high:+.1f}) over one unit of proxy A-distance" in text
    assert "z less x is" in text[: text.index("2. Covariance after transfer")]
    assert "rank correlation +0.80, +0.10 to +1.00" in text
    assert "x 0.161 (0.159 to 0.163), 8.0 (8.0 to 8.0) % of the total variance (before 0.161, 8.0 %); y 0.041" in text
    z_said = "z 0.011 (0.00852 to 0.0135), 0.5 (0.5 to 0.5) % of the total variance (before 0.011, 0.5 %), less x -0.15"
    assert f"{z_said} (-0.15 to -0.15), -7.5 (-7.5 to -7.5) points." in text
    assert found["covariance_of_test_features"]["c"]["z tuned"]["within"]["less_reference"]["mean"] == pytest.approx(
        -0.15
    )
    assert "y less x is" in text[text.index("3. y beside it") :]
    assert "1 results are missing: z: incomplete: cut" in text
    table = (tmp_path / "table1.md").read_text()
    assert "| top-1 on the source | 71.0 | 72.0 | 70.0 | +1.0 (+1.0 to +1.0) | -1.0 (-1.0 to -1.0) |" in table
    assert f"| **mean of near** | {x[:2].mean():.1f} |" in table
    assert "| pretrained | learned | etf | etf - learned |" in table


def test_one_training_has_no_interval(tmp_path: Path) -> None:
    measured(tmp_path, seeds=1)
    findings.main(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["net"]
    assert found["slope"]["z"]["proxy_a"]["interval"] is None
    assert "x 0.16, 8.0 % of the total variance" in (tmp_path / "claim.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eleven commands, each of which imports torch
def test_a_toy_from_one_command(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("kanji", "armenian", "mnist-5k")):
        write_images(tmp_path / name, "train", 6 + number)
        write_images(tmp_path / name, "test", 3)
        (tmp_path / name / "dataset.json").write_text("{}")
    toy = paper.Scale(
        weights={"test_resnet": 2},
        seeds=2,
        pretrain="--img-size 32 --crop-pct 1.0 --hflip 0 --color-jitter 0 --epochs 1 --warmup-epochs 0 --lr 0.1",
        batch=16,
        images=122,
        near=("kanji",),
        far=("armenian", "mnist-5k"),
        figure="kanji",
        steps=2,
        neutral="test_resnet,pretrained=False,pretrained_cfg_overlay={'input_size': (3, 32, 32)}",
    )
    monkeypatch.setitem(paper.SCALES, "small", toy)
    monkeypatch.setattr(paper, "SOURCE_IMAGES", 100)
    monkeypatch.setenv("TIMM_ETF", f"{sys.executable} -m timm_etf")
    command = ["paper.py", str(tmp_path / "out"), "--scale", "small", "--data-root", str(tmp_path)]
    command += ["--data-dir", str(images), "--workers", "0", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", command)
    paper.main()
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())["test_resnet"]
    assert list(found["targets"]) == ["kanji", "armenian", "mnist-5k"]
    assert list(found["target_heads"]["classifiers"]) == ["learned", "etf", "nearest"]
    assert found["missing"] == {}
    assert set(found["covariance_of_test_features"]["kanji"]) == {
        f"{head}{tuned}" for head in paper.HEADS for tuned in ("", " tuned")
    }
    text = (out / "claim.md").read_text()
    assert all(f"\n{number}. " in text for number in (1, 2, 3))
    for picture in ("transfer/test_resnet/distance.png", "figure3/test_resnet/covariance-kanji.png"):
        assert (out / picture).stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    paper.main()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
