"""`--config FILE`."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import commands
from tests.pretrain.runs import arguments, assert_same, config
from timm_etf import UsageError
from timm_etf.pretrain import recipe
from timm_etf.pretrain.config import PretrainConfig


def parsed(*arguments: object) -> PretrainConfig:
    return tyro.cli(PretrainConfig, args=recipe.with_recipe([str(a) for a in arguments]))


def test_options_on_the_command_line_count_more_than_the_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: resnet50_etf\nlr: 1e-3\nscale: [0.2, 1.0]\nmodel-kwargs: {frame: gaussian, logit_scale: 4}\n"
        "model_ema: true\ncompile: false\nclip_grad:\nopt_kwargs: ['betas=(0.8,0.9)']\n"
    )
    found = parsed("--lr", 0.5, "--config", file, "--no-model-ema", "--out", "run")
    assert (found.model, found.lr, found.scale, found.out) == ("resnet50_etf", 0.5, (0.2, 1.0), Path("run"))
    assert (found.model_ema, found.compile, found.clip_grad) == (False, False, None)
    assert found.parsed_model_kwargs == {"frame": "gaussian", "logit_scale": 4}
    assert found.parsed_opt_kwargs["betas"] == (0.8, 0.9)
    assert parsed(f"--config={file}", "--out", "run").lr == 1e-3


_VALUES = {
    float: st.floats(-1e6, 1e6),
    int: st.integers(-(10**6), 10**6),
    str: st.text("abc/:|{}.0-", min_size=1).filter(lambda text: not text.startswith("-")),
}


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    changes: dict[str, Any] = {}
    for name in data.draw(st.sets(st.sampled_from(["lr", "batch_size", "train_split", "clip_grad", "mean", "resume"]))):
        kind = {"lr": float, "clip_grad": float, "batch_size": int, "train_split": str, "mean": float}.get(name)
        value: Any = True if kind is None else data.draw(_VALUES[kind])
        changes[name] = (value, value, value) if name == "mean" else value
    changes["model_kwargs"] = tuple(data.draw(st.lists(st.sampled_from(["frame=gaussian", "a=(1,2)", "b=no"]))))
    written = PretrainConfig(model="resnet50_etf", out=Path("a b/run"), **changes)
    file = tmp_path_factory.mktemp("recipe") / "config.yaml"
    recipe.write(written, file)
    assert parsed("--config", file) == dataclasses.replace(written, resume=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batchsize: 3", "no option 'batchsize'; did you mean batch_size?"),
        ("resumed: x\n", "no option 'resumed'"),
        ("lr: [1, 2", "line 1"),
        ("just words", "holds no options"),
        ("- 1\n- 2", "holds no options"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        parsed("--config", file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read --config"):
        parsed("--config", tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="--config takes a yaml file, or one of fixed-frame"):
        parsed("--config")


def test_a_recipe_of_the_package_is_known_by_its_name() -> None:
    found = parsed("--config", "fixed-frame", "--model", "resnet50_etf", "--out", "run")
    assert (found.model, found.parsed_model_kwargs["projector"]) == ("resnet50_etf", "mlp")
    assert found.loss == "ntce"
    assert found.temperature is None  # so that another loss can be put behind it


def test_a_run_is_repeated_by_what_it_leaves(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"epochs": 2, "lr": 0.5, "model_ema": True}))
    commands.run(*arguments(images, tmp_path / "run", "--lr", 0.01, "--config", file), check=True)
    kept = tmp_path / "run" / "config.yaml"
    assert parsed("--config", kept).lr == 0.01
    commands.run("pretrain", "--config", kept, "--out", tmp_path / "again", check=True)
    assert_same(tmp_path / "again", tmp_path / "run")
    # And it continues with it.
    done = commands.run("pretrain", "--config", kept, "--resume", check=True)
    assert "top-1" in done.stdout


def test_every_option_has_its_name_in_a_file(images: Path, tmp_path: Path) -> None:
    recipe.write(config(images, tmp_path / "run"), tmp_path / "config.yaml")
    names = [f.name for f in dataclasses.fields(PretrainConfig) if f.name != "resume"]
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == names
