"""Start, memory and resume of `timm-etf pretrain` on as many files as ImageNet has, beside timm's own train.py.

    python -m tests.benchmarks.imagenet_sized --train-py train.py

The folder is made of hard links to 1,300 drawn JPEGs, 1,000 classes, and a quarter of it likewise. Seconds are from the
start of the command to the end of its first step, the least of all rounds, which take turns; the memory of a loader
worker is what it shares with no other process, at that moment and 100,000 images later.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.throughput import WITH_ETF, draw

CLASSES, DIFFERENT, BATCH, LATER = 1000, 1300, 128, 800
"""Classes, files that are not links, images of a step, and the step at which memory is read again."""
RESUMED = "timm-etf, --resume"
SIZES = {"quarter": (320_292, 12_000), "full": (1_281_167, 50_000)}

OURS = """
import os, sys
from timm_etf import cli
from timm_etf.pretrain.step import Step

call, steps = Step.__call__, 0

def counted(*arguments):
    global steps
    out = call(*arguments)
    steps += 1
    print("step", steps, flush=True)
    return out

Step.__call__ = counted
cli.main()
"""


def linked(root: Path, files: list[Path], train: int, validation: int) -> Path:
    """Image folder of hard links; it is taken as it is where it is already there."""
    if root.exists():
        return root
    for split, count in (("train", train), ("validation", validation)):
        for k in range(CLASSES):
            folder = root / split / f"n{k:08d}"
            folder.mkdir(parents=True)
            for i in range(k, count, CLASSES):
                os.link(files[i % len(files)], folder / f"{i}.jpg")
    return root


def private(pid: int) -> float:
    """MiB that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+)", text, re.MULTILINE)) / 1024


def peak(pid: int) -> float:
    """MiB that a process has held at most."""
    found = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def watch(command: list[object], step_of: Callable[[str], int | None], last: int) -> dict[str, Any]:
    """Run a command up to a step; seconds to its first one, and memory there and at the last."""
    started, found = time.perf_counter(), dict[str, Any]()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    tail = []
    for line in process.stdout:
        tail = [*tail[-20:], line]
        if (step := step_of(line)) is None:
            continue
        if step >= 1 and "first" not in found:
            found["first"] = time.perf_counter() - started
            found["workers"] = [_workers(process.pid)]
        if step >= last:
            found["workers"].append(_workers(process.pid))
            found["peak"] = peak(process.pid)
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    process.wait()
    if "peak" not in found:
        raise SystemExit("".join(tail))
    return found


def _workers(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    images = [child for child in children if b"multiprocessing" not in Path(f"/proc/{child}/cmdline").read_bytes()]
    return statistics.mean(private(int(child)) for child in images)


def ours(data: Path, out: Path, workers: int, *more: object) -> list[object]:
    """The command of this package."""
    command = [sys.executable, "-c", OURS, "pretrain", "--model", "test_resnet_etf", "--data-dir", data, "--out", out]
    command += ["--img-size", 32, "--batch-size", BATCH, "--workers", workers, "--warmup-epochs", 0, "--epochs", 1]
    return [*command, *more]


def timms(train_py: Path, data: Path, out: Path, workers: int) -> list[object]:
    """The same of train.py."""
    command = [sys.executable, "-u", "-c", WITH_ETF, train_py, "--model", "test_resnet_etf", "--data-dir", data]
    command += ["--output", out, "--img-size", 32, "-b", BATCH, "-j", workers, "--num-classes", CLASSES]
    return [*command, "--device", "cpu", "--log-interval", 1, "--epochs", 1, "--warmup-epochs", 0, "--opt", "sgd"]


def our_step(line: str) -> int | None:
    """Number of the step that a line of ours tells of."""
    found = re.search(r"step (\d+)$", line)
    return int(found[1]) if found else None


def their_step(line: str) -> int | None:
    """The same of train.py, which counts from 0."""
    found = re.search(r"Train: 0 \[ *(\d+)/", line)
    return int(found[1]) + 1 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-py", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the images here, to be used again")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    options = parser.parse_args()
    print("| images | who | seconds to step 1 | peak of the main process, MiB | a worker, MiB | 100,000 later |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        drawn = draw(root / "drawn", 1, DIFFERENT, 64)
        files = sorted((drawn / "train").rglob("*.jpg"))
        for size in options.sizes:
            data, rounds = linked(root / size, files, *SIZES[size]), dict[str, list[dict[str, Any]]]()
            for k in range(options.rounds):
                out = Path(temporary) / f"out-{size}-{k}"
                commands = {
                    "train.py": (timms(options.train_py, data, out / "timm", options.workers), their_step, LATER),
                    "timm-etf": (ours(data, out / "ours", options.workers), our_step, LATER),
                    RESUMED: (ours(data, out / "ours", options.workers, "--resume"), our_step, 1),
                }
                for who, command in commands.items():
                    rounds.setdefault(who, []).append(watch(*command))
            for who, found in rounds.items():
                least = min(f["first"] for f in found)
                memory = [f"{w:.1f}" for w in found[0]["workers"]]
                cells = [f"{least:.1f}", f"{found[0]['peak']:.0f}", memory[0], "-" if who == RESUMED else memory[1]]
                print(f"| {SIZES[size][0]:,} | {who} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
