"""Starting from weights that are there, under a new classifier."""

from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_etf.classifier import classifier_names
from timm_etf.errors import UsageError, first_line


def warm_start(model: nn.Module, weights: str, in_chans: int, img_size: int | None = None) -> None:
    """Give a model the backbone of other weights; its own classifier stays as it is.

    Args:
        model: A timm model; changed.
        weights: A timm name (resnet50.a1_in1k), a folder (local-dir:FOLDER), a repository (hf-hub:ORG/NAME) or a file
            of weights of the same architecture.
        in_chans: Image channels; timm adapts the first convolution to them.
        img_size: Image side in pixels, if positions have to be adapted to it.

    Raises:
        UsageError: If there are no such weights, or they are another architecture's.
    """
    try:
        if Path(weights).is_file():
            found = load_state_dict(weights)
        else:
            size: dict[str, Any] = {"img_size": img_size} if img_size else {}
            found = timm.create_model(weights, pretrained=True, in_chans=in_chans, **size).state_dict()
    except Exception as e:  # timm, the Hub's client and torch each have their own kinds
        raise UsageError(f"Cannot start from {weights} ({first_line(e).rstrip('.')}): check --init.") from e
    heads = tuple(f"{name}." for name in classifier_names(model))

    def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(t.shape) for key, t in tensors.items() if not key.startswith(heads)}

    ours, theirs = shapes(model.state_dict()), shapes(found)
    if ours != theirs:
        key = next(k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k))
        raise UsageError(
            f"The weights of {weights} do not fit: {key} is {theirs.get(key, 'not there')} there and "
            f"{ours.get(key, 'not there')} in this model. --init needs the same architecture and arguments."
        )
    model.load_state_dict({key: found[key] for key in theirs}, strict=False)
