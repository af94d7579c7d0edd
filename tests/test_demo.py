import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from timm_etf import UsageError, demo, hub
from timm_etf.transfer import Result


def test_a_card_has_the_probes_of_its_own_head_and_the_difference(tmp_path: Path) -> None:
    rng, y = np.random.default_rng(0), np.zeros(500, np.int64)
    probes = {}
    for head, share in zip(demo.HEADS, (0.6, 0.8), strict=True):
        probes[head] = {"letters": Result((rng.random(500) < share).astype(np.float32), y, "standardised")}
        source = {"data": "shapes", "top1": 50.0}
        hub.export(timm.create_model("test_resnet"), tmp_path / demo.HEADS[head] / "export", results={"source": source})
    compared = demo._compare(tmp_path, {"letters": tmp_path}, probes)
    for head, name in demo.HEADS.items():
        folder = tmp_path / name / "export"
        demo._add_to_card(folder, compared)
        low, high = probes[head]["letters"].interval()
        row = f"| letters | 500 | {probes[head]['letters'].accuracy():.1f} [{low:.1f} to {high:.1f}] |"
        assert row in (folder / "README.md").read_text()
        [own] = json.loads((folder / "results.json").read_text())["transfer"]
        assert (own["label"], own["reference"]) == (head, None if head == "learned" else "learned")


def _images(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".png"))


def test_the_demo_and_its_continuation(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One epoch instead of fourteen, on fewer and smaller images; everything else is what the command does.
    recipe = demo.config
    less = {"epochs": 1, "warmup_epochs": 0, "img_size": 24}
    monkeypatch.setattr(demo, "config", lambda *args, **kwargs: dataclasses.replace(recipe(*args, **kwargs), **less))
    out = tmp_path / "demo"
    # As if it had been stopped once the images were drawn, six of each class.
    shutil.copytree(embedded, out / "data", copy_function=os.link, ignore=lambda _, names: _images(names)[6:])
    results = demo.run(out, resume=True)
    written = json.loads((out / "results.json").read_text())
    assert {"schema": 1} | json.loads(json.dumps(results)) == written
    assert results["logits_identical_after_reload"] is True
    assert [t["target"] for t in results["targets"]] == [
        "pictograms-novel",
        "letters-greek",
        "letters-cyrillic",
        "mnist-5k",
    ]
    for target in results["targets"]:
        for head in ("learned", "ETF"):
            low, high = target[head]["interval"]
            assert 0 < low <= target[head]["accuracy"] <= high <= 100
        low, high = target["difference"]["interval"]
        assert low <= target["ETF"]["accuracy"] - target["learned"]["accuracy"] <= high
    assert Image.open(out / "demo.png").size == (1800, 750)
    printed = capsys.readouterr().out
    assert "timm-etf pretrain --model resnet50_etf" in printed
    assert f"local-dir:{out / 'resnet10t_etf' / 'export'}" in printed
    card = (out / "resnet10t_etf" / "export" / "README.md").read_text()
    assert f"| mnist-5k | 60 | {results['targets'][-1]['ETF']['accuracy']:.1f} [" in card

    with pytest.raises(UsageError, match="continue that demo with --resume"):
        demo.run(out)
    targets = demo.build_targets
    monkeypatch.setattr(demo, "build_targets", lambda root: {"letters-greek": targets(root)["letters-greek"]})
    again = demo.run(out, resume=True)
    assert again["targets"] == results["targets"][1:2]
