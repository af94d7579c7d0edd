"""How far targets are from the source, in the features of the compared models or of a neutral one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn

from timm_etf.atomic import write_json
from timm_etf.data.images import Images, Splits, find_targets, open_splits
from timm_etf.errors import UsageError, one_line
from timm_etf.features.candidates import parse_models
from timm_etf.features.extract import extract, identity
from timm_etf.features.study import Study, sample, spaced
from timm_etf.processes import exact_device, processes
from timm_etf.report.statistics import percentiles
from timm_etf.transfer.logistic import logistic_path

IMAGES = 2000
"""Images of either side, at most: as many of each and for every target, for Fréchet's distance grows with fewer."""

_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)

_VERSION = 2


class Distances:
    """What is found, by number of the model, or "neutral", and target; nothing without a source.

    Args:
        settings: Of the comparison: `source`, `neutral`, and those of every extraction.
        study: Its models and targets; what cannot be had is named in `missing`.

    Raises:
        UsageError: If the source or the neutral model is not known.
    """

    def __init__(self, settings: Any, study: Study) -> None:
        self.settings, self.study = settings, study
        self.found: dict[tuple[int | str, str], dict[str, float]] = {}
        self.source: Images | None = None
        self.neutral = parse_models([settings.neutral])[0] if settings.neutral else None
        if settings.source:
            targets, missing = find_targets([settings.source], settings.data_root)
            if missing:
                raise UsageError(f"--source {settings.source}: {next(iter(missing.values()))}")
            self.source = open_splits(targets[0]).train

    def measure(
        self, model_name: int | str, model: nn.Module, splits: Splits, made_from: dict[str, Any] | None = None
    ) -> None:
        """A target's training images from the source's, in the features of a model; see `extract` for `made_from`."""
        if self.source is None:
            return
        name = splits.target.name
        try:
            folders = [self._features(model, images, made_from) for images in (self.source, splits.train)]
            if processes().is_main_process:
                self.found[model_name, name] = self._between(folders, [self.source, splits.train])
        except Exception as e:
            title = self.study.title(model_name) if isinstance(model_name, int) else model_name
            self.study.missing[f"{title}: {name}, distance"] = one_line(e)

    def measure_neutral(self) -> None:
        """Every target under the neutral model, where one was given."""
        if self.neutral is None:
            return
        try:
            model = self.neutral.create().model.to(processes().device)
        except UsageError as e:
            self.study.missing[f"{self.neutral.name}, neutral"] = one_line(e)
            return
        made_from = identity(model)
        for splits in self.study.opened.values():
            self.measure("neutral", model, splits, made_from)

    def _features(self, model: nn.Module, images: Images, made_from: dict[str, Any] | None) -> Path:
        s = self.settings
        cache, options = s.features or s.out / "features", {k: getattr(s, k) for k in ("precision", "batch_size")}
        return extract(
            model, images, cache, layers=self.study.layers, workers=s.workers, made_from=made_from, **options
        )

    def _between(self, folders: list[Path], images: list[Images]) -> dict[str, float]:
        everything = [images[0], *(splits.train for splits in self.study.opened.values())]
        most = min(IMAGES, *map(len, everything))
        path = folders[1] / f"distance-{folders[0].name}-{most}.json"
        if path.exists():
            known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            if known.pop("version", 0) == _VERSION:
                return known
        source, target = (sample(f, len(i), most)[0] for f, i in zip(folders, images, strict=True))
        device = exact_device(processes().device)
        found = {
            "proxy_a": proxy_a_distance(source, target, device=device),
            "frechet": frechet_distance(source, target),
        }
        write_json(path, {"version": _VERSION, **found})
        return found


def proxy_a_distance(source: Any, target: Any, *, seed: int = 0, device: torch.device | str = "cpu") -> float:
    """How well a linear classifier tells source from target: 2 (1 - 2 error), on images held out from its fit.

    Logistic regression on standardised features of one half of the images is scored on the other half, and the other
    way round; the regularisation is what does best on them.

    Args:
        source: Features [n, d].
        target: Features [m, d]; where they are more, or fewer, both are cut to the smaller number.
        seed: Of the halves.
        device: Where to compute.

    Returns:
        0 where no classifier is better than chance, up to 2 where one makes no error.

    Raises:
        UsageError: For fewer than four images of either, or features of unlike width.

    Source:
        Ben-David et al. 2007, Analysis of representations for domain adaptation; Ganin et al. 2016, section 5.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> round(proxy_a_distance(rng.normal(size=(200, 4)), 5 + rng.normal(size=(200, 4))), 2)
        2.0
    """
    x, y = _paired(source, target, seed)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    x_ND, y_N = torch.from_numpy(x.astype(np.float32)).to(device), torch.from_numpy(y).to(device)
    halves = [torch.arange(start, len(y), 2, device=x_ND.device) for start in (0, 1)]
    errors = torch.zeros(len(_STRENGTHS), dtype=torch.float64)
    for fit, held in (halves, halves[::-1]):
        weights = logistic_path(x_ND[fit], y_N[fit], 2, _STRENGTHS)
        for place, w in enumerate(weights):
            logits = torch.addmm(w[:, -1], x_ND[held], w[:, :-1].T)
            errors[place] += (logits.argmax(1) != y_N[held]).double().mean().item() / 2
    return max(0.0, 2 * (1 - 2 * errors.min().item()))


def frechet_distance(source: Any, target: Any) -> float:
    r"""Fréchet distance of two Gaussians with the means and covariances of the features.

    .. math:: \|\mu_1 - \mu_2\|^2 + \mathrm{tr} \, (S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

    Args:
        source: Features [n, d].
        target: Features [m, d]; where they are more, or fewer, as many of both are taken, evenly spaced.

    Returns:
        The squared distance, at least 0, in squared units of the features: compare it within one model. From few images
        it is too large: by chance alone, two samples of one distribution are apart.

    Source:
        Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), there on features of Inception.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(500, 3))
        >>> round(frechet_distance(x, x), 6), round(frechet_distance(x, x + [2.0, 0.0, 0.0]), 6)
        (0.0, 4.0)
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (source, target))
    _check(a, b)
    n = min(len(a), len(b))
    as_many = (x[spaced(len(x), n)] for x in (a, b))
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False, ddof=1)) for x in as_many)
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_a))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root)
    traces = np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(max(0.0, np.square(mean_a - mean_b).sum() + traces))


def _paired(source: Any, target: Any, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """As many rows of both, drawn at random, and which side each is from."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (source, target))
    _check(a, b)
    n, rng = min(len(a), len(b)) // 2 * 2, np.random.default_rng(seed)
    # Two rows of each in turn, so that both halves, every other row, hold as many of either side.
    sides = np.tile([0, 0, 1, 1], n // 2)
    x = np.empty((2 * n, a.shape[1]))
    for side, rows in enumerate((a, b)):
        x[sides == side] = rows[rng.permutation(len(rows))[:n]]
    return x, sides


def _check(a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UsageError(f"Distances are of features of one width, [n, d], got {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < 4:
        raise UsageError(f"A distance takes at least four images of either side, got {len(a)} and {len(b)}.")


def rank_correlation(
    distance: Any, gain: Any, *, draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Spearman's correlation of a gain with a distance over targets, and its interval over targets and trainings.

    Args:
        distance: Of each target, [T].
        gain: Of each training and target, [R, T]; their mean over trainings is what is ranked.
        draws: Resamples of trainings and of targets, with replacement.
        seed: Of the draws.

    Returns:
        The correlation in [-1, 1] and its 95 % bootstrap interval; with few targets that is wide, as it should be.
    """
    d, g = np.asarray(distance, dtype=np.float64), np.atleast_2d(np.asarray(gain, dtype=np.float64))
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        runs, targets = rng.integers(len(g), size=len(g)), rng.integers(len(d), size=len(d))
        value = _spearman(d[targets], g[runs][:, targets].mean(0))
        found += [] if np.isnan(value) else [value]
    return _spearman(d, g.mean(0)), percentiles(np.array(found or [np.nan]))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    ranks = [rankdata(values) for values in (a, b)]
    deviations = [r - r.mean() for r in ranks]
    scale = np.sqrt(np.prod([np.square(dev).sum() for dev in deviations]))
    return float((deviations[0] * deviations[1]).sum() / scale) if scale > 0 else float("nan")
