"""--fsdp, on two real processes."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import timm_etf
from tests import commands
from tests.pretrain.runs import arguments, assert_same, lines, wait_for_checkpoint, weights
from tests.pretrain.test_run import validate_by_hand
from timm_etf import FixedClassifier
from timm_etf.pretrain.sharding import blocks

# 3 images of the 37 validation images are one batch more for the first process than for the second.
VIT = ("--model", "test_vit_etf", "--img-size", 160, "--epochs", 2, "--batch-size", 6, "--clip-grad", 0.5)
VIT += ("--model-kwargs", "drop_rate=0.0", "--grad-accum-steps", 2, "--drop-path", 0.1)


@pytest.fixture(scope="module")
def sharded(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "run"
    commands.run_ranks(2, *arguments(images, out, *VIT, "--fsdp"))
    return out


def test_shards_learn_what_whole_models_learn(images: Path, sharded: Path, tmp_path: Path) -> None:
    commands.run_ranks(2, *arguments(images, tmp_path / "run", *VIT))
    ours, theirs = lines(sharded), lines(tmp_path / "run")
    for key in ("train_loss", "loss", "top1", "count"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-4), key
    ours, theirs = weights(sharded), weights(tmp_path / "run")
    assert all(torch.allclose(ours[k], theirs[k], atol=2e-3) for k in theirs)


def test_the_export_is_a_whole_model(images: Path, sharded: Path) -> None:
    net = timm_etf.create_model(f"local-dir:{sharded / 'export'}", pretrained=True)
    assert isinstance(net.head, FixedClassifier)
    expected = validate_by_hand(sharded, images)
    assert {k: lines(sharded)[-1][k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_interrupted_and_resumed_is_the_straight_run(images: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = commands.start_ranks(2, *arguments(images, out, *VIT, "--fsdp"))
    try:
        wait_for_checkpoint(out, ranks[0])
        ranks[0].send_signal(signal.SIGTERM)
        assert [rank.wait(timeout=60) for rank in ranks] == [128 + signal.SIGTERM] * 2
    finally:
        for rank in ranks:
            rank.kill()
    commands.run_ranks(2, *arguments(images, out, *VIT, "--fsdp", "--resume"))
    assert_same(out, sharded)


@pytest.mark.slow
def test_a_damaged_shard_sends_every_process_back(images: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharded, out)
    newest = max((out / "checkpoints").iterdir())
    shard = newest / "shards" / "__1_0.distcp"  # the second process'
    shard.write_bytes(shard.read_bytes()[:1000])
    main, _ = commands.run_ranks(2, *arguments(images, out, *VIT, "--fsdp", "--resume"))
    assert f"Cannot read the checkpoint {newest}" in main.stderr
    assert_same(out, sharded)


@pytest.mark.slow
def test_a_learned_classifier_is_sharded_too(images: Path, tmp_path: Path) -> None:
    command = arguments(images, tmp_path / "run", *VIT, "--fsdp", "--epochs", 1, "--warmup-epochs", 0, "--amp", "bf16")
    commands.run_ranks(2, *command, "--model", "test_vit")
    found = weights(tmp_path / "run")
    assert found["head.weight"].shape == (5, 64)
    assert all(v.dtype == torch.float32 for v in found.values())


@pytest.mark.slow
def test_shards_are_compiled_as_the_launcher_asks(images: Path, sharded: Path, tmp_path: Path) -> None:
    # The launcher's way, because it can name a backend that only traces.
    env = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    commands.run_ranks(2, *arguments(images, tmp_path / "run", *VIT, "--fsdp"), env=env)
    ours, theirs = lines(tmp_path / "run"), lines(sharded)
    for key in ("train_loss", "loss", "top1", "count"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-4), key


@pytest.mark.slow
def test_batch_norm_in_half_precision_and_channels_last(images: Path, tmp_path: Path) -> None:
    more = ("--fsdp", "--epochs", 3, "--amp", "bf16", "--channels-last", True, "--scale", 1, 1)
    commands.run_ranks(2, *arguments(images, tmp_path / "run", *more))
    log = lines(tmp_path / "run")
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert log[-1]["top1"] == pytest.approx(validate_by_hand(tmp_path / "run", images)["top1"], abs=3)  # an image


@pytest.mark.parametrize(
    "name", ["vit_large_patch16_224", "twins_pcpvt_small", "swin_tiny_patch4_window7_224", "resnet50"]
)
def test_blocks_hold_a_model_in_small_parts(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    sizes = {block: sum(p.numel() for p in block.parameters()) for block in blocks(model)}
    inner = [n for block, n in sizes.items() if not any(m in sizes for m in list(block.modules())[1:])]
    whole = sum(p.numel() for p in model.parameters())
    assert sum(inner) > 0.8 * whole
    assert max(inner) < 0.3 * whole


CODE = """
import sys, json
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from tests.pretrain.runs import config
from timm_etf.pretrain.setup import setup
from timm_etf.pretrain.validation import validate
sent = []
for name in ("all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor", "broadcast", "all_reduce"):
    def spy(*tensors, _call=getattr(torch.distributed, name), **kwargs):
        sent.extend(t.untyped_storage().data_ptr() for t in (*tensors, *kwargs.values()) if isinstance(t, torch.Tensor))
        return _call(*tensors, **kwargs)
    setattr(torch.distributed, name, spy)
run = setup(config(Path(sys.argv[1]), Path(sys.argv[2]), model="test_vit_etf", img_size=160, fsdp=True, batch_size=4))
net = run.step.model
run.step(iter([next(iter(run.train.epoch(0)))]), 1, 0)
parameters = list(net.parameters())
assert all(isinstance(p, DTensor) for p in parameters)
validate(run.accelerator, net, run.val, run.step.pixels)
frame = net.head.weight
assert not isinstance(frame, DTensor)
assert sent
assert frame.untyped_storage().data_ptr() not in sent
run.close()
local, whole = (sum(n) for n in zip(*[(p.to_local().numel(), p.numel()) for p in parameters]))
print(json.dumps([local, whole, frame.double().norm().item()]))
"""


def test_each_process_holds_half_and_the_frame_is_never_sent(images: Path, tmp_path: Path) -> None:
    done = commands.run_ranks(2, images, tmp_path / "run", code=CODE)
    held = [json.loads(rank.stdout.splitlines()[-1]) for rank in done]
    assert all(0.45 < local / whole < 0.55 for local, whole, _ in held)
    assert held[0][0] + held[1][0] == held[0][1]
    frame = timm.create_model("test_vit_etf", num_classes=5).head.weight
    assert [norm for *_, norm in held] == pytest.approx([frame.norm().item()] * 2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model-ema",), "--fsdp does not go with --model-ema"),
        (("--clip-grad", 1, "--clip-mode", "agc"), "--fsdp does not go with --clip-mode agc"),
        (("--amp", "fp16"), "fp16"),
        (("--opt", "lookahead_adamw"), "--fsdp cannot resume --opt lookahead_adamw exactly: leave out lookahead_."),
        (("--opt", "adamp"), "check --opt, which --fsdp makes work on shards."),
        (("--opt", "adafactor"), "check --opt, which --fsdp makes work on shards."),
        (("--model-kwargs", "learn_scale=yes"), "check --fsdp and --model-kwargs."),
    ],
)
def test_what_shards_cannot_do(images: Path, tmp_path: Path, more: tuple[Any, ...], says: str) -> None:
    ranks = commands.start_ranks(2, *arguments(images, tmp_path / "run", "--fsdp", *more))
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert says in ranks[0].stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_one_process_alone(images: Path, tmp_path: Path) -> None:
    done = commands.run(*arguments(images, tmp_path / "run", "--fsdp"))
    assert (done.returncode, "this is the only one" in done.stderr) == (2, True)
    done = commands.run(*arguments(images, tmp_path / "run"), env={"ACCELERATE_USE_FSDP": "true"})
    assert (done.returncode, "there is --fsdp" in done.stderr) == (2, True)
    shutil.rmtree(tmp_path)
