"""Cost of the losses over a batch beside cross-entropy: head, loss and backward pass at 4,096 x 2,048, 1,000 classes.

    python tests/benchmarks/batch_losses.py

Medians of rounds in which the losses take turns, and the ratio to cross-entropy with its range; then, of one round, the
peak of the process's memory above what it held before.
"""

import re
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from timm_etf import FixedClassifier, frames
from timm_etf.losses import NONLLoss, NTCELoss

BATCH, DIM, CLASSES, ROUNDS = 4096, 2048, 1000, 9
LOSSES = {"cross-entropy": nn.CrossEntropyLoss(), "NTCE": NTCELoss(), "NONL": NONLLoss()}


def memory(field: str) -> int:
    """A line of /proc/self/status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) // 1024


def main() -> None:
    torch.manual_seed(0)
    head = FixedClassifier(10 * frames.simplex(CLASSES, DIM).float(), feature_norm=True)
    x, y = torch.randn(BATCH, DIM, requires_grad=True), torch.randint(CLASSES, (BATCH,))

    def step(loss: nn.Module) -> float:
        x.grad = None
        started = time.perf_counter()
        loss(head(x), y).backward()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(ROUNDS + 1):
        for name, loss in LOSSES.items():
            seconds[name].append(step(loss))
    print("| loss | ms | beside cross-entropy | peak MiB |\n|---|---|---|---|")
    for name, loss in LOSSES.items():
        x.grad = None
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        step(loss)
        peak = memory("VmHWM") - before
        ratios = sorted(t / c for t, c in zip(seconds[name][1:], seconds["cross-entropy"][1:], strict=True))
        cells = [f"{1000 * statistics.median(seconds[name][1:]):.0f}"]
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"| {name} | {' | '.join(cells)} | {peak} |")


if __name__ == "__main__":
    main()
