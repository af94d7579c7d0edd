"""The five-minute demo: one small backbone pretrained twice from one seed, with a learned and with a fixed classifier.

Everything goes the way a user's own data would: image folders, `pretrain`, `hub.export`, timm's loader, linear probes.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

from timm_etf import hub, transfer
from timm_etf.atomic import file_sha256, require_new_folder
from timm_etf.classifier import fixed_classifiers
from timm_etf.data import build_pictograms, build_targets
from timm_etf.features.candidates import Candidate
from timm_etf.hub.card import own_results
from timm_etf.hub.load import WEIGHTS
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.loop import pretrain
from timm_etf.report.results import Checkpoint, Transfer, read, write
from timm_etf.report.style import COLOURS, STYLE, save
from timm_etf.transfer.report import Report

HEADS = {"learned": "resnet10t", "ETF": "resnet10t_etf"}
"""The two runs: what they are called and the timm name that differs."""

_COLOURS = dict(zip(HEADS, COLOURS, strict=False))
SEED = 0
PROTOCOL = (
    "Linear probe: logistic regression on the standardised features before the classifier, strength of "
    "regularisation chosen on a fifth of the target's training split. Interval: bootstrap over test images."
)


def config(name: str, out: Path, data_dir: Path, *, resume: bool = False) -> PretrainConfig:
    """The demo's recipe, the same for both heads."""
    return PretrainConfig(
        model=name,
        out=out,
        data_dir=data_dir,
        # resnet10t at a quarter of its cost: half the width everywhere, 256 features.
        model_kwargs=("channels=(32, 64, 128, 256)", "stem_width=16"),
        img_size=40,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
        scale=(0.6, 1.0),
        hflip=0.0,  # an arrow to the left is another class than one to the right
        epochs=14,
        warmup_epochs=2,
        batch_size=64,
        lr=0.2,
        weight_decay=5e-4,
        workers=0,  # on two cores a loader process costs the training more than it brings
        seed=SEED,
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
    runs: dict[str, dict[str, Any]] = {}
    for head, name in HEADS.items():
        print(f"Pretraining {name} ({head} classifier)")
        folder = out / name
        runs[head] = pretrain(config(name, folder, source, resume=(folder / "run.json").exists()))["source"]
    probes = {head: _probe(out / name / "export", targets) for head, name in HEADS.items()}
    identical = all(_reload(out / name / "export") for name in HEADS.values())

    results = {
        "protocol": PROTOCOL,
        "seed": SEED,
        "source": runs,
        "targets": [
            {
                "target": target,
                "classes": len(set(probes["ETF"][target].y.tolist())),
                "count": len(probes["ETF"][target].correct),
                **{
                    head: {"accuracy": by_target[target].accuracy(), "interval": by_target[target].interval()}
                    for head, by_target in probes.items()
                },
                "difference": _difference(probes["learned"][target], probes["ETF"][target]),
            }
            for target in targets
        ],
        "logits_identical_after_reload": identical,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write(out / "results.json", results)
    compared = _compare(out, targets, probes)
    for name in HEADS.values():
        _add_to_card(out / name / "export", compared)
    picture = _draw(out, source, targets, results)
    print(_report(out, results, picture))
    return results


def _probe(folder: Path, targets: dict[str, Path]) -> dict[str, transfer.Result]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    probes = {}
    for name, root in targets.items():
        splits = transfer.open_splits(transfer.Target(name, str(root)))
        train, test = (transfer.features_of(model, images, workers=0) for images in splits)
        probes[name] = transfer.linear_probe(train, test)
    return probes


@torch.inference_mode()
def _reload(folder: Path) -> bool:
    """Whether plain timm and timm_etf give the same logits from an exported folder, bit for bit."""
    plain: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = hub.create_model(f"local-dir:{folder}", pretrained=True).eval()
    has_block = "etf" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    images = torch.randn(8, *plain.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    return has_block == any(fixed_classifiers(ours)) and torch.equal(plain(images), ours(images))


def _difference(learned: transfer.Result, etf: transfer.Result) -> dict[str, Any]:
    mean, interval = transfer.paired_difference(learned, etf)
    return {"accuracy": mean, "interval": interval}


def _compare(out: Path, targets: dict[str, Path], probes: dict[str, dict[str, transfer.Result]]) -> Transfer:
    """The probes as `timm-etf transfer` would have written them."""
    folders = [out / name / "export" for name in HEADS.values()]
    return Report(
        candidates=[Candidate(head, f"local-dir:{folder}") for head, folder in zip(HEADS, folders, strict=True)],
        targets=[transfer.Target(name, str(root)) for name, root in targets.items()],
        results={
            (number, name, "probe", 0): result
            for number, head in enumerate(HEADS)
            for name, result in probes[head].items()
        },
        seconds={},
        missing={},
        notes=[],
        collapse={},
        weights_sha256={number: file_sha256(folder / WEIGHTS) for number, folder in enumerate(folders)},
        settings={"seeds": 1, "versions": {p: version(p) for p in ("timm_etf", "timm", "torch")}},
    ).as_json()


def _add_to_card(folder: Path, compared: Transfer) -> None:
    checkpoint = read(folder / "results.json", Checkpoint)
    own = own_results(compared, file_sha256(folder / WEIGHTS))
    write(folder / "results.json", {**checkpoint, "transfer": [own]})
    hub.write_card(folder)


def _report(out: Path, results: dict[str, Any], picture: Path) -> str:
    """The table and the next commands."""

    def row(name: str, learned: str, etf: str, difference: str) -> str:
        return f"{name:<28}{learned:>10}{etf:>10}   {difference}"

    source = results["source"]
    top1 = {head: source[head]["top1"] for head in HEADS}
    lines = [
        "",
        row("accuracy in %", "learned", "ETF", "ETF - learned (95 % interval)"),
        row(
            f"source ({source['ETF']['count']} images)",
            f"{top1['learned']:.1f}",
            f"{top1['ETF']:.1f}",
            f"{top1['ETF'] - top1['learned']:+.1f}",
        ),
    ]
    for t in results["targets"]:
        difference, (low, high) = t["difference"]["accuracy"], t["difference"]["interval"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        lines.append(
            row(
                f"probe {t['target']} ({t['count']})",
                f"{t['learned']['accuracy']:.1f}",
                f"{t['ETF']['accuracy']:.1f}",
                f"{difference:+.1f} ({low:+.1f} to {high:+.1f}) {verdict}",
            )
        )
    etf = out / HEADS["ETF"] / "export"
    logits = "identical" if results["logits_identical_after_reload"] else "NOT IDENTICAL"
    lines += [
        "One seed, intervals over test images only: an illustration, not evidence for or against the method.",
        f"Reloaded with and without timm_etf: logits {logits}. {results['seconds']:.0f} s in all.",
        "",
        f"picture: {picture}",
        f"models:  {etf} and {out / HEADS['learned'] / 'export'}",
        "next:    fine-tune it for 102 classes of your own, in plain timm:",
        f"           model = timm.create_model('local-dir:{etf}', pretrained=True, num_classes=102)",
        "         pretrain on your own images (one folder per class in train/ and validation/):",
        "           timm-etf pretrain --model resnet50_etf --data-dir DATA --out runs/mine",
    ]
    return "\n".join(lines)


def _draw(out: Path, source: Path, targets: dict[str, Path], results: dict[str, Any]) -> Path:
    """demo.png: what the images look like, how the two runs learned, and how their features transfer."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure: Any = Figure(figsize=(12, 5), layout="constrained")
        left, middle, right = figure.subfigures(1, 3, width_ratios=[0.9, 1.0, 1.5])
        _draw_images(left, source, targets)
        _draw_learning(middle.subplots(), out)
        _draw_transfer(right.subplots(), results["targets"])
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
        epochs = [json.loads(line) for line in (out / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        axis.plot([e["epoch"] for e in epochs], [e["top1"] for e in epochs], color=_COLOURS[head], label=f"{head} head")
    axis.set(xlabel="epoch", title="Source: top-1 on unseen icon families (%)", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc="lower right")


def _draw_transfer(axis: Any, targets: list[dict[str, Any]]) -> None:
    heights = range(len(targets))[::-1]
    for y, target in zip(heights, targets, strict=True):
        for head, shift in (("learned", 0.1), ("ETF", -0.1)):
            axis.plot(target[head]["interval"], [y + shift] * 2, color=_COLOURS[head], linewidth=2)
            axis.plot(target[head]["accuracy"], y + shift, "o", color=_COLOURS[head])
        difference, (low, high) = target["difference"]["accuracy"], target["difference"]["interval"]
        text = f"ETF - learned: {difference:+.1f} ({low:+.1f} to {high:+.1f})"
        axis.annotate(text, (1.0, y + 0.27), xycoords=("axes fraction", "data"), ha="right", fontsize=8.5)
    axis.set_yticks(heights, [f"{t['target']}\n{t['classes']} classes" for t in targets])
    axis.set(ylim=(-0.6, len(targets) - 0.4), xlabel="accuracy (%), 95 % over test images, one seed")
    axis.set_title("Transfer: linear probe of the frozen features")
    axis.grid(axis="x", alpha=0.3)
