"""Pictures: class covariance side by side, test error of random features over their number, who finds whom."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from timm_etf.geometry import spectrum
from timm_etf.report.style import COLOURS, STYLE, save

Matrices = Mapping[str, NDArray[np.float32]]


def covariance(data: str, models: Mapping[str, tuple[NDArray[np.float32], float]], out: Path, of: str = "") -> str:
    """Heat maps of the average class covariance of every model on one colour scale, and their spectra.

    The first row is as the features are; the second in units of the features' total variance, because a model with
    smaller features has a smaller covariance without being more collapsed.

    Args:
        data: Name of the data set.
        models: Class covariance [D, D] and total variance, by label.
        out: Folder of the picture.
        of: What the title says it is of, beside the data set.

    Returns:
        The picture's file name.
    """
    with rc_context(STYLE):
        count = len(models)
        figure: Any = Figure(figsize=(1.2 + 2.4 * count + 3.4, 5.6), layout="constrained")
        plain, relative = figure.subplots(2, count + 1, width_ratios=[1] * count + [1.25], squeeze=False)
        as_they_are = {label: c for label, (c, _) in models.items()}
        image = _heat_maps(plain, as_they_are, lambda c: f"tr C / D = {np.trace(c) / len(c):.3g}")
        figure.colorbar(image, ax=plain[:count], shrink=0.8, pad=0.01)
        plain[0].set_ylabel("class covariance C")
        _spectra(plain[count], as_they_are, "eigenvalues of C")
        in_units = {label: c / total for label, (c, total) in models.items()}
        image = _heat_maps(relative, in_units, lambda c: f"{np.trace(c) * 100:.1f} % within classes")
        figure.colorbar(image, ax=relative[:count], shrink=0.8, pad=0.01)
        relative[0].set_ylabel("C / total variance")
        _spectra(relative[count], in_units, "eigenvalues of C / total variance")
        figure.suptitle(f"{data}: average class covariance{of}, dimensions in order of their variance", fontsize=10)
        return save(figure, out / f"covariance-{data}.png")


def _heat_maps(row: Any, matrices: Matrices, title: Callable[[NDArray[np.float32]], str]) -> Any:
    # The strongest half percent of entries, most of the diagonal, is one colour, or the rest would be white.
    limit = max(np.quantile(np.abs(c), 0.995) for c in matrices.values()) or 1.0
    for axis, (label, c) in zip(row, matrices.items(), strict=False):
        order = np.argsort(-np.diag(c))
        image = axis.imshow(c[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(f"{label}\n{title(c)}")
        axis.set_xticks([])
        axis.set_yticks([])
    return image


def _spectra(axis: Any, matrices: Matrices, title: str) -> None:
    for (label, c), colour in zip(matrices.items(), cycle(COLOURS), strict=False):
        values = spectrum(torch.from_numpy(c).double()).numpy()
        shown = values > values[0] * 1e-9
        axis.loglog(np.arange(1, len(c) + 1)[shown], values[shown], color=colour, label=label)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


def random_features(data: str, models: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], out: Path) -> str:
    """Test error over the number of random features: theory as lines, simulations as points with the band of draws.

    Args:
        data: Name of the data set.
        models: By label, the points of every training; the first training is drawn.
        out: Folder of the picture.

    Returns:
        The picture's file name.
    """
    first = {label: trainings[0] for label, trainings in models.items()}
    gammas, a2s = (sorted({p[key] for points in first.values() for p in points}) for key in ("gamma", "a2"))
    with rc_context(STYLE):
        figure: Any = Figure(figsize=(1 + 2.9 * len(gammas), 0.8 + 2.5 * len(first)), layout="constrained")
        grid = figure.subplots(len(first), len(gammas), sharex=True, sharey="row", squeeze=False)
        for row, (label, points) in zip(grid, first.items(), strict=True):
            for axis, gamma in zip(row, gammas, strict=True):
                for number, a2 in enumerate(a2s):
                    line = [p for p in points if (p["gamma"], p["a2"]) == (gamma, a2)]
                    colour = COLOURS[number % len(COLOURS)]
                    x = [p["num_features"] for p in line]
                    axis.fill_between(x, *zip(*[p["band"] for p in line], strict=True), color=colour, alpha=0.2, lw=0)
                    axis.plot(x, [p["simulated"] for p in line], "o", color=colour, markersize=3.5)
                    axis.plot(x, [p["theory"] for p in line], color=colour, lw=1.2, label=f"a2 = {a2:g}")
                axis.axhline(1, color="black", lw=0.6, ls=":")
                axis.set_xscale("log")
                axis.set_xticks(x, map(str, x), rotation=45, fontsize=8)
                axis.set_xticks([], minor=True)
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(ScalarFormatter())
                axis.yaxis.set_minor_formatter(ScalarFormatter())
                axis.grid(alpha=0.3)
                axis.set_title(f"{label}, gamma = {gamma:g}")
            row[0].set_ylabel("test MSE / variance")
        grid[0][0].legend(frameon=False, fontsize=8)
        figure.supxlabel(
            "number of random features N; lines: theory, points and bands: mean and range of draws", fontsize=9
        )
        figure.suptitle(f"{data}: random-feature regression on pre-logits", fontsize=10)
        return save(figure, out / f"random-features-{data}.png")


def retrieval(data: str, pairs: Sequence[Mapping[str, Any]], out: Path) -> str:
    """recall@1 of every pair of labels in features and in coordinates, and over the images Procrustes is fitted on.

    Where there are too many pairs for one picture, the last is of galleries of the first label alone.

    Args:
        data: Name of the data set.
        pairs: What was found for every pair of labels, see `studies.retrieval`. A label with itself shows queries to
            the same model.
        out: Folder of the picture.

    Returns:
        The picture's file name.
    """
    labels = list(dict.fromkeys(p["queries"] for p in pairs))
    recall = [{space: float(np.mean(v["recall@1"])) for space, v in p["spaces"].items()} for p in pairs]
    side = 1.6 + 0.7 * len(labels)
    with rc_context(STYLE):
        figure: Any = Figure(figsize=(3 * side + 5.5, side + 1.4), layout="constrained")
        *matrices, curve = figure.subplots(1, 4, width_ratios=[side, side, side, 5])
        for axis, space in zip(matrices, ("features", "coordinates", "centred"), strict=True):
            values = np.full((len(labels), len(labels)), np.nan)
            for p, found in zip(pairs, recall, strict=True):
                place = labels.index(p["queries"]), labels.index(p["gallery"])
                if place[0] != place[1] or "difference" not in p:
                    values[place] = found.get(space, np.nan)
            axis.imshow(values, cmap="Blues", vmin=0, vmax=130)
            for place, value in np.ndenumerate(values):
                axis.text(place[1], place[0], "-" if np.isnan(value) else f"{value:.1f}", ha="center", va="center")
            axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
            axis.set_yticks(range(len(labels)), labels)
            axis.set(title="coordinates, centred" if space == "centred" else space, xlabel="gallery", ylabel="queries")
        fits = sorted({int(space.split()[1]) for found in recall for space in found if space.startswith("Procrustes")})
        names = ["features", *(f"Procrustes {n}" for n in fits)]
        updates = [(p, found) for p, found in zip(pairs, recall, strict=True) if "difference" in p]
        if len(updates) > len(COLOURS):  # too many to tell apart: of the first label's index
            updates = [(p, found) for p, found in updates if p["gallery"] == labels[0]]
        for (p, found), colour in zip(updates, cycle(COLOURS), strict=False):
            other = "another " if p["queries"] == p["gallery"] else ""
            curve.plot(
                [found.get(name, np.nan) for name in names],
                "o-",
                color=colour,
                markersize=3.5,
                label=f"{p['queries']} in {other}{p['gallery']}",
            )
            curve.axhline(found["centred"], color=colour, ls="--", lw=1)
        curve.set_xticks(range(len(names)), ["0", *map(str, fits)])
        curve.set(
            title="Procrustes (points), centred coordinates (dashed)", xlabel="images fitted on", ylabel="recall@1, %"
        )
        curve.set_ylim(0, 105)
        curve.grid(alpha=0.3)
        if updates:
            curve.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{data}: what queries of one model find in the gallery of another", fontsize=10)
        return save(figure, out / f"retrieval-{data}.png")
