"""results.json: what is in it, and how it is read and written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from timm_etf.atomic import write_json
from timm_etf.errors import UsageError, first_line

SCHEMA = 1
"""Version of what `write` writes. Files without one are older; they have fewer keys and the same meaning."""

Interval = list[float]
"""Lower and upper end, 95 %, in the unit of what it is of."""

Collapse = dict[str, float | None]
"""`nc1`, `cdnv`, `vci`, `within` and others by name; None, or not there, where it is not finite."""


class Head(TypedDict):
    """What the results of every measuring verb begin with.

    Attributes:
        schema: `SCHEMA`.
        settings: What was asked for, and `versions`.
        weights_sha256: Hashes of the weights' files of each label's trainings, None for what timm itself knows.
        notes: Remarks.
        missing: Why something has no result, by what it is.
    """

    schema: NotRequired[int]
    settings: dict[str, Any]
    weights_sha256: dict[str, list[str | None]]
    notes: list[str]
    missing: dict[str, str]


class Difference(TypedDict):
    """Accuracy of a label less the reference's, percentage points; see `transfer.comparison.Difference`."""

    mean: float
    interval_over_test_images: Interval
    interval_over_runs: Interval | None
    interval_over_runs_and_images: NotRequired[Interval | None]
    runs_are: NotRequired[Literal["trainings", "protocol seeds"] | None]
    by_run: list[float]


class Measured(TypedDict):
    """Accuracy in percent of one training, averaged over protocol seeds."""

    accuracy: float
    interval_over_test_images: Interval


class Label(Measured):
    """A label on one target: `by_model` has its trainings, `runs` and `chosen` every seed of each.

    `at_grid_edge` counts the runs that chose a hyper-parameter at an end of its grid.
    """

    by_model: list[Measured]
    runs: list[list[float]]
    chosen: list[list[dict[str, Any]]]
    at_grid_edge: NotRequired[dict[str, int]]


class OnTarget(TypedDict):
    """One target under one protocol; `features` says what was done to them.

    `order` has, where the target has a tree, `geometry.of_rankings` or `of_neighbours` by label, of every repetition.
    """

    metric: Literal["top1", "mean_per_class"]
    test_images: int
    features: str
    models: dict[str, Label]
    order: NotRequired[dict[str, dict[str, list[float | None]]]]
    differences: NotRequired[dict[str, Difference]]


class Mean(TypedDict):
    """Means over targets, by label; `targets` are the reference's, `targets_by_label` each label's own."""

    targets: list[str]
    targets_by_label: NotRequired[dict[str, list[str]]]
    accuracy: dict[str, float]
    log_odds: dict[str, float]
    differences: dict[str, Difference]


class Protocol(TypedDict):
    """One protocol; `mean` is None where no target is complete."""

    targets: dict[str, OnTarget]
    mean: Mean | None


class Correlation(TypedDict):
    """Rank correlation of a difference with the distance; the interval is over targets and trainings."""

    spearman: float
    interval: Interval


class Distance(TypedDict):
    """How far targets are from the source: by label, or `neutral`, target and kind; and by protocol and label."""

    source: str
    by_model: dict[str, dict[str, dict[str, float]]]
    difference_over_distance: dict[str, dict[str, Correlation]]


class Transfer(Head):
    """results.json of `timm-etf transfer`; `reference` is None where it has no result."""

    reference: str | None
    t_intervals_over: str
    protocols: dict[str, Protocol]
    collapse_of_train_features: dict[str, dict[str, list[Collapse | None]]]
    seconds: dict[str, float]
    distance: NotRequired[Distance]


class Pair(TypedDict):
    """Queries of one label in galleries of another.

    `trainings` are pairs of numbers, query before gallery; `spaces` has every metric of each of these, in percent.
    """

    queries: str
    gallery: str
    trainings: list[list[int]]
    spaces: dict[str, dict[str, list[float]]]
    difference: NotRequired[dict[str, list[float]]]
    update_gain: NotRequired[dict[str, float | None]]


class OnGallery(TypedDict):
    """Retrieval on one data set; `weights_sha256` has the trainings in the order of their numbers.

    `classes` are its own, and `classes_of_the_models` how many of them every model names among its own.
    """

    gallery: int
    queries: int
    classes: NotRequired[int]
    classes_of_the_models: NotRequired[int]
    weights_sha256: list[str | None]
    pairs: list[Pair]
    compatibility: dict[str, dict[str, float]]


class Retrieval(Head):
    """results.json of `timm-etf retrieval`, by data set."""

    retrieval: dict[str, OnGallery]


class OwnSearch(TypedDict):
    """Mean recall@1 by space, percent, over a checkpoint's pairs with the trainings of a label; None is itself."""

    queries: str | None
    gallery: str | None
    pairs: int
    spaces: dict[str, float]


class OwnGallery(TypedDict):
    """What retrieval on one data set found for one checkpoint; the first of `searches` is with itself."""

    gallery: int
    queries: int
    searches: list[OwnSearch]


class OwnRow(Measured):
    """One training on one target, and its label's difference from the reference."""

    metric: str
    test_images: int
    difference: NotRequired[Difference | None]


class OwnMean(TypedDict):
    """One training's mean over targets."""

    accuracy: float
    targets: list[str]
    difference: NotRequired[Difference | None]


class OwnProtocol(TypedDict):
    """One training under one protocol."""

    targets: dict[str, OwnRow]
    mean: OwnMean | None


class Own(TypedDict):
    """What a transfer comparison found for one checkpoint; see `hub.card.own_results`."""

    label: NotRequired[str]
    weights_sha256: NotRequired[str]
    reference: NotRequired[str | None]
    trainings: NotRequired[dict[str, int]]
    seeds_of_protocols: int
    versions: NotRequired[dict[str, str]]
    protocols: dict[str, OwnProtocol]
    collapse: NotRequired[dict[str, Collapse]]


class Checkpoint(TypedDict, total=False):
    """results.json of an exported or published checkpoint.

    Attributes:
        schema: `SCHEMA`.
        source: The source task: `data`, `count`, `top1` and `top5` in percent, collapse metrics, how it was trained.
        finetuned: Of a model that `timm-etf transfer` kept: what it was fine-tuned from (`finetuned_from`), on which
            `target`, with which `seed`, and the `key` of that result.
        transfer: One part for each comparison.
        retrieval: By data set.
    """

    schema: int
    source: dict[str, Any]
    finetuned: dict[str, Any]
    transfer: list[Own]
    retrieval: dict[str, OwnGallery]


_WRITERS: dict[type, str] = {Transfer: "timm-etf transfer", Checkpoint: "timm-etf pretrain or export"}
_WRITERS[Retrieval] = "timm-etf retrieval"

T = TypeVar("T", Transfer, Checkpoint, Retrieval)


def writer(path: Path) -> type[Transfer] | type[Retrieval]:
    """Which comparison a results.json is of; `Transfer` where it cannot be told, which `read` then refuses."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Transfer
    return Retrieval if isinstance(found, dict) and "retrieval" in found else Transfer


def read(path: Path, kind: type[T]) -> T:
    """Read a results.json and check that it has every key of `kind`, each of the right type.

    Raises:
        UsageError: If it cannot be read, is another file, or was written by a newer version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.get("schema", SCHEMA) if isinstance(found, dict) else SCHEMA
        if isinstance(version, int) and version > SCHEMA:
            raise UsageError(f"{path} was written by a newer timm_etf (schema {version}): pip install -U timm_etf")
        if problem := _problem(found, kind):
            raise ValueError(problem)
    except UsageError:
        raise
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is not a results.json of {_WRITERS[kind]} ({first_line(e)}): give that one.") from e
    return cast(T, found)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results.json, atomically, its version first. JSON has no infinity: what is not finite becomes null."""
    write_json(path, {"schema": SCHEMA} | _finite(dict(results)))


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
    return value


def _problem(value: Any, kind: Any, where: str = "") -> str | None:
    """The first thing in `value` that is not of the type `kind`, or None."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin in (Union, UnionType):
        problems = [_problem(value, arg, where) for arg in args]
        return None if None in problems else problems[0]
    if origin is Literal:
        return None if value in args else f"{where} is {value!r}"
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{where or 'it'} is no object"
        hints = get_type_hints(kind)
        if lacking := sorted(kind.__required_keys__ - value.keys()):
            return f"{_inside(where, lacking[0])} is missing"
        parts: list[tuple[Any, Any, Any]] = [(k, value[k], hint) for k, hint in hints.items() if k in value]
    elif origin in (dict, list):
        if not isinstance(value, origin):
            return f"{where} is no {origin.__name__}"
        parts = [(k, v, args[-1]) for k, v in (value.items() if origin is dict else enumerate(value))]
    else:
        wanted = (int, float) if kind is float else kind
        return None if isinstance(value, wanted) else f"{where} is {str(value)[:40]!r}"
    return next((p for k, v, hint in parts if (p := _problem(v, hint, _inside(where, k)))), None)


def _inside(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
