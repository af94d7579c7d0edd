"""Frames for 248 classes on 64 features: a code, one that follows a tree, and those that the backbone has found itself.

    python examples/narrow_heads/narrow_heads.py OUT     # needs the extra [demo]

The recipe is run.sh's, with several seeds. The tree is that of the classes' names: those that begin with the same word
are siblings. It goes on where it was stopped; OUT/narrow_heads.json has every run, OUT/report.md the table.
"""

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import in_memory
import study

from timm_etf.atomic import write_json, write_text
from timm_etf.data import build_targets
from timm_etf.report.statistics import t_interval

RECIPE = (
    "--img-size 40 --in-chans 1 --mean 0.5 --std 0.5 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 "
    "--warmup-epochs 2 --batch-size 64 --lr 0.2 --weight-decay 5e-4 --workers 0 --checkpoint-hist 1"
)

ARMS = {
    "learned": ("resnet10t", ""),
    "spherical code": ("resnet10t_etf", ""),
    "simplex behind mlp": ("resnet10t_etf", "projector=mlp"),
    "tree of names": ("resnet10t_etf", "--hierarchy TREE"),
    "tree of names, gram loss": ("resnet10t_etf", "--hierarchy TREE --loss gram"),
    "from means, early": ("resnet10t_etf", "--frame-from-means 3"),
    "from means, halfway": ("resnet10t_etf", "--frame-from-means 7"),
    "from means, late": ("resnet10t_etf", "--frame-from-means 11"),
}
"""Model, and classifier arguments or options; the first is what the others are compared with."""


class Narrow:
    """The trainings, in the form that `study.run` runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.data = self.out / "data" / "pictograms"
        self.tree = self.out / "tree.tsv"

    def prepare(self) -> None:
        """Draw the images, and write the tree of their classes' names."""
        if not self.data.exists():
            build_targets(self.out / "data")
        names = sorted(p.name for p in (self.data / "train").iterdir())
        alike = Counter(name.split("-")[0] for name in names)
        lines = [f"{name}\t{word if alike[word := name.split('-')[0]] > 1 else ''}" for name in names]
        write_text(self.tree, "\n".join(lines) + "\n")

    @property
    def images(self) -> int:
        """Training images."""
        return sum(1 for _ in (self.data / "train").rglob("*.png"))

    def jobs(self) -> list[study.Job]:
        """The first seed of every arm before the second."""
        arms = self.options.arms or ARMS
        return [self._training(arm, seed) for seed in range(self.options.seeds) for arm in arms]

    def folder(self, arm: str, seed: int) -> Path:
        """Where a run is."""
        return self.out / "train" / f"{arm.replace(', ', '+').replace(' ', '_')}-{seed}"

    def _training(self, arm: str, seed: int) -> study.Job:
        (model, more), out = ARMS[arm], self.folder(arm, seed)
        words = more.replace("TREE", str(self.tree)).split()
        head = [word for word in words if not more.startswith("--")]
        options = [word for word in words if more.startswith("--")]
        command = ["pretrain", "--model", model, "--data-dir", self.data, "--out", out, *RECIPE.split(), *options]
        command += ["--epochs", self.options.epochs, "--seed", seed]
        command += ["--model-kwargs", "channels=(32, 64, 128, 64)", "stem_width=16", *head, *self.options.pretrain]
        if (out / "run.json").exists():
            command.append("--resume")
        return study.Job([str(c) for c in command], out)

    def after(self, job: study.Job) -> list[study.Job]:
        """Nothing follows a training."""
        return []

    def runs(self) -> dict[str, dict[str, Any]]:
        """What there is of each arm, by seed."""
        found: dict[str, dict[str, Any]] = {}
        for arm in ARMS:
            files = {seed: self.folder(arm, seed) / "results.json" for seed in range(self.options.seeds)}
            found[arm] = {str(s): json.loads(f.read_text())["source"] for s, f in files.items() if f.exists()}
        return found

    def write_results(self) -> None:
        """Everything that is there."""
        settings = {"recipe": RECIPE, "epochs": self.options.epochs, "arms": ARMS}
        write_json(self.out / "narrow_heads.json", {"settings": settings, "runs": self.runs()})


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Top-1 and top-5 by arm, with the difference from the first by paired seeds and its 95 % t interval."""
    first = next(iter(runs.values()))
    lines = ["| arm | trainings | top-1 % | less the first | top-5 % |", "|---|---|---|---|---|"]
    for arm, by_seed in runs.items():
        if not by_seed:
            continue
        apart = [run["top1"] - first[s]["top1"] for s, run in by_seed.items() if s in first and by_seed is not first]
        interval = t_interval(apart)
        shown = f"{mean(apart):+.1f}" if apart else "-"
        shown += f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else ""
        top1, top5 = (mean(run[k] for run in by_seed.values()) for k in ("top1", "top5"))
        lines.append(f"| {arm} | {len(by_seed)} | {top1:.1f} | {shown} | {top5:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="ARM", help="these arms only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--rate", type=float, default=900, help="images/s of all trainings, for the estimate")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing else than draw the images")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    narrow = Narrow(options)
    narrow.prepare()
    jobs = narrow.jobs()
    hours = len(jobs) * options.epochs * narrow.images / options.rate / 3600
    print(
        f"{len(jobs)} trainings of {narrow.images} images, {options.epochs} epochs: about {hours:.1f} hours", flush=True
    )
    if options.plan:
        return
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    start = (options.out / "decoded", threads)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), in_memory.start, start) as pool:
        study.run(jobs, narrow, pool)
    narrow.write_results()
    told = f"# 248 classes on 64 features\n\n{table(narrow.runs())}\n\nDifferences: 95 % t over seeds.\n"
    write_text(options.out / "report.md", told)
    print(f"{told}\nreport:  {options.out / 'report.md'}\nresults: {options.out / 'narrow_heads.json'}")


if __name__ == "__main__":
    main()
