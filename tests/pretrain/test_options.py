"""Options of a step and of a model, each against a calculation of its own."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.pretrain.runs import config, lines, weights
from timm_etf import UsageError
from timm_etf.pretrain.loop import pretrain
from timm_etf.pretrain.setup import setup

PLAIN: dict[str, Any] = {
    "opt": "momentum",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "sched": "none",
    "lr": 0.1,
    "smoothing": 0.0,
}
"""Plain gradient descent, so that a step is its gradient."""

EVERY_STEP: dict[str, Any] = {"checkpoint_steps": 1, "checkpoint_hist": 100}


def states(run: Path) -> list[dict[str, torch.Tensor]]:
    """The weights at each checkpoint."""
    return [load_file(c / "model.safetensors") for c in sorted((run / "checkpoints").iterdir())]


def test_the_average_is_that_of_the_weights_after_each_step(images: Path, tmp_path: Path) -> None:
    settings = {**PLAIN, **EVERY_STEP, "model_ema": True, "model_ema_decay": 0.7}
    results = pretrain(config(images, tmp_path / "run", **settings))
    seen = states(tmp_path / "run")
    assert len(seen) == 7
    exported = weights(tmp_path / "run")
    for key, value in exported.items():
        if not value.is_floating_point():
            continue
        average = seen[0][key].double()  # timm's starts after the first step
        for state in seen[1:]:
            average = 0.7 * average + 0.3 * state[key].double()
        assert torch.allclose(value.double(), average, atol=1e-6), key
    assert any(not torch.allclose(exported[k], seen[-1][k], atol=1e-4) for k in exported)
    # What is validated is what is exported, and beside it what is trained.
    by_weights = {}
    for name, state in (("top1", exported), ("raw_top1", seen[-1])):
        net = timm.create_model("test_resnet", num_classes=5).eval()
        net.load_state_dict(state)
        by_weights[name] = _top1(net, images)
    line = lines(tmp_path / "run")[-1]
    assert {k: line[k] for k in by_weights} == pytest.approx(by_weights)
    assert results["source"]["top1"] == line["top1"]


def _top1(net: Any, images: Path) -> float:
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    about = {**timm.data.resolve_data_config(model=net), "input_size": (3, 32, 32)}
    dataset.transform = timm.data.create_transform(**about)
    x, y = zip(*dataset, strict=True)
    with torch.no_grad():
        return 100 * (net(torch.stack(x)).argmax(1) == torch.tensor(y)).float().mean().item()


def _gradients_of_steps(run: Path, lr: float) -> list[dict[str, torch.Tensor]]:
    """What each step has taken the weights by, over the learning rate."""
    seen = states(run)
    return [{k: (a[k] - b[k]) / lr for k in a} for a, b in pairwise(seen)]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_is_the_gradient_of_the_mean_over_its_batches(images: Path, tmp_path: Path, accumulated: int) -> None:
    # 122 images are 15 batches of 8: with three to a step five whole steps; with four the last has three.
    settings = {**PLAIN, **EVERY_STEP, "model": "test_vit_etf", "img_size": 160, "batch_size": 8}
    settings |= {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    settings |= {"grad_accum_steps": 4} if accumulated == 3 else {"grad_accum_steps": 1}
    pretrain(config(images, tmp_path / "run", **settings))
    before, after = states(tmp_path / "run")[-2:]
    run = setup(config(images, tmp_path / "other", **settings))
    batches = list(run.train.epoch(0))[-accumulated:]
    net = timm.create_model("test_vit_etf", num_classes=5).double()
    net.load_state_dict(before)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    x = run.step.pixels(x).double()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    for name, parameter in net.named_parameters():
        expected = before[name].double() - 0.1 * parameter.grad
        assert torch.allclose(after[name].double(), expected, atol=1e-6), name
    run.close()


def test_clipping(images: Path, tmp_path: Path) -> None:
    taken = {}
    for mode in ("norm", "value"):
        settings = {**PLAIN, **EVERY_STEP, "clip_grad": 0.01, "clip_mode": mode}
        pretrain(config(images, tmp_path / mode, **settings))
        trained = {n for n, _ in timm.create_model("test_resnet_etf", num_classes=5).named_parameters()}
        taken[mode] = [
            torch.cat([g[k].flatten() for k in sorted(trained)]) for g in _gradients_of_steps(tmp_path / mode, 0.1)
        ]
    assert [g.norm().item() for g in taken["norm"]] == pytest.approx([0.01] * 6, rel=1e-2)
    assert all(0.0099 < g.abs().max() < 0.0101 for g in taken["value"])
    assert all(g.norm() > 0.02 for g in taken["value"])


def test_adaptive_clipping_spares_the_classifier_and_nothing_else(images: Path, tmp_path: Path) -> None:
    for model, spared in (("test_resnet_etf", set()), ("test_resnet", {"fc.weight", "fc.bias"})):
        run = setup(config(images, tmp_path / "run", model=model, clip_grad=0.01, clip_mode="agc"))
        clipped = {id(p) for p in run.step.clipped}
        assert {n for n, p in run.plain_model.named_parameters() if id(p) not in clipped} == spared
        run.close()
    pretrain(config(images, tmp_path / "run", clip_grad=0.01, clip_mode="agc"))


def test_layers_learn_at_the_same_rates_under_both_classifiers(images: Path, tmp_path: Path) -> None:
    rates = {}
    for model in ("test_vit_etf", "test_vit"):
        settings = {"model": model, "img_size": 160, "layer_decay": 0.5, "sched": "constant", "lr": 0.1}
        run = setup(config(images, tmp_path / "run", **settings))
        run.step.schedule.step_update(0)
        names = {id(p): name for name, p in run.plain_model.named_parameters()}
        rates[model] = {names[id(p)]: g["lr"] for g in run.step.optimizer.param_groups for p in g["params"]}
        run.close()
    head = {k: rates["test_vit"].pop(k) for k in ("head.weight", "head.bias")}
    assert rates["test_vit_etf"] == rates["test_vit"]
    assert set(head.values()) == {0.1}
    assert rates["test_vit"]["blocks.5.norm1.weight"] == 0.05
    assert rates["test_vit"]["blocks.4.norm1.weight"] == 0.025


def test_compilation(images: Path, tmp_path: Path) -> None:
    for compiled in (False, True, False):  # accelerate keeps one state for all runs of a process
        run = setup(config(images, tmp_path / "run", compile=compiled, model_ema=True))
        run.close()
        assert isinstance(run.step.model, torch._dynamo.OptimizedModule) == compiled
        assert not isinstance(run.exported_model(), torch._dynamo.OptimizedModule)


def test_what_the_model_and_the_optimizer_are_told(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "test_vit_etf", "img_size": 160, "opt": "adamw", "drop_path": 0.3}
    settings |= {"opt_kwargs": ("betas=(0.8,0.9)", "eps=1e-5"), "grad_checkpointing": True}
    run = setup(config(images, tmp_path / "run", **settings))
    net = run.plain_model
    assert net.grad_checkpointing
    assert max(getattr(m, "drop_prob", 0) or 0 for m in net.modules()) == pytest.approx(0.3)
    assert {(g["betas"], g["eps"]) for g in run.step.optimizer.param_groups} == {((0.8, 0.9), 1e-5)}
    run.close()


@pytest.mark.parametrize(
    ("model", "changes", "last"),
    [
        ("test_resnet_etf", {}, True),
        ("test_resnet_etf", {"channels_last": False}, False),
        ("test_vit_etf", {"img_size": 160}, False),
        ("test_vit_etf", {"img_size": 160, "channels_last": True}, True),
    ],
)
def test_convolutional_networks_are_kept_in_channels_last_order(
    images: Path, tmp_path: Path, model: str, changes: dict[str, Any], last: bool
) -> None:
    run = setup(config(images, tmp_path / "run", model=model, **changes))
    weight = next(p for p in run.plain_model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == last
    assert (run.step.pixels.memory_format == torch.channels_last) == last
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"channels_last": False}, {"grad_checkpointing": True}])
def test_what_changes_the_way_of_computing_does_not_change_the_result(
    images: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "epochs": 2}
    plain = pretrain(config(images, tmp_path / "plain", **settings))["source"]
    other = pretrain(config(images, tmp_path / "other", **settings, **changes))["source"]
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    assert all(v.is_contiguous() for v in weights(tmp_path / "other").values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sync_bn": True}, "--sync-bn needs GPUs"),
        ({"layer_decay": 0.5, "sched": "none"}, "use --sched constant"),
        ({"opt_kwargs": ("lr=1",)}, "--opt-kwargs lr has an option of its own: use --lr"),
        ({"opt_kwargs": ("wings=2",)}, "check --opt"),
        ({"model_kwargs": ("drop_path_rate=0.1",)}, "use --drop-path"),
        ({"clip_grad": 0.0}, r"--clip-grad must be in \(0, inf\)"),
        ({"grad_accum_steps": 0}, "--grad-accum-steps must be in"),
        ({"model_ema_decay": 1.0}, "--model-ema-decay must be in"),
        ({"model": "test_mambaout_etf", "grad_checkpointing": True, "drop_path": 2.0}, "--drop-path must be in"),
    ],
)
def test_what_cannot_work_is_refused(images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
