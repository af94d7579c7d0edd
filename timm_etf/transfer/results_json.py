"""A comparison as results.json: everything in the tables, and every repetition behind it."""

from collections.abc import Sequence

import numpy as np

from timm_etf.data.catalogue import Target
from timm_etf.report import results
from timm_etf.report.statistics import percentiles
from timm_etf.transfer.comparison import Comparison
from timm_etf.transfer.result import Result, resampled


def as_json(comparison: Comparison) -> results.Transfer:
    """What goes into results.json."""
    c = comparison
    return _head(c) | ({"distance": _distance(c)} if c.distance else {})


def _distance(c: Comparison) -> results.Distance:
    kinds = ("proxy_a", "frechet")
    named: dict[str, str | None] = {la: la for la in c.labels}
    named |= {"neutral": None} if any(m == "neutral" for m, _ in c.distance) else {}
    correlations: dict[str, dict[str, results.Correlation]] = {}
    for protocol in c.protocols:
        for label in c.others:
            if found := c.gain_over_distance(label, protocol):
                value: results.Correlation = {"spearman": found[0], "interval": list(found[1])}
                correlations.setdefault(protocol, {})[label] = value
    return {
        "source": str(c.settings["source"]),
        "by_model": {
            name: {t.name: {k: c.distance_of(t, k, label) for k in kinds} for t in c.targets}
            for name, label in named.items()
        },
        "difference_over_distance": correlations,
    }


def _head(c: Comparison) -> results.Transfer:
    return {
        "settings": c.settings,
        "weights_sha256": {la: [c.weights_sha256.get(m) for m in c.members(la)] for la in c.labels},
        "reference": c.reference if c.reference in c.labels else None,
        "t_intervals_over": c.repetitions,
        "protocols": {p: _protocol(c, p) for p in c.protocols},
        "collapse_of_train_features": {la: {t.name: _collapse(c, la, t) for t in c.targets} for la in c.labels},
        "seconds": c.seconds,
        "notes": list(c.notes),
        "missing": c.missing,
    }


def _collapse(c: Comparison, label: str, target: Target) -> list[results.Collapse | None]:
    """Of every member, None for one that has none: places are members."""
    found: list[results.Collapse | None] = [
        dict(c.collapse[m, target.name]) if (m, target.name) in c.collapse else None for m in c.members(label)
    ]
    return found if any(found) else []


def _protocol(c: Comparison, protocol: str) -> results.Protocol:
    targets: dict[str, results.OnTarget] = {}
    for target in c.targets:
        rows = {la: found for la in c.labels if (found := c.runs(la, target.name, protocol))}
        if not rows:
            continue
        first = next(iter(rows.values()))[0][0]
        targets[target.name] = {
            "metric": target.metric,
            "test_images": len(first.y),
            "features": first.treatment,
            "models": {la: _label(c, la, found, target, protocol) for la, found in rows.items()},
        }
        order: dict[str, dict[str, list[float | None]]] = {
            la: {k: list(v) for k, v in of.items()} for la in rows if (of := c.order(la, target, protocol))
        }
        if order:
            targets[target.name]["order"] = order
        both = [la for la in c.others if target in c.paired(la, protocol)]
        if both:
            targets[target.name]["differences"] = {la: _difference(c, la, [target], protocol) for la in both}
    return {"targets": targets, "mean": _mean(c, protocol)}


def _label(c: Comparison, label: str, rows: list[list[Result]], target: Target, protocol: str) -> results.Label:
    return {
        "accuracy": c.accuracy(label, [target], protocol),
        "interval_over_test_images": list(c.interval(label, [target], protocol)),
        "by_model": [_model(row, target) for row in rows],
        "runs": [[r.accuracy(target.metric) for r in row] for row in rows],
        "chosen": [[r.chosen for r in row] for row in rows],
        "at_grid_edge": c.at_edge(label, target.name, protocol),
    }


def _model(row: list[Result], target: Target) -> results.Measured:
    """One candidate's accuracy, averaged over seeds of the protocol."""
    correct = 100 * np.asarray(np.mean([r.correct for r in row], axis=0, dtype=np.float64))
    return {
        "accuracy": float(np.mean([r.accuracy(target.metric) for r in row])),
        "interval_over_test_images": list(percentiles(resampled(correct, row[0].y, target.metric))),
    }


def _mean(c: Comparison, protocol: str) -> results.Mean | None:
    complete = {la: found for la in c.labels if (found := c.complete(protocol, la))}
    if not complete:
        return None
    paired = {la: found for la in c.others if (found := c.paired(la, protocol))}
    return {
        "targets": [t.name for t in complete.get(c.reference, [])],
        "targets_by_label": {la: [t.name for t in found] for la, found in complete.items()},
        "accuracy": {la: c.accuracy(la, found, protocol) for la, found in complete.items()},
        "log_odds": {la: c.log_odds(la, found, protocol) for la, found in complete.items()},
        "differences": {la: _difference(c, la, found, protocol) for la, found in paired.items()},
    }


def _difference(c: Comparison, label: str, targets: Sequence[Target], protocol: str) -> results.Difference:
    d = c.difference(label, targets, protocol)
    return {
        "mean": d.mean,
        "interval_over_test_images": list(d.test_images),
        "interval_over_runs": list(d.runs) if d.runs else None,
        "interval_over_runs_and_images": list(d.runs_and_images) if d.runs_and_images else None,
        "runs_are": d.repeated,
        "by_run": list(d.by_run),
    }
