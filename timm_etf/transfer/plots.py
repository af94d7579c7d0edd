"""Pictures of a report: paired differences, accuracy against collapse, accuracy over depth."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from timm_etf.report.style import COLOURS, STYLE, save
from timm_etf.transfer.report import MEAN, Report


def draw(report: Report, out: Path) -> dict[str, str]:
    """Draw what the report has into `out`; returns the files' names and what they show."""
    made: dict[str, str] = {}
    with rc_context(STYLE):
        made[save(_differences(report), out / "transfer.png")] = "Paired differences, or accuracies of one model"
        if report.collapse and any(p in report.protocols for p in ("probe", "knn")):
            made[save(_collapse(report), out / "collapse.png")] = "Accuracy against collapse"
        if any(" at depth " in p for p in report.protocols):
            made[save(_depths(report), out / "depths.png")] = "Accuracy of a probe over depth"
    return made


def _colour(report: Report, label: str) -> str:
    return COLOURS[report.labels.index(label) % len(COLOURS)]


def _differences(report: Report) -> Any:
    protocols = [p for p in report.protocols if " at depth " not in p]
    rows = len(report.targets) + 1
    shown = report.labels[1:] or report.labels
    height = 1.2 + rows * (0.26 + 0.13 * len(shown))
    figure: Any = Figure(figsize=(2.2 + 2.9 * len(protocols), height), layout="constrained")
    axes = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for axis, protocol in zip(axes, protocols, strict=True):
        complete = report.complete(protocol)
        for number, label in enumerate(shown):
            shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
            for row, targets in enumerate([[t] for t in report.targets] + [complete]):
                if targets and all(t in complete for t in targets):
                    _dot(axis, report, label, targets, protocol, row + shift, bold=row == rows - 1)
        if len(report.labels) > 1:
            axis.axvline(0, color="black", linewidth=0.8)
        axis.axhline(rows - 1.5, color="black", linewidth=0.5)
        axis.set_title(protocol)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(rows), [t.name for t in report.targets] + [MEAN])
    axes[0].set_ylim(rows - 0.5, -0.5)
    if len(report.labels) > 1:
        figure.supxlabel(
            f"accuracy of {shown[0] if len(shown) == 1 else 'each'} less {report.labels[0]}, percentage points\n"
            f"thick: 95 % over test images; thin, if any: 95 % t interval over {report.repetitions}",
            fontsize=9,
        )
    else:
        figure.supxlabel(f"accuracy of {shown[0]}, %; 95 % over test images", fontsize=9)
    if len(shown) > 1:
        handles = [
            axes[-1].plot([], [], "o", color=_colour(report, label), label=f"{label} - {report.labels[0]}")[0]
            for label in shown
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def _dot(axis: Any, report: Report, label: str, targets: Any, protocol: str, y: float, *, bold: bool) -> None:
    colour = _colour(report, label)
    if len(report.labels) > 1:
        difference = report.difference(label, targets, protocol)
        if difference.runs:
            axis.plot(difference.runs, [y] * 2, color=colour, linewidth=0.9)
        axis.plot(difference.test_images, [y] * 2, color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
        axis.plot(difference.mean, y, "D" if bold else "o", color=colour, markersize=6 if bold else 4.5)
        return
    values = [float(np.mean(report.accuracies(label, t, protocol))) for t in targets]
    axis.plot(np.mean(values), y, "D" if bold else "o", color=colour)
    if len(targets) == 1:
        interval = report.runs(label, targets[0].name, protocol)[0][0].interval(targets[0].metric)
        axis.plot(interval, [y] * 2, color=colour, linewidth=3, alpha=0.45)


def _collapse(report: Report) -> Any:
    protocol = "probe" if "probe" in report.protocols else "knn"
    metrics = {"nc1": "NC1", "cdnv": "CDNV", "vci": "VCI"}
    figure: Any = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, 3, sharey=True), metrics.items(), strict=True):
        for target in report.complete(protocol):
            points = []
            for label in report.labels:
                for member, row in zip(report.members(label), report.runs(label, target.name, protocol), strict=True):
                    accuracy = float(np.mean([r.accuracy(target.metric) for r in row]))
                    points.append((report.collapse[member, target.name][metric], accuracy, label))
            axis.plot(*np.array([p[:2] for p in sorted(points)]).T, color="#cccccc", linewidth=0.8, zorder=0)
            for x, y, label in points:
                axis.plot(x, y, "o", color=_colour(report, label), markersize=4)
            axis.annotate(
                target.name, max(points)[:2], xytext=(4, 0), textcoords="offset points", fontsize=7, va="center"
            )
        if metric != "vci":
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axis.margins(x=0.25)
        axis.set_xlabel(f"{title} of the target's training features")
        axis.grid(alpha=0.3)
        if metric == "nc1":
            axis.set_ylabel(f"{protocol} accuracy, %")
    handles = [axis.plot([], [], "o", color=_colour(report, la), label=la)[0] for la in report.labels]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(report.labels), frameon=False)
    return figure


def _depths(report: Report) -> Any:
    protocols = [p for p in report.protocols if p.startswith("probe at depth ")] + ["probe"]
    targets = [t for t in report.targets if all(t in report.complete(p) for p in protocols)]
    columns = min(5, len(targets) + 1)
    rows = -(-(len(targets) + 1) // columns)
    figure: Any = Figure(figsize=(1 + 2.3 * columns, 0.8 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    ticks = [p.removeprefix("probe at depth ").replace(" of ", "/") for p in protocols[:-1]] + ["pre-\nlogits"]
    for axis, name in zip(axes, [t.name for t in targets] + [MEAN], strict=False):
        chosen = targets if name == MEAN else [t for t in targets if t.name == name]
        for label in report.labels:
            values = [np.mean([np.mean(report.accuracies(label, t, p)) for t in chosen]) for p in protocols]
            axis.plot(range(len(protocols)), values, "o-", color=_colour(report, label), markersize=3.5, label=label)
        axis.set_title(name)
        axis.set_xticks(range(len(protocols)), ticks, fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(targets) + 1 :]:
        axis.set_axis_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.supylabel("probe accuracy, %", fontsize=9)
    return figure
