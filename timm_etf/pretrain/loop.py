"""The training loop: thin around timm's model, transforms, optimizer and schedule and accelerate's processes."""

import dataclasses
import json
import logging
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from tqdm import tqdm

from timm_etf import hub
from timm_etf.atomic import require_new_folder, write_json, write_text
from timm_etf.classifier import fixed_classifiers
from timm_etf.errors import Interrupted, UsageError
from timm_etf.pretrain import checkpoint, data
from timm_etf.pretrain.checkpoint import Position
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.objective import Objective
from timm_etf.pretrain.validation import validate
from timm_etf.variants import SW_SUFFIX, base_name

_logger = logging.getLogger(__name__)

_SHOWN = {
    "train_loss": "loss {:.3f}",
    "top1": "top-1 {:.1f} %",
    "nc1": "NC1 {:.3g}",
    "images_per_second": "{:.0f} img/s",
}
"""What an epoch's line says, of what there is."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train a model as `config` says, on every process that accelerate launched, and export it.

    Args:
        config: What to train, on what, how and where to.

    Returns:
        What is in results.json: the last epoch's validation accuracies in percent and the number of images they count.

    Raises:
        UsageError: For input that cannot work, before anything is trained or overwritten; or if the loss diverges.
        Interrupted: After Ctrl-C or SIGTERM, once the checkpoint is written.
    """
    config.check()
    if not config.resume:
        require_new_folder(config.out, "continue that run with --resume, or choose another --out")
    accelerator = Accelerator(
        mixed_precision=config.amp, log_with=config.tracker, project_dir=str(config.out) if config.tracker else None
    )
    # Every process opens the data and builds the model, so every process finds what is wrong with them by itself.
    splits = data.open_splits(config)
    settings = checkpoint.fingerprint(config, splits.num_classes, accelerator.num_processes)
    if config.resume:
        checkpoint.check_resume(config.out, settings)
    set_seed(config.seed)
    model = _create_model(config, splits.num_classes)
    objective = Objective(config, model, splits.num_classes)
    data_config = _data_config(config, model)
    splits.train.transform, splits.val.transform = data.transforms(config, data_config)  # type: ignore[attr-defined]
    train_loader = data.TrainLoader(splits.train, config, accelerator.process_index, accelerator.num_processes)
    val_loader = data.val_loader(splits.val, config, accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process:
        data.check_images(splits.train, splits.val)
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "run.json", _run_record(config, settings, model, data_config, train_loader))
        if config.data_dir and (licenses := config.data_dir / "LICENSES.md").exists():
            write_text(config.out / "DATA_LICENSES.md", licenses.read_text(encoding="utf-8"))
    _require_same_frames(model)

    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=train_loader.steps_per_epoch,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if config.tracker:
        accelerator.init_trackers("timm_etf", config={k: str(v) for k, v in settings.items()})
    position = checkpoint.load_newest(accelerator, config.out) if config.resume else Position()
    log = _Log(config.out / "log.jsonl", position) if accelerator.is_main_process else None

    metrics: dict[str, Any] = {}
    with _Stop(accelerator) as stop, _progress(config, train_loader, position, accelerator) as bar:
        for epoch in range(position.epoch, config.epochs):
            bar.set_description_str(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
            position = dataclasses.replace(position, epoch=epoch) if epoch == position.epoch else Position(epoch)
            started, first_step = time.perf_counter(), position.step
            position = _train_epoch(
                objective, accelerator, model, optimizer, scheduler, train_loader, position, stop, bar
            )
            seconds = time.perf_counter() - started
            if stop.requested():
                break
            metrics = validate(accelerator, model, val_loader)
            metrics["train_loss"] = position.loss_sum / max(1, position.step)
            steps = position.step - first_step
            if steps:  # none, if a run was stopped between the last step and the validation
                metrics["images_per_second"] = steps * config.batch_size * accelerator.num_processes / seconds
            position = Position(epoch + 1)
            if log:  # before the checkpoint: a resume drops lines that are ahead of it, but could not make up for one
                bar.write("  ".join([bar.desc, *(t.format(metrics[k]) for k, t in _SHOWN.items() if k in metrics)]))
                log.append({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **metrics})
            accelerator.log(metrics, step=epoch + 1)
            checkpoint.save(accelerator, config.out, position)
    if stop.requested():
        saved = checkpoint.save(accelerator, config.out, position)
        raise Interrupted(stop.signum, f"Stopped; {saved} is saved. The same command with --resume continues from it.")

    if not metrics:  # resumed after the last epoch
        metrics = validate(accelerator, model, val_loader)
    results = {"source": {"data": config.dataset if config.data_dir is None else config.data_dir.name, **metrics}}
    results["source"]["epochs"], results["source"]["seed"] = config.epochs, config.seed
    if accelerator.is_main_process:
        results["source"] |= {
            "train_images": train_loader.num_samples,
            "train_seconds": round(_train_seconds(config.out, train_loader.num_samples), 1),
            "device": _device_name(accelerator),
        }
        write_json(config.out / "results.json", results)
        hub.export(
            accelerator.unwrap_model(model).cpu(),
            config.out / "export",
            data_config=data_config,
            label_names=splits.class_names,
            recipe=settings,
            results=results,
            overwrite=True,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it closes the connection between the processes
    if stop.signum:
        raise Interrupted(stop.signum, f"Stopped, after the run in {config.out} was complete.")
    return results


def _train_seconds(out: Path, train_images: int) -> float:
    """Seconds that the epochs took without validation, over all calls of the run; a part of an epoch stands for all."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [rate for line in lines if (rate := json.loads(line).get("images_per_second"))]
    return sum(train_images / rate for rate in rates) * len(lines) / max(1, len(rates))


def _device_name(accelerator: Accelerator) -> str:
    cuda = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {name}"


def summary(config: PretrainConfig, results: dict[str, Any]) -> str:
    """What came out of a run and what to type next, in three lines."""
    source, folder = results["source"], config.out / "export"
    imports = "timm, timm_etf" if base_name(config.architecture).endswith(SW_SUFFIX) else "timm"
    return (
        f"top-1 {source['top1']:.2f} %, top-5 {source['top5']:.2f} % on {source['count']} validation images\n"
        f"model: {folder}\n"
        f"next:  python -c \"import {imports}; timm.create_model('local-dir:{folder}', pretrained=True)\""
    )


def _create_model(config: PretrainConfig, num_classes: int) -> nn.Module:
    kwargs = config.parsed_model_kwargs
    name = config.architecture
    if name != base_name(name):
        kwargs["frame_seed"] = config.frame_seed
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=config.in_chans, **_img_size(config), **kwargs)
    except UsageError as e:
        raise UsageError(f"{name}: {e}") from None
    except TypeError as e:  # an argument that this architecture does not take
        raise UsageError(f"{name}: {e}. Check --model-kwargs.") from e


def _require_same_frames(model: nn.Module) -> None:
    """Processes on machines of different kinds may compute different spherical codes, and frames are not exchanged."""
    mine = [head.weight.double().sum(dim=0).tolist() for _, head in fixed_classifiers(model)]
    if any(other != mine for other in gather_object([mine])):
        raise UsageError(
            "The processes have computed different frames: copy one machine's huggingface_hub assets cache "
            "(HF_ASSETS_CACHE) to the others."
        )


def _img_size(config: PretrainConfig) -> dict[str, Any]:
    """`img_size` for the architectures whose input size is fixed when they are built; the others take any."""
    cfg = timm.get_pretrained_cfg(config.architecture)
    return {"img_size": config.img_size} if config.img_size and cfg is not None and cfg.fixed_input_size else {}


def _data_config(config: PretrainConfig, model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of this model with the run's changes; it is exported with the weights."""
    size = {"input_size": (config.in_chans, config.img_size, config.img_size)} if config.img_size else {}
    changes = {"mean": config.mean, "std": config.std, "crop_pct": config.crop_pct, **size}
    resolved = timm.data.resolve_data_config({k: v for k, v in changes.items() if v is not None}, model=model)
    resolved["input_size"] = (config.in_chans, *resolved["input_size"][1:])
    for option in ("mean", "std"):
        values = resolved[option]
        if len(values) != config.in_chans:  # an architecture's colour statistics for grey images: their mean
            resolved[option] = (sum(values) / len(values),) * config.in_chans
    return resolved


def _run_record(
    config: PretrainConfig,
    settings: dict[str, Any],
    model: nn.Module,
    data_config: dict[str, Any],
    loader: data.TrainLoader,
) -> dict[str, Any]:
    packages = ("timm_etf", "torch", "timm", "accelerate", "safetensors", "huggingface_hub")
    return {
        "settings": settings,
        "command": {k: str(v) for k, v in dataclasses.asdict(config).items() if v is not None},
        "data_config": data_config,
        "train_images": loader.num_samples,
        "steps_per_epoch": loader.steps_per_epoch,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "fixed_classifiers": [name for name, _ in fixed_classifiers(model)],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def _train_epoch(
    objective: Objective,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    loader: data.TrainLoader,
    position: Position,
    stop: "_Stop",
    bar: tqdm,
) -> Position:
    """Train the rest of an epoch, or up to a request to stop; returns the new position."""
    model.train()
    loss_sum = position.loss_sum
    unread: list[torch.Tensor] = []  # reading a loss waits for the device, so it is done every 20 steps
    step = position.step
    update = position.epoch * loader.steps_per_epoch + step
    for images, targets in loader.epoch(position.epoch, step):
        if scheduler:  # --sched none
            scheduler.step_update(update)
        images = images.to(accelerator.device, non_blocking=True)
        targets = targets.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            loss = objective(model, images, targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step, update = step + 1, update + 1
        unread.append(loss.detach())
        bar.update(len(images) * accelerator.num_processes)
        ends = stop.requested_now(step, last=step == loader.steps_per_epoch)
        if ends or len(unread) == 20 or step == loader.steps_per_epoch:
            loss_sum = sum(torch.stack(unread).tolist(), start=loss_sum)
            unread.clear()
            if not math.isfinite(loss_sum):
                raise UsageError(f"The loss is not finite at step {step} of epoch {position.epoch + 1}: lower --lr.")
            bar.set_postfix(loss=f"{loss_sum / step:.3f}", refresh=False)
        if ends:
            break
    return Position(position.epoch, step, loss_sum)


@contextmanager
def _progress(
    config: PretrainConfig, loader: data.TrainLoader, position: Position, accelerator: Accelerator
) -> Iterator[tqdm]:
    per_step = config.batch_size * accelerator.num_processes
    with tqdm(
        total=config.epochs * loader.steps_per_epoch * per_step,
        initial=(position.epoch * loader.steps_per_epoch + position.step) * per_step,
        unit="img",
        smoothing=0.05,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file needs no more
        disable=not accelerator.is_main_process,
    ) as bar:
        yield bar


class _Stop:
    """Remembers a first Ctrl-C or SIGTERM so that the loop can end after its step; a second one acts at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signum = 0
        self._agreed = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: object) -> None:
        self.signum = signum
        signal.signal(signum, self._previous[signum])

    def requested_now(self, step: int, *, last: bool) -> bool:
        """Whether to end after this step; several processes agree on it every 10 steps and after the `last`."""
        if self.accelerator.num_processes == 1:
            self._agreed = bool(self.signum)
        elif step % 10 == 0 or last:
            flag = torch.tensor(self.signum, device=self.accelerator.device)
            # The signal may have reached one process only: the others take its number.
            self.signum = int(self.accelerator.gather(flag.unsqueeze(0)).max().item())
            self._agreed = bool(self.signum)
        return self._agreed

    def requested(self) -> bool:
        """Whether the processes agreed to stop."""
        return self._agreed


class _Log:
    """log.jsonl, one line per epoch; on a resume, lines of epochs that will run again are dropped."""

    def __init__(self, path: Path, position: Position) -> None:
        self.path = path
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                if json.loads(line)["epoch"] <= position.epoch:
                    kept.append(line)
            except ValueError:  # the last line of a run that was killed while writing it
                break
        write_text(path, "".join(line + "\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
