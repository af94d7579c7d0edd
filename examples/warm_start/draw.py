"""Read the runs of run.sh, write results.json and draw them: python examples/warm_start/draw.py OUT."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from timm_etf.report.results import write
from timm_etf.report.statistics import t_interval

HEADS = {"nearest": "nearest simplex", "random": "random simplex", "learned": "its learned one"}
EPOCHS = (0, 1, 2, 4)


def main(out: Path) -> None:
    """Collect top-1 by epoch and seed."""
    found: dict[str, Any] = {}
    for head in HEADS:
        logs = [(out / f"{head}-{seed}" / "log.jsonl").read_text(encoding="utf-8").splitlines() for seed in range(3)]
        tops = [{line["epoch"]: line["top1"] for line in map(json.loads, log)} for log in logs]
        found[head] = {str(e): [top[e] for top in tops] for e in range(5)}
    base = [json.loads((out / f"base-{s}" / "results.json").read_text())["source"]["top1"] for s in range(3)]
    differences = {
        head: {
            str(e): {"mean": float(np.mean(d)), "interval": t_interval(d)}
            for e in EPOCHS
            if (d := [a - b for a, b in zip(found["nearest"][str(e)], found[head][str(e)], strict=True)])
        }
        for head in ("random", "learned")
    }
    means = {head: {e: float(np.mean(tops)) for e, tops in found[head].items()} for head in HEADS}
    write(out / "results.json", {"base": base, "top1": found, "mean_top1": means, "nearest_less": differences})
    figure: Any = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for marker, (head, name) in zip("os^", HEADS.items(), strict=True):
        values = np.array([found[head][str(e)] for e in range(5)])
        axis.plot(range(5), values.mean(1), marker=marker, label=name)
        axis.fill_between(range(5), values.min(1), values.max(1), alpha=0.2)
    axis.axhline(np.mean(base), color="grey", linestyle=":", label="before")
    axis.set(xlabel="epochs of tuning", ylabel="top-1 (%)", ylim=(0, 100), xticks=range(5))
    axis.legend(frameon=False, title="classifier")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(out / "warm_start.png", dpi=110)
    for head in HEADS:
        print(head, ", ".join(f"{e}: {np.mean(found[head][str(e)]):.1f}" for e in EPOCHS))
    print("next:  look at", out / "warm_start.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
