"""The picture of a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from timm_etf.report.curves import draw

EPOCH: dict[str, Any] = {"epoch": 1, "lr": 0.1, "top1": 40.0, "top5": 70.0, "loss": 2.0, "train_loss": 2.5, "nc1": 3.0}
TIMED: dict[str, Any] = {"seconds": {"waiting": 1.0, "stepping": 8.0, "validating": 1.0, "saving": 0.0}}


def drawn(tmp_path: Path, *epochs: dict[str, Any]) -> Any:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(e) + "\n" for e in epochs))
    path = draw(log, tmp_path / "curves.png")
    return None if path is None else np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_runs_of_any_length(tmp_path: Path, count: int) -> None:
    epochs = [{**EPOCH, **TIMED, "epoch": e, "images_per_second": 9.0, "raw_top1": 30.0} for e in range(1, count + 1)]
    picture = drawn(tmp_path, *epochs)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # not blank


def test_what_is_missing_has_no_panel_and_what_is_not_finite_no_point(tmp_path: Path) -> None:
    whole = drawn(tmp_path, {**EPOCH, **TIMED})
    assert drawn(tmp_path, {"epoch": 1, "lr": 0.1}).shape[0] < whole.shape[0]  # one row of panels
    assert np.array_equal(
        drawn(tmp_path, {**EPOCH, "nc1": math.nan, "loss": math.inf}),
        drawn(tmp_path, {k: v for k, v in EPOCH.items() if k not in ("nc1", "loss")}),
    )
    assert not np.array_equal(drawn(tmp_path, {**EPOCH, "loss": 1.0}), drawn(tmp_path, EPOCH))


def test_the_line_that_a_kill_cut_off_costs_no_picture(tmp_path: Path) -> None:
    whole = drawn(tmp_path, EPOCH, {**EPOCH, "epoch": 2, "top1": 60.0})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"epoch": 3, "top')
    path = draw(log, tmp_path / "curves.png")
    assert path
    assert np.array_equal(whole, np.asarray(Image.open(path).convert("RGB")))


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw(tmp_path / "log.jsonl", tmp_path / "curves.png") is None
    assert drawn(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()
