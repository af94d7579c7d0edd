"""A comparison as the report to read, and as the lines that its command prints."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from timm_etf.data.catalogue import METRICS, Target
from timm_etf.report import results
from timm_etf.report.page import closing, remarks, row
from timm_etf.report.statistics import t_interval
from timm_etf.transfer.comparison import Comparison, Difference, Repeated
from timm_etf.transfer.results_json import as_json

MEAN = "mean"
_COLLAPSE = ("nc1", "cdnv", "vci", "within")


class Report(Comparison):
    """A comparison that can be written."""

    def as_json(self) -> results.Transfer:
        """What goes into results.json."""
        return as_json(self)

    def as_markdown(self) -> str:
        """The report to read."""
        lines = ["# Transfer", "", *_head(self), ""]
        for protocol in self.protocols:
            lines += [f"## {protocol}", "", *_table(self, protocol), "", *_below(self, protocol), ""]
            lines += _order(self, protocol)
        if self.collapse:
            lines += ["## Collapse of the targets' training features", "", *_collapse(self), ""]
        if self.distance:
            lines += [f"## Distance from {self.settings['source']}", "", *_distance(self), ""]
        if self.missing or self.notes:
            lines += ["## What is missing", "", *remarks(self.missing, self.notes), ""]
        spent = ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items() if v >= 0.5)
        lines += [f"Time when computed: {spent or 'under a second'}.", ""]
        return "\n".join(lines)


def summary(report: Comparison, out: Path) -> str:
    """What the command prints: the mean of every protocol, what is missing, and where the rest is."""
    lines = []
    for protocol in report.protocols:
        parts = []
        for label in report.labels:
            if complete := report.complete(protocol, label):
                parts.append(f"{label} {report.accuracy(label, complete, protocol):.1f} (of {len(complete)})")
        for label in report.others:
            if paired := report.paired(label, protocol):
                difference = show(report.difference(label, paired, protocol))
                tally = report.tally(label, paired, protocol)
                parts.append(f"{label} - {report.reference}: {difference}, {tally} w/t/l over test images")
        if parts:
            lines.append(f"{protocol}, mean of targets: " + "; ".join(parts))
    then = f"timm-etf publish RUN ORG/NAME --results {out / 'results.json'}"
    return "\n".join([*lines, *closing(out, report.missing, "transfer.png", then=then)])


def show(difference: Difference) -> str:
    """A difference in a table: [over test images] (over runs) {over trainings and images}."""
    shown = f"{difference.mean:+.1f} [{_ends(difference.test_images)}]"
    shown += f" ({_ends(difference.runs)})" if difference.runs else ""
    return shown + (f" {{{_ends(difference.runs_and_images)}}}" if difference.runs_and_images else "")


def _ends(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def _head(c: Comparison) -> list[str]:
    models = [f"- `{m.label}`: `{m.name}`" + (f" {m.kwargs}" if m.kwargs else "") for m in c.candidates]
    text = f"Accuracy in percent. t intervals are over {c.repetitions}."
    if c.reference not in c.labels:
        text += f" The reference `{c.reference}` has no result: there are no differences."
    elif c.others:
        text += (
            f" Differences are from `{c.reference}` in percentage points on the same test images: [95 % bootstrap "
            "interval over test images] (95 % t interval) {95 % interval over trainings and test images}. A win or "
            "loss is an interval on one side of 0; among 20 true ties one such is expected. Over test images it "
            "speaks of these very models, and is no claim about how they were trained: that rests on the interval in "
            f"braces. {_evidence(c)}"
        )
    return [*models, "", text]


def _evidence(c: Comparison) -> str:
    """How far the trainings of the pairs go: three for a look, five for a claim."""
    fewest = min((len(c.members(la)) for la in c.others if c.repeated(la) == "trainings"), default=1)
    if fewest == 1:
        return "Here no pair has several trainings, so nothing is a claim."
    enough = "enough for a claim" if fewest >= 5 else "a look; a claim takes five" if fewest >= 3 else "too few"
    return f"Here that is over {fewest} trainings: {enough}."


def _table(c: Comparison, protocol: str) -> list[str]:
    header = ["target", "test images", *c.labels, *(f"{la} - {c.reference}" for la in c.others)]
    lines = [row(header), "|" + "---|" * len(header)]
    for target in c.targets:
        rows = [runs for la in c.labels if (runs := c.runs(la, target.name, protocol))]
        if not rows:
            continue
        name = target.name if target.metric == "top1" else f"{target.name} ({METRICS[target.metric]})"
        accuracies = [
            f"{np.mean(found):.1f}" if (found := c.accuracies(la, target, protocol)) else "-" for la in c.labels
        ]
        differences = [
            show(c.difference(la, [target], protocol)) if target in c.paired(la, protocol) else "-" for la in c.others
        ]
        lines.append(row([name, str(len(rows[0][0][0].y)), *accuracies, *differences]))
    return [*lines, *_mean_rows(c, protocol), *_group_rows(c, protocol)]


def _group_rows(c: Comparison, protocol: str) -> list[str]:
    """Means over the targets of a group that every label has."""
    lines = []
    for group in dict.fromkeys(t.group for t in c.targets if t.group):
        targets = [t for t in c.complete(protocol) if t.group == group]
        if targets:
            accuracies = [f"{c.accuracy(la, targets, protocol):.1f}" for la in c.labels]
            differences = [show(c.difference(la, targets, protocol)) for la in c.others]
            lines.append(row([f"**{MEAN} of {len(targets)} {group}**", "", *accuracies, *differences]))
    return lines


def _mean_rows(c: Comparison, protocol: str) -> list[str]:
    """Means over the targets that each label, or each pair, has whole; how many, where they are not the first's."""
    own = {la: found for la in c.labels if (found := c.complete(protocol, la))}
    if not own:
        return []
    first = next(iter(own.values()))
    cells = {la: _mean_cells(c, la, protocol, first) for la in c.others}
    differences, odds_apart, tallies, claims = zip(*cells.values(), strict=True) if cells else ((), (), (), ())
    accuracies = [
        f"{c.accuracy(la, own[la], protocol):.1f}{_of(own[la], first)}" if la in own else "-" for la in c.labels
    ]
    odds = [f"{c.log_odds(la, own[la], protocol):.3f}" if la in own else "-" for la in c.labels]
    lines = [
        row([f"**{MEAN} of {len(first)}**", "", *accuracies, *differences]),
        row(["mean log odds", "", *odds, *odds_apart]),
    ]
    blank = [""] * (len(c.labels) + 1)
    if c.others:
        lines.append(row(["win / tie / loss over test images", *blank, *tallies]))
    if any(claim != "-" for claim in claims):
        lines.append(row(["win / tie / loss over trainings and images", *blank, *claims]))
    return lines


def _mean_cells(c: Comparison, label: str, protocol: str, first: Sequence[Target]) -> tuple[str, str, str, str]:
    """Difference, that of the log odds, verdicts over test images and over trainings, too."""
    targets = c.paired(label, protocol)
    if not targets:
        return "-", "-", "-", "-"
    ours, theirs = (c.log_odds(la, targets, protocol) for la in (label, c.reference))
    several = c.repeated(label) == "trainings"
    return (
        show(c.difference(label, targets, protocol)) + _of(targets, first),
        f"{ours - theirs:+.3f}",
        c.tally(label, targets, protocol),
        c.tally(label, targets, protocol, claims=True) if several else "-",
    )


def _of(targets: Sequence[Target], first: Sequence[Target]) -> str:
    return "" if targets == first else f" (of {len(targets)})"


def _below(c: Comparison, protocol: str) -> list[str]:
    """What the numbers of a table rest on."""
    statement = next(r.treatment for (_, _, p, _), r in c.results.items() if p == protocol)
    layer = protocol.partition(" at depth ")[2]
    where = f"spatial mean of layer {layer}" if layer else "pre-logits, before any projector"
    lines = [f"Features: {statement}." if protocol == "finetune" else f"Features: {where}; {statement}."]
    counts: dict[str, int] = {}
    runs = 0
    for label in c.labels:
        for target in c.complete(protocol, label):
            runs += sum(map(len, c.runs(label, target.name, protocol)))
            for name, count in c.at_edge(label, target.name, protocol).items():
                counts[name] = counts.get(name, 0) + count
    often = [f"{name} in {count} of {runs} runs" for name, count in counts.items() if 2 * count > runs]
    return lines + (["", f"Chosen at an end of its grid: {', '.join(often)}."] if often else [])


_ORDER = {
    "severity": "severity, mean distance of a mistake",
    "hd1": "HD@1, mean distance of the first choice",
    **{f"hd{k}": f"HD@{k}, of the {k} first" for k in (5, 20)},
    "crm_severity": "severity, where choices are those of least expected cost",
    **{f"crm_hd{k}": f"HD@{k}, the same" for k in (1, 5, 20)},
    "crm_top1": "share right, the same",
    "mahp": "mAHP@250, how near the classes of neighbours are, 1 is best",
    "siblings": "nearest image of another class is of the same group, share",
}


def _order(c: Comparison, protocol: str) -> list[str]:
    """Who is near whom in the trees that targets have: means, and differences over repetitions."""
    header = ["target", "in its tree", *c.labels, *(f"{la} - {c.reference}" for la in c.others)]
    lines = [row(header), "|" + "---|" * len(header)]
    for target in c.targets:
        found = {la: c.order(la, target, protocol) for la in c.labels}
        for name, meaning in _ORDER.items():
            values = {la: of[name] for la, of in found.items() if name in of}
            if values:
                cells = [f"{np.mean(values[la]):.3f}" if la in values else "-" for la in c.labels]
                apart = [_apart(values.get(la), values.get(c.reference), c.repeated(la)) for la in c.others]
                lines.append(row([target.name, meaning, *cells, *apart]))
    said = "Distances are heights of the lowest common ancestor; differences have a 95 % t interval over repetitions."
    return [*lines, "", said, ""] if len(lines) > 2 else []


def _apart(ours: Sequence[float] | None, theirs: Sequence[float] | None, repeated: Repeated | None) -> str:
    if ours is None or theirs is None:
        return "-"
    interval = t_interval([a - b for a, b in zip(ours, theirs, strict=True)]) if repeated else None
    shown = f"{np.mean(ours) - np.mean(theirs):+.3f}"
    return shown + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def _distance(c: Comparison) -> list[str]:
    """Distances, nearest first, and how differences go with them."""
    named: dict[str, str | None] = {la: la for la in c.labels}
    named |= {"neutral": None} if any(m == "neutral" for m, _ in c.distance) else {}
    header = ["target", *(f"proxy A, {name}" for name in named), *(f"Fréchet, {name}" for name in named)]
    lines = [row(header), "|" + "---|" * len(header)]
    for target in sorted(c.targets, key=c.distance_of):
        proxy, frechet = ([c.distance_of(target, k, la) for la in named.values()] for k in ("proxy_a", "frechet"))
        lines.append(row([target.name, *(f"{v:.2f}" for v in proxy), *(f"{v:.3g}" for v in frechet)]))
    said = (
        "Of training images. Proxy A-distance is 0 where no linear classifier tells them from the source's, 2 where one"
    )
    lines += ["", f"{said} makes no error. Fréchet distances compare within a model alone."]
    for protocol in c.protocols:
        for label in c.others:
            if found := c.gain_over_distance(label, protocol):
                between = f"`{label}` - `{c.reference}` under {protocol} over proxy A-distance"
                low, high = found[1]
                lines += ["", f"{between}: rank correlation {found[0]:+.2f} ({low:+.2f} to {high:+.2f})."]
    return [*lines, "", "Intervals: 95 %, over targets and trainings resampled together."]


def _collapse(c: Comparison) -> list[str]:
    lines = [row(["model", *_COLLAPSE]), "|" + "---|" * (len(_COLLAPSE) + 1)]
    for label in c.labels:
        found = [v for (m, _), v in c.collapse.items() if m in c.members(label)]
        values = [[v[name] for v in found if name in v] for name in _COLLAPSE]
        lines.append(row([label, *(f"{np.median(v):.3g}" if v else "-" for v in values)]))
    return [*lines, "", "Medians over targets; smaller is more collapsed. Every value is in results.json."]
