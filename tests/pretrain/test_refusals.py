import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests import commands
from tests.pretrain.runs import config
from timm_etf import UsageError
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.data import open_task
from timm_etf.pretrain.loop import pretrain

NAN, INF = float("nan"), float("inf")


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
        ({"model": "gemma4_vit_167m_enc_etf"}, "has no _etf variant: an encoder"),
        (
            {"model_kwargs": ("frame=hadamard", "projector=mpl")},
            "test_resnet_etf: Unknown projector 'mpl'",
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
        ({"cutmix": 1.0, "batch_size": 15}, "--batch-size must be even, got 15"),
        ({"feature_entropy": 0.1, "batch_size": 1}, "--batch-size must be at least 2"),
        ({"batch_size": 1}, "Expected more than 1 value per channel.*: check --img-size, --batch-size"),
        ({"num_classes": 3}, "5 classes, not --num-classes 3: leave it out"),
        ({"num_classes": 7}, "5 classes, not --num-classes 7: leave it out"),
        ({"model_kwargs": ("drop=0.1",)}, "unexpected keyword argument 'drop'. Check --model-kwargs"),
        ({"model_kwargs": ("drop",)}, "--model-kwargs takes NAME=VALUE, got 'drop'"),
        ({"model_kwargs": ("frame_seed=7",)}, "use --frame-seed"),
        ({"model_kwargs": ("drop_rate=abc",)}, "could not convert string to float: 'abc'.*--model-kwargs"),
        ({"model_kwargs": ("drop_rate=7",)}, "dropout probability has to be between 0 and 1.*--model-kwargs"),
        ({"model_kwargs": ("features_only=True",)}, "--model-kwargs"),
        ({"model": "test_vit_etf", "img_size": 33}, "divisible by patch size.*--img-size"),
        ({"auto_augment": "nonsense"}, "Unknown AA policy nonsense.*: check --auto-augment"),
        ({"std": (1e-50,)}, r"--std must be in \[1e-6, inf\)"),
        ({"opt": "sdg"}, "Unknown --opt 'sdg': did you mean .*sgd"),
        ({"opt": "zzz"}, r"Unknown --opt 'zzz': timm\.optim\.list_optimizers"),
        ({"opt": "fusedlamb"}, "check --opt"),  # a package that is not there, or has no GPU to run on
        ({"sched": "cosin"}, "Unknown --sched 'cosin': did you mean cosine"),
        ({"sched": "plateau"}, "Unknown --sched 'plateau': use one of constant, cosine"),
        ({"tracker": "wandb"}, r"--tracker wandb needs a package .*: pip install 'timm_etf\[wandb\]'"),
        ({"warmup_epochs": 1}, r"--warmup-epochs must be less than --epochs \(1\)"),
        ({"batch_size": 500}, "122 training images do not fill one batch of 500 x 1 processes: use --batch-size 122"),
        ({"data_dir": None}, "--data-dir"),
        ({"data_dir": Path("nowhere")}, "No data at nowhere"),
        ({"data_dir": Path(__file__)}, r"Cannot read --data-dir .* \(Not a directory\)"),
        ({"dataset": "hfds/nowhere", "data_dir": None}, "Cannot open the 'train' split of hfds/nowhere"),
        ({"dataset": "nosuch/x"}, "Unknown --dataset 'nosuch/x': use folder, hfds/NAME"),
        ({"dataset": "wds"}, "Unknown --dataset 'wds': use folder, .*wds/NAME"),
        ({"train_split": "trian"}, r"has no folder 'trian' \(it holds train, validation\): .* --train-split"),
        ({"val_split": "test"}, r"has no folder 'test' \(it holds train, validation\): .* --val-split"),
        ({"scale": (1.0, 0.1)}, "--scale takes the smaller value first, got 1.0 0.1"),
        ({"mean": (0.5, 0.4)}, "--mean takes one value for all channels or 3"),
        ({"resume": True}, "No run to resume in .*: leave out --resume"),
    ],
)
def test_refused_before_anything_is_written(images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as e:
        pretrain(config(images, tmp_path / "run", **changes))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "num_classes": (1, -3),
    "img_size": (0, -5, 100_000),
    "mean": ((NAN,), (INF, 0.0, 0.0)),
    "std": ((NAN, NAN, NAN), (0.0, 0.0, 0.0), (-1.0,)),
    "crop_pct": (0.0, -1.0, NAN, 1.5),
    "scale": ((-1.0, 1.0), (0.5, 2.0), (0.0, 1.0)),
    "ratio": ((0.0, 0.0), (1.0, INF)),
    "hflip": (3.0, -0.1),
    "color_jitter": (-3.0, NAN),
    "reprob": (5.0,),
    "epochs": (0,),
    "batch_size": (0, -4),
    "lr": (0.0, -1.0, NAN, INF),
    "momentum": (5.0, 1.0, -0.1),
    "weight_decay": (-1.0, NAN, INF),
    "warmup_epochs": (-1,),
    "smoothing": (-1.0, 1.0, 2.0),
    "mixup": (-1.0, NAN),
    "cutmix": (INF,),
    "feature_entropy": (NAN, -0.1),
    "seed": (-1, 99_999_999_999_999_999_999),
    "workers": (-1,),
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_every_number_has_its_range(option: str, tmp_path: Path) -> None:
    for value in OUT_OF_RANGE[option]:
        with pytest.raises(UsageError, match=f"^--{option.replace('_', '-')} must be in [^\n]*, got [^\n]*$"):
            config(tmp_path / "data", tmp_path / "run", **{option: value}).check()


def test_the_ends_of_the_ranges_are_allowed(tmp_path: Path) -> None:
    ends = {"hflip": 1.0, "reprob": 1.0, "smoothing": 0.0, "scale": (1.0, 1.0), "crop_pct": 1.0, "momentum": 0.0}
    config(tmp_path / "data", tmp_path / "run", **ends, weight_decay=0.0, seed=2**31 - 1, num_classes=2).check()


def test_words_for_yes_and_no(tmp_path: Path) -> None:
    said = ("feature_norm=yes", "learn_scale=no", "a=True", "b=false", "frame=gaussian", "channels=(32, 64)")
    assert PretrainConfig(model="test_resnet_etf", out=tmp_path, model_kwargs=said).parsed_model_kwargs == {
        "feature_norm": True,
        "learn_scale": False,
        "a": True,
        "b": False,
        "frame": "gaussian",
        "channels": (32, 64),
    }


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


def _no_validation(root: Path) -> None:
    shutil.rmtree(root / "validation")


def _link_to_above(root: Path) -> None:
    (root / "train" / "class0" / "loop").symlink_to("..")


def _class_linked_twice(root: Path) -> None:
    (root / "validation" / "class9").symlink_to("class0")
    (root / "train" / "class9").symlink_to("class0")


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
        (
            _no_splits,
            r"has no folder 'train' \(it holds class0, class1, .*\): put images into train/CLASS, or name another",
        ),
        (_no_validation, r"has no folder 'validation' \(it holds train\): put images .* with --val-split"),
        (_link_to_above, "are one folder, whose images would count twice: remove the link"),
        (_class_linked_twice, "class9 and .*class0 are one folder"),
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
    val: Any = open_task(config(tmp_path / "data", tmp_path / "run")).val
    labels = {Path(path).parent.name: label for path, label in val.reader.samples}
    assert labels == {f"class{k}": k for k in range(1, 5)}


def test_what_is_there_is_not_touched(images: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists and is not empty: continue that run with --resume"):
        pretrain(config(images, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file", "file is a file, or below one: choose a folder"),
        ("file/run", "file/run is a file, or below one: choose a folder"),
        ("data/train/run", "lies among the images of 'train': choose a folder outside"),
        ("data", "already exists and is not empty"),
    ],
)
def test_out_is_a_folder_of_its_own(tmp_path: Path, out: str, says: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match=says):
        pretrain(config(tmp_path / "data", tmp_path / out))


@contextmanager
def _without_privileges() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:  # whom permissions do not stop
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_not_be_read_is_named_so(images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    data.chmod(0)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    try:
        with _without_privileges(), pytest.raises(UsageError, match=r"Cannot read --data-dir .* \(Permission denied\)"):
            open_task(config(data, tmp_path / "run"))
    finally:
        data.chmod(0o755)


@pytest.mark.parametrize("content", ["[]", '{"settings": []}', "{}", '{"settings"', ""])
def test_a_damaged_record_is_named(images: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json is damaged .*: restore it, or start again elsewhere"):
        pretrain(config(images, tmp_path, resume=True))


def test_a_failed_start_leaves_nothing_that_blocks_the_next(images: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    handle = register_optimizer_step_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            pretrain(config(images, tmp_path / "run", batch_size=32))
    finally:
        handle.remove()
    assert not (tmp_path / "run").exists()
    pretrain(config(images, tmp_path / "run", batch_size=16))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["batch_size"] == 16


def test_divergence_is_named(images: Path, tmp_path: Path) -> None:
    diverges = config(images, tmp_path / "run", model="test_resnet", lr=1e18, epochs=2, sched="none")
    with pytest.raises(UsageError, match=r"The loss is not finite at step .* of epoch 1: .*lower --lr or "):
        pretrain(diverges)


def test_a_command_prints_one_line_and_exits_with_2(images: Path, tmp_path: Path) -> None:
    done = commands.run("pretrain", "--model", "resnet5_etf", "--data-dir", images, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unknown model 'resnet5_etf'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "asks for gradient_accumulation_steps 4"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for MEGATRON_LM"),
    ],
)
def test_what_the_launcher_asks_for_is_done_or_refused(
    images: Path, tmp_path: Path, asked: dict[str, str], says: str
) -> None:
    done = commands.run(
        "pretrain", "--model", "test_resnet_etf", "--data-dir", images, "--out", tmp_path / "run", env=asked
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: The launcher {says}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
