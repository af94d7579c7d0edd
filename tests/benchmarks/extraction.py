"""Forward passes in channels-last order and small batches beside what they replaced, on CPUs.

    python tests/benchmarks/extraction.py

Each row is one architecture and the same images, taken alternately: batches of 256 in the plain order and in
channels-last order, and batches of 64 in channels-last order, which `features.extract` takes on a CPU.
"""

import statistics
import time
from collections.abc import Callable

import timm
import torch

SIDES = {
    "resnet10t": 40,
    "resnet18": 64,
    "resnet50": 96,
    "efficientnet_lite0": 128,
    "mobilenetv3_small_100": 96,
    "convnext_atto": 96,
    "vit_tiny_patch16_224": 96,
}
WAYS = ((256, torch.contiguous_format), (256, torch.channels_last), (64, torch.channels_last))
ROUNDS = 3


def timed(name: str, side: int) -> Callable[[int, torch.memory_format], float]:
    """A function that passes 256 images through the network and returns its seconds."""
    model = timm.create_model(name, num_classes=0, **({"img_size": side} if name.startswith("vit") else {})).eval()
    images = torch.randn(256, 3, side, side)

    @torch.inference_mode()
    def take(batch: int, order: torch.memory_format) -> float:
        started = time.perf_counter()
        for pixels in images.split(batch):
            model(pixels.to(memory_format=order))
        return time.perf_counter() - started

    take(64, torch.channels_last)
    return take


if __name__ == "__main__":
    print("| model, pixels | 256, plain: images/s | 256, channels-last | 64, channels-last | ratio |")
    print("|---|---|---|---|---|", flush=True)
    for name, side in SIDES.items():
        take = timed(name, side)
        times = [[take(*way) for way in WAYS] for _ in range(ROUNDS)]
        ratios = sorted(first / last for first, _, last in times)
        shown = " | ".join(f"{256 / statistics.median(column):.1f}" for column in zip(*times, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name}, {side} | {shown} | {spread} |", flush=True)
