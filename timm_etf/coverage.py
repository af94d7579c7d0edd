"""What each timm architecture can hold: its classifier's width, the frame for K classes, and what fixing it saves."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timm_etf import frames
from timm_etf.atomic import write_json
from timm_etf.errors import UsageError
from timm_etf.frames.codes import cached_coherence

_logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_suffix(".json")
"""Every architecture of one version of timm and its classifiers, so that neither is built nor timm imported to tell
them; `python tests/sweep_variants.py` writes it."""

Classifiers = dict[str, list[tuple[int, bool]]]
"""Width of the features, and whether there is a bias, of each classifier of each architecture, by timm's name."""


@dataclass(frozen=True)
class Coverage:
    """One architecture with K classes; of several classifiers, the worst coherence and all savings."""

    name: str
    """timm name of the variant."""
    widths: tuple[int, ...]
    """Width d of the features that enter each classifier."""
    frames: tuple[str, ...]
    """Frame that `"auto"` gives each classifier."""
    coherence: float | None
    """Largest cosine between two classes; None for a spherical code that this machine has not computed yet."""
    bound: float
    """No K vectors in d dimensions have a smaller one."""
    saved_parameters: int
    """Parameters that are not trained: K d, and K for a bias."""
    saved_bytes: int
    """Their gradients and SGD's momentum in float32."""


def coverage(pattern: str = "*", num_classes: int = 1000, *, compute: bool = False) -> list[Coverage]:
    """How well K classes fit into timm's architectures.

    Args:
        pattern: Wildcard of timm names without the suffix, such as `"resnet*"`.
        num_classes: K, at least 2.
        compute: Compute the spherical codes that are not cached yet, seconds for each pair of K and d (minutes for
            more than 20,000 classes); otherwise their coherence is None.

    Returns:
        One entry for each `_etf` variant that matches, by name.

    Raises:
        UsageError: If nothing matches or K < 2.

    Example:
        >>> [row] = coverage("resnet18", 1000)
        >>> row.widths, row.frames, row.bound, row.saved_parameters
        ((512,), ('orthoplex',), 0.0, 513000)
    """
    if num_classes < 2:
        raise UsageError(f"A classifier needs at least 2 classes, got {num_classes}.")
    pattern = pattern.removesuffix("_etf")
    shipped = _shipped()
    if shipped and "_sw" not in pattern:
        found = {name: heads for name, heads in shipped["classifiers"].items() if fnmatch(name, pattern)}
    else:
        found = classifiers(pattern)
    if not found:
        reasons = "".join(f" {name} is left out: {reason}." for name, reason in left_out(pattern).items())
        raise UsageError(f"No architecture matches {pattern!r}: timm.list_models() lists the names.{reasons}")
    return [_coverage(f"{name}_etf", heads, num_classes, compute) for name, heads in found.items()]


def left_out(pattern: str = "*") -> dict[str, str]:
    """timm architectures that match but have no `_etf` variant, and why."""
    if shipped := _shipped():
        reasons = shipped["left_out"]
    else:
        from timm_etf.variants import skipped as reasons
    return {name: reason for name, reason in reasons.items() if fnmatch(name, pattern.removesuffix("_etf"))}


@cache
def _shipped() -> dict[str, Any] | None:
    """What is in `SHIPPED`, if that is of the timm that is installed."""
    found = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return found if found["timm"] == version("timm") else None


def _coverage(name: str, heads: list[tuple[int, bool]], num_classes: int, compute: bool) -> Coverage:
    widths = tuple(width for width, _ in heads)
    kinds = tuple(frames.resolve("auto", num_classes, width) for width in widths)
    coherences = [_coherence(kind, num_classes, width, compute) for kind, width in zip(kinds, widths, strict=True)]
    saved = sum(num_classes * (width + bias) for width, bias in heads)
    return Coverage(
        name=name,
        widths=widths,
        frames=kinds,
        coherence=None if None in coherences else max(c for c in coherences if c is not None),
        bound=max(frames.bound(num_classes, width) for width in widths),
        saved_parameters=saved,
        saved_bytes=8 * saved,
    )


def _coherence(kind: str, num_classes: int, width: int, compute: bool) -> float | None:
    if kind != "spherical_code":
        return frames.rankin_bound(num_classes, width)  # which these two reach
    known = cached_coherence(num_classes, width)
    if known is None and compute:
        known = frames.coherence(frames.spherical_code(num_classes, width))
    return known


def classifiers(pattern: str) -> Classifiers:
    """The classifiers of the architectures that match and have a variant.

    Only building a model tells them; on the meta device that costs a tenth of a second, so they are kept on disk for
    this version of timm.
    """
    import timm
    import torch
    from tqdm import tqdm

    from timm_etf.classifier import fixed_classifiers
    from timm_etf.variants import SUFFIX, SW_SUFFIX, base_name

    names = [base_name(variant) for variant in timm.list_models(pattern + SUFFIX)]
    if SW_SUFFIX not in pattern:  # whitening changes nothing here
        names = [name for name in names if not name.endswith(SW_SUFFIX)]
    known: Classifiers = {}
    with suppress(OSError, ValueError):  # no place for a cache, not yet there, or damaged
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    missing = [name for name in names if name not in known]
    for name in tqdm(missing, desc="reading architectures", unit="model", delay=2, mininterval=0.5, leave=False):
        with torch.device("meta"):
            model = timm.create_model(name + SUFFIX, num_classes=10)
        known[name] = [(head.in_features, head.bias is not None) for _, head in fixed_classifiers(model)]
    if missing:
        try:
            write_json(_cache_file(), known)
        except (OSError, ValueError) as e:  # ValueError: where the folder should be there is a file
            _logger.warning(f"The widths of the classifiers could not be kept ({e}): HF_HOME says where.")
    return {name: [(width, bias) for width, bias in known[name]] for name in names}


def _cache_file() -> Path:
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("timm_etf", "models", "architectures")  # made here, if it was not there
    return folder / f"timm-{version('timm')}.json"


def table(rows: list[Coverage], num_classes: int) -> str:
    """Coverage as aligned text, with one line of summary."""
    header = ("name", "width", "frame", "coherence", "bound", "not trained", "saved")
    cells = [
        (
            row.name,
            "+".join(map(str, row.widths)),
            "+".join(dict.fromkeys(row.frames)),
            "?" if row.coherence is None else f"{row.coherence:.4f}",
            f"{row.bound:.4f}",
            f"{row.saved_parameters:,}",
            f"{row.saved_bytes / 1e6:,.1f} MB",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    aligned = "<><>>>>"
    lines = [
        "  ".join(f"{cell:{side}{n}}" for cell, side, n in zip(line, aligned, widths, strict=True))
        for line in (header, *cells)
    ]
    counts = {f: sum(f in row.frames for row in rows) for f in ("simplex", "orthoplex", "spherical_code")}
    lines.append(
        f"{len(rows)} architectures at K = {num_classes}: "
        + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    )
    if any(row.coherence is None for row in rows):
        lines.append("?: not computed on this machine yet; --compute does it")
    return "\n".join(line.rstrip() for line in lines)
