"""The statistics of a comparison: accuracies, paired differences from the first label, and their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from timm_etf.data.catalogue import Target
from timm_etf.features.candidates import Candidate
from timm_etf.report.statistics import in_quadrature, log_odds, percentiles, t_interval
from timm_etf.transfer.distance import rank_correlation
from timm_etf.transfer.fine_tuning import LEARNING_RATES
from timm_etf.transfer.neighbours import NEIGHBOURS, TEMPERATURES
from timm_etf.transfer.probe import STRENGTHS
from timm_etf.transfer.result import Result, resampled, sample_weights

Repeated = Literal["trainings", "protocol seeds"]

GRIDS: dict[str, Sequence[float]] = {
    "strength": STRENGTHS,
    "k": NEIGHBOURS,
    "temperature": TEMPERATURES,
    "lr": LEARNING_RATES,
}
"""What each hyper-parameter in `Result.chosen` was chosen from."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of one label less the reference's, in percentage points, on the same test images.

    Attributes:
        mean: Over runs.
        test_images: 95 % bootstrap interval over test images: these very models on other images of the kind.
        runs: 95 % t interval over repetitions on these very images; None where there are not two that pair.
        runs_and_images: 95 % interval over trainings and test images both, which a claim about methods rests on; None
            where the repetitions are not trainings.
        by_run: The difference of every repetition; empty where they do not pair.
        repeated: What the repetitions are, or None where they do not pair.
    """

    mean: float
    test_images: tuple[float, float]
    runs: tuple[float, float] | None
    runs_and_images: tuple[float, float] | None
    by_run: tuple[float, ...]
    repeated: Repeated | None

    @property
    def verdict(self) -> str:
        """`win`, `tie` or `loss` of these very models: over test images."""
        return _side(self.test_images)

    @property
    def claim(self) -> str | None:
        """`win`, `tie` or `loss` of the methods: over trainings and test images; None without several trainings."""
        return self.runs_and_images and _side(self.runs_and_images)


def _side(interval: tuple[float, float]) -> str:
    low, high = interval
    return "win" if low > 0 else "loss" if high < 0 else "tie"


@dataclass(frozen=True)
class Comparison:
    """All results, by candidate, target, protocol and seed, and what is missing among them.

    Attributes:
        candidates: The models; those of one label are trainings of one method, the first label is the reference.
        targets: The targets that could be opened.
        results: By number of the candidate, target, protocol and seed.
        seconds: Time spent, by protocol.
        missing: Why something has no result, by what it is.
        notes: Remarks for the reader.
        collapse: Collapse metrics of the training features, by number of the candidate and target.
        weights_sha256: Hash of the weights' file, by number of the candidate.
        settings: What was asked for; `seeds` is the number of protocol seeds.
        distance: `proxy_a` and `frechet` distance of a target from the source, by number of the candidate, or
            "neutral", and target; empty where no source was given.
    """

    candidates: Sequence[Candidate]
    targets: Sequence[Target]
    results: dict[tuple[int, str, str, int], Result]
    seconds: dict[str, float]
    missing: dict[str, str]
    notes: Sequence[str]
    collapse: dict[tuple[int, str], dict[str, float]]
    weights_sha256: dict[int, str]
    settings: dict[str, Any]
    distance: dict[tuple[int | str, str], dict[str, float]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The first label, with or without results: no other label takes its place."""
        return self.candidates[0].label

    @cached_property
    def labels(self) -> list[str]:
        """Labels that have any result, in the order given."""
        found = {number for number, *_ in self.results}
        return list(dict.fromkeys(c.label for i, c in enumerate(self.candidates) if i in found))

    @property
    def others(self) -> list[str]:
        """Labels that are compared with the reference; none if that has no result."""
        return [la for la in self.labels if la != self.reference] if self.reference in self.labels else []

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

    def distance_of(self, target: Target, kind: str = "proxy_a", label: str | None = None) -> float:
        """A target's distance from the source: under the neutral model, or the mean over a label's, or all, models."""
        models: Sequence[int | str] = ["neutral"] if label is None else self.members(label)
        if label is None and not any(model == "neutral" for model, _ in self.distance):
            models = range(len(self.candidates))  # one measure for all targets: a neutral model's, where there is one
        found = [self.distance[m, target.name][kind] for m in models if (m, target.name) in self.distance]
        return float(np.mean(found)) if found else float("nan")

    def gain_over_distance(self, label: str, protocol: str) -> tuple[float, tuple[float, float]] | None:
        """Rank correlation of a label's difference from the reference with the distance, and its interval."""
        targets = [t for t in self.paired(label, protocol) if np.isfinite(self.distance_of(t))]
        if len(targets) < 3:
            return None
        differences = [self.difference(label, [t], protocol) for t in targets]
        gains = [d.by_run or (d.mean,) for d in differences]
        return rank_correlation([self.distance_of(t) for t in targets], np.transpose(gains))

    def complete(self, protocol: str, *labels: str) -> list[Target]:
        """Targets on which each of the labels, by default every one, has all its results."""
        return [t for t in self.targets if all(self.runs(la, t.name, protocol) for la in labels or self.labels)]

    def paired(self, label: str, protocol: str) -> list[Target]:
        """Targets on which a label can be compared with the reference, whatever became of the other labels."""
        return self.complete(protocol, self.reference, label)

    def repeated(self, label: str) -> Repeated | None:
        """What pairs the repetitions of a label and of the reference: decided by their numbers of members alone."""
        ours, theirs = len(self.members(label)), len(self.members(self.reference))
        if ours != theirs:
            return None
        return "trainings" if ours > 1 else "protocol seeds"

    @property
    def repetitions(self) -> str:
        """What varies between the repetitions that t intervals are over, pair by pair where pairs differ."""
        said = {la: self._repetitions(la) for la in self.others or [self.reference]}
        if len(set(said.values())) == 1:
            return next(iter(said.values()))
        return "; ".join(f"{words} (`{la}` - `{self.reference}`)" for la, words in said.items())

    def _repetitions(self, label: str) -> str:
        count = self.settings["seeds"]
        seeds = f"{count} seed{'s' if count > 1 else ''} of the protocol"
        ours, theirs = len(self.members(label)), len(self.members(self.reference))
        match self.repeated(label):
            case "trainings":
                return f"{ours} models of each label, averaged over {seeds}"
            case "protocol seeds":
                return f"{seeds}; the models themselves are one training each"
            case None:
                return f"nothing: {theirs} and {ours} models do not pair"

    def accuracies(self, label: str, target: Target, protocol: str) -> list[float]:
        """Accuracy in percent of every repetition: of each member if the label has several, else of each seed."""
        by_member = [[r.accuracy(target.metric) for r in row] for row in self.runs(label, target.name, protocol)]
        return [float(np.mean(row)) for row in by_member] if len(by_member) > 1 else by_member[0] if by_member else []

    def order(self, label: str, target: Target, protocol: str) -> dict[str, list[float]]:
        """What `Result.order` has, by name: of each member if the label has several, else of each seed."""
        rows = self.runs(label, target.name, protocol)
        if not rows:
            return {}
        by_name = {name: [[r.order[name] for r in row] for row in rows] for name in rows[0][0].order}
        return {n: [float(np.mean(row)) for row in v] if len(v) > 1 else v[0] for n, v in by_name.items()}

    def accuracy(self, label: str, targets: Sequence[Target], protocol: str) -> float:
        """Accuracy in percent over all runs, as a mean over targets."""
        return float(np.mean([self._correct(label, t, protocol)[2] for t in targets]))

    def interval(self, label: str, targets: Sequence[Target], protocol: str) -> tuple[float, float]:
        """95 % bootstrap interval of `accuracy` over test images, those of each target resampled apart."""
        drawn = []
        for number, target in enumerate(targets):
            correct, y, _ = self._correct(label, target, protocol)
            drawn.append(resampled(correct, y, target.metric, seed=number))
        return percentiles(np.mean(drawn, axis=0))

    def _correct(
        self, label: str, target: Target, protocol: str
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
        """How often each test image was right over all runs, in percent [n]; its class number [n]; the metric."""
        rows = [r for row in self.runs(label, target.name, protocol) for r in row]
        correct: NDArray[np.float64] = 100 * np.asarray(np.mean([r.correct for r in rows], axis=0, dtype=np.float64))
        return correct, rows[0].y, float((correct * sample_weights(rows[0].y, target.metric)).mean())

    def difference(self, label: str, targets: Sequence[Target], protocol: str) -> Difference:
        """Paired difference from the reference, as a mean over targets; their test images are resampled apart."""
        repeated = self.repeated(label)
        drawn, means, by_run = [], [], []
        for number, target in enumerate(targets):
            (b, y, _), (a, _, _) = (self._correct(la, target, protocol) for la in (label, self.reference))
            drawn.append(resampled(b - a, y, target.metric, seed=number))
            means.append(((b - a) * sample_weights(y, target.metric)).mean())
            if repeated:
                pairs = zip(*(self.accuracies(la, target, protocol) for la in (self.reference, label)), strict=True)
                by_run.append([b - a for a, b in pairs])
        mean, images = float(np.mean(means)), percentiles(np.mean(drawn, axis=0))
        over_runs = tuple(float(np.mean(run)) for run in zip(*by_run, strict=True))
        runs = t_interval(over_runs)
        both = in_quadrature(mean, runs, images) if runs and repeated == "trainings" else None
        return Difference(mean, images, runs, both, over_runs, repeated)

    def tally(self, label: str, targets: Sequence[Target], protocol: str, *, claims: bool = False) -> str:
        """Numbers of targets won, tied and lost against the reference, over test images or, as claims, over both."""
        found = [self.difference(label, [t], protocol) for t in targets]
        verdicts = [d.claim if claims else d.verdict for d in found]
        return " / ".join(str(verdicts.count(v)) for v in ("win", "tie", "loss"))

    def log_odds(self, label: str, targets: Sequence[Target], protocol: str) -> float:
        """Mean log odds over targets (Sariyildiz et al. 2023, arXiv 2206.15369)."""
        odds = []
        for target in targets:
            accuracy = float(np.mean(self.accuracies(label, target, protocol)))
            odds.append(log_odds(accuracy, len(self._correct(label, target, protocol)[1])))
        return float(np.mean(odds))

    def at_edge(self, label: str, target: str, protocol: str) -> dict[str, int]:
        """How many runs of a cell chose a hyper-parameter at an end of its grid, for each that was chosen.

        One neighbour is no such end, because there are no fewer; and a grid of two values has nothing else.
        """
        chosen = [r.chosen for row in self.runs(label, target, protocol) for r in row]
        counts = {}
        for name in [n for n, grid in GRIDS.items() if len(grid) > 2 and chosen and n in chosen[0]]:
            ends = {min(GRIDS[name]), max(GRIDS[name])} - ({1} if name == "k" else set())
            counts[name] = sum(c[name] in ends for c in chosen)
        return counts
