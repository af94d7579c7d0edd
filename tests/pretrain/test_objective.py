from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.loss
import torch
from torch import nn

import timm_etf
from tests.pretrain.runs import config, lines, weights
from timm_etf.classifier import features_into
from timm_etf.losses import FeatureEntropyLoss, NONLLoss, NTCELoss, gram_loss
from timm_etf.pretrain import data
from timm_etf.pretrain.loop import pretrain
from timm_etf.pretrain.objective import Objective
from timm_etf.pretrain.setup import setup


def objective(model: str = "test_resnet_etf", kwargs: dict[str, object] | None = None, **changes: object) -> tuple:
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=5, **kwargs or {}).eval()
    settings = config(Path("data"), Path("run"), model=model, **changes)
    return net, Objective(settings, net)


IMAGES, TARGETS = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


def test_cross_entropy_with_label_smoothing_is_timms() -> None:
    net, loss = objective(smoothing=0.2)
    expected = timm.loss.LabelSmoothingCrossEntropy(0.2)(net(IMAGES), TARGETS)
    torch.testing.assert_close(loss(net, IMAGES, TARGETS), expected)


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_mixup_is_timms_with_the_smoothing_in_its_targets(alphas: dict[str, float]) -> None:
    net, loss = objective(smoothing=0.1, **alphas)
    ours_mix = data.mixup(config(Path("data"), Path("run"), smoothing=0.1, **alphas), 5)
    assert ours_mix is not None
    for seed in range(4):
        np.random.seed(seed)
        ours = loss(net, *ours_mix(IMAGES.clone(), TARGETS))
        np.random.seed(seed)
        mixup = timm.data.Mixup(alphas.get("mixup", 0), alphas.get("cutmix", 0), label_smoothing=0.1, num_classes=5)
        images, targets = mixup(IMAGES.clone(), TARGETS)
        torch.testing.assert_close(ours, timm.loss.SoftTargetCrossEntropy()(net(images), targets))


def test_dot_regression_takes_the_classifiers_scale() -> None:
    net, loss = objective(kwargs={"feature_norm": True, "logit_scale": 9.0}, loss="dot_regression", smoothing=0.1)
    cosines = net(IMAGES)[range(6), TARGETS] / 9
    torch.testing.assert_close(loss(net, IMAGES, TARGETS), 9 / 2 * (1 - cosines).square().mean())


@pytest.mark.parametrize("kwargs", [{}, {"projector": "mlp"}, {"feature_norm": True, "logit_scale": 9.0}], ids=str)
def test_half_of_the_gram_loss_is_cross_entropy(kwargs: dict[str, object]) -> None:
    net, loss = objective(kwargs=kwargs, loss="gram", smoothing=0.1)
    features = net.forward_head(net.forward_features(IMAGES), pre_logits=True)
    expected = (
        nn.functional.cross_entropy(net(IMAGES), TARGETS)
        + gram_loss(net.fc.projector(features) if net.fc.projector else features, net.fc.weight, TARGETS)
    ) / 2
    torch.testing.assert_close(loss(net, IMAGES, TARGETS), expected)
    with pytest.raises(timm_etf.UsageError, match="--loss gram needs one fixed classifier"):
        objective(loss="gram", kwargs={"frame": "learned"})


@pytest.mark.parametrize("kwargs", [{}, {"projector": "mlp"}, {"frame": "learned"}], ids=str)
def test_the_entropy_term_is_that_of_the_backbones_features(kwargs: dict[str, object]) -> None:
    net, loss = objective(kwargs=kwargs, feature_entropy=0.5, smoothing=0.0)
    features = net.forward_head(net.forward_features(IMAGES), pre_logits=True)
    expected = nn.functional.cross_entropy(net(IMAGES), TARGETS) + 0.5 * FeatureEntropyLoss()(features)
    torch.testing.assert_close(loss(net, IMAGES, TARGETS), expected)


def test_features_are_collected_only_while_asked_for() -> None:
    net, _ = objective()
    with features_into(net) as features:
        net(IMAGES), net(IMAGES[:2])
    net(IMAGES)
    assert [x.shape for x in features] == [(6, 96), (2, 96)]


def test_a_run_with_all_of_it_resumes_to_the_same_weights(images: Path, tmp_path: Path) -> None:
    changes = {
        "epochs": 3,
        "model_kwargs": ("projector=mlp", "feature_norm=True", "logit_scale=8", "frame=orthonormal"),
        "mixup": 0.2,
        "cutmix": 1.0,
        "feature_entropy": 0.05,
    }
    straight, broken = config(images, tmp_path / "straight", **changes), config(images, tmp_path / "broken", **changes)
    pretrain(straight)

    class Stop(Exception):
        pass

    from timm_etf.pretrain import checkpoint

    save = checkpoint.save

    def save_and_stop(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        raise Stop

    checkpoint.save = save_and_stop  # type: ignore[assignment]
    try:
        with pytest.raises(Stop):
            pretrain(broken)
    finally:
        checkpoint.save = save
    pretrain(config(images, tmp_path / "broken", resume=True, **changes))
    ours, theirs = weights(tmp_path / "broken"), weights(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert [line["top1"] for line in lines(tmp_path / "broken")] == [
        line["top1"] for line in lines(tmp_path / "straight")
    ]
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'broken' / 'export'}", pretrained=True)
    assert net.num_classes == 0


OVER_BATCH = pytest.mark.parametrize("loss", ["ntce", "nonl"])
COSINES = {"feature_norm": True, "logit_scale": 5.0}


@pytest.mark.parametrize(("loss", "temperature"), [("normface", 0.2), ("ntce", 0.2), ("nonl", 0.2)])
@pytest.mark.parametrize("frame", ["simplex", "learned"])
def test_losses_of_cosines_ask_it_of_the_classifier(
    loss: str, temperature: float, frame: str, images: Path, tmp_path: Path
) -> None:
    settings = config(
        images, tmp_path / "run", loss=loss, temperature=temperature, model_kwargs=(f"frame={frame}",), smoothing=0.3
    )
    run = setup(settings)
    run.close()
    head = run.plain_model.fc
    assert (head.feature_norm, head.scale) == (True, pytest.approx(5.0, rel=1e-6))
    net = run.plain_model.eval()
    x, targets = IMAGES[:, :, :32, :32], TARGETS
    features = nn.functional.normalize(net.forward_head(net.forward_features(x), pre_logits=True), dim=1)
    z = 5 * features @ nn.functional.normalize(head.weight, dim=1).T
    if loss == "normface":
        expected = nn.functional.cross_entropy(z, targets)  # without smoothing
    else:
        expected = {"ntce": NTCELoss, "nonl": NONLLoss}[loss]()(z, targets)
    torch.testing.assert_close(run.step.objective(net, x, targets), expected)


def after_a_step(images: Path, out: Path, **changes: object) -> tuple[float, dict[str, torch.Tensor], list]:
    """Loss of a run's first step, what the model is then, and the logits of its forward passes."""
    run = setup(config(images, out, lr=0.05, **changes))
    logits: list[torch.Tensor] = []
    run.plain_model.get_submodule(run.plain_model.pretrained_cfg["classifier"]).register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach())
    )
    run.step.train()
    loss = run.step(islice(run.train.epoch(0), run.batches_of(0)), run.batches_of(0), 0)
    run.close()
    return loss.item(), {k: v.clone() for k, v in run.plain_model.state_dict().items()}, logits


@OVER_BATCH
def test_batches_of_a_step_are_compared_as_one(loss: str, images: Path, tmp_path: Path) -> None:
    changes = {"model": "test_vit_etf", "loss": loss}  # which has no statistics over a batch
    value, whole, _ = after_a_step(images, tmp_path / "whole", batch_size=32, **changes)
    in_parts, parts, _ = after_a_step(images, tmp_path / "parts", batch_size=8, grad_accum_steps=4, **changes)
    assert in_parts == pytest.approx(value, rel=1e-5)
    assert all(torch.allclose(v, whole[k], atol=1e-6) for k, v in parts.items())


@OVER_BATCH
@pytest.mark.parametrize("model", ["test_resnet_etf", "test_resnet_sw_etf"])
def test_the_look_at_a_steps_batches_leaves_no_trace(loss: str, model: str, images: Path, tmp_path: Path) -> None:
    changes = {"model": model, "batch_size": 8, "grad_accum_steps": 4, "model_kwargs": ("drop_rate=0.3",)}
    _, ours, logits = after_a_step(images, tmp_path / "ours", loss=loss, reprob=0.5, **changes)
    drawn = torch.get_rng_state()
    assert len(logits) == 8
    for looked, trained in zip(logits[:4], logits[4:], strict=True):
        assert torch.equal(looked, trained)  # dropped and erased alike
    _, plain, logits = after_a_step(images, tmp_path / "plain", loss="normface", reprob=0.5, **changes)
    assert len(logits) == 4
    assert torch.equal(torch.get_rng_state(), drawn)
    statistics = [k for k in plain if "running" in k or "tracked" in k]  # each norm has seen each batch once
    assert statistics
    assert all(torch.equal(ours[k], plain[k]) for k in statistics)


def test_settings_that_do_not_go_with_losses_of_cosines() -> None:
    for changes, fix in (
        ({"loss": "nonl", "model": "test_resnet"}, "use --model test_resnet_etf"),
        ({"loss": "nonl", "mixup": 0.2}, "leave out --mixup"),
        ({"loss": "nonl", "model_kwargs": ("logit_scale=3",)}, "use --temperature"),
        ({"loss": "normface", "model_kwargs": ("feature_norm=no",)}, "leave out --model-kwargs feature_norm"),
        ({"temperature": 0.1}, "--temperature belongs to"),
        ({"loss": "ntce", "temperature": 0.0}, "--temperature must be in"),
        ({"loss": "ntce", "batch_size": 1}, "compares"),
    ):
        with pytest.raises(timm_etf.UsageError, match=fix):
            config(Path("data"), Path("run"), **changes).check()


def test_a_thousand_classes_on_a_narrow_whitened_backbone(shards: Path, tmp_path: Path) -> None:
    # More classes than 2d, whitening and dot regression together, through to an export that loads. Shards do not say
    # how many classes there are.
    pretrain(
        config(
            shards,
            tmp_path / "run",
            model="test_resnet_sw_etf",
            dataset="wds/x",
            train_split="train-{0000..0001}.tar|122",
            val_split="validation-0000.tar|37",
            num_classes=300,
            loss="dot_regression",
            model_kwargs=("feature_norm=True",),
        )
    )
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert net.fc.frame == "spherical_code"
    assert net.fc.feature_norm
