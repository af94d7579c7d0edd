"""The recipes and launch scripts in examples/."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.pretrain.runs import config, lines
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.loop import pretrain
from timm_etf.pretrain.recipe import with_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "imagenet").glob("*.yaml"))
SLURM = EXAMPLES / "launch" / "slurm.sh"


def parsed(*arguments: object) -> PretrainConfig:
    return tyro.cli(PretrainConfig, args=with_recipe([str(a) for a in arguments]))


def commands_of_the_table() -> list[tuple[str, str]]:
    """Recipe and model of each command in the README of the recipes."""
    text = (EXAMPLES / "imagenet" / "README.md").read_text()
    found = []
    for recipe in RECIPES:
        row = next(line for line in text.splitlines() if line.startswith(f"| [{recipe.name}]"))
        found += [(recipe.name, model) for model in re.findall(r"(?:--model )?`?\b((?:resnet|vit)[a-z0-9_]+)`", row)]
    return found


@pytest.mark.parametrize(("recipe", "model"), commands_of_the_table())
def test_commands_of_the_table_are_complete(tmp_path: Path, recipe: str, model: str) -> None:
    parsed(
        *("--config", EXAMPLES / "imagenet" / recipe, "--model", model),
        *("--data-dir", tmp_path / "data", "--out", tmp_path / "run"),
    ).check()


def test_the_table_has_the_papers_comparison() -> None:
    found = [model for recipe, model in commands_of_the_table() if recipe == "classic.yaml"]
    assert found == [f"resnet{depth}{head}" for depth in (50, 101) for head in ("", "_etf", "_sw")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(images: Path, tmp_path: Path, recipe: Path) -> None:
    options: dict[str, Any] = yaml.safe_load(recipe.read_text())
    settings = {f: getattr(parsed("--config", recipe, "--out", "run"), f) for f in options}
    settings["model"] = "test_vit_etf" if settings["model"].startswith("vit") else "test_resnet_etf"
    settings |= {"img_size": 160 if settings["model"] == "test_vit_etf" else 32, "dataset": "folder"}
    settings |= {"batch_size": 16, "epochs": 2, "warmup_epochs": 1, "num_classes": None}
    if settings["model"] == "test_resnet_etf":
        settings["crop_pct"] = 1.0
    pretrain(config(images, tmp_path / "run", **settings))
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


def test_the_classic_learning_rate_is_divided_at_its_milestones() -> None:
    import timm.scheduler
    import torch

    settings = parsed("--config", EXAMPLES / "imagenet" / "classic.yaml", "--out", "run")
    optimizer = torch.optim.SGD([torch.zeros(1)], settings.lr)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=10,
        **settings.parsed_sched_kwargs,
    )
    rates = {}
    for epoch in (5, 29, 30, 60, 90, 99):
        schedule.step_update(10 * epoch)
        rates[epoch] = optimizer.param_groups[0]["lr"]
    assert rates == pytest.approx({5: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001, 99: 0.0001})


@pytest.mark.parametrize(("name", "processes", "kind"), [("one_gpu", 1, "NO"), ("one_node", 8, "MULTI_GPU")])
def test_accelerates_configurations_load(name: str, processes: int, kind: str) -> None:
    found = load_config_from_file(str(EXAMPLES / "launch" / f"{name}.yaml"))
    assert (found.num_processes, found.distributed_type.value, found.mixed_precision) == (processes, kind, "bf16")


def test_the_slurm_script_has_no_flaws() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck
    scripts = [str(p) for p in EXAMPLES.rglob("*.sh")]
    found = subprocess.run([shellcheck, "--severity=style", str(SLURM)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    found = subprocess.run([shellcheck, "--severity=error", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_script_starts_resumes_and_queues_again(tmp_path: Path, status: int, requeued: bool) -> None:
    # SLURM's two commands, as programs that record what they are given. srun runs one task of its own; the others,
    # which end a little later, it kills if it is told to, and then their 128 + 9 is the highest status.
    tools, out = tmp_path / "tools", tmp_path / "a run"
    tools.mkdir()
    for name, body in {
        "scontrol": f'if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" >> "{tmp_path}/asked"; fi',
        "srun": 'given=$*; while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 "$@" || status=$?\n'
        'if [[ ${status:=0} -ne 0 && $given == *--kill-on-bad-exit=1* ]]; then status=137; fi; exit "$status"',
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> "{tmp_path}/ran"; exit {status}',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    env = {**os.environ, **job, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(SLURM), "--model", "resnet50_etf", "--out", str(out), "--data-dir", "data"]
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == (0 if requeued else status), done.stderr
        out.mkdir(exist_ok=True)
        (out / "run.json").write_text("{}")
    first, second = (tmp_path / "ran").read_text().splitlines()
    assert first.startswith("3 1 4 node7 -m timm_etf pretrain --amp bf16 ")
    assert ("--resume" in first, "--resume" in second) == (False, True)
    given = first.split("pretrain ", 1)[1].replace(str(out), "RUN").split()
    assert parsed(*given).checkpoint_minutes == 30
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 42\n" * 2


def test_commands_that_launch_are_complete(tmp_path: Path) -> None:
    text = (EXAMPLES / "launch" / "README.md").read_text()
    for place, path in {"RECIPE": RECIPES[0], "DATA": tmp_path / "data", "RUN": tmp_path / "run"}.items():
        text = text.replace(place, str(path))
    found = re.findall(r"`(?:accelerate|sbatch) [^`]*?((?:--fsdp|--config) [^`]+)`", text)
    settings = [parsed(*command.split()) for command in found]
    for each in settings:
        each.check()
    assert [each.fsdp for each in settings] == [False, False, True]


def test_the_slurm_script_needs_a_folder() -> None:
    done = subprocess.run(["bash", str(SLURM), "--model", "resnet50_etf"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "give --out RUN" in done.stderr
