"""Neural collapse: how near features are to one point per class, and the points to a simplex.

Legend: D features, K classes that occur.
"""

import torch
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.geometry.moments import ClassMoments


def collapse(moments: ClassMoments, weight: Tensor | None = None) -> dict[str, float]:
    """Collapse metrics of labelled features, in float64. Smaller is more collapsed, except for the last three.

    S_W and S_B are the within-class and between-class covariances, weighted by class size, m_k the class means and M
    the matrix of these less their plain mean. A class without samples counts nowhere.

    - `nc1` = tr(S_W pinv(S_B)) / K (Papyan, Han and Donoho 2020, arXiv 2008.08186); 0 when every class is a point.
    - `nc1_quotient` = tr(S_W) / tr(S_B) (Tirer, Huang and Niles-Weed 2023).
    - `nc2_equinorm` = deviation / mean of the norms of M's rows, `nc2_equiangularity` = deviation of the cosines of two
      rows, `nc2_simplex` = mean |cosine + 1 / (K - 1)|; all 0 for a simplex ETF (Papyan et al.).
    - `nc3` = |M / |M| - W / |W||^2 in Frobenius norm, from 0 (self-dual) to 4, if `weight` is given (Papyan et al.).
    - `cdnv` = mean over pairs of (v_i + v_j) / (2 |m_i - m_j|^2), v the mean squared distance to the class mean
      (Galanti, Gyoergy and Hutter 2022, arXiv 2112.15121).
    - `vci` = 1 - tr(pinv(S_W + S_B) S_B) / rank(S_B) (Xu and Liu 2023, arXiv 2306.03440).
    - `within` = tr(S_W) / D, the trace of the class covariance in arXiv 2402.18614.
    - `feature_norm` = mean norm of the features.
    - `effective_rank_within`, `effective_rank_between` = exp of the entropy of the covariance's normalised eigenvalues,
      from 1 to D (Roy and Vetterli 2007).

    Args:
        moments: Of the features.
        weight: The classifier's weight, [K, D], for `nc3`.

    Returns:
        The metrics by name; `nan` where one class makes a ratio meaningless, `inf` where class means coincide.

    Raises:
        UsageError: If there is no sample, a feature is not finite, or `weight` has another shape.

    Example:
        >>> x, y = torch.eye(3)[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 2, 2])
        >>> found = collapse(ClassMoments.of(x, y), weight=torch.eye(3) - 1 / 3)
        >>> {k: round(abs(v), 6) for k, v in found.items() if k in ("nc1", "nc2_equinorm", "nc2_simplex", "nc3")}
        {'nc1': 0.0, 'nc2_equinorm': 0.0, 'nc2_simplex': 0.0, 'nc3': 0.0}
    """
    n, d = float(moments.count.sum()), moments.mean.shape[1]
    if n == 0:
        raise UsageError("There is no sample to measure.")
    if not moments.norm.isfinite():
        raise UsageError("Some features are not finite: the model's weights are damaged or diverged.")
    if weight is not None and weight.shape != moments.mean.shape:
        raise UsageError(f"A weight of shape {list(moments.mean.shape)} belongs here, not {list(weight.shape)}.")
    occurs = moments.count > 0
    count, m_KD = moments.count[occurs], moments.mean[occurs]
    k, share = len(count), count / n
    v_K = moments.spread[occurs] / count
    s_w = moments.scatter() / n
    values = torch.linalg.eigvalsh(s_w)
    trace_w = float(share @ v_K)
    about = {
        "within": trace_w / d,
        "feature_norm": float(moments.norm) / n,
        "effective_rank_within": effective_rank(values),
    }
    if k < 2:
        return dict.fromkeys(RATIOS, float("nan")) | about | {"effective_rank_between": 0.0}
    # K centred means span K - 1 directions, and they are exact to the features' size times eps, not to their own.
    size = (trace_w + float(share @ torch.linalg.vector_norm(m_KD, dim=1).square())) ** 0.5
    # S_B = A'A with A of K rows, or its triangle where they are many: its axes come from that, and no D x D matrix is
    # inverted for nc1.
    a_KD = (m_KD - share @ m_KD).mul_(share.sqrt()[:, None])
    if k > d:
        a_KD = torch.linalg.qr(a_KD, mode="r").R
    _, s, axes = torch.linalg.svd(a_KD, full_matrices=False)
    eps = torch.finfo(torch.float64).eps
    rank = min(int((s > max(n, d) * eps * size).sum()), k - 1)
    about["effective_rank_between"] = effective_rank(s[:rank].square())
    if rank == 0:
        return dict.fromkeys(RATIOS, float("nan")) | {"nc1": float("inf"), "cdnv": float("inf")} | about
    s, axes = s[:rank], axes[:rank]
    total, most = s_w + a_KD.T @ a_KD, float(values[-1] + s[0].square())
    if values[0] > most * max(n, d) * eps:  # then their sum has full rank, too, and no pseudo-inverse is needed
        lower = torch.linalg.cholesky(total)
        explained = torch.linalg.solve_triangular(lower, a_KD.T, upper=False).square().sum() / rank
    else:
        values, vectors = torch.linalg.eigh(total)
        keep = values > values[-1] * max(n, d) * eps
        explained = ((a_KD @ vectors[:, keep]).square().sum(0) / values[keep]).sum() / rank
    simplex = m_KD.sub_(m_KD.mean(0))  # a copy of the moments' means
    found = {
        "nc1": float((((axes @ s_w) * axes).sum(1) / s.square()).sum() / k),
        "nc1_quotient": trace_w / float(s.square().sum()),
        **_over_pairs(simplex, v_K),
        "vci": max(0.0, float(1 - explained)),
    }
    if weight is not None:
        w_KD = weight.detach().to(m_KD)[occurs]
        cosine = torch.vdot(simplex.flatten(), w_KD.flatten()) / simplex.norm() / w_KD.norm()
        found["nc3"] = float(2 - 2 * cosine)
    return found | about


RATIOS = ("nc1", "nc1_quotient", "nc2_equinorm", "nc2_equiangularity", "nc2_simplex", "cdnv", "vci")


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of eigenvalues over their sum; 0 if there is none above 0.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    values = values[values > 0]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def _over_pairs(m_KD: Tensor, v_K: Tensor) -> dict[str, float]:
    """What is a mean over pairs of classes, from centred class means; a block of the K x K pairs at a time."""
    k, norms = len(m_KD), torch.linalg.vector_norm(m_KD, dim=1)
    block = max(1, _PAIRS // k)
    unit = m_KD / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    mean = (unit.sum(0).square().sum() - torch.linalg.vector_norm(unit).square()) / (k * (k - 1))
    spread = simplex = cdnv = 0.0
    for at in range(0, k, block):
        cosine = unit[at : at + block] @ unit.T
        squared, gap = (cosine - mean).square_(), (cosine + 1 / (k - 1)).abs_()
        gram = m_KD[at : at + block] @ m_KD.T
        distance = (norms[at : at + block, None].square() + norms.square() - 2 * gram).clamp_(min=0)
        # Two equal means of two points are no pair apart: 0 / 0 counts as infinite, too.
        ratio = ((v_K[at : at + block, None] + v_K) / 2 / distance).nan_to_num_(nan=float("inf"), posinf=float("inf"))
        for values in (squared, gap, ratio):
            values.diagonal(at).zero_()  # a class is no pair with itself
        spread, simplex, cdnv = spread + float(squared.sum()), simplex + float(gap.sum()), cdnv + float(ratio.sum())
    pairs = k * (k - 1)
    return {
        "nc2_equinorm": float(norms.std(correction=0) / norms.mean()),
        "nc2_equiangularity": (spread / pairs) ** 0.5,
        "nc2_simplex": simplex / pairs,
        "cdnv": cdnv / pairs,
    }


_PAIRS = 2**23
"""Pairs of classes at once, of which half a dozen numbers are held."""
