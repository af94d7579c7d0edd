"""Tables and the picture of class_trees.py's results: `python examples/class_trees/mistakes.py OUT`."""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from timm_etf.atomic import write_text
from timm_etf.report.statistics import t_interval
from timm_etf.report.style import COLOURS, save

LEARNED, CONTROL = "learned", "learned, coarse heads"
DECIDED = {"": "largest logit", "crm_": "least cost"}
"""By what of a classifier a class is decided: the prefix of its measures."""
MISTAKES = {"severity": "severity", "hd1": "HD@1", "hd5": "HD@5", "hd20": "HD@20"}
FEATURES = {"mahp": "mAHP@250", "siblings": "siblings", "nearest_mean": "nearest class mean"}
HALVES = {"seen": "seen classes", "held-out": "held-out classes"}


class Source:
    """What there is of one source of images: measures by arm, seed and half of the classes."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.arms = {name: of["runs"] for name, of in told["arms"].items()}
        self.tuned = {name: of["tuned"] for name, of in told["arms"].items()}

    def values(self, arm: str, half: str, measure: str) -> dict[str, float]:
        """A measure by seed, wherever it is there."""
        runs = self.arms.get(arm, {})
        return {seed: run[half][measure] for seed, run in runs.items() if measure in run.get(half, {})}

    def less(
        self, arm: str, than: str, half: str, measure: str, of: str = "", *, relative: bool = False
    ) -> list[float]:
        """Differences of the trainings that both have, `relative` to the other's, in percent.

        Args:
            arm: The one.
            than: The other.
            half: Half of the classes.
            measure: The arm's.
            of: The other's, by default the same.
            relative: Whether to divide by the other's.
        """
        ours, theirs = self.values(arm, half, measure), self.values(than, half, of or measure)
        both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        return [100 * (a - b) / (b if relative else 1) for a, b in both]

    def mistakes(self) -> list[str]:
        """Seen classes: how often a classifier is right, and how far off it is."""
        lines = [f"| arm | decided by | top-1 % | {' | '.join(MISTAKES.values())} |", "|---" * 7 + "|"]
        for arm in self.arms:
            for prefix, decided in DECIDED.items():
                cells = [shown([100 * v for v in self.values(arm, "seen", f"{prefix}top1").values()])]
                cells += [shown(self.values(arm, "seen", prefix + m).values(), ".3f") for m in MISTAKES]
                lines.append(f"| {arm} | {decided} | {' | '.join(cells)} |")
        return lines

    def less_learned(self) -> list[str]:
        """Fixed arms' mistakes less those of the learned ones, by either decision: top-1 in points, all else in %."""
        names = ["top-1, points", *(f"{name}, %" for name in MISTAKES.values())]
        lines = [f"| arm, decided by | less | {' | '.join(names)} |", "|---" * 7 + "|"]
        both = [(arm, prefix) for arm in self.arms for prefix in DECIDED]
        for than, by in (pair for pair in both if pair[0] in (LEARNED, CONTROL)):
            for arm, prefix in both:
                if (arm, prefix) == (than, by) or (arm in (LEARNED, CONTROL) and (than, by) != (LEARNED, "")):
                    continue
                top1 = self.less(arm, than, "seen", f"{prefix}top1", f"{by}top1")
                cells = [interval(top1)]
                for m in MISTAKES:
                    cells.append(interval(self.less(arm, than, "seen", prefix + m, by + m, relative=True)))
                lines.append(f"| {arm}, {DECIDED[prefix]} | {than}, {DECIDED[by]} | {' | '.join(cells)} |")
        return lines

    def features(self, half: str) -> list[str]:
        """How well the neighbours of features follow the tree, in percent."""
        columns = [c for t in FEATURES.values() for c in (t, "less learned", "less coarse heads")]
        lines = [f"| arm | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for arm in self.arms:
            cells = []
            for measure in FEATURES:
                cells.append(shown([100 * v for v in self.values(arm, half, measure).values()]))
                cells += [interval(self.less(arm, than, half, measure)) for than in (LEARNED, CONTROL)]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        return lines

    def tuning(self) -> list[str]:
        """Top-1 on the training images that were held back."""
        grid = list(dict.fromkeys(at for by in self.tuned.values() for at in by))
        lines = [f"| arm | {' | '.join(grid)} |", "|---" * (1 + len(grid)) + "|"]
        for arm, by in self.tuned.items():
            cells = [f"{by[at]:.1f}" if by.get(at, -1) >= 0 else "-" for at in grid]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        return lines


def shown(values: Any, digits: str = ".1f") -> str:
    """A mean."""
    return f"{mean(values):{digits}}" if values else "-"


def interval(apart: list[float]) -> str:
    """A mean difference with its 95 % t interval; none of an arm from itself."""
    if not any(apart):
        return "-"
    ends = t_interval(apart)
    return f"{mean(apart):+.1f}" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else "")


def report(found: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# Class trees",
        "",
        "Means over trainings; differences are those of the trainings with the same seed, with 95 % t intervals.",
    ]
    lines += ["Images are of unseen styles, distances heights in the tree, and a decision of least cost is CRM's."]
    for name, told in found.items():
        source = Source(told)
        trained = ", ".join(f"{arm} {len(runs)}" for arm, runs in source.arms.items())
        lines += ["", f"## {name}: mistakes on seen classes", "", f"Trainings: {trained}.", "", *source.mistakes()]
        lines += ["", *source.less_learned()]
        for half, title in HALVES.items():
            lines += ["", f"## {name}: features of {title}, %", "", *source.features(half)]
        lines += ["", f"## {name}: top-1 of training images held back, by batch and rate, a third of the passes", ""]
        lines += source.tuning()
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Top-1 beside HD@5: every training, as its logits decide and, at the arrow's end, as the least cost does."""
    figure: Any = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
    for axis, (name, told) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        source = Source(told)
        for arm, colour in zip(source.arms, COLOURS, strict=False):
            x, y, to_x, to_y = (
                [scale * v for v in source.values(arm, "seen", measure).values()]
                for measure, scale in (("top1", 100), ("hd5", 1), ("crm_top1", 100), ("crm_hd5", 1))
            )
            axis.scatter(x, y, s=28, color=colour, label=arm, zorder=3)
            for start, end in zip(zip(x, y, strict=True), zip(to_x, to_y, strict=True), strict=True):
                axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.9})
            axis.scatter(to_x, to_y, s=10, color=colour)
        axis.set_title(f"{name}, seen classes in unseen styles", fontsize=9)
        axis.set_xlabel("top-1 (%)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
    figure.axes[0].set_ylabel("HD@5, mean distance of the five first choices", fontsize=9)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    figure.suptitle("dots: by the largest logit; arrows to: by the least expected cost", fontsize=8)
    save(figure, path)


def main(out: Path) -> None:
    """Write both."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))["sources"]
    write_text(out / "report.md", report(found))
    draw(found, out / "mistakes.png")
    print(f"report:  {out / 'report.md'}\npicture: {out / 'mistakes.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
