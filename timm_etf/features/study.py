"""What the figures share: models and data, every pair of them with its features, and what the reports say alike."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from timm_etf.atomic import file_sha256
from timm_etf.data.images import Splits, open_splits, resolve
from timm_etf.errors import UsageError
from timm_etf.features.candidates import Candidate, parse_models
from timm_etf.features.extract import Precision, extract, stream, weights_hash
from timm_etf.processes import processes


@dataclass(frozen=True)
class Inputs:
    """What a figure is about.

    Attributes:
        models: Models, `[LABEL=]NAME[,ARGUMENT=VALUE...]`; several under one label are trainings of one method.
        data: Data sets, see `timm_etf.transfer.resolve`.
        out: Folder of the results.
        data_root: Folder that `timm-etf data build` filled.
        features: Folder of the feature cache, such as that of a transfer run; by default in `out`.
        precision: Of the models' computations.
        batch_size: Images per forward pass.
        workers: Loader processes.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    out: Path
    data_root: Path = Path("data")
    features: Path | None = None
    precision: Precision = "fp32"
    batch_size: int = 256
    workers: int = 2


@dataclass(frozen=True)
class Pair:
    """One model on one data set.

    Attributes:
        label: The model's label.
        model: The model, in evaluation mode.
        data: The data set's name.
        splits: Its images.
        folders: Folders of their features, by split: `train` and `test`.
    """

    label: str
    model: nn.Module
    data: str
    splits: Splits
    folders: dict[str, Path]


@dataclass
class Study:
    """All pairs of the inputs, one after the other; what cannot be had is named and the rest goes on.

    Raises:
        UsageError: At once, if a model or data set is not known, there is none, or `out` is a file.
    """

    inputs: Inputs
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights_sha256: dict[str, list[str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inputs.models or not self.inputs.data:
            raise UsageError("Give at least one model and one data set.")
        if self.inputs.batch_size < 1 or self.inputs.workers < 0:
            raise UsageError("--batch-size is at least 1, --workers at least 0.")
        if self.inputs.out.exists() and not self.inputs.out.is_dir():
            raise UsageError(f"{self.inputs.out} is a file: choose another --out.")
        self.candidates = parse_models(self.inputs.models)
        self.targets, missing = resolve(self.inputs.data, self.inputs.data_root)
        self.missing |= missing

    def pairs(self) -> Iterator[Pair]:
        """Every pair whose features could be computed, model by model.

        Raises:
            UsageError: In the end, if there was none.
        """
        opened: dict[str, Splits] = {}
        for target in self.targets:
            try:
                opened[target.name] = open_splits(target)
            except UsageError as e:
                self.missing[target.name] = str(e)
        self.inputs.out.mkdir(parents=True, exist_ok=True)
        count = 0
        steps = [(c, name) for c in self.candidates for name in opened]
        bar = tqdm(total=len(steps), unit="pair", leave=False, disable=None if processes().is_main_process else True)
        with bar:
            for candidate in self.candidates:
                model = self._create(candidate) if opened else None
                weights = None if model is None else weights_hash(model)
                for name, splits in opened.items():
                    bar.set_description(f"{candidate.label} on {name}")
                    if model is not None and (folders := self._extract(candidate, model, weights, name, splits)):
                        yield Pair(candidate.label, model, name, splits, folders)
                        count += 1
                    bar.update()
        if not count:
            reason = next(iter(self.missing.items()))
            raise UsageError(f"Nothing could be computed: {reason[0]}: {reason[1]}")

    def record(self) -> dict[str, Any]:
        """What was asked for and with which versions, for results.json."""
        from timm_etf import __version__

        about = {k: v for k, v in asdict(self.inputs).items() if k in ("models", "data", "precision")}
        about["versions"] = {"timm_etf": __version__, "timm": timm.__version__, "torch": torch.__version__}
        return {
            "settings": about,
            "weights_sha256": self.weights_sha256,
            "notes": self.notes,
            "missing": self.missing,
        }

    def _create(self, candidate: Candidate) -> nn.Module | None:
        try:
            model = candidate.create().to(processes().device).eval()
            file = candidate.weights_file()
        except UsageError as e:
            self.missing[candidate.label] = str(e)
            return None
        self.weights_sha256.setdefault(candidate.label, []).append(file_sha256(file) if file else None)
        return model

    def _extract(
        self, candidate: Candidate, model: nn.Module, weights: str | None, name: str, splits: Splits
    ) -> dict[str, Path] | None:
        folders = {}
        try:
            for split, images in (("train", splits.train), ("test", splits.test)):
                folders[split] = extract(
                    model,
                    images,
                    self.inputs.features or self.inputs.out / "features",
                    precision=self.inputs.precision,
                    batch_size=self.inputs.batch_size,
                    workers=self.inputs.workers,
                    weights=weights,
                )
                about = json.loads((folders[split] / "features.json").read_text(encoding="utf-8"))
                if unreadable := about["unreadable"]:
                    text = f"{name}: {len(unreadable)} images could not be read and were left out: {unreadable[0]}, ..."
                    self.notes += [text] if text not in self.notes else []
        except UsageError as e:
            self.missing[f"{candidate.label}: {name}"] = str(e)
            return None
        return folders


def sample(folder: Path, images: int, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """At most so many of a split's features and labels, evenly spaced, so that its classes keep their shares.

    Args:
        folder: Of the features.
        images: How many there are.
        most: How many to take.
    """
    every = -(-images // most)
    x, y, seen = [], [], 0
    for x_chunk, y_chunk in stream(folder):
        first = -seen % every
        x.append(x_chunk[first::every])
        y.append(y_chunk[first::every])
        seen += len(y_chunk)
    return np.concatenate(x), np.concatenate(y)
