"""The picture of a card: accuracy on the source task over epochs, and on other tasks."""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from timm_etf.report.results import Checkpoint, Own
from timm_etf.report.style import COLOURS, STYLE, save

_COLOURS = COLOURS[1:]  # grey is a reference's


def draw(results: Checkpoint, log: Path | None, path: Path) -> Path | None:
    """Draw results.json and log.jsonl of a run.

    Args:
        results: results.json of the checkpoint.
        log: Its log.jsonl, if there is one.
        path: PNG file to write.

    Returns:
        The path, or None if there is nothing to draw.
    """
    parts = [p for p in results.get("transfer", []) if p["protocols"]]
    if not parts and log is None:
        return None
    targets = sum(len(_targets(p)) for p in parts)
    with rc_context(STYLE):
        figure: Any = Figure(
            figsize=(5 * (log is not None) + 7 * bool(parts), max(3.2, 1.2 + 0.4 * targets)), layout="constrained"
        )
        axes = figure.subplots(1, (log is not None) + len(parts), squeeze=False)[0]
        if log is not None:
            _learning(axes[0], log, results.get("source", {}).get("teacher"))
        for axis, part in zip(axes[log is not None :], parts, strict=True):
            _transfer(axis, part)
        save(figure, path, dpi=110)
    return path


def _targets(part: Own) -> list[str]:
    return list(dict.fromkeys(t for found in part["protocols"].values() for t in found["targets"]))


def _learning(axis: Any, log: Path, teacher: str | None) -> None:
    epochs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for key, label, colour in (("top1", "top-1", _COLOURS[0]), ("top5", "top-5", _COLOURS[1])):
        axis.plot([e["epoch"] for e in epochs], [e[key] for e in epochs], "o-", color=colour, label=label, markersize=3)
    title, label = "Source task, validation images", "accuracy (%)"
    if teacher:
        title, label = "Held-out images", "same answer as the teacher (%)"
    axis.set(xlabel="epoch", ylabel=label, title=title, ylim=(0, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="lower right")


def _transfer(axis: Any, part: Own) -> None:
    targets = _targets(part)
    protocols = part["protocols"]
    for number, (protocol, found) in enumerate(protocols.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shift = (number - (len(protocols) - 1) / 2) * 0.6 / len(protocols)
        for row, target in enumerate(targets):
            if cell := found["targets"].get(target):
                axis.plot(cell["interval_over_test_images"], [row + shift] * 2, color=colour, linewidth=1.6)
                axis.plot(cell["accuracy"], row + shift, "o", color=colour, markersize=4)
        axis.plot([], [], "o-", color=colour, label=protocol, markersize=4)
    axis.set_yticks(range(len(targets)), targets)
    axis.set(ylim=(len(targets) - 0.5, -0.5), xlabel="accuracy (%), 95 % over test images, one training")
    axis.set_title("Other tasks")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, ncols=len(protocols), loc="lower center", bbox_to_anchor=(0.5, 1.05), columnspacing=1.0)
