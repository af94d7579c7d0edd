import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import timm_etf
from tests import commands
from timm_etf import FixedClassifier, UsageError, fix_classifier, hub
from timm_etf.atomic import file_sha256
from timm_etf.classifier import fixed_classifiers

# In this process the plugin cannot be imported: what is left is plain timm, as at a downstream user's.
WITHOUT_PLUGIN = """
import sys
sys.modules["timm_etf"] = None
import timm, torch
folder, images, logits = sys.argv[1:]
net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    torch.save(net(torch.load(images)), logits)
assert all(p.requires_grad for p in net.parameters())
fresh = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
assert fresh.eval()(torch.load(images)).shape[-1] == 7
assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).num_classes == 0
"""


@pytest.mark.parametrize("name", ["test_resnet", "dla46_c", "deit_tiny_distilled_patch16_224", "test_vit"])
def test_round_trip_with_and_without_the_plugin(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name + "_etf", num_classes=10, in_chans=1, frame_seed=2).eval()
    images = torch.randn(2, 1, *net.pretrained_cfg["input_size"][1:])
    folder = hub.export(net, tmp_path / "model")
    with torch.no_grad():
        expected = net(images)
        ours = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(ours(images), expected)
    assert [(n, h.seed, h.frame) for n, h in fixed_classifiers(ours)] == [
        (n, 2, "simplex") for n, _ in fixed_classifiers(net)
    ]
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {n for n, _ in net.named_parameters()}
    torch.save(images, tmp_path / "images.pt")
    paths = [folder, tmp_path / "images.pt", tmp_path / "logits.pt"]
    commands.run(*paths, code=WITHOUT_PLUGIN, fresh=True, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_another_number_of_classes_gives_timms_fresh_classifier(tmp_path: Path) -> None:
    folder = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "model")
    net = timm_etf.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert isinstance(net.fc, nn.Linear)
    assert net.fc.weight.shape == (7, 96)
    assert isinstance(timm_etf.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).fc, nn.Identity)
    untrained = timm_etf.create_model(f"local-dir:{folder}")
    assert torch.equal(untrained.fc.weight, timm_etf.frames.simplex(10, 96).float())


def test_folder_holds_one_safe_weights_file_and_nothing_of_the_bases_origin(tmp_path: Path) -> None:
    net = fix_classifier(
        timm.create_model("resnet10t", num_classes=10, drop_rate=0.1)
    )  # plain: knows where a tag is from
    assert net.pretrained_cfg["hf_hub_id"]
    net.to(memory_format=torch.channels_last)  # strides that safetensors refuses
    folder = hub.export(net, tmp_path / "model", tag="test", label_names=[f"c{i}" for i in range(10)], recipe={"lr": 1})
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "results.json", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet10t"
    assert config["label_names"][3] == "c3"
    cfg = config["pretrained_cfg"]
    assert cfg["tag"] == "test"
    assert not {"url", "hf_hub_id", "license", "origin_url", "paper_ids", "paper_name", "description"} & set(cfg)
    etf = config["etf"]
    assert (etf["frame"], etf["seed"], etf["num_classes"], etf["dims"]) == ("simplex", 0, 10, {"fc": 512})
    assert etf["recipe"] == {"lr": 1}
    import hashlib

    assert etf["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_file(folder / "model.safetensors").keys() == net.state_dict().keys()


def test_a_second_export_keeps_the_class_names(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(10)]
    first = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "first", label_names=names)
    for load in (timm.create_model, timm_etf.create_model):
        again = hub.export(load(f"local-dir:{first}", pretrained=True), tmp_path / load.__module__)
        assert json.loads((again / "config.json").read_text())["label_names"] == names
    fewer = timm_etf.create_model(f"local-dir:{first}", pretrained=True, num_classes=7)
    assert "label_names" not in json.loads((hub.export(fewer, tmp_path / "fewer") / "config.json").read_text())
    none = hub.export(timm_etf.create_model(f"local-dir:{first}", pretrained=True), tmp_path / "none", label_names=[])
    assert "label_names" not in json.loads((none / "config.json").read_text())


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_what_could_not_be_restored_is_not_written(tmp_path: Path, key: str) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10).eval()
    getattr(net.fc, key).normal_()  # tensor by tensor, so that no load_state_dict sees it
    wrong = "weight is no simplex frame" if key == "weight" else "bias is not zero"
    with pytest.raises(UsageError, match=rf"^fc\.{wrong}, .*free_classifier\(model\)\.$"):
        hub.export(net, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        folder = hub.export(timm_etf.free_classifier(net), tmp_path / "model")
        assert torch.equal(timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), expected)


def test_plugin_arguments_stay_out_of_what_plain_timm_reads(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10, frame="simplex", frame_seed=3)
    config = json.loads((hub.export(net, tmp_path / "model") / "config.json").read_text())
    assert not {"frame", "frame_seed"} & set(config["model_args"])
    assert timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).num_classes == 10


@pytest.mark.parametrize(
    ("num_classes", "options"),
    [
        (150, {"logit_scale": 7.0}),  # orthoplex
        (300, {}),  # spherical code
        (10, {"frame": "gaussian", "frame_seed": 3}),
        (10, {"learn_scale": True, "logit_scale": 3.0}),
        (10, {"frame": "learned", "logit_scale": 4.0}),
    ],
    ids=str,
)
def test_what_folds_into_the_weight_gives_the_same_logits_in_plain_timm(
    tmp_path: Path, num_classes: int, options: dict[str, object]
) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=num_classes, **options).eval()
    if options.get("learn_scale"):
        torch.nn.init.constant_(net.fc.logit_scale, 1.3)
    if options.get("frame") == "learned":
        torch.nn.init.normal_(net.fc.bias)
    images = torch.randn(2, 3, 64, 64)
    folder = hub.export(net, tmp_path / "model")
    with torch.no_grad():
        expected = net(images)
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        ours = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
        # A trained weight meets scaled features while it is trained, a scaled weight meets them in the export.
        tolerance = 1e-5 if options.get("frame") == "learned" else 0
        torch.testing.assert_close(plain(images), expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(ours(images), plain(images))
    assert type(plain.fc) is nn.Linear
    etf = json.loads((folder / "config.json").read_text()).get("etf")
    if options.get("frame") == "learned":
        assert etf is None
        assert isinstance(ours.fc, nn.Linear)
    else:
        assert isinstance(ours.fc, FixedClassifier)
        assert etf["frame"] == net.fc.frame == ours.fc.frame
        assert etf["coherence"] == pytest.approx(timm_etf.frames.coherence(net.fc.weight), abs=1e-6)
        assert etf["bound"] == timm_etf.frames.bound(num_classes, 96) <= etf["coherence"] + 1e-6
        assert etf["logit_scale"] == pytest.approx(net.fc.scale) == pytest.approx(ours.fc.scale, rel=1e-4)
        untrained = timm_etf.create_model(f"local-dir:{folder}")
        torch.testing.assert_close(untrained.fc.weight, ours.fc.weight, atol=1e-5, rtol=1e-5)


def test_feature_normalisation_needs_the_plugin_and_says_so(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10, feature_norm=True, logit_scale=12.0).eval()
    folder = hub.export(net, tmp_path / "model")
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), expected)
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    ratio = plain / expected  # the same ranking, each image with a factor of its own: its feature's norm
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain, expected)
    assert "which plain timm does not do" in " ".join((folder / "README.md").read_text().split())


@pytest.mark.parametrize("name", ["test_resnet", "dla46_c", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("frame", ["auto", "learned"])
def test_a_projector_is_left_out_of_the_export(tmp_path: Path, name: str, frame: str) -> None:
    net = timm.create_model(f"{name}_etf", num_classes=10, projector="mlp", frame=frame).eval()
    images = torch.randn(2, *net.pretrained_cfg["input_size"])
    folder = hub.export(net, tmp_path / "model", label_names=list("abcdefghij"))
    assert not [
        k for k in load_file(folder / "model.safetensors") if "projector" in k or k.startswith(("fc.", "head."))
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 0
    assert "label_names" not in config
    with torch.no_grad():
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        for create in (timm.create_model, timm_etf.create_model):
            backbone = create(f"local-dir:{folder}", pretrained=True).eval()
            assert torch.equal(backbone(images).flatten(1), features.flatten(1))
            # Even for the number of classes it was trained with there is no frame to restore.
            fresh = create(f"local-dir:{folder}", pretrained=True, num_classes=10)
            assert not list(fixed_classifiers(fresh))
            assert fresh.eval()(images).shape == (2, 10)
    card = " ".join((folder / "README.md").read_text().split())
    assert "were left out: this is a backbone" in card
    assert "import timm_etf" not in card
    assert net(images).shape == (2, 10)  # the model itself is as it was
    if frame == "auto":
        assert config["etf"]["projector"] == "mlp"


@pytest.mark.parametrize("name", ["test_resnet_sw", "test_resnet_sw_etf"])
def test_whitened_models_need_the_plugin_and_say_so(tmp_path: Path, name: str) -> None:
    net = timm.create_model(name, num_classes=10, sw_kwargs={"candidates": ["bw", "iw", "ln"]}).eval()
    images = torch.randn(2, 3, 64, 64)
    folder = hub.export(net, tmp_path / "model")
    with torch.no_grad():
        expected = net(images)
        for create in (timm.create_model, timm_etf.create_model):
            assert torch.equal(create(f"local-dir:{folder}", pretrained=True).eval()(images), expected)
    restored = timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    assert isinstance(restored.fc, FixedClassifier) == name.endswith("_etf")
    again = hub.export(restored, tmp_path / "again")
    assert torch.equal(timm.create_model(f"local-dir:{again}", pretrained=True).eval()(images), expected)
    assert "import timm_etf` before creating it" in (folder / "README.md").read_text()
    code = "import sys, timm; timm.create_model(sys.argv[1], pretrained=True)"
    done = commands.run(f"local-dir:{folder}", code=code, fresh=True)
    assert "Unknown model (test_resnet_sw)" in done.stderr


def test_learned_model_has_no_etf_block(tmp_path: Path) -> None:
    folder = hub.export(timm.create_model("test_resnet", num_classes=10), tmp_path / "model")
    assert "etf" not in json.loads((folder / "config.json").read_text())
    assert isinstance(timm_etf.create_model(f"local-dir:{folder}", pretrained=True).fc, nn.Linear)
    assert "learned classifier" in (folder / "README.md").read_text()


def test_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10)
    folder = hub.export(net, tmp_path / "model")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UsageError, match=r"already exists and is not empty: .* overwrite=True"):
        hub.export(net, folder)
    assert (folder / "config.json").read_bytes() == before
    hub.export(net, folder, tag="again", overwrite=True)
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["tag"] == "again"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10)
    folder = hub.export(net, tmp_path / "model")
    with pytest.raises(TypeError):
        hub.export(net, folder, recipe={"not": object()}, overwrite=True)
    assert timm_etf.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 10
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UsageError, match="is not a model made by"):
        hub.export(nn.Linear(2, 2), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: c["etf"].update(format=99), "newer timm_etf .*format 99.*pip install --upgrade timm_etf"),
        (lambda c: c.clear(), "has no 'architecture'"),
        (lambda c: c["etf"].pop("frame"), "is damaged .see 'frame'"),
        (lambda c: c["etf"].update(frame="sphere"), "frame 'sphere', which this version does not know: pip install"),
        (lambda c: c["etf"].pop("weights_sha256"), "is damaged .see 'weights_sha256'"),
        (lambda c: c.update(architecture="resnet9999"), "'resnet9999', which timm .* does not know"),
        (lambda c: c["pretrained_cfg"].update(hf_hub_filename="../x.safetensors"), "points to another file"),
        (lambda c: c["etf"].update(num_classes="10"), "is damaged .see 'num_classes'"),
        (lambda c: c["etf"].update(seed="a"), "is damaged .see 'seed'"),
        (lambda c: c["etf"].update(coherence=None), "is damaged .see 'coherence'"),
        (lambda c: c["etf"].pop("feature_norm"), "is damaged .see 'feature_norm'"),
        (lambda c: c.update(etf=[]), "is damaged"),
        (lambda c: c["etf"].update(format=-1), "is damaged .see 'format'"),
        (lambda c: c["etf"].update(frame="gaussian", coherence=1e9), "is damaged .see 'coherence'"),
        (lambda c: c["etf"].update(coherence=float("nan")), "is damaged .see 'coherence'"),
        (lambda c: c["etf"].update(logit_scale=-3.0), "is damaged .see 'logit_scale'"),
        (lambda c: c["etf"].update(dims=["fc"]), "is damaged .see 'dims'"),
        (lambda c: c["etf"].update(num_classes=7), "contradicts itself: num_classes is 10, and 7 in its etf block"),
        (lambda c: c.update(num_classes="two"), "is damaged .see 'num_classes'"),
        (lambda c: c.update(num_classes=10**12), "contradicts itself: num_classes is 1000000000000"),
        (
            lambda c: [part.update(num_classes=10**12) for part in (c, c["etf"])],
            r"promises a classifier 'fc' of shape \[1000000000000, 96\], and .* has \[10, 96\]",
        ),
        (lambda c: c["etf"].update(dims={"fc": 97}), r"'fc' of shape \[10, 97\], and model.safetensors has \[10, 96\]"),
        (lambda c: c.update(model_args=["drop_rate"]), "is damaged .see 'model_args'"),
        (lambda c: c.update(model_args={"nosuch": 1}), "timm cannot make .*'nosuch'.*: check the arguments"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path: Path, damage: object, says: str) -> None:
    folder = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    damage(config)  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says) as raised:
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop("fc.weight"), r"promises a classifier 'fc' of shape \[10, 96\], and .* has none. Download"),
        (lambda t: t.update({"fc.weight": torch.eye(3)}), r"shape \[10, 96\], and .* has \[3, 3\]. Download"),
        (lambda t: t.pop("fc.bias"), r"timm cannot make .*Missing key.*fc.bias.*download or export"),
        (lambda t: t.pop("conv1.0.weight"), r"timm cannot make .*download or export"),
        (lambda t: t["conv1.0.weight"].view(-1)[3:4].fill_(torch.nan), r"are not finite .see 'conv1.0.weight'"),
        (lambda t: t["layer1.0.conv1.weight"].view(-1)[0:1].fill_(torch.inf), "its training diverged"),
        (lambda t: t["bn1.running_var"][0:1].fill_(torch.nan), r"are not finite .see 'bn1.running_var'"),
        (lambda t: t["fc.weight"].fill_(torch.nan), r"are not finite .see 'fc.weight'"),
        (lambda t: t["fc.bias"].fill_(1), r"promises a fixed simplex classifier, but fc\.bias is not zero"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path: Path, damage: object, says: str) -> None:
    folder = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["etf"]["weights_sha256"] = file_sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says) as raised:
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    assert "\n" not in str(raised.value)


def test_a_missing_folder_and_a_torn_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no readable config\.json"):
        timm_etf.create_model(f"local-dir:{tmp_path}", pretrained=True)
    (tmp_path / "config.json").write_text('{"architecture": "resn')
    with pytest.raises(UsageError, match=r"has no readable config\.json"):
        timm_etf.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_learned_weight_under_the_block_is_not_called_a_frame(tmp_path: Path) -> None:
    folder = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = torch.randn(10, 96)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"is not what config\.json describes: its SHA-256 is not"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    config = json.loads((folder / "config.json").read_text())
    config["etf"]["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"promises a fixed simplex classifier, but fc\.weight is no simplex frame"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)


def test_plain_names_pass_through() -> None:
    assert isinstance(timm_etf.create_model("test_resnet_etf", num_classes=10).fc, FixedClassifier)
    assert isinstance(timm_etf.create_model("test_resnet", num_classes=10).fc, nn.Linear)
    with pytest.raises(ValueError, match="hf-hub:org/name"):
        timm_etf.create_model("org/name")


def test_half_precision_halves_the_file_and_keeps_the_frame(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10).eval()
    whole, half = (hub.export(net, tmp_path / str(h), half=h) / "model.safetensors" for h in (False, True))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    loaded = timm_etf.create_model(f"local-dir:{half.parent}", pretrained=True).eval()
    assert torch.equal(loaded.fc.weight, net.fc.weight)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(loaded(images), net(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["test_vit_etf", "test_vit", "test_resnet_sw_etf"])
def test_half_precision_is_for_convolutions_and_linear_layers_alone(tmp_path: Path, name: str) -> None:
    net = timm.create_model(name, num_classes=10).eval()
    layers = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    classifier = net.pretrained_cfg["classifier"]
    if "_sw" in name:  # statistics that float16 cannot hold
        net.bn1.running_cov.mul_(1e5)
    stored = load_file(hub.export(net, tmp_path / "model", half=True) / "model.safetensors")
    halved = {k for k, tensor in stored.items() if tensor.dtype == torch.float16}
    assert halved == layers - {f"{classifier}.weight"}
    assert all(torch.equal(stored[k], tensor) for k, tensor in net.state_dict().items() if k not in halved)


def test_pickled_weights_are_neither_written_nor_read(tmp_path: Path) -> None:
    for file in Path(timm_etf.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"torch\.(load|save)\(|safe_serialization=False|weights_only=False", text), file

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    folder = hub.export(timm.create_model("test_resnet_etf", num_classes=10), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth"):
        torch.save({"fc.weight": Hostile()}, folder / name)
    with pytest.raises(UsageError, match=r"has no model\.safetensors. Pickled weights can run code"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")  # under the name of a safe one
    with pytest.raises(UsageError, match=r"is not what config\.json describes"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    config = json.loads((folder / "config.json").read_text())
    del config["etf"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"model\.safetensors of local-dir:.* is damaged"):
        timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    assert not (tmp_path / "ran").exists()
