"""results.json: published files are read, others are refused in one line, and nothing that is written is invalid."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from timm_etf import UsageError
from timm_etf.report.results import SCHEMA, Checkpoint, Transfer, read, write

ROOT = Path(__file__).parents[2]
TRANSFER = ROOT / "examples" / "transfer" / "results.json"


def test_published_files_are_read_as_they_are() -> None:
    for path, kind in [(TRANSFER, Transfer), *((p, Checkpoint) for p in ROOT.glob("hub_cards/*/results.json"))]:
        assert read(path, kind) == json.loads(path.read_text())


def test_what_is_written_is_read_and_has_a_version(tmp_path: Path) -> None:
    results = read(TRANSFER, Transfer)
    write(tmp_path / "results.json", results)
    assert read(tmp_path / "results.json", Transfer) == {"schema": SCHEMA, **results}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path / "results.json", {"source": {"cdnv": math.inf, "nc1": [math.nan, 1.0], "top1": 2}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found == {"schema": SCHEMA, "source": {"cdnv": None, "nc1": [None, 1.0], "top1": 2}}


def _without(found: Any, *path: Any) -> None:
    for key in path[:-1]:
        found = found[key]
    del found[path[-1]]


def _with(found: Any, value: Any, *path: Any) -> None:
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value


CELL = ("protocols", "probe", "targets", "kanji")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _without(f, "reference"), r"\(reference is missing\)"),
        (lambda f: _without(f, *CELL, "models"), r"\(protocols.probe.targets.kanji.models is missing\)"),
        (lambda f: _with(f, "high", *CELL, "models", "etf", "accuracy"), r"kanji.models.etf.accuracy is 'high'"),
        (lambda f: _with(f, "top5", *CELL, "metric"), r"kanji.metric is 'top5'"),
        (lambda f: _with(f, [], "protocols"), r"protocols is no dict"),
        (lambda f: _with(f, SCHEMA + 1, "schema"), r"newer timm_etf \(schema 2\): pip install -U timm_etf"),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_the_place(tmp_path: Path, change: Any, message: str) -> None:
    found = copy.deepcopy(read(TRANSFER, Transfer))
    change(found)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=message) as error:
        read(path, Transfer)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", None, "{}"])
def test_a_file_that_is_not_there_or_no_json(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"is not a results\.json of timm-etf transfer"):
        read(path, Transfer)
