"""The training loop: thin around timm's model, transforms, optimizer and schedule and accelerate's processes."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from timm_etf import hub
from timm_etf.atomic import write_text
from timm_etf.errors import Interrupted, UsageError, one_line
from timm_etf.means import nearest_mean
from timm_etf.pretrain import checkpoint
from timm_etf.pretrain.checkpoint import Position
from timm_etf.pretrain.clock import Clock, advice, shares
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.setup import Run, setup
from timm_etf.pretrain.validation import validate
from timm_etf.pretrain.warm_frame import set_frame
from timm_etf.report import curves
from timm_etf.report.results import write as write_results
from timm_etf.variants import SW_SUFFIX, base_name
from timm_etf.watch import Watch, starts_again

_SHOWN = {
    "train_loss": "loss {:.3f}",
    "top1": "top-1 {:.1f} %",
    "top1_old": "old classes {:.1f} %",
    "top1_new": "new {:.1f} %",
    "harmonic": "harmonic mean {:.1f} %",
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
    with starts_again():
        run = setup(config)
    try:
        with Watch(run.accelerator, config.checkpoint_steps, config.checkpoint_minutes) as watch:
            metrics = _train(run, watch)
            results = _finish(run, metrics)
    finally:
        run.close()
    if watch.signum:
        raise Interrupted(watch.signum, f"Stopped, after the run in {config.out} was complete.")
    return results


def _train(run: Run, watch: Watch) -> dict[str, Any]:
    """Train the epochs that are left, with a validation and a checkpoint after each; returns the last one's metrics."""
    accelerator, config = run.accelerator, run.config
    log = _Log(config.out / "log.jsonl", run.position) if accelerator.is_main_process else None
    metrics: dict[str, Any] = {}
    advised, clock = {""}, Clock(accelerator.device)
    with _progress(run) as bar:
        if config.initial_weights and run.position == Position():  # what they are worth before they are trained
            _set_frame(run, 0, bar)
            metrics = _validate(run) | _nearest_mean(run)
            run.record()
            run.position = Position(top1=metrics["top1"])
            if log:
                bar.write("  ".join(["before training", *_shown(run, metrics)]))
                log.append({"epoch": 0, **metrics})
            _save(run, clock)
            clock.lap()
        while run.position.epoch < config.epochs:
            epoch, first_step = run.position.epoch, run.position.step
            bar.set_description_str(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
            run.position = trained = _train_epoch(run, watch, clock, bar)
            if watch.ends:
                saved = _save(run, clock)
                _draw(run)
                message = f"Stopped; {saved} is saved. The same command with --resume continues from it."
                raise Interrupted(watch.signum, message)
            with clock.measure("validating"):
                _set_frame(run, epoch + 1, bar)
                metrics = _validate(run)
            metrics["train_loss"] = trained.loss_sum / max(1, trained.step)
            metrics["seconds"] = seconds = {part: round(s, 3) for part, s in clock.lap().items()}
            batches = sum(map(run.batches_of, range(first_step, trained.step)))
            if batches:  # none, if a run was stopped between the last step and the validation
                images = batches * run.images_per_batch
                metrics["images_per_second"] = images / (seconds["waiting"] + seconds["stepping"])
            run.position = Position(epoch + 1, top1=metrics["top1"])
            if log:  # before the checkpoint: a resume drops lines that are ahead of it, but could not make up for one
                bar.write("  ".join([bar.desc, *_shown(run, metrics), f"({shares(seconds)})"]))
                faster = advice(seconds, config, accelerator.device)
                if faster not in advised:
                    advised.add(faster)
                    bar.write(f"faster with {faster}")
                log.append({"epoch": epoch + 1, "lr": run.step.lr, **metrics})
            _track(run, metrics, epoch + 1)
            _save(run, clock)
            watch.saved()
    return metrics


def _set_frame(run: Run, epoch: int, bar: tqdm) -> None:
    """Fix the classifier to the class means' frame, where it is to be after this epoch: validation comes after it."""
    if epoch == run.config.frame_from_means:
        run.step, told = set_frame(run.step, run.config, run.train, run.data_config)
        if run.accelerator.is_main_process:
            bar.write(told)


def _shown(run: Run, metrics: dict[str, Any]) -> list[str]:
    shown = _SHOWN | ({"top1": "same answer {:.1f} %"} if run.config.distill else {})
    said = [text.format(metrics[k]) for k, text in shown.items() if k in metrics]
    if means := metrics.get("nearest_mean"):
        said.append(f"nearest class mean: {_by_age(means)}")
    return said


def _by_age(accuracies: dict[str, float]) -> str:
    """Accuracies of old and new classes."""
    return ", ".join(_SHOWN[k].format(v) for k, v in accuracies.items() if k in ("top1_old", "top1_new", "harmonic"))


def _train_epoch(run: Run, watch: Watch, clock: Clock, bar: tqdm) -> Position:
    """Train the rest of an epoch, or up to a request to stop; returns the new position."""
    run.step.train()
    epoch, step, loss_sum = run.position.epoch, run.position.step, run.position.loss_sum
    last = run.train.steps_per_epoch
    unread: list[torch.Tensor] = []  # reading a loss waits for the device, so it is done every 20 steps
    first = min(step * run.config.grad_accum_steps, run.train.batches_per_epoch)
    batches = clock.waits(run.train.epoch(epoch, first))
    while step < last and not watch.ends:
        count = run.batches_of(step)
        with clock.measure("stepping"):
            unread.append(run.step(islice(batches, count), count, epoch * last + step))
            run.record()
            step += 1
            bar.update(count * run.images_per_batch)
            watch.after(step, last=step == last)
            if watch.ends or watch.saves or len(unread) == 20 or step == last:
                losses = run.accelerator.reduce(torch.stack(unread), "mean")
                loss_sum = sum(losses.tolist(), start=loss_sum)
                unread.clear()
                if not math.isfinite(loss_sum):
                    raise UsageError(
                        f"The loss is not finite at step {step} of epoch {epoch + 1}: the training diverged; lower "
                        "--lr or --weight-decay, set --clip-grad, warm up for longer, or leave --amp fp16."
                    )
                bar.set_postfix(loss=f"{loss_sum / step:.3f}", refresh=False)
        if watch.saves and not watch.ends:
            run.position = Position(epoch, step, loss_sum)
            _save(run, clock)
            watch.saved()
    return Position(epoch, step, loss_sum)


def _validate(run: Run) -> dict[str, Any]:
    """Score what is exported, and under an average of the weights the last ones too, as `raw_top1`."""
    score = partial(
        validate,
        run.accelerator,
        loader=run.val,
        pixels=run.step.pixels,
        teacher=run.step.objective.teacher,
        geometry=run.config.geometry,
        reserved=run.config.reserve,
        old=run.old,
    )
    if run.step.ema is None:
        return score(run.step.model)
    raw = score(run.step.model)
    return {**score(run.step.ema.module), "raw_top1": raw["top1"]}


def _nearest_mean(run: Run) -> dict[str, Any]:
    """What class means of the features that a run starts with are worth, where it goes on with more classes."""
    if not run.old:
        return {}
    images = run.train.still(run.data_config)
    try:
        seen = run.step.seen(images), run.step.seen(run.val)
        return {"nearest_mean": nearest_mean(run.step.plain, *seen, run.accelerator, run.old)}
    finally:
        images.close()


def _track(run: Run, metrics: dict[str, Any], epoch: int) -> None:
    """Hand an epoch on to the tracker; one that fails, as without a network, costs no run."""
    try:
        run.accelerator.log({k: v for k, v in metrics.items() if k != "seconds"}, step=epoch)
    except Exception as e:  # each tracker has its own kinds
        print(f"warning: the tracker missed epoch {epoch} ({one_line(e)}); log.jsonl has it", file=sys.stderr)


def _save(run: Run, clock: Clock) -> Path:
    with clock.measure("saving"):
        since = run.config.frame_from_means or 0
        return checkpoint.save(run.accelerator, run.config.out, run.position, run.config.checkpoint_hist, since)


def _finish(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and export/; returns the results."""
    accelerator, config = run.accelerator, run.config
    best = checkpoint.best(config.out, config.frame_from_means or 0) if config.export == "best" else None
    if best:
        checkpoint.load(accelerator, best)
    if best or not metrics:  # no metrics, if resumed after the last epoch
        metrics = _validate(run)
    results = {"source": {"data": config.dataset if config.data_dir is None else config.data_dir.name, **metrics}}
    results["source"].pop("seconds", None)
    results["source"]["epochs"], results["source"]["seed"] = config.epochs, config.seed
    if config.distill:
        results["source"]["teacher"] = config.distill
    if config.initial_weights and accelerator.is_main_process:
        results["source"] |= _before(config.out / "log.jsonl")
    if best:
        results["source"]["exported"] = f"the best of all epochs by these images, {best.name}"
    exported = run.exported_model()
    if accelerator.is_main_process:
        results["source"] |= {
            "train_images": run.train.num_samples,
            "train_seconds": round(_train_seconds(run), 1),
            "device": _device_name(accelerator),
        }
        write_results(config.out / "results.json", results)
        hub.export(
            exported,
            config.out / "export",
            data_config=run.data_config,
            label_names=run.class_names or [],  # never those of the weights it started from
            recipe=run.settings,
            results=results,
            overwrite=True,
        )
        _draw(run)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it closes the connection between the processes
    return results


def _before(log: Path) -> dict[str, Any]:
    """What the weights were worth before they were trained, and the class means of their features."""
    first = json.loads(log.read_text(encoding="utf-8").partition("\n")[0])
    known = ("top1", "top5", "loss", "top1_old", "top1_new", "harmonic")
    before = {k: first[k] for k in known if k in first and first["epoch"] == 0}
    return {"before": before} | {k: first[k] for k in ("nearest_mean",) if k in first}


def _draw(run: Run) -> None:
    """Draw curves.png; a picture that cannot be drawn costs no run."""
    if run.accelerator.is_main_process:
        try:
            log, picture = run.config.out / "log.jsonl", run.config.out / "curves.png"
            curves.draw(log, picture, taught=run.config.distill is not None)
            if not find_spec("matplotlib"):
                print("curves.png takes matplotlib: pip install matplotlib", file=sys.stderr)
        except Exception as e:  # matplotlib's kinds are many
            print(f"warning: curves.png was not drawn ({one_line(e)})", file=sys.stderr)


def _train_seconds(run: Run) -> float:
    """Seconds that the epochs took without validation, over all calls of the run; a part of an epoch stands for all."""
    lines = (run.config.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [epoch for line in lines if (epoch := json.loads(line))["epoch"]]
    rates = [rate for epoch in epochs if (rate := epoch.get("images_per_second"))]
    images = run.train.batches_per_epoch * run.images_per_batch
    return sum(images / rate for rate in rates) * len(epochs) / max(1, len(rates))


def _device_name(accelerator: Accelerator) -> str:
    cuda = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {name}"


def summary(config: PretrainConfig, results: dict[str, Any]) -> str:
    """What came out of a run and what to type next, in three lines or four."""
    source, folder = results["source"], config.out / "export"
    what = f"top-1 {source['top1']:.2f} %, top-5 {source['top5']:.2f} % on {source['count']} validation images"
    if config.distill:
        what = (
            f"same answer as {config.distill} on {source['top1']:.2f} % of {source['count']} images that were held out "
            f"(its answer among five: {source['top5']:.2f} %, divergence {source['loss']:.3f} nats)"
        )
    if before := source.get("before"):
        what += f"; before training {before['top1']:.2f} %"
    if means := source.get("nearest_mean"):
        what += f"\n{_by_age(source)}; nearest class mean of the features before: {_by_age(means)}"
    imports = "timm, timm_etf" if base_name(config.architecture).endswith(SW_SUFFIX) else "timm"
    return (
        f"{what}\n"
        f"model: {folder}\n"
        f"next:  python -c \"import {imports}; timm.create_model('local-dir:{folder}', pretrained=True)\""
    )


@contextmanager
def _progress(run: Run) -> Iterator[tqdm]:
    batches = run.train.batches_per_epoch
    with tqdm(
        total=run.config.epochs * batches * run.images_per_batch,
        initial=(run.position.epoch * batches + run.position.step * run.config.grad_accum_steps) * run.images_per_batch,
        unit="img",
        smoothing=0.05,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file needs no more
        disable=not run.accelerator.is_main_process,
    ) as bar:
        yield bar


class _Log:
    """log.jsonl, one line per epoch; on a resume, lines of epochs that will run again are dropped."""

    def __init__(self, path: Path, position: Position) -> None:
        self.path = path
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["epoch"] <= position.epoch and position != Position():
                    kept.append(line)
            except ValueError:  # the last line of a run that was killed while writing it
                break
        write_text(path, "".join(line + "\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
