r"""Frames: K unit vectors in R^d that a fixed classifier can use as its class directions. Tensors in, tensors out.

Only torch is imported here. Every frame is drawn in float64 from a generator of its own, so that the same arguments
give the same vectors in every process and torch's global random state is never touched.

Shape suffixes: `w_KD` is a frame with K vectors of d dimensions, `u_DM` has M orthonormal columns.
"""

import torch
from torch import Tensor

from timm_etf.errors import UsageError

__all__ = ["FRAMES", "coherence", "is_simplex", "make", "resolve", "simplex"]


def simplex(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Simplex equiangular tight frame (ETF), randomly rotated: K unit vectors whose pairwise cosines are all -1/(K-1).

    .. math:: W = \sqrt{K / (K - 1)} \, (I_K - 1 1^\top / K) \, U^\top, \qquad U^\top U = I

    The K vectors span only K-1 dimensions, so with an orthonormal basis :math:`H \in R^{K \times (K-1)}` of the
    vectors that sum to zero (Helmert's) this is :math:`W = \sqrt{K/(K-1)} H V^\top`, with V in R^{d x (K-1)}
    Haar-distributed on the Stiefel manifold. That form is the same set of frames and needs only d >= K-1.

    Args:
        num_classes: K, the number of vectors, at least 2.
        dim: d, their dimension, at least K-1.
        seed: Seed of the rotation, any integer torch's generator takes.
        dtype: Type of the result; the computation is always in float64.

    Returns:
        Frame of shape [K, d]: rows of norm 1 that sum to zero, contiguous, on the CPU.

    Raises:
        UsageError: If K < 2 or d < K-1.

    Source:
        Papyan, Han and Donoho 2020 (simplex ETF); Mezzadri 2007 (Haar measure from QR of a Gaussian matrix).

    Example:
        >>> w = simplex(3, 8)
        >>> w.shape
        torch.Size([3, 8])
        >>> [[round(x, 6) for x in row] for row in (w @ w.T).tolist()]
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    if num_classes < 2:
        raise UsageError(f"A frame needs at least 2 classes, got num_classes={num_classes}.")
    if dim < num_classes - 1:
        raise UsageError(
            f"A simplex ETF of {num_classes} classes needs features of width {num_classes - 1} or more, got {dim}: "
            f"use at most {dim + 1} classes, or a backbone with a wider head."
        )
    w_KD = _helmert_apply(_haar(dim, num_classes - 1, seed).T)
    return (w_KD * (num_classes / (num_classes - 1)) ** 0.5).to(dtype).contiguous()


def _haar(dim: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns [d, M], uniform on the Stiefel manifold (Haar): QR of a Gaussian draw, signs from R."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # The device is named, so that building a model under `torch.device("meta")` still draws real numbers.
    gaussian_DM = torch.randn(dim, columns, generator=generator, dtype=torch.float64, device="cpu")
    q_DM, r_MM = torch.linalg.qr(gaussian_DM)
    # LAPACK leaves the sign of each column open; fixing it by R's diagonal is what makes the law Haar.
    return q_DM * torch.sign(r_MM.diagonal())


def _helmert_apply(v_MD: Tensor) -> Tensor:
    """H v, where the K x (K-1) Helmert basis H has columns (1, ..., 1, -j, 0, ...)/sqrt(j(j+1)); M = K-1.

    Row k of H v is a suffix sum less one term, so that a cumulative sum gives it in O(K d) instead of O(K^2 d).
    """
    j_M1 = torch.arange(1, v_MD.shape[0] + 1, dtype=v_MD.dtype, device="cpu").unsqueeze(1)
    scaled_MD = v_MD / torch.sqrt(j_M1 * (j_M1 + 1))
    zero_1D = v_MD.new_zeros(1, v_MD.shape[1])
    suffix_KD = torch.cat([scaled_MD.flip(0).cumsum(0).flip(0), zero_1D])
    return suffix_KD - torch.cat([zero_1D, scaled_MD * j_M1])


FRAMES = {"simplex": simplex}
"""Frames by name: functions `(num_classes, dim, *, seed) -> [K, d]`."""


def resolve(name: str, num_classes: int, dim: int) -> str:
    """Name of the frame that `make` builds: `"auto"` becomes the optimal frame for K classes in d dimensions.

    Args:
        name: `"auto"` or a name in `FRAMES`.
        num_classes: K.
        dim: d.

    Returns:
        A name in `FRAMES`.

    Raises:
        UsageError: If the name is unknown.

    Example:
        >>> resolve("auto", 1000, 2048)
        'simplex'
    """
    if name == "auto":
        return "simplex"
    if name not in FRAMES:
        raise UsageError(f"Unknown frame {name!r}: use 'auto' or one of {', '.join(map(repr, FRAMES))}.")
    return name


def make(name: str, num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """Frame by name.

    Args:
        name: `"auto"` or a name in `FRAMES`.
        num_classes: K, the number of unit vectors.
        dim: d, their dimension.
        seed: Seed of the frame's random part.

    Returns:
        Frame of shape [K, d], float64, unit rows, contiguous.

    Raises:
        UsageError: If the name is unknown or the frame does not exist for this K and d.

    Example:
        >>> torch.equal(make("auto", 10, 64, seed=1), simplex(10, 64, seed=1))
        True
    """
    return FRAMES[resolve(name, num_classes, dim)](num_classes, dim, seed=seed)


def coherence(w: Tensor) -> float:
    """Largest cosine between two different rows: -1/(K-1) for a simplex ETF, larger for every other set.

    Args:
        w: Vectors of shape [K, d], K >= 2, no zero row; any scale.

    Returns:
        A cosine in [-1, 1], computed in float64.

    Raises:
        UsageError: If `w` is not a matrix of at least two rows.

    Example:
        >>> round(coherence(simplex(5, 16)), 6)
        -0.25
    """
    if w.dim() != 2 or w.shape[0] < 2:
        raise UsageError(f"Coherence takes a [K, d] matrix with K >= 2, got shape {list(w.shape)}.")
    unit_KD = torch.nn.functional.normalize(w.double(), dim=1)
    cosines_KK = unit_KD @ unit_KD.T
    cosines_KK.fill_diagonal_(-1.0)
    return cosines_KK.max().item()


def is_simplex(w: Tensor, tolerance: float = 5e-3) -> bool:
    """Whether the rows are a simplex ETF up to rotation and one common scale, as a stored copy of one is.

    Args:
        w: Vectors of shape [K, d], any float dtype.
        tolerance: Largest deviation of a row norm (relative) and of a cosine; the default admits bfloat16 copies.

    Returns:
        True if all norms are equal, the rows sum to zero and the pairwise cosines (of the first 1,000 rows, which
        bounds the cost at any K) are -1/(K-1).

    Example:
        >>> is_simplex(4 * simplex(10, 64).bfloat16()), is_simplex(torch.eye(10))
        (True, False)
    """
    if w.dim() != 2 or w.shape[0] < 2:
        return False
    w_KD = w.detach().float()
    norms_K = w_KD.norm(dim=1)
    scale = norms_K.mean()
    if not (scale > 0 and (norms_K / scale - 1).abs().max() < tolerance):
        return False
    unit_KD = w_KD / scale
    num_classes = len(unit_KD)
    head_KD = unit_KD[:1000]
    cosines_KK = (head_KD @ head_KD.T).fill_diagonal_(-1 / (num_classes - 1))
    centred = unit_KD.mean(dim=0).norm() < tolerance
    return bool(centred and (cosines_KK + 1 / (num_classes - 1)).abs().max() < tolerance)
