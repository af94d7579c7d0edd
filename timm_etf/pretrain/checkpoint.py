"""Checkpoints of a run: whole or absent, and refused where they belong to another run."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_etf.errors import UsageError, first_line
from timm_etf.pretrain.config import PretrainConfig

_POSITION = "position.json"
_FREE_TO_CHANGE = {
    *("out", "data_dir", "workers", "tracker", "resume", "amp", "model", "compile", "channels_last"),
    *("grad_checkpointing", "checkpoint_hist", "checkpoint_steps", "checkpoint_minutes", "export"),
}
"""Settings that a resumed run may change; the model is compared by its resolved architecture."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps of epoch `epoch` (from 0) are done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    """Sum of the training losses of these steps on the first process, for the epoch's mean."""


def fingerprint(config: PretrainConfig, num_classes: int, world_size: int) -> dict[str, Any]:
    """The settings that decide what a run computes; a checkpoint fits a run with the same ones."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_TO_CHANGE}
    settings |= {"architecture": config.architecture, "num_classes": num_classes, "processes": world_size}
    settings["frame_seed"] = config.seed if config.frame_seed is None else config.frame_seed
    return json.loads(json.dumps(settings, default=str))


def check_resume(out: Path, expected: dict[str, Any]) -> None:
    """Refuse to resume a run that was started with other settings.

    Raises:
        UsageError: If there is no run in `out`, or it differs; the message names the first difference.
    """
    record = out / "run.json"
    if not record.exists():
        raise UsageError(f"No run to resume in {out}: leave out --resume to start one.")
    try:
        recorded = dict(json.loads(record.read_text(encoding="utf-8"))["settings"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UsageError(f"{record} is damaged ({first_line(e)}): restore it, or start again elsewhere.") from None
    # The model comes first in the message: its other settings differ because of it.
    for key in ("architecture", "num_classes", *sorted(expected)):
        if recorded.get(key) != expected[key]:
            raise UsageError(
                f"Cannot resume {out}: it was started with {key} {recorded.get(key)!r}, now it is {expected[key]!r}. "
                "Use the settings in its run.json, or another --out."
            )


def save(accelerator: Accelerator, out: Path, position: Position) -> Path:
    """Save model, optimizer, random states and position; called on every process.

    The folder is written under a temporary name and renamed, and only then are older ones removed: a kill at any moment
    leaves the newest whole checkpoint.
    """
    folder = out / "checkpoints"
    new = folder / f"epoch-{position.epoch:04d}-step-{position.step:06d}"
    if new.exists():
        return new
    unfinished = folder / f".unfinished-{new.name}"
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".unfinished-*"):  # of a save that was killed
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / _POSITION).write_text(json.dumps(dataclasses.asdict(position)), encoding="utf-8")
        unfinished.rename(new)
        for old in _all(out):
            if old != new:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return new


def load_newest(accelerator: Accelerator, out: Path) -> Position:
    """Load the newest checkpoint into the prepared model and optimizer.

    Returns:
        Its position; the start if the run was stopped before its first checkpoint.

    Raises:
        UsageError: If the checkpoint cannot be read.
    """
    checkpoints = _all(out)
    if not checkpoints:
        return Position()
    try:
        accelerator.load_state(str(checkpoints[-1]))
        return Position(**json.loads((checkpoints[-1] / _POSITION).read_text(encoding="utf-8")))
    except Exception as e:  # torch, safetensors and json each have their own errors for a damaged file
        raise UsageError(
            f"Cannot read the checkpoint {checkpoints[-1]} ({type(e).__name__}: {first_line(e)}): restore it, "
            "or start again with another --out."
        ) from e


def _all(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("epoch-*"))
