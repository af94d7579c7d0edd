import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from timm_etf import UsageError, demo


def test_the_demo_from_nothing_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One epoch instead of fourteen; everything else is what the command does.
    recipe = demo.config
    monkeypatch.setattr(
        demo, "config", lambda *args, **kwargs: dataclasses.replace(recipe(*args, **kwargs), epochs=1, warmup_epochs=0)
    )
    out = tmp_path / "demo"
    results = demo.run(out)
    assert json.loads(json.dumps(results)) == json.loads((out / "results.json").read_text())
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
    assert f"| mnist-5k | 1000 | {results['targets'][-1]['ETF']['accuracy']:.1f} [" in card

    with pytest.raises(UsageError, match="continue that demo with --resume"):
        demo.run(out)
    again = demo.run(out, resume=True)
    assert again["targets"] == results["targets"]
