"""The frames that are optimal and have a closed form: the simplex ETF and the orthoplex, randomly rotated."""

import torch
from torch import Tensor

from timm_etf.errors import UsageError


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
    check(num_classes, dim)
    _check_simplex(num_classes, dim)
    return _from_basis(haar(dim, num_classes - 1, seed)).to(dtype).contiguous()


def orthoplex(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """K vertices of the orthoplex {+-e_i}, randomly rotated: class k and class k+d are opposite, all others orthogonal.

    Args:
        num_classes: K, from d+2 to 2d.
        dim: d.
        seed: Seed of the rotation.
        dtype: Type of the result; the computation is always in float64.

    Returns:
        Frame of shape [K, d]: unit rows, largest cosine 0, which is the least that more than d+1 vectors can have.

    Raises:
        UsageError: If K is not in that range.

    Source:
        Rankin 1955 (optimality); Pernici et al. 2021, Regular polytope networks (as a classifier).

    Example:
        >>> w = orthoplex(7, 4)
        >>> (w @ w.T).round().int().tolist()[0]
        [1, 0, 0, 0, -1, 0, 0]
    """
    check(num_classes, dim)
    if not dim + 2 <= num_classes <= 2 * dim:
        other = "simplex" if num_classes < dim + 2 else "spherical_code"
        raise UsageError(
            f"In {dim} dimensions an orthoplex is for {dim + 2} to {2 * dim} classes, not {num_classes}: use {other!r}."
        )
    axes_DD = haar(dim, dim, seed).T
    return torch.cat([axes_DD, -axes_DD[: num_classes - dim]]).to(dtype)


def nearest_simplex(class_means: Tensor) -> Tensor:
    r"""The simplex ETF that lies nearest to given class means: an orthogonal Procrustes problem, solved in closed form.

    .. math:: \min_{W = \sqrt{K/(K-1)} H V^\top,\; V^\top V = I} \| \bar M - c W \|_F
        \quad\Rightarrow\quad V = \mathrm{polar}(\bar M^\top H)

    H is a basis of the vectors that sum to zero, so the global mean of the class means drops out, and the answer does
    not depend on their common scale c > 0.

    Args:
        class_means: Mean features by class, [K, d] with K >= 2 and d >= K-1, finite.

    Returns:
        Frame of shape [K, d], float64, on the device of the means. Where the means span fewer than K-1 dimensions,
        the missing ones are chosen arbitrarily.

    Raises:
        UsageError: If the shape does not admit a simplex or a value is not finite.

    Source:
        The aim is that of Markou et al. 2024 (arXiv 2411.01248), without its proximal term; the solution is
        Schoenemann's of 1966.

    Example:
        >>> w = simplex(5, 16, seed=3)
        >>> torch.allclose(nearest_simplex(2.5 * w + 7.0), w)
        True
    """
    if class_means.dim() != 2:
        raise UsageError(f"Class means have the shape [K, d], got {list(class_means.shape)}.")
    num_classes, dim = class_means.shape
    check(num_classes, dim)
    _check_simplex(num_classes, dim)
    if not class_means.isfinite().all():
        raise UsageError("A class mean is not finite: a class without samples? Leave such classes out.")
    centred_KD = (class_means - class_means.mean(dim=0)).detach().double()
    left_DM, _, right_MM = torch.linalg.svd(_helmert_transpose_apply(centred_KD).T, full_matrices=False)
    return _from_basis(left_DM @ right_MM)


def check(num_classes: int, dim: int) -> None:
    """Refuse a number of classes or dimensions that no frame has."""
    if not (hasattr(num_classes, "__index__") and hasattr(dim, "__index__")):
        raise UsageError(f"A frame has whole numbers of classes and dimensions, got {num_classes!r} and {dim!r}.")
    if num_classes < 2:
        raise UsageError(f"A frame needs at least 2 classes, got num_classes={num_classes}.")
    if dim < 1:
        raise UsageError(f"A frame needs at least 1 dimension, got dim={dim}.")


def _check_simplex(num_classes: int, dim: int) -> None:
    if dim < num_classes - 1:
        raise UsageError(
            f"A simplex ETF of {num_classes} classes needs features of width {num_classes - 1} or more, got {dim}: "
            f"use at most {dim + 1} classes, or frame='auto', which takes the best frame for any number."
        )


def generator(seed: int) -> torch.Generator:
    """A generator of its own for a frame, so that torch's global state is neither read nor changed."""
    if not hasattr(seed, "__index__") or not -(2**63) <= seed < 2**64:
        raise UsageError(f"A seed is a whole number of at most 64 bits, got {seed!r}.")
    return torch.Generator("cpu").manual_seed(seed)


def haar(dim: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns [d, M], uniform on the Stiefel manifold (Haar)."""
    # The device is named, so that building a model under `torch.device("meta")` still draws real numbers.
    u_DM = torch.empty(dim, columns, dtype=torch.float64, device="cpu")
    torch.nn.init.orthogonal_(u_DM, generator=generator(seed))
    return u_DM.T.contiguous().T  # column by column, as QR leaves it: a product with it is rounded by that order


def _from_basis(v_DM: Tensor) -> Tensor:
    """Simplex [K, d] in the span of M = K-1 orthonormal columns."""
    num_classes = v_DM.shape[1] + 1
    return _helmert_apply(v_DM.T) * (num_classes / (num_classes - 1)) ** 0.5


def _helmert_apply(v_MD: Tensor) -> Tensor:
    """H v, where the K x (K-1) Helmert basis H has columns (1, ..., 1, -j, 0, ...)/sqrt(j(j+1)); M = K-1.

    Row k of H v is a suffix sum less one term, so that a cumulative sum gives it in O(K d) instead of O(K^2 d).
    """
    j_M1 = torch.arange(1, v_MD.shape[0] + 1, dtype=v_MD.dtype, device=v_MD.device).unsqueeze(1)
    scaled_MD = v_MD / torch.sqrt(j_M1 * (j_M1 + 1))
    zero_1D = v_MD.new_zeros(1, v_MD.shape[1])
    suffix_KD = torch.cat([scaled_MD.flip(0).cumsum(0).flip(0), zero_1D])
    return suffix_KD - torch.cat([zero_1D, scaled_MD * j_M1])


def _helmert_transpose_apply(w_KD: Tensor) -> Tensor:
    """H' w, [K-1, d], likewise by a cumulative sum."""
    j_M1 = torch.arange(1, w_KD.shape[0], dtype=w_KD.dtype, device=w_KD.device).unsqueeze(1)
    return (w_KD.cumsum(0)[:-1] - j_M1 * w_KD[1:]) / torch.sqrt(j_M1 * (j_M1 + 1))


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
