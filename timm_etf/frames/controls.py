"""Control frames: other matrices that have been used as fixed classifiers, to compare the optimal frames with."""

import math

import torch
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.frames.exact import check, generator, haar


def gaussian(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Independent random directions: rows of a Gaussian matrix scaled to norm 1. Any K and d.

    Args:
        num_classes: K, at least 2.
        dim: d, at least 1.
        seed: Seed of the draw.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d]; its largest cosine is near sqrt(4 ln(K) / d).

    Raises:
        UsageError: If K < 2 or d < 1.

    Example:
        >>> gaussian(1000, 192).norm(dim=1).sub(1).abs().max().item() < 1e-12
        True
    """
    check(num_classes, dim)
    w_KD = torch.randn(num_classes, dim, generator=generator(seed), dtype=torch.float64, device="cpu")
    return torch.nn.functional.normalize(w_KD, dim=1).to(dtype)


def orthonormal(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """K orthonormal rows, Haar random: all cosines 0. A simplex ETF without the centring.

    Args:
        num_classes: K, at least 2.
        dim: d, at least K.
        seed: Seed of the rotation.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d].

    Raises:
        UsageError: If K < 2 or K > d.

    Source:
        Hoffer, Hubara and Soudry 2018, Fix your classifier, section 2.
    """
    check(num_classes, dim)
    if num_classes > dim:
        raise UsageError(f"{dim} dimensions hold at most {dim} orthonormal vectors, not {num_classes}: use 'auto'.")
    return haar(dim, num_classes, seed).T.to(dtype).contiguous()


def hadamard(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of Sylvester's Hadamard matrix cut to d columns, entries +-1/sqrt(d).

    Args:
        num_classes: K, at least 2 and at most the first power of two that is d or more: beyond it rows repeat.
        dim: d, at least 2.
        seed: Not used: there is one such matrix.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d]; all cosines are 0 if d is a power of two.

    Raises:
        UsageError: If K < 2 or two rows would be the same.

    Source:
        Hoffer, Hubara and Soudry 2018, Fix your classifier, section 2.2.

    Example:
        >>> (hadamard(3, 4) * 2).int().tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]
    """
    import scipy.linalg

    check(num_classes, dim)
    most = 2 ** math.ceil(math.log2(dim))
    if num_classes > most:
        raise UsageError(
            f"A Hadamard matrix cut to {dim} columns has {most} different rows, not {num_classes}: use 'auto'."
        )
    signs_KD = torch.from_numpy(scipy.linalg.hadamard(most, "int8")[:num_classes, :dim])
    return signs_KD.double().div(math.sqrt(dim)).to(dtype).contiguous()


def cube(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vertices of a cube in ceil(log2 K) dimensions, rotated into R^d: as few dimensions as K signs need.

    Args:
        num_classes: K, at least 2.
        dim: d, at least ceil(log2 K).
        seed: Seed of the rotation.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d]; neighbouring vertices have cosine 1 - 2/ceil(log2 K).

    Raises:
        UsageError: If K < 2 or d < ceil(log2 K).

    Source:
        Pernici et al. 2021, Regular polytope networks (arXiv 2103.15632).
    """
    check(num_classes, dim)
    bits = max(1, math.ceil(math.log2(num_classes)))
    if dim < bits:
        raise UsageError(f"A cube with {num_classes} vertices needs {bits} dimensions or more, got {dim}.")
    rows_K1 = torch.arange(num_classes, device="cpu").unsqueeze(1)
    signs_KM = 1 - 2 * ((rows_K1 >> torch.arange(bits, device="cpu")) & 1)
    return (signs_KM.double() / math.sqrt(bits) @ haar(dim, bits, seed).T).to(dtype).contiguous()


def uniform_qr(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Simplex ETF whose rotation is the QR of a *uniform* [0, 1) matrix, as the public ETF heads draw it.

    .. math:: W = \sqrt{K / (K - 1)} \, (I_K - 1 1^\top / K) \, U^\top, \qquad U R = \mathrm{rand}(d, K)

    The Gram matrix is the simplex's, but the rotation is not Haar: all entries of the drawn matrix are positive, so the
    span holds the constant vector almost entirely, and with it the mean of the (positive) features.

    Args:
        num_classes: K, at least 2.
        dim: d, at least K.
        seed: Seed of the draw.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d].

    Raises:
        UsageError: If K < 2 or K > d.

    Source:
        The code of Yang et al. 2022 (arXiv 2203.09081) and of Yang et al. 2023 (arXiv 2302.03004); theirs is unseeded.
    """
    check(num_classes, dim)
    if num_classes > dim:
        raise UsageError(
            f"'uniform_qr' takes at most {dim} classes in {dim} dimensions, not {num_classes}: use 'auto'."
        )
    uniform_DK = torch.rand(dim, num_classes, generator=generator(seed), dtype=torch.float64, device="cpu")
    u_DK = torch.linalg.qr(uniform_DK).Q
    w_KD = (u_DK - u_DK.mean(dim=1, keepdim=True)).T * math.sqrt(num_classes / (num_classes - 1))
    return w_KD.to(dtype).contiguous()
