import copy

import pytest
import timm
import torch
from torch import nn

import timm_etf
from timm_etf import FixedClassifier, UsageError, fix_classifier, frames, free_classifier
from timm_etf.classifier import fixed_classifiers


def model(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def test_fixed_stays_fixed_through_training() -> None:
    net = fix_classifier(model()).train()
    before = net.fc.weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(net.fc.weight, before)
    assert torch.equal(net.fc.bias, torch.zeros(10))
    assert not [n for n, _ in net.named_parameters() if n.startswith("fc")]
    assert frames.is_simplex(net.fc.weight)


def test_logits_are_the_products_with_the_frame() -> None:
    net = fix_classifier(model(), seed=5).eval()
    x = torch.randn(2, 3, 64, 64)
    features = net.forward_head(net.forward_features(x), pre_logits=True).double()
    expected = features @ frames.simplex(10, 96, seed=5).T
    torch.testing.assert_close(net(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "dla46_c", "test_vit"])
def test_free_keeps_logits_and_trains_again(name: str) -> None:
    net = fix_classifier(model(name)).eval()
    x = torch.randn(2, 3, *net.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        fixed = net(x)
        freed = free_classifier(net)(x)
    assert torch.equal(fixed, freed)
    head = net.get_classifier()
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.weight.requires_grad
    assert not list(fixed_classifiers(net))


def test_reset_classifier_keeps_timms_meaning() -> None:
    net = fix_classifier(model())
    net.reset_classifier(7)
    assert isinstance(net.fc, nn.Linear)
    assert net.fc.weight.shape == (7, 96)
    assert net.fc.weight.requires_grad
    fix_classifier(net)
    assert isinstance(net.fc, FixedClassifier)
    assert frames.coherence(net.fc.weight) == pytest.approx(-1 / 6, abs=1e-6)


def test_refixing_changes_the_frame() -> None:
    net = fix_classifier(model(), seed=1)
    first = net.fc.weight.clone()
    assert not torch.equal(fix_classifier(net, seed=2).fc.weight, first)
    assert torch.equal(fix_classifier(net, seed=1).fc.weight, first)


def test_learned_weights_cannot_replace_the_frame() -> None:
    plain, net = model(), fix_classifier(model())
    frame = net.fc.weight.clone()
    with pytest.raises(RuntimeError, match=r"fc\.weight is no simplex frame.*fix_classifier\(model\)"):
        net.load_state_dict(plain.state_dict())
    assert torch.equal(net.fc.weight, frame)
    biased = {**net.state_dict(), "fc.bias": torch.ones(10)}
    with pytest.raises(RuntimeError, match="no simplex frame"):
        net.load_state_dict(biased)


def test_another_rotation_loads_and_is_no_longer_called_this_seed() -> None:
    net, other = fix_classifier(model(), seed=0), fix_classifier(model(), seed=3)
    net.load_state_dict(fix_classifier(model(), seed=0).half().state_dict())
    assert net.fc.seed == 0
    net.load_state_dict(other.state_dict())
    assert net.fc.seed is None
    assert torch.equal(net.fc.weight, other.fc.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_copies_traces_and_exports(dtype: torch.dtype) -> None:
    net = fix_classifier(model().to(dtype)).eval()
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        expected = net(x)
        assert net.fc.weight.dtype == expected.dtype == dtype
        assert torch.equal(copy.deepcopy(net)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), expected)
        assert torch.equal(torch.export.export(net, (x,)).module()(x), expected)


def test_ema_covers_the_frame() -> None:
    net = fix_classifier(model())
    ema = timm.utils.ModelEmaV3(net, decay=0.5)
    with torch.no_grad():
        net.conv1[0].weight.add_(1)
    ema.update(net)
    assert torch.equal(ema.module.fc.weight, net.fc.weight)
    assert not torch.equal(ema.module.conv1[0].weight, net.conv1[0].weight)


def test_models_without_a_classifier_say_so() -> None:
    with pytest.raises(UsageError, match="num_classes=N"):
        fix_classifier(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(UsageError, match="not features_only"):
        fix_classifier(timm.create_model("test_resnet", features_only=True))
    net = timm.create_model("test_resnet", num_classes=10)
    net.fc = nn.Bilinear(96, 96, 10)
    with pytest.raises(UsageError, match="is a Bilinear"):
        fix_classifier(net)


def test_a_frame_that_does_not_fit_changes_nothing() -> None:
    net = timm.create_model("test_resnet", num_classes=200)
    with pytest.raises(UsageError, match="at most 97 classes"):
        fix_classifier(net)
    assert isinstance(net.fc, nn.Linear)


def test_odd_weight_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\[K, d\] or \[K, d, 1, 1\]"):
        FixedClassifier(torch.zeros(3, 4, 3, 3))


def test_public_names() -> None:
    assert all(hasattr(timm_etf, name) for name in timm_etf.__all__)
