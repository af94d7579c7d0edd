"""When a run is to stop and when to save, as its processes agree."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from timm_etf.errors import Interrupted
from timm_etf.processes import SIGNALS


@contextmanager
def starts_again() -> Iterator[None]:
    """End at once on SIGUSR1, while there is nothing to save, with the status that has a scheduler start the run again.

    Raises:
        Interrupted: If it came.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, "Stopped before the first step; the same command starts again.")

    if not hasattr(signal, "SIGUSR1"):
        yield
        return
    before = signal.signal(signal.SIGUSR1, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Watch:
    """Remembers a first signal so that the loop can end after its step; a second one acts at once.

    Args:
        accelerator: The process and those beside it.
        every_steps: Steps between checkpoints inside an epoch; None for none.
        every_minutes: Minutes between checkpoints inside an epoch; None for none.
    """

    def __init__(self, accelerator: Accelerator, every_steps: int | None, every_minutes: float | None) -> None:
        self.accelerator, self.every_steps, self.every_minutes = accelerator, every_steps, every_minutes
        self.signum = 0
        """The signal that came; on every process, once they have agreed."""
        self.ends = self.saves = False
        """Whether the processes have agreed to end after this step, and to save."""
        self._saved_at = time.monotonic()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self._previous[signum])

    def after(self, step: int, *, last: bool) -> None:
        """Decide after a step; several processes agree every 10 steps and after the `last` of an epoch."""
        asked, late = self.signum, self._late()
        if self.accelerator.num_processes > 1:
            if step % 10 and not last:
                asked = late = 0
            else:  # a signal may have reached one process only, and clocks differ
                mine = torch.tensor([[asked, late]], device=self.accelerator.device)
                asked, late = self.accelerator.gather(mine).amax(0).tolist()
        if asked:
            self.signum, self.ends = asked, True
        self.saves = not last and bool(late or (self.every_steps and step % self.every_steps == 0))

    def _late(self) -> int:
        return int(self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes)

    def saved(self) -> None:
        """Count the minutes from now on."""
        self._saved_at = time.monotonic()
