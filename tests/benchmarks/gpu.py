"""Images per second of pretraining on a GPU: from an image folder, beside the same loop on images in its memory.

    python -m tests.benchmarks.gpu

resnet50 and resnet50_etf at 224 pixels in bf16 and channels-last order, batches of 256, with the augmentation of
examples/imagenet/classic.yaml, as they are and compiled. The drawn JPEGs have 256 pixels a side, or 432, about as many
pixels as ImageNet's images have. Rates are of the steps after the first WARM ones: by then the loader's queue is as
full or empty as it stays.
"""

import argparse
import dataclasses
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.throughput import draw
from timm_etf.pretrain import data, loop
from timm_etf.pretrain.clock import Clock, shares
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.setup import Run, setup
from timm_etf.watch import Watch

BATCH, CLASSES = 256, 64
WARM, TIMED = 40, 40
"""Steps before the clock starts, and steps that it counts."""


class Measured:
    """Passes on the batches of an epoch, and starts the clock after WARM of them."""

    def __init__(self, batches: Any, clock: Clock) -> None:
        self.batches, self.clock, self.started = batches, clock, 0.0
        self.batches_per_epoch = self.steps_per_epoch = WARM + TIMED

    def epoch(self, epoch: int, first_batch: int) -> Iterator[Any]:
        """The batches, as `TrainLoader.epoch` gives them."""
        for number, batch in zip(range(self.steps_per_epoch), self.batches.epoch(epoch, first_batch), strict=False):
            if number == WARM:
                torch.cuda.synchronize()
                self.clock.lap()
                self.started = time.perf_counter()
            yield batch


class Resident:
    """One batch of random images in the GPU's memory, again and again."""

    def __init__(self, device: torch.device) -> None:
        images = torch.randint(256, (BATCH, 3, 224, 224), dtype=torch.uint8, device=device)
        self.batch = images, torch.randint(CLASSES, (BATCH,), device=device)

    def epoch(self, epoch: int, first_batch: int) -> Iterator[Any]:
        """That batch, for ever."""
        while True:
            yield self.batch


def rate(run: Run, batches: Any) -> tuple[float, str]:
    """Images per second of an epoch's steps after the first ones, and what the time went into."""
    clock = Clock(run.accelerator.device)
    real, run.train = run.train, Measured(batches, clock)  # type: ignore[assignment]
    with loop._progress(run) as bar, Watch(run.accelerator, None, None) as watch:
        loop._train_epoch(run, watch, clock, bar)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - run.train.started  # type: ignore[attr-defined]
    run.train = real
    return BATCH * TIMED / seconds, shares(clock.lap())


def row(model: str, folders: list[Path], workers: int, *, compiled: bool) -> str:
    """One model, from memory and from the folders."""
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        config = PretrainConfig(
            model=model,
            data_dir=folders[0],
            out=Path(out) / "run",
            img_size=224,
            batch_size=BATCH,
            color_jitter=0.0,
            epochs=1,
            epoch_repeats=1000,
            warmup_epochs=0,
            smoothing=0.0,
            workers=workers,
            amp="bf16",
            compile=compiled,
        )
        run = setup(config)
        run.on_record = True  # nothing is written
        run.close()
        resident, _ = rate(run, Resident(run.accelerator.device))
        cells = [f"{resident:.0f}"]
        for folder in folders if compiled else []:
            taken = dataclasses.replace(config, data_dir=folder)
            images = data.open_task(taken).train
            images.transform, _ = data.transforms(taken, run.data_config)  # type: ignore[attr-defined]
            loader = data.TrainLoader(images, taken, 0, 1)
            try:
                loaded, parts = rate(run, loader)
            finally:
                loader.loader.close()
            cells.append(f"{loaded:.0f} ({loaded / resident:.2f}; {parts})")
    cells += ["-"] * (1 + len(folders) - len(cells))
    cells.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f}")
    return f"| {model} | {'yes' if compiled else 'no'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.workers} loader processes")
    print("| model | compiled | images/s, from memory | from files of 256 pixels | of 432 pixels | peak GiB |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor() as pool:
        sides = (256, 432)
        drawn = [pool.submit(draw, Path(root) / str(side), CLASSES, options.images, side) for side in sides]
        folders = [future.result() for future in drawn]
        for model in ("resnet50", "resnet50_etf"):
            for compiled in (False, True):
                print(row(model, folders, options.workers, compiled=compiled), flush=True)
                torch.compiler.reset()
                gc.collect()


if __name__ == "__main__":
    main()
