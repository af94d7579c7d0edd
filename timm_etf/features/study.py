"""What every measuring verb begins with: models and data, and the features of every pair of them."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from timm_etf.data.checked import otherwise
from timm_etf.data.images import Splits, find_targets, open_splits
from timm_etf.errors import UsageError, one_line
from timm_etf.features.candidates import Loaded, parse_models
from timm_etf.features.extract import Layers, Precision, extract, identity, stream
from timm_etf.processes import any_problem, processes


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Settings that all measuring verbs share; each verb's own are its command line."""

    models: tuple[str, ...]
    """[LABEL=]NAME[,ARGUMENT=VALUE...]: any timm name, the folder of a run, or hf-hub:REPO.
    The first is what the others are compared with; several under one label are trainings of one method."""
    out: Path
    """Folder of the results and the report."""
    data_root: Path = Path("data")
    """Folder that `timm-etf data build` filled."""
    features: Path | None = None
    """Folder of the feature cache, to share it between runs; by default in OUT."""
    precision: Precision = "fp32"
    """Of the models' computations; features are stored as float32."""
    batch_size: int | None = None
    """Images per forward pass; by default 256, on a CPU 64."""
    workers: int = 2
    """Loader processes."""

    def check(self) -> None:
        """Refuse values that cannot work, before anything is computed or written.

        Raises:
            UsageError: With the option to change.
        """
        if not self.models:
            raise UsageError("Give at least one model with --models.")
        for option, least in (("batch_size", 1), ("workers", 0)):
            if (value := getattr(self, option)) is not None and value < least:
                raise UsageError(f"--{option.replace('_', '-')} is at least {least}.")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file: choose another --out.")


@dataclass(frozen=True)
class Pair:
    """One model on one data set.

    Attributes:
        label: The model's label.
        model: The model, in evaluation mode.
        data: The data set's name.
        splits: Its images.
        folders: Folders of their features, by split; empty where none were asked for.
    """

    label: str
    model: nn.Module
    data: str
    splits: Splits
    folders: dict[str, Path]


@dataclass(frozen=True)
class Measured:
    """One model with its features of all data sets of which they could be computed.

    Attributes:
        number: Its place among the candidates.
        model: The model, in evaluation mode.
        identity: What its numbers depend on, see `extract.identity`.
        pairs: The model on each data set.
    """

    number: int
    model: nn.Module
    identity: dict[str, Any]
    pairs: list[Pair]


class Study:
    """Models and data sets, one after the other; what cannot be had is named in `missing` and the rest goes on.

    Args:
        inputs: What to measure and how.
        data: Data sets, see `find_targets`.
        splits: Splits to extract features of, as far as a data set has them: of `train`, `validation`, `test`.
        layers: Layers to extract.

    Raises:
        UsageError: At once, if a model or data set is not known, there is none, or `out` is a file.
    """

    def __init__(
        self,
        inputs: Inputs,
        data: Sequence[str],
        *,
        splits: Sequence[str] = ("train", "test"),
        layers: Layers | None = None,
    ) -> None:
        inputs.check()
        if not data:
            raise UsageError("Give at least one data set.")
        self.inputs, self.data, self.splits, self.layers = inputs, data, splits, layers or Layers()
        self.candidates = parse_models(inputs.models)
        targets, self.missing = find_targets(data, inputs.data_root)
        self.notes: list[str] = []
        self.weights_sha256: dict[int, str | None] = {}
        self.seconds = 0.0
        self._wanted = targets
        self.opened: dict[str, Splits] = {}

    def measured(self) -> Iterator[Measured]:
        """Every model that can be made, with its features; one model is in memory at a time.

        Raises:
            UsageError: In the end, if there is no pair of a model and a data set.
        """
        self._open()
        self.inputs.out.mkdir(parents=True, exist_ok=True)
        count = 0
        with tqdm(
            total=len(self.candidates) * len(self.opened),
            unit="pair",
            leave=False,
            disable=None if processes().is_main_process else True,
        ) as bar:
            for number, candidate in enumerate(self.candidates):
                loaded = self._create(number) if self.opened else None
                if loaded is None:
                    bar.update(len(self.opened))
                    continue
                about = identity(loaded.model, loaded.weights_sha256)
                pairs = []
                for name, splits in self.opened.items():
                    bar.set_description(f"{candidate.label} on {name}")
                    folders = self._extract(number, loaded.model, about, splits)
                    if folders is not None:
                        pairs.append(Pair(candidate.label, loaded.model, name, splits, folders))
                    bar.update()
                count += len(pairs)
                yield Measured(number, loaded.model, about, pairs)
        if not count:
            self.refuse_nothing()

    def pairs(self) -> Iterator[Pair]:
        """Every pair of a model and a data set whose features could be computed, model by model.

        Raises:
            UsageError: In the end, if there was none.
        """
        for measured in self.measured():
            yield from measured.pairs

    def refuse_nothing(self) -> None:
        """Raise `UsageError`, because nothing at all could be computed, with the first reason."""
        name, reason = next(iter(self.missing.items()), ("", "no jobs"))
        raise UsageError(f"Nothing could be computed: {name}: {reason}")

    def title(self, number: int) -> str:
        """How a candidate is called in `missing`: by its label, with its name where several share that."""
        candidate = self.candidates[number]
        alone = sum(c.label == candidate.label for c in self.candidates) == 1
        return candidate.label if alone else f"{candidate.label} ({candidate.name})"

    def note(self, text: str) -> None:
        """Remember something for the report, once."""
        self.notes += [text] if text not in self.notes else []

    def settings(self) -> dict[str, Any]:
        """What was asked for and with which versions, for results.json."""
        from timm_etf import __version__

        versions = {"timm_etf": __version__, "timm": timm.__version__, "torch": torch.__version__}
        asked = {"models": self.inputs.models, "data": self.data, "precision": self.inputs.precision}
        return {**asked, "versions": versions}

    def record(self) -> dict[str, Any]:
        """Settings, weights, notes and what is missing, for results.json."""
        hashes: dict[str, list[str | None]] = {}
        for number, sha256 in self.weights_sha256.items():
            hashes.setdefault(self.candidates[number].label, []).append(sha256)
        return {
            "settings": self.settings(),
            "weights_sha256": hashes,
            "notes": self.notes,
            "missing": self.missing,
        }

    def _open(self) -> None:
        for target in self._wanted:
            problem = ""
            try:
                splits = open_splits(target)
            except Exception as e:
                problem = one_line(e)
            if problem := any_problem(problem):
                self.missing[target.name] = problem
                continue
            self.opened[target.name] = splits
            if remark := otherwise(target, len(splits.train.class_names), len(splits.test)):
                self.note(remark)
            if splits.target.test != target.test:
                self.note(f"{target.name}: scored on its {splits.target.test} split, as it has no {target.test} split")

    def _create(self, number: int) -> Loaded | None:
        problem = ""
        try:
            loaded = self.candidates[number].create()
            loaded.model.to(processes().device)
            label, sha256 = self.candidates[number].label, loaded.weights_sha256
            twins = [n for n, s in self.weights_sha256.items() if s == sha256 and self.candidates[n].label == label]
            if sha256 and twins:
                problem = f"its weights are those of {self.candidates[twins[0]].name}: one training counts once"
        except Exception as e:
            problem = one_line(e)
        if problem := any_problem(problem):
            self.missing[self.title(number)] = problem
            return None
        self.weights_sha256[number] = sha256
        return loaded

    def _extract(
        self, number: int, model: nn.Module, made_from: dict[str, Any], splits: Splits
    ) -> dict[str, Path] | None:
        name, started, folders = splits.target.name, time.perf_counter(), {}
        try:
            for split in self.splits:
                images = getattr(splits, split)
                if images is None:
                    continue
                folders[split] = extract(
                    model,
                    images,
                    self.inputs.features or self.inputs.out / "features",
                    layers=self.layers,
                    precision=self.inputs.precision,
                    batch_size=self.inputs.batch_size,
                    workers=self.inputs.workers,
                    made_from=made_from,
                )
                about = json.loads((folders[split] / "features.json").read_text(encoding="utf-8"))
                if unreadable := about["unreadable"]:
                    self.note(
                        f"{name}: {len(unreadable)} images could not be read and were left out: {unreadable[0]}, ..."
                    )
        except Exception as e:
            self.missing[f"{self.title(number)}: {name}"] = one_line(e)
            return None
        finally:
            self.seconds += time.perf_counter() - started
        return folders


def sample(folder: Path, images: int, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """At most so many of a split's features and labels, evenly spaced, so that its classes keep their shares.

    Args:
        folder: Of the features.
        images: How many there are.
        most: How many to take.
    """
    rows = spaced(images, most)
    x, y, seen = [], [], 0
    for x_chunk, y_chunk in stream(folder):
        here = rows[(rows >= seen) & (rows < seen + len(y_chunk))] - seen
        x.append(x_chunk[here])
        y.append(y_chunk[here])
        seen += len(y_chunk)
    return np.concatenate(x), np.concatenate(y)


def spaced(rows: int, most: int) -> NDArray[np.int64]:
    """At most so many of the rows, evenly spaced.

    Example:
        >>> spaced(7, 3).tolist(), spaced(2, 3).tolist()
        ([0, 2, 4], [0, 1])
    """
    count = min(rows, most)
    return np.arange(count) * rows // max(1, count)
