"""Ready checkpoints under a fixed frame as a command: exchanged, tuned to the original's answers, or to labels."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_etf
from tests import commands
from tests.pretrain.conftest import shards as shards
from tests.pretrain.runs import config, lines, wait_for_checkpoint, weights
from tests.test_ready import trained
from timm_etf import UsageError, hub
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.convert import Settings, run
from timm_etf.losses import divergence
from timm_etf.pretrain.loop import pretrain

SIZE = {"img_size": 32, "workers": 0}


@pytest.fixture(scope="module")
def ready(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that learned the five classes, in a folder of timm's."""
    out = tmp_path_factory.mktemp("ready")
    pretrain(config(images, out / "run", model="test_resnet", epochs=6, opt="adamw", lr=0.003, smoothing=0.0))
    return out / "run" / "export"


@pytest.mark.parametrize(
    ("name", "num_classes", "kind"),
    [
        ("resnet10t", 20, "simplex"),
        ("test_vit", 150, "nearest"),  # K > 2d
        ("deit_tiny_distilled_patch16_224", 20, "simplex"),
    ],
)
def test_the_classifier_is_exchanged_and_nothing_else(
    name: str, num_classes: int, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net: Any = trained(name, num_classes)
    base = hub.export(net, tmp_path / "base", label_names=[f"thing {k}" for k in range(num_classes)])
    said = run(Settings(name=f"local-dir:{base}", out=tmp_path / "out"))
    assert said.splitlines()[-1].startswith("next:  timm-etf convert local-dir:")
    folder = tmp_path / "out" / "export"
    fixed: Any = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert {head.frame for _, head in fixed_classifiers(fixed)} == {kind}
    assert [n for n, _ in fixed_classifiers(fixed)] == list(classifier_names(net))
    assert fixed.pretrained_cfg["label_names"][3] == "thing 3"
    plain: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    side = fixed.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(plain(x), fixed(x))
        assert torch.equal(plain.forward_features(x), net.forward_features(x))
    config = json.loads((folder / "config.json").read_text())
    assert {origin["from"] for origin in config["etf"]["origin"].values()} == {f"local-dir:{base}"}
    card = (folder / "README.md").read_text()
    assert "What the exchange of the classifier changes in its answers was not measured." in card
    assert "that of the weights they were made of is not known either" in card


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    net: Any = trained("test_resnet", 20)
    net.pretrained_cfg = {**net.pretrained_cfg, "license": "cc-by-nc-4.0"}
    timm.models._hub.save_for_hf(net, str(tmp_path / "base"), safe_serialization=True)
    run(Settings(name=f"local-dir:{tmp_path / 'base'}", out=tmp_path / "out"))
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "No licence was stated" not in card


def agreement(net: Any, original: Any, x: torch.Tensor) -> tuple[float, float]:
    """Percent of equal answers, and the mean divergence in float64."""
    with torch.no_grad():
        p, q = (n.eval()(x).double().softmax(1) for n in (original, net))
    return 100 * (p.argmax(1) == q.argmax(1)).double().mean().item(), (p * (p / q).log()).sum(1).mean().item()


def test_turned_and_tuned_to_the_answers_of_the_original(images: Path, tmp_path: Path) -> None:
    net: Any = trained("test_resnet", 20)
    net.fc.weight.data.mul_(100)  # so that it is sure of what it says
    name = f"local-dir:{hub.export(net, tmp_path / 'original')}"
    arguments = {"images": images, "lr": 1e-3, "batch_size": 16, **SIZE}
    said = run(Settings(name=name, out=tmp_path / "turned", **arguments))
    assert re.search(r"exchanged .* %, frame turned .* %$", said, re.MULTILINE)
    said = run(Settings(name=name, out=tmp_path / "tuned", epochs=3, **arguments))
    turned, tuned = (
        json.loads((tmp_path / out / "export" / "results.json").read_text())["source"] for out in ("turned", "tuned")
    )
    log = lines(tmp_path / "tuned" / "tuning")
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert tuned["top1"] == max(line["top1"] for line in log)
    helped = tuned["top1"] > log[0]["top1"]
    assert ("backbone tuned" in said, "left as it was" in said) == (helped, not helped)
    assert tuned["teacher"] == name
    assert tuned["exchanged"] == turned["exchanged"]
    assert tuned["before"] == pytest.approx({k: turned[k] for k in ("top1", "top5", "loss")}, abs=1e-4)

    # All three stages by hand.
    original: Any = timm.create_model(name, pretrained=True)
    loaded = [
        timm_etf.create_model(f"local-dir:{tmp_path / out / 'export'}", pretrained=True) for out in ("turned", "tuned")
    ]
    exchanged = timm_etf.fix_classifier(timm.create_model(name, pretrained=True), frame="nearest")
    dataset = timm.data.create_dataset("", root=str(images), split="validation")
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=loaded[0]))
    x = torch.stack([image for image, _ in dataset])
    assert len(x) == turned["count"] == tuned["count"] == 37
    for net, found in ((exchanged, turned["exchanged"]), (loaded[0], turned), (loaded[1], tuned)):
        same, loss = agreement(net, original, x)
        assert found["top1"] == pytest.approx(same, abs=3)  # an answer that is a tie
        assert found["loss"] == pytest.approx(loss, abs=1e-4)
    assert turned["loss"] < turned["exchanged"]["loss"]
    assert log[3]["train_loss"] < log[1]["train_loss"]

    # The backbone is left alone, and then but for BatchNorm's statistics; the frame stays one, whose rotation is known.
    ours, later, theirs = (net.state_dict() for net in (*loaded, original))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.startswith("fc"))
    assert all(torch.equal(later[k], theirs[k]) for k in later if "running" in k)
    assert torch.equal(later["conv1.0.weight"], theirs["conv1.0.weight"]) != helped
    assert torch.equal(later["fc.weight"], ours["fc.weight"])
    assert loaded[1].fc.frame == "simplex"
    assert loaded[1].fc.origin["from"] == name
    assert "views of 122 images" in loaded[1].fc.origin["turned_on"]
    cards = [" ".join((tmp_path / out / "export" / "README.md").read_text().split()) for out in ("turned", "tuned")]
    assert all(f"What was kept of `{name}`" in card and "accuracy was not measured" in card for card in cards)
    assert "The backbone was not tuned" in cards[0]
    assert "before the backbone was tuned" in cards[1]
    assert str(tmp_path / "tuned") not in cards[1]


def test_positions_are_adapted_to_the_size_of_the_images(images: Path, tmp_path: Path) -> None:
    base = hub.export(trained("test_vit", 10), tmp_path / "base")
    settings = {"images": images, "epochs": 1, "batch_size": 16, "img_size": 64, "workers": 0}
    run(Settings(name=f"local-dir:{base}", out=tmp_path / "out", **settings))
    fixed: Any = timm_etf.create_model(f"local-dir:{tmp_path / 'out' / 'export'}", pretrained=True).eval()
    assert fixed(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    other = hub.export(trained("test_vit", 10), tmp_path / "other")
    (tmp_path / "out" / "export").rename(tmp_path / "away")
    with pytest.raises(UsageError, match=r"was begun with name local-dir:.*base, now it is local-dir:.*other"):
        run(Settings(name=f"local-dir:{other}", out=tmp_path / "out", resume=True, **settings))


def test_a_folder_without_splits_is_divided(tmp_path: Path, ready: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / "images" / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    # Mixup, which looks at labels, and more folders than classes.
    settings: dict[str, Any] = {
        "init": f"local-dir:{ready}",
        "distill": f"local-dir:{ready}",
        "keep_classifier": True,
        "mixup": 0.2,
    }
    pretrain(config(tmp_path / "images", tmp_path / "run", **settings, batch_size=2))
    source = json.loads((tmp_path / "run" / "results.json").read_text())["source"]
    assert (source["count"], source["train_images"]) == (3, 27)
    assert weights(tmp_path / "run")["fc.weight"].shape == (5, 96)


def test_a_teacher_with_a_stream_an_average_and_accumulation(shards: Path, ready: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "dataset": "wds/",
        "train_split": "train-{0000..0001}.tar|122",
        "val_split": "validation-0000.tar|37",
        "distill": f"local-dir:{ready}",
        "model_ema": True,
        "model_ema_decay": 0.5,
        "grad_accum_steps": 2,
        "cutmix": 1.0,
        "epochs": 3,
        "opt": "adamw",
        "lr": 0.003,
    }
    pretrain(config(shards, tmp_path / "run", **settings))  # another backbone, from nothing, under a random frame
    log = lines(tmp_path / "run")
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert log[-1]["count"] == 37
    assert log[-1]["train_loss"] < log[0]["train_loss"]


def test_tuned_to_labels(images: Path, ready: Path, tmp_path: Path) -> None:
    run(Settings(name=f"local-dir:{ready}", out=tmp_path / "out", data_dir=images, epochs=1, batch_size=16, **SIZE))
    source = json.loads((tmp_path / "out" / "export" / "results.json").read_text())["source"]
    assert "teacher" not in source
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert "## Source task" in card
    assert "under the fixed classifier was not measured" not in card


def test_a_run_goes_on_from_its_own_classifier(images: Path, ready: Path, tmp_path: Path) -> None:
    top1 = json.loads((ready / "results.json").read_text())["source"]["top1"]
    settings: dict[str, Any] = {"init": f"local-dir:{ready}", "keep_classifier": True, "lr": 1e-30}
    pretrain(config(images, tmp_path / "learned", model="test_resnet", **settings))
    assert lines(tmp_path / "learned")[0]["top1"] == top1
    assert torch.equal(weights(tmp_path / "learned")["fc.bias"] != 0, torch.ones(5, dtype=torch.bool))
    pretrain(config(images, tmp_path / "fixed", frame_seed=7))
    settings["init"] = f"local-dir:{tmp_path / 'fixed' / 'export'}"
    pretrain(config(images, tmp_path / "again", **settings))
    ours, theirs = (weights(tmp_path / run)["fc.weight"] for run in ("again", "fixed"))
    assert torch.allclose(ours, theirs, atol=1e-6)
    # The preprocessing is that of the weights, and not of the architecture.
    settings["init"] = f"local-dir:{tmp_path / 'grey' / 'export'}"
    pretrain(config(images, tmp_path / "grey", mean=(0.1,), std=(0.7,), in_chans=1))
    pretrain(config(images, tmp_path / "tuned", **settings, in_chans=1))
    cfg = json.loads((tmp_path / "tuned" / "export" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.1], [0.7])


@pytest.mark.slow
def test_a_conversion_resumes_to_the_bit(images: Path, ready: Path, tmp_path: Path) -> None:
    arguments = ("--images", images, "--epochs", 3, "--lr", 1e-3, "--batch-size", 16, "--img-size", 32, "--workers", 1)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    commands.run("convert", f"local-dir:{ready}", "--out", straight, *arguments, check=True)
    command = commands.Command("convert", f"local-dir:{ready}", "--out", stopped, *arguments)
    wait_for_checkpoint(stopped / "tuning", command)
    command.send_signal(signal.SIGTERM)
    assert command.wait() == 143
    done = commands.run("convert", f"local-dir:{ready}", "--out", stopped, *arguments)
    assert done.returncode == 2
    assert "continue there with --resume" in done.stderr
    commands.run("convert", f"local-dir:{ready}", "--out", stopped, *arguments, "--resume", check=True)
    ours, theirs = weights(stopped), weights(straight)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    losses = [[line.get("train_loss") for line in lines(out / "tuning")] for out in (stopped, straight)]
    assert losses[0] == losses[1]
    done = commands.run("convert", f"local-dir:{ready}", "--out", stopped, *arguments, "--resume")
    assert "holds a converted checkpoint already" in done.stderr


def test_divergence_is_that_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (5 * torch.randn(7, 11, generator=generator) for _ in range(2))
    p, q = y.double().softmax(1), x.double().softmax(1)
    assert torch.allclose(divergence(x, y).double(), (p * (p / q).log()).sum(1), atol=1e-5)
    assert torch.allclose(divergence(x, x), torch.zeros(7), atol=1e-6)


def test_what_was_held_out_stays_so(ready: Path, tmp_path: Path) -> None:
    """Another division on a resume would validate on images that were learned."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    name = f"local-dir:{ready}"
    same: dict[str, Any] = {"init": name, "distill": name, "keep_classifier": True, "batch_size": 2, "epochs": 2}
    pretrain(config(folder, tmp_path / "run", **same))
    turned: dict[str, Any] = {"name": name, "images": folder, "batch_size": 4, **SIZE}
    run(Settings(out=tmp_path / "out", **turned))
    (tmp_path / "out" / "export").rename(tmp_path / "out" / "turned")  # as if it had been stopped there
    with pytest.raises(UsageError, match="was begun with seed 0, now it is 1"):
        run(Settings(out=tmp_path / "out", resume=True, seed=1, **turned))
    (folder / "7.png").rename(folder / "another.png")
    with pytest.raises(UsageError, match=r"was begun with images .*, now it is"):
        run(Settings(out=tmp_path / "out", resume=True, **turned))
    with pytest.raises(UsageError, match="it was started with held_out"):
        pretrain(config(folder, tmp_path / "run", **same, resume=True))
    with pytest.raises(UsageError, match="lies among the images"):
        run(Settings(out=folder / "out", **turned))


def test_names_of_classes_are_kept_and_not_mistaken(images: Path, ready: Path, tmp_path: Path) -> None:
    names = [f"class{k}" for k in (1, 0, 2, 3, 4)]  # the folders are in another order
    base = hub.export(timm.create_model(f"local-dir:{ready}", pretrained=True), tmp_path / "base", label_names=names)
    name = f"local-dir:{base}"
    run(Settings(name=name, out=tmp_path / "out", images=images, epochs=1, batch_size=16, **SIZE))
    assert json.loads((tmp_path / "out" / "export" / "config.json").read_text())["label_names"] == names
    with pytest.raises(UsageError, match="in another order"):
        run(Settings(name=name, out=tmp_path / "labelled", data_dir=images, epochs=1, batch_size=16, **SIZE))


def test_a_student_that_started_from_nothing_kept_nothing(images: Path, ready: Path, tmp_path: Path) -> None:
    grey = tmp_path / "grey" / "export"
    pretrain(config(images, tmp_path / "grey", model="test_resnet", in_chans=1))
    settings: dict[str, Any] = {"distill": f"local-dir:{grey}", "in_chans": 1, "smoothing": 0.2}
    pretrain(config(images, tmp_path / "run", **settings))
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "What was learned from" in card
    assert "What was kept" not in card
    assert "backbone was not tuned" not in card
    assert "smoothing" not in card
    assert f"| distill | local-dir:{grey} |" in card
    assert "One training with one seed" in card


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "no_such"}, "timm knows no no_such"),
        ({"name": "resnet50_etf.icons400"}, "is a variant with a fixed classifier"),
        ({"name": "test_resnet"}, r"Cannot start from test_resnet \(.*\): check its name"),  # no network
        ({"name": "local-dir:nowhere"}, "nowhere"),
        ({"images": Path("nowhere")}, "No folder nowhere"),
        ({"images": Path("."), "data_dir": Path("."), "epochs": 1}, "give one of the two"),
        ({"epochs": -1}, "must be 0 or more"),
        ({"name": "hf:ORG/NAME"}, "is no name of timm's"),
        ({"epochs": 2}, "are for images"),
        ({"data_dir": Path(".")}, "must be 1 or more to learn labels"),
    ],
)
def test_what_cannot_be_converted(ready: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(Settings(**{"name": f"local-dir:{ready}", "out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_models_and_images_that_cannot_be_used(images: Path, ready: Path, tmp_path: Path) -> None:
    def refused(says: str, name: Path, **settings: Any) -> None:
        with pytest.raises(UsageError, match=says) as e:
            run(Settings(name=f"local-dir:{name}", out=tmp_path / "out", **(SIZE if settings else {}), **settings))
        assert "\n" not in str(e.value)
        assert not (tmp_path / "out").exists()

    one: Any = timm.create_model("test_resnet", num_classes=1)
    refused("no classifier of two or more classes", hub.export(one, tmp_path / "one"))
    none: Any = timm.create_model("test_resnet", num_classes=0)
    refused("no classifier of two or more classes", hub.export(none, tmp_path / "none"))
    pretrain(config(images, tmp_path / "fixed"))
    refused("under a fixed frame already", tmp_path / "fixed" / "export")
    zero: Any = timm.create_model("test_resnet", num_classes=5)
    nn.init.zeros_(zero.fc.weight)
    refused("all alike", hub.export(zero, tmp_path / "zero"))
    for folder in ("empty", "unreadable"):
        (tmp_path / folder).mkdir()
    refused("Found 0 images.*check --images", ready, images=tmp_path / "empty")
    refused("needs a folder 'train'.*--images", ready, data_dir=tmp_path / "empty", epochs=1)
    for i in range(3):
        (tmp_path / "unreadable" / f"{i}.png").write_bytes(b"no image")
    refused("Unreadable image: .* and 2 more", ready, images=tmp_path / "unreadable")
    refused(
        "has 7 classes and .* 5: they differ",
        hub.export(timm.create_model("test_resnet", num_classes=7), tmp_path / "seven"),
        data_dir=images,
        epochs=1,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep_classifier": True}, "--keep-classifier needs weights to start from"),
        ({"init": "x", "keep_classifier": True, "fsdp": True}, "does not work on shards"),
        ({"distill": "READY", "loss": "dot_regression"}, "has a loss of its own"),
        ({"distill": "FILE"}, "Cannot start from .*: check its name"),
        ({"distill": "READY", "num_classes": 4}, "learns the 5 classes"),
        ({"init": "READY", "keep_classifier": True, "model_kwargs": ("frame=gaussian",)}, "leave out --model-kwargs"),
        ({"init": "READY", "keep_classifier": True, "model_kwargs": ("projector=mlp",)}, "projector"),
    ],
)
def test_options_of_pretraining_that_do_not_go_together(
    images: Path, ready: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    places = {"READY": f"local-dir:{ready}", "FILE": str(ready / "model.safetensors")}
    changes = {k: places.get(str(v), v) for k, v in changes.items()}
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
