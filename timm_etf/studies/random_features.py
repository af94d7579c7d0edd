"""`timm-etf random-features`: regression on random features of any model's features, simulated and in theory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_etf.errors import UsageError
from timm_etf.features.study import Inputs, Pair, Study, sample
from timm_etf.geometry import random_feature_regression, scaled
from timm_etf.processes import processes
from timm_etf.report.page import closing, remarks, row, write


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """Regress labels on random features of a model's features: test error, simulated and as theory predicts it."""

    data: tuple[str, ...]
    """Data sets, as the targets of timm-etf transfer."""
    a2: tuple[float, ...] = (0.0, 0.1, 0.5)
    """Quadratic coefficients of the random features' sigma(t) = a2 t^2 + a1 t + a0."""
    num_features: tuple[int, ...] = (125, 250, 500, 1000, 2000, 4000)
    """Numbers N of random features."""
    gammas: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Ridge penalties."""
    a1: float = 1.0
    """Linear coefficient."""
    a0: float = 0.0
    """Constant one."""
    draws: int = 10
    """Simulations at each N."""
    samples: int = 1000
    """At most so many training and test images each, evenly spaced; time grows with their cube."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def sweep(self) -> dict[str, Any]:
        """What is varied, by option."""
        return {k: getattr(self, k) for k in ("a2", "num_features", "gammas", "a1", "a0", "draws", "samples", "seed")}

    def check(self) -> None:
        """Refuse values that cannot work; see `Inputs.check`."""
        super().check()
        if not self.a2 or not self.num_features or not self.gammas:
            raise UsageError("Give at least one a2, one number of features and one gamma.")
        for option in ("a2", "gammas", "a1", "a0"):
            if not np.isfinite(getattr(self, option)).all():
                raise UsageError(f"--{option} must be finite.")
        if min(self.gammas) <= 0 or min(self.num_features) < 1 or self.draws < 1 or self.samples < 2:
            raise UsageError("Penalties, numbers of random features and draws are positive, samples at least 2.")
        if 0 in self.a2 and self.a1 == 0:
            raise UsageError("With a2 and a1 both 0 the random features do not depend on the image.")


def run(settings: Settings) -> dict[str, Any]:
    """Sweep every model on every data set and write the report, results.json and pictures.

    Returns:
        What is in results.json: for each data set and label the points of every training.

    Raises:
        UsageError: If the settings are wrong, before anything is computed, or nothing at all could be computed.
    """
    study = Study(settings, settings.data)
    found: dict[str, dict[str, list[Any]]] = {}
    for pair in study.pairs():
        points = points_of(pair, settings) if processes().is_main_process else []
        found.setdefault(pair.data, {}).setdefault(pair.label, []).append(points)
    results = {"random_features": found, "sweep": settings.sweep, **study.record()}
    if processes().is_main_process:
        write(settings.out, results, as_markdown(results), partial(_draw, found))
    return results


def points_of(pair: Pair, sweep: Settings) -> list[dict[str, Any]]:
    """Every point of the sweep on one model's features, the error in units of the test labels' variance."""
    splits = {"train": pair.splits.train, "test": pair.splits.test}
    (x, y), (x_test, y_test) = (sample(pair.folders[s], len(images), sweep.samples) for s, images in splits.items())
    scaled_x, scaled_test = scaled(x, x_test)
    labels, labels_test = (one_hot(v, len(pair.splits.train.class_names)) for v in (y, y_test))
    mean = labels.mean(0)
    labels, labels_test = labels - mean, labels_test - mean
    variance = float(np.square(labels_test).sum(1).mean())
    points = []
    for a2 in sweep.a2:
        swept = random_feature_regression(
            scaled_x,
            labels,
            scaled_test,
            labels_test,
            a2=a2,
            a1=sweep.a1,
            a0=sweep.a0,
            num_features=sweep.num_features,
            gammas=sweep.gammas,
            draws=sweep.draws,
            seed=sweep.seed,
        )
        for point in swept:
            values = {"theory": point.theory, "simulated": point.simulated, "band": point.band}
            relative = {k: (np.array(v) / variance).tolist() for k, v in values.items()}
            points.append({"a2": a2, "num_features": point.num_features, "gamma": point.gamma, **relative})
    return points


def one_hot(y: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Labels for regression: +-1 for two classes, one-hot for more.

    Example:
        >>> one_hot(np.array([1, 0]), 2).tolist(), one_hot(np.array([2]), 3).tolist()
        ([[1.0], [-1.0]], [[0.0, 0.0, 1.0]])
    """
    if num_classes == 2:
        return np.where(y[:, None] == 1, 1.0, -1.0)
    return np.eye(num_classes)[y]


def agreement(points: Sequence[Mapping[str, Any]]) -> str:
    """At how many points the theory is within the range of draws, and its median relative gap to their mean."""
    inside = sum(p["band"][0] <= p["theory"] <= p["band"][1] for p in points)
    gap = np.median([abs(p["theory"] / p["simulated"] - 1) for p in points])
    return f"theory within the draws at {inside} of {len(points)} points, median gap {gap:.1%}"


def _draw(found: Mapping[str, Any], out: Path) -> dict[str, str]:
    from timm_etf.studies import plots

    return {
        plots.random_features(data, by_label, out): "Test error over the number of random features"
        for data, by_label in found.items()
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report to read: for every data set the error at the largest N, and how the theory compares."""
    sweep = results["sweep"]
    most = max(sweep["num_features"])
    sigma = f"{sweep['a1']:g} t + {sweep['a0']:g}"
    lines = [
        "# Random features",
        "",
        f"Ridge regression on N random features sigma(w'x), sigma(t) = a2 t^2 + {sigma}, of pre-logits (at most "
        f"{sweep['samples']} images of each split, centred, mean squared norm 1). Test mean squared error over the "
        f"labels' variance: 1 is what predicting the mean gives. Mean of {sweep['draws']} draws of the features; in "
        "brackets the deterministic equivalent.",
        "",
    ]
    for data, models in results["random_features"].items():
        grid = list(product(sweep["a2"], sweep["gammas"]))
        lines += [f"## {data}, N = {most}", "", row(["a2", "gamma", *models]), "|---|---|" + "---|" * len(models)]
        for a2, gamma in grid:
            cells = []
            for trainings in models.values():
                at = [p for t in trainings for p in t if (p["a2"], p["gamma"], p["num_features"]) == (a2, gamma, most)]
                cells.append(f"{np.mean([p['simulated'] for p in at]):.4g} ({np.mean([p['theory'] for p in at]):.4g})")
            lines.append(row([f"{a2:g}", f"{gamma:g}", *cells]))
        lines.append("")
        for label, trainings in models.items():
            points = [p for t in trainings for p in t]
            lines.append(f"- `{label}`: {agreement(points)}")
        lines.append("")
    return "\n".join([*lines, *remarks(results["missing"], results["notes"]), ""])


def summary(results: Mapping[str, Any], out: Path) -> str:
    """What the command prints: the best point of each model, how theory compares, and where the rest is."""
    lines = []
    for data, models in results["random_features"].items():
        for label, trainings in models.items():
            points = [p for t in trainings for p in t]
            best = min(points, key=lambda p: p["simulated"])
            where = f"a2 {best['a2']:g}, N {best['num_features']}, gamma {best['gamma']:g}"
            lines.append(
                f"{data}, {label}: least test error {best['simulated']:.4g} of the labels' variance ({where}); "
                f"{agreement(points)}"
            )
    then = "timm-etf transfer with these --models, and the data as --targets"
    return "\n".join([*lines, *closing(out, results["missing"], "random-features-*.png", then=then)])
