"""The paper's protocol: backbones under a learned, a whitened and a fixed classifier, before and after transfer.

    python examples/paper/paper.py OUT --scale small --data-root DATA           # DATA as of timm-etf data build offline
    python examples/paper/paper.py OUT --scale full --data-root DATA --data-dir IMAGENET --rate 2400
    python examples/paper/paper.py OUT ... --plan                               # what it would do, and for how long

Both scales run the same commands, each of which continues where it was stopped: pretraining, transfer with fine-tuning
(the paper's Table 1, here with groups near and far of the source, and differences over the distance), geometry of the
pretrained and the fine-tuned backbones on one target (Figure 3), random-feature regression (Figure 2). The paper leaves
open its targets, its recipe and the classifier of the target: what is chosen here is in SCALES.
"""

import argparse
import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from timm_etf.atomic import write_text

HEADS = {"learned": "", "SW": "_sw", "fixed": "_etf"}
"""The compared methods, and what their variants are called; the first is what the others are compared with."""


@dataclass(frozen=True)
class Scale:
    """What is trained on what, and measured where."""

    architectures: tuple[str, ...]
    seeds: int
    pretrain: str
    images: int
    """That a training takes, over all its epochs."""
    near: tuple[str, ...]
    far: tuple[str, ...]
    figure: str
    """The target of Figures 2 and 3."""
    transfer: str


SCALES = {
    "small": Scale(
        architectures=("resnet10t",),
        seeds=3,
        pretrain="--img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 --weight-decay 5e-4 "
        "--epochs 4 --epoch-repeats 3 --warmup-epochs 1 --batch-size 64 --lr 0.2 --checkpoint-hist 1",
        images=12 * 21_163,
        near=("icons-novel", "emoji-subcategory"),
        far=("kanji", "armenian", "mnist-5k"),
        figure="kanji",
        transfer="--finetune-steps 100",
    ),
    "full": Scale(
        architectures=("resnet50", "resnet101"),
        seeds=3,
        pretrain=f"--config {Path(__file__).parents[1] / 'imagenet' / 'classic.yaml'} --amp bf16",
        images=100 * 1_281_167,
        near=("pets", "cub", "caltech101"),
        far=("cars", "aircraft", "flowers102", "dtd", "eurosat"),
        figure="flowers102",
        transfer="--finetune-steps 5000 --precision bf16",
    ),
}


@dataclass(frozen=True)
class Job:
    """A command of timm-etf, and the folder of what comes of it."""

    arguments: list[str]
    out: Path

    @property
    def done(self) -> bool:
        """Whether it has been run."""
        return (self.out / "results.json").exists()


class Paper:
    """The commands, in their order."""

    def __init__(self, out: Path, scale: Scale, options: argparse.Namespace) -> None:
        self.out, self.scale, self.options = out, scale, options
        self.source = str(options.data_dir or options.data_root / "icons-400")

    def run_of(self, architecture: str, head: str, seed: int) -> Path:
        """Folder of a pretraining."""
        return self.out / "pretrain" / f"{architecture}-{head}-{seed}"

    def jobs(self) -> list[Job]:
        """Everything that is to be run."""
        scale, found = self.scale, []
        for architecture, seed, (head, suffix) in product(scale.architectures, range(scale.seeds), HEADS.items()):
            out = self.run_of(architecture, head, seed)
            command = ["pretrain", *shlex.split(scale.pretrain), "--model", architecture + suffix]
            command += ["--data-dir", self.source, "--seed", str(seed), *self.options.pretrain]
            found.append(Job([*command, *(["--resume"] if (out / "run.json").exists() else [])], out))
        for architecture in scale.architectures:
            found += self._measuring(architecture)
        return found

    def _measuring(self, architecture: str) -> list[Job]:
        scale, options = self.scale, self.options
        trained = [(h, s, self.run_of(architecture, h, s)) for h in HEADS for s in range(scale.seeds)]
        models = [f"{head}={run}" for head, _, run in trained]
        shared = ["--data-root", str(options.data_root), "--workers", str(options.workers)]
        targets = [f"{t},group={group}" for group in ("near", "far") for t in getattr(scale, group)]
        transfer = self.out / "transfer" / architecture
        command = ["transfer", "--models", *models, "--targets", *targets, "--protocols", "finetune", "probe", "knn"]
        command += ["--seeds", "1", "--keep-models", "--source", self.source, *shlex.split(scale.transfer)]
        tuned = [f"{h} tuned={transfer}/models/{h}/{s}/{scale.figure}/seed0" for h, s, _ in trained]
        figure = ["--data", scale.figure]
        return [
            Job([*command, *shared], transfer),
            Job(["geometry", "--models", *models, *tuned, *figure, *shared], self.out / "figure3" / architecture),
            Job(["random-features", "--models", *models, *figure, *shared], self.out / "figure2" / architecture),
        ]

    def plan(self) -> str:
        """What is left to do, and about how long it takes."""
        scale, jobs = self.scale, self.jobs()
        trainings = [job for job in jobs if job.arguments[0] == "pretrain"]
        left = sum(not job.done for job in trainings)
        tunings = len(trainings) * len(scale.near + scale.far) * 6
        steps = int(scale.transfer.split("--finetune-steps ")[1].split()[0])
        hours = [left * scale.images / self.options.rate / 3600, tunings * steps * 64 / self.options.rate / 3600]
        return (
            f"{len(trainings)} trainings of {scale.images / 1e6:.2f} million images, {left} of them left: "
            f"{hours[0]:.1f} hours at {self.options.rate:g} images/s\n"
            f"{tunings} fine-tunings of {steps} steps on {len(scale.near + scale.far)} targets: {hours[1]:.1f} hours\n"
            f"disk: about {len(trainings) * (1 + len(scale.near + scale.far)) * 0.1 + 1:.0f} GB of weights and features"
        )

    def table(self) -> str:
        """Fine-tuned accuracy of each method on each target, as in the paper's Table 1, and means of both groups."""
        lines = ["# Transfer learning, classifier of the target learned", ""]
        for architecture in self.scale.architectures:
            told = json.loads((self.out / "transfer" / architecture / "results.json").read_text(encoding="utf-8"))
            accuracies = {
                target: {head: found["models"][head]["accuracy"] for head in HEADS if head in found["models"]}
                for target, found in told["protocols"]["finetune"]["targets"].items()
            }
            lines += [f"| {architecture} | {' | '.join(HEADS)} |", f"|{'---|' * (1 + len(HEADS))}"]
            rows = {t: accuracies[t] for t in self.scale.near + self.scale.far if t in accuracies}
            for group in ("near", "far"):
                there = [t for t in getattr(self.scale, group) if t in accuracies]
                if there:
                    rows[f"**mean of {group}**"] = {h: mean(accuracies[t][h] for t in there) for h in HEADS}
            lines += [f"| {name} | {' | '.join(f'{row[h]:.1f}' for h in HEADS)} |" for name, row in rows.items()]
            lines += ["", f"Intervals and distances: [report](transfer/{architecture}/report.md).", ""]
        return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--data-root", type=Path, required=True, help="of the targets")
    parser.add_argument("--data-dir", type=Path, help="the source; by default DATA_ROOT/icons-400")
    parser.add_argument("--rate", type=float, default=400, help="images/s of a training, for the plan")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="print what is left to do, and stop")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    if options.scale == "full" and not options.data_dir:
        parser.error("--scale full pretrains on ImageNet: give its folder with --data-dir")
    paper = Paper(options.out, SCALES[options.scale], options)
    print(paper.plan(), flush=True)
    if options.plan:
        return
    program = shlex.split(os.environ.get("TIMM_ETF", "timm-etf"))
    for job in paper.jobs():
        if not job.done:
            job.out.parent.mkdir(parents=True, exist_ok=True)
            print("\n$ timm-etf", shlex.join(job.arguments), flush=True)
            subprocess.run([*program, *job.arguments, "--out", str(job.out)], check=True)
    write_text(options.out / "table1.md", paper.table())
    print(f"table:    {options.out / 'table1.md'}\npictures: {options.out}/figure2, figure3, transfer/*/distance.png")


if __name__ == "__main__":
    main()
