"""New classes beside old ones: reserved vertices, a learned head that grows by imprinted rows, the nearest class mean.

    python examples/growing/growing.py OUT --data-root DATA    # DATA as `timm-etf data build offline` fills it

Backbones are trained on 300 of icons-400's 399 names, under a simplex with 99 reserved vectors and under a learned
head. Then the other 99 names come, with 5, 10 or 30 images each, beside 5 of each old name, and both go on alike.
Nearest class means of the first backbones' features are what both are to be better than: of the same images, and of
all those of old names, which a class mean can keep for nothing.
It goes on where it was stopped; OUT/results.json has every run, OUT/report.md the table.
"""

import argparse
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import in_memory

import timm_etf
from timm_etf import hub
from timm_etf.atomic import atomic_folder, write_json, write_text
from timm_etf.features.extract import features_of
from timm_etf.means import old_and_new
from timm_etf.report.statistics import t_interval
from timm_etf.transfer import Target, open_splits

COMMON = "--img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --color-jitter 0 --weight-decay 5e-4 --workers 0"
NETWORK = ["--model-kwargs", "channels=(32, 64, 128, 512)", "stem_width=16"]
"""As in examples/transfer."""
TUNING = "--batch-size 64 --freeze-bn --warmup-epochs 0"
EXEMPLARS = 5
"""Images of each old class that are kept."""
LEARNED = "imprinted rows"
HEADS = {"reserved vertices": "resnet10t_etf", LEARNED: "resnet10t"}


class Growing:
    """The runs of one study."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.source = options.data_root / "icons-400"
        names = sorted(p.name for p in (self.source / "train").iterdir())[: options.limit]
        self.new = sorted(random.Random(0).sample(names, len(names) // 4))
        self.old = [name for name in names if name not in self.new]

    def prepare(self) -> None:
        """Write the old classes' images, and for each number of shots those that the second part learns from."""
        for shots in (0, *self.options.shots):
            folder = self.data(shots)
            if folder.exists():
                continue
            with atomic_folder(folder) as new:
                for name in self.old + (self.new if shots else []):
                    most = None if not shots else EXEMPLARS if name in self.old else shots
                    self._copy(name, most, new)

    def _copy(self, name: str, most: int | None, folder: Path) -> None:
        images = sorted((self.source / "train" / name).iterdir())
        random.Random(f"0 {name}").shuffle(images)
        (folder / "train" / name).mkdir(parents=True)
        for image in images[:most]:
            shutil.copy(image, folder / "train" / name)
        shutil.copytree(self.source / "validation" / name, folder / "validation" / name)

    def data(self, shots: int) -> Path:
        """Images of the first part, or of the second with so many of each new class."""
        return self.out / "data" / (f"{shots}-shot" if shots else "old")

    def folder(self, head: str, seed: int, shots: int = 0) -> Path:
        """Where a run is."""
        return self.out / "train" / f"{head.replace(' ', '_')}-{seed}-{shots or 'old'}"

    def trained(self, head: str, seed: int, shots: int = 0) -> Path:
        """The export of a run, which is trained unless it has been."""
        out = self.folder(head, seed, shots)
        if (out / "results.json").exists():
            return out / "export"
        command = ["pretrain", "--model", HEADS[head], "--out", out, "--data-dir", self.data(shots), "--seed", seed]
        command += [*COMMON.split(), *NETWORK]
        if shots:
            command += ["--init", f"local-dir:{self.start(head, seed, shots)}", "--keep-classifier", *TUNING.split()]
            command += ["--epochs", self.options.tuning_epochs, "--lr", self.options.tuning_lr]
        else:
            command += ["--epochs", self.options.epochs, "--batch-size", 64, "--lr", 0.2, "--warmup-epochs", 1]
            command += ["--reserve", len(self.new)] if head == "reserved vertices" else []
        command += self.options.pretrain
        if (out / "run.json").exists():
            command.append("--resume")
        if status := in_memory.run([str(c) for c in command], Path(f"{out}.log")):
            raise SystemExit(f"{out} failed with status {status}: see {out}.log")
        print(out.name, flush=True)
        return out / "export"

    def train(self, head: str, seed: int) -> None:
        """Both parts, whatever is not there yet."""
        for shots in (0, *self.options.shots):
            self.trained(head, seed, shots)

    def start(self, head: str, seed: int, shots: int) -> Path:
        """What the second part starts from: the first part, for a learned head with rows of the new classes."""
        old = self.trained(head, seed)
        if head == "reserved vertices":
            return old
        folder = self.out / "imprinted" / self.folder(head, seed, shots).name
        if not folder.exists():
            model, names = imprinted(old, self.data(shots))
            hub.export(model, folder, label_names=names)
        return folder

    def measured(self, seed: int) -> dict[str, Any]:
        """Accuracies by number of shots and way."""
        found: dict[str, Any] = {}
        for head in HEADS:
            start = timm_etf.create_model(f"local-dir:{self.trained(head, seed)}", pretrained=True).eval()
            test = self._features(start, self.options.shots[0], "test")  # the same for all
            of_old = class_means(self._features(start, 0, "train"))
            for shots in self.options.shots:
                told = found.setdefault(str(shots), {})
                means = class_means(self._features(start, shots, "train"))
                told[f"nearest class mean, {head}"] = self._nearest_mean(means, test)
                told[f"nearest class mean of all old images, {head}"] = self._nearest_mean(means | of_old, test)
                tuned = timm_etf.create_model(f"local-dir:{self.trained(head, seed, shots)}", pretrained=True).eval()
                told[head] = self._scored(*self._logits(tuned, shots))
        found["old logits stay bit for bit"] = self.same_logits(seed)
        return found

    def _features(self, model: nn.Module, shots: int, split: str) -> Any:
        images = getattr(open_splits(Target("icons", str(self.data(shots)))), split)
        return features_of(model, images, workers=0)

    def _logits(self, model: Any, shots: int) -> tuple[torch.Tensor, Any]:
        """Logits of the validation images, in the order of the data's classes, and the images' features."""
        found = self._features(model, shots, "test")
        names = model.pretrained_cfg["label_names"]
        with torch.no_grad():
            logits = model.get_classifier()(torch.from_numpy(found.x))
        return logits[:, [names.index(name) for name in found.class_names]], found

    def _nearest_mean(self, means: dict[str, torch.Tensor], test: Any) -> dict[str, float]:
        means_KD = torch.stack([means[name] for name in test.class_names])
        return self._scored(-torch.cdist(torch.from_numpy(test.x).double(), means_KD), test)

    def _scored(self, ranks: torch.Tensor, found: Any) -> dict[str, float]:
        y = torch.from_numpy(found.y)
        is_old = torch.tensor([name in self.old for name in found.class_names])[y]
        right = ranks.argmax(1) == y
        return old_and_new(int(right.sum()), len(right), int(right[is_old].sum()), int(is_old.sum()))

    def same_logits(self, seed: int) -> bool:
        """Whether naming reserved vertices, the backbone left alone, changes no logit of an old class.

        Those that are tuned have another backbone, and other logits.
        """
        model = timm_etf.create_model(f"local-dir:{self.trained('reserved vertices', seed)}", pretrained=True).eval()
        x = torch.randn(64, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model(x)[:, : len(self.old)]
            after = timm_etf.grow_classifier(model, self.new)(x)[:, : len(self.old)]
        return torch.equal(before, after)


def class_means(found: Any) -> dict[str, torch.Tensor]:
    """Mean feature of each class, float64, by its name."""
    x, y = torch.from_numpy(found.x).double(), torch.from_numpy(found.y)
    return {name: x[y == k].mean(0) for k, name in enumerate(found.class_names)}


def imprinted(old: Path, data: Path) -> tuple[nn.Module, list[str]]:
    """A model whose learned head has, for each class that it does not know, a row along its features' class mean.

    Rows are as long as those that were learned are in the mean, and have their mean bias (after Qi et al. 2018).

    Returns:
        The model, and the names of its classes in their order.
    """
    model: Any = timm_etf.create_model(f"local-dir:{old}", pretrained=True).eval()
    known, head = model.pretrained_cfg["label_names"], model.get_classifier()
    weight, bias = head.weight.detach(), head.bias.detach()
    train = features_of(model, open_splits(Target("icons", str(data))).train, workers=0)
    model.reset_classifier(len(train.class_names))
    with torch.no_grad():
        for k, name in enumerate(train.class_names):
            if name in known:
                model.get_classifier().weight[k] = weight[known.index(name)]
                model.get_classifier().bias[k] = bias[known.index(name)]
            else:
                along = nn.functional.normalize(torch.from_numpy(train.x[train.y == k]).mean(0), dim=0)
                model.get_classifier().weight[k] = along * weight.norm(dim=1).mean()
                model.get_classifier().bias[k] = bias.mean()
    return model, list(train.class_names)


def table(runs: dict[str, Any]) -> str:
    """Old, new and harmonic mean by number of shots and way, and its difference from a grown learned head's.

    Means over seeds with 95 % t intervals.
    """
    lines = [f"| images of a new class | way | old % | new % | harmonic mean | less {LEARNED} |", f"|{'---|' * 6}"]
    first = next(iter(runs.values()))
    for shots in (s for s in first if s.isdecimal()):
        for way in first[shots]:
            found = [run[shots][way] for run in runs.values()]
            old, new, both = ([f[k] for f in found] for k in ("top1_old", "top1_new", "harmonic"))
            apart = [b - run[shots][LEARNED]["harmonic"] for b, run in zip(both, runs.values(), strict=True)]
            cells = [f"{mean(old):.1f}", f"{mean(new):.1f}", shown(both, ".1f"), shown(apart, "+.1f")]
            lines.append(f"| {shots} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float], digits: str) -> str:
    """A mean with its interval."""
    interval = t_interval(values)
    return f"{mean(values):{digits}}" + (f" ({interval[0]:{digits}} to {interval[1]:{digits}})" if interval else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--shots", type=int, nargs="*", default=[5, 10, 30])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tuning-epochs", type=int, default=10)
    parser.add_argument("--tuning-lr", type=float, default=0.01)
    parser.add_argument("--limit", type=int, help="so many names, to try it out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--rate", type=float, default=550, help="images/s of all trainings, for the estimate")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing else than write the images")
    parser.add_argument("--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of timm-etf pretrain")
    options = parser.parse_args()
    if not (options.data_root / "icons-400").is_dir():
        raise SystemExit(f"{options.data_root} lacks icons-400: timm-etf data build offline --root {options.data_root}")
    growing = Growing(options)
    growing.prepare()
    counts = {s: sum(1 for _ in (growing.data(s) / "train").rglob("*.png")) for s in (0, *options.shots)}
    images = options.epochs * counts[0] + options.tuning_epochs * sum(counts[s] for s in options.shots)
    runs = len(HEADS) * options.seeds
    print(f"{len(growing.old)} old names, {len(growing.new)} new ones: {runs} trainings, {runs * len(options.shots)} ")
    print(
        f"that go on; about {runs * images / options.rate / 3600:.1f} hours at {options.rate:.0f} images/s", flush=True
    )
    if options.plan:
        return
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    decoded, seeds = options.out / "decoded", range(options.seeds)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), in_memory.start, (decoded, threads)) as pool:
        list(pool.map(growing.train, *zip(*product(HEADS, seeds), strict=True)))
        found = dict(zip(map(str, seeds), pool.map(growing.measured, seeds), strict=True))
    settings = {k: getattr(options, k) for k in ("epochs", "tuning_epochs", "tuning_lr")}
    write_json(options.out / "results.json", {"settings": settings, "old": len(growing.old), "runs": found})
    write_text(options.out / "report.md", f"# Classes that come later\n\n{table(found)}\n")
    print(f"{table(found)}\nresults: {options.out / 'results.json'}\nreport:  {options.out / 'report.md'}")


if __name__ == "__main__":
    main()
