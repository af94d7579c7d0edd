r"""How far apart K unit vectors in R^d are, and how far apart they can be at best."""

import math

import torch
from torch import Tensor

from timm_etf.errors import UsageError


def coherence(w: Tensor, *, absolute: bool = False) -> float:
    """Largest cosine between two different rows: -1/(K-1) for a simplex ETF, larger for every other set.

    Args:
        w: Vectors of shape [K, d], K >= 2, no zero row; any scale. Computed in blocks: O(K) memory beside `w`.
        absolute: Take the largest absolute cosine instead, as `welch_bound` does.

    Returns:
        A cosine in [-1, 1], computed in float64.

    Raises:
        UsageError: If `w` is not a matrix of at least two rows.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
        >>> coherence(w), coherence(w, absolute=True)
        (0.0, 1.0)
    """
    if w.dim() != 2 or w.shape[0] < 2:
        raise UsageError(f"Coherence takes a [K, d] matrix with K >= 2, got shape {list(w.shape)}.")
    unit_KD = torch.nn.functional.normalize(w.detach().double(), dim=1)
    largest = []
    for start in range(0, len(unit_KD), 1024):  # each pair once: rows of a block against all rows from there on
        cosines_BR = unit_KD[start : start + 1024] @ unit_KD[start:].T
        cosines_BR.fill_diagonal_(-1.0 if not absolute else 0.0)
        largest.append(cosines_BR.abs().max() if absolute else cosines_BR.max())
    return torch.stack(largest).max().item()


def bound(num_classes: int, dim: int) -> float:
    """Best lower bound here on the coherence of K unit vectors in R^d: the larger of Rankin's and Levenshtein's.

    Args:
        num_classes: K >= 2.
        dim: d >= 1.

    Returns:
        A cosine in [-1, 1]; simplex and orthoplex reach it.

    Example:
        >>> bound(1000, 2048) == -1 / 999, bound(1000, 512), round(bound(1000, 192), 4)
        (True, 0.0, 0.0157)
    """
    return max(rankin_bound(num_classes, dim), levenshtein_bound(num_classes, dim))


def rankin_bound(num_classes: int, dim: int) -> float:
    """Rankin's bound: the coherence is at least -1/(K-1), and at least 0 once K > d+1.

    Args:
        num_classes: K >= 2.
        dim: d >= 1.

    Returns:
        A cosine in [-1, 0]: reached by the simplex for K <= d+1 and by the orthoplex for d+2 <= K <= 2d.

    Source:
        Rankin 1955, The closest packing of spherical caps in n dimensions.
    """
    _check(num_classes, dim)
    return -1 / (num_classes - 1) if num_classes <= dim + 1 else 0.0


def welch_bound(num_classes: int, dim: int) -> float:
    r"""Welch's bound on the largest *absolute* cosine, :math:`\sqrt{(K-d) / (d(K-1))}`; 0 for K <= d.

    A classifier wants small cosines and may have very negative ones, so this bound does not limit its coherence: an
    orthoplex has coherence 0 and absolute coherence 1.

    Args:
        num_classes: K >= 2.
        dim: d >= 1.

    Returns:
        An absolute cosine in [0, 1].

    Source:
        Welch 1974, Lower bounds on the maximum cross correlation of signals.

    Example:
        >>> round(welch_bound(1000, 192), 4)
        0.0649
    """
    _check(num_classes, dim)
    return math.sqrt(max(0, num_classes - dim) / (dim * (num_classes - 1)))


def levenshtein_bound(num_classes: int, dim: int) -> float:
    r"""Levenshtein's bound: the smallest s with :math:`L_m(d, s) \ge K`, as no code of coherence s is larger than L_m.

    With :math:`P_k` the Gegenbauer polynomials of R^d scaled to :math:`P_k(1) = 1`,

    .. math::
        L_{2k-1}(d,s) &= \binom{k+d-3}{k-1} \Bigl[ \tfrac{2k+d-3}{d-1} - \tfrac{P_{k-1}-P_k}{(1-s)P_k} \Bigr] \\
        L_{2k}(d,s) &= \binom{k+d-2}{k} \Bigl[ \tfrac{2k+d-1}{d-1}
            - \tfrac{(1+s)(P_k-P_{k+1})}{(1-s)(P_k+P_{k+1})} \Bigr]

    and the degree m fixed by K, because L_m is valid between the largest zeros of neighbouring Jacobi polynomials and
    its values there are the sizes of tight spherical designs.

    Args:
        num_classes: K >= 2.
        dim: d >= 1.

    Returns:
        A cosine in [-1, 1). Weaker than `rankin_bound` for d+1 < K < 2d and equal or tighter elsewhere.

    Source:
        Levenshtein 1998, Universal bounds for codes and designs, Handbook of Coding Theory, sections 5 and 6.

    Example:
        >>> [round(levenshtein_bound(K, d), 6) for K, d in ((240, 8), (196560, 24), (12, 3))]  # E8, Leech, icosahedron
        [0.5, 0.5, 0.447214]
    """
    _check(num_classes, dim)
    if num_classes <= dim + 1:
        return -1 / (num_classes - 1)  # L_1, solved
    if dim == 1:
        return 1.0  # two points are all there is
    if dim == 2:
        return math.cos(2 * math.pi / num_classes)  # the regular polygon; the degree would grow with K
    k = 1
    while num_classes > 2 * math.comb(dim + k - 1, dim - 1):
        k += 1
    if num_classes <= math.comb(dim + k - 1, dim - 1) + math.comb(dim + k - 2, dim - 1):
        degree, low, high = 2 * k - 1, _largest_zero(dim, k - 1, 1, 1), _largest_zero(dim, k, 1, 0)
    else:
        degree, low, high = 2 * k, _largest_zero(dim, k, 1, 0), _largest_zero(dim, k, 1, 1)
    for _ in range(60):  # L_m grows with s: bisection to the last bit
        middle = (low + high) / 2
        if _levenshtein(dim, degree, middle) < num_classes:
            low = middle
        else:
            high = middle
    return high


def _check(num_classes: int, dim: int) -> None:
    if num_classes < 2 or dim < 1:
        raise UsageError(f"A bound needs at least 2 classes and 1 dimension, got {num_classes} and {dim}.")


def _largest_zero(dim: int, degree: int, a: int, b: int) -> float:
    """Largest zero of the Jacobi polynomial with alpha = (d-3)/2 + a, beta = (d-3)/2 + b."""
    from scipy.special import roots_jacobi

    return float(roots_jacobi(degree, (dim - 3) / 2 + a, (dim - 3) / 2 + b)[0][-1]) if degree else -1.0


def _levenshtein(dim: int, degree: int, s: float) -> float:
    from scipy.special import eval_gegenbauer

    def p(k: int) -> float:
        return float(eval_gegenbauer(k, dim / 2 - 1, s) / eval_gegenbauer(k, dim / 2 - 1, 1.0))

    k = (degree + 1) // 2
    if degree % 2:
        ratio = (p(k - 1) - p(k)) / ((1 - s) * p(k))
        return math.comb(k + dim - 3, k - 1) * ((2 * k + dim - 3) / (dim - 1) - ratio)
    ratio = (1 + s) * (p(k) - p(k + 1)) / ((1 - s) * (p(k) + p(k + 1)))
    return math.comb(k + dim - 2, k) * ((2 * k + dim - 1) / (dim - 1) - ratio)
