"""How often three converted checkpoints agree with the originals on images that the conversion did not see.

    python examples/convert/measure.py OUT

OUT is what prepare.py and run.sh have filled. Writes OUT/results.json and OUT/agreement.png.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

import timm_etf
from timm_etf.report.results import write

SETS = {"stamps": "images/validation", "emoji": "emoji/validation", "photographs": "photos/validation"}
STAGES = ("random simplex", "exchanged", "frame turned", "backbone tuned")
PIXELS = 128


def stages(out: Path, size: int) -> dict[str, Any]:
    """The models by what was done to them."""
    name = f"local-dir:{out / f'lite{size}'}"
    found = {
        "original": timm.create_model(name, pretrained=True),
        "random simplex": timm_etf.fix_classifier(timm.create_model(name, pretrained=True)),
        "exchanged": timm_etf.fix_classifier(timm.create_model(name, pretrained=True), frame="nearest"),
        "frame turned": timm_etf.create_model(f"local-dir:{out / f'conv{size}' / 'turned'}", pretrained=True),
        "backbone tuned": timm_etf.create_model(f"local-dir:{out / f'conv{size}' / 'export'}", pretrained=True),
    }
    return {stage: model.eval() for stage, model in found.items()}


@torch.inference_mode()
def answers(models: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Logits [N, K] of each model."""
    config = timm.data.resolve_data_config({"input_size": (3, PIXELS, PIXELS)}, model=models["original"])
    dataset = timm.data.ImageDataset(str(folder), transform=timm.data.create_transform(**config))
    batches = [images for images, _ in torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=2)]
    return {stage: torch.cat([model(images) for images in batches]) for stage, model in models.items()}


def agreement(said: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """Percent of equal answers with a 95 % interval (Wilson), and among five; mean divergence, nats."""
    answer = said.argmax(1, keepdim=True)
    same = (logits.argmax(1, keepdim=True) == answer).sum().item()
    low, high = binomtest(same, len(said)).proportion_ci(method="wilson")
    p, q = said.double().log_softmax(1), logits.double().log_softmax(1)
    return {
        "images": len(said),
        "top1": 100 * same / len(said),
        "top1_interval": [100 * low, 100 * high],
        "top5": 100 * (logits.topk(5).indices == answer).any(1).double().mean().item(),
        "divergence": (p.exp() * (p - q)).sum(1).mean().item(),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Agreement by stage, one panel for each set of images."""
    figure: Any = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(SETS), sharey=True)
    for axis, name in zip(axes, SETS, strict=True):
        for marker, (model, sets) in zip("os^", found.items(), strict=True):
            rows = [sets[name][stage] for stage in STAGES]
            errors = [
                [r["top1"] - r["top1_interval"][0] for r in rows],
                [r["top1_interval"][1] - r["top1"] for r in rows],
            ]
            axis.errorbar(range(len(rows)), [r["top1"] for r in rows], errors, marker=marker, capsize=2, label=model)
        axis.set_xticks(range(len(STAGES)), [stage.replace(" ", "\n") for stage in STAGES])
        axis.set(title=f"{name} ({rows[0]['images']})", ylim=(0, 100))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("same answer as the original (%)")
    axes[-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main(out: Path) -> None:
    """Measure and draw."""
    found: dict[str, Any] = {}
    for size in (0, 1, 2):
        models = stages(out, size)
        originals = {k: v for k, v in models["original"].state_dict().items() if not k.startswith("classifier")}
        turned = models["frame turned"].state_dict()
        assert all(torch.equal(turned[k], v) for k, v in originals.items()), "turning leaves the backbone alone"
        for name, folder in SETS.items():
            said = answers(models, out / folder)
            rows = {stage: agreement(said["original"], said[stage]) for stage in STAGES}
            found.setdefault(f"lite{size}", {})[name] = rows
            shown = ", ".join(f"{stage} {row['top1']:.1f} %" for stage, row in rows.items())
            print(f"lite{size} on {rows['exchanged']['images']} {name}: {shown}", flush=True)
    write(out / "results.json", {"pixels": PIXELS, "agreement": found})
    draw(found, out / "agreement.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
