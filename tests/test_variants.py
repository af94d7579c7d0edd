from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_etf
from tests import commands
from tests.sweep_variants import check
from timm_etf import FixedClassifier, UsageError, fix_classifier, frames, published
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.variants import NO_PROVENANCE, SUFFIX, base_name, skipped

# One of each kind of head and of builder: Linear, 1x1 Conv2d, distilled pair, branches of two widths, NormMlp and
# MLP heads, heads on lists, a model without a classifier by default, a builder that looks at its configuration.
SPREAD = [
    "resnet50",
    "dla34",
    "resnetv2_50",
    "dpn68",
    "deit_tiny_distilled_patch16_224",
    "crossvit_9_240",
    "convnext_atto",
    "caformer_s18",
    "efficientvim_m1_dist",
    "levit_128s",
    "repvit_m0_9",
    "efficientvit_b0",
    "mobilenetv3_small_050",
    "vgg11",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "samvit_base_patch16",
    "deepseek_vit_412m_align",
    "test_nfnet",
    "regnetx_002",
    "tf_efficientnet_b0",
]


@pytest.mark.parametrize("name", SPREAD)
def test_variant_is_the_base_with_a_fixed_head(name: str) -> None:
    assert check(name + SUFFIX)[1] is None


def test_every_name_has_a_variant_or_a_reason() -> None:
    names = [n for n in timm.list_models() if not n.endswith(SUFFIX)]
    variants = timm.list_models(f"*{SUFFIX}")
    assert {base_name(n) for n in variants} == set(names) - set(skipped)
    assert len(skipped) < 0.02 * len(names)
    assert timm.list_models(f"*{SUFFIX}", pretrained=True) == sorted(published.NAMES)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "dla46_c", "deit_tiny_distilled_patch16_224"])
def test_trains_and_evaluates(name: str) -> None:
    net = timm.create_model(name + SUFFIX, num_classes=10, in_chans=1)
    x = torch.randn(2, 1, *net.pretrained_cfg["input_size"][1:])
    before = [head.weight.clone() for _, head in fixed_classifiers(net)]
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net.eval()(x).shape == (2, 10)
    assert all(torch.equal(b, h.weight) for b, (_, h) in zip(before, fixed_classifiers(net), strict=True))


def test_same_seed_gives_the_same_backbone_as_the_base() -> None:
    torch.manual_seed(3)
    base = timm.create_model("test_resnet", num_classes=10)
    torch.manual_seed(3)
    variant = timm.create_model("test_resnet_etf", num_classes=10)
    theirs = base.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in variant.state_dict().items() if not k.startswith("fc."))


def test_timms_keyword_arguments_behave_as_for_the_base() -> None:
    assert timm.create_model("test_vit_etf", img_size=96, num_classes=10)(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    assert timm.create_model("test_resnet_etf", num_classes=0)(torch.randn(1, 3, 64, 64)).shape == (1, 96)
    assert isinstance(timm.create_model("test_resnet_etf", num_classes=0).fc, nn.Identity)
    features = timm.create_model("test_resnet_etf", features_only=True)
    assert len(features(torch.randn(1, 3, 64, 64))) == len(features.feature_info)
    dropped = timm.create_model("test_vit_etf", num_classes=10, drop_path_rate=0.3)
    assert dropped.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripts_as_the_base_does() -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10, scriptable=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(x), net(x))


def test_frame_seed() -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10, frame="simplex", frame_seed=4)
    assert torch.equal(net.fc.weight, frames.simplex(10, 96, seed=4).float())
    assert (net.fc.seed, net.fc.frame) == (4, "simplex")


def test_the_classifiers_arguments_are_keyword_arguments() -> None:
    net = timm.create_model(
        "test_resnet_etf", num_classes=10, frame="gaussian", frame_seed=2, logit_scale=8.0, feature_norm=True
    )
    assert torch.equal(net.fc.weight, (8 * frames.gaussian(10, 96, seed=2)).float())
    assert net.fc.feature_norm
    net = timm.create_model("test_resnet_etf", num_classes=10, projector="mlp", learn_scale=True)
    assert {n for n, _ in net.fc.named_parameters()} >= {"logit_scale", "projector.0.weight"}
    assert isinstance(timm.create_model("test_resnet_etf", num_classes=10, frame="learned").fc, nn.Linear)
    assert timm.create_model("resnet18_etf").fc.frame == "orthoplex"
    with pytest.raises(UsageError, match=r"1000 classes needs features of width 999 or more, got 512"):
        timm.create_model("resnet18_etf", frame="simplex")
    with pytest.raises(TypeError, match="frame"):  # the plain and the whitened model have no such argument
        timm.create_model("test_resnet_sw", frame="simplex")


def test_weights_from_a_file_take_the_scale_that_is_asked_for(tmp_path: Path) -> None:
    source = fix_classifier(timm.create_model("test_resnet", num_classes=10), seed=9, logit_scale=4.0)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 10}
    as_it_is = timm.create_model("test_resnet_etf", **arguments)
    assert torch.equal(as_it_is.fc.weight, source.fc.weight)
    rescaled = timm.create_model("test_resnet_etf", logit_scale=1.0, **arguments)
    torch.testing.assert_close(rescaled.fc.weight, source.fc.weight / 4)


def test_provenance_of_the_base_is_not_inherited() -> None:
    net = timm.create_model("resnet50_etf", num_classes=10)
    assert timm.get_pretrained_cfg("resnet50").hf_hub_id  # there was something to inherit
    assert not {k for k in NO_PROVENANCE if net.pretrained_cfg.get(k)}
    assert net.pretrained_cfg["architecture"] == "resnet50_etf"


def test_no_published_weights_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match="timm-etf pretrain --model resnet101_etf"):
        timm.create_model("resnet101_etf", pretrained=True)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(none_such\) for resnet50_etf"):
        timm.create_model("resnet50_etf.none_such")


@pytest.mark.parametrize("head", ["learned", "etf"])
def test_weights_from_a_file(tmp_path: Path, head: str) -> None:
    # A learned checkpoint gives its backbone and the frame is fixed around it; one trained under a frame keeps its own.
    source = timm.create_model("test_resnet", num_classes=10)
    if head == "etf":
        fix_classifier(source, seed=9)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    net = timm.create_model("test_resnet_etf", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert torch.equal(net.conv1[0].weight, source.conv1[0].weight)
    expected = source.fc.weight if head == "etf" else frames.simplex(10, 96).float()
    assert torch.equal(net.fc.weight, expected)
    with pytest.raises(RuntimeError, match="no simplex frame") if head == "learned" else _no_error():
        timm.create_model("test_resnet_etf", checkpoint_path=str(tmp_path / "weights.pth"), num_classes=10)


def _no_error() -> object:
    from contextlib import nullcontext

    return nullcontext()


def test_several_heads_of_one_width_share_the_frame() -> None:
    net = timm.create_model("deit_tiny_distilled_patch16_224_etf", num_classes=10)
    assert classifier_names(net) == ("head", "head_dist")
    assert torch.equal(net.head.weight, net.head_dist.weight)
    assert net.head.weight.data_ptr() != net.head_dist.weight.data_ptr()  # safetensors refuses shared storage
    wide = timm.create_model("crossvit_9_240_etf", num_classes=10)
    assert [h.in_features for _, h in fixed_classifiers(wide)] == [128, 256]


def test_nothing_in_timm_is_patched() -> None:
    code = (
        "import timm, timm.models._registry as r\n"
        "before = {n: r._model_entrypoints[n] for n in timm.list_models()}\n"
        "import timm_etf\n"
        "assert all(r._model_entrypoints[n] is f for n, f in before.items())\n"
        "assert isinstance(timm.create_model('test_resnet').fc, __import__('torch').nn.Linear)"
    )
    commands.run(code=code, fresh=True, check=True)
    assert isinstance(timm_etf.create_model("test_resnet_etf", num_classes=10).fc, FixedClassifier)
