"""Frames, heads, collapse metrics and a probe with 1,000, 21,843 (ImageNet-21k) and 100,000 classes.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.many_classes

Every row of frames and metrics is from a process of its own, in its CPU seconds; the memory is its peak over what it
held before. A frame is made twice: computed, into a cache that was empty, and by another process, from that cache.
The probe (`probe SAMPLES WIDTH CLASSES STRENGTHS`, a row that is asked for) takes hours with all of its 45 strengths
and as much memory with the strongest few; its peak is that of the process.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from tests.benchmarks import head_cost
from timm_etf import frames
from timm_etf.features.extract import Features
from timm_etf.geometry.moments import ClassMoments
from timm_etf.geometry.neural_collapse import collapse
from timm_etf.transfer import probe as probing

FRAMES = ((1000, 512), (1000, 2048), (21843, 512), (21843, 2048), (100000, 512))
HEADS = ((256, 512, 1000), (256, 512, 21843), (256, 2048, 21843), (256, 512, 100000))
METRICS = ((1000, 2048), (21843, 512), (21843, 2048))
"""Classes and width; of heads the batch, the width and the classes."""
BATCH, ROUNDS = 256, 9


def peak() -> float:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def frame(num_classes: int, dim: int) -> str:
    """CPU seconds and peak memory of the default frame."""
    before, started = peak(), time.process_time()
    frames.make("auto", num_classes, dim)
    return f"{time.process_time() - started:.2f} | {(peak() - before) / 2**20:.0f}"


def metrics(num_classes: int, dim: int) -> str:
    """Milliseconds of a batch's update, and seconds and peak memory of the metrics, for two samples of every class."""
    torch.manual_seed(0)
    weight = torch.randn(num_classes, dim)
    moments, milliseconds = ClassMoments.empty(num_classes, dim), []
    for classes in (*torch.arange(2 * num_classes).split(BATCH), *torch.randint(num_classes, (ROUNDS, BATCH))):
        y = classes % num_classes
        x = weight[y] + torch.randn(len(y), dim)
        started = time.process_time()
        moments.update(x, y)
        milliseconds.append(1000 * (time.process_time() - started))
    held, started = peak(), time.process_time()
    collapse(moments, weight)
    seconds, more = time.process_time() - started, (peak() - held) / 2**20
    return f"{statistics.median(milliseconds[-ROUNDS:]):.0f} | {seconds:.1f} | {more:.0f}"


def probe(samples: int, dim: int, num_classes: int, strengths: int) -> str:
    """Seconds, CPU seconds, peak memory and accuracy of a linear probe that tries the strongest few strengths."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_classes, dim), np.float32)
    names = tuple(map(str, range(num_classes)))

    def features(count: int) -> Features:
        x, y = rng.standard_normal((count, dim), np.float32), np.arange(count) % num_classes
        for part in range(0, count, 8192):
            x[part : part + 8192] = 12 * x[part : part + 8192] + centres[y[part : part + 8192]]
        return Features(x, y, names)

    train, test = features(samples), features(10 * num_classes)
    probing.STRENGTHS = probing.STRENGTHS[-strengths:]
    started, used = time.perf_counter(), time.process_time()
    accuracy = 100 * probing.linear_probe(train, test).correct.mean()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    return f"{seconds:.0f} | {used:.0f} | {peak() / 2**20:.0f} | {accuracy:.1f}"


def in_process(what: str, num_classes: int, dim: int, cache: str) -> str:
    """What a function above returns in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.many_classes", what, str(num_classes), str(dim)]
    environment = os.environ | {"HF_ASSETS_CACHE": cache}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", help="one row alone: frame or metrics, classes, width; or probe")
    if row := parser.parse_args().row:
        print({"frame": frame, "metrics": metrics, "probe": probe}[row[0]](*map(int, row[1:])))
        return
    with tempfile.TemporaryDirectory() as cache:
        print("| classes, width | frame | computed, s | peak MiB | from the cache, s | peak MiB |")
        print("|---|---|---|---|---|---|", flush=True)
        for shape in FRAMES:
            first, again = (in_process("frame", *shape, cache) for _ in range(2))
            name = frames.resolve("auto", *shape)
            cells = [name, first, again if name == "spherical_code" else "- | -"]  # the others are not cached
            print(f"| {shape[0]}, {shape[1]} | {' | '.join(cells)} |", flush=True)
        print("\n| classes, width | update of a batch, ms | metrics, s | peak MiB |")
        print("|---|---|---|---|", flush=True)
        for shape in METRICS:
            print(f"| {shape[0]}, {shape[1]} | {in_process('metrics', *shape, cache)} |", flush=True)
    print("\n| batch, width, classes | nn.Linear + SGD, ms | FixedClassifier, ms | ratio | gradient + momentum saved |")
    print("|---|---|---|---|---|", flush=True)
    for head in HEADS:
        print(head_cost.measure(*head, "cpu"), flush=True)


if __name__ == "__main__":
    main()
