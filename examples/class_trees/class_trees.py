"""Classifiers that know a tree of the classes, and one that does not: how bad are mistakes, and who is near whom?

    python examples/class_trees/class_trees.py OUT --data-root DATA    # DATA as `timm-etf data build offline` fills it

Emoji under Unicode's groups and subgroups, letters under their scripts. A quarter of the classes is held out, whole:
its images tell whether features of what was never seen are in order. Every arm is tuned on a quarter of the other
classes' training images, with a third of the passes and one seed, then trained with several seeds and measured. It goes
on where it was stopped; OUT/results.json has everything, mistakes.py tells and draws it.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timm.data.readers import create_reader
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import in_memory
import mistakes
import study

from timm_etf.atomic import atomic_folder, write_json, write_text
from timm_etf.classifier import features_into
from timm_etf.data.build.offline.registries import Registries
from timm_etf.frames import ClassTree
from timm_etf.pretrain import setup
from timm_etf.pretrain.objective import Objective

SCRIPTS = ("armenian", "hiragana", "kanji")
COMMON = (
    "--img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 --weight-decay 5e-4 --warmup-epochs 1 "
    "--channels-last False --opt-kwargs fused=True"  # half as fast again on a CPU, at so few pixels
)
GRID = ((64, 0.1), (64, 0.2), (64, 0.4))
"""Batches and learning rates that every arm is tuned over; twice the last rate follows while the last is the best."""
COARSE = "coarse"
"""Folder of the arm with further classifiers for groups."""


@dataclass(frozen=True)
class Arm:
    """A way to pretrain; TREE is the tree's file."""

    fixed: bool = False
    more: tuple[str, ...] = ()
    coarse: bool = False


ARMS = {
    "learned": Arm(),
    "learned, coarse heads": Arm(coarse=True),
    "simplex": Arm(fixed=True),
    "tree": Arm(fixed=True, more=("--hierarchy", "TREE")),
    "tree, gram loss": Arm(fixed=True, more=("--hierarchy", "TREE", "--loss", "gram")),
}
"""The first is what the others are compared with; the second is told the same as the last two."""


class CoarseObjective(Objective):
    """The objective with a linear classifier for each level of groups in the tree, whose cross-entropies are added."""

    def __init__(self, config: Any, model: Any, teacher: nn.Module | None = None) -> None:
        super().__init__(config, model, teacher)
        self.groups: list[Tensor] = []
        if config.out.parent.name != COARSE:
            return
        names = create_reader("", root=str(config.data_dir / "train")).class_to_idx
        ways = [
            path.split("/") for path in ClassTree.read(config.data_dir / "tree.tsv", sorted(names, key=names.get)).paths
        ]
        for depth in range(1, max(map(len, ways))):
            above = ["/".join(way[:-1][:depth]) for way in ways]
            numbers = {group: i for i, group in enumerate(dict.fromkeys(above))}
            self.groups.append(torch.tensor([numbers[group] for group in above]))
        width = model.get_classifier().in_features
        model.coarse = nn.ModuleList(nn.Linear(width, int(of.max()) + 1) for of in self.groups)

    def _loss(self, model: Any, images: Tensor, targets: Tensor, statistics: Tensor | None) -> Tensor:
        with features_into(model) as features:
            loss = super()._loss(model, images, targets, statistics)
        for of, head in zip(self.groups, getattr(model, "coarse", ()), strict=True):
            loss = loss + nn.functional.cross_entropy(head(features[-1]), of.to(targets.device)[targets])
        return loss


def start(where: Path, threads: int) -> None:
    """Make this process one that trains with images in memory and, where the arm has them, with coarse heads."""
    in_memory.start(where, threads)
    setup.Objective = CoarseObjective  # type: ignore[misc]
    whole = setup.Run.exported_model

    def exported_model(run: Any) -> Any:
        model = whole(run)
        if hasattr(model, "coarse"):  # its work is done, and timm does not know it
            del model.coarse
        return model

    setup.Run.exported_model = exported_model  # type: ignore[method-assign]


def emoji_groups(file: Path | None) -> dict[str, str]:
    """Unicode's group/subgroup of each emoji's code points, from emoji-datasource's table, by default from npm."""
    with tempfile.TemporaryDirectory() as folder:
        file = file or Registries(Path(folder)).npm("emoji-datasource-google", "16.0.0") / "emoji.json"
        listed = json.loads(file.read_text(encoding="utf-8"))
    codes = (("-".join(p for p in e["unified"].lower().split("-") if p != "fe0f"), e) for e in listed)
    return {code: f"{e['category']}/{e['subcategory']}".replace(" ", "_") for code, e in codes}


def motif(name: str) -> str:
    """An emoji without who does it: men and women of one picture are held out together."""
    return "-".join(p for p in name.split("-") if p not in "1f468 1f469 1f9d1 2640 2642 200d".split()) or name


def prepare(folder: Path, splits: dict[str, list[Path]], groups: dict[str, str]) -> None:
    """Write `seen`, `held-out` and, to tune on, parts of `seen`'s training images, with their tree; once.

    Args:
        folder: Where.
        splits: Folders of the classes' images, for `train` and for `validation`, whose classes are the same.
        groups: Group of each class, by name.
    """
    if folder.exists():
        return
    by_group = defaultdict(lambda: defaultdict(list))
    for path in splits["train"]:
        by_group[groups[name_of(path)]][motif(name_of(path))].append(name_of(path))
    motifs = []
    for group in sorted(by_group):
        inside = sorted(by_group[group])
        random.Random(f"0 {group}").shuffle(inside)
        motifs += [by_group[group][m] for m in inside]
    held = {name for names in motifs[3::4] for name in names}
    with atomic_folder(folder) as new:
        for split, paths in splits.items():
            for path in paths:
                half = "held-out" if name_of(path) in held else "seen"
                shutil.copytree(path, new / half / split / name_of(path))
        for path in sorted((new / "seen" / "train").iterdir()):
            for number, image in enumerate(sorted(path.iterdir())):
                part = new / "tuning" / ("validation" if number % 4 == 3 else "train") / path.name
                part.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, part)
        for half in ("seen", "held-out", "tuning"):
            lines = [f"{p.name}\t{groups[p.name]}" for p in sorted((new / half / "train").iterdir())]
            write_text(new / half / "tree.tsv", "\n".join(lines) + "\n")


def name_of(path: Path) -> str:
    """Class of a folder of images: letters of several scripts are told apart by theirs."""
    script = path.parents[1].name
    return f"{script}-{path.name}" if script in SCRIPTS else path.name


class Trees:
    """The trainings of one source of images, in the form that `study.run` runs."""

    def __init__(self, options: argparse.Namespace, source: str) -> None:
        self.options, self.source, self.out = options, source, options.out / source
        self.data = self.out / "data"
        self.seen, self.held, self.tuned_on = (self.data / part for part in ("seen", "held-out", "tuning"))
        self.arms = {name: ARMS[name] for name in options.arms or ARMS}

    def prepare(self) -> None:
        """Write the images and their tree."""
        root = self.options.data_root
        sets = ("emoji-identity",) if self.source == "emoji" else SCRIPTS
        if missing := [name for name in sets if not (root / name).is_dir()]:
            raise SystemExit(f"{root} lacks {', '.join(missing)}: timm-etf data build offline --root {root}")
        folders = {s: [p for name in sets for p in sorted((root / name / s).iterdir())] for s in ("train", "test")}
        if self.options.limit:
            folders = {s: paths[:: -(-len(paths) // self.options.limit)] for s, paths in folders.items()}
        if self.data.exists():
            return
        names = list(map(name_of, folders["train"]))
        groups = (
            emoji_groups(self.options.emoji_json) if self.source == "emoji" else {n: n.split("-")[0] for n in names}
        )
        prepare(self.data, {"train": folders["train"], "validation": folders["test"]}, groups)

    @property
    def classes(self) -> int:
        """Those that are trained on."""
        return len(list((self.seen / "train").iterdir()))

    @property
    def images(self) -> int:
        """Training images."""
        return sum(1 for _ in (self.seen / "train").rglob("*.png"))

    def folder(self, arm: str, *what: object) -> Path:
        """Where a run is."""
        kind = COARSE if self.arms[arm].coarse else "train"
        return self.out / kind / "-".join(map(str, (arm.replace(", ", "+").replace(" ", "_"), *what)))

    def tuning(self) -> list[study.Job]:
        """Every arm with everything in its grid, as far as that is known."""
        return [
            self._training(arm, self.folder(arm, "tune", *at), self.tuned_on, *at, seed=0, repeats=1)
            for arm in self.arms
            for at in self.tuned(arm)
        ]

    def training(self) -> list[study.Job]:
        """Every arm with what it does best with, the first seed of all before the second."""
        return [
            self._training(arm, self.folder(arm, seed), self.seen, *self.chosen(arm), seed=seed, repeats=3)
            for seed in range(self.options.seeds)
            for arm in self.arms
        ]

    def _training(
        self, arm: str, out: Path, data: Path, batch: int, lr: float, *, seed: int, repeats: int
    ) -> study.Job:
        of, options = self.arms[arm], self.options
        # As wide as a frame of so many classes needs, for all arms.
        width = max(512, -(-(self.classes - 1) // 16) * 16)
        more = [str(data / "tree.tsv") if word == "TREE" else word for word in of.more]
        command = ["pretrain", "--model", "resnet10t" + ("_etf" if of.fixed else ""), *more, "--out", out]
        command += ["--data-dir", data, *COMMON.split(), "--batch-size", batch, "--lr", lr, "--seed", seed]
        command += ["--epochs", options.epochs, "--epoch-repeats", repeats, "--workers", 0, "--checkpoint-hist", 1]
        command += ["--model-kwargs", f"channels=(32, 64, 128, {width})", "stem_width=16", *options.pretrain]
        if (out / "run.json").exists():
            command.append("--resume")
        return study.Job([str(c) for c in command], out)

    def after(self, job: study.Job) -> list[study.Job]:
        """What follows a job: what was trained, and not only tuned, is measured."""
        if "-tune-" in job.out.name or job.out.parent.name == "measure":
            return []
        data = [f"{folder},name={name},tree={folder / 'tree.tsv'}" for name, folder in self._halves().items()]
        command = ["geometry", "--models", f"a=local-dir:{job.out / 'export'}", "--data", *data, "--workers", "0"]
        out = self.out / "measure" / job.out.name
        return [study.Job([*command, "--out", str(out)], out)]

    def _halves(self) -> dict[str, Path]:
        return {"seen": self.seen, "held-out": self.held}

    def tuned(self, arm: str) -> dict[tuple[int, float], float]:
        """Accuracy on the images that were held back, by batch and learning rate; -1 where there is none."""
        found = {at: self._tuned(arm, at) for at in GRID}
        while (best := max(found.values())) >= 0 and best == found[last := list(found)[-1]]:
            further = (last[0], round(2 * last[1], 3))
            found[further] = self._tuned(arm, further)
        return found

    def _tuned(self, arm: str, at: tuple[int, float]) -> float:
        file = self.folder(arm, "tune", *at) / "results.json"
        return float(json.loads(file.read_text())["source"]["top1"]) if file.exists() else -1.0

    def chosen(self, arm: str) -> tuple[int, float]:
        """Batch and learning rate with which an arm does best."""
        found = self.tuned(arm)
        return max(found, key=lambda at: found[at])

    def found(self) -> dict[str, Any]:
        """What there is of each arm: how it was tuned, and measures by seed and half of the classes."""
        arms: dict[str, Any] = {}
        for arm in self.arms:
            runs = {}
            for seed in range(self.options.seeds):
                file = self.out / "measure" / self.folder(arm, seed).name / "results.json"
                if file.exists():
                    told = json.loads(file.read_text())["geometry"]
                    runs[str(seed)] = {half: told[half]["test"]["a"][0] for half in self._halves() if half in told}
            tuned = {f"batch {batch}, lr {lr}": top1 for (batch, lr), top1 in self.tuned(arm).items()}
            arms[arm] = {"tuned": tuned, "chosen": self.chosen(arm), "runs": runs}
        return {"classes": self.classes, "train_images": self.images, "arms": arms}

    def write_results(self) -> None:
        """Everything that is there, of all sources."""
        found = {source: Trees(self.options, source).found() for source in self.options.sources}
        settings = {"epochs": self.options.epochs, "options": COMMON, "grid": GRID, "seeds": self.options.seeds}
        write_json(self.options.out / "results.json", {"settings": settings, "sources": found})
        write_text(self.options.out / "report.md", mistakes.report(found))


def plan(sources: list[Trees], rate: float) -> str:
    """What will be done, and for how long."""
    lines, hours = [], 0.0
    for of in sources:
        tuned, trained = len(of.tuning()), len(of.arms) * of.options.seeds
        images = of.options.epochs * of.images * (tuned + 3 * trained)
        hours += images / rate / 3600
        lines.append(
            f"{of.source}: {of.classes} classes, {of.images} images, {len(of.arms)} arms: {tuned} trainings to tune, "
            f"{trained} to compare, {images:,} images"
        )
    return "\n".join([*lines, f"about {hours:.1f} hours at {rate:.0f} images/s of all trainings"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--sources", nargs="*", default=["emoji", "glyphs"], choices=["emoji", "glyphs"])
    parser.add_argument("--emoji-json", type=Path, help="emoji-datasource's table; by default npm fetches it")
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="ARM", help="these arms only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of three passes each; a third of them to tune")
    parser.add_argument("--limit", type=int, help="about so many classes of each source, to try it out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--rate", type=float, default=600, help="images/s of all trainings, for the estimate")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing else than write the images")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    sources = [Trees(options, source) for source in options.sources]
    for of in sources:
        of.prepare()
    print(plan(sources, options.rate), flush=True)
    if options.plan:
        return
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), start, (options.out / "decoded", threads)) as pool:
        for of in sources:
            tuned: list[Path] = []
            while tuned != [job.out for job in of.tuning()]:
                tuned = [job.out for job in of.tuning()]
                study.run(of.tuning(), of, pool)
            study.run(of.training(), of, pool)
    sources[0].write_results()
    mistakes.main(options.out)


if __name__ == "__main__":
    main()
