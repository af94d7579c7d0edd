"""`timm-etf geometry`: collapse metrics and class covariance of any model on any data, as tables and heat maps."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric

from timm_etf.classifier import classifier_names
from timm_etf.errors import UsageError
from timm_etf.features.extract import stream
from timm_etf.features.study import Inputs, Pair, Study, sample
from timm_etf.geometry import (
    ClassMoments,
    class_covariance,
    collapse,
    covariance_differences,
    of_neighbours,
    of_rankings,
    scaled,
    total_variance,
)
from timm_etf.geometry.metrics import CollapseMetrics, NearestMeanAgreement
from timm_etf.growing import own_class_names
from timm_etf.processes import exact_device, processes
from timm_etf.report.page import closing, remarks, row, write
from timm_etf.report.statistics import t_interval

MEANING = {
    "nc1": "tr(S_W pinv S_B) / K, 0 collapsed",
    "nc1_quotient": "tr S_W / tr S_B, 0 collapsed",
    "nc2_equinorm": "variation of the class means' norms, 0 for an ETF",
    "nc2_equiangularity": "deviation of their cosines, 0 for an ETF",
    "nc2_simplex": "mean abs(cosine + 1/(K-1)), 0 for an ETF",
    "nc3": "distance of classifier and class means, 0 self-dual",
    "nc4": "classifier and nearest class mean agree, 1 collapsed",
    "cdnv": "class-distance normalised variance, 0 collapsed",
    "vci": "variability collapse index, 0 collapsed",
    "within": "tr C / D, C the average class covariance",
    "within_share": "tr C / total variance, 0 collapsed",
    "feature_norm": "mean norm of a feature",
    "effective_rank_within": "directions within classes, 1 to D",
    "effective_rank_between": "directions between classes, 1 to K-1",
    "top1": "accuracy of the model's classifier",
    "nearest_mean": "accuracy of the nearest class mean",
    "severity": "mean distance in the tree of the classifier's mistakes",
    "hd1": "mean distance of its first choice",
    "hd5": "of the 5 first",
    "hd20": "of the 20 first",
    "crm_top1": "accuracy of the choice of least expected cost (CRM)",
    "crm_severity": "mean distance of its mistakes",
    "crm_hd1": "mean distance of its first choice",
    "crm_hd5": "of the 5 first",
    "crm_hd20": "of the 20 first",
    "mahp": "mAHP@250, how near the classes of neighbours are, 1 best",
    "siblings": "nearest image of another class is of the same group, share",
    "t": "how the classes' traces differ: rms of t",
    "t_of_sampling": "what of that so few samples would give alone",
    "T_variation": "how the products of their covariances differ: deviation / mean of T",
}
"""What is reported, and what it means."""

_MOST = 10_000
"""Samples for the differences between classes, which take their square."""


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Measure how collapsed features are: NC1 to NC4, CDNV, VCI, class covariance as heat map, trace and spectrum."""

    data: tuple[str, ...]
    """Data sets, as the targets of timm-etf transfer."""
    picture_of: Literal["train", "test"] = "train"
    """Split whose class covariance is drawn."""


def run(settings: Settings) -> dict[str, Any]:
    """Measure every model on every data set and write the report, results.json and pictures.

    Under accelerate's launcher the processes share the features between them.

    Returns:
        What is in results.json: for each data set, split and label the metrics of every training.

    Raises:
        UsageError: If the inputs are wrong, before anything is computed, or nothing at all could be computed.
    """
    study = Study(settings, settings.data)
    found: dict[str, Any] = {}
    covariances: dict[str, dict[str, tuple[NDArray[np.float32], float]]] = {}
    for pair in study.pairs():
        splits, covariance = measure(pair, settings.picture_of)
        if "nc3" in splits["train"] and not own_class_names(pair.model):
            study.note(
                f"{pair.label} on {pair.data}: the model names no classes; they are taken to be the data's, in order"
            )
        for split, metrics in splits.items():
            found.setdefault(pair.data, {}).setdefault(split, {}).setdefault(pair.label, []).append(metrics)
        covariances.setdefault(pair.data, {}).setdefault(pair.label, covariance)
    results = {"geometry": found, **study.record()}
    if processes().is_main_process:
        write(settings.out, results, as_markdown(results), partial(_draw, covariances, settings.picture_of))
    return results


def measure(
    pair: Pair, picture_of: str = "train"
) -> tuple[dict[str, dict[str, float]], tuple[NDArray[np.float32], float]]:
    """Metrics of both splits by name, as far as they are numbers; class and total variance of the split to draw."""
    device = exact_device(processes().device)
    head = classifier(pair.model, pair.splits.train.class_names)
    found: dict[str, dict[str, float]] = {}
    for split, folder in pair.folders.items():
        dim = next(stream(folder))[0].shape[1]
        weight = None if head is None else head.weight.flatten(1).to(device)
        metric = CollapseMetrics(len(pair.splits.train.class_names), dim).to(device)
        for x_ND, y_N in _mine(folder):
            metric.update(x_ND, y_N)
        with metric.sync_context():
            moments = metric.moments()
        if split == "train":
            trained = moments
        if split == picture_of:
            covariance = class_covariance(moments).float().cpu().numpy(), total_variance(moments)
        within = float(moments.spread.sum() / moments.count.sum())
        found[split] = collapse(moments, weight if weight is not None and weight.shape[1] == dim else None)
        found[split] |= {"within_share": within / total_variance(moments)}
        found[split] |= _classified(folder, trained, head, device)
        found[split] |= _order(pair, split, head)
        found[split]["images"] = int(moments.count.sum())
    found["train"] |= _differences(pair)
    return {split: {k: v for k, v in m.items() if math.isfinite(v)} for split, m in found.items()}, covariance


def classifier(model: nn.Module, class_names: Sequence[str]) -> Any:
    """A model's classifier, or None unless it is one layer and its classes are those of the data, in that order.

    Vectors that are reserved for further classes are left out.
    """
    try:
        names = classifier_names(model)
        head: Any = model.get_submodule(names[0])
    except (UsageError, AttributeError):
        return None
    own, weight = own_class_names(model), getattr(head, "weight", None)
    if len(names) > 1 or weight is None or list(own or class_names) != list(class_names):
        return None
    if own and len(own) < len(weight):
        head = copy.deepcopy(head)
        for rows in filter(lambda rows: rows is not None, (head.weight, head.bias)):
            rows.data = rows.data[: len(own)]
    return head if len(head.weight) == len(class_names) else None


def _mine(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """This process' share of the features."""
    state = processes()
    for x, y in stream(folder):
        rows = slice(state.process_index, None, state.num_processes)
        yield torch.from_numpy(x[rows]), torch.from_numpy(y[rows])


def _classified(folder: Path, trained: ClassMoments, head: Any, device: torch.device) -> dict[str, float]:
    """What needs the training features' class means, or the classifier."""
    metrics: dict[str, Any] = {"nearest_mean": NearestMeanAgreement(trained)}
    if head is not None:
        metrics |= {"nc4": NearestMeanAgreement(trained), "top1": MeanMetric()}
    for metric in metrics.values():
        metric.to(device)
    for x_ND, y_N in _mine(folder):
        metrics["nearest_mean"].update(x_ND, y_N)
        if head is not None:
            predicted = _logits(head, x_ND).argmax(1)
            metrics["nc4"].update(x_ND, predicted)
            metrics["top1"].update((predicted == y_N).to(device, torch.float32))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _order(pair: Pair, split: str, head: Any) -> dict[str, float]:
    """Who is near whom in the data's tree, where it has one, on a sample."""
    if pair.splits.tree is None:
        return {}
    distance = pair.splits.tree.distance
    x_ND, y_N = map(torch.from_numpy, sample(pair.folders[split], len(getattr(pair.splits, split)), _MOST))
    found = of_neighbours(x_ND, y_N, distance)
    return found if head is None else found | of_rankings(_logits(head, x_ND), y_N, distance)


@torch.no_grad()
def _logits(head: Any, x_ND: Tensor) -> Tensor:
    """What a classifier says of features, on the CPU."""
    x_ND = x_ND.to(head.weight)
    said: Tensor = head(x_ND[..., None, None] if head.weight.ndim == 4 else x_ND)
    return said.flatten(1).cpu()


def _differences(pair: Pair) -> dict[str, float]:
    """How the classes' covariances differ, on a sample of the training features, scaled as the theory has them."""
    x, y = sample(pair.folders["train"], len(pair.splits.train), _MOST)
    t, square = covariance_differences(scaled(x)[0], y, len(pair.splits.train.class_names))
    count = torch.bincount(torch.from_numpy(y), minlength=len(t))
    known = t.isfinite() & square.diag().isfinite()
    if known.sum() < 2:
        return {}
    t, square, count = t[known], square[known][:, known], count[known].double()
    share = count / count.sum()
    others = square[~torch.eye(len(t), dtype=torch.bool)]
    return {
        "t": float((share @ t.square()).sqrt()),
        # The variance of a trace of n Gaussian samples is 2 tr(C^2) / (n - 1).
        "t_of_sampling": float((share @ (2 * square.diag() / (count - 1))).clamp(min=0).sqrt()),
        "T_variation": float(others.std(correction=0) / others.mean()),
    }


def _draw(found: Mapping[str, Any], split: str, out: Path) -> dict[str, str]:
    from timm_etf.studies import plots

    of = "" if split == "train" else f" of {split} images"
    return {
        plots.covariance(data, by_label, out, of): f"Class covariance{of} and its spectrum"
        for data, by_label in found.items()
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report to read."""
    lines = ["# Geometry", ""]
    for data, splits in results["geometry"].items():
        for split, labels in splits.items():
            header = ["metric", *labels, "what it is"]
            images = next(iter(labels.values()))[0]["images"]
            lines += [f"## {data}, {split}: {images} images", "", row(header), "|" + "---|" * len(header)]
            for name, meaning in MEANING.items():
                cells = [[m[name] for m in members if name in m] for members in labels.values()]
                if any(cells):
                    lines.append(row([name, *map(_cell, cells), meaning]))
            lines.append("")
    lines.append(
        "Features: pre-logits, before any projector. Several trainings under one label: their mean and its 95 % t "
        "interval. nc4 and nearest_mean are about the class means of the training features. nc3, nc4 and top1 need a "
        "classifier of the data's classes. Pictures show the first training of each label."
    )
    return "\n".join([*lines, "", *remarks(results["missing"], results["notes"]), ""])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    interval = t_interval(values)
    return f"{np.mean(values):.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def summary(results: Mapping[str, Any], out: Path) -> str:
    """What the command prints: the metrics that say most, for the training split of each data set."""
    lines = []
    for data, splits in results["geometry"].items():
        for label, members in splits["train"].items():
            names = [n for n in ("nc1", "cdnv", "within", "within_share") if all(n in m for m in members)]
            shown = {n: float(np.mean([m[n] for m in members])) for n in names}
            lines.append(f"{data}, {label}: " + ", ".join(f"{n} {v:.4g}" for n, v in shown.items()))
    then = "timm-etf random-features with these --models and --data"
    return "\n".join([*lines, *closing(out, results["missing"], "covariance-*.png", then=then)])
