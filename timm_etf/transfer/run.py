"""`timm-etf transfer`: every model on every target under every protocol, each result written once it is there."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from timm_etf.atomic import atomic_file, file_sha256, write_json, write_text
from timm_etf.data.images import Splits, open_splits, resolve
from timm_etf.errors import UsageError
from timm_etf.features.candidates import Candidate, parse_models
from timm_etf.features.extract import (
    PRE_LOGITS,
    Features,
    Layers,
    Precision,
    extract,
    layer_names,
    load,
    weights_hash,
)
from timm_etf.geometry import ClassMoments, collapse
from timm_etf.processes import exact_device, processes
from timm_etf.transfer.few_shot import SHOTS, fewshot
from timm_etf.transfer.fine_tuning import LEARNING_RATES, WEIGHT_DECAYS, Budget, finetune
from timm_etf.transfer.neighbours import knn
from timm_etf.transfer.probe import linear_probe
from timm_etf.transfer.report import Report, show
from timm_etf.transfer.result import Result

PROTOCOLS = ("probe", "knn", "finetune", "fewshot")

_VERSION = 2
"""Raised when a protocol's numbers change; results of another version are computed again."""


@dataclass(frozen=True)
class Settings:
    """What a comparison is.

    Attributes:
        models: Models, `[LABEL=]NAME[,ARGUMENT=VALUE...]`; the first label is what the others are compared with.
        targets: Targets, see `targets.resolve`.
        protocols: Some of `PROTOCOLS`.
        seeds: Repetitions of what is random in a protocol: validation images, draws, fresh classifiers.
        out: Folder of results and report.
        data_root: Folder that `timm-etf data build` filled.
        features: Folder of the feature cache; by default in `out`.
        depths: Layers before the pre-logits to probe, too.
        precision: Of the models' computations.
        batch_size: Images per forward pass.
        workers: Loader processes.
        budget: Of a fine-tuning.
    """

    models: tuple[str, ...]
    targets: tuple[str, ...]
    protocols: tuple[str, ...]
    out: Path
    seeds: int = 3
    data_root: Path = Path("data")
    features: Path | None = None
    depths: int = 0
    precision: Precision = "fp32"
    batch_size: int = 256
    workers: int = 2
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Job:
    """One protocol on one target with one model: what it is filed under, and how to compute it."""

    candidate: int
    target: str
    protocol: str
    seed: int
    path: Path
    key: str
    compute: Callable[[], Result]


def run(settings: Settings) -> Report:
    """Compute what is not there yet, and write the report.

    Nothing that fails stops the rest: a model that cannot be made, a target that cannot be opened and a job that raises
    are named in the report. What was computed before, by this call or a killed one, is read instead.

    Returns:
        The report that was written into `settings.out`.

    Raises:
        UsageError: If the settings are wrong, before anything is computed, or nothing at all could be computed.
    """
    candidates = _check(settings)
    targets, missing = resolve(settings.targets, settings.data_root)
    state = processes()
    started = time.perf_counter()
    splits: dict[str, Splits] = {}
    for target in targets:
        try:
            splits[target.name] = open_splits(target)
        except UsageError as e:
            missing[target.name] = str(e)
    settings.out.mkdir(parents=True, exist_ok=True)
    work = _Work(settings, candidates, splits, state.device)
    for number in range(len(candidates)):
        work.prepare(number)
    failed = {**missing, **work.missing}
    mine = work.jobs[state.process_index :: state.num_processes]
    bar = tqdm(mine, unit="job", leave=False, disable=None if state.is_main_process else True)
    for job in bar:
        bar.set_description(f"{candidates[job.candidate].label}: {job.target}, {job.protocol}")
        _finish(job)
    state.wait_for_everyone()
    results = {}
    for job in work.jobs:
        found = _read(job)
        if isinstance(found, str):
            failed[f"{candidates[job.candidate].label}: {job.target}, {job.protocol}"] = found
        elif found is not None:
            results[job.candidate, job.target, job.protocol, job.seed] = found
            if fewer := found[0].chosen.get("classes_with_fewer"):
                work.note(f"{job.target}, {job.protocol}: {fewer} classes have fewer training images and give all")
    if not results:
        reason = next(iter(failed.items()), ("", "no jobs"))
        raise UsageError(f"Nothing could be computed: {reason[0]}: {reason[1]}")
    report = Report(
        candidates=candidates,
        targets=[s.target for s in splits.values()],
        results={k: r for k, (r, _) in results.items()},
        seconds=_seconds(work.seconds, results),
        missing=failed,
        notes=work.notes,
        collapse=work.collapse,
        weights_sha256=work.weights_sha256,
        settings=_about(settings, time.perf_counter() - started),
    )
    if state.is_main_process:
        _write(report, settings.out)
    return report


def _check(settings: Settings) -> list[Candidate]:
    if unknown := [p for p in settings.protocols if p not in PROTOCOLS]:
        raise UsageError(f"No protocol {unknown[0]!r}: choose among {', '.join(PROTOCOLS)}.")
    if not settings.models or not settings.targets or not settings.protocols:
        raise UsageError("Give at least one model, one target and one protocol.")
    for name in ("seeds", "batch_size"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is at least 1.")
    if settings.depths < 0 or settings.workers < 0 or settings.budget.steps < 1 or settings.budget.batch_size < 1:
        raise UsageError("--depths and --workers are at least 0, fine-tuning's steps and batch size at least 1.")
    if settings.depths and "probe" not in settings.protocols:
        raise UsageError("--depths probes several layers: add probe to --protocols.")
    if settings.out.exists() and not settings.out.is_dir():
        raise UsageError(f"{settings.out} is a file: choose another --out.")
    return parse_models(settings.models)


class _Work:
    """Features extracted, and the jobs that rest on them."""

    def __init__(
        self, settings: Settings, candidates: list[Candidate], splits: dict[str, Splits], device: torch.device
    ) -> None:
        self.settings, self.candidates, self.splits, self.device = settings, candidates, splits, device
        self.layers = Layers(settings.depths)
        self.jobs: list[Job] = []
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.collapse: dict[tuple[int, str], dict[str, float]] = {}
        self.weights_sha256: dict[int, str] = {}

    def prepare(self, number: int) -> None:
        """Extract a candidate's features and line up its jobs."""
        candidate = self.candidates[number]
        try:
            model = candidate.create().to(self.device)
            if file := candidate.weights_file():
                self.weights_sha256[number] = file_sha256(file)
        except UsageError as e:
            self.missing[candidate.label] = str(e)
            return
        weights = weights_hash(model)
        for name, splits in self.splits.items():
            try:
                folders = self._extract(model, weights, splits)
                self._line_up(number, name, splits, folders, weights)
            except UsageError as e:
                self.missing[f"{candidate.label}: {name}"] = str(e)

    def _extract(self, model: nn.Module, weights: str, splits: Splits) -> list[Path]:
        if set(self.settings.protocols) <= {"finetune"}:
            return []
        folder = self.settings.features or self.settings.out / "features"
        started = time.perf_counter()
        folders = [
            extract(
                model,
                images,
                folder,
                layers=self.layers,
                precision=self.settings.precision,
                batch_size=self.settings.batch_size,
                workers=self.settings.workers,
                weights=weights,
            )
            for images in splits
        ]
        self.seconds["features"] = self.seconds.get("features", 0) + time.perf_counter() - started
        return folders

    def _line_up(self, number: int, name: str, splits: Splits, folders: list[Path], weights: str) -> None:
        for folder in folders:
            about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
            if unreadable := about["unreadable"]:
                self.note(f"{name}: {len(unreadable)} images could not be read and were left out: {unreadable[0]}, ...")
        for seed in range(self.settings.seeds):
            add = partial(self._add, number, name, seed)
            options: dict[str, Any] = {"seed": seed, "device": exact_device(self.device)}
            if "probe" in self.settings.protocols:
                for layer in layer_names(folders[0]):
                    protocol = "probe" if layer == PRE_LOGITS else f"probe at depth {layer}"
                    add(protocol, folders, partial(_on_features, linear_probe, folders, layer, **options))
            if "knn" in self.settings.protocols:
                add("knn", folders, partial(_on_features, knn, folders, PRE_LOGITS, **options))
            if "fewshot" in self.settings.protocols:
                for shots in SHOTS:
                    add(f"{shots}-shot", folders, partial(_few, folders, shots, **options))
            if "finetune" in self.settings.protocols:
                budget = self.settings.budget
                grid = [LEARNING_RATES, WEIGHT_DECAYS]
                rests_on = [weights, *(s.fingerprint for s in splits), asdict(budget), grid]
                build = partial(_fresh, self.candidates[number])
                add("finetune", rests_on, partial(finetune, build, splits, budget, seed=seed, device=self.device))
        if folders and processes().is_main_process:
            self.collapse[number, name] = _collapse(folders[0])

    def note(self, text: str) -> None:
        """Remember something for the report, once."""
        self.notes += [text] if text not in self.notes else []

    def _add(
        self, number: int, target: str, seed: int, protocol: str, rests_on: list[Any], compute: Callable[[], Result]
    ) -> None:
        about = [_VERSION, protocol, seed, [r.name if isinstance(r, Path) else r for r in rests_on]]
        key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()
        label = self.candidates[number].label
        member = sum(c.label == label for c in self.candidates[:number])
        name = f"{protocol.replace(' ', '-')}-seed{seed}.safetensors"
        path = self.settings.out / "results" / label / str(member) / target / name
        self.jobs.append(Job(number, target, protocol, seed, path, key, compute))


def _collapse(folder: Path) -> dict[str, float]:
    """Collapse metrics of the pre-logits in a folder, computed once."""
    path = folder / "collapse.json"
    if not path.exists():
        train: Features = load(folder)
        write_json(path, collapse(ClassMoments.of(train.x, train.y)))
    return json.loads(path.read_text(encoding="utf-8"))


def _on_features(protocol: Callable[..., Result], folders: list[Path], layer: str, **options: Any) -> Result:
    train, *validation, test = (load(folder, layer) for folder in folders)
    return protocol(train, test, *validation, **options)


def _few(folders: list[Path], shots: int, **options: Any) -> Result:
    return fewshot(load(folders[0]), load(folders[-1]), shots, **options)


def _fresh(candidate: Candidate, num_classes: int) -> nn.Module:
    model: Any = candidate.create()
    model.reset_classifier(num_classes)
    return model


def _finish(job: Job) -> None:
    """Compute a job and file its result, unless it is there."""
    if isinstance(_read(job), tuple):
        return
    started = time.perf_counter()
    job.path.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"key": job.key}
    try:
        result = job.compute()
        arrays: dict[str, Any] = {"correct": result.correct, "y": result.y}
        about |= {"features": result.features, "chosen": result.chosen}
    except UsageError as e:
        arrays = {"correct": np.zeros(0, np.float32), "y": np.zeros(0, np.int64)}
        # A loader's worker passes its error on with a traceback before it.
        about["problem"] = str(e).strip().splitlines()[-1].removeprefix("timm_etf.errors.UsageError: ")
    about["seconds"] = round(time.perf_counter() - started, 2)
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
            result = Result(file.get_tensor("correct"), file.get_tensor("y"), about["features"], about["chosen"])
            return result, about["seconds"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # not there, or damaged: computed again
        return None


def _seconds(extraction: dict[str, float], results: dict[Any, tuple[Result, float]]) -> dict[str, float]:
    seconds = dict(extraction)
    for (_, _, protocol, _), (_, spent) in results.items():
        seconds[protocol] = seconds.get(protocol, 0) + spent
    return {k: round(v, 1) for k, v in seconds.items()}


def _about(settings: Settings, seconds: float) -> dict[str, Any]:
    from timm_etf import __version__

    about = {
        k: v for k, v in asdict(settings).items() if k not in ("out", "features", "data_root", "batch_size", "workers")
    }
    about["versions"] = {"timm_etf": __version__, "timm": timm.__version__, "torch": torch.__version__}
    about["seconds_of_this_call"] = round(seconds, 1)
    return about


def _write(report: Report, out: Path) -> None:
    """Write results.json, report.md and, where matplotlib is installed, the pictures."""
    write_json(out / "results.json", report.as_json())
    text = report.as_markdown()
    if find_spec("matplotlib"):
        from timm_etf.transfer import plots

        pictures = plots.draw(report, out)
        text += "\n".join(["", *(f"![{title}]({name})\n" for name, title in pictures.items())])
    write_text(out / "report.md", text)


def summary(report: Report, out: Path) -> str:
    """What the command prints: the mean of every protocol, what is missing, and where the rest is."""
    lines = []
    for protocol in report.protocols:
        complete = report.complete(protocol)
        if not complete:
            continue
        means = [np.mean([np.mean(report.accuracies(la, t, protocol)) for t in complete]) for la in report.labels]
        parts = [f"{la} {m:.1f}" for la, m in zip(report.labels, means, strict=True)]
        for label in report.labels[1:]:
            difference = show(report.difference(label, complete, protocol))
            parts.append(f"{label} - {report.labels[0]}: {difference}, {report.tally(label, complete, protocol)} w/t/l")
        lines.append(f"{protocol}, mean of {len(complete)} targets: " + "; ".join(parts))
    if report.missing:
        lines.append(f"missing: {len(report.missing)}, such as {' ('.join(next(iter(report.missing.items())))})")
    lines.append(f"report:  {out / 'report.md'}")
    if (out / "transfer.png").exists():  # without matplotlib there is none
        lines.append(f"picture: {out / 'transfer.png'}")
    return "\n".join(lines)
