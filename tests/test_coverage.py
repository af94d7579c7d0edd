import json
import sys
from pathlib import Path

import pytest
import timm

from tests import commands
from timm_etf import UsageError, coverage, frames
from timm_etf.classifier import fixed_classifiers
from timm_etf.coverage import SHIPPED, classifiers, left_out, table
from timm_etf.variants import skipped


def test_coverage_is_what_the_models_have() -> None:
    rows = {row.name: row for row in coverage("test_*", 500)}
    assert set(rows) == {n for n in timm.list_models("test_*_etf") if not n.endswith("_sw_etf")}
    for name in ("test_resnet_etf", "test_vit_etf", "test_convnext_etf"):
        net = timm.create_model(name, num_classes=500)
        [(_, head)] = fixed_classifiers(net)
        assert rows[name].widths == (head.in_features,)
        assert rows[name].frames == (head.frame,)
        assert rows[name].saved_parameters == sum(b.numel() for b in head.buffers())
        assert rows[name].bound == frames.bound(500, head.in_features)


@pytest.mark.skipif(json.loads(SHIPPED.read_text())["timm"] != timm.__version__, reason="of another timm")
def test_what_is_shipped_is_what_building_tells() -> None:
    shipped = json.loads(SHIPPED.read_text())
    names = [n.removesuffix("_etf") for n in timm.list_models("*_etf") if not n.endswith("_sw_etf")]
    assert list(shipped["classifiers"]) == names
    assert shipped["left_out"] == skipped
    for pattern in ("test_*", "crossvit_9*", "resnet10t"):
        for name, heads in classifiers(pattern).items():
            assert [tuple(head) for head in shipped["classifiers"][name]] == heads


def test_of_another_timm_the_models_are_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = sys.modules["timm_etf.coverage"]
    shipped = {"timm": "0", "left_out": {}, "classifiers": {"resnet10t": [[1, True]]}}
    (tmp_path / "coverage.json").write_text(json.dumps(shipped))
    before = [coverage(pattern, 500) for pattern in ("test_resn*", "crossvit_9_240")]
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "coverage.json")
    module._shipped.cache_clear()
    try:
        assert [coverage(pattern, 500) for pattern in ("test_resn*", "crossvit_9_240")] == before
        assert left_out() == skipped
    finally:
        module._shipped.cache_clear()


def test_coherence_of_optimal_frames_is_the_bound_and_of_codes_what_was_computed() -> None:
    [optimal] = coverage("resnet50", 1000)
    assert optimal.coherence == optimal.bound == -1 / 999
    [zero] = coverage("resnet18", 1000)
    assert zero.coherence == zero.bound == 0
    [row] = coverage("test_vit", 331, compute=True)
    assert row.frames == ("spherical_code",)
    expected = frames.coherence(frames.make("auto", 331, row.widths[0]))
    assert coverage("test_vit", 331)[0].coherence == pytest.approx(expected, abs=1e-6)
    assert row.bound < expected < frames.coherence(frames.gaussian(331, row.widths[0]))


def test_several_classifiers_in_one_row() -> None:
    [row] = coverage("crossvit_9_240", 200)
    assert row.widths == (128, 256)
    assert row.frames == ("orthoplex", "simplex")
    assert row.coherence == 0
    assert row.saved_parameters == 200 * (128 + 256 + 2)


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="No architecture matches 'resnet5'"):
        coverage("resnet5")
    with pytest.raises(UsageError, match="gemma4_vit_167m_enc is left out: an encoder"):
        coverage("gemma4_vit_167m_enc")
    with pytest.raises(UsageError, match="at least 2 classes"):
        coverage("resnet50", 1)


def test_without_a_place_for_a_cache_the_table_is_the_same() -> None:
    command = ("models", "resnet10t_sw")  # which the package does not know without building it
    done = commands.run(*command, env={"HF_ASSETS_CACHE": "/proc/nohome"}, check=True)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("could not be kept") == 1
    assert done.stdout == commands.run(*command, check=True).stdout


def test_the_command_prints_the_table() -> None:
    printed = commands.run("models", "resnet1[08]*", "--num-classes", "1000", check=True).stdout
    assert "resnet18_etf" in printed
    assert "next: " in printed
    rows = table(coverage("resnet18", 1000), 1000).splitlines()
    assert rows[1].split() == ["resnet18_etf", "512", "orthoplex", "0.0000", "0.0000", "513,000", "4.1", "MB"]
    done = commands.run("models", "zzz")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: No architecture matches 'zzz': timm.list_models() lists the names."
