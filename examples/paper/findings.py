"""Read what paper.py has measured; write results.json, table1.md and claim.md: python examples/paper/findings.py OUT.

Every number is of the results.json that the commands wrote. Repetitions are trainings, paired by their seed: a mean is
over them, and its interval is 95 %, t.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from timm_etf import specs
from timm_etf.atomic import write_text
from timm_etf.report import results
from timm_etf.report.statistics import t_interval

Summary = dict[str, Any]
"""`mean`, its `interval` (None for one training) and `by_training`."""

COVARIANCE = {"within": 1.0, "within_share": 100.0, "nc1": 1.0, "cdnv": 1.0}
"""What is said of features within classes, and in which unit: (1/p) tr C; % of the total variance; NC1; CDNV."""


KINDS = {"proxy_a": "one unit of proxy A-distance", "frechet": "a tenfold Fréchet distance"}
"""Of distance, with what slopes are over."""

NEUTRAL = "neutral"


def summary(values: Sequence[float]) -> Summary:
    """Of one value for each training."""
    interval = t_interval(values)
    return {"mean": mean(values), "interval": interval and list(interval), "by_training": list(values)}


class Findings:
    """What was measured of one architecture: targets that every method has its trainings on."""

    def __init__(self, out: Path, architecture: str) -> None:
        self.out, self.architecture = out, architecture
        self.transfer = _read(out / "transfer" / architecture)
        self.reference = self.transfer["reference"]
        self.accuracies = accuracies(self.transfer)
        self.labels = list(next(iter(self.accuracies.values())))
        self.others = [label for label in self.labels if label != self.reference]
        named = dict(specs.split(spec) for spec in self.transfer["settings"]["targets"])
        groups = {Path(name).name: fields.get("group", "") for name, fields in named.items()}
        self.groups = {target: groups[target] for target in self.accuracies}

    def group(self, name: str) -> list[str]:
        """Targets of a group, or `all`."""
        return [target for target, group in self.groups.items() if name in ("all", group)]

    def gain(self, label: str, targets: Sequence[str]) -> list[float]:
        """A method's accuracy less the reference's, in points, as a mean over targets, by training."""
        ours, theirs = (np.mean([self.accuracies[t][la] for t in targets], axis=0) for la in (label, self.reference))
        return (ours - theirs).tolist()

    def distances(self, kind: str, *, neutral: bool = False) -> dict[str, float]:
        """Of targets, under a neutral network or as a mean over the methods' models.

        Fréchet's are logarithms, so that its units cancel.
        """
        models = self.transfer["distance"]["by_model"].items()
        by_model = [of for label, of in models if (label == NEUTRAL) == neutral]
        found = {t: [of[t][kind] for of in by_model] for t in self.groups}
        there = {t: values for t, values in found.items() if values and None not in values}
        return {t: float(np.mean(np.log10(v) if kind == "frechet" else v)) for t, v in there.items()}

    def slopes(self, label: str, *, neutral: bool = False) -> dict[str, Summary]:
        """Points by which the gain changes over one unit of distance, least squares over targets, by training."""
        found = {}
        for kind in KINDS:
            distance = self.distances(kind, neutral=neutral)
            if len(set(distance.values())) > 1:
                gains = np.array([self.gain(label, [target]) for target in distance])
                found[kind] = summary(np.polyfit(list(distance.values()), gains, 1)[0].tolist())
        return found

    def hours(self) -> dict[str, float]:
        """Of a process, by what it did; as long as others ran beside it."""
        trained = [source for sources in self._sources().values() for source in sources]
        found = {"pretraining": sum(source["train_seconds"] for source in trained)}
        for told in self._by_target_head():
            found[f"transfer, {told['settings']['finetune_head']}"] = sum(told["seconds"].values())
        return {what: round(seconds / 3600, 2) for what, seconds in found.items()}

    def _sources(self) -> dict[str, list[dict[str, Any]]]:
        """What every pretraining says of its source, by method."""
        runs = {la: f"pretrain/{self.architecture}-{la}-*/results.json" for la in self.labels}
        return {la: [_read(path.parent)["source"] for path in sorted(self.out.glob(of))] for la, of in runs.items()}

    def _by_target_head(self) -> list[dict[str, Any]]:
        folders = [path / self.architecture for path in (self.out / "transfer", *sorted(self.out.glob("heads/*")))]
        return [_read(path) for path in folders if (path / "results.json").exists()]

    def covariance(self) -> dict[str, Any]:
        """Of the test images' features, before and after transfer, by target, label and metric."""
        return {
            target: {
                label: {
                    metric: self._within(splits["test"], label, metric, unit) for metric, unit in COVARIANCE.items()
                }
                for label in splits["test"]
            }
            for target, splits in _read(self.out / "figure3" / self.architecture)["geometry"].items()
        }

    def _within(self, trainings: Mapping[str, Any], label: str, metric: str, unit: float) -> Summary | None:
        base = f"{self.reference} tuned" if label.endswith(" tuned") else self.reference
        ours, theirs = ([unit * m[metric] for m in trainings.get(la, ()) if metric in m] for la in (label, base))
        if not ours:
            return None
        paired = len(ours) == len(theirs) and label != base
        apart = summary([o - t for o, t in zip(ours, theirs, strict=True)]) if paired else None
        return {**summary(ours), "less_reference": apart}

    def heads(self) -> dict[str, Any]:
        """Accuracy under each classifier of the target, and less the learned one's; means over targets of all."""
        by_head = {told["settings"]["finetune_head"]: accuracies(told) for told in self._by_target_head()}
        targets = [target for target in self.accuracies if all(target in of for of in by_head.values())]
        found: dict[str, Any] = {}
        for (head, measured), label in product(by_head.items() if targets else (), (self.reference, *self.others)):
            ours, learned = (np.mean([a[t][label] for t in targets], axis=0) for a in (measured, self.accuracies))
            found.setdefault(head, {})[label] = {
                "accuracy": summary(ours.tolist()),
                "less_learned": summary((ours - learned).tolist()),
            }
        return {"targets": targets, "classifiers": found}

    def as_json(self) -> dict[str, Any]:
        """Everything that is said."""
        correlations = self.transfer["distance"]["difference_over_distance"].get("finetune", {})
        source = {la: [s["top1"] for s in of] for la, of in self._sources().items()}
        groups = ["all", *dict.fromkeys(self.groups.values())]
        means = {
            group: {la: np.mean([self.accuracies[t][la] for t in self.group(group)], axis=0) for la in self.labels}
            for group in groups
        }
        return {
            "reference": self.reference,
            "source": {
                "accuracy": {la: summary(of) for la, of in source.items()},
                "less_reference": {
                    la: summary(np.subtract(source[la], source[self.reference]).tolist()) for la in self.others
                },
            },
            "targets": {
                target: {
                    "group": group,
                    "distance": {kind: self.distances(kind).get(target) for kind in KINDS},
                    "distance_in_a_neutral_network": {
                        kind: self.distances(kind, neutral=True).get(target) for kind in KINDS
                    },
                    "accuracy": {la: summary(values) for la, values in self.accuracies[target].items()},
                    "less_reference": {la: summary(self.gain(la, [target])) for la in self.others},
                }
                for target, group in self.groups.items()
            },
            "accuracy": {
                group: {la: summary(of.tolist()) for la, of in by_label.items()} for group, by_label in means.items()
            },
            "gain": {
                label: {name: summary(self.gain(label, self.group(name))) for name in groups} for label in self.others
            },
            "slope": {
                label: {
                    **self.slopes(label),
                    NEUTRAL: self.slopes(label, neutral=True),
                    "rank_correlation": correlations.get(label),
                }
                for label in self.others
            },
            "covariance_of_test_features": self.covariance(),
            "target_heads": self.heads(),
            "hours_of_a_process": self.hours(),
            "missing": self.transfer["missing"],
        }


def accuracies(told: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Fine-tuned accuracy in percent of every training, by target and label, of targets that all labels have."""
    found = {
        target: {label: [m["accuracy"] for m in of["by_model"]] for label, of in measured["models"].items()}
        for target, measured in told["protocols"]["finetune"]["targets"].items()
    }
    most = max(map(len, found.values()))
    return {target: of for target, of in found.items() if len(of) == most}


def shown(value: Summary, digits: str = "+.1f") -> str:
    """A mean with its interval."""
    low_high = f" ({value['interval'][0]:{digits}} to {value['interval'][1]:{digits}})" if value["interval"] else ""
    return f"{value['mean']:{digits}}{low_high}"


def claim(architecture: str, found: Mapping[str, Any]) -> list[str]:
    """Three sentences: the gain over distance, the covariance after transfer, and whitening beside it."""
    reference, methods = found["reference"], list(found["slope"])
    count = len(found["gain"][methods[0]]["all"]["by_training"])
    lines = [f"# {architecture}: {count} trainings of each method, {len(found['targets'])} targets", ""]
    *beside, fixed = methods
    lines.append(f"1. Gain over distance: {_over_distance(fixed, reference, found)}.")
    for target, labels in found["covariance_of_test_features"].items():
        said = [_within(label, reference, labels) for label in (reference, *methods) if f"{label} tuned" in labels]
        lines.append(f"2. Covariance after transfer, (1/p) tr C of {target}'s test images: {'; '.join(said)}.")
    lines += [f"3. {label} beside it: {_over_distance(label, reference, found)}." for label in beside]
    if missing := found["missing"]:
        name, reason = next(iter(missing.items()))
        lines += ["", f"{len(missing)} results are missing: {name}: {reason}"]
    return [*lines, ""]


def _within(label: str, reference: str, labels: Mapping[str, Any]) -> str:
    before, tuned = labels[label], labels[f"{label} tuned"]
    after, share = tuned["within"], tuned["within_share"]
    said = f"{label} {shown(after, '.3g')}, {shown(share, '.1f')} % of the total variance"
    said += f" (before {before['within']['mean']:.3g}, {before['within_share']['mean']:.1f} %)"
    if after["less_reference"]:
        said += f", less {reference} {shown(after['less_reference'], '+.3g')}, {shown(share['less_reference'])} points"
    return said


def _over_distance(label: str, reference: str, found: Mapping[str, Any]) -> str:
    gain, slope = found["gain"][label], found["slope"][label]
    groups = [f"{shown(of)} on {name} targets" for name, of in gain.items() if name != "all"]
    said = (
        f"under fine-tuning {label} less {reference} is {' and '.join(groups)}, in points, and changes "
        f"{_slopes(slope)}; in a neutral network's features {_slopes(slope[NEUTRAL])}"
    )
    rank = slope["rank_correlation"]
    if rank and None not in (rank["spearman"], *rank["interval"]):  # there is none where all differences are alike
        low, high = rank["interval"]
        said += f" (rank correlation {rank['spearman']:+.2f}, {low:+.2f} to {high:+.2f} over targets and trainings)"
    return said


def _slopes(found: Mapping[str, Any]) -> str:
    by_kind = [f"by {shown(found[kind])} over {unit}" for kind, unit in KINDS.items() if kind in found]
    return ", ".join(by_kind) or "all targets are equally far"


def table(architecture: str, found: Mapping[str, Any]) -> list[str]:
    """Fine-tuned accuracy as in the paper's Table 1, differences in points; the target's classifiers side by side."""
    others = list(found["gain"])
    labels = [found["reference"], *others]
    apart = [f"{label} - {labels[0]}" for label in others]
    lines = [f"# {architecture}, fine-tuned accuracy in %", "", f"| target | {' | '.join([*labels, *apart])} |"]
    lines.append(f"|{'---|' * (1 + len(labels) + len(apart))}")
    rows = {f"{target} ({of['group']})": of for target, of in found["targets"].items()}
    for title, of in {"top-1 on the source": found["source"], **rows}.items():
        cells = [f"{of['accuracy'][label]['mean']:.1f}" for label in labels]
        cells += [shown(of["less_reference"][label]) for label in others]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for name in dict.fromkeys(of["group"] for of in found["targets"].values()):
        members = [of["accuracy"] for of in found["targets"].values() if of["group"] == name]
        cells = [f"{mean(of[label]['mean'] for of in members):.1f}" for label in labels]
        lines.append(
            f"| **mean of {name}** | {' | '.join([*cells, *(shown(found['gain'][la][name]) for la in others)])} |"
        )
    compared = found["target_heads"]["classifiers"]
    if not compared:
        return [*lines, ""]
    lines += ["", f"## Classifiers of the target, mean of {', '.join(found['target_heads']['targets'])}", ""]
    heads = list(compared)
    lines += [f"| pretrained | {' | '.join([*heads, *(f'{h} - {heads[0]}' for h in heads[1:])])} |"]
    lines += [f"|{'---|' * (2 * len(heads))}"]
    for label in labels:
        of_label = [compared[head][label] for head in heads]
        cells = [f"{of['accuracy']['mean']:.1f}" for of in of_label] + [
            shown(of["less_learned"]) for of in of_label[1:]
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return content


def main(out: Path) -> None:
    """Write all three."""
    architectures = sorted(path.parent.name for path in out.glob("transfer/*/results.json"))
    if not architectures:
        sys.exit(f"No {out}/transfer/*/results.json: paper.py makes them.")
    if broken := [name for name in architectures if not _read(out / "transfer" / name)["reference"]]:
        sys.exit(f"{out}/transfer/{broken[0]} has no result of the first method: see its report.md.")
    found = {name: Findings(out, name).as_json() for name in architectures}
    results.write(out / "results.json", found)
    note = ["Intervals are 95 %, t over trainings with these targets given, where nothing else is said.", ""]
    write_text(out / "claim.md", "\n".join([*(line for name in found for line in claim(name, found[name])), *note]))
    write_text(out / "table1.md", "\n".join([*(line for name in found for line in table(name, found[name])), *note]))
    print(f"table:    {out / 'table1.md'}\nclaim:    {out / 'claim.md'}")
    print(f"pictures: {out}/figure2/*, figure3/* and transfer/*/distance.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
