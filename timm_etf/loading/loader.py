"""Processes that load batches, and what is left of an image for the device."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from timm_etf.processes import SIGNALS


class Loader(DataLoader[Any]):
    """A loader whose processes leave signals to the main process, and which therefore has to be closed.

    Args:
        dataset: What to load.
        batch_size: Samples of a batch.
        workers: Loader processes, 0 for none.
        persistent_workers: Whether they serve the next epoch, too.
        **kwargs: Further arguments of torch's `DataLoader`.
    """

    def __init__(
        self, dataset: Any, batch_size: int, workers: int, *, persistent_workers: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=_ignore_signals,
            # Its own generator, so that making an iterator leaves the model's random state alone.
            generator=torch.Generator(),
            **kwargs,
        )
        self._batches: Any = None

    def __iter__(self) -> Any:
        self._batches = None  # ends the processes of a stream's last epoch, before others take their place
        with _signals_wait():
            self._batches = super().__iter__()
        return self._batches

    def close(self) -> None:
        """End the processes.

        Python ends what is left at its own exit with the SIGTERM that they ignore, and then waits for them for ever.
        """
        if self._batches is not None and self.num_workers:
            self._batches._shutdown_workers()
            for process in self._batches._workers:  # one that hangs, such as in a read from a network disk
                process.kill()
                process.join()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Start processes with these signals blocked, so that none hits them before they ignore it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Let the main process alone answer signals: it saves a checkpoint while the workers still serve it."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class Pixels:
    """What timm's transforms leave to the device: a batch is moved there, normalised and, in training, erased from.

    Erasing draws from the process's own random state, which checkpoints save.

    Args:
        data_config: timm's preprocessing: `mean` and `std` of each channel, of pixels in [0, 1], and `input_size`.
        device: Where the model is.
        channels_last: Whether images get that order in memory.
        reprob: Probability of random erasing.
    """

    def __init__(
        self, data_config: dict[str, Any], device: torch.device, *, channels_last: bool = False, reprob: float = 0.0
    ) -> None:
        self.device, self.shape = device, tuple(data_config["input_size"])
        self.mean, self.std = (
            torch.tensor([255 * value for value in data_config[key]], device=device).view(1, -1, 1, 1)
            for key in ("mean", "std")
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.erasing = RandomErasing(reprob, device=device)

    def __call__(self, images: torch.Tensor, *, training: bool = False) -> torch.Tensor:
        """Normalised float32 images of uint8 images, both [B, C, H, W]."""
        moved = images.to(self.device, non_blocking=True)
        x = moved.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
        return self.erasing(x) if training and self.erasing.probability else x
