"""The picture of a run: what it learned, how collapsed its features became, and what the time went into."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm_etf.report.style import COLOURS, STYLE, save

_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "Loss": {"train_loss": ("training", "-"), "loss": ("validation", "-")},
    "Accuracy on validation images (%)": {
        "top1": ("top-1", "-"),
        "top5": ("top-5", "-"),
        "raw_top1": ("raw top-1", "--"),
    },
    "NC1 of validation features": {"nc1": ("", "-")},
    "Learning rate": {"lr": ("", "-")},
    "Images per second": {"images_per_second": ("", "-")},
}
"""Keys of log.jsonl by panel, with the label and the style of their line."""


def draw(log: Path, path: Path, *, taught: bool = False) -> Path | None:
    """Draw log.jsonl of a run, one panel for each kind of number that it has.

    Args:
        log: The run's log.jsonl.
        path: PNG file to write.
        taught: Whether what is counted as right is what a teacher answers.

    Returns:
        The path; None if there is nothing to draw, or nothing to draw with (matplotlib).
    """
    if not log.exists() or not find_spec("matplotlib"):
        return None
    epochs: list[dict[str, Any]] = []
    with suppress(ValueError):  # the last line of a run that was killed while writing it
        epochs += map(json.loads, log.read_text(encoding="utf-8").splitlines())
    panels = [title for title, keys in _PANELS.items() if any(_points(epochs, key) for key in keys)]
    timed = [e for e in epochs if sum(e.get("seconds", {}).values()) > 0]
    if not panels:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        count = len(panels) + bool(timed)
        rows = -(-count // 3)
        figure: Any = Figure(figsize=(12, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        for axis, title in zip(axes, panels, strict=False):
            _panel(axis, epochs, title)
            if taught and title.startswith("Accuracy"):
                axis.set_title("Same answer as the teacher (%)")
        if timed:
            _time(axes[len(panels)], timed)
        for axis in axes[:count]:
            axis.set(xlabel="epoch", xlim=(epochs[0]["epoch"] - 0.6, epochs[-1]["epoch"] + 0.6))
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for axis in axes[count:]:
            axis.set_axis_off()
        save(figure, path, dpi=110)
    return path


def _points(epochs: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Epoch and value, where there is one that can be drawn."""
    found = ((e["epoch"], e.get(key)) for e in epochs)
    return [(epoch, value) for epoch, value in found if value is not None and math.isfinite(value)]


def _panel(axis: Any, epochs: list[dict[str, Any]], title: str) -> None:
    axis.set_title(title)
    marker = "o" if len(epochs) <= 30 else None  # one epoch is no line
    for colour, (key, (label, line)) in zip(COLOURS[1:], _PANELS[title].items(), strict=False):
        if points := _points(epochs, key):
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3, "label": label or None}
            axis.plot(*zip(*points, strict=True), **style)
    if title.startswith("Accuracy"):
        axis.set_ylim(0, 100)
    elif title.startswith("NC1"):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(_sparse(axis))
    else:
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax or 1)
    axis.grid(axis="y", alpha=0.3)
    if len(_PANELS[title]) > 1:
        axis.legend(frameon=False)


def _sparse(axis: Any) -> Any:
    """Minor ticks of a logarithmic axis have numbers only where it spans less than a decade or two."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, position: int) -> str:
        low, high = axis.get_ylim()
        leading = float(f"{value:e}".partition("e")[0])
        return f"{value:g}" if high < 30 * low and round(leading) in (2, 5) else ""

    return FuncFormatter(text)


def _time(axis: Any, epochs: list[dict[str, Any]]) -> None:
    axis.set_title("Share of the time (%)", pad=22)
    below = [0.0] * len(epochs)
    for colour, part in zip(("#c8102e", "#d9d9d9", "#1f5fa8", "#d98a00"), epochs[0]["seconds"], strict=False):
        share = [100 * e["seconds"][part] / sum(e["seconds"].values()) for e in epochs]
        axis.bar([e["epoch"] for e in epochs], share, 0.9, bottom=below, color=colour, label=part)
        below = [b + s for b, s in zip(below, share, strict=True)]
    axis.set_ylim(0, 100)
    axis.legend(
        frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.97), columnspacing=0.8, handlelength=1
    )
