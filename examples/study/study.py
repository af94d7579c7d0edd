"""Which loss, head and projector make a backbone transfer: every arm tuned, trained with several seeds, and compared.

    python examples/study/study.py OUT --data-root DATA      # DATA as `timm-etf data build offline` fills it

Three rounds, each of which continues where it was stopped: every arm is tuned, with a third of the epochs and one seed,
over the same grid of batches and learning rates by its accuracy on the source's validation images alone; trained with
what it does best with, seed by seed; and measured on the targets. Of the arms beside the headline's the half that does
best on the source is measured, as it was tuned, on the targets that arms may be chosen by, and half of that is trained.
OUT/results.json holds all of it: what it has is not done again, though its backbones are gone.
"""

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import in_memory

from timm_etf.atomic import write_json

CHOICE = ("icons-novel", "armenian", "animal-mnist", "mnist-5k")
"""Targets that arms may be chosen by."""
HEADLINE = ("kanji", "hiragana", "emoji-subcategory", "emoji-identity")
"""Targets that nothing was chosen by."""
FROZEN = ("probe", "knn", "fewshot")
"""How features are measured."""


@dataclass(frozen=True)
class Family:
    """How an architecture is trained, and the grid of batches and learning rates that every arm is tuned over."""

    options: str
    grid: tuple[tuple[int, float], ...]


FAMILIES = {
    "resnet10t": Family("--weight-decay 5e-4", ((64, 0.1), (64, 0.2), (128, 0.2), (128, 0.4), (512, 0.4))),
    "convnext_atto": Family(
        "--opt adamw --opt-kwargs fused=True --weight-decay 0.05",
        ((64, 1e-3), (64, 2e-3), (128, 1e-3), (128, 2e-3), (128, 4e-3)),
    ),
}

COMMON = "--img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 --warmup-epochs 1"

PROJECTOR, LEARNED, GAUSSIAN = "projector=mlp", "frame=learned", "frame=gaussian"
UNSMOOTHED = ("--smoothing", "0")
"""Cross-entropy has label smoothing of 0.1 unless it is named so; losses of cosines have none."""


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
    "learned, CE, no smoothing": Arm(head=None, more=UNSMOOTHED),
    "learned, CE, no smoothing, projector": Arm(head=(LEARNED, PROJECTOR), more=UNSMOOTHED),
    "simplex, CE": Arm(),
    "simplex, CE, projector": Arm(head=(PROJECTOR,)),
    "simplex, CE, no smoothing, projector": Arm(head=(PROJECTOR,), more=UNSMOOTHED),
    "learned, NTCE, projector": Arm("ntce", (LEARNED, PROJECTOR)),
    "simplex, NTCE, projector": Arm("ntce", (PROJECTOR,)),
    "learned, NONL, projector": Arm("nonl", (LEARNED, PROJECTOR)),
    "simplex, NONL, projector": Arm("nonl", (PROJECTOR,)),
    "whitened, CE": Arm(head=None, whitened=True),
    # beside the headline
    "simplex, NONL": Arm("nonl"),
    "learned, NONL": Arm("nonl", (LEARNED,)),
    "simplex, NONL 0.05, projector": Arm("nonl", (PROJECTOR,), ("--temperature", "0.05")),
    "simplex, NONL 0.2, projector": Arm("nonl", (PROJECTOR,), ("--temperature", "0.2")),
    "simplex, NormFace, projector": Arm("normface", (PROJECTOR,)),
    "learned, NormFace, projector": Arm("normface", (LEARNED, PROJECTOR)),
    "simplex, CE, scale 4": Arm(head=("logit_scale=4",)),
    "simplex, CE, entropy": Arm(more=("--feature-entropy", "0.05")),
    "gaussian, CE, projector": Arm(head=(GAUSSIAN, PROJECTOR)),
    "gaussian, NONL, projector": Arm("nonl", (GAUSSIAN, PROJECTOR)),
    "simplex, dot regression": Arm("dot_regression", ("feature_norm=yes",)),
    "simplex, dot regression, projector": Arm("dot_regression", ("feature_norm=yes", PROJECTOR)),
}
"""The first is what the others are compared with. Losses of cosines have a temperature of 0.1, or the one named."""

HEADLINE_ARMS = 12
"""So many of them, from the first, are trained with all seeds."""
OTHER_SEEDS = 3
"""Trainings of an arm beside them that is left after two halvings."""


@dataclass(frozen=True)
class Job:
    """A command of `timm-etf`, and the folder of what comes of it."""

    command: list[str]
    out: Path

    @property
    def done(self) -> bool:
        """Whether it has been run."""
        return (self.out / "results.json").exists()


class Study:
    """The jobs of a study, and what has come of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.family = options, options.out, FAMILIES[options.family]
        count = None if options.all else HEADLINE_ARMS
        self.arms = {name: ARMS[name] for name in options.arms or list(ARMS)[:count]}
        self.others = [name for name in self.arms if list(ARMS).index(name) >= HEADLINE_ARMS]
        self.known: dict[str, Any] = {}
        self.finetune_steps: int = options.finetune_steps
        if (file := self.out / "results.json").exists():
            told = _read(file)
            if (family := told["settings"]["family"]) != options.family:
                raise SystemExit(f"{file} is of {family}: give another OUT, or --family {family}")
            self.known = told["arms"]
            if not options.finetune:
                self.finetune_steps = told["settings"]["finetune_steps"]

    def seeds(self, name: str) -> list[int]:
        """Seeds of an arm that are yet to be trained or have been trained here."""
        count = self.options.seeds if name not in self.others else min(OTHER_SEEDS, self.options.seeds)
        measured = {int(seed) for seed, run in self.before(name, "runs").items() if run.get("transfer")}
        return [s for s in range(count) if s not in measured or self.trained(name, s).exists()]

    def before(self, name: str, what: str) -> dict[str, Any]:
        """What was known of an arm; nothing where another batch and learning rate are now its best."""
        known, (batch, lr) = self.known.get(name, {}), self.chosen(name)
        told: dict[str, Any] = known.get(what, {})
        return dict(told) if known.get("chosen") == {"batch_size": batch, "lr": lr} else {}

    def folder(self, kind: str, name: str, *what: object) -> Path:
        """Where a run is."""
        return self.out / kind / "-".join(map(str, (name.replace(", ", "+").replace(" ", "_"), *what)))

    def trained(self, name: str, seed: int) -> Path:
        """Where an arm's training is."""
        return self.folder("train", name, *self.chosen(name), seed)

    def tuning(self) -> list[Job]:
        """Every arm with everything in the grid that has no result."""
        return [
            self._training(self.folder("tune", name, batch, lr), arm, batch, lr, seed=0, repeats=1)
            for name, arm in self.arms.items()
            for (batch, lr), top1 in zip(self.family.grid, self.tuned(name).values(), strict=True)
            if top1 is None
        ]

    def screening(self) -> list[Job]:
        """Backbones, as they were tuned, of the better half of the arms beside the headline's."""
        best = halved(self.others, lambda name: max(top1 or 0 for top1 in self.tuned(name).values()))
        folders = [self.folder("tune", name, *self.chosen(name)) for name in best if not self.screened(name)]
        return [self._measuring("screen", folder, CHOICE, FROZEN) for folder in folders]

    def screened(self, name: str) -> dict[str, Any]:
        """Accuracies on the targets that arms may be chosen by, of an arm as it was tuned; none where not measured."""
        file = self.out / "screen" / self.folder("tune", name, *self.chosen(name)).name / "results.json"
        return _accuracies(_read(file)) if file.exists() else self.before(name, "screened")

    def left(self) -> list[str]:
        """Arms to train: the headline's, and half of those beside it that have been screened."""
        screened = {name: found for name in self.others if (found := self.screened(name))}
        best = halved([*screened], lambda name: mean(each["mean"] for each in screened[name].values()))
        return [name for name in self.arms if name not in self.others or name in best]

    def training(self) -> list[Job]:
        """Every arm with what it does best with, the first seed of all before the second."""
        pairs = [(seed, name) for name in self.left() for seed in self.seeds(name)]
        jobs = []
        for seed, name in sorted(pairs, key=lambda pair: pair[0]):
            batch, lr = self.chosen(name)
            out = self.trained(name, seed)
            jobs.append(self._training(out, self.arms[name], batch, lr, seed=seed, repeats=3))
        return jobs

    def plan(self) -> str:
        """What is to be done, and for how long."""
        lines = [f"to tune over (batch, rate) {', '.join(map(str, self.family.grid))}, then to train and measure:"]
        left = {}
        for name in self.arms:
            folders = [self.trained(name, seed) for seed in self.seeds(name)]
            left[name] = sum(not (folder / "results.json").exists() for folder in folders)
            lines.append(f"  {name}: {left[name]} seeds{' if it is left after two halvings' * (name in self.others)}")
        quarter = math.ceil(len(self.others) / 4)
        runs = sum(left[name] for name in left.keys() - self.others) + quarter * OTHER_SEEDS
        tune = sum(not job.done for job in self.tuning())
        # icons-400's images, and its validation images, of which inference takes a third of the time
        images = self.options.epochs * (tune * (21_163 + 8_460 / 3) + runs * (3 * 21_163 + 8_460 / 3))
        hours = images / self.options.rate / 3600
        lines.append(f"{tune} trainings to tune and {runs} to compare are left: {images:,.0f} images,")
        lines.append(f"about {hours:.1f} hours at {self.options.rate:.0f} images/s of all processes, and the measuring")
        return "\n".join(lines)

    def _training(self, out: Path, arm: Arm, batch: int, lr: float, seed: int, repeats: int) -> Job:
        options, data = self.options, self.options.data_root / "icons-400"
        command = ["pretrain", *arm.options(options.family), "--data-dir", data, "--out", out]
        command += [*COMMON.split(), *self.family.options.split(), "--batch-size", batch, "--lr", lr]
        command += ["--epochs", options.epochs, "--epoch-repeats", repeats, "--seed", seed]
        command += ["--workers", 0, "--checkpoint-hist", 1, *options.pretrain]
        if (out / "run.json").exists():
            command.append("--resume")
        return Job([str(c) for c in command], out)

    def after(self, job: Job) -> list[Job]:
        """What follows a job: a backbone is measured, and those of the first seeds are fine-tuned."""
        if job.out.parent.name != "train":
            return []
        options, seed = self.options, int(job.out.name.split("-")[-1])
        jobs = [self._measuring("transfer", job.out, options.targets, FROZEN)]
        if seed < options.finetune:
            steps = ["--finetune-steps", options.finetune_steps]
            jobs.append(self._measuring("finetune", job.out, HEADLINE, ["finetune", *steps]))
        return jobs

    def _measuring(self, kind: str, trained: Path, targets: Sequence[str], protocols: Sequence[Any]) -> Job:
        out = self.out / kind / trained.name
        command = ["transfer", "--models", f"{trained.name}=local-dir:{trained / 'export'}", "--out", out]
        command += ["--data-root", self.options.data_root, "--targets", *targets, "--protocols", *protocols]
        return Job([str(c) for c in [*command, "--seeds", 1, "--workers", 0]], out)

    def tuned(self, name: str) -> dict[str, float | None]:
        """Source accuracy of an arm by what is in the grid; None where it diverged or has not been tried."""
        found = {}
        known = self.known.get(name, {}).get("tuned", {})
        for batch, lr in self.family.grid:
            file, point = self.folder("tune", name, batch, lr) / "results.json", f"batch {batch}, lr {lr}"
            found[point] = _read(file)["source"]["top1"] if file.exists() else known.get(point)
        return found

    def chosen(self, name: str) -> tuple[int, float]:
        """Batch and learning rate with which an arm does best on the source."""
        accuracies = [-1.0 if top1 is None else top1 for top1 in self.tuned(name).values()]
        return self.family.grid[accuracies.index(max(accuracies))]

    def write_results(self) -> None:
        """Everything that is there, as results.json; arms and runs that it had before stay."""
        arms = dict(self.known)
        for name, arm in self.arms.items():
            runs = self.before(name, "runs")
            for seed in self.seeds(name):
                trained = self.trained(name, seed)
                if (trained / "results.json").exists():
                    runs[str(seed)] = {"source": _read(trained / "results.json")["source"]}
                    measured = [self.out / kind / trained.name / "results.json" for kind in ("transfer", "finetune")]
                    accuracies = [_accuracies(_read(path)) for path in measured if path.exists()]
                    runs[str(seed)]["transfer"] = {k: v for found in accuracies for k, v in found.items()}
                    if measured[1].exists():
                        runs[str(seed)]["finetune_rates"] = _rates(_read(measured[1]))
            batch, lr = self.chosen(name)
            told = {"options": arm.options(self.options.family), "tuned": self.tuned(name)}
            told |= {"chosen": {"batch_size": batch, "lr": lr}}
            if screened := self.screened(name):
                told["screened"] = screened
            arms[name] = told | {"runs": runs}
        arms = {name: arms[name] for name in ARMS if name in arms}
        asked = {"family": self.options.family, "epochs": self.options.epochs, "finetune_steps": self.finetune_steps}
        settings: dict[str, Any] = {**asked, "options": f"{COMMON} {self.family.options}", "grid": self.family.grid}
        settings |= {"choice": CHOICE, "headline": HEADLINE}
        write_json(self.out / "results.json", {"settings": settings, "arms": arms})


def halved(names: list[str], score: Callable[[str], float]) -> list[str]:
    """The better half."""
    return sorted(names, key=score, reverse=True)[: math.ceil(len(names) / 2)]


def _rates(told: dict[str, Any]) -> dict[str, float]:
    """Learning rate that a backbone was fine-tuned with, by target."""
    targets = told["protocols"]["finetune"]["targets"].items()
    return {target: label["chosen"][0][0]["lr"] for target, of in targets for label in of["models"].values()}


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


def run(jobs: list[Job], study: Study, pool: ProcessPoolExecutor) -> None:
    """Run jobs side by side, and at once what follows each; one that fails is told and left out."""
    waiting = deque(job for job in jobs if not job.done)
    waiting += [later for job in jobs if job.done for later in study.after(job) if not later.done]
    running: dict[Future[int], Job] = {}
    while waiting or running:
        while waiting and len(running) < study.options.jobs:
            job = waiting.popleft()
            running[pool.submit(in_memory.run, job.command, Path(f"{job.out}.log"))] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            told = "" if future.result() == 0 else f" failed, see {job.out}.log"
            print(f"{time.strftime('%H:%M:%S')} {job.out.relative_to(study.out)}{told}", flush=True)
            after = study.after(job) if job.done else []
            waiting.extendleft(after[:1])  # measured before another one is trained,
            waiting.extend(after[1:])  # and fine-tuned at the end
            study.write_results()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--family", default="resnet10t", choices=FAMILIES)
    parser.add_argument("--all", action="store_true", help="the arms beside the headline's, too")
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="ARM", help="these arms only")
    parser.add_argument("--seeds", type=int, default=5, help="of the headline's arms")
    parser.add_argument("--epochs", type=int, default=4, help="of three passes each; a third of them to tune")
    parser.add_argument("--targets", nargs="*", default=[*CHOICE, *HEADLINE])
    parser.add_argument("--finetune", type=int, default=3, help="seeds of which backbones are fine-tuned, too")
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--rate", type=float, default=400, help="images/s of all trainings, for the estimate")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing else")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    study = Study(options)
    print(study.plan(), flush=True)
    if options.plan:
        return
    # Processes that share the cores must not each take all of them.
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Started anew, not forked: a forked process cannot use the GPU.
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), in_memory.start, (options.out / "decoded", threads)
    ) as pool:
        for jobs in (study.tuning, study.screening, study.training):
            run(jobs(), study, pool)
    study.write_results()
    print(f"results: {options.out / 'results.json'}\nnext:    python examples/study/report.py {options.out}")


if __name__ == "__main__":
    main()
