"""More classes for a fixed classifier: old vectors and logits stay, names and what is taken are kept."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_etf
from timm_etf import UsageError, frames, grow_classifier, hub


def model(num_classes: int, taken: int | None = None, name: str = "test_resnet_etf", **options: object) -> nn.Module:
    net = timm.create_model(name, num_classes=num_classes, **options).eval()
    if taken is not None:
        net.get_classifier().taken = taken
    return net


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("options", [{}, {"projector": "mlp"}, {"learn_scale": True}], ids=str)
def test_named_vertices_change_no_logit(options: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    net = model(12, 8, **options)
    weight, before = net.fc.weight.clone(), logits(net)
    with caplog.at_level(logging.WARNING):
        assert grow_classifier(net, ["lynx", "seal"]) is net
    assert (net.fc.taken, net.num_classes, net.fc.out_features) == (10, 12, 12)
    assert torch.equal(net.fc.weight, weight)
    assert torch.equal(logits(net), before)
    assert not caplog.text
    assert "taken=10" in repr(net.fc)


@pytest.mark.parametrize(
    ("num_classes", "taken", "frame", "after"),
    [
        (120, None, "orthoplex", 0.0),  # beside 96 features
        (10, 8, "own", 0.0),  # a simplex: the new ones are orthogonal to it
        (193, 192, "own", None),  # a spherical code
        (97, None, "own", None),
    ],
)
def test_beyond_the_reserved_ones_old_vectors_stay_and_the_cost_is_said(
    num_classes: int, taken: int | None, frame: str, after: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    net = model(num_classes, taken, logit_scale=3.0)
    head = net.fc
    weight, before = head.weight.clone(), logits(net)
    names = [f"new{i}" for i in range(4)]
    further = 4 - (num_classes - (taken or num_classes))
    with caplog.at_level(logging.WARNING):
        grow_classifier(net, names)
    assert net.fc is head
    assert head.weight.shape == (num_classes + further, head.in_features)
    assert (net.num_classes, head.taken, head.frame) == (num_classes + further, num_classes + further, frame)
    assert torch.equal(head.weight[:num_classes], weight)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full((num_classes + further,), 3.0))
    # A larger matrix product may add up in another order.
    torch.testing.assert_close(logits(net)[:, :num_classes], before, atol=1e-5, rtol=1e-5)
    reached = frames.coherence(head.weight)
    assert f"goes from {frames.coherence(weight):.4f} to {reached:.4f}" in caplog.text.replace("-0.0000", "0.0000")
    if after is not None:
        assert reached == pytest.approx(after, abs=1e-6)
    if frame == "orthoplex":
        again = frames.orthoplex(num_classes + further, 96, seed=head.seed)
        torch.testing.assert_close(head.weight, (3 * again).float(), atol=1e-6, rtol=0)


def test_what_is_taken_and_its_names_are_exported(tmp_path: Path) -> None:
    net = model(6, 3)
    folder = hub.export(net, tmp_path / "old", label_names=["a", "b", "c"])
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c", "reserved 1", "reserved 2", "reserved 3"]
    assert config["etf"]["taken"] == 3
    assert "The first 3 are classes; the others are reserved" in (folder / "README.md").read_text()
    net = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
    before = logits(net)
    with pytest.raises(UsageError, match="class 'b' is there already"):
        grow_classifier(net, ["d", "b"])
    assert net.fc.taken == 3
    grow_classifier(net, ["d"])
    folder = hub.export(net, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c", "d", "reserved 1", "reserved 2"]
    assert config["etf"]["taken"] == 4
    for create in (timm.create_model, timm_etf.create_model):
        assert torch.equal(logits(create(f"local-dir:{folder}", pretrained=True).eval()), before)
    grow_classifier(net, ["e", "f", "g", "h"])  # two more than there were vertices for
    folder = hub.export(net, tmp_path / "grown")
    grown = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert (grown.fc.frame, grown.fc.taken, grown.num_classes) == ("own", 8, 8)
    assert grown.pretrained_cfg["label_names"] == list("abcdefgh")
    assert torch.equal(logits(grown), logits(net.eval()))
    assert "reserved" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("taken", [-1, 7, "3"])
def test_a_damaged_count_is_named(tmp_path: Path, taken: object) -> None:
    folder = hub.export(model(6, 3), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["etf"]["taken"] = taken
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"damaged \(see 'taken'\)"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)


def test_what_cannot_grow_is_refused() -> None:
    with pytest.raises(UsageError, match="has no fixed classifier to grow"):
        grow_classifier(timm.create_model("test_resnet", num_classes=5), ["a"])
    for names, says in ((["a", "a"], "class 'a' is there already"), ("ab", "list of texts"), ([1], "list of texts")):
        with pytest.raises(UsageError, match=says):
            grow_classifier(model(5), names)


def test_a_convolution_and_several_classifiers_grow_alike() -> None:
    net = model(8, 7, "dla46_c_etf")
    before, weight = logits(net), net.fc.weight.clone()
    assert weight.dim() == 4
    grow_classifier(net, ["a", "b"])
    assert torch.equal(net.fc.weight[:8], weight)
    torch.testing.assert_close(logits(net)[:, :8], before, atol=1e-5, rtol=1e-5)
    pair = model(8, None, "deit_tiny_distilled_patch16_224_etf")
    grow_classifier(pair, ["new"])
    assert pair.head.weight.shape == (9, 192)
    assert torch.equal(pair.head.weight, pair.head_dist.weight)
