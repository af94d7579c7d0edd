"""Runs whose classifier is learned for some epochs and then fixed to the frame of the class means."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import timm_etf
from tests import commands
from tests.pretrain.runs import arguments, assert_same, config, lines, weights
from timm_etf import FixedClassifier, UsageError, frames
from timm_etf.frames.nearest import from_means
from timm_etf.pretrain.loop import pretrain
from timm_etf.pretrain.setup import setup
from timm_etf.pretrain.warm_frame import set_frame

SETTINGS = ("--frame-from-means", 2, "--epochs", 4, "--model-ema", "--model-ema-decay", 0.9, "--layer-decay", 0.9)
SETTINGS += ("--checkpoint-steps", 8, "--checkpoint-hist", 100, "--mixup", 0.2, "--opt", "lookahead_adamw")


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = commands.run(*arguments(images, out, *SETTINGS), check=True)
    assert done.stdout.count("classifier fixed to the simplex nearest to the class means: largest cosine -0.250") == 1
    return out


def still_features(images: Path, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the training images, without augmentation."""
    dataset = timm.data.create_dataset("", root=str(images / "train"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x, y = zip(*dataset, strict=True)
    with torch.no_grad():
        found = model.eval().forward_head(model.forward_features(torch.stack(x)), pre_logits=True)
    return found.double(), torch.tensor(y)


def test_the_frame_is_that_of_the_means_when_it_is_set(images: Path, tmp_path: Path) -> None:
    # Nothing is learned, so that the features of the export are those of the moment.
    settings = {"frame_from_means": 1, "epochs": 2, "lr": 1e-30, "weight_decay": 0.0, "freeze_bn": True}
    pretrain(config(images, tmp_path / "run", **settings))
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert isinstance(net.fc, FixedClassifier)
    x, y = still_features(images, net)
    means = torch.stack([x[y == k].mean(0) for k in range(5)])
    unit = torch.nn.functional.normalize(net.fc.weight.double(), dim=1)
    torch.testing.assert_close(unit, frames.nearest_simplex(means), atol=1e-4, rtol=0)
    assert net.fc.frame == "simplex"
    assert net.fc.scale > 0
    found = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert found["etf"]["recipe"]["frame_from_means"] == 1
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "frozen after 1 of 2 epochs" in card


def test_where_no_simplex_fits_it_is_the_means_own_directions(images: Path, tmp_path: Path) -> None:
    settings = {"model": "resnet10t_etf", "model_kwargs": ("channels=(8, 8, 8, 3)", "stem_width=8"), "lr": 0.01}
    pretrain(config(images, tmp_path / "run", frame_from_means=1, epochs=2, **settings))
    net = timm_etf.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert net.fc.frame == "own"
    unit = torch.nn.functional.normalize(net.fc.weight, dim=1)
    assert unit.norm(dim=1).tolist() == pytest.approx([1.0] * 5)
    orthoplex = frames.orthoplex(5, 3).float()  # which it would have been else
    assert not torch.allclose(unit @ unit.T, orthoplex @ orthoplex.T, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("epoch-0000-step-000008", marks=pytest.mark.slow),
        "epoch-0001-step-000008",
        pytest.param("epoch-0002-step-000000", marks=pytest.mark.slow),
        "epoch-0003-step-000008",
    ],
)
def test_a_run_goes_on_to_the_bit_from_before_and_after(
    images: Path, straight: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for other in (out / "checkpoints").iterdir():
        if other.name > name:
            shutil.rmtree(other)
    shutil.rmtree(out / "export")
    done = commands.run(*arguments(images, out, *SETTINGS, "--resume"), check=True)
    assert ("classifier fixed" in done.stdout) == (name < "epoch-0002")
    assert_same(out, straight)


def test_the_optimizer_forgets_the_learned_rows_and_nothing_else(images: Path, tmp_path: Path) -> None:
    run = setup(config(images, tmp_path / "run", frame_from_means=1, epochs=3, model_kwargs=("projector=mlp",)))
    run.step.train()
    for update, batch in enumerate(run.train.epoch(0)):
        run.step([batch], 1, update)
    before = {name: p for name, p in run.plain_model.named_parameters()}
    momenta = {name: run.step.optimizer.state[p]["momentum_buffer"].clone() for name, p in before.items()}
    projector = run.plain_model.fc.projector
    step, _ = set_frame(run.step, run.config, run.train, run.data_config)
    run.close()
    after = dict(run.plain_model.named_parameters())
    assert before.keys() - after.keys() == {"fc.weight", "fc.bias"}
    assert run.plain_model.fc.projector is projector
    optimizer = step.optimizer.optimizer
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in after.values()} == {id(p) for p in optimizer.state}
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], momenta[name]) for name, p in after.items())
    frame = run.plain_model.fc.weight.clone()
    step.train()
    step([next(iter(run.train.epoch(1)))], 1, 7)
    assert torch.equal(run.plain_model.fc.weight, frame)


@pytest.mark.parametrize("more", [(), pytest.param(("--loss", "normface"), marks=pytest.mark.slow)], ids=str)
def test_two_processes_have_one_frame_and_that_of_all_images(
    images: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    # Without batch statistics and updates: what differs from one process is the share of the images alone.
    still = ("--freeze-bn", "--model-kwargs", "drop_rate=0.0", "--lr", 1e-30)
    still += ("--weight-decay", 0, "--epochs", 2, "--warmup-epochs", 0, "--frame-from-means", 1, *more)
    commands.run_ranks(2, *arguments(images, tmp_path / "two", *still))
    commands.run(*arguments(images, tmp_path / "one", *still), check=True)
    ours, theirs = (weights(tmp_path / name)["fc.weight"] for name in ("one", "two"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit(images: Path, tmp_path: Path) -> None:
    more = ("--epochs", 3, "--frame-from-means", 1, "--checkpoint-hist", 100)
    commands.run_ranks(2, *arguments(images, tmp_path / "straight", *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for name in ("epoch-0002-step-000000", "epoch-0003-step-000000"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    commands.run_ranks(2, *arguments(images, tmp_path / "run", *more, "--resume"))
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_the_frame_of_given_weights_is_set_before_the_first_step(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "old", epochs=4, warmup_epochs=1, lr=0.05, model="test_resnet"))
    init = f"local-dir:{tmp_path / 'old' / 'export'}"
    settings = {"init": init, "frame_from_means": 0, "lr": 1e-3}
    pretrain(config(images, tmp_path / "run", **settings))
    net = timm.create_model(init, pretrained=True)
    x, y = still_features(images, net)
    expected = from_means(torch.stack([x[y == k].mean(0) for k in range(5)]))
    torch.testing.assert_close(weights(tmp_path / "run")["fc.weight"].double(), expected, atol=1e-4, rtol=0)
    assert lines(tmp_path / "run")[0]["top1"] > 60  # of the frame, which was there before training
    # And the best of a run that has had two classifiers is under the fixed one.
    pretrain(config(images, tmp_path / "run", **settings, export="best", resume=True))


@pytest.mark.slow
def test_a_stream_of_images(shards: Path, tmp_path: Path) -> None:
    splits = {"train_split": "train-{0000..0001}.tar|122", "val_split": "validation-0000.tar|37"}
    wds = {"dataset": "wds/x", "num_classes": 5, **splits}
    pretrain(config(shards, tmp_path / "run", frame_from_means=1, epochs=2, **wds))
    assert frames.is_simplex(weights(tmp_path / "run")["fc.weight"])
    with pytest.raises(UsageError, match="Class 5 has no training images, so no mean"):
        pretrain(config(shards, tmp_path / "other", frame_from_means=1, epochs=2, **wds | {"num_classes": 6}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "test_resnet"}, "--frame-from-means makes a fixed classifier: use --model test_resnet_etf"),
        ({"frame_from_means": 9}, r"--frame-from-means must be less than --epochs \(3\), got 9"),
        ({"frame_from_means": -1}, r"--frame-from-means must be in \[0, inf\)"),
        ({"frame_from_means": 0}, "name them with --init, or train for some epochs first"),
        ({"model_kwargs": ("frame=simplex",)}, "--frame-from-means says which frame: leave out"),
        ({"model_kwargs": ("learn_scale=yes",)}, "--frame-from-means says which frame: leave out"),
        ({"hierarchy": Path("x")}, "--frame-from-means says which frame: leave out"),
        ({"reserve": 2}, "leave out --reserve, --distill, --fsdp and --loss dot_regression and gram"),
        ({"loss": "dot_regression"}, "leave out --reserve, --distill, --fsdp and --loss dot_regression and gram"),
        ({"model": "deit_tiny_distilled_patch16_224_etf"}, "is for one classifier, and this model has 2"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    images: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        pretrain(config(images, tmp_path / "run", **{"frame_from_means": 1, "epochs": 3} | changes))
    assert not (tmp_path / "run").exists()
