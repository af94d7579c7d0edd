"""The processes of a launcher: which one speaks, how they share work, and where they compute exactly."""

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, a request to end, and what schedulers such as SLURM announce the end of a job's time with."""


def is_first_process() -> bool:
    """Whether this process prints for all; known from the launcher's environment, before accelerate is imported."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> "PartialState":
    """The processes that a launcher started, on CPUs, too: there PartialState() alone takes each for the only one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def exact_device(device: Any) -> "torch.device":
    """`device` where it computes in float64, else the CPU: Apple's GPUs cannot, and of Intel's only some can."""
    import torch

    device = torch.device(device)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def any_problem(mine: str) -> str:
    """The first process' problem that is not empty: all stop together, or the others would wait for ever for one."""
    if processes().num_processes == 1:
        return mine
    from accelerate.utils import gather_object

    return next((p for p in gather_object([mine]) if p), "")
