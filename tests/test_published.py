"""Every published checkpoint: registered, complete, with its card, and what its hash says."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_etf
from tests import commands
from tests.hub.conftest import client as client
from tests.hub.conftest import server as server
from tests.hub.loopback import Hub
from timm_etf import FixedClassifier, UsageError, hub, published
from timm_etf.atomic import file_sha256
from timm_etf.hub.card import card

PACKAGE = Path(timm_etf.__file__).parent
CARDS = Path(__file__).parents[1] / "hub_cards"


def test_registry_cards_and_folders_are_of_the_same_checkpoints() -> None:
    assert {p.parent.name for p in (PACKAGE / "published").glob("*/config.json")} == set(published.NAMES)
    assert {p.name for p in CARDS.iterdir() if p.is_dir()} == set(published.NAMES)
    assert timm.list_models("*_etf", pretrained=True) == sorted(published.NAMES)
    for name in published.NAMES:
        variant = name.partition(".")[0]
        assert timm.is_model_pretrained(variant)
        assert timm.get_pretrained_cfg(name).hf_hub_id == f"timm-etf/{name}"


@pytest.mark.parametrize("name", published.NAMES)
def test_the_card_is_made_of_the_files_beside_it(name: str) -> None:
    folder, config = CARDS / name, published.config(name)
    results = json.loads((folder / "results.json").read_text())
    beside = {p.name for p in folder.iterdir()}
    shown = (folder / "README.md").read_text()
    assert shown == card(config, results, f"timm-etf/{name}", license="apache-2.0", beside=beside)
    assert {"results.png", "log.jsonl", "DATA_LICENSES.md"} <= beside
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert f"{last['top1']:.2f}" in shown
    assert results["transfer"][0]["protocols"]["knn"]["mean"]
    assert results["transfer"][0]["weights_sha256"] == config["etf"]["weights_sha256"]


@pytest.mark.parametrize("name", published.NAMES)
def test_weights_that_come_with_the_package_are_those_that_were_published(name: str) -> None:
    file = PACKAGE / "published" / name / "model.safetensors"
    assert file.stat().st_size < (51e6 if name.startswith("resnet50_etf.") else 12e6)
    assert file_sha256(file) == published.config(name)["etf"]["weights_sha256"]


@pytest.mark.parametrize(("name", "width"), [("resnet10t_etf", 512), ("resnet50_etf", 2048)])
def test_pretrained_answers_without_a_network(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    net = timm.create_model(name, pretrained=True).eval()
    assert isinstance(net.fc, FixedClassifier)
    assert not list(net.fc.parameters())
    assert net.num_classes == 399
    assert net.pretrained_cfg["input_size"] == (3, 40, 40)
    assert len(net.pretrained_cfg["label_names"]) == 399
    assert torch.allclose(net.fc.weight, timm_etf.frames.simplex(399, width).float())
    # Any of timm's arguments, as with its own weights.
    image = torch.randn(1, 3, 40, 40)
    pooled = timm.create_model(f"{name}.icons400", pretrained=True, num_classes=0).eval()
    assert torch.equal(pooled(image), net.forward_head(net.forward_features(image), pre_logits=True))
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(image)
    assert torch.allclose(maps[-1].mean((2, 3)), pooled(image), atol=1e-6)
    fresh = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1)
    assert fresh.fc.weight.shape == (7, width)
    assert torch.equal(fresh.layer4[0].conv1.weight, net.layer4[0].conv1.weight)
    other = timm.create_model("resnet10t_etf", pretrained=True, frame="gaussian", frame_seed=3)
    assert torch.equal(other.fc.weight, timm_etf.frames.gaussian(399, 512, seed=3).float())
    plain = timm.create_model("resnet10t_etf")
    assert (plain.num_classes, plain.pretrained_cfg["input_size"]) == (1000, (3, 176, 176))
    with pytest.raises(
        UsageError,
        match=r"No pretrained weights exist for resnet18_etf.* resnet18_etf\.\w+ is timm's under the nearest",
    ):
        timm.create_model("resnet18_etf", pretrained=True)


OPTIONS = {
    "test_resnet_etf.plain": {"frame_seed": 7},
    "test_resnet_etf.norm": {"feature_norm": True, "logit_scale": 12.5},
    "test_resnet_etf.scale": {"logit_scale": 7.3, "global_pool": "max"},
    "test_resnet_etf.learned_scale": {"learn_scale": True, "logit_scale": 3.0},
    "test_resnet_etf.projector": {"projector": "mlp"},
    "test_vit_etf.gaussian": {"frame": "gaussian", "frame_seed": 3},
}

RESTORED = """
import sys, timm, timm_etf, torch
folder = sys.argv[1]
for name in sys.argv[2:]:
    asked = torch.load(f"{folder}/{name}.pt")
    local = f"local-dir:{folder}/timm_etf/published/{name}"
    for net in (timm.create_model(name, pretrained=True), timm_etf.create_model(local, pretrained=True)):
        with torch.no_grad():
            assert torch.equal(net.eval()(asked["images"]), asked["logits"]), (name, net.get_classifier())
        head = net.get_classifier()
        assert repr(head) == asked["head"], (name, head)
        assert not list(head.parameters())

def fixed(tag, **options):
    return timm.create_model(f"test_resnet_etf.{tag}", pretrained=True, **options).fc

# What is asked for stands; what is not is as it was published.
stored = fixed("norm").weight
norm = fixed("norm", logit_scale=1.0)
assert norm.feature_norm and abs(norm.scale - 1) < 1e-5 and torch.allclose(12.5 * norm.weight, stored, atol=1e-5)
assert not fixed("norm", feature_norm=False).feature_norm
assert torch.equal(fixed("norm", frame="simplex", frame_seed=9).weight, stored)
learning = fixed("norm", learn_scale=True)
assert torch.equal(learning.weight, stored) and learning.logit_scale.item() == 1 and learning.scale == 12.5
# Another frame is another classifier: nothing of the published one is left in it.
other = fixed("norm", frame="orthonormal", frame_seed=2)
assert torch.equal(other.weight, timm_etf.frames.orthonormal(10, 96, seed=2).float()) and not other.feature_norm
# So are other classes, and a backbone whose classifier was left out.
assert fixed("norm", num_classes=7).frame == "simplex" and not fixed("norm", num_classes=7).feature_norm
assert fixed("projector", num_classes=10).frame == "simplex"
for wrong in ({"feature_norm": "yes"}, {"logit_scale": -1}):
    try:
        fixed("norm", **wrong)
    except timm_etf.UsageError:
        continue
    raise AssertionError(wrong)
"""


def test_a_published_classifier_is_restored_with_every_option(tmp_path: Path) -> None:
    package = tmp_path / "timm_etf"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.icons400"))
    for name, options in OPTIONS.items():
        variant, _, tag = name.partition(".")
        torch.manual_seed(0)
        net = timm.create_model(variant, num_classes=10, **options).eval()
        images = torch.randn(2, *net.pretrained_cfg["input_size"])
        hub.export(net, package / "published" / name, tag=tag)
        with torch.no_grad():
            if "learn_scale" in options:
                net.fc.logit_scale.fill_(1.3)
                hub.export(net, package / "published" / name, tag=tag, overwrite=True)
            features = net.forward_head(net.forward_features(images), pre_logits=True)
            logits = features if "projector" in options else net(images)
            head = net.get_classifier()
            kept = FixedClassifier(
                head.plain_weight(), bias=True, frame=head.frame, seed=head.seed, feature_norm=head.feature_norm
            )
        shown = "Identity()" if "projector" in options else repr(kept)
        torch.save({"images": images, "logits": logits, "head": shown}, tmp_path / f"{name}.pt")
    source = (package / "published" / "__init__.py").read_text()
    names = f"NAMES = {tuple(OPTIONS)!r}"
    (package / "published" / "__init__.py").write_text(re.sub(r"NAMES = \(.*\)", names, source))
    commands.run(tmp_path, *OPTIONS, code=RESTORED, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True)


def test_what_published_weights_were_trained_on_is_said_once() -> None:
    code = "import timm, timm_etf\nfor _ in range(2): timm.create_model('resnet10t_etf', pretrained=True)"
    done = commands.run(code=code, check=True)
    assert done.stderr.splitlines() == [
        "resnet10t_etf.icons400: trained on 21,163 images of icons-400, 399 classes, 40 pixels, not on ImageNet. For "
        "weights of ImageNet, under a learned classifier: timm.create_model('resnet10t', pretrained=True)"
    ]
    assert commands.run(code=code, env={"RANK": "1"}, check=True).stderr == ""
    listed = commands.run("models", "resnet10t", check=True).stdout
    assert "with weights: resnet10t_etf.icons400, trained on 21,163 images of icons-400" in listed


def test_fine_tuning_moves_the_backbone_and_not_the_frame(images: Path) -> None:
    net = timm.create_model("resnet50_etf", pretrained=True, num_classes=5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    dataset = timm.data.create_dataset("folder", str(images / "train"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    batch, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    torch.nn.functional.cross_entropy(net(batch), labels).backward()
    optimizer.step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {"fc.weight", "fc.bias"}.isdisjoint(moved)
    assert {k for k, _ in net.named_parameters()} <= moved


def test_onnx_gives_the_published_logits(tmp_path: Path) -> None:
    import onnxruntime

    net = timm.create_model("resnet10t_etf", pretrained=True, exportable=True).eval()
    images = torch.randn(2, *timm.data.resolve_data_config(model=net)["input_size"])
    torch.onnx.export(net, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), net(images), atol=1e-4)


FROM_HUB = """
import timm, timm_etf
try:
    net = timm.create_model("resnet10t_etf", pretrained=True)
    print(type(net.fc).__name__, net.pretrained_cfg["hf_hub_id"])
except timm_etf.UsageError as e:
    print(e)
"""


def test_without_its_weights_the_package_gets_them_from_the_hub(server: Hub, client: object, tmp_path: Path) -> None:
    name = published.NAMES[0]
    shutil.copytree(PACKAGE, tmp_path / "package" / "timm_etf", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = (PACKAGE / "published" / name / "model.safetensors").read_bytes()
    place = {"PYTHONPATH": str(tmp_path / "package"), "TIMM_ETF_HUB_ORG": "mirror"}

    def load() -> str:
        return client(sys.executable, "-c", FROM_HUB, **place).stdout.strip()  # type: ignore[operator]

    assert (
        load() == f"Cannot get model.safetensors of mirror/{name}: no such repository. If it is private, "
        "log in with: hf auth login"
    )
    server.add(f"mirror/{name}", {"model.safetensors": weights[:-1] + b"!"})
    assert "is not the file that was published" in load()
    server.add(f"mirror/{name}", {"model.safetensors": weights})
    assert load() == f"FixedClassifier mirror/{name}"


def test_the_downstream_example_runs(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train").symlink_to(images / "train")
    (folder / "test").symlink_to(images / "validation")
    script = Path(__file__).parents[1] / "examples" / "finetune" / "finetune.py"
    arguments = ["--data", folder, "--epochs", "1", "--seeds", "1", "--out", tmp_path / "results.json"]
    done = commands.run(*arguments, code=script.read_text(encoding="utf-8"), check=True)
    assert "difference" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())["mine"]["resnet10t_etf, pretrained"]["accuracy"]
    assert f"  ({found[0]:.1f};" in done.stdout
