import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import tyro
from PIL import Image

from timm_etf import UsageError, demo, hub
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.recipe import with_recipe
from timm_etf.transfer import Result


def test_a_card_has_the_probes_of_its_own_training_and_the_difference_of_the_methods(tmp_path: Path) -> None:
    rng, y = np.random.default_rng(0), np.zeros(500, np.int64)
    probes: dict[str, list[dict[str, Result]]] = {head: [] for head in demo.HEADS}
    exports: dict[str, list[Path]] = {head: [] for head in demo.HEADS}
    for head, share in zip(demo.HEADS, (0.6, 0.8), strict=True):
        for seed in (0, 1):
            correct = (rng.random(500) < share - 0.05 * seed).astype(np.float32)
            probes[head].append({"letters": Result(correct, y, "standardised")})
            source, folder = {"source": {"data": "shapes", "top1": 50.0}}, tmp_path / f"{head}{seed}"
            exports[head].append(hub.export(timm.create_model("test_resnet"), folder, results=source))
    compared = demo._compare(exports, {"letters": tmp_path}, probes).as_json()
    assert compared["protocols"]["probe"]["mean"]["differences"]["ETF"]["runs_are"] == "trainings"  # type: ignore[index]
    for head in demo.HEADS:
        for folder, probe in zip(exports[head], probes[head], strict=True):
            demo._add_to_card(folder, compared)
            low, high = probe["letters"].interval()
            row = f"| letters | 500 | {probe['letters'].accuracy():.1f} [{low:.1f} to {high:.1f}] |"
            assert row in (folder / "README.md").read_text()
            [own] = json.loads((folder / "results.json").read_text())["transfer"]
            assert (own["label"], own["reference"]) == (head, None if head == "learned" else "learned")


def test_what_is_fixed_is_as_the_packages_recipe_says(tmp_path: Path) -> None:
    names = ["--model", demo.HEADS["ETF"], "--out", str(tmp_path), "--config", "fixed-frame"]
    named = tyro.cli(PretrainConfig, args=with_recipe(names))
    ours = demo.config(demo.HEADS["ETF"], tmp_path, tmp_path, seed=0)
    assert ours.loss == named.loss
    assert {**ours.parsed_model_kwargs, **named.parsed_model_kwargs} == ours.parsed_model_kwargs


def _images(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".png"))


def test_the_demo_and_its_continuation(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One epoch instead of ten, on fewer and smaller images, two trainings of each; all else is what the command does.
    recipe = demo.config
    less = {"epochs": 1, "warmup_epochs": 0, "img_size": 24}
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "config", lambda *args, **kwargs: dataclasses.replace(recipe(*args, **kwargs), **less))
    out = tmp_path / "demo"
    # As if it had been stopped once the images were drawn, four of each class.
    shutil.copytree(embedded, out / "data", copy_function=os.link, ignore=lambda _, names: _images(names)[4:])
    results = demo.run(out, resume=True)
    written = json.loads((out / "results.json").read_text())
    assert {"schema": 1} | json.loads(json.dumps(results)) == written
    assert results["identical_after_reload"] is True
    targets = results["transfer"]["protocols"]["probe"]["targets"]
    assert list(targets) == ["pictograms-novel", "letters-greek", "letters-cyrillic", "mnist-5k"]
    for target in targets.values():
        for head in ("learned", "ETF"):
            low, high = target["models"][head]["interval_over_test_images"]
            assert 0 < low <= target["models"][head]["accuracy"] <= high <= 100
        difference = target["differences"]["ETF"]
        low, high = difference["interval_over_runs_and_images"]
        assert low <= difference["mean"] <= high
        assert difference["mean"] == pytest.approx(np.mean(difference["by_run"]))
    assert Image.open(out / "demo.png").size == (1800, 750)
    printed = capsys.readouterr().out
    assert "timm-etf pretrain --config fixed-frame --model resnet50_etf" in printed
    exports = [out / f"{name}-{seed}" / "export" for name in demo.HEADS.values() for seed in (0, 1)]
    assert f"local-dir:{exports[2]}" in printed
    for folder, measured in zip(exports[2:], targets["mnist-5k"]["models"]["ETF"]["by_model"], strict=True):
        assert f"| mnist-5k | 40 | {measured['accuracy']:.1f} [" in (folder / "README.md").read_text()

    with pytest.raises(UsageError, match="continue that demo with --resume"):
        demo.run(out)
    build = demo.build_targets
    monkeypatch.setattr(demo, "build_targets", lambda root: {"letters-greek": build(root)["letters-greek"]})
    again = demo.run(out, resume=True)
    assert again["transfer"]["protocols"]["probe"]["targets"] == {"letters-greek": targets["letters-greek"]}
