"""What a run spends its time on, and what to change about it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from timm_etf.pretrain.config import PretrainConfig

PARTS = {
    "waiting": "waiting for images",
    "stepping": "stepping",
    "validating": "validating",
    "saving": "saving",
}
"""What time is spent on, and how a line says it."""


class Clock:
    """Seconds by what they were spent on, since the last lap.

    On a GPU, steps are computed while the process goes on: where the GPU is the slower of the two, what is waited for
    it counts as stepping.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add what the block takes to a part, less what the block itself has measured as another."""
        started, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started - (sum(self.seconds.values()) - inner)

    def waits(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass batches on, and measure what it takes to get them."""
        iterator, end = iter(batches), object()
        while True:
            with self.measure("waiting"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


def shares(seconds: dict[str, float]) -> str:
    """The parts of the time in percent, without those that round to none."""
    total = sum(seconds.values()) or 1.0
    percent = {words: f"{100 * seconds[part] / total:.0f}" for part, words in PARTS.items()}
    return ", ".join(f"{share} % {words}" for words, share in percent.items() if share != "0")


def advice(seconds: dict[str, float], config: PretrainConfig, device: torch.device) -> str:
    """The option that is most likely to shorten the run; empty if none is left.

    Args:
        seconds: Of an epoch, by part.
        config: The run's settings.
        device: What it trains on.
    """
    total = sum(seconds.values()) or 1.0
    if seconds["waiting"] > 0.1 * total:
        return f"more loader processes (--workers, now {config.workers}) or smaller image files"
    if seconds["saving"] > 0.1 * total:
        return "fewer checkpoints (--checkpoint-steps, --checkpoint-minutes)"
    if seconds["validating"] > 0.3 * total:
        return "a smaller --val-split" + (", or no --model-ema, which validates twice" if config.model_ema else "")
    if device.type != "cuda":
        return ""
    faster = {"--amp bf16": config.amp in ("bf16", "fp16"), "--compile": config.compile}
    return " or ".join(option for option, taken in faster.items() if not taken)
