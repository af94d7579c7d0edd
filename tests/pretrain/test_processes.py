import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from tests import commands
from tests.pretrain.runs import arguments, assert_same, lines, wait_for_checkpoint, weights
from tests.pretrain.test_run import validate_by_hand
from timm_etf.frames import simplex

SHORT = ("--epochs", 3)


@pytest.fixture(scope="module")
def two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    first, second = commands.run_ranks(2, *arguments(images, out, *SHORT))
    assert "37 validation images" in first.stdout
    assert second.stdout == ""  # one process speaks
    return out


def test_two_processes_count_every_image_once_and_agree(two: Path, images: Path) -> None:
    last = lines(two)[-1]
    assert last["count"] == 37
    expected = validate_by_hand(two, images)
    assert {k: last[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    run = json.loads((two / "run.json").read_text())
    assert (run["settings"]["processes"], run["steps_per_epoch"]) == (2, 122 // 16)


def test_two_processes_draw_different_dropout_and_mixup(two: Path) -> None:
    checkpoint = max((two / "checkpoints").iterdir())
    ours, theirs = (torch.load(checkpoint / f"random_states_{rank}.pkl", weights_only=False) for rank in range(2))
    assert not torch.equal(ours["torch_manual_seed"], theirs["torch_manual_seed"])
    assert ours["numpy_random_seed"][1].tolist() != theirs["numpy_random_seed"][1].tolist()
    assert ours["random_state"] != theirs["random_state"]


def test_two_processes_do_what_one_does_that_accumulates_two_batches(images: Path, tmp_path: Path) -> None:
    same = ("--model-kwargs", "drop_rate=0.0", "--epochs", 2, "--opt", "momentum", "--lr", 0.01)
    commands.run_ranks(2, *arguments(images, tmp_path / "two", *same, "--batch-size", 4))
    one = arguments(images, tmp_path / "one", *same, "--batch-size", 4, "--grad-accum-steps", 2)
    commands.run(*one, check=True)
    ours, theirs = (lines(tmp_path / name) for name in ("one", "two"))
    assert [x["train_loss"] for x in ours] == pytest.approx([x["train_loss"] for x in theirs], rel=1e-5)
    trained = {n for n, _ in timm.create_model("test_resnet_etf", num_classes=5).named_parameters()}
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in trained)


def test_the_main_process_computes_a_code_for_all(shards: Path, tmp_path: Path) -> None:
    # As on two machines: each has a cache of its own, and the second one fails if it computes.
    code = """
import os

os.environ["HF_ASSETS_CACHE"] += os.environ["RANK"]
from timm_etf import cli
from timm_etf.frames import codes

if os.environ["RANK"] == "1":
    codes._optimise = None
cli.main()
"""
    caches = {"HF_ASSETS_CACHE": str(tmp_path / "cache")}
    more = (
        "--dataset",
        "wds/x",
        "--train-split",
        "train-{0000..0001}.tar|122",
        "--val-split",
        "validation-0000.tar|37",
    )
    more += ("--num-classes", 300, "--epochs", 1, "--warmup-epochs", 0)  # more than twice the width
    commands.run_ranks(2, *arguments(shards, tmp_path / "run", *more), code=code, env=caches)
    ours, theirs = (list((tmp_path / f"cache{rank}").rglob("*.safetensors")) for rank in range(2))
    assert [file.name for file in ours] == [file.name for file in theirs]
    assert ours[0].read_bytes() == theirs[0].read_bytes()


def test_the_main_process_lists_the_folder_for_all(images: Path, two: Path, tmp_path: Path) -> None:
    code = """
import os, timm
from timm_etf import cli

if os.environ["RANK"] == "1":
    timm.data.create_dataset = None
cli.main()
"""
    commands.run_ranks(2, *arguments(images, tmp_path / "run", *SHORT), code=code)
    assert_same(tmp_path / "run", two)


def refused(images: Path, out: Path, more: list[tuple[object, ...]]) -> list[commands.Command]:
    """Two processes that both end with the status of a refusal, neither waiting for the other."""
    ranks = commands.start_ranks(2, *arguments(images, out), more=more)
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [2, 2]
    finally:
        for rank in ranks:
            rank.kill()
    return ranks


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([("--train-split", "other"), ()], r"error: .* has no folder 'other' \(it holds .*\): put images into other"),
        ([(), ("--data-dir", "nowhere")], r"error: No data at nowhere on .*: every machine needs it there\."),
    ],
)
def test_what_one_process_cannot_open_stops_all(
    images: Path, tmp_path: Path, more: list[tuple[object, ...]], says: str
) -> None:
    ranks = refused(images, tmp_path / "run", more)
    assert re.match(says, ranks[0].stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def test_two_processes_compare_the_samples_of_both(images: Path, tmp_path: Path) -> None:
    # A network without statistics over a batch: one batch of 24, two processes of 12, and each in two parts.
    same = ("--model", "test_vit_etf", "--img-size", 160, "--model-kwargs", "drop_rate=0.0", "--epochs", 2)
    same += ("--warmup-epochs", 0, "--opt", "momentum", "--lr", 0.01, "--loss", "nonl")
    commands.run(*arguments(images, tmp_path / "one", *same, "--batch-size", 24), check=True)
    commands.run_ranks(2, *arguments(images, tmp_path / "two", *same, "--batch-size", 12))
    commands.run_ranks(2, *arguments(images, tmp_path / "parts", *same, "--batch-size", 6, "--grad-accum-steps", 2))
    one = lines(tmp_path / "one"), weights(tmp_path / "one")
    trained = {n for n, _ in timm.create_model("test_vit_etf", num_classes=5).named_parameters()}
    for name in ("two", "parts"):
        losses = [x["train_loss"] for x in lines(tmp_path / name)]
        assert losses == pytest.approx([x["train_loss"] for x in one[0]], rel=1e-4, abs=1e-5)
        theirs = weights(tmp_path / name)
        assert all(torch.allclose(one[1][k], theirs[k], atol=1e-5) for k in trained)


GLOBAL_BATCH = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from torch import nn
from timm_etf import frames, FixedClassifier
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.objective import Objective
from timm_etf.pretrain.step import Step

out, loss, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
config = PretrainConfig(model="test_resnet_etf", data_dir=Path("."), out=Path("."), loss=loss, batch_size=512)
draw = torch.Generator().manual_seed(0)
x, y = torch.randn(512, 12, generator=draw, dtype=torch.float64), torch.randint(7, (512,), generator=draw)
torch.manual_seed(1)
head = FixedClassifier(10 * frames.simplex(7, 9), feature_norm=True)
net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9), head).double()
net.pretrained_cfg = {"classifier": "3"}
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 1.0))
as_they_are = lambda x, training=False: x
step = Step(config, accelerator, model, optimizer, None, Objective(config, net), as_they_are, None, None)
before = [p.detach().clone() for p in net.parameters()]
mine = [(xs, ys) for xs, ys in zip(x.chunk(world * parts), y.chunk(world * parts))][rank::world]
value = accelerator.gather(step(mine, parts, 0)[None]).mean()
gradients = [b - p.detach() for b, p in zip(before, net.parameters())]
if rank == 0:
    torch.save({"loss": value, "gradients": gradients}, out)
"""
"""A step of 512 samples in float64, of all processes together, each in so many parts; with a rate of one."""


@pytest.mark.parametrize("loss", ["ntce", "nonl"])
def test_a_global_batch_has_one_loss_and_gradient(tmp_path: Path, loss: str) -> None:
    for name, ranks, parts in (("two", 2, 1), ("both", 2, 2)):
        commands.run_ranks(ranks, tmp_path / name, loss, parts, code=GLOBAL_BATCH)
    commands.run(tmp_path / "four", loss, 4, code=GLOBAL_BATCH, check=True)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(512, 12, generator=draw, dtype=torch.float64), torch.randint(7, (512,), generator=draw)
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 9)).double()
    z = 10 * torch.nn.functional.normalize(net(x), dim=1) @ simplex(7, 9).T
    shown = y[:, None] != y if loss == "nonl" else torch.ones(512, 512, dtype=torch.bool)
    compared = z[:, y].T.masked_fill(~shown, -torch.inf)  # row i: what sample i is compared with, for its class
    expected = (compared.logsumexp(1) - z[torch.arange(512), y]).mean()
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    for name in ("two", "both", "four"):
        found = torch.load(tmp_path / name)
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
        for ours, theirs in zip(found["gradients"], gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_two_processes_are_interrupted_and_resumed_exactly(images: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = commands.start_ranks(2, *arguments(images, out, *SHORT))
    try:
        wait_for_checkpoint(out, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)  # the other learns of it
        assert [rank.wait(timeout=60) for rank in ranks] == [128 + signal.SIGTERM] * 2
    finally:
        for rank in ranks:
            rank.kill()
    assert "The same command with --resume continues from it." in ranks[0].stderr
    assert not (out / "export").exists()
    commands.run_ranks(2, *arguments(images, out, *SHORT, "--resume"))
    assert_same(out, two)


def test_a_process_that_sees_no_checkpoint_stops_all(images: Path, two: Path, tmp_path: Path) -> None:
    for name in ("shared", "own"):  # as where each machine has a disk of its own
        shutil.copytree(two, tmp_path / name)
    shutil.rmtree(tmp_path / "own" / "checkpoints")
    arguments_ = arguments(images, tmp_path / "shared", *SHORT, "--resume")
    ranks = commands.start_ranks(2, *arguments_, more=[(), ("--out", tmp_path / "own")])
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "The processes see different checkpoints" in ranks[0].stderr


def test_different_frames_are_refused(images: Path, tmp_path: Path) -> None:
    ranks = refused(images, tmp_path / "run", [("--frame-seed", 0), ("--frame-seed", 1)])
    assert ranks[0].stderr.splitlines()[-1] == (
        "error: The processes have computed different frames: install the same versions of torch and timm_etf on all "
        "machines."
    )
    assert not (tmp_path / "run").exists()


def test_accelerate_launch(images: Path, tmp_path: Path) -> None:
    # accelerate 1.15 starts one process for this command unless there is an MPI.
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
    launch += "--dynamo_backend no -m timm_etf.pretrain"
    verb, *rest = map(str, arguments(images, tmp_path / "run", "--epochs", 2))
    assert verb == "pretrain"
    done = subprocess.run(
        [sys.executable, *launch.split(), *rest], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("37 validation images") == 1
    if json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["processes"] == 1:
        assert "accelerate launched a single process" in done.stderr


CRASH = """
import os

from torch.optim.optimizer import register_optimizer_step_pre_hook

from timm_etf.cli import main

steps = 0


def fail(*_):
    global steps
    steps += 1
    if steps == 5 and os.environ.get("RANK", "1") == "1":
        raise RuntimeError("CUDA out of memory, or so")


if __name__ == "__main__":
    register_optimizer_step_pre_hook(fail)
    main()
"""


TWO = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


@pytest.mark.parametrize("launch", [[], pytest.param(TWO, marks=pytest.mark.slow)])
def test_a_crash_ends_every_process(images: Path, tmp_path: Path, launch: list[str]) -> None:
    (tmp_path / "crash.py").write_text(CRASH)
    command = [sys.executable, *launch, str(tmp_path / "crash.py")]
    command += map(str, arguments(images, tmp_path / "run", "--workers", 2))
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stderr=err, stdout=err, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    try:
        deadline = time.monotonic() + 120
        while "RuntimeError: CUDA out of memory, or so" not in (tmp_path / "err").read_text():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.wait(timeout=15) != 0
        assert not _processes_of(tmp_path)
    finally:
        for pid in _processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def _processes_of(folder: Path) -> list[int]:
    """Those with the folder in their command line: the launcher, its processes, and their loaders'."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in file.read_text():
                found.append(int(file.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found
