"""The fixed frame nearest to vectors that are there: a trained classifier's rows, or class means."""

import torch
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.frames.bounds import coherence
from timm_etf.frames.codes import spherical_code
from timm_etf.frames.exact import check, nearest_simplex

SLACK = 0.05
"""How much larger the largest cosine may be than that of the best frame, where no simplex fits."""

_MOST_STEPS = 500


def nearest(rows: Tensor) -> Tensor:
    r"""The fixed frame that changes a classifier least.

    Where a simplex fits (K <= d+1) it is the nearest one, `nearest_simplex`. Beyond that no optimal frame is near to
    anything: the centred unit rows themselves are pushed apart wherever two are closer than the best frame's coherence
    and 0.05 more,

    .. math:: w_i \leftarrow w_i - \eta \sum_{j \ne i} \max(0, w_i^\top w_j - \mu)\, w_j, \qquad |w_i| = 1,

    which leaves rows alone that have no such neighbour.

    Args:
        rows: Weight of a classifier, [K, d] with K >= 2, finite; neither a common offset nor a common scale matters.

    Returns:
        Unit rows, [K, d], float64, on the device of the rows.

    Raises:
        UsageError: If the rows are not a finite matrix, or all alike, as of a classifier that was never trained.

    Example:
        >>> from timm_etf.frames import simplex
        >>> w = simplex(5, 16, seed=3)
        >>> torch.allclose(nearest(2.5 * w + 7.0), w)
        True
    """
    if rows.dim() != 2:
        raise UsageError(f"A classifier's rows have the shape [K, d], got {list(rows.shape)}.")
    num_classes, dim = rows.shape
    check(num_classes, dim)
    if not rows.isfinite().all():
        raise UsageError("The classifier's weights are not finite: its training diverged, or they were damaged.")
    centred_KD = centred(rows)
    if not (centred_KD.norm(dim=1) > 0).all():
        raise UsageError("The classifier's rows are all alike, or some are: it holds no weights to be near to.")
    if num_classes <= dim + 1:
        return nearest_simplex(centred_KD)
    best = 0.0 if num_classes <= 2 * dim else coherence(spherical_code(num_classes, dim))
    return _pushed_apart(torch.nn.functional.normalize(centred_KD, dim=1), best + SLACK)


def centred(rows: Tensor) -> Tensor:
    """Rows less their mean, in float64: an offset that all classes share changes no probability."""
    rows_KD = rows.detach().double()
    return rows_KD - rows_KD.mean(dim=0)


def mean_cosine(rows: Tensor, frame: Tensor) -> float:
    """Mean cosine of a (centred) row with its vector of the frame; 1 where the rows are the frame already.

    It is no measure of collapse: rows that no training has moved are close to a simplex in a wide space, too.

    Example:
        >>> random = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
        >>> round(mean_cosine(random, nearest(random)), 1)
        1.0
    """
    return torch.nn.functional.cosine_similarity(centred(rows), frame.to(rows.device), dim=1).mean().item()


def least_squares_scale(rows: Tensor, frame: Tensor) -> float:
    """The scale s > 0 for which s times a frame of unit rows is closest to the (centred) rows."""
    return ((centred(rows) * frame.to(rows.device)).sum() / len(frame)).item()


def looks_random(rows: Tensor) -> bool:
    """Whether the directions of the rows are spread as random ones are: as of a classifier that was never trained.

    Cosines of random directions in R^d have the standard deviation 1/sqrt(d). Training changes that: classes that are
    alike come closer together, or, towards neural collapse, all become equally far apart. Fewer than 15 classes do not
    tell.
    """
    unit_KD = torch.nn.functional.normalize(rows.detach().double()[:2000], dim=1)
    cosines_KK = unit_KD @ unit_KD.T
    above = cosines_KK[torch.ones_like(cosines_KK, dtype=torch.bool).triu(1)]
    if len(above) < 100:
        return False
    spread = above.square().mean().sqrt().item() * rows.shape[1] ** 0.5
    return abs(spread - 1) < 0.03 + 3 / (2 * len(above)) ** 0.5  # three standard errors


def _pushed_apart(unit_KD: Tensor, largest: float) -> Tensor:
    step, before = 0.5, float("inf")
    for _ in range(_MOST_STEPS):
        push_KD = torch.empty_like(unit_KD)
        above = -1.0
        for start in range(0, len(unit_KD), 1024):
            excess_BK = unit_KD[start : start + 1024] @ unit_KD.T - (largest - 0.1 * SLACK)
            excess_BK.diagonal(offset=start).fill_(-1)
            above = max(above, excess_BK.max().item())
            push_KD[start : start + 1024] = excess_BK.clamp_(min=0) @ unit_KD
        if above <= 0.1 * SLACK:
            break
        step = step / 2 if above > before else min(0.5, 1.1 * step)
        before = above
        unit_KD = torch.nn.functional.normalize(unit_KD - step * push_KD, dim=1)
    return unit_KD
