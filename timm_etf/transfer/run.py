"""`timm-etf transfer`: every model on every target under every protocol, each result written once it is there."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from timm_etf import hub
from timm_etf.atomic import atomic_file, write_json
from timm_etf.classifier import fix_classifier
from timm_etf.errors import UsageError, one_line
from timm_etf.features.extract import PRE_LOGITS, Features, Layers, layer_names, load
from timm_etf.features.study import Inputs, Measured, Pair, Study
from timm_etf.frames import nearest_simplex
from timm_etf.geometry import ClassMoments, collapse
from timm_etf.processes import exact_device, processes
from timm_etf.report.page import write
from timm_etf.transfer.distance import Distances
from timm_etf.transfer.few_shot import SHOTS, fewshot
from timm_etf.transfer.fine_tuning import FIRST_RATES, LEARNING_RATES, WEIGHT_DECAY, Budget, Head, finetune
from timm_etf.transfer.neighbours import knn
from timm_etf.transfer.probe import linear_probe
from timm_etf.transfer.report import Report, summary
from timm_etf.transfer.result import Result

__all__ = ["Settings", "run", "summary"]

Protocol = Literal["probe", "knn", "finetune", "fewshot"]

_VERSION = 3
"""Raised when a protocol's numbers change; results of another version are computed again."""


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Tell whether one backbone transfers better than another: tables with intervals, results.json, pictures.

    Run again, it computes only what is missing; a run that was stopped continues.
    """

    targets: tuple[str, ...]
    """Names (cifar10, ...), suites (offline, embedded, hub, vtab-1k), folders of images or parquet files, or ids of the
    Hub. Each may have fields behind it, as in DATA,train=train_mini,metric=mean_per_class or DATA,train_images=1000."""
    protocols: tuple[Protocol, ...] = ("probe", "knn", "fewshot")
    """How to measure."""
    seeds: int = 3
    """Repetitions of what is random in a protocol: validation images, draws, fresh classifiers."""
    depths: int = 0
    """Number of layers before the pre-logits to probe, too, evenly spaced."""
    finetune_steps: int = Budget.steps
    """Optimizer steps of each fine-tuning."""
    finetune_batch_size: int = Budget.batch_size
    """Images per step of it."""
    finetune_head: Head = "learned"
    """Classifier of the target: fresh and trained (learned), fixed to a frame (etf), or fixed to the simplex nearest to
    the class means of the pretrained features (nearest)."""
    keep_models: bool = False
    """Export every fine-tuned model into OUT/models, for geometry, random-features and plain timm."""
    source: str | None = None
    """What the models were pretrained on, named as a target: tells how far every target is from it."""
    neutral: str | None = None
    """A further model, of any weights or none, under whose features the distances are told, too."""

    @property
    def budget(self) -> Budget:
        """What every model gets for each of its fine-tunings."""
        return Budget(self.finetune_steps, self.finetune_batch_size, self.workers)

    def check(self) -> None:
        """Refuse values that cannot work; see `Inputs.check`."""
        super().check()
        if not self.targets or not self.protocols:
            raise UsageError("Give at least one model, one target and one protocol.")
        for option, least in (("seeds", 1), ("depths", 0), ("finetune_steps", 1), ("finetune_batch_size", 1)):
            if getattr(self, option) < least:
                raise UsageError(f"--{option.replace('_', '-')} is at least {least}.")
        if self.depths and "probe" not in self.protocols:
            raise UsageError("--depths probes several layers: add probe to --protocols.")
        if "finetune" not in self.protocols and (self.keep_models or self.finetune_head != "learned"):
            raise UsageError("--keep-models and --finetune-head are of fine-tuning: add finetune to --protocols.")
        if self.neutral and not self.source:
            raise UsageError("--neutral tells distances from a source: give it with --source.")

    @property
    def uses_features(self) -> bool:
        """Whether anything is measured on features, or made of them."""
        return not set(self.protocols) <= {"finetune"} or self.finetune_head == "nearest"


@dataclass(frozen=True)
class Job:
    """One protocol on one target with one model: what it is filed under."""

    candidate: int
    target: str
    protocol: str
    seed: int
    path: Path
    key: str
    model: Path | None = None
    """Folder of the model that the result is of, where it is kept."""


def run(settings: Settings) -> Report:
    """Compute what is not there yet, and write the report.

    Nothing that fails stops the rest: a model that cannot be made, a target that cannot be opened and a job that raises
    are named in the report. What was computed before, by this call or a killed one, is read instead.

    Returns:
        The report that was written into `settings.out`.

    Raises:
        UsageError: If the settings are wrong, before anything is computed, or nothing at all could be computed.
    """
    started, state = time.perf_counter(), processes()
    splits = ("train", "validation", "test") if settings.uses_features else ()
    study = Study(settings, settings.targets, splits=splits, layers=Layers(settings.depths))
    jobs: list[Job] = []
    collapsed: dict[tuple[int, str], dict[str, float]] = {}
    distances = Distances(settings, study)
    for measured in study.measured():
        for pair in measured.pairs:
            if state.is_main_process and settings.uses_features:
                try:
                    collapsed[measured.number, pair.data] = _collapse(pair)
                except Exception as e:
                    study.missing[f"{study.title(measured.number)}: {pair.data}, collapse"] = one_line(e)
            lined_up = list(_line_up(settings, study, measured, pair))
            jobs += [job for job, _ in lined_up]
            distances.measure(measured.number, measured.model, pair.splits, measured.identity)
            mine = lined_up[state.process_index :: state.num_processes]
            bar = tqdm(mine, unit="job", leave=False, disable=None if state.is_main_process else True)
            for job, compute in bar:
                bar.set_description(f"{pair.label}: {job.target}, {job.protocol}")
                _finish(job, compute)
    _features.cache_clear()
    state.wait_for_everyone()
    distances.measure_neutral()
    results, seconds = _filed(study, jobs)
    report = Report(
        candidates=study.candidates,
        targets=[s.target for s in study.opened.values()],
        results=results,
        seconds=seconds,
        missing=study.missing,
        notes=study.notes,
        collapse=collapsed,
        weights_sha256={k: v for k, v in study.weights_sha256.items() if v},
        settings=_about(settings, study, time.perf_counter() - started),
        distance=distances.found,
    )
    if state.is_main_process:
        write(settings.out, report.as_json(), report.as_markdown(), partial(_draw, report))
    return report


def _line_up(
    settings: Settings, study: Study, measured: Measured, pair: Pair
) -> Iterator[tuple[Job, Callable[[], Result]]]:
    """Every job of a model on a target, and how to compute it."""
    member = sum(c.label == pair.label for c in study.candidates[: measured.number])
    place = Path(pair.label, str(member), pair.data)
    candidate = study.candidates[measured.number]
    for protocol, rests_on, compute in _protocols(settings, measured, pair):
        for seed in range(settings.seeds):
            key = hashlib.sha256(json.dumps([_VERSION, protocol, seed, rests_on], default=str).encode()).hexdigest()
            path = settings.out / "results" / place / f"{protocol.replace(' ', '-')}-seed{seed}.safetensors"
            job, compute_it = Job(measured.number, pair.data, protocol, seed, path, key), partial(compute, seed=seed)
            if protocol == "finetune" and settings.keep_models:
                kept = settings.out / "models" / place / f"seed{seed}"
                about = {"finetuned_from": candidate.name, "target": pair.data, "key": key, "seed": seed}
                job, compute_it = replace(job, model=kept), partial(compute_it, keep=partial(_keep, kept, pair, about))
            yield job, compute_it


def _protocols(
    settings: Settings, measured: Measured, pair: Pair
) -> Iterator[tuple[str, list[Any], Callable[..., Result]]]:
    """Names of the protocols on a pair, what their results rest on, and how to compute them with a seed."""
    device = processes().device
    folders = tuple(pair.folders.values())
    names = [folder.name for folder in folders]
    tree = pair.splits.tree
    names += [tree.sha256] if tree else []
    on = partial(partial, _on_features, folders, device=exact_device(device), distance=tree and tree.distance)
    if "probe" in settings.protocols:
        for layer in layer_names(folders[0]):
            yield "probe" if layer == PRE_LOGITS else f"probe at depth {layer}", names, on(layer, linear_probe)
    if "knn" in settings.protocols:
        yield "knn", names, on(PRE_LOGITS, knn)
    if "fewshot" in settings.protocols:
        for shots in SHOTS:
            yield f"{shots}-shot", names[: len(folders)], partial(_few, folders, shots, device=exact_device(device))
    if "finetune" in settings.protocols:
        budget = settings.budget
        grid = [budget.steps, budget.batch_size, FIRST_RATES, LEARNING_RATES, WEIGHT_DECAY]
        head = settings.finetune_head
        rests_on = [measured.identity, *(s.fingerprint for s in pair.splits), grid]
        rests_on += [] if head == "learned" else [head, *names[:1]] if head == "nearest" else [head]
        yield "finetune", rests_on, partial(_finetune, pair, head, budget, device=device)


@lru_cache(maxsize=1)
def _features(folders: tuple[Path, ...], layer: str) -> list[Features]:
    """Features of a target's splits; the last ones stay in memory for the other jobs on them."""
    return [load(folder, layer) for folder in folders]


def _on_features(folders: tuple[Path, ...], layer: str, protocol: Callable[..., Result], **options: Any) -> Result:
    train, *validation, test = _features(folders, layer)
    return protocol(train, test, *validation, **options)


def _few(folders: tuple[Path, ...], shots: int, *, seed: int, device: torch.device) -> Result:
    train, *_, test = _features(folders, PRE_LOGITS)
    return fewshot(train, test, shots, seed=seed, device=device)


def _finetune(pair: Pair, head: Head, budget: Budget, *, seed: int, **options: Any) -> Result:
    frame: str | torch.Tensor | None = {"learned": None, "etf": "auto"}.get(head)
    if head == "nearest":
        train = _features(tuple(pair.folders.values()), PRE_LOGITS)[0]
        frame = nearest_simplex(ClassMoments.of(train.x, train.y, len(train.class_names)).mean)
    result = finetune(partial(_with_head, pair.model, frame, seed), pair.splits, budget, seed=seed, **options)
    return replace(result, treatment=f"{_HEADS[head]}; {result.treatment}")


_HEADS = {
    "learned": "a fresh classifier, trained",
    "etf": "classifier fixed to a frame",
    "nearest": "classifier fixed to the simplex nearest to the class means of the pretrained features",
}


def _with_head(model: nn.Module, frame: str | torch.Tensor | None, seed: int, num_classes: int) -> nn.Module:
    """A copy with a fresh classifier, or a fixed one."""
    copied: Any = copy.deepcopy(model)
    copied.reset_classifier(num_classes)
    return copied if frame is None else fix_classifier(copied, frame, seed)


def _keep(folder: Path, pair: Pair, about: dict[str, Any], model: nn.Module) -> None:
    names = list(pair.splits.train.class_names)
    hub.export(model.cpu(), folder, label_names=names, results={"finetuned": about}, overwrite=True)


def _is_kept(job: Job) -> bool:
    """Whether the model of a job is there, if it is to be."""
    if job.model is None:
        return True
    try:
        kept = json.loads((job.model / "results.json").read_text(encoding="utf-8"))["finetuned"]["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(kept == job.key)


def _collapse(pair: Pair) -> dict[str, float]:
    """Collapse metrics of the pre-logits of a target's training images, computed once."""
    path = pair.folders["train"] / "collapse.json"
    if not path.exists():
        train = _features(tuple(pair.folders.values()), PRE_LOGITS)[0]
        write_json(path, collapse(ClassMoments.of(train.x, train.y)))
    return json.loads(path.read_text(encoding="utf-8"))


def _finish(job: Job, compute: Callable[[], Result]) -> None:
    """Compute a job and file its result, unless it is there."""
    if isinstance(_read(job), tuple) and _is_kept(job):
        return
    started = time.perf_counter()
    about: dict[str, Any] = {"key": job.key}
    try:
        result = compute()
        arrays: dict[str, Any] = {"correct": result.correct, "y": result.y}
        about |= {"features": result.treatment, "chosen": result.chosen, "order": result.order}
    except Exception as e:
        arrays = {"correct": np.zeros(0, np.float32), "y": np.zeros(0, np.int64)}
        about["problem"] = one_line(e)
    about["seconds"] = round(time.perf_counter() - started, 2)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(job.path) as new:
        save_file(arrays, new, metadata={"about": json.dumps(about)})


def _read(job: Job) -> tuple[Result, float] | str | None:
    """A job's result and seconds, why it has none, or None if it was not computed from the same things."""
    try:
        with safe_open(job.path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            if about["key"] != job.key:
                return None
            if "problem" in about:
                return str(about["problem"])
            arrays = file.get_tensor("correct"), file.get_tensor("y")
            return Result(*arrays, about["features"], about["chosen"], about.get("order", {})), about["seconds"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # not there, or damaged: computed again
        return None


def _filed(study: Study, jobs: list[Job]) -> tuple[dict[tuple[int, str, str, int], Result], dict[str, float]]:
    """Results that all processes and earlier calls have filed, and the seconds they took."""
    results: dict[tuple[int, str, str, int], Result] = {}
    seconds = {"features": study.seconds} if study.seconds else {}
    for job in jobs:
        found = _read(job)
        if isinstance(found, str):
            study.missing[f"{study.title(job.candidate)}: {job.target}, {job.protocol}"] = found
        elif found is not None:
            result, spent = found
            results[job.candidate, job.target, job.protocol, job.seed] = result
            seconds[job.protocol] = seconds.get(job.protocol, 0) + spent
            if fewer := result.chosen.get("classes_with_fewer"):
                study.note(f"{job.target}, {job.protocol}: {fewer} classes have fewer training images and give all")
    if not results:
        study.refuse_nothing()
    return results, {k: round(v, 1) for k, v in seconds.items()}


def _about(settings: Settings, study: Study, seconds: float) -> dict[str, Any]:
    """What was asked for, for results.json."""
    about = study.settings()
    about["targets"] = about.pop("data")
    about |= {k: getattr(settings, k) for k in ("protocols", "seeds", "depths", "finetune_head", "source", "neutral")}
    about["budget"] = {"steps": settings.finetune_steps, "batch_size": settings.finetune_batch_size}
    return {**about, "seconds_of_this_call": round(seconds, 1)}


def _draw(report: Report, out: Path) -> dict[str, str]:
    from timm_etf.transfer import plots

    return plots.draw(report, out)
