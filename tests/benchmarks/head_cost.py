"""Cost of a fixed classifier beside a trained `nn.Linear`: forward, backward and optimizer step, in one run.

    python tests/benchmarks/head_cost.py [--device cuda]

Prints, for each (batch, width, classes), the median milliseconds of both, taken alternately, their ratio, and the
gradient and optimizer bytes that the fixed one does not have. The head's input needs its gradient, as under a backbone.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from timm_etf import FixedClassifier, frames

SHAPES = ((256, 2048, 1000), (256, 1280, 1000), (128, 2048, 21843))
ROUNDS = 15


def step(head: nn.Module, optimizer: torch.optim.Optimizer | None, x: torch.Tensor, targets: torch.Tensor) -> float:
    """Seconds of one training step of the head."""
    _wait(x.device)
    started = time.perf_counter()
    x.grad = None
    nn.functional.cross_entropy(head(x), targets).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    _wait(x.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(batch: int, dim: int, num_classes: int, device: str) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    linear = nn.Linear(dim, num_classes, device=device)
    # The values do not matter for the time, and a spherical code for 21,843 classes takes a minute to compute.
    fixed = FixedClassifier(frames.gaussian(num_classes, dim).float(), bias=True, frame="gaussian").to(device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-5)
    x = torch.randn(batch, dim, device=device, requires_grad=True)
    targets = torch.randint(num_classes, (batch,), device=device)
    times = [(step(linear, optimizer, x, targets), step(fixed, None, x, targets)) for _ in range(ROUNDS + 3)][3:]
    trained, frozen = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(f / t for t, f in times)
    parameters = sum(p.numel() for p in linear.parameters())
    return (
        f"| {batch}, {dim}, {num_classes} | {trained:.3g} | {frozen:.3g} | {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {4 * parameters / 1e6:.1f} MB + {4 * parameters / 1e6:.1f} MB |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    where = parser.parse_args().device
    print("| batch, width, classes | nn.Linear + SGD, ms | FixedClassifier, ms | ratio | gradient + momentum saved |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        print(measure(*shape, where), flush=True)
