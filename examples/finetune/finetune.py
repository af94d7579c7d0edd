"""Fine-tune the checkpoint that comes with timm_etf on your images, beside the same backbone from scratch.

    python examples/finetune/finetune.py                      # Greek letters and MNIST, drawn here: extra [demo]
    python examples/finetune/finetune.py --data MY_IMAGES     # MY_IMAGES/train/CLASS/*, MY_IMAGES/test/CLASS/*

Both get the same few images of each class, number of steps and choice of learning rate: each rate is tried on a fifth
of the training images, and the best one is used on all of them.
"""

import argparse
import json
import statistics
from pathlib import Path

import timm
import timm.optim
import timm.scheduler
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from timm_etf import data  # importing timm_etf is what makes resnet10t_etf known to timm

RATES = (0.3, 0.1, 0.03)


def create(pretrained: bool, num_classes: int) -> nn.Module:
    """The published backbone or a fresh one, with a fresh trainable classifier."""
    if not pretrained:
        return timm.create_model("resnet10t", num_classes=num_classes)
    model = timm.create_model("resnet10t_etf", pretrained=True)
    model.reset_classifier(num_classes)
    return model


def finetune(model: nn.Module, train: Dataset, epochs: int, lr: float, bar: tqdm) -> nn.Module:
    """SGD with a cosine schedule, all layers."""
    loader = DataLoader(train, batch_size=32, shuffle=True)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=lr, weight_decay=5e-4, momentum=0.9)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, updates_per_epoch=len(loader), step_on_epochs=False
    )
    model.train()
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(loader):
            scheduler.step_update(epoch * len(loader) + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            bar.update(len(images))
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Top-1 in percent."""
    model.eval()
    hits = [model(x).argmax(1) == y for x, y in DataLoader(images, batch_size=256)]
    return 100 * torch.cat(hits).float().mean().item()


def measure(root: Path, pretrained: bool, per_class: int, epochs: int, seed: int) -> tuple[float, float]:
    """Test accuracy, and the learning rate that a fifth of the training images chose."""
    splits = [timm.data.create_dataset("folder", str(root / split)) for split in ("train", "test")]
    names = splits[0].reader.class_to_idx
    # The preprocessing of the checkpoint for both, without random flips, which letters and digits do not survive.
    config = timm.data.resolve_data_config(model=timm.create_model("resnet10t_etf.icons400", pretrained=True))
    for images in splits:
        images.transform = timm.data.create_transform(**config)
    torch.manual_seed(seed)
    labels = torch.tensor([label for _, label in splits[0].reader.samples])
    order = torch.randperm(len(labels))
    chosen = [order[labels[order] == k][:per_class] for k in range(len(names))]
    held, rest, train = (
        Subset(splits[0], torch.cat(part).tolist())
        for part in ([c[: len(c) // 5] for c in chosen], [c[len(c) // 5 :] for c in chosen], chosen)
    )
    total = (len(RATES) * len(rest) + len(train)) * epochs
    with tqdm(
        total=total, unit="img", leave=False, desc=f"{root.name}, {'' if pretrained else 'not '}pretrained"
    ) as bar:
        tried = {}
        for lr in RATES:
            torch.manual_seed(seed)
            tried[lr] = accuracy(finetune(create(pretrained, len(names)), rest, epochs, lr, bar), held)
        best = max(tried, key=lambda lr: tried[lr])
        torch.manual_seed(seed)
        return accuracy(finetune(create(pretrained, len(names)), train, epochs, best, bar), splits[1]), best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", help="folders with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--per-class", type=int, default=20, help="training images of each class at most; at least 5")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the images are drawn without --data")
    parser.add_argument("--out", type=Path, help="results.json to write")
    arguments = parser.parse_args()
    roots = arguments.data
    if not roots:
        drawn = data.build_targets(arguments.root)
        roots = [drawn["letters-greek"], drawn["mnist-5k"]]
    print(
        f"test accuracy in % with up to {arguments.per_class} training images per class and {arguments.epochs} epochs: "
        f"mean of {arguments.seeds} seeds (each; learning rates)"
    )
    found = {}
    for root in roots:
        means = []
        for pretrained in (True, False):
            how = "resnet10t_etf, pretrained" if pretrained else "resnet10t, from scratch"
            runs = [
                measure(root, pretrained, arguments.per_class, arguments.epochs, seed)
                for seed in range(arguments.seeds)
            ]
            means.append(statistics.mean(a for a, _ in runs))
            each = ", ".join(f"{a:.1f}" for a, _ in runs)
            rates = ", ".join(f"{lr:g}" for _, lr in runs)
            measured = {"mean": means[-1], "accuracy": [a for a, _ in runs], "lr": [lr for _, lr in runs]}
            found.setdefault(root.name, {})[how] = measured
            print(f"{root.name:<16}{how:<28}{means[-1]:6.1f}  ({each}; {rates})")
        print(f"{root.name:<16}{'difference':<28}{means[0] - means[1]:+6.1f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
