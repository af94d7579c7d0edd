"""Read OUT/results.json of study.py; write OUT/report.md and two pictures: python examples/study/report.py OUT."""

import json
import sys
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from timm_etf.atomic import write_text
from timm_etf.report.statistics import t_interval
from timm_etf.report.style import COLOURS, save

RECIPE = "simplex, NTCE, projector"
WITH_CE = "simplex, CE, projector"
"""The same under cross-entropy, which was called the recipe before NTCE had been measured."""
TWINS = {RECIPE: "learned, NTCE, projector", WITH_CE: "learned, CE, projector"}
"""The same with learned rows: what they are behind is the frame's own part."""
STEPS = {
    "learned, CE": "learned,\ncross-entropy",
    TWINS[WITH_CE]: "+ projector",
    WITH_CE: "+ simplex",
    RECIPE: "+ NTCE",
}
"""What the recipe's gain is made of, one change after the other."""
OTHER_STEPS = {
    "learned, CE": "learned,\ncross-entropy",
    TWINS[WITH_CE]: "+ projector",
    TWINS[RECIPE]: "+ NTCE",
    RECIPE: "+ simplex",
}
"""The same way with its last two steps exchanged."""
COMPARED = {
    "simplex, projector, NTCE (the recipe) - learned": (RECIPE, "learned, CE", COLOURS[1]),
    "simplex, projector, NTCE - learned, projector, NTCE": (RECIPE, TWINS[RECIPE], COLOURS[4]),
    "simplex, projector, cross-entropy - learned": (WITH_CE, "learned, CE", COLOURS[3]),
    "simplex, projector, cross-entropy - learned, projector": (WITH_CE, TWINS[WITH_CE], COLOURS[2]),
    "simplex in the classifier's place - learned": ("simplex, CE", "learned, CE", COLOURS[0]),
}
"""Differences that are drawn: of which arm, from which, and the colour."""
HALVES = {"headline": "Targets that nothing was tuned on", "choice": "Targets that arms may be chosen by"}
PROTOCOLS = ("probe", "knn", "1-shot", "5-shot", "10-shot", "finetune")


class Findings:
    """What a study has found so far."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.settings, self.arms = results["settings"], results["arms"]
        self.reference = next(iter(self.arms))

    def means(self, arm: str, protocol: str, half: str) -> dict[str, float]:
        """Mean accuracy over a half of the targets, `choice` or `headline`, or over `both`, by seed."""
        by_target = [self.on(arm, protocol, target) for target in self.targets(half)]
        seeds = dict.fromkeys(seed for found in by_target for seed in found)
        return {seed: mean(found[seed] for found in by_target if seed in found) for seed in seeds}

    def targets(self, half: str) -> list[str]:
        """Names of `choice` or `headline`, or of `both`."""
        return [target for h in HALVES if half in (h, "both") for target in self.settings[h]]

    def on(self, arm: str, protocol: str, target: str) -> dict[str, float]:
        """Accuracy on one target, by seed."""
        runs = self.arms.get(arm, {"runs": {}})["runs"].items()
        told = {seed: run.get("transfer", {}).get(protocol, {}) for seed, run in runs}
        return {seed: accuracies[target] for seed, accuracies in told.items() if target in accuracies}

    def source_top1(self, arm: str) -> dict[str, float]:
        """Accuracy on the source's validation images, by seed."""
        return {seed: run["source"]["top1"] for seed, run in self.arms[arm]["runs"].items()}

    def measured(self, arm: str, protocols: list[str]) -> bool:
        """Whether there is something of an arm under each of them."""
        return all(self.means(arm, protocol, "headline") for protocol in protocols)

    def difference(self, arm: str, other: str, protocol: str, half: str) -> list[float]:
        """Of one arm less another, for every seed that both have."""
        ours, theirs = (self.means(name, protocol, half) for name in (arm, other))
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    @property
    def protocols(self) -> list[str]:
        """Those that any arm was measured under."""
        return [p for p in PROTOCOLS if any(self.means(arm, p, "headline") for arm in self.arms)]

    def title(self, protocol: str, half: str) -> str:
        """A protocol, with its targets and trainings where it has not been measured on all."""
        runs = [run.get("transfer", {}).get(protocol, {}) for run in self.arms[self.reference]["runs"].values()]
        targets = [t for t in self.targets(half) if any(t in run for run in runs)]
        trainings = sum(bool(run) for run in runs)
        if not targets:
            return f"{protocol} (not measured)"
        limits = [] if len(targets) == len(self.targets(half)) else [", ".join(targets)]
        limits += [] if trainings == len(runs) else [f"{trainings} seeds"]
        return f"{protocol} ({'; '.join(limits)})" if limits else protocol

    def table(self, half: str) -> list[str]:
        """Rows of accuracies and of differences from the first arm."""
        protocols = [p for p in self.protocols if any(self.means(arm, p, half) for arm in self.arms)]
        titles = " | ".join(self.title(p, half) for p in protocols)
        lines = [f"| arm | seeds | source top-1 | {titles} |", f"|{'---|' * (3 + len(protocols))}"]
        for name, arm in self.arms.items():
            if not arm["runs"]:
                continue
            top1, first = (self.source_top1(each) for each in (name, self.reference))
            apart = [top1[seed] - first[seed] for seed in top1 if seed in first and name != self.reference]
            cells = [f"{mean(top1.values()):.1f}" + (f" ({shown(apart)})" if apart else "")]
            for protocol in protocols:
                accuracies = self.means(name, protocol, half).values()
                cell = f"{mean(accuracies):.1f}" if accuracies else "-"
                if name != self.reference and (paired := self.difference(name, self.reference, protocol, half)):
                    cell += f" ({shown(paired)})"
                cells.append(cell)
            measured = len(self.means(name, "probe", half))
            lines.append(f"| {name} | {measured} | {' | '.join(cells)} |")
        return lines

    def choice(self) -> str:
        """The arms by what they reach on the targets that arms may be chosen by."""
        protocols = [p for p in self.protocols if p != "finetune"]
        found = {
            arm: [mean(self.means(arm, p, "choice").values()) for p in protocols]
            for arm in self.arms
            if protocols and all(self.means(arm, p, "choice") for p in protocols)
        }
        ordered = sorted(found, key=lambda arm: -mean(found[arm]))
        return f"Mean of {', '.join(protocols)}: " + "; ".join(f"{arm} {mean(found[arm]):.1f}" for arm in ordered) + "."

    def less(self, recipe: str, half: str) -> list[str]:
        """Rows of differences of an arm from every other."""
        titles = " | ".join(self.title(p, half) for p in self.protocols)
        lines = [f"| {recipe}, less | {titles} |", f"|{'---|' * (1 + len(self.protocols))}"]
        for name in self.arms:
            paired = [self.difference(recipe, name, protocol, half) for protocol in self.protocols]
            if name != recipe and any(paired):
                lines.append(f"| {name} | {' | '.join(shown(each) if each else '-' for each in paired)} |")
        return lines

    def by_target(self, recipe: str, other: str) -> list[str]:
        """Rows of differences of an arm from another, one for each target."""
        lines = [f"| {recipe}, less {other} | {' | '.join(self.protocols)} |", f"|{'---|' * (1 + len(self.protocols))}"]
        for target in self.targets("both"):
            cells = []
            for protocol in self.protocols:
                ours, theirs = (self.on(arm, protocol, target) for arm in (recipe, other))
                paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                cells.append(shown(paired) if paired else "-")
            lines.append(f"| {target} | {' | '.join(cells)} |")
        return lines

    def fine_tuned(self) -> list[str]:
        """Rows of arms that were fine-tuned and, of the same trainings, of what they were before."""
        lines = ["| target | arm | fine-tuned | probe before | kNN before |", f"|{'---|' * 5}"]
        for target in self.targets("both"):
            for arm in self.arms:
                if tuned := self.on(arm, "finetune", target):
                    before = [[self.on(arm, p, target)[seed] for seed in tuned] for p in ("probe", "knn")]
                    cells = [f"{mean(each):.1f}" for each in (tuned.values(), *before)]
                    lines.append(f"| {target} | {arm} | {' | '.join(cells)} |")
        return lines

    def screened(self) -> list[str]:
        """Rows of the arms beside the headline's that were measured as they were tuned, or not at all."""
        others = {name: arm for name, arm in self.arms.items() if "screened" in arm or not arm["runs"]}
        protocols = [p for p in PROTOCOLS if any(p in arm.get("screened", {}) for arm in others.values())]
        if not others:
            return []
        lines = ["", "## Beside the headline", "", "One seed, a third of the passes. The better half on the source was"]
        lines += [
            "measured on targets that arms may be chosen by; half of that was then trained.",
            "",
        ]
        titles = ["arm", "batch, rate", "source top-1", *protocols]
        lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        for name in sorted(others, key=lambda name: -best(others[name])):
            arm = others[name]
            found = [arm.get("screened", {}).get(p, {}).get("mean") for p in protocols]
            cells = [name, f"{arm['chosen']['batch_size']}, {arm['chosen']['lr']}", f"{best(arm):.1f}"]
            cells += ["-" if accuracy is None else f"{accuracy:.1f}" for accuracy in found]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def geometry(self) -> list[str]:
        """Rows of how collapsed the source's validation features are, before any projector."""
        metrics = ("nc1", "cdnv", "nc2_simplex", "within", "effective_rank_between", "effective_rank_within")
        lines = [f"| arm | {' | '.join(metrics)} |", f"|{'---|' * (1 + len(metrics))}"]
        for name, arm in self.arms.items():
            sources = [run["source"] for run in arm["runs"].values()]
            if sources:
                cells = [f"{mean(source[metric] for source in sources):.3g}" for metric in metrics]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


def best(arm: dict[str, Any]) -> float:
    """Accuracy on the source of an arm as it was tuned."""
    return max(top1 or 0 for top1 in arm["tuned"].values())


def shown(differences: list[float]) -> str:
    """A mean difference with its interval over seeds, where there are several."""
    interval = t_interval(differences)
    return f"{mean(differences):+.1f}" + (f", {interval[0]:+.1f} to {interval[1]:+.1f}" if interval else "")


def draw(findings: Findings, path: Path) -> None:
    """Accuracies on the headline targets, and what each change adds to them, by either way."""
    protocols = [p for p in ("probe", "knn", "5-shot") if p in findings.protocols]
    ways = [way for way in (STEPS, OTHER_STEPS) if all(findings.measured(arm, protocols) for arm in way)]
    ways = ways or [dict(takewhile(lambda step: findings.measured(step[0], protocols), STEPS.items()))]
    figure: Any = Figure(figsize=(4.6 * len(protocols), 3.2 * len(ways)), layout="constrained")
    rows = figure.subplots(len(ways), len(protocols), squeeze=False, sharey="col")
    for protocol, column in zip(protocols, rows.T, strict=True):
        levels = [draw_steps(findings, way, protocol, axis) for way, axis in zip(ways, column, strict=True)]
        column[0].set_title(protocol)
        column[0].set_ylim(min(map(min, levels)) - 1.5, max(map(max, levels)) + 1.2)
    figure.supylabel("mean of headline targets (%)", fontsize=9)
    save(figure, path)


def draw_steps(findings: Findings, way: dict[str, str], protocol: str, axis: Any) -> list[float]:
    """Each arm of a way from the one before, over the seeds that all of them have; returns their accuracies."""
    found = [findings.means(arm, protocol, "headline") for arm in way]
    seeds = [seed for seed in found[0] if all(seed in each for each in found)]
    levels = [mean(each[seed] for seed in seeds) for each in found]
    axis.bar(0, levels[0], color=COLOURS[0])
    axis.text(0, levels[0], f"{levels[0]:.1f}\n({len(seeds)} seeds)", ha="center", va="bottom", fontsize=8)
    for place, (before, arm) in enumerate(pairwise(found), 1):
        gains = [arm[seed] - before[seed] for seed in seeds]
        level, gain = levels[place - 1], mean(gains)
        axis.bar(place, gain, bottom=level, color=COLOURS[4] if gain > 0 else COLOURS[1])
        told = shown(gains).replace(", ", "\n")
        axis.text(place, level + max(gain, 0), told, ha="center", va="bottom", fontsize=8)
        axis.plot([place - 1.4, place + 0.4], [level, level], color="black", linewidth=0.8)
    axis.set_xticks(range(len(way)), way.values(), fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return levels


def draw_gains(findings: Findings, path: Path) -> None:
    """Differences with their intervals over trainings, protocol by protocol, on both halves of the targets."""
    drawn = findings.protocols
    compared = {k: of for k, of in COMPARED.items() if all(findings.measured(arm, ["knn"]) for arm in of[:2])}
    figure: Any = Figure(figsize=(11, 0.75 * len(drawn) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(HALVES), sharex=True)
    for axis, (half, title) in zip(axes, HALVES.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for number, (name, (arm, other, colour)) in enumerate(compared.items()):
            offset = 0.16 * (number - (len(compared) - 1) / 2)
            paired = [findings.difference(arm, other, p, half) for p in drawn]
            there = [(place, each) for place, each in enumerate(paired) if each]
            means = [mean(each) for _, each in there]
            ends = [t_interval(each) or (middle, middle) for middle, (_, each) in zip(means, there, strict=True)]
            reach = [[m - low for m, (low, _) in zip(means, ends, strict=True)]]
            reach += [[high - m for m, (_, high) in zip(means, ends, strict=True)]]
            rows = [place + offset for place, _ in there]
            axis.errorbar(means, rows, xerr=reach, fmt="o", color=colour, capsize=3, label=name)
        axis.set_title(f"{title}:\n{', '.join(findings.settings[half])}", fontsize=9)
        told = [findings.title(p, half).replace(" (", "\n(").replace(", emoji", ",\nemoji") for p in drawn]
        axis.set_yticks(range(len(drawn)), told, fontsize=8)
        axis.set_ylim(len(drawn) - 0.5, -0.5)
        axis.set_xlabel("difference in accuracy, percentage points; 95 % over trainings", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.9")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


def main(out: Path) -> None:
    """Write both."""
    findings = Findings(json.loads((out / "results.json").read_text(encoding="utf-8")))
    lines = [f"# Loss, head and projector: {findings.settings['family']}", ""]
    for half, title in HALVES.items():
        lines += [f"## {title}", "", ", ".join(findings.settings[half]), "", *findings.table(half), ""]
    lines += [findings.choice(), ""]
    lines += [f"Differences are from {findings.reference}, over the seeds that both have, with 95 % t intervals.", ""]
    for recipe, twin in TWINS.items():
        if findings.measured(recipe, ["knn"]):
            lines += [f"## {recipe}, less the others", ""]
            for half, title in (*HALVES.items(), ("both", "All of them")):
                lines += [f"{title}:", "", *findings.less(recipe, half), ""]
            for other in (findings.reference, twin):
                if findings.measured(other, ["knn"]):
                    lines += [*findings.by_target(recipe, other), ""]
    lines += ["## Fine-tuned", "", *findings.fine_tuned(), *findings.screened()]
    lines += ["", "## Geometry", "", "Of the source's validation images, before any projector; means over trainings."]
    lines += ["", *findings.geometry()]
    lines += [
        "",
        "## What was tuned",
        "",
        "Top-1 on the source's validation images, a third of the passes, seed 0; - has no result.",
        "",
    ]
    grid = list(next(iter(findings.arms.values()))["tuned"])
    lines += [f"| arm | {' | '.join(grid)} |", f"|{'---|' * (1 + len(grid))}"]
    for name, arm in findings.arms.items():
        tuned = (arm["tuned"][point] for point in grid)
        lines.append(f"| {name} | {' | '.join('-' if top1 is None else f'{top1:.1f}' for top1 in tuned)} |")
    write_text(out / "report.md", "\n".join(lines) + "\n")
    print(f"report:  {out / 'report.md'}")
    if findings.protocols:  # something has been measured
        draw(findings, out / "waterfall.png")
        draw_gains(findings, out / "gains.png")
        print(f"picture: {out / 'waterfall.png'}\npicture: {out / 'gains.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
