"""Ready checkpoints under the frame nearest to their classifier: in place, by timm's tags, and through the Hub."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn

import timm_etf
from tests.hub.conftest import Client
from tests.hub.conftest import client as client
from tests.hub.conftest import server as server
from tests.hub.loopback import Hub
from tests.pretrain.runs import config
from timm_etf import UsageError, fix_classifier, frames, hub
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.pretrain.loop import pretrain


def trained(name: str, num_classes: int) -> nn.Module:
    """A model whose classifiers' rows are in groups, as if they had been trained."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=num_classes)
    with torch.no_grad():
        for classifier in classifier_names(net):
            weight = net.get_submodule(classifier).weight
            groups = torch.randn(4, *weight.shape[1:])
            weight.copy_(0.1 * (torch.randn(weight.shape) + groups[torch.arange(num_classes) % 4]))
    return net.eval()


def num_heads(net: nn.Module) -> int:
    return len(list(fixed_classifiers(net)))


@pytest.mark.parametrize(
    ("name", "num_classes", "kind"),
    [("test_resnet", 20, "simplex"), ("test_vit", 150, "nearest"), ("deit_tiny_distilled_patch16_224", 20, "simplex")],
)
def test_the_nearest_frame_keeps_most_of_what_a_model_says(
    name: str, num_classes: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = trained(name, num_classes)
    x = torch.randn(64, *net.pretrained_cfg["input_size"])[:, :, :64, :64] if name == "test_resnet" else None
    rows = {n: net.get_submodule(n).weight.detach().clone() for n in classifier_names(net)}
    features = torch.randn(2000, next(iter(rows.values())).shape[1])
    said = {n: (features @ w.T).argmax(1) for n, w in rows.items()}
    with caplog.at_level("INFO"):
        fix_classifier(net, frame="nearest")
    for n, head in fixed_classifiers(net):
        assert (head.frame, head.seed) == (kind, None)
        assert set(head.origin) == {"from", "mean_cosine", "rows_sha256"}
        assert head.origin["from"] is None  # a configuration's tag does not say whose weights a model holds
        assert f"mean cosine {head.origin['mean_cosine']}" in caplog.text
        kept = ((features @ head.weight.T).argmax(1) == said[n]).float().mean()
        other = frames.make("auto", num_classes, head.in_features, seed=1).float()
        assert kept > 0.25 > 0.1 > ((features @ other.T).argmax(1) == said[n]).float().mean()
        # The scale is that of the least squares.
        centred = rows[n] - rows[n].mean(0)
        for factor in (0.99, 1.01):
            assert (centred - head.weight).norm() < (centred - factor * head.weight).norm()
    folder = hub.export(net, tmp_path / "export")
    said_on_card = " ".join((folder / "README.md").read_text().split())
    assert "that was trained under a learned classifier" in said_on_card
    assert f"mean cosine of a row and its vector {head.origin['mean_cosine']})" in said_on_card or num_heads(net) > 1
    assert "frozen from the first step" not in said_on_card
    again = timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    for (_, ours), (_, theirs) in zip(fixed_classifiers(net), fixed_classifiers(again), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.frame, ours.origin) == (theirs.frame, theirs.origin)
    if x is not None:
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(plain(x), net(x))


def test_another_frame_that_is_loaded_has_another_origin() -> None:
    net = fix_classifier(trained("test_resnet", 20), frame="nearest")
    net.load_state_dict({**net.state_dict(), "fc.weight": net.fc.weight.clone()})
    assert net.fc.origin
    net.load_state_dict({**net.state_dict(), "fc.weight": frames.simplex(20, 96, seed=5).float()})
    assert net.fc.origin is None


def test_a_run_has_nothing_to_be_near_to(images: Path, tmp_path: Path) -> None:
    settings = {"model_kwargs": ("frame=nearest",)}
    with pytest.raises(UsageError, match="use --init with --keep-classifier"):
        pretrain(config(images, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_nearest_says_when_there_is_nothing_to_be_near_to(caplog: pytest.LogCaptureFixture) -> None:
    fixed = fix_classifier(timm.create_model("resnet10t", num_classes=100), frame="nearest")
    assert "spread as random ones are" in caplog.text
    assert fixed.fc.origin["from"] is None
    with pytest.raises(UsageError, match="projector"):
        fix_classifier(timm.create_model("test_resnet"), frame="nearest", projector="mlp")
    net = timm.create_model("test_resnet", num_classes=10)
    nn.init.zeros_(net.fc.weight)
    with pytest.raises(UsageError, match="all alike"):
        fix_classifier(net, frame="nearest")
    assert isinstance(net.fc, nn.Linear)


TAGGED = """
import json, sys, timm, timm_etf, torch
net = timm.create_model("test_resnet_etf.r160_in1k", pretrained=True, **json.loads(sys.argv[1])).eval()
plain = timm.create_model("test_resnet.r160_in1k", pretrained=True).eval()
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    same = torch.equal(net.forward_features(x), plain.forward_features(x))
print(type(net.fc).__name__, net.fc.frame, net.fc.out_features, net.fc.origin and net.fc.origin["from"], same)
"""


def test_timms_tags_load_the_bases_weights_under_the_nearest_frame(server: Hub, client: Client, tmp_path: Path) -> None:
    net = trained("test_resnet", 1000)
    server.add("timm/test_resnet.r160_in1k", {"model.safetensors": save(net.state_dict())})

    def load(arguments: str, **environment: str) -> tuple[str, str]:
        done = client(sys.executable, "-c", TAGGED, arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    shown, said = load("{}")
    assert shown == "FixedClassifier nearest 1000 test_resnet.r160_in1k True"
    assert (
        said.count("trained under a learned classifier; in its place is a fixed frame now (nearest, the nearest") == 1
    )
    assert load("{}", HF_HUB_OFFLINE="1")[0] == shown  # from the cache
    # Another frame that is asked for, and other classes, of which the weights know nothing.
    assert load('{"frame": "gaussian"}')[0] == "FixedClassifier gaussian 1000 None True"
    assert load('{"num_classes": 7}')[0] == "FixedClassifier simplex 7 None True"


def test_tags_that_are_nobodys_are_refused_as_by_timm() -> None:
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("test_resnet_etf.none_such", pretrained=True)
    # Without weights a tag is the configuration that it stands for.
    net = timm.create_model("resnet50_etf.a1_in1k")
    assert (net.fc.frame, net.fc.origin, net.pretrained_cfg["architecture"]) == ("simplex", None, "resnet50_etf")
