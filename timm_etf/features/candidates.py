"""The models of a comparison: what a command line names them, and how they are made."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from timm_etf import specs
from timm_etf.errors import UsageError, first_line
from timm_etf.hub.load import create_located, locate


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        label: What it is called in tables; candidates of one label are repetitions of one method (training seeds).
        name: What `timm_etf.create_model` takes.
        kwargs: Further arguments of `create_model`.
    """

    label: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self) -> "Loaded":
        """Make the model, with its weights.

        Raises:
            UsageError: If it cannot be made, for whatever reason timm or the Hub gives.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                # Whatever has no weights is the same in every process and call. Of the CPU's generator alone: the
                # others' state is not put back.
                torch.default_generator.manual_seed(0)
                return self._create()
        except UsageError:
            raise
        except Exception as e:  # timm and the Hub have many: no weights, no network, wrong argument, damaged file
            raise UsageError(f"Cannot create {self.name}: {first_line(e)}") from e

    def _create(self) -> "Loaded":
        kwargs = {"pretrained": True, **self.kwargs}
        if parse_model_name(self.name)[0] is None:
            return Loaded(timm.create_model(self.name, **kwargs).eval(), None)
        located = locate(self.name, weights=kwargs.pop("pretrained"), cache_dir=kwargs.get("cache_dir"))
        return Loaded(create_located(located, **kwargs).eval(), located.weights_sha256)


@dataclass(frozen=True)
class Loaded:
    """A candidate's model.

    Attributes:
        model: The model, in evaluation mode.
        weights_sha256: SHA-256 of the file of a folder's or repository's weights; None for what timm itself knows.
    """

    model: nn.Module
    weights_sha256: str | None


def parse_models(texts: Sequence[str]) -> list[Candidate]:
    """Candidates of a command line, `[LABEL=]NAME[,ARGUMENT=VALUE...]`.

    NAME is a timm name, `hf-hub:REPO`, `local-dir:FOLDER`, or the folder of a run or an export. Several candidates
    under one label are repetitions of one method.

    Raises:
        UsageError: If a name is unknown, a folder is missing, or two candidates get one label by accident or are the
            same model.

    Example:
        >>> parse_models(["random=resnet18,pretrained=False", "resnet18"])[0]
        Candidate(label='random', name='resnet18', kwargs={'pretrained': False})
    """
    candidates: list[Candidate] = []
    given: list[bool] = []
    for text in texts:
        first, arguments = specs.split(text)
        label, name = _label_and_name(first)
        name = _checked(name)
        kwargs = {k: specs.value(v) for k, v in arguments.items()}
        candidates.append(Candidate(label or _default_label(parse_model_name(name)[1]), name, kwargs))
        given.append(bool(label))
    for number, candidate in enumerate(candidates):
        if not given[number] and sum(c.label == candidate.label for c in candidates) > 1:
            raise UsageError(f"Two models are called {candidate.label!r}: name them, as in LABEL={candidate.name}")
        if candidate in candidates[:number]:
            raise UsageError(f"{candidate.label}={candidate.name} is given twice: one training counts once.")
        if not re.fullmatch(r"\w[\w .+=()-]*", candidate.label):
            raise UsageError(
                f"{candidate.label!r} cannot be a label, which names a folder of results: use letters, digits, spaces "
                "and any of _ - + = . ( ), as in LABEL=NAME."
            )
    return candidates


def _label_and_name(text: str) -> tuple[str, str]:
    """What stands before the first equals sign, unless that is part of a path."""
    label, equals, name = text.partition("=")
    is_path = ":" in label or "/" in label or (Path(text).exists() and not Path(name).exists())
    return ("", text) if not equals or is_path else (label, name)


def _checked(name: str) -> str:
    """A name that `timm_etf.create_model` takes and that exists, as far as this can be seen without a network."""
    try:
        source, path = parse_model_name(name) if ":" in name or not Path(name).is_dir() else ("local-dir", name)
    except ValueError as e:
        raise UsageError(f"{name!r} is no folder on this machine. {first_line(e)}") from None
    if source == "local-dir":
        folder = next((f for f in (Path(path), Path(path) / "export") if (f / "config.json").exists()), None)
        if folder is None:
            raise UsageError(f"{name}: no config.json in that folder; an exported model has one (RUN/export).")
        return f"local-dir:{folder}"
    if source is None and not timm.is_model(name):
        raise UsageError(f"timm knows no model {name!r}: see timm-etf models, or give a folder or hf-hub:REPO.")
    return name


def _default_label(path: str) -> str:
    parts = [p for p in Path(path).parts if p != "export"]
    return parts[-1] if parts else path
