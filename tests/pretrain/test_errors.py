import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from timm_etf import UsageError
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.loop import pretrain


def config(images: Path, out: Path, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "model": "test_resnet_etf",
        "data_dir": images,
        "out": out,
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 16,
        "img_size": 32,
        "workers": 0,
    }
    return PretrainConfig(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet5_etf"}, "Unknown model 'resnet5_etf': did you mean resnet50_etf"),
        (
            {"model": "test_resnet_etf.r160_in1k"},
            "--model takes a timm architecture, .* leave out the source and the tag",
        ),
        ({"model": "hf-hub:org/name"}, "--model takes a timm architecture, .* leave out the source and the tag"),
        ({"model": "zzz"}, r"Unknown model 'zzz': timm\.list_models"),
        ({"model": "gemma4_vit_167m_enc", "head": "etf"}, "has no _etf variant: an encoder"),
        ({"head": "learned"}, "--head learned contradicts --model test_resnet_etf: use --model test_resnet"),
        (
            {"num_classes": 200, "model_kwargs": ("frame=simplex",)},
            "test_resnet_etf: A simplex ETF of 200 classes needs features of width 199 or more",
        ),
        (
            {"model_kwargs": ("frame=simplx",)},
            "test_resnet_etf: Unknown frame 'simplx': use 'auto' or one of 'simplex'",
        ),
        (
            {"model": "test_resnet", "model_kwargs": ("frame=auto",)},
            "unexpected keyword argument 'frame'. Check --model",
        ),
        ({"loss": "dot_regression"}, "needs a fixed classifier of unit features: .* feature_norm=True"),
        ({"loss": "dot_regression", "model": "test_resnet"}, "needs a fixed classifier of unit features"),
        ({"mixup": -1.0}, "--mixup must be at least 0"),
        ({"cutmix": 1.0, "batch_size": 15}, "--batch-size must be even, got 15"),
        ({"feature_entropy": 0.1, "batch_size": 1}, "--batch-size must be at least 2"),
        ({"num_classes": 3}, "5 classes, more than --num-classes 3"),
        ({"model_kwargs": ("drop=0.1",)}, "unexpected keyword argument 'drop'. Check --model-kwargs"),
        ({"model_kwargs": ("drop",)}, "--model-kwargs takes NAME=VALUE, got 'drop'"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"warmup_epochs": 1}, r"--warmup-epochs must be less than --epochs \(1\)"),
        ({"lr": float("nan")}, "--lr must be positive"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"batch_size": 500}, "122 training images do not fill one step of 500 x 1 processes: use --batch-size 122"),
        ({"data_dir": None}, "--data-dir"),
        ({"data_dir": Path("nowhere")}, "No data at nowhere"),
        ({"dataset": "hfds/nowhere", "data_dir": None}, "Cannot open the 'train' split of hfds/nowhere"),
        ({"mean": (0.5, 0.4)}, "--mean takes one value for all channels or 3"),
        ({"resume": True}, "No run to resume in .*: leave out --resume"),
    ],
)
def test_refused_before_anything_is_written(images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as e:
        pretrain(config(images, tmp_path / "run", **changes))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def _empty(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def _one_class(root: Path) -> None:
    for split in ("train", "validation"):
        for k in range(1, 5):
            shutil.rmtree(root / split / f"class{k}")


def _no_splits(root: Path) -> None:
    shutil.rmtree(root / "validation")
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)
    (root / "train").rmdir()


def _unknown_class(root: Path) -> None:
    (root / "validation" / "class4").rename(root / "validation" / "class9")


def _truncated(root: Path) -> None:
    path = root / "train" / "class2" / "3.png"
    path.write_bytes(path.read_bytes()[:-200])


def _not_an_image(root: Path) -> None:
    (root / "validation" / "class1" / "2.png").write_text("hello")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_empty, "Cannot open the 'train' split of .*Found 0 images"),
        (_one_class, "has one class only; a classifier needs at least two"),
        (_no_splits, "has no folders 'train' and 'validation'"),
        (_unknown_class, r"1 classes of the 'validation' split are not in 'train' \(class9"),
        (_truncated, r"Unreadable image: .*train/class2/3\.png \(.*truncated.*\)\. Replace or remove it"),
        (_not_an_image, r"Unreadable image: .*validation/class1/2\.png"),
    ],
)
def test_bad_data_is_named_before_training(images: Path, tmp_path: Path, damage: Any, says: str) -> None:
    shutil.copytree(images, tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(UsageError, match=says) as e:
        pretrain(config(tmp_path / "data", tmp_path / "run"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_class_missing_in_validation_does_not_shift_the_others(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "validation" / "class0")
    from timm_etf.pretrain.data import open_splits

    splits = open_splits(config(tmp_path / "data", tmp_path / "run"))
    labels = {Path(path).parent.name: label for path, label in splits.val.reader.samples}  # type: ignore[attr-defined]
    assert labels == {f"class{k}": k for k in range(1, 5)}


def test_what_is_there_is_not_touched(images: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists and is not empty: continue that run with --resume"):
        pretrain(config(images, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_divergence_is_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"The loss is not finite at step .* of epoch 1: lower --lr"):
        pretrain(config(images, tmp_path / "run", model="test_resnet", lr=1e18, epochs=2, sched="none"))


SCRIPT = str(Path(sys.executable).with_name("timm-etf"))


@pytest.mark.parametrize("verb", [[sys.executable, "-m", "timm_etf.pretrain"], [SCRIPT, "pretrain"]])
def test_a_command_prints_one_line_and_exits_with_2(images: Path, tmp_path: Path, verb: list[str]) -> None:
    out = subprocess.run(
        [*verb, "--model", "resnet5_etf", "--data-dir", images, "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    assert out.stderr.startswith("error: Unknown model 'resnet5_etf'")
    assert out.stderr.count("\n") == 1
