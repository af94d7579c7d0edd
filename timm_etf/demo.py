"""The five-minute demo: one small backbone, pretrained from three seeds with a learned and under a fixed classifier.

Everything goes the way a user's own data would: image folders, `pretrain`, `hub.export`, timm's loader, linear probes,
and the statistics of `timm-etf transfer`.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from timm_etf import hub, transfer
from timm_etf.atomic import file_sha256, require_new_folder
from timm_etf.data import build_pictograms, build_targets
from timm_etf.features.candidates import Candidate
from timm_etf.hub.card import own_results
from timm_etf.hub.load import WEIGHTS
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.loop import pretrain
from timm_etf.report.results import Checkpoint, Transfer, read, write
from timm_etf.report.statistics import t_interval
from timm_etf.report.style import COLOURS, STYLE, save
from timm_etf.transfer.report import Report
from timm_etf.variants import SUFFIX

HEADS = {"learned": "resnet10t", "ETF": "resnet10t_etf"}
"""The two methods: an ordinary classifier and, as --config fixed-frame, a simplex behind a projector under NTCE."""

SEEDS = (0, 1, 2)
"""Of the trainings of each: one would be an anecdote, whose sign changes from machine to machine."""

_COLOURS = dict(zip(HEADS, COLOURS, strict=False))
PROTOCOL = (
    "Linear probe: logistic regression on the standardised features before the classifier, strength of "
    "regularisation chosen on a fifth of the target's training split. Intervals: over trainings and test images."
)


def config(name: str, out: Path, data_dir: Path, *, seed: int, resume: bool = False) -> PretrainConfig:
    """The demo's recipe, the same for both but for the head and its loss."""
    fixed = name.endswith(SUFFIX)
    return PretrainConfig(
        model=name,
        out=out,
        data_dir=data_dir,
        # resnet10t at a quarter of its cost: half the width everywhere, 256 features.
        model_kwargs=("channels=(32, 64, 128, 256)", "stem_width=16", *(["projector=mlp"] if fixed else [])),
        loss="ntce" if fixed else "cross_entropy",
        img_size=32,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
        scale=(0.6, 1.0),
        hflip=0.0,  # an arrow to the left is another class than one to the right
        epochs=10,
        warmup_epochs=1,
        batch_size=64,
        lr=0.2,
        weight_decay=5e-4,
        workers=0,  # on two cores a loader process costs the training more than it brings
        seed=seed,
        resume=resume,
    )


def run(out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Build the data, pretrain, probe, export and reload both models; write results.json and demo.png into `out`.

    Args:
        out: Folder for everything the demo makes, new or empty.
        resume: Continue a demo that was stopped in `out`.

    Returns:
        What is in results.json.

    Raises:
        UsageError: If `out` is not empty, or the demo's packages are not installed.
    """
    if not resume:
        require_new_folder(out, "continue that demo with --resume, or choose another --out")
    started = time.perf_counter()
    source = build_pictograms(out / "data")
    targets = build_targets(out / "data")
    runs: dict[str, list[dict[str, Any]]] = {head: [] for head in HEADS}
    for seed in SEEDS:
        for head, name in HEADS.items():
            print(f"Pretraining {name} ({head} classifier), seed {seed}")
            folder = _run(out, name, seed)
            settings = config(name, folder, source, seed=seed, resume=(folder / "run.json").exists())
            runs[head].append(pretrain(settings)["source"])
    exports = {head: [_run(out, name, seed) / "export" for seed in SEEDS] for head, name in HEADS.items()}
    probes = {head: [_probe(folder, targets) for folder in folders] for head, folders in exports.items()}
    report = _compare(exports, targets, probes)
    compared = report.as_json()
    results = {
        "protocol": PROTOCOL,
        "seeds": list(SEEDS),
        "source": runs,
        "source_difference": _source_difference(runs),
        "transfer": compared,
        "identical_after_reload": all(
            _reload(folder, fixed=head == "ETF") for head, folders in exports.items() for folder in folders
        ),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write(out / "results.json", results)
    for folders in exports.values():
        for folder in folders:
            _add_to_card(folder, compared)
    picture = _draw(out, source, targets, report)
    print(_summary(out, results, report, picture))
    return results


def _run(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def _source_difference(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Top-1 on the source, ETF less learned, over the pairs of trainings."""
    pairs = zip(runs["learned"], runs["ETF"], strict=True)
    by_run = [etf["top1"] - learned["top1"] for learned, etf in pairs]
    return {"mean": float(np.mean(by_run)), "interval_over_runs": t_interval(by_run), "by_run": by_run}


def _probe(folder: Path, targets: dict[str, Path]) -> dict[str, transfer.Result]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    probes = {}
    for name, root in targets.items():
        splits = transfer.open_splits(transfer.Target(name, str(root)))
        train, test = (transfer.features_of(model, images, workers=0) for images in splits)
        probes[name] = transfer.linear_probe(train, test)
    return probes


@torch.inference_mode()
def _reload(folder: Path, *, fixed: bool) -> bool:
    """Whether plain timm and timm_etf give the same from an exported folder, bit for bit.

    What was trained under a frame is told in config.json; its classifier, behind a projector, is not exported.
    """
    plain: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = hub.create_model(f"local-dir:{folder}", pretrained=True).eval()
    told = "etf" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    images = torch.randn(8, *plain.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    return told == fixed and torch.equal(plain(images), ours(images))


def _compare(
    exports: dict[str, list[Path]], targets: dict[str, Path], probes: dict[str, list[dict[str, transfer.Result]]]
) -> Report:
    """The probes as `timm-etf transfer` compares them; `exports` and `probes` hold a training for each seed."""
    trainings = [(head, number) for head, folders in exports.items() for number in range(len(folders))]
    return Report(
        candidates=[Candidate(head, f"local-dir:{exports[head][number]}") for head, number in trainings],
        targets=[transfer.Target(name, str(root)) for name, root in targets.items()],
        results={
            (candidate, name, "probe", 0): result
            for candidate, (head, number) in enumerate(trainings)
            for name, result in probes[head][number].items()
        },
        seconds={},
        missing={},
        notes=[],
        collapse={},
        weights_sha256={i: file_sha256(exports[head][number] / WEIGHTS) for i, (head, number) in enumerate(trainings)},
        settings={"seeds": 1, "versions": {p: version(p) for p in ("timm_etf", "timm", "torch")}},
    )


def _add_to_card(folder: Path, compared: Transfer) -> None:
    checkpoint = read(folder / "results.json", Checkpoint)
    own = own_results(compared, file_sha256(folder / WEIGHTS))
    write(folder / "results.json", {**checkpoint, "transfer": [own]})
    hub.write_card(folder)


def _summary(out: Path, results: dict[str, Any], report: Report, picture: Path) -> str:
    """The table and the next commands."""

    def row(name: str, *cells: str) -> str:
        *accuracies, difference = cells
        return f"{name:<28}{''.join(f'{a:>10}' for a in accuracies)}   {difference}"

    source, apart = results["source"], results["source_difference"]
    means = [f"{np.mean([run['top1'] for run in source[head]]):.1f}" for head in HEADS]
    ends = "({:+.1f} to {:+.1f})".format(*apart["interval_over_runs"])
    lines = [
        "",
        row(f"accuracy in %, {len(SEEDS)} trainings", *HEADS, "ETF - learned (95 % interval)"),
        row(f"source ({source['ETF'][0]['count']} images)", *means, f"{apart['mean']:+.1f} {ends}"),
    ]
    for target in report.targets:
        count = len(report.results[0, target.name, "probe", 0].y)
        accuracies = [f"{report.accuracy(head, [target], 'probe'):.1f}" for head in HEADS]
        lines.append(row(f"probe {target.name} ({count})", *accuracies, _difference(report, target)))
    etf = _run(out, HEADS["ETF"], SEEDS[0]) / "export"
    same = "identical" if results["identical_after_reload"] else "NOT IDENTICAL"
    return "\n".join(
        [
            *lines,
            "Intervals over trainings and test images (source: trainings). Three trainings are a look, not a claim.",
            f"Reloaded with and without timm_etf: outputs {same}. {results['seconds']:.0f} s in all.",
            "",
            f"picture: {picture}",
            f"models:  {out}/*/export",
            "next:    fine-tune one for 102 classes of your own, in plain timm:",
            f"           model = timm.create_model('local-dir:{etf}', pretrained=True, num_classes=102)",
            "         pretrain on your own images (one folder per class in train/ and validation/):",
            "           timm-etf pretrain --config fixed-frame --model resnet50_etf --data-dir DATA --out runs/mine",
        ]
    )


def _difference(report: Report, target: transfer.Target) -> str:
    found = report.difference("ETF", [target], "probe")
    low, high = found.runs_and_images or found.test_images
    verdict = {"win": "better", "loss": "worse", "tie": "no clear difference", None: ""}[found.claim]
    return f"{found.mean:+.1f} ({low:+.1f} to {high:+.1f}) {verdict}".rstrip()


def _draw(out: Path, source: Path, targets: dict[str, Path], report: Report) -> Path:
    """demo.png: what the images look like, how the runs learned, and how their features transfer."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure: Any = Figure(figsize=(12, 5), layout="constrained")
        left, middle, right = figure.subfigures(1, 3, width_ratios=[0.9, 1.0, 1.5])
        _draw_images(left, source, targets)
        _draw_learning(middle.subplots(), out)
        _draw_transfer(right.subplots(), report)
        save(figure, out / "demo.png", dpi=150)
    return out / "demo.png"


def _draw_images(figure: Any, source: Path, targets: dict[str, Path]) -> None:
    from matplotlib.image import imread

    rows = {"source: train": source / "train", "source: validation": source / "validation"}
    rows |= {f"target: {name}": root / "test" for name, root in targets.items()}
    for axes, (name, folder) in zip(figure.subplots(len(rows), 6, squeeze=False), rows.items(), strict=True):
        classes = sorted(p for p in folder.iterdir() if p.is_dir())
        for axis, chosen in zip(axes, classes[:: max(1, len(classes) // 6)], strict=False):
            axis.imshow(imread(sorted(chosen.iterdir())[0]), cmap="gray", vmin=0, vmax=1)
        for axis in axes:
            axis.set_axis_off()
        # Not a title: its width would push the first column aside.
        axes[0].annotate(name, (0, 1.05), xycoords="axes fraction", fontsize=9, annotation_clip=False).set_in_layout(
            False
        )


def _draw_learning(axis: Any, out: Path) -> None:
    for head, name in HEADS.items():
        for seed in SEEDS:
            log = (_run(out, name, seed) / "log.jsonl").read_text(encoding="utf-8")
            epochs = [json.loads(line) for line in log.splitlines()]
            label = {"label": f"{head} head"} if seed == SEEDS[0] else {}
            axis.plot([e["epoch"] for e in epochs], [e["top1"] for e in epochs], color=_COLOURS[head], lw=1, **label)
    axis.set(xlabel="epoch", title="Source: top-1 on unseen icon families (%)", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc="lower right")


def _draw_transfer(axis: Any, report: Report) -> None:
    names = []
    for y, target in zip(range(len(report.targets))[::-1], report.targets, strict=True):
        for head, shift in (("learned", 0.1), ("ETF", -0.1)):
            axis.plot(report.interval(head, [target], "probe"), [y + shift] * 2, color=_COLOURS[head], linewidth=2)
            axis.plot(report.accuracy(head, [target], "probe"), y + shift, "o", color=_COLOURS[head])
            axis.plot(trainings := report.accuracies(head, target, "probe"), [y + shift] * len(trainings), "|k", ms=8)
        text = f"ETF - learned: {_difference(report, target)}"
        axis.annotate(text, (1.0, y + 0.27), xycoords=("axes fraction", "data"), ha="right", fontsize=8.5)
        names.append(f"{target.name}\n{len(set(report.results[0, target.name, 'probe', 0].y.tolist()))} classes")
    axis.set_yticks(range(len(names))[::-1], names)
    axis.set(ylim=(-0.6, len(names) - 0.4))
    axis.set_xlabel("accuracy (%), 95 % over test images; ticks: trainings", fontsize=9)
    axis.set_title("Transfer: linear probe of the frozen features")
    axis.grid(axis="x", alpha=0.3)
