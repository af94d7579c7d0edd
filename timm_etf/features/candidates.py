"""The models of a comparison: what a command line names them, and how they are made."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from timm_etf.errors import UsageError
from timm_etf.hub import create_model
from timm_etf.hub.load import locate


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

    def create(self) -> nn.Module:
        """Make the model, with its weights.

        Raises:
            UsageError: If it cannot be made, for whatever reason timm or the Hub gives.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # whatever has no weights is the same in every process and call
                return create_model(self.name, **{"pretrained": True, **self.kwargs})
        except UsageError:
            raise
        except Exception as e:  # timm and the Hub have many: no weights, no network, wrong argument, damaged file
            first = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise UsageError(f"Cannot create {self.name}: {first}") from e

    def weights_file(self) -> Path | None:
        """The file of a folder's or repository's weights; None for what timm itself knows."""
        if parse_model_name(self.name)[0] is None or not self.kwargs.get("pretrained", True):
            return None
        return locate(self.name, cache_dir=self.kwargs.get("cache_dir")).weights


def parse_models(specs: Sequence[str]) -> list[Candidate]:
    """Candidates of a command line, `[LABEL=]NAME[,ARGUMENT=VALUE...]`.

    Several specs under one label are repetitions of one method.

    Raises:
        UsageError: If a name is unknown, a folder is missing, or two candidates get one label by accident.

    Example:
        >>> parse_models(["random=resnet18,pretrained=False", "resnet18"])[0]
        Candidate(label='random', name='resnet18', kwargs={'pretrained': False})
    """
    candidates: list[Candidate] = []
    given: list[bool] = []
    for spec in specs:
        first, *rest = spec.split(",")
        label, equals, name = first.rpartition("=")
        source, path = parse_model_name(name)
        if source == "local-dir" and not (Path(path) / "config.json").exists():
            raise UsageError(f"{name}: no config.json in that folder; an exported model has one (RUN/export).")
        if source is None and not timm.is_model(name):
            raise UsageError(
                f"timm knows no model {name!r}: see timm-etf models, or give local-dir:FOLDER or hf-hub:REPO."
            )
        candidates.append(Candidate(label or _default_label(path), name, dict(map(_argument, rest))))
        given.append(bool(equals))
    for candidate, named in zip(candidates, given, strict=True):
        if not named and sum(c.label == candidate.label for c in candidates) > 1:
            raise UsageError(f"Two models are called {candidate.label!r}: name them, as in LABEL={candidate.name}")
    if odd := [c.label for c in candidates if "/" in c.label or c.label.startswith(".")]:
        raise UsageError(f"{odd[0]!r} cannot be a label: it names a folder of results.")
    return candidates


def _default_label(path: str) -> str:
    parts = [p for p in Path(path).parts if p != "export"]
    return parts[-1] if parts else path


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is no argument of a model: write NAME,argument=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
