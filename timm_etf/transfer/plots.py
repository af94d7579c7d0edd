"""Pictures of a report: paired differences, accuracy against collapse, accuracy over depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from timm_etf.data.catalogue import Target
from timm_etf.report.style import COLOURS, STYLE, save
from timm_etf.transfer.comparison import Comparison
from timm_etf.transfer.report import MEAN


def draw(report: Comparison, out: Path) -> dict[str, str]:
    """Draw what the report has into `out`.

    Args:
        report: The comparison.
        out: Folder of the pictures.

    Returns:
        What each picture shows, by file name: `transfer.png`, and `collapse.png`, `distance.png` and `depths.png` where
        there are such results.
    """
    made: dict[str, str] = {}
    with rc_context(STYLE):
        made[save(_differences(report), out / "transfer.png")] = "Paired differences, or accuracies of one model"
        if report.collapse and any(p in report.protocols for p in ("probe", "knn")):
            made[save(_collapse(report), out / "collapse.png")] = "Accuracy against collapse"
        if report.distance and report.others:
            made[save(_distance(report), out / "distance.png")] = "Differences over distance from the source"
        if any(" at depth " in p for p in report.protocols):
            made[save(_depths(report), out / "depths.png")] = "Accuracy of a probe over depth"
    return made


def _colour(report: Comparison, label: str) -> str:
    return COLOURS[report.labels.index(label) % len(COLOURS)]


def _differences(report: Comparison) -> Any:
    """Every label less the reference, in percentage points, or the accuracies of one label, in percent."""
    protocols = [p for p in report.protocols if " at depth " not in p]
    rows = len(report.targets) + 1
    shown = report.others or report.labels
    height = 1.2 + rows * (0.26 + 0.13 * len(shown))
    figure: Any = Figure(figsize=(2.2 + 2.9 * len(protocols), height), layout="constrained")
    axes = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for axis, protocol in zip(axes, protocols, strict=True):
        for number, label in enumerate(shown):
            shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
            whole = report.paired(label, protocol) if report.others else report.complete(protocol, label)
            for row, targets in enumerate([[t] for t in report.targets] + [whole]):
                if targets and all(t in whole for t in targets):
                    _dot(axis, report, label, targets, protocol, row + shift, bold=row == rows - 1)
        if report.others:
            axis.axvline(0, color="black", linewidth=0.8)
        axis.axhline(rows - 1.5, color="black", linewidth=0.5)
        axis.set_title(protocol)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(rows), [t.name for t in report.targets] + [MEAN])
    axes[0].set_ylim(rows - 0.5, -0.5)
    if report.others:
        figure.supxlabel(
            f"accuracy of {shown[0] if len(shown) == 1 else 'each'} less {report.reference}, percentage points\n"
            "95 %, thick: over test images; thin: over trainings and test images, which a claim rests on;\n"
            f"ticks on it, or thin with ticks alone: t interval over {report.repetitions}",
            fontsize=9,
        )
    else:
        figure.supxlabel(f"accuracy of {', '.join(shown)}, %; 95 % over test images", fontsize=9)
    if len(shown) > 1:
        less = f" - {report.reference}" if report.others else ""
        handles = [axes[-1].plot([], [], "o", color=_colour(report, label), label=label + less)[0] for label in shown]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def _dot(
    axis: Any, report: Comparison, label: str, targets: Sequence[Target], protocol: str, y: float, *, bold: bool
) -> None:
    """A mean over targets and the intervals of that very mean."""
    colour = _colour(report, label)
    if report.others:
        difference = report.difference(label, targets, protocol)
        value, interval = difference.mean, difference.test_images
        if difference.runs:
            line = "" if difference.runs_and_images else "-"
            axis.plot(difference.runs, [y] * 2, f"|{line}", color=colour, linewidth=0.9, markersize=5)
        if difference.runs_and_images:
            axis.plot(difference.runs_and_images, [y] * 2, color=colour, linewidth=0.9)
    else:
        value = report.accuracy(label, targets, protocol)
        interval = report.interval(label, targets, protocol)
    axis.plot(interval, [y] * 2, color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
    axis.plot(value, y, "D" if bold else "o", color=colour, markersize=6 if bold else 4.5)


def _distance(report: Comparison) -> Any:
    """Every label less the reference, in percentage points, over the targets' distance from the source."""
    protocols = [p for p in report.protocols if " at depth " not in p]
    columns = min(3, len(protocols))
    rows = -(-len(protocols) // columns)
    figure: Any = Figure(figsize=(0.8 + 3.6 * columns, 0.9 + 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, protocol in zip(axes, protocols, strict=False):
        said, named = [], {}
        for place, label in enumerate(report.others):
            beside = 0.03 * (place - (len(report.others) - 1) / 2)  # of one target, no label hides another
            for target in report.paired(label, protocol):
                difference, x = report.difference(label, [target], protocol), report.distance_of(target)
                interval = difference.runs_and_images or difference.test_images
                axis.plot([x + beside] * 2, interval, color=_colour(report, label), linewidth=0.9)
                axis.plot(x + beside, difference.mean, "o", color=_colour(report, label), markersize=4.5)
                named[target.name] = x
            if found := report.gain_over_distance(label, protocol):
                said.append(f"{label} {found[0]:+.2f} ({found[1][0]:+.2f} to {found[1][1]:+.2f})")
        at_foot: dict[str, Any] = {"va": "bottom", "rotation": 90, "transform": axis.get_xaxis_transform()}
        free = -np.inf
        for name, x in sorted(named.items(), key=lambda item: item[1]):
            free = max(x, free) + 0.07  # a name's height, which the next one has to keep
            axis.text(free - 0.07, 0.02, name, fontsize=6, color="0.3", ha="center", **at_foot)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title("\n".join([protocol, *said]), fontsize=8)
        axis.margins(x=0.15, y=0.1)
        low, high = axis.get_ylim()
        axis.set_ylim(low - 0.35 * (high - low), high)  # where names stand
        axis.grid(alpha=0.3)
    for axis in axes[len(protocols) :]:
        axis.set_axis_off()
    figure.supxlabel("proxy A-distance from the source (above: rank correlation)", fontsize=8)
    figure.supylabel(f"accuracy less {report.reference}, points", fontsize=9)
    handles = [axes[0].plot([], [], "o", color=_colour(report, la), label=la)[0] for la in report.others]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _collapse(report: Comparison) -> Any:
    """Accuracy in percent of every training over the collapse of its training features, a grey line for each target."""
    protocol = "probe" if "probe" in report.protocols else "knn"
    metrics = {"nc1": "NC1", "cdnv": "CDNV", "vci": "VCI"}
    figure: Any = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, 3, sharey=True), metrics.items(), strict=True):
        for target in report.targets:
            points = []
            for label in report.labels:
                for member, row in zip(report.members(label), report.runs(label, target.name, protocol), strict=False):
                    value = report.collapse.get((member, target.name), {}).get(metric, np.inf)
                    if np.isfinite(value):
                        points.append((value, float(np.mean([r.accuracy(target.metric) for r in row])), label))
            if not points:
                continue
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


def _depths(report: Comparison) -> Any:
    """Accuracy in percent of a probe at every layer, on the targets that all labels have at every layer."""
    protocols = [p for p in report.protocols if p.startswith("probe at depth ")] + ["probe"]
    targets = [t for t in report.targets if all(t in report.complete(p) for p in protocols)]
    columns = min(5, len(targets) + 1)
    rows = -(-(len(targets) + 1) // columns)
    figure: Any = Figure(figsize=(1 + 2.3 * columns, 0.8 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    ticks = [p.removeprefix("probe at depth ").replace(" of ", "/") for p in protocols[:-1]] + ["pre-\nlogits"]
    panels = [(t.name, [t]) for t in targets] + ([(MEAN, targets)] if targets else [])
    for axis, (name, chosen) in zip(axes, panels, strict=False):
        for label in report.labels:
            values = [report.accuracy(label, chosen, p) for p in protocols]
            axis.plot(range(len(protocols)), values, "o-", color=_colour(report, label), markersize=3.5, label=label)
        axis.set_title(name)
        axis.set_xticks(range(len(protocols)), ticks, fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.supylabel("probe accuracy, %", fontsize=9)
    return figure
