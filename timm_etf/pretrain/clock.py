"""What a run spends its time on, and what to change about it."""

import time
from collections import deque
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

    On a GPU, steps are computed while the process goes on: waiting for images counts as such only as far as the GPU has
    waited, too, and as stepping while it was still busy.

    Args:
        device: What computes the steps.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._waits: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()

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
            idle_from, before = self._event(), self.seconds["waiting"]
            with self.measure("waiting"):
                batch = next(iterator, end)
            if idle_from:
                self._waits.append((self.seconds["waiting"] - before, idle_from, self._event()))
                self._settle()
            if batch is end:
                return
            yield batch

    def _event(self) -> Any:
        """The moment at which the GPU has done what it was asked for."""
        if self._gpu is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def _settle(self) -> None:
        """Count as stepping what was waited while the GPU was busy, as far as the GPU has come."""
        while self._waits and self._waits[0][2].query():
            waited, idle_from, idle_to = self._waits.popleft()
            busy = waited - min(waited, idle_from.elapsed_time(idle_to) / 1000)
            self.seconds["waiting"] -= busy
            self.seconds["stepping"] += busy

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap."""
        if self._waits:
            self._waits[-1][2].synchronize()
            self._settle()
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
