"""Training steps in channels-last order beside the plain one, on CPUs: `python tests/benchmarks/channels_last.py`.

Each row is one architecture: forward, backward and SGD step of the same model and batch, taken alternately.
"""

import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

CASES = {
    "resnet18": (64, 64),
    "resnet10t": (40, 64),
    "resnet50": (224, 8),
    "efficientnet_lite0": (64, 32),
    "mobilenetv3_small_100": (96, 32),
    "regnetx_002": (64, 64),
    "densenet121": (64, 16),
    "convnext_atto": (96, 16),
    "vit_tiny_patch16_224": (96, 16),
}
"""Image side and batch."""

ROUNDS = 5


def step(name: str, size: int, batch: int, memory_format: torch.memory_format) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    model = timm.create_model(name, num_classes=20, **({"img_size": size} if name.startswith("vit") else {}))
    model.to(memory_format=memory_format)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)
    labels = torch.randint(20, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def take() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - started

    take()
    return take


if __name__ == "__main__":
    print("| model, pixels, batch | plain, images/s | channels-last | ratio |\n|---|---|---|---|")
    for name, (size, batch) in CASES.items():
        plain, last = (step(name, size, batch, m) for m in (torch.contiguous_format, torch.channels_last))
        times = [(plain(), last()) for _ in range(ROUNDS)]
        ratios = sorted(p / c for p, c in times)
        shown = " | ".join(f"{batch / statistics.median(column):.1f}" for column in zip(*times, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name}, {size}, {batch} | {shown} | {spread} |", flush=True)
