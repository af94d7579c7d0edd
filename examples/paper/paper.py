"""The paper's protocol: backbones under a learned, a whitened and a fixed classifier, before and after transfer.

    python examples/paper/paper.py OUT --scale small --data-root DATA           # DATA as of timm-etf data build offline
    python examples/paper/paper.py OUT --scale full --data-root DATA --data-dir IMAGENET --processes 8 --rate 2400
    python examples/paper/paper.py OUT ... --plan                               # what it would do, and for how long

Both scales run the same commands in three stages, and go on where they were stopped: pretraining; transfer with
fine-tuning under every classifier of the target (the paper's Table 1, with groups near and far of the source, and
differences over the distance); geometry of the pretrained and the fine-tuned backbones on one target (Figure 3) and
random-feature regression (Figure 2). findings.py reads what comes of them. The paper leaves open its targets, its
recipe and the classifier of the target: what is chosen here is in SCALES.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import findings

from timm_etf.data.images import find_targets
from timm_etf.errors import UsageError
from timm_etf.transfer.fine_tuning import FIRST_RATES

HEADS = {"learned": "", "SW": "_sw", "fixed": "_etf"}
"""The compared methods, and what their variants are called; the first is what the others are compared with."""

TARGET_HEADS = ("learned", "etf", "nearest")
"""Classifiers of the target. Models that are fine-tuned under the first are kept for Figure 3."""

TUNINGS = 1 + len(FIRST_RATES)
"""Trainings of a fine-tuning at least: one with every first learning rate, and the best again."""


SOURCE_IMAGES = 2500
"""Four fifths are as many as a distance takes; all of the source's would be read anew for every model."""


@dataclass(frozen=True)
class Scale:
    """What is trained on what, and measured where."""

    weights: dict[str, int]
    """Megabytes of the weights, by architecture."""
    seeds: int
    pretrain: str
    batch: int
    """Images of a step, on all processes together."""
    images: int
    """That a training takes, over all its epochs."""
    near: tuple[str, ...]
    far: tuple[str, ...]
    figure: str
    """The target of Figures 2 and 3."""
    steps: int
    """Of a fine-tuning, of 64 images each."""
    neutral: str
    """A network that was trained neither on the source nor on a target, as far as that can be had: tells distances."""
    measure: str = ""
    """Further options of transfer."""
    heads_on: tuple[str, ...] = ()
    """Targets on which their classifiers are compared; by default all."""

    def targets(self, target_head: str = TARGET_HEADS[0]) -> list[str]:
        """That a classifier of the target is tuned on, with their groups, as transfer takes them."""
        every = [(t, group) for group in ("near", "far") for t in getattr(self, group)]
        some = self.heads_on if target_head != TARGET_HEADS[0] else ()
        return [f"{target},group={group}" for target, group in every if not some or target in some]


SCALES = {
    "small": Scale(
        weights={"resnet10t": 14},
        seeds=3,
        # As in examples/transfer, and half as long again.
        pretrain="--model-kwargs 'channels=(32, 64, 128, 512)' stem_width=16 --img-size 40 --crop-pct 1.0 "
        "--scale 0.6 1.0 --hflip 0 --color-jitter 0 --weight-decay 5e-4 --epochs 4 --epoch-repeats 3 --warmup-epochs 1 "
        "--lr 0.2 --checkpoint-hist 1",
        batch=64,
        images=12 * 21_163,
        near=("icons-novel", "emoji-subcategory"),
        far=("kanji", "armenian", "mnist-5k"),
        figure="kanji",
        steps=100,
        neutral="resnet10t,pretrained=False,channels=(32, 64, 128, 512),stem_width=16,"
        "pretrained_cfg_overlay={'input_size': (3, 40, 40), 'crop_pct': 1.0}",
        heads_on=("emoji-subcategory", "kanji"),
    ),
    "full": Scale(
        weights={"resnet50": 102, "resnet101": 178},
        seeds=3,
        pretrain=f"--config {Path(__file__).parents[1] / 'imagenet' / 'classic.yaml'} --amp bf16",
        batch=256,
        images=100 * 1_281_167,
        near=("pets", "cub", "caltech101"),
        far=("cars", "aircraft", "flowers102", "dtd", "eurosat"),
        figure="flowers102",
        steps=5000,
        neutral="resnet18,pretrained=False",
        measure="--precision bf16",
    ),
}


@dataclass(frozen=True)
class Job:
    """A command of timm-etf, and the folder of what comes of it."""

    arguments: list[str]
    out: Path

    @property
    def done(self) -> bool:
        """Whether it has been run, and nothing failed in it: what did is tried again."""
        file = self.out / "results.json"
        return file.exists() and not json.loads(file.read_text(encoding="utf-8")).get("missing")

    @property
    def command(self) -> list[str]:
        """The whole of it; a pretraining that was stopped is resumed, and the other verbs do so by themselves."""
        stopped = self.arguments[0] == "pretrain" and (self.out / "run.json").exists()
        return [*self.arguments, "--out", str(self.out), *(["--resume"] if stopped else [])]


class Paper:
    """The commands, stage by stage."""

    def __init__(self, out: Path, scale: Scale, options: argparse.Namespace) -> None:
        self.out, self.scale, self.options = out, scale, options
        self.source = Path(options.data_dir or options.data_root / "icons-400")

    def check(self) -> None:
        """Refuse what would be missing only after hours of training."""
        if not (self.source / "train").is_dir():
            raise UsageError(
                f"No folder {self.source}/train: --data-dir names the source (timm-etf data build offline)."
            )
        _, missing = find_targets(self.scale.targets(), self.options.data_root)
        if missing:
            raise UsageError("; ".join(f"{target} is {reason}" for target, reason in missing.items()))

    def run_of(self, architecture: str, head: str, seed: int) -> Path:
        """Folder of a pretraining."""
        return self.out / "pretrain" / f"{architecture}-{head}-{seed}"

    @property
    def stages(self) -> dict[str, list[Job]]:
        """Everything that is to be run; a stage rests on those before it."""
        return {"pretraining": self._trainings(), "transfer": self._transfers(), "figures": self._figures()}

    def _trainings(self) -> list[Job]:
        scale, options = self.scale, self.options
        batch = ["--batch-size", str(scale.batch // options.processes)]
        shared = [*shlex.split(scale.pretrain), *batch, "--data-dir", str(self.source)]
        return [
            Job(
                ["pretrain", *shared, "--model", architecture + suffix, "--seed", str(seed), *options.pretrain],
                self.run_of(architecture, head, seed),
            )
            for architecture, seed, (head, suffix) in product(scale.weights, range(scale.seeds), HEADS.items())
        ]

    def _transfers(self) -> list[Job]:
        found, scale = [], self.scale
        for architecture, target_head in product(scale.weights, self.options.target_heads):
            command = ["transfer", *self._measured(architecture), "--targets", *scale.targets(target_head)]
            command += ["--seeds", "1", "--finetune-steps", str(scale.steps), "--finetune-head", target_head]
            out = self.out / f"heads/{target_head}" / architecture
            if target_head == TARGET_HEADS[0]:
                command += ["--keep-models", "--source", f"{self.source},train_images={SOURCE_IMAGES}"]
                command += ["--neutral", scale.neutral]
                out = self.out / "transfer" / architecture
            protocols = ["finetune", "probe", "knn"] if target_head == TARGET_HEADS[0] else ["finetune"]
            found.append(Job([*command, *shlex.split(scale.measure), "--protocols", *protocols], out))
        return found

    def _figures(self) -> list[Job]:
        found, figure = [], ["--data", self.scale.figure]
        for architecture in self.scale.weights:
            kept = self.out / "transfer" / architecture / "models"
            tuned = [
                f"{head} tuned={kept}/{head}/{seed}/{self.scale.figure}/seed0"
                for head, seed in product(HEADS, range(self.scale.seeds))
            ]
            both = [*self._measured(architecture, *tuned), *figure, "--picture-of", "test"]
            found += [
                Job(["geometry", *both], self.out / "figure3" / architecture),
                Job(["random-features", *self._measured(architecture), *figure], self.out / "figure2" / architecture),
            ]
        return found

    def _measured(self, architecture: str, *more: str) -> list[str]:
        """Options of every measuring verb: the pretrained models, and more."""
        models = [f"{h}={self.run_of(architecture, h, s)}" for h in HEADS for s in range(self.scale.seeds)]
        options = self.options
        return ["--models", *models, *more, "--data-root", str(options.data_root), "--workers", str(options.workers)]

    def plan(self) -> str:
        """What is left to do, and about how long it takes."""
        scale, stages = self.scale, self.stages
        lines, total = [], 0.0
        for architecture, megabytes in scale.weights.items():
            trainings = [job for job in stages["pretraining"] if job.out.name.startswith(f"{architecture}-")]
            transfers = [job for job in stages["transfer"] if job.out.name == architecture]
            rate, how = self._rate(trainings)
            left = sum(not job.done for job in trainings)
            by_head = zip(self.options.target_heads, transfers, strict=True)
            measuring = [scale.targets(head) for head, job in by_head if not job.done]
            tunings = len(trainings) * TUNINGS * sum(map(len, measuring))
            hours = [n / rate / 3600 for n in (left * scale.images, tunings * scale.steps * 64)]
            total += sum(hours)
            disk = len(trainings) * megabytes * (4 + len(scale.targets())) / 1000
            lines += [
                f"{architecture}, {how}:",
                f"  {len(trainings)} trainings of {scale.images / 1e6:.2f} million images, "
                f"{len(trainings) - left} of them there: {hours[0]:.1f} hours",
                f"  {len(transfers)} classifiers of the targets, {len(transfers) - len(measuring)} of them there, "
                f"at least {tunings} fine-tunings of {scale.steps} steps left: {hours[1]:.1f} hours",
                f"  about {disk:.1f} GB of weights, and the targets' features",
            ]
        processes = self.options.processes
        lines.append(
            f"{total:.1f} hours of one command after another, {total * processes:.1f} of a process; and figures"
        )
        return "\n".join(lines)

    def _rate(self, trainings: Sequence[Job]) -> tuple[float, str]:
        """Images/s of a training, measured as soon as one has done an epoch, and how it is known."""
        logs = [job.out / "log.jsonl" for job in trainings]
        lines = [json.loads(line) for log in logs if log.exists() for line in log.read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        if rates:
            return mean(rates), f"{mean(rates):.0f} images/s, as measured in {len(rates)} epochs"
        return self.options.rate, f"{self.options.rate:g} images/s, as --rate says"


def run(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Run what is left of a stage, so many side by side; where one fails, all of them are stopped."""
    waiting = deque(job for job in jobs if not job.done)
    running: dict[subprocess.Popen[bytes], Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                job = waiting.popleft()
                running[start(job, options)] = job
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                if process.returncode:
                    told = f", see {job.out}.log" if options.jobs > 1 else ""
                    sys.exit(f"{job.out} ended with status {process.returncode}{told}. The same command continues.")
    except KeyboardInterrupt:  # the terminal has told the others, too
        raise
    except BaseException:
        for process in running:
            process.terminate()  # a pretraining saves its state first
        raise
    finally:
        for process in running:
            process.wait()


def start(job: Job, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start a command; of several side by side each writes into a file of its own and takes its share of the cores."""
    several = ["torchrun", "--standalone", "--nproc-per-node", str(options.processes), "-m", "timm_etf"]
    program = shlex.split(os.environ.get("TIMM_ETF", "")) or (several if options.processes > 1 else ["timm-etf"])
    job.out.parent.mkdir(parents=True, exist_ok=True)
    print("\n$ timm-etf", shlex.join(job.command), flush=True)
    if options.jobs == 1:
        return subprocess.Popen([*program, *job.command])
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    with Path(f"{job.out}.log").open("ab") as log:
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        return subprocess.Popen([*program, *job.command], stdout=log, stderr=log, env=environment)


def stop(*_: Any) -> None:
    """End as an error does, so that what is running is stopped, too."""
    sys.exit("Stopped. The same command continues.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--data-root", type=Path, required=True, help="of the targets")
    parser.add_argument("--data-dir", type=Path, help="the source; by default DATA_ROOT/icons-400")
    parser.add_argument("--target-heads", nargs="*", choices=TARGET_HEADS, default=TARGET_HEADS, metavar="HEAD")
    parser.add_argument("--jobs", type=int, default=1, help="commands side by side")
    parser.add_argument("--processes", type=int, default=1, help="of each command, which share its batch")
    parser.add_argument("--rate", type=float, default=400, help="images/s of a training, until one has measured it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="print what is left to do, and stop")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    if options.scale == "full" and not options.data_dir:
        parser.error("--scale full pretrains on ImageNet: give its folder with --data-dir")
    if TARGET_HEADS[0] not in options.target_heads:
        parser.error(f"--target-heads has {TARGET_HEADS[0]}, whose fine-tuned models are in Figure 3")
    batch = SCALES[options.scale].batch
    if options.jobs < 1 or options.processes < 1 or batch % options.processes:
        parser.error(f"--jobs is at least 1, and --processes a divisor of the batch of {batch}")
    paper = Paper(options.out, SCALES[options.scale], options)
    print(paper.plan(), flush=True)
    if options.plan:
        return
    try:
        paper.check()
    except UsageError as e:
        parser.error(str(e))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    for jobs in paper.stages.values():
        run(jobs, options)
    findings.main(options.out)


if __name__ == "__main__":
    main()
