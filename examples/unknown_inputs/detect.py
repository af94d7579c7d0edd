r"""How well a model's own features and logits tell inputs of unknown classes: detectors of pytorch-ood.

    pip install 'pytorch-ood>=0.4' scikit-learn
    python examples/unknown_inputs/detect.py --models learned=demo/resnet10t-0 ... etf=demo/resnet10t_etf-0 ... \
        --data-root demo/data --known demo/data/pictograms --near pictograms-novel \
        --far letters-greek letters-cyrillic --out unknown

Detectors are fitted on the training images of what the models know. Its test images are to pass, those of the others
are to be caught. Models of several labels are paired in their order: mean and 95 % t interval of the differences from
the first label. Features are cached as those of `timm-etf retrieval`, whose cache --features can share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from pytorch_ood import detector as ood
from pytorch_ood.metrics import FPRAtTPR, OODMetrics
from torch import Tensor, nn

from timm_etf import FixedClassifier, UsageError
from timm_etf.data.images import find_targets
from timm_etf.embedding import Coordinates, isometry
from timm_etf.errors import one_line, one_line_errors
from timm_etf.features.extract import load
from timm_etf.features.study import Inputs, Measured, Study
from timm_etf.report.page import closing, remarks, row, write
from timm_etf.report.statistics import t_interval

METRICS = {
    "AUROC": "AUROC",
    "AUPR unknown": "AUPR-OUT",
    "AUPR known": "AUPR-IN",
    "FPR95 unknown": "FPR95TPR",
    "FPR95 known": "",
}
"""Names and pytorch-ood's; the word behind AUPR and FPR95 is the positive class. AUROC has the same value for both."""

SPAN = "norm of Wh / norm of h"


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Tell known from unknown inputs with every detector."""

    known: str
    """What the models were trained on: detectors are fitted on its training images, its test images are to pass."""
    near: tuple[str, ...] = ()
    """Data sets whose test images are of unknown classes, but alike."""
    far: tuple[str, ...] = ()
    """Data sets whose test images are of other kinds altogether."""

    def check(self) -> None:
        """Refuse what cannot work."""
        super().check()
        if not self.near + self.far:
            raise UsageError("Give unknown inputs with --near or --far.")


@dataclass(frozen=True)
class Layer:
    """A model's last layer on vectors that it takes, and these of every data set."""

    linear: nn.Linear
    train: Tensor
    labels: Tensor
    test: dict[str, Tensor]


Scores = Callable[[Tensor], Tensor]
"""Outlier scores of vectors [n, d], larger for unknown ones."""


def detectors(layer: Layer) -> dict[str, Callable[[], Scores]]:
    """What fits each detector; with the parameters that pytorch-ood gives it, since tuning needs unknown inputs."""
    linear, z, y = layer.linear, layer.train, layer.labels

    def of_logits(found: Any) -> Callable[[], Scores]:
        return lambda: lambda x: found.predict_logits(linear(x))

    def of_features(found: Any) -> Callable[[], Scores]:
        return lambda: found.fit_features(z, y).predict_features

    bias, half = linear.bias.detach(), z.shape[1] // 2  # half the width is ViM's rule for narrow features
    to_span = isometry(linear.weight).float().T
    return {
        "MaxSoftmax": of_logits(ood.MaxSoftmax(None)),
        "MaxLogit": of_logits(ood.MaxLogit(None)),
        "energy": of_logits(ood.EnergyBased(None)),
        "Mahalanobis": of_features(ood.Mahalanobis(None)),
        "RMD": of_features(ood.RMD(None)),
        "kNN": of_features(ood.KNN(None)),
        "ViM": of_features(ood.ViM(None, half, linear.weight.detach(), bias)),
        "SHE": lambda: _she(layer),
        "fDBD": of_features(ood.fDBD(None, linear)),
        "NCI": of_features(ood.NCI(None, linear)),
        "NNGuide": of_features(ood.NNGuide(None, linear)),
        SPAN: lambda: lambda x: -(x @ to_span).norm(dim=1) / x.norm(dim=1),
    }


@torch.no_grad()
def _she(layer: Layer) -> Scores:
    """Of the classes that have a training image that is classified rightly, for it refuses those that have none."""
    right = layer.linear(layer.train).argmax(1) == layer.labels
    kept, numbers = layer.labels[right].unique(return_inverse=True)
    if left_out := layer.linear.out_features - len(kept):
        print(f"SHE leaves out {left_out} of {layer.linear.out_features} classes: no training image of theirs is right")
    among = nn.Linear(layer.linear.in_features, len(kept))
    among.weight.data, among.bias.data = layer.linear.weight[kept], layer.linear.bias[kept]
    return ood.SHE(None, among.requires_grad_(False)).fit_features(layer.train[right], numbers).predict_features


@torch.no_grad()
def last_layer(measured: Measured, known: str) -> Layer:
    """The last layer of a model and its inputs, from the cache.

    Raises:
        UsageError: If the model has no classifier, or one of other classes than the known data.
    """
    coordinates = Coordinates.of(measured.model)
    head = coordinates.head.cpu()
    fixed = isinstance(head, FixedClassifier)
    takes = head.prepared if fixed else nn.Identity()
    weight = (head.plain_weight() if fixed else head.weight.detach()).flatten(1).float()
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.weight.data, linear.bias.data = weight, torch.zeros(len(weight)) if head.bias is None else head.bias.float()
    linear.requires_grad_(False)
    found = {pair.data: {s: load(folder) for s, folder in pair.folders.items()} for pair in measured.pairs}
    if known not in found:
        raise UsageError(f"{known}: there are no features of the known inputs.")
    train = found[known]["train"]
    names = coordinates.names if coordinates.named else train.class_names
    if len(names) != len(weight) or set(names) != set(train.class_names):
        raise UsageError(
            f"the model has {len(weight)} classes and {known} has {len(train.class_names)}, and they are not the same: "
            "give what it was trained on with --known."
        )
    place = torch.tensor([names.index(name) for name in train.class_names])
    test = {data: takes(torch.from_numpy(splits["test"].x)) for data, splits in found.items()}
    return Layer(linear, takes(torch.from_numpy(train.x)), place[torch.from_numpy(train.y)], test)


def measure(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """All metrics, percent, of outlier scores."""
    scores = torch.cat([known, unknown]).double()
    labels = torch.cat([torch.zeros(len(known)), -torch.ones(len(unknown))]).long()
    found = OODMetrics().update(scores, labels).compute() | {
        "": FPRAtTPR().update(-scores, -1 - labels).compute()["FPR95TPR"]
    }
    return {name: 100 * float(found[theirs]) for name, theirs in METRICS.items()}


def run(settings: Settings) -> dict[str, Any]:
    """Measure every model, and write results.json and report.md."""
    asked = {"known": [settings.known], "near": settings.near, "far": settings.far}
    groups = {kind: [t.name for t in find_targets(texts, settings.data_root)[0]] for kind, texts in asked.items()}
    study = Study(settings, [text for texts in asked.values() for text in texts])
    found: dict[str, dict[str, dict[str, list[dict[str, float] | None]]]] = {}
    for measured in study.measured():
        known, label = next(iter(groups["known"]), settings.known), study.candidates[measured.number].label
        layer = last_layer(measured, known)
        for name, fit in detectors(layer).items():
            try:
                score = fit()
                scores = {data: score(x) for data, x in layer.test.items()}
            except (ValueError, AssertionError) as e:  # as where no training image of a class is classified as it
                study.missing[f"{study.title(measured.number)}: {name}"] = one_line(e)
                scores = {}
            for data in (d for d in study.opened if d != known):
                cell = measure(scores[known], scores[data]) if data in scores else None
                found.setdefault(data, {}).setdefault(name, {}).setdefault(label, []).append(cell)
    for kind in ("near", "far"):
        if len(sets := [found[d] for d in groups[kind] if d in found]) > 1:
            found[f"{kind}, mean of {len(sets)}"] = mean_of(sets)
    results = {"unknown": found, "groups": groups, **study.record()}
    write(settings.out, results, as_markdown(results), lambda out: {})
    return results


def mean_of(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics averaged over data sets, training by training."""
    return {
        name: {
            label: [
                None if None in cells else {m: float(np.mean([c[m] for c in cells])) for m in METRICS}
                for cells in zip(*(s[name][label] for s in sets), strict=True)
            ]
            for label in sets[0][name]
        }
        for name in sets[0]
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report to read."""
    lines, known = ["# Unknown inputs", ""], results["groups"]["known"][0]
    for data, by_detector in results["unknown"].items():
        lines += [f"## {data}", "", row([f"%, {known} is known", *METRICS])]
        lines.append("|" + "---|" * (len(METRICS) + 1))
        for name, by_label in by_detector.items():
            first, *others = by_label
            for label in by_label:
                lines.append(row([f"{name}, {label}", *(_mean(by_label[label], m) for m in METRICS)]))
            for label in others:
                differences = (_difference(by_label[label], by_label[first], m) for m in METRICS)
                lines.append(row([f"{name}, {label} less {first}", *differences]))
        lines.append("")
    return "\n".join([*lines, *DEFINITIONS, "", *remarks(results["missing"], results["notes"]), ""])


DEFINITIONS = (
    "Positive is the class behind a metric's name. FPR95 unknown: share of known inputs that are flagged where 95 % of "
    "the unknown are (as in OpenOOD and pytorch-ood); FPR95 known: share of unknown inputs that pass where 95 % of the "
    "known do (as in ODIN's paper). AUPR depends on how many there are of each.",
    "",
    "Detectors are pytorch-ood's with its own parameters (kNN: 50 neighbours, NNGuide: 10, NCI: alpha 0), ViM with "
    f"half the width; none was tuned. {SPAN}: share of a feature's norm within the span of the class vectors, for any "
    "head. Differences: mean and 95 % t interval over pairs of trainings.",
)
"""What the report means by its words."""


def _mean(cells: Sequence[Mapping[str, float] | None], metric: str) -> str:
    values = [cell[metric] for cell in cells if cell]
    return f"{np.mean(values):.1f}" if values else "-"


def _difference(cells: Sequence[Any], reference: Sequence[Any], metric: str) -> str:
    if len(cells) != len(reference) or None in (*cells, *reference):
        return "-"
    apart = [a[metric] - b[metric] for a, b in zip(cells, reference, strict=True)]
    ends = t_interval(apart)
    return f"{np.mean(apart):+.1f}" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else "")


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        settings = tyro.cli(Settings, description=__doc__)
        results = run(settings)
        then = "--known, --near and --far with data of your own"
        print("\n".join(closing(settings.out, results["missing"], "*.png", then=then)))


if __name__ == "__main__":
    main()
