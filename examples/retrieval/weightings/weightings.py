"""What raises recall@1 between two trainings beyond their coordinates? Weightings of them, each tried on its own.

    python examples/retrieval/weightings/weightings.py --models learned=demo/resnet10t-0 ... etf=demo/resnet10t_etf-0 \
        ...
        --data-root demo/data --data demo/data/pictograms pictograms-novel letters-greek --features retrieval/features \
        --out weightings

Queries of each training in the gallery of the next one under its label; nothing is tuned by labels. The statistics
that a weighting needs are each model's own, of images of the gallery. OUT/results.json has every pair, the report mean
differences from plain coordinates with 95 % t intervals over pairs. `--features` may share retrieval's cache.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

from timm_etf.embedding import Coordinates
from timm_etf.errors import one_line_errors
from timm_etf.features.extract import load
from timm_etf.features.study import Inputs, Study
from timm_etf.report.page import closing, remarks, row, write
from timm_etf.report.statistics import t_interval
from timm_etf.retrieval import METRICS, procrustes, ranked
from timm_etf.studies.retrieval import pairings

PLAIN = "coordinates"


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Search the gallery of one training with queries of another, under every weighting of the coordinates."""

    data: tuple[str, ...]
    """Data sets: training images are the gallery, test images the queries."""


@dataclass(frozen=True)
class Indexed:
    """One model's raw coordinates of a data set: gallery [n, K], queries [m, K] and the labels of both."""

    gallery: Tensor
    queries: Tensor
    labels: tuple[Tensor, Tensor]
    few: Tensor
    """Rows of the gallery in random order, the same for every model."""


Weighting = Callable[[Tensor, Tensor], Tensor]
"""Raw coordinates [n, K] to vectors, given those of some of the model's own gallery."""


def unit(z: Tensor, _: Tensor) -> Tensor:
    """Plain coordinates."""
    return normalize(z)


def centred(z: Tensor, few: Tensor) -> Tensor:
    """Less the mean of some images."""
    return normalize(z) - normalize(few).mean(0)


def power(p: float) -> Weighting:
    """Every coordinate to a power, its sign kept."""
    return lambda z, _: normalize(z).sign() * normalize(z).abs() ** p


def softmax(temperature: float) -> Weighting:
    """Probabilities."""
    return lambda z, _: torch.softmax(z / temperature, 1)


def largest(k: int) -> Weighting:
    """The largest coordinates alone."""
    return lambda z, _: torch.zeros_like(z).scatter(
        1, (top := normalize(z).topk(min(k, z.shape[1]))).indices, top.values
    )


def ranks(z: Tensor, _: Tensor) -> Tensor:
    """Places in the order of the coordinates, centred."""
    return z.argsort(1).argsort(1).to(z) - (z.shape[1] - 1) / 2


def standardised(z: Tensor, few: Tensor) -> Tensor:
    """Every coordinate less its mean, by its deviation."""
    return (normalize(z) - normalize(few).mean(0)) / normalize(few).std(0).clamp(min=1e-6)


def whitened(z: Tensor, few: Tensor) -> Tensor:
    """With the identity for a covariance, shrunk by a tenth so that it can be inverted."""
    u, some = centred(z, few).double(), centred(few, few).double()
    values, vectors = torch.linalg.eigh(some.T @ some / len(some))
    return (u @ (vectors / (0.9 * values + 0.1 * values.mean()).sqrt()) @ vectors.T).float()


def integers(z: Tensor, _: Tensor) -> Tensor:
    """As `embed(dtype=torch.int8)` stores them."""
    return (normalize(z) * 127).round()


WEIGHTINGS: dict[str, tuple[Weighting, int]] = {
    PLAIN: (unit, 1),
    **{f"centred by {n}": (centred, n) for n in (10, 30, 100, 300)},
    **{f"softmax, temperature {t:g}": (softmax(t), 1) for t in (0.5, 1, 2, 4)},
    **{f"power {p:g}": (power(p), 1) for p in (0.5, 2, 3)},
    "positive part": (lambda z, _: normalize(z).relu(), 1),
    "ranks": (ranks, 1),
    **{f"largest {k}": (largest(k), 1) for k in (10, 30, 100)},
    "standardised by 300": (standardised, 300),
    "whitened by 300": (whitened, 300),
    "int8": (integers, 1),
    "float16": (lambda z, _: normalize(z).half().float(), 1),
}
"""How, and from how many images of the gallery."""

TURNED = (30, 100)
"""Images embedded by both models that a rotation of centred coordinates is fitted on."""


def vectors(gallery: Indexed, queries: Indexed) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Gallery and queries under every weighting."""
    for name, (weighting, n) in WEIGHTINGS.items():
        indexed, asking = (of.gallery[of.few[:n]] for of in (gallery, queries))
        yield name, weighting(gallery.gallery, indexed), weighting(queries.queries, asking)
    for n in TURNED:
        indexed, asking = (of.gallery[of.few[:n]] for of in (gallery, queries))
        # Towards no rotation, as two models in one system of coordinates have it, by as much as they say together.
        u, v = centred(asking, asking).double(), centred(indexed, indexed).double()
        prior = (u * v).sum() / u.shape[1] * torch.eye(u.shape[1], dtype=u.dtype)
        turn = procrustes(torch.cat([u, prior]), torch.cat([v, torch.eye(u.shape[1], dtype=u.dtype)]))
        asked = centred(queries.queries, asking)
        yield f"centred and turned by {n}", centred(gallery.gallery, indexed), (asked.double() @ turn).float()


@torch.no_grad()
def run(settings: Settings) -> dict[str, Any]:
    """Measure every pair of trainings, and write results.json and report.md."""
    study = Study(settings, settings.data)
    models: dict[str, list[tuple[str, Indexed]]] = {}
    for measured in study.measured():
        place = Coordinates.of(measured.model)
        for pair in measured.pairs:
            train, test = (load(pair.folders[split]) for split in ("train", "test"))
            z, asked = (place(torch.from_numpy(found.x)) for found in (train, test))
            labels = torch.from_numpy(train.y), torch.from_numpy(test.y)
            few = torch.from_numpy(np.random.default_rng(0).permutation(len(z)))
            models.setdefault(pair.data, []).append((pair.label, Indexed(z, asked, labels, few)))
    found: dict[str, Any] = {}
    for data, of in models.items():
        for label, other, pairs in pairings([label for label, _ in of]):
            if label != other or any(q == g for q, g in pairs):
                continue
            cells = found.setdefault(data, {}).setdefault(label, {})
            for q, g in pairs:
                for name, indexed, asking in vectors(of[g][1], of[q][1]):
                    told = ranked(indexed, of[g][1].labels[0], asking, of[q][1].labels[1])
                    cells.setdefault(name, []).append(told[METRICS[0]])
    results = {"weightings": found, **study.record()}
    write(settings.out, results, as_markdown(results), lambda out: {})
    return results


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report to read."""
    lines = ["# Weightings", ""]
    for data, by_label in results["weightings"].items():
        lines += [f"## {data}, {METRICS[0]} of another training, %", "", row(["", *by_label])]
        lines.append("|" + "---|" * (1 + len(by_label)))
        for name in next(iter(by_label.values())):
            lines.append(row([name, *(_cell(cells[name], cells[PLAIN]) for cells in by_label.values())]))
        lines.append("")
    said = "In brackets: less plain coordinates, with the 95 % t interval over pairs of trainings."
    return "\n".join([*lines, said, "", *remarks(results["missing"], results["notes"]), ""])


def _cell(values: list[float], plain: list[float]) -> str:
    if values is plain:
        return f"{np.mean(values):.1f}"
    apart = [a - b for a, b in zip(values, plain, strict=True)]
    ends = t_interval(apart)
    return f"{np.mean(values):.1f} ({np.mean(apart):+.1f}" + (f", {ends[0]:+.1f} to {ends[1]:+.1f})" if ends else ")")


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        settings = tyro.cli(Settings, description=__doc__)
        results = run(settings)
        print("\n".join(closing(settings.out, results["missing"], "*.png", then="timm-etf retrieval --help")))


if __name__ == "__main__":
    main()
