"""More classes for a fixed classifier: old vectors and logits stay, names and what is taken are kept."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_etf
from tests.conftest import write_images
from timm_etf import UsageError, frames, grow_classifier, hub
from timm_etf.embedding import Coordinates
from timm_etf.frames import ClassTree
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.setup import setup
from timm_etf.ready import Start
from timm_etf.studies.geometry import classifier


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
    for names, says in (
        (["a", "a"], "class 'a' is there already"),
        ("ab", "list of texts"),
        ([1], "list of texts"),
        (["a", "reserved 1"], "'reserved 1' is what a class that is still to come is called"),
    ):
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


def test_names_of_a_classifier_that_is_gone_are_not_those_of_this_one(tmp_path: Path) -> None:
    net = model(6, 4)
    net.pretrained_cfg = {**net.pretrained_cfg, "label_names": [f"old{i}" for i in range(9)]}
    folder = hub.export(net, tmp_path / "before")
    assert "label_names" not in json.loads((folder / "config.json").read_text())
    grow_classifier(net, ["lynx"])
    assert net.pretrained_cfg["label_names"] == ["0", "1", "2", "3", "lynx", "reserved 1"]


def test_reserved_vectors_are_no_classes_to_meet_in() -> None:
    old, new = model(6, 4), model(6, 5)
    for net, names in ((old, list("abcd")), (new, list("abcde"))):
        net.pretrained_cfg = {
            **net.pretrained_cfg,
            "label_names": [*names, *["reserved 1", "reserved 2"][: 6 - len(names)]],
        }
    systems = [Coordinates.of(net) for net in (old, new)]
    assert [c.names for c in systems] == [("a", "b", "c", "d"), ("a", "b", "c", "d", "e")]
    x = torch.randn(3, 96)
    expected = nn.functional.linear(x, old.fc.weight[:4])
    torch.testing.assert_close(systems[0](x), expected - expected.mean(1, keepdim=True))
    torch.testing.assert_close(systems[1].among(list("abcd"))(x).shape, expected.shape)
    images = torch.randn(2, 3, 64, 64)
    index = timm_etf.embed(old, images)
    timm_etf.embed(new, images, classes=old.pretrained_cfg["label_names"]).require(index.system)
    head = classifier(old, list("abcd"))
    assert head.weight.shape == (4, 96)
    assert old.fc.weight.shape == (6, 96)
    torch.testing.assert_close(head(x), expected)
    assert classifier(old, list("abdc")) is None


@pytest.mark.parametrize("options", [{}, {"feature_norm": True, "logit_scale": 10.0}, {"logit_scale": 4.0}], ids=str)
@pytest.mark.parametrize("kind", ["tree", "orthoplex", "reserved"])
def test_a_frame_that_was_there_stays_under_another_scale(
    tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    num_classes = {"tree": 4, "orthoplex": 120, "reserved": 6}[kind]
    tree = ClassTree(("a/b", "a/c", "d/e", "d/f"))
    net = model(num_classes, 5 if kind == "reserved" else None, **({"frame": tree} if kind == "tree" else {}))
    start = Start(f"local-dir:{hub.export(net, tmp_path / 'model')}")
    plain = timm.create_model("test_resnet", num_classes=num_classes)
    start.give(plain, classifier=True)
    head = start.fix(plain, **options).fc
    assert (head.frame, head.seed, head.taken, head.tree) == (net.fc.frame, net.fc.seed, net.fc.taken, net.fc.tree)
    assert head.feature_norm == options.get("feature_norm", False)
    scale = options.get("logit_scale", 1.0)
    torch.testing.assert_close(head.weight, scale * net.fc.weight)
    assert options or torch.equal(head.weight, net.fc.weight)


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_etf"])
def test_kept_rows_stay_with_their_classes(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "validation", 2)
    old = timm.create_model(name, num_classes=6)
    names = ["class3", "class1"]
    if name.endswith("_etf"):
        old.fc.taken = 2
    folder = hub.export(old, tmp_path / "old", label_names=names)
    options = {"model": name, "data_dir": tmp_path / "data", "out": tmp_path / "run", "workers": 0, "img_size": 32}
    options |= {"init": f"local-dir:{folder}", "epochs": 2, "warmup_epochs": 0, "batch_size": 4}
    run = setup(PretrainConfig(**options, keep_classifier=True, reserve=1))
    assert run.class_names == ["class3", "class1", "class0", "class2", "class4"]
    assert torch.equal(run.step.model.fc.weight, old.fc.weight)
    assert not capsys.readouterr().err
    run.close()
    with pytest.raises(
        UsageError, match=r"fc\.weight is .6, 96. there and .5, 96. in this model\. --keep-classifier needs"
    ):
        setup(PretrainConfig(**options, keep_classifier=True))
    setup(PretrainConfig(**options)).close()
    assert ("--keep-classifier goes on under the one" in capsys.readouterr().err) == name.endswith("_etf")


def test_new_classes_alone_do_not_take_the_rows_of_old_ones(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "validation", 2)
    new = [f"class{k}" for k in range(5)]
    options = {"data_dir": tmp_path / "data", "workers": 0, "img_size": 32, "epochs": 2, "warmup_epochs": 0}
    options |= {"keep_classifier": True, "batch_size": 4, "out": tmp_path / "run"}
    for name, names, rows, expected in (
        ("reserved", ["x", "y"], 7, ["x", "y", *new]),
        ("renamed", list("vwxyz"), 5, new),  # as many, none reserved: other names of the same
    ):
        net = model(rows, len(names) if rows > len(names) else None)
        folder = hub.export(net, tmp_path / name, label_names=names)
        run = setup(PretrainConfig(model="test_resnet_etf", init=f"local-dir:{folder}", **options))
        run.close()
        assert run.class_names == expected


def test_what_a_projector_would_lose_is_not_reserved(tmp_path: Path) -> None:
    options = {"model": "test_resnet_etf", "data_dir": tmp_path, "out": tmp_path / "run", "reserve": 2}
    with pytest.raises(UsageError, match="leave it out, or --reserve"):
        PretrainConfig(**options, model_kwargs=("projector=mlp",)).check()
