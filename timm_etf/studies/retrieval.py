"""`timm-etf retrieval`: does a new model find what an old one has indexed? Every model in every other's gallery."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from timm_etf.embedding import Coordinates, in_one_order, meeting, shared
from timm_etf.errors import UsageError
from timm_etf.features.candidates import parse_models
from timm_etf.features.extract import load
from timm_etf.features.study import Inputs, Study
from timm_etf.processes import exact_device, processes
from timm_etf.report.page import closing, remarks, row, write
from timm_etf.report.statistics import t_interval
from timm_etf.retrieval import METRICS, procrustes, ranked

MAIN = METRICS[0]
"""What compatibility and gain are about."""

UNTURNED = ("features", "coordinates", "centred", "logits")
"""Spaces in which vectors are compared as they are."""

LEAST_GAIN = 1.0
"""Percentage points that embedding the gallery again gains, for a share of it to mean anything."""

CENTRED = 100
"""Images of the gallery whose mean is subtracted, at most; thirty do as well."""

_BLOCK = 8192
"""Features that are put into coordinates at once."""


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Search galleries that one model has embedded with queries of another: what an index is worth to a new model."""

    data: tuple[str, ...]
    """Data sets, as the targets of timm-etf transfer: training images are the gallery, test images the queries."""
    fitted: tuple[int, ...] = (30, 100, 300, 1000)
    """Numbers of gallery images, embedded by both models, that Procrustes is fitted on, for comparison."""
    free: str | None = None
    """Label of freely trained models: what embedding again gains is what these find; by default each by itself."""
    seed: int = 0
    """Seed of their choice."""

    def check(self) -> None:
        """Refuse values that cannot work; see `Inputs.check`."""
        super().check()
        if any(n < 1 for n in self.fitted):
            raise UsageError("--fitted takes numbers of images, at least 1; without any rotation is what features are.")
        if self.free and self.free not in (labels := [candidate.label for candidate in parse_models(self.models)]):
            raise UsageError(f"--free {self.free}: it is one of the labels, {', '.join(dict.fromkeys(labels))}.")


@dataclass(frozen=True)
class Training:
    """One training on one data set.

    Attributes:
        label: Its label.
        weights_sha256: Hash of its weights' file, if they are from one.
        coordinates: Of its features.
        folders: Of its features, by split.
    """

    label: str
    weights_sha256: str | None
    coordinates: Coordinates
    folders: dict[str, Path]

    def features(self, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features [n, d] and labels [n] of a split."""
        found = load(self.folders[split])
        return torch.from_numpy(found.x).to(device), torch.from_numpy(found.y).to(device)

    def placed(self, features: Tensor, other: "Training", *, as_logits: bool = False) -> Tensor:
        """Features relative to the classes that both trainings have, [n, K]; in centred logits if frames differ."""
        mine, theirs = meeting(self.coordinates, other.coordinates)
        place = mine if mine.kind == theirs.kind and not as_logits else mine.logits
        return torch.cat([place(block) for block in features.split(_BLOCK)])

    def in_a_frame(self, other: "Training") -> bool:
        """Whether the coordinates in which they meet are others than their centred logits."""
        mine, theirs = meeting(self.coordinates, other.coordinates)
        return mine.kind == theirs.kind and mine.basis is not None


def run(settings: Settings) -> dict[str, Any]:
    """Search every model's gallery with every model's queries and write the report, results.json and pictures.

    Under accelerate's launcher the processes share the computation of features and the galleries to be searched.

    Returns:
        What is in results.json: for each data set the metrics of every pair of labels, space and pair of trainings.

    Raises:
        UsageError: If the inputs are wrong, a model has no classifier or shares no classes with another, or nothing at
            all could be computed.
    """
    study = Study(settings, settings.data)
    device = exact_device(processes().device)
    by_data: dict[str, list[Training]] = {}
    seen: list[tuple[str, Coordinates]] = []
    for measured in study.measured():
        coordinates = joined(study, measured.number, Coordinates.of(measured.model), seen)
        coordinates.head.to(device)
        seen.append((study.candidates[measured.number].label, coordinates))
        weights = study.weights_sha256[measured.number]
        for pair in measured.pairs:
            by_data.setdefault(pair.data, []).append(Training(pair.label, weights, coordinates, pair.folders))
    if len({(c.kind, c.names) for _, c in seen}) > 1 and any(c.basis is not None for _, c in seen):
        study.note(
            "frames of different kinds, or of different classes and no simplexes, have no coordinates in common: their "
            "pairs have centred logits instead"
        )
    found = {data: compare(study, data, trainings, settings, device) for data, trainings in by_data.items()}
    results = {"retrieval": found, **study.record()}
    results["settings"] |= {"fitted": list(settings.fitted), "seed": settings.seed}
    if processes().is_main_process:
        write(settings.out, results, as_markdown(results), partial(_draw, found))
    return results


def joined(study: Study, number: int, mine: Coordinates, seen: Sequence[tuple[str, Coordinates]]) -> Coordinates:
    """A further model's coordinates beside those that were seen, and what is to be said about their classes.

    Raises:
        UsageError: If it has fewer than two classes in common with one of them.
    """
    title, label = study.title(number), study.candidates[number].label
    first = seen[0][1] if seen else mine
    for other, theirs in seen:
        if mine.named != theirs.named and len(mine.names) == len(theirs.names):
            study.note(f"{title}: one of it and {other} names no classes; they are taken to be in one order")
        counts = f"{len(mine.names)} and {len(theirs.names)}"
        common = len(shared(*in_one_order(mine, theirs)))
        if common < 2:
            raise UsageError(
                f"{title} and {other} have {common or 'no'} class name{'s' if common != 1 else ''} in common (of "
                f"{counts}), and coordinates are relative to two at least: compare models whose classes overlap."
            )
        if common < max(len(mine.names), len(theirs.names)):
            study.note(
                f"{label} and {other} have {common} class names in common (of {counts}): where they meet, coordinates "
                "are relative to those alone, centred among them"
            )
    if mine.names != first.names and sorted(mine.names) == sorted(first.names):
        study.note(f"{title}: its classes are in another order than the first model's; re-ordered by name")
    return mine


def compare(
    study: Study, data: str, trainings: Sequence[Training], settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Every pair of labels on one data set: the metrics of their pairs of trainings, in every space."""
    gallery_size = len(load(trainings[0].folders["train"]).y)
    if more := [n for n in settings.fitted if n > gallery_size]:
        study.note(f"{data}: no Procrustes on {', '.join(map(str, more))} images: its gallery has {gallery_size}")
    fitted = [n for n in settings.fitted if n <= gallery_size]
    chosen = np.random.default_rng(settings.seed).permutation(gallery_size)[: max(CENTRED, *fitted, 0)]
    examples = []
    for training in trainings:
        x, _ = training.features("train", device)
        if len(x) != gallery_size:
            raise UsageError(f"{data}: not every model could read the same images: remove those that are damaged.")
        examples.append(x[torch.from_numpy(chosen)])
    rows = list(pairings([t.label for t in trainings]))
    asked = {g: list(dict.fromkeys(q for _, _, of in rows for q, to in of if to == g)) for g in range(len(trainings))}
    state = processes()
    mine = list(asked)[state.process_index :: state.num_processes]
    found: Found = {}
    hidden = None if state.is_main_process else True
    for g in tqdm(mine, desc=f"search of {data}", unit="gallery", leave=False, disable=hidden):
        found |= search(trainings, g, asked[g], examples, fitted, device)
    found = {pair: metrics for part in gather_object([found]) for pair, metrics in part.items()}
    free = [i for i, t in enumerate(trainings) if t.label == settings.free]
    pairs = [_row(labels, pairs, found, free) for *labels, pairs in rows]
    classes = study.opened[data].train.class_names
    known = set(classes).intersection(*(t.coordinates.names for t in trainings))
    about: dict[str, Any] = {"gallery": gallery_size, "queries": found[0, 0]["coordinates"]["queries"]}
    about |= {"classes": len(classes), "classes_of_the_models": len(known)}
    about |= {"weights_sha256": [t.weights_sha256 for t in trainings]}
    return {**about, "pairs": pairs, "compatibility": compatibility(pairs)}


Found = dict[tuple[int, int], dict[str, dict[str, float]]]
"""Metrics by the trainings of queries and gallery, and by space."""


def search(
    trainings: Sequence[Training],
    g: int,
    asked: Sequence[int],
    examples: Sequence[Tensor],
    fitted: Sequence[int],
    device: torch.device,
) -> Found:
    """The gallery of one training, searched with the queries of those that ask it."""
    gallery, found = trainings[g], Found()
    x, y = gallery.features("train", device)
    for q in asked:
        x_q, y_q = trainings[q].features("test", device)
        turned = fitted if q != g else ()
        asking = placements(trainings[q], gallery, x_q, examples[q], turned)
        indexed = placements(gallery, trainings[q], x, examples[g], turned)
        found[q, g] = {}
        for (space, by, few_q), (_, of, few) in zip(asking, indexed, strict=True):
            if few_q is not None and few is not None:
                by = by @ procrustes(few_q, few)
            if by.shape[1] == of.shape[1]:
                found[q, g][space] = ranked(of, y, by, y_q)
    return found


def placements(
    mine: Training, other: Training, features: Tensor, examples: Tensor, fitted: Sequence[int]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Features in every space that they are compared with another training's in, one after the other.

    Args:
        mine: Whose features these are.
        other: Whose they are compared with.
        features: Shape [n, d].
        examples: Features of images that both have embedded, [m, d].
        fitted: Numbers of them that Procrustes is fitted on.

    Yields:
        The space, the vectors there and, where they are still to be turned, those to fit a rotation on.
    """
    yield "features", features, None
    vectors, few = (normalize(mine.placed(x, other)) for x in (features, examples[:CENTRED]))
    yield "coordinates", vectors, None
    yield "centred", vectors - few.mean(0), None
    if mine.in_a_frame(other):
        yield "logits", normalize(mine.placed(features, other, as_logits=True)), None
    vectors, few = normalize(features), normalize(examples)
    for n in fitted:
        yield f"Procrustes {n}", vectors - few[:n].mean(0), few[:n] - few[:n].mean(0)


def pairings(labels: Sequence[str]) -> Iterator[tuple[str, str, list[tuple[int, int]]]]:
    """Pairs of trainings, query before gallery, by the labels of both.

    The trainings of two labels are paired in their order, so that the pairs are independent and have a t interval; all
    with all where their numbers differ. Within a label each model comes with itself, and then with the next training.

    Example:
        >>> list(pairings(["a", "a", "b"]))[:2]
        [('a', 'a', [(0, 0), (1, 1)]), ('a', 'a', [(0, 1), (1, 0)])]
        >>> list(pairings(["a", "a", "b"]))[2]
        ('a', 'b', [(0, 2), (1, 2)])
    """
    members = {label: [i for i, other in enumerate(labels) if other == label] for label in labels}
    for query, mine in members.items():
        yield query, query, [(i, i) for i in mine]
        for gallery, others in members.items():
            if gallery != query:
                paired = len(mine) == len(others)
                yield query, gallery, list(zip(mine, others, strict=True) if paired else product(mine, others))
            elif len(mine) > 1:
                yield query, query, list(zip(mine, [*mine[1:], mine[0]], strict=True))


def _row(
    labels: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    found: Mapping[tuple[int, int], Mapping[str, Any]],
    free: Sequence[int],
) -> dict[str, Any]:
    """What was found for a pair of labels, by space and pair of trainings; `free` are the trainings of --free."""
    spaces = {space: {m: [found[pair][space][m] for pair in pairs] for m in METRICS} for space in found[pairs[0]]}
    about = {"queries": labels[0], "gallery": labels[1], "trainings": [list(pair) for pair in pairs], "spaces": spaces}
    if pairs[0][0] == pairs[0][1]:
        return about
    old = {s: [found[g, g][s if s in found[g, g] else "features"][MAIN] for _, g in pairs] for s in spaces}
    difference = {s: (np.array(spaces[s][MAIN]) - old[s]).tolist() for s in spaces}
    again = np.mean([found[q, q]["features"][MAIN] for q in free or [q for q, _ in pairs]])
    to_gain = {s: again - np.mean(old[s]) for s in spaces}
    gains = {s for s in spaces if labels[0] != labels[1] and to_gain[s] >= LEAST_GAIN}
    gain = {s: float(np.mean(difference[s]) / to_gain[s]) if s in gains else None for s in spaces}
    return {**about, "difference": difference, "update_gain": gain}


def compatibility(pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By space: the share of updates whose queries find more than the old ones did, and of those that find as much."""
    order = [p["queries"] for p in pairs if "difference" not in p]
    updates = [p["difference"] for p in pairs if order.index(p["gallery"]) < order.index(p["queries"])]
    found: dict[str, dict[str, float]] = {}
    for space in dict.fromkeys(space for update in updates for space in update):
        means = np.array([np.mean(update[space]) for update in updates if space in update])
        found[space] = {"updates": len(means), "average": float((means > 0).mean()), "ties": float((means == 0).mean())}
    return found


def _draw(found: Mapping[str, Any], out: Path) -> dict[str, str]:
    from timm_etf.studies import plots

    return {plots.retrieval(data, of["pairs"], out): f"{MAIN} of every pair" for data, of in found.items()}


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report to read."""
    lines = ["# Retrieval", ""]
    for data, found in results["retrieval"].items():
        pairs = found["pairs"]
        updates = [p for p in pairs if "difference" in p]
        turned = {space for p in pairs for space in p["spaces"]}.difference(UNTURNED)
        unturned = [space for space in UNTURNED if any(space in p["spaces"] for p in pairs)]
        spaces = [*unturned, *sorted(turned, key=lambda space: int(space.split()[1]))]
        lines += [f"## {data}: {found['queries']} queries in a gallery of {found['gallery']} images", ""]
        lines += [f"{found['classes_of_the_models']} of its {found['classes']} classes are the models' own.", ""]
        for metric in METRICS:
            lines += [row([f"{metric}, %", *spaces]), "|" + "---|" * (len(spaces) + 1)]
            for p in pairs:
                lines.append(row([_name(p), *(_cell(p["spaces"].get(s, {}).get(metric)) for s in spaces)]))
            lines.append("")
        if updates:
            lines += [row([f"{MAIN} less that of the gallery's own model; update gain", *spaces])]
            lines += ["|" + "---|" * (len(spaces) + 1)]
            for p in updates:
                cells = (_cell(p["difference"].get(s), "+") + _gain(p["update_gain"].get(s)) for s in spaces)
                lines.append(row([_name(p), *cells]))
            for share in ("average", "ties"):
                by_space = [found["compatibility"].get(s) for s in spaces]
                name = {"average": "average compatibility", "ties": "ties, which it does not count"}[share]
                lines.append(row([f"**{name}**", *(f"{c[share]:.2f}" if c else "-" for c in by_space)]))
            lines.append("")
    return "\n".join([*lines, *DEFINITIONS, "", *remarks(results["missing"], results["notes"]), ""])


DEFINITIONS = (
    "Training images are the gallery, test images the queries; an image is found if the class is right. recall@k: "
    "queries with an image of their class among the k nearest by cosine; mAP: mean average precision of the whole "
    "ranking; ties count against the query. Several trainings under one label are paired in their order: mean and "
    "95 % t interval over these pairs.",
    "",
    "Features: as the classifier receives them, where both models have one width. Coordinates: where an image lies in "
    "the frame's span, see `timm_etf.embed`; for a simplex these are the centred logits, and those are taken of "
    f"ordinary classifiers, too. Centred: less each model's own mean on {CENTRED} images of the gallery (no labels). "
    "Logits: the centred ones, where coordinates are something else. "
    "Procrustes n: features, centred, after the rotation that fits best on n images of the gallery embedded by both "
    "models (no labels); its gallery holds features.",
    "",
    "M(q, g) is the recall@1 of queries by q in a gallery by g. An update from g to q is compatible if M(q, g) > M(g, "
    "g) in the same gallery; average compatibility is the share of compatible ones among the updates from a label to a "
    "later one, in the order of the command line. Update gain: (M(q, g) - M(g, g)) / (M(q, q) - M(g, g)), where M(q, "
    "q) is of features, what embedding the gallery again would give (with --free: to the models of that label); only "
    "where that is a point or more.",
)
"""What the report means by its words."""


def _name(pair: Mapping[str, Any]) -> str:
    query, gallery = pair["queries"], pair["gallery"]
    if "difference" not in pair:
        return f"{query}, within each model"
    return f"{query} in {'another ' if query == gallery else ''}{gallery}"


def _cell(values: Sequence[float] | None, sign: str = "") -> str:
    if values is None:
        return "-"
    interval = t_interval(values) if len(values) > 1 else None
    low_high = f" ({interval[0]:{sign}.1f} to {interval[1]:{sign}.1f})" if interval else ""
    return f"{np.mean(values):{sign}.1f}{low_high}"


def _gain(gain: float | None) -> str:
    return "" if gain is None else f"; {100 * gain:.0f} %"


def summary(results: Mapping[str, Any], out: Path) -> str:
    """What the command prints: of every pair of labels what each space is worth."""
    lines = []
    for data, found in results["retrieval"].items():
        for p in found["pairs"]:
            shown = ", ".join(f"{space} {np.mean(values[MAIN]):.1f}" for space, values in p["spaces"].items())
            lines.append(f"{data}, {_name(p)}: {MAIN} {shown}")
    then = "timm_etf.embed(model, images), whose vectors are these coordinates"
    return "\n".join([*lines, *closing(out, results["missing"], "retrieval-*.png", then=then)])
