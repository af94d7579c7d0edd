"""What a comparison found: tables, paired differences with intervals, results.json and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_etf.data.catalogue import METRICS, Target
from timm_etf.features.candidates import Candidate
from timm_etf.report.statistics import bootstrap, log_odds, t_interval
from timm_etf.transfer.result import Result, sample_weights

MEAN = "mean"


@dataclass(frozen=True)
class Difference:
    """Accuracy of one label less the first label's, in percentage points, on the same test images.

    Attributes:
        mean: Over runs.
        test_images: 95 % bootstrap interval over test images.
        runs: 95 % t interval over repetitions, or None where there is one.
        by_run: The difference of every repetition.
    """

    mean: float
    test_images: tuple[float, float]
    runs: tuple[float, float] | None
    by_run: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """`win` or `loss` where the interval over test images is on one side of 0, else `tie`."""
        low, high = self.test_images
        return "win" if low > 0 else "loss" if high < 0 else "tie"


@dataclass(frozen=True)
class Report:
    """All results, by candidate, target, protocol and seed, and what is missing among them."""

    candidates: Sequence[Candidate]
    targets: Sequence[Target]
    results: dict[tuple[int, str, str, int], Result]
    seconds: dict[str, float]
    missing: dict[str, str]
    notes: Sequence[str]
    collapse: dict[tuple[int, str], dict[str, float]]
    weights_sha256: dict[int, str]
    settings: dict[str, Any]

    @cached_property
    def labels(self) -> list[str]:
        """Labels that have any result, in the order given; the first is the reference."""
        found = {number for number, *_ in self.results}
        return list(dict.fromkeys(c.label for i, c in enumerate(self.candidates) if i in found))

    @cached_property
    def protocols(self) -> list[str]:
        """Protocols that have a result, in a readable order."""
        return list(dict.fromkeys(p for _, _, p, _ in self.results))

    def members(self, label: str) -> list[int]:
        """Candidates under a label."""
        return [i for i, c in enumerate(self.candidates) if c.label == label]

    def runs(self, label: str, target: str, protocol: str) -> list[list[Result]]:
        """Results of a cell: for each member of the label those of all seeds; empty if any is missing."""
        seeds = range(self.settings["seeds"])
        keys = [[(m, target, protocol, s) for s in seeds] for m in self.members(label)]
        if any(k not in self.results for row in keys for k in row):
            return []
        return [[self.results[k] for k in row] for row in keys]

    def complete(self, protocol: str) -> list[Target]:
        """Targets on which every label has all its results; the others are in no mean."""
        return [t for t in self.targets if all(self.runs(la, t.name, protocol) for la in self.labels)]

    @property
    def repetitions(self) -> str:
        """What varies between the repetitions that t intervals are over."""
        members = {len(self.members(la)) for la in self.labels}
        count = self.settings["seeds"]
        seeds = f"{count} seed{'s' if count > 1 else ''} of the protocol"
        if members == {1}:
            return f"{seeds}; the models themselves are one training each"
        if len(members) > 1:
            return "nothing: the labels have different numbers of models"
        return f"{members.pop()} models of each label, averaged over {seeds}"

    def accuracies(self, label: str, target: Target, protocol: str) -> list[float]:
        """Accuracy in percent of every repetition: of each member if the label has several, else of each seed."""
        by_member = [[r.accuracy(target.metric) for r in row] for row in self.runs(label, target.name, protocol)]
        return [float(np.mean(row)) for row in by_member] if len(by_member) > 1 else by_member[0] if by_member else []

    def correct(self, label: str, target: Target, protocol: str) -> NDArray[np.float64]:
        """How often each test image was right over all runs, weighted so that the mean is the metric, in percent."""
        rows = [r for row in self.runs(label, target.name, protocol) for r in row]
        mean = np.mean([r.correct for r in rows], axis=0, dtype=np.float64)
        return 100 * mean * sample_weights(rows[0].y, target.metric)

    def difference(self, label: str, targets: Sequence[Target], protocol: str) -> Difference:
        """Paired difference from the first label, as a mean over targets; their test images are resampled apart."""
        draws, means, by_run = [], [], []
        for number, target in enumerate(targets):
            paired = self.correct(label, target, protocol) - self.correct(self.labels[0], target, protocol)
            draws.append(bootstrap(paired, seed=number))
            means.append(paired.mean())
            a, b = (self.accuracies(la, target, protocol) for la in (self.labels[0], label))
            by_run.append([y - x for x, y in zip(a, b, strict=True)] if len(a) == len(b) else [])
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        over_runs = tuple(float(np.mean(run)) for run in zip(*by_run, strict=True))
        return Difference(float(np.mean(means)), (float(low), float(high)), t_interval(over_runs), over_runs)

    def log_odds(self, label: str, targets: Sequence[Target], protocol: str) -> float:
        """Mean log odds over targets (Sariyildiz et al. 2023, arXiv 2206.15369)."""
        return float(
            np.mean(
                [
                    log_odds(float(np.mean(self.accuracies(label, t, protocol))), len(self.correct(label, t, protocol)))
                    for t in targets
                ]
            )
        )

    def as_json(self) -> dict[str, Any]:
        """Everything in the tables, and every repetition behind it."""
        return {
            "settings": self.settings,
            "weights_sha256": {la: [self.weights_sha256.get(m) for m in self.members(la)] for la in self.labels},
            "reference": self.labels[0],
            "t_intervals_over": self.repetitions,
            "protocols": {p: self._protocol_json(p) for p in self.protocols},
            "collapse_of_train_features": {
                la: {
                    t.name: [self.collapse[m, t.name] for m in self.members(la) if (m, t.name) in self.collapse]
                    for t in self.targets
                }
                for la in self.labels
            },
            "seconds": self.seconds,
            "notes": list(self.notes),
            "missing": self.missing,
        }

    def _protocol_json(self, protocol: str) -> dict[str, Any]:
        targets: dict[str, Any] = {}
        complete = self.complete(protocol)
        for target in self.targets:
            cells = {}
            for label in self.labels:
                rows = self.runs(label, target.name, protocol)
                if not rows:
                    continue
                low, high = np.percentile(bootstrap(self.correct(label, target, protocol)), [2.5, 97.5])
                cells[label] = {
                    "accuracy": float(self.correct(label, target, protocol).mean()),
                    "interval_over_test_images": [float(low), float(high)],
                    "by_model": [self._model_json(row, target) for row in rows],
                    "runs": [[r.accuracy(target.metric) for r in row] for row in rows],
                    "chosen": [[r.chosen for r in row] for row in rows],
                }
                about = {"metric": target.metric, "test_images": len(rows[0][0].y), "features": rows[0][0].features}
            if cells:
                targets[target.name] = about | {"models": cells}
                if target in complete:
                    targets[target.name]["differences"] = self._differences_json([target], protocol)
        if not complete:
            return {"targets": targets, MEAN: None}
        accuracy = {la: float(np.mean([self.correct(la, t, protocol).mean() for t in complete])) for la in self.labels}
        mean = {
            "targets": [t.name for t in complete],
            "accuracy": accuracy,
            "log_odds": {la: self.log_odds(la, complete, protocol) for la in self.labels},
            "differences": self._differences_json(complete, protocol),
        }
        return {"targets": targets, MEAN: mean}

    def _model_json(self, row: list[Result], target: Target) -> dict[str, Any]:
        """One candidate's accuracy, averaged over seeds of the protocol."""
        correct = np.mean([r.correct for r in row], axis=0, dtype=np.float64)
        low, high = np.percentile(bootstrap(100 * correct * sample_weights(row[0].y, target.metric)), [2.5, 97.5])
        return {
            "accuracy": float(np.mean([r.accuracy(target.metric) for r in row])),
            "interval_over_test_images": [float(low), float(high)],
        }

    def _differences_json(self, targets: Sequence[Target], protocol: str) -> dict[str, Any]:
        found = {la: self.difference(la, targets, protocol) for la in self.labels[1:]}
        return {
            la: {
                "mean": d.mean,
                "interval_over_test_images": list(d.test_images),
                "interval_over_runs": d.runs and list(d.runs),
                "by_run": list(d.by_run),
            }
            for la, d in found.items()
        }

    def as_markdown(self) -> str:
        """The report to read."""
        lines = ["# Transfer", "", *self._head(), ""]
        for protocol in self.protocols:
            lines += [f"## {protocol}", "", *self._table(protocol), ""]
        if self.collapse:
            lines += ["## Collapse of the targets' training features", "", *self._collapse_table(), ""]
        if self.missing or self.notes:
            rows = [f"- **missing**: {k}: {v}" for k, v in self.missing.items()] + [f"- {n}" for n in self.notes]
            lines += ["## What is missing", "", *rows, ""]
        spent = ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items() if v >= 0.5)
        lines += [f"Time when computed: {spent or 'under a second'}.", ""]
        return "\n".join(lines)

    def _head(self) -> list[str]:
        models = [f"- `{c.label}`: `{c.name}`" + (f" {c.kwargs}" if c.kwargs else "") for c in self.candidates]
        lines = [*models, "", f"Accuracy in percent. t intervals are over {self.repetitions}."]
        if len(self.labels) > 1:
            lines[-1] += (
                f" Differences are from `{self.labels[0]}` in percentage points on the same test images: "
                "[95 % bootstrap interval over test images] (95 % t interval). A win or loss is an interval over test "
                "images on one side of 0; among 20 true ties one such is expected."
            )
        return lines

    def _table(self, protocol: str) -> list[str]:
        others = self.labels[1:]
        header = ["target", "test images", *self.labels, *(f"{la} - {self.labels[0]}" for la in others)]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        complete = self.complete(protocol)
        statement = ""
        for target in self.targets:
            cells = [self.accuracies(la, target, protocol) for la in self.labels]
            if not any(cells):
                continue
            run = next(rows for la in self.labels if (rows := self.runs(la, target.name, protocol)))[0][0]
            statement = run.features
            name = target.name if target.metric == "top1" else f"{target.name} ({METRICS[target.metric]})"
            accuracies = [f"{np.mean(c):.1f}" if c else "-" for c in cells]
            differences = [
                show(self.difference(la, [target], protocol)) if target in complete else "-" for la in others
            ]
            lines.append(f"| {' | '.join([name, str(len(run.y)), *accuracies, *differences])} |")
        if complete:
            accuracies = [
                f"{np.mean([np.mean(self.accuracies(la, t, protocol)) for t in complete]):.1f}" for la in self.labels
            ]
            differences = [show(self.difference(la, complete, protocol)) for la in others]
            lines.append(f"| **{MEAN} of {len(complete)}** | | {' | '.join([*accuracies, *differences])} |")
            odds = [self.log_odds(la, complete, protocol) for la in self.labels]
            shown = [f"{o:.3f}" for o in odds] + [f"{o - odds[0]:+.3f}" for o in odds[1:]]
            lines.append(f"| mean log odds | | {' | '.join(shown)} |")
            if others:
                tallies = [self.tally(la, complete, protocol) for la in others]
                lines.append(f"| win / tie / loss | | {' | '.join([''] * len(self.labels) + tallies)} |")
        layer = protocol.partition(" at depth ")[2]
        where = f"spatial mean of layer {layer}" if layer else "pre-logits, before any projector"
        lines += ["", f"Features: {statement}." if protocol == "finetune" else f"Features: {where}; {statement}."]
        return lines

    def tally(self, label: str, targets: Sequence[Target], protocol: str) -> str:
        """Numbers of targets won, tied and lost against the first label."""
        verdicts = [self.difference(label, [t], protocol).verdict for t in targets]
        return " / ".join(str(verdicts.count(v)) for v in ("win", "tie", "loss"))

    def _collapse_table(self) -> list[str]:
        names = ("nc1", "cdnv", "vci", "within")
        header = ["model", *names]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for label in self.labels:
            rows = [v for (m, _), v in self.collapse.items() if m in self.members(label)]
            values = [f"{np.median([r[n] for r in rows]):.3g}" if rows else "-" for n in names]
            lines.append(f"| {' | '.join([label, *values])} |")
        return [*lines, "", "Medians over targets; smaller is more collapsed. Every value is in results.json."]


def show(difference: Difference) -> str:
    """A difference in a table."""
    low, high = difference.test_images
    runs = f" ({difference.runs[0]:+.1f} to {difference.runs[1]:+.1f})" if difference.runs else ""
    return f"{difference.mean:+.1f} [{low:+.1f} to {high:+.1f}]{runs}"
