"""A classifier that follows a tree of the classes, or a frame of one's own: in a model, exported and loaded."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_etf
from timm_etf import UsageError, fix_classifier, frames, hub
from timm_etf.frames import ClassTree

TREE = ClassTree(tuple(f"{i // 6}/{i // 2}/c{i}" for i in range(18)), gamma=2.0)


def model(num_classes: int = 18, name: str = "test_resnet", **options: object) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, **options).eval()


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_every_head_follows_the_tree() -> None:
    net = fix_classifier(model(), TREE, seed=3, logit_scale=4.0)
    assert torch.equal(net.fc.weight, (4 * TREE.frame(96, seed=3)).float())
    assert (net.fc.frame, net.fc.seed, net.fc.tree) == ("hierarchy", 3, TREE)
    wide = model(150, "test_resnet_etf", frame=ClassTree(tuple(f"{i % 7}/{i}" for i in range(150))), projector="mlp")
    gram = frames.hierarchy(wide.fc.tree.distance, 149)
    torch.testing.assert_close(wide.fc.weight @ wide.fc.weight.T, (gram @ gram.T).float(), atol=1e-5, rtol=0)
    copied = copy.deepcopy(net)
    assert torch.equal(logits(copied), logits(net))
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is deprecated
        assert torch.equal(logits(torch.jit.script(net)), logits(net))


def test_a_tree_on_the_meta_device_becomes_its_frame() -> None:
    with torch.device("meta"):
        net = fix_classifier(timm.create_model("test_resnet", num_classes=18), TREE, seed=3)
    real = net.to_empty(device="cpu")
    assert torch.equal(real.fc.weight, TREE.frame(96, seed=3).float())


def test_only_weights_of_the_same_tree_are_taken() -> None:
    net, turned = fix_classifier(model(), TREE), fix_classifier(model(), TREE, seed=5)
    net.load_state_dict(turned.state_dict())
    assert torch.equal(net.fc.weight, turned.fc.weight)
    assert (net.fc.seed, net.fc.tree) == (None, TREE)
    other = fix_classifier(model(), ClassTree(TREE.paths[::-1][1:] + TREE.paths[-1:], gamma=2.0))
    assert frames.coherence(other.fc.weight) == pytest.approx(frames.coherence(net.fc.weight), abs=1e-6)
    for wrong in (other, fix_classifier(model()), model()):
        with pytest.raises(RuntimeError, match="no hierarchy frame"):
            net.load_state_dict(wrong.state_dict())


@pytest.mark.parametrize("options", [{}, {"logit_scale": 3.0}, {"feature_norm": True, "logit_scale": 9.0}], ids=str)
@pytest.mark.parametrize("frame", ["tree", "own"])
def test_an_export_loads_bit_for_bit(tmp_path: Path, frame: str, options: dict[str, object]) -> None:
    own = torch.nn.functional.normalize(torch.randn(18, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    net = model(name="test_resnet_etf", frame=TREE if frame == "tree" else own, frame_seed=7, **options)
    folder = hub.export(net, tmp_path / "model")
    again = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(logits(again), logits(net))
    assert torch.equal(again.fc.weight, net.fc.weight)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(plain.fc) is nn.Linear
    assert torch.equal(plain.fc.weight, net.fc.weight)
    if not options.get("feature_norm"):
        assert torch.equal(logits(plain), logits(net))
    etf = json.loads((folder / "config.json").read_text())["etf"]
    untrained = timm_etf.create_model(f"local-dir:{folder}")
    card = (folder / "README.md").read_text()
    if frame == "own":
        assert (etf["frame"], etf["seed"], etf["tree"], again.fc.frame) == ("own", None, None, "own")
        assert untrained.fc.frame == "simplex"
        assert "this tree" not in card
    else:
        assert (again.fc.frame, again.fc.seed, again.fc.tree) == ("hierarchy", 7, TREE)
        assert (etf["tree"]["sha256"], etf["tree"]["gamma"]) == (TREE.sha256, 2.0)
        assert torch.equal(untrained.fc.weight, net.fc.weight)
        assert "all (18)\n  0 (6)\n    0 (2): c0, c1\n" in card
        assert f"gamma 2, SHA-256 `{TREE.sha256[:12]}`" in card


@pytest.mark.parametrize("damage", [None, {"paths": ["a"], "gamma": 2.0, "sha256": "x"}, "sha256"])
def test_a_damaged_tree_is_named(tmp_path: Path, damage: object) -> None:
    folder = hub.export(fix_classifier(model(), TREE), tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    found["etf"]["tree"] = {**found["etf"]["tree"], "gamma": -1} if damage == "sha256" else damage
    (folder / "config.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match=r"etf block .* is damaged \(see 'tree'\)"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
