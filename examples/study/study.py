"""Which loss, head and projector make a backbone transfer: every arm tuned, trained with several seeds, and compared.

    python examples/study/study.py OUT --data-root DATA      # DATA as `timm-etf data build offline` fills it

Three rounds, each of which continues where it was stopped: every arm is tuned, with a third of the epochs and one seed,
over the same grid of batches and learning rates by its accuracy on the source's validation images alone; trained with
what it does best with, seed by seed; and measured on the targets. OUT/results.json holds all of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_etf.atomic import write_json

CHOICE = ("icons-novel", "armenian", "animal-mnist", "mnist-5k")
"""Targets that arms may be chosen by."""
HEADLINE = ("kanji", "hiragana", "emoji-subcategory", "emoji-identity", "fashion-mnist")
"""Targets that nothing was chosen by."""

GRID = ((64, 0.1), (64, 0.2), (128, 0.2), (128, 0.4), (512, 0.4))
"""Batch and learning rate; results.json says with which a study was made."""

COMMON = (
    "--img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 --warmup-epochs 1 --weight-decay 5e-4"
).split()

PROJECTOR, LEARNED, GAUSSIAN = "projector=mlp", "frame=learned", "frame=gaussian"


@dataclass(frozen=True)
class Arm:
    """A way to pretrain."""

    loss: str = "cross_entropy"
    head: tuple[str, ...] | None = ()
    """Arguments of the variant's classifier; None for the plain architecture."""
    more: tuple[str, ...] = ()
    whitened: bool = False

    def options(self, family: str) -> list[str]:
        """Options of `timm-etf pretrain`."""
        model = family + ("_sw" if self.whitened else "") + ("" if self.head is None else "_etf")
        kwargs = ["--model-kwargs", *self.head] if self.head else []
        return ["--model", model, "--loss", self.loss, *kwargs, *self.more]


ARMS = {
    "learned, CE": Arm(head=None),
    "learned, CE, projector": Arm(head=(LEARNED, PROJECTOR)),
    "simplex, CE": Arm(),
    "simplex, CE, projector": Arm(head=(PROJECTOR,)),
    "learned, NONL, projector": Arm("nonl", (LEARNED, PROJECTOR)),
    "simplex, NONL, projector": Arm("nonl", (PROJECTOR,)),
    # beside the headline
    "whitened, CE": Arm(head=None, whitened=True),
    "simplex, NONL": Arm("nonl"),
    "learned, NONL": Arm("nonl", (LEARNED,)),
    "simplex, NTCE, projector": Arm("ntce", (PROJECTOR,)),
    "learned, NTCE, projector": Arm("ntce", (LEARNED, PROJECTOR)),
    "simplex, NormFace, projector": Arm("normface", (PROJECTOR,)),
    "learned, NormFace, projector": Arm("normface", (LEARNED, PROJECTOR)),
    "simplex, CE, scale 4": Arm(head=("logit_scale=4",)),
    "simplex, CE, entropy": Arm(more=("--feature-entropy", "0.05")),
    "gaussian, CE, projector": Arm(head=(GAUSSIAN, PROJECTOR)),
    "gaussian, NONL, projector": Arm("nonl", (GAUSSIAN, PROJECTOR)),
    "simplex, dot regression": Arm("dot_regression", ("feature_norm=yes",)),
    "simplex, dot regression, projector": Arm("dot_regression", ("feature_norm=yes", PROJECTOR)),
}
"""The first is what the others are compared with."""

HEADLINE_ARMS = 6
"""So many of them, from the first, are trained with all seeds."""


@dataclass(frozen=True)
class Job:
    """A command, and the file that is there once it has been run."""

    command: list[str]
    done: Path
    kind: str = "train"


class Study:
    """The jobs of a study, and what has come of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.arms = {name: arm for i, (name, arm) in enumerate(ARMS.items()) if i < HEADLINE_ARMS or options.all}

    def seeds(self, name: str) -> range:
        """Seeds of an arm: one beside the headline."""
        return range(self.options.seeds if list(ARMS).index(name) < HEADLINE_ARMS else 1)

    def folder(self, kind: str, name: str, *what: object) -> Path:
        """Where a run is."""
        return self.out / kind / "-".join(map(str, (name.replace(", ", "+").replace(" ", "_"), *what)))

    def tuning(self) -> list[Job]:
        """Every arm with everything in the grid."""
        return [
            self._training(self.folder("tune", name, batch, lr), arm, batch, lr, seed=0, repeats=1)
            for name, arm in self.arms.items()
            for batch, lr in GRID
        ]

    def training(self) -> list[Job]:
        """Every arm with what it does best with, the first seed of all before the second."""
        pairs = [(seed, name) for name in self.arms for seed in self.seeds(name)]
        jobs = []
        for seed, name in sorted(pairs, key=lambda pair: pair[0]):
            batch, lr = self.chosen(name)
            out = self.folder("train", name, seed)
            jobs.append(self._training(out, self.arms[name], batch, lr, seed=seed, repeats=3))
        return jobs

    def _training(self, out: Path, arm: Arm, batch: int, lr: float, seed: int, repeats: int) -> Job:
        options, data = self.options, self.options.data_root / "icons-400"
        command = ["pretrain", *arm.options(options.family), "--data-dir", data, "--out", out, *COMMON]
        command += ["--epochs", options.epochs, "--epoch-repeats", repeats, "--batch-size", batch, "--lr", lr]
        command += ["--seed", seed, "--workers", options.workers, "--checkpoint-hist", 1, *options.pretrain]
        if (out / "run.json").exists():
            command.append("--resume")
        return Job([str(c) for c in command], out / "results.json")

    def measuring(self, trained: Path) -> Job:
        """A trained backbone on the targets."""
        options, out = self.options, self.out / "transfer" / trained.name
        command = ["transfer", "--models", f"{trained.name}=local-dir:{trained / 'export'}", "--out", out]
        command += ["--data-root", options.data_root, "--targets", *options.targets]
        command += ["--protocols", *options.protocols, "--seeds", 1, "--workers", options.workers]
        return Job([str(c) for c in command], out / "results.json", "measure")

    def tuned(self, name: str) -> dict[str, float | None]:
        """Source accuracy of an arm by what is in the grid; None where it diverged."""
        found = {}
        for batch, lr in GRID:
            file = self.folder("tune", name, batch, lr) / "results.json"
            found[f"batch {batch}, lr {lr}"] = _read(file)["source"]["top1"] if file.exists() else None
        return found

    def chosen(self, name: str) -> tuple[int, float]:
        """Batch and learning rate with which an arm does best on the source."""
        accuracies = [-1.0 if top1 is None else top1 for top1 in self.tuned(name).values()]
        return GRID[accuracies.index(max(accuracies))]

    def write_results(self) -> None:
        """Everything that is there, as results.json."""
        arms = {}
        for name, arm in self.arms.items():
            runs: dict[str, Any] = {}
            for seed in self.seeds(name):
                trained = self.folder("train", name, seed)
                if (trained / "results.json").exists():
                    runs[str(seed)] = {"source": _read(trained / "results.json")["source"]}
                    measured = self.out / "transfer" / trained.name / "results.json"
                    if measured.exists():
                        runs[str(seed)]["transfer"] = _accuracies(_read(measured))
            batch, lr = self.chosen(name)
            chosen = {"batch_size": batch, "lr": lr}
            options = arm.options(self.options.family)
            arms[name] = {"options": options, "tuned": self.tuned(name), "chosen": chosen, "runs": runs}
        settings = {"family": self.options.family, "common": COMMON, "epochs": self.options.epochs, "grid": GRID}
        settings |= {"choice": CHOICE, "headline": HEADLINE}
        write_json(self.out / "results.json", {"settings": settings, "arms": arms})


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _accuracies(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy in percent by protocol and target, and its mean over them."""
    accuracies = {}
    for protocol, told in results["protocols"].items():
        found = {name: next(iter(of["models"].values()))["accuracy"] for name, of in told["targets"].items()}
        accuracies[protocol] = found | {"mean": sum(found.values()) / len(found)}
    return accuracies


def run(jobs: list[Job], study: Study) -> None:
    """Run jobs side by side; what is trained for good is measured; one that fails is told and left out."""
    slots = {"train": study.options.jobs, "measure": study.options.measures}
    waiting = deque(job for job in jobs if not job.done.exists())
    running: dict[subprocess.Popen[bytes], Job] = {}
    # Processes that share the cores must not each take all of them.
    threads = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // sum(slots.values())))}
    while waiting or running:
        for job in list(waiting):
            if sum(other.kind == job.kind for other in running.values()) < slots[job.kind]:
                waiting.remove(job)
                job.done.parent.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "timm_etf", *job.command]
                with job.done.parent.with_suffix(f"{job.done.parent.suffix}.log").open("ab") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=threads)
                running[process] = job
        for process in [p for p in running if p.poll() is not None]:
            job = running.pop(process)
            told = "" if process.returncode == 0 else f" failed, see {job.done.parent}.log"
            print(f"{time.strftime('%H:%M:%S')} {job.done.parent.relative_to(study.out)}{told}", flush=True)
            if job.done.exists() and job.done.parent.parent.name == "train":
                waiting.append(study.measuring(job.done.parent))
            study.write_results()
        time.sleep(0.2)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--family", default="resnet10t")
    parser.add_argument("--all", action="store_true", help="the arms beside the headline's, too, with one seed")
    parser.add_argument("--seeds", type=int, default=5, help="of the headline's arms")
    parser.add_argument("--epochs", type=int, default=4, help="of three passes each; a third of them to tune")
    parser.add_argument("--targets", nargs="*", default=[*CHOICE, *HEADLINE])
    parser.add_argument("--protocols", nargs="*", default=["probe", "knn", "fewshot"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--measures", type=int, default=1, help="measurements beside them")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each")
    parser.add_argument("--rate", type=float, default=350, help="images/s of all trainings, for the estimate")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    study = Study(options)
    tuning, runs = study.tuning(), sum(len(study.seeds(name)) for name in study.arms)
    images = options.epochs * (len(tuning) * (21_163 + 8_460 / 3) + runs * (3 * 21_163 + 8_460 / 3))
    hours = images / options.rate / 3600
    print(f"{len(study.arms)} arms: {len(tuning)} trainings to tune, {runs} to compare, about {hours:.1f} hours")
    run(tuning, study)
    trained = study.training()
    left = [study.measuring(job.done.parent) for job in trained if job.done.exists()]
    run([*trained, *left], study)
    study.write_results()
    print(f"results: {options.out / 'results.json'}\nnext:    python examples/study/report.py {options.out}")


if __name__ == "__main__":
    main()
