"""README says what the result files say, its commands have the options it gives them, and its code runs."""

import functools
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tyro

from timm_etf import cli, hub, published
from timm_etf.report.statistics import in_quadrature, t_interval

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def results(name: str) -> Any:
    return json.loads((ROOT / "examples" / name / "results.json").read_text(encoding="utf-8"))


def rows(*first_cells: str) -> Iterator[list[str]]:
    """Cells of README's table rows that begin with these."""
    for first in first_cells:
        found = re.search(rf"^\| {re.escape(first)}[^|]*\|(.*)\|$", README, re.MULTILINE)
        assert found, first
        yield [cell.strip() for cell in found[1].split("|")]


def signed(mean: float, interval: list[float] | None) -> str:
    return f"{mean:+.1f}" + (f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else "")


def test_transfer() -> None:
    found = results("transfer")["protocols"]
    means = [found[p]["mean"] for p in ("probe", "knn", "1-shot", "5-shot", "10-shot")]
    learned, etf, sw = rows("learned, accuracy in %", "ETF less learned", "switchable whitening less learned")
    assert learned == [f"{m['accuracy']['learned']:.1f}" for m in means]
    for label, cells in (("etf", etf), ("sw", sw)):
        differences = [m["differences"][label] for m in means]
        assert cells == [signed(d["mean"], d["interval_over_runs"]) for d in differences]


def test_what_is_said_of_the_means_over_trainings_and_images() -> None:
    excluded = []
    for protocol, found in results("transfer")["protocols"].items():
        d = found["mean"]["differences"]["etf"]
        low, high = in_quadrature(d["mean"], d["interval_over_runs"], d["interval_over_test_images"])
        excluded += [protocol] if high < 0 or low > 0 else []
    assert excluded == ["1-shot", "5-shot"]  # and the text says that the interval of 10 images includes 0


def test_geometry() -> None:
    found = results("geometry")["geometry"]["icons-400"]["train"]
    names = {"NC1": "nc1", "CDNV": "cdnv", "VCI": "vci", "NC2": "nc2_equiangularity", "NC3": "nc3", "NC4": "nc4"}
    names |= {"norm of a feature": "feature_norm", "tr C / D": "within", "tr C / total": "within_share"}
    for cells, name in zip(rows(*names), names.values(), strict=True):
        for cell, label in zip(cells, ("learned", "etf", "sw"), strict=True):
            values = [training[name] for training in found[label]]
            low, high = t_interval(values)  # type: ignore[misc]
            assert cell == f"{np.mean(values):.3g} ({low:.3g} to {high:.3g})", (name, label)


def test_random_features() -> None:
    points = [
        p
        for models in results("random_features")["random_features"].values()
        for trainings in models.values()
        for training in trainings
        for p in training
    ]
    inside = sum(p["band"][0] <= p["theory"] <= p["band"][1] for p in points)
    assert f"at {inside} of {len(points)} points" in README


def test_demo() -> None:
    found = results("demo")
    learned, etf = (found["source"][head]["top1"] for head in ("learned", "ETF"))
    names = ["source: pictograms", "probe: pictograms", "probe: Greek", "probe: Cyrillic", "probe: MNIST"]
    source, *targets = rows(*names)
    assert source == [f"{learned:.1f}", f"{etf:.1f}", f"{etf - learned:+.1f}"]
    for cells, target in zip(targets, found["targets"], strict=True):
        d = target["difference"]
        both = [f"{target[head]['accuracy']:.1f}" for head in ("learned", "ETF")]
        assert cells == [*both, signed(d["accuracy"], d["interval"])]


def test_narrow_heads() -> None:
    found = {name: f"{source['top1']:.1f}" for name, source in results("narrow_heads").items()}
    assert f"({found['128-orthoplex']} against {found['128-learned']} % top-1)" in README
    code, gaussian, learned = (found[f"64-{k}"] for k in ("spherical_code", "gaussian", "learned"))
    assert f"64 features: {code} spherical code, {gaussian} Gaussian, {learned} learned)" in README
    assert f"gave\nthem back ({found['64-simplex-behind-mlp']})" in README


@pytest.mark.parametrize("name", published.NAMES)
def test_published(name: str) -> None:
    source = json.loads((ROOT / "hub_cards" / name / "results.json").read_text(encoding="utf-8"))["source"]
    (cells,) = rows(f"[{name}]")
    assert cells[1].startswith(f"{source['top1']:.1f} % of {source['count']:,} icons")


def test_links_lead_somewhere() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0] for line in lines if "timm-etf " in line or "timm_etf.pretrain" in line]


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_that_are_given(line: str) -> None:
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(("timm-etf", "timm_etf.pretrain")))
    verb, *arguments = ("pretrain", *words[at + 1 :]) if words[at] == "timm_etf.pretrain" else words[at + 1 :]
    settings = cli._settings(verb)
    if inspect.isfunction(settings):  # which tyro would call
        settings = functools.wraps(settings)(lambda *args, **kwargs: None)
    tyro.cli(settings, args=arguments)


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t_etf", pretrained=True)
    exported = hub.export(model, tmp_path / "export", label_names=list(model.pretrained_cfg["label_names"]))
    # What is on no machine: a repository of one's own, the demo's export, and timm's weights.
    code = re.sub(r'"(hf-hub|local-dir):[^"]*"', repr(f"local-dir:{exported}"), code)
    code = code.replace('timm.create_model("resnet50", pretrained=True)', 'timm.create_model("resnet50")')
    exec(code, {})


def test_every_verb_is_named() -> None:
    assert all(f"timm-etf {verb}" in README for verb in cli.VERBS)
