"""Checkpoints of a run: whole or absent, and refused where they belong to another run."""

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from timm_etf.atomic import UNFINISHED
from timm_etf.errors import UsageError, first_line
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.processes import any_problem

_POSITION = "position.json"
_FREE_TO_CHANGE = {
    *("out", "data_dir", "workers", "tracker", "resume", "amp", "model", "pretrained", "compile", "channels_last"),
    *("grad_checkpointing", "geometry", "checkpoint_hist", "checkpoint_steps", "checkpoint_minutes", "export"),
}
"""Settings that a resumed run may change; the model is compared by its resolved architecture."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps of epoch `epoch` (from 0) are done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    """Sum over these steps of the training loss, for the epoch's mean."""
    top1: float | None = None
    """Validation accuracy in percent after the epoch that ends here."""


def fingerprint(
    config: PretrainConfig, num_classes: int, world_size: int, held_out: str | None = None
) -> dict[str, Any]:
    """The settings that decide what a run computes; a checkpoint fits a run with the same ones."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_TO_CHANGE}
    settings |= {"architecture": config.architecture, "num_classes": num_classes, "processes": world_size}
    settings["init"], settings["held_out"] = config.initial_weights, held_out
    settings["warmup_epochs"] = config.warmup
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


def save(accelerator: Accelerator, out: Path, position: Position, keep: int, since: int = 0) -> Path:
    """Save model, optimizer, average, random states and position; called on every process.

    The folder is written under a temporary name and renamed, and only then are older ones removed, but for the `keep`
    newest and the best, from epoch `since` on: a kill at any moment leaves the newest whole checkpoint.
    """
    folder = out / "checkpoints"
    new = folder / f"epoch-{position.epoch:04d}-step-{position.step:06d}"
    if new.exists():
        return new
    unfinished = folder / f"{UNFINISHED}{new.name}"
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{UNFINISHED}*"):  # of a save that was killed
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / _POSITION).write_text(json.dumps(dataclasses.asdict(position)), encoding="utf-8")
        unfinished.rename(new)
        for old in set(all_of(out)[:-keep]) - {best(out, since)}:
            doomed = old.rename(folder / f"{UNFINISHED}{old.name}")  # a kill leaves no part of one that looks whole
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return new


def load_newest(accelerator: Accelerator, out: Path) -> Position:
    """Load the newest checkpoint that can be read into the prepared model and optimizer; called on every process.

    Returns:
        Its position; the start if the run was stopped before its first checkpoint.

    Raises:
        UsageError: If there are checkpoints and none can be read, or some processes see others than the rest.
    """
    seen = gather_object([[checkpoint.name for checkpoint in all_of(out)]])
    if any(names != seen[0] for names in seen):
        raise UsageError(
            f"The processes see different checkpoints in {out}: it has to be one folder that all machines share."
        )
    position, damaged = Position(), dict[Path, str]()
    for checkpoint in reversed(all_of(out)):
        problem = ""
        try:
            position = load(accelerator, checkpoint)
        except UsageError as e:
            problem = str(e)
        if not (problem := any_problem(problem)):  # one process alone must not go back
            break
        damaged[checkpoint] = problem
    else:
        for problem in damaged.values():
            raise UsageError(f"{problem}: restore it, or start again with another --out.")
    if accelerator.is_main_process:
        for path, problem in damaged.items():
            print(f"warning: {problem}; going back to the one before.", file=sys.stderr)
            path.rename(path.with_name(f"{UNFINISHED}{path.name}"))  # or the run would take it for saved
    return position


def load(accelerator: Accelerator, checkpoint: Path) -> Position:
    """Load a checkpoint into the prepared model and optimizer; returns its position.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        accelerator.load_state(str(checkpoint))
        return _position(checkpoint)
    except Exception as e:  # torch, safetensors and json each have their own errors for a damaged file
        raise UsageError(f"Cannot read the checkpoint {checkpoint} ({type(e).__name__}: {first_line(e)})") from e


def best(out: Path, since: int = 0) -> Path | None:
    """The checkpoint after the epoch with the best validation accuracy, the earlier one of two that are level.

    Those before epoch `since` do not count, for they are of a model under another classifier.
    """
    found = None
    for checkpoint in all_of(out):
        if epoch_of(checkpoint) < since:
            continue
        try:
            top1 = _position(checkpoint).top1
        except (OSError, ValueError, TypeError):  # a damaged one
            continue
        if top1 is not None and (found is None or top1 > found[0]):
            found = top1, checkpoint
    return found[1] if found else None


def _position(checkpoint: Path) -> Position:
    return Position(**json.loads((checkpoint / _POSITION).read_text(encoding="utf-8")))


def all_of(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    return sorted((out / "checkpoints").glob("epoch-*"))


def epoch_of(checkpoint: Path) -> int:
    """How many whole epochs a checkpoint is after."""
    return int(checkpoint.name.split("-")[1])
