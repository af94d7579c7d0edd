"""Spherical codes: coherence reached, its bound, random vectors, seconds and peak memory; orbits beside a general code.

    python tests/benchmarks/spherical_codes.py

Every code is computed anew (nothing is read from the cache), each in a process of its own, so that the peak memory is
its own; the process's memory before the computation is subtracted.
"""

import resource
import subprocess
import sys
import time

import torch

from timm_etf import frames
from timm_etf.frames import codes

SHAPES = ((1000, 192), (1000, 384), (21843, 768))


def descend(num_classes: int, dim: int, steps: int = 1500) -> torch.Tensor:
    """The plain way: log-sum-exp descent on K free vectors with the same schedule, over the whole K x K matrix."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(num_classes, dim, generator=generator), dim=1).requires_grad_()
    optimizer = torch.optim.Adam([w], betas=(0.9, 0.99))
    diagonal = torch.eye(num_classes) * 1e4
    for step in range(steps):
        done = step / steps
        optimizer.param_groups[0]["lr"] = 0.1 / dim**0.5 * (1 + torch.tensor(torch.pi * done).cos().item()) / 2 + 1e-5
        beta = dim**0.5 * 250**done
        unit = torch.nn.functional.normalize(w, dim=1)
        optimizer.zero_grad()
        (torch.logsumexp(beta * (unit @ unit.T - diagonal).flatten(), 0) / beta).backward()
        optimizer.step()
    return w.detach()


def main(num_classes: int, dim: int, how: str) -> None:
    """Compute one code and print its row."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if how == "orbits":
        order = codes._orbit_order(num_classes, dim)
        x = codes._optimise(-(-num_classes // order), dim // order, order, name="code")
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        w = codes._orbits(x)[:num_classes]
    else:
        w = descend(num_classes, dim)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    bound = frames.bound(num_classes, dim)
    random = frames.coherence(frames.gaussian(num_classes, dim))
    print(
        f"| {num_classes}, {dim} | {how} | {frames.coherence(w):.4f} | {bound:.4f} | {random:.3f} | {seconds:.1f} | "
        f"{peak / 1024:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        print("| K, d | how | largest cosine | bound | random directions | seconds | peak memory, MiB |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for num_classes, dim in SHAPES:
            # A general code of 21,843 classes would hold several matrices of 2 GB and do some 2e12 operations a step.
            for how in ("orbits", "general") if num_classes < 5000 else ("orbits",):
                subprocess.run([sys.executable, __file__, str(num_classes), str(dim), how], check=True)
