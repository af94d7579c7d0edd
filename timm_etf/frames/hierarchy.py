"""Frames whose cosines follow how alike classes are: the heights of a tree, or any positive definite similarity."""

import logging

import torch
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.frames.bounds import coherence
from timm_etf.frames.exact import check, generator, haar
from timm_etf.processes import is_first_process

_logger = logging.getLogger(__name__)


def hierarchy(
    distance: Tensor, dim: int, *, gamma: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""The frame whose cosines fall with the distance of classes, such as the height of their lowest common ancestor.

    It is `from_similarity` of :math:`E = \exp(-\gamma D / \max D)`, which is positive definite for every tree. At
    gamma -> infinity E is the identity, and the frame a simplex ETF, whatever the tree.

    Args:
        distance: D, [K, K], symmetric, 0 on the diagonal and positive elsewhere, such as `ClassTree.distance`.
        dim: d, the dimension of the vectors: K-1 or more for the cosines above, see `from_similarity` for fewer.
        gamma: How fast cosines fall, above 0: in a tree of three levels E is 0.37, 0.14 and 0.05 at 3.
        seed: Seed of the rotation.
        dtype: Type of the result; the computation is always in float64.

    Returns:
        Frame of shape [K, d], unit rows, contiguous, on the CPU.

    Raises:
        UsageError: If D is not such a matrix, or not that of a tree and E not positive definite.

    Source:
        Similarities that fall with the height of the lowest common ancestor: Liang and Davis 2023 (arXiv
        2303.05689), there with a search for the offset that has a closed form here.

    Example:
        >>> d = torch.tensor([[0.0, 1.0, 2.0, 2.0], [1.0, 0.0, 2.0, 2.0], [2.0, 2.0, 0.0, 1.0], [2.0, 2.0, 1.0, 0.0]])
        >>> w = hierarchy(d, 16, gamma=3.0)  # two pairs
        >>> [round(cosine, 2) for cosine in (w @ w.T)[0].tolist()]
        [1.0, -0.16, -0.42, -0.42]
        >>> from timm_etf.frames import is_simplex
        >>> is_simplex(w), is_simplex(hierarchy(d, 16, gamma=100.0))
        (False, True)
    """
    d_KK = _square(distance, "A distance")
    if not (isinstance(gamma, int | float) and 0 < gamma < float("inf")):
        raise UsageError(f"gamma must be a positive number, got {gamma!r}.")
    if d_KK.diagonal().any() or (d_KK + torch.eye(len(d_KK), dtype=torch.float64, device="cpu") <= 0).any():
        raise UsageError("A distance is 0 from a class to itself and positive to every other: two classes are one?")
    return from_similarity((-gamma * d_KK / d_KK.max()).exp(), dim, seed=seed, dtype=dtype)


def from_similarity(similarity: Tensor, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""The frame whose cosines are a similarity of classes, less the offset that all of them share.

    .. math:: W W^\top = S = (1 + \mu) E - \mu 1 1^\top, \qquad \mu = 1 / (1^\top E^{-1} 1 - 1)

    with E the similarity, scaled to a unit diagonal. No larger offset can be taken: S = (1 + mu) (E - 11' / 1'E^-1 1)
    is positive semidefinite with the null vector E^-1 1, so its rank is K-1, and any larger mu makes it indefinite. An
    offset costs a classifier nothing, because it changes all logits alike. Of the identity it leaves the simplex ETF.

    With E = L L' and u = L^-1 1 scaled to norm 1, S is (1 + mu) L (I - uu') L': so W is L times a basis of the vectors
    orthogonal to u, times sqrt(1 + mu).

    Where d < K-1 the d directions stay that hold most of S (its largest eigenvalues; of those that belong to equal
    ones, random combinations), the rows are scaled to norm 1 again, and a warning says what that cost. Where that makes
    two classes one, as siblings whose groups take up all directions, the others are laid over these by a random matrix
    that keeps S in the mean (Johnson and Lindenstrauss). What is random there follows the order of the classes.

    Args:
        similarity: E, [K, K], symmetric and positive definite: of class names' or attributes' vectors, or a confusion
            matrix that was made so.
        dim: d, the dimension of the vectors.
        seed: Seed of the rotation.
        dtype: Type of the result; the computation is always in float64.

    Returns:
        Frame of shape [K, d], unit rows, contiguous, on the CPU.

    Raises:
        UsageError: If E is not such a matrix.

    Example:
        >>> from timm_etf.frames import is_simplex
        >>> is_simplex(from_similarity(torch.eye(5), 8)), is_simplex(from_similarity(2 + torch.eye(5), 8))
        (True, True)
    """
    e_KK = _square(similarity, "A similarity")
    check(len(e_KK), dim)
    if not (e_KK.diagonal() > 0).all():
        raise UsageError("The similarity of a class with itself must be positive.")
    unit_K = e_KK.diagonal().rsqrt()
    l_KK, failed = torch.linalg.cholesky_ex(e_KK * unit_K * unit_K[:, None])
    # Beyond that condition the offset has no digit left.
    if failed or l_KK.diagonal().min() < 1e-7:
        least = torch.linalg.eigvalsh(e_KK)[0].item()
        raise UsageError(
            f"The similarity is not positive definite (smallest eigenvalue {least:.2g}): two classes are one, gamma is "
            f"too small, or add something above {max(1e-9, -least):.2g} to its diagonal."
        )
    ones_K1 = torch.ones(len(e_KK), 1, dtype=torch.float64, device="cpu")
    u_K = torch.linalg.solve_triangular(l_KK, ones_K1, upper=False)[:, 0]
    total = u_K.square().sum()  # 1'E^-1 1
    v_K = u_K / total.sqrt()
    # Householder's reflection takes u to an axis, and the other axes to the basis: L H without that axis' column.
    v_K[-1] += v_K[-1].sign() + (v_K[-1] == 0)
    reflected_KK = l_KK - (l_KK @ v_K).outer(v_K) * (2 / v_K.square().sum())
    w_KM = reflected_KK[:, :-1] * (total / (total - 1)).sqrt()
    if dim < w_KM.shape[1]:
        w_KM = _fewer(w_KM, dim)
    w_KM = torch.nn.functional.normalize(w_KM, dim=1)
    return (w_KM @ haar(dim, w_KM.shape[1], seed).T).to(dtype).contiguous()


def _square(matrix: Tensor, what: str) -> Tensor:
    """A finite symmetric matrix of two classes or more, in float64 on the CPU."""
    matrix = matrix if isinstance(matrix, Tensor) else torch.as_tensor(matrix, device="cpu")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise UsageError(f"{what} of classes has the shape [K, K] with K >= 2, got {list(matrix.shape)}.")
    m_KK = matrix.detach().double().cpu()
    if not m_KK.isfinite().all() or (m_KK - m_KK.T).abs().max() > 1e-6 * m_KK.abs().max():
        raise UsageError(f"{what} of classes must be finite and symmetric: take the mean of it and its transpose.")
    return (m_KK + m_KK.T) / 2


def _fewer(w_KM: Tensor, dim: int) -> Tensor:
    """The rows in d dimensions, [K, d]: what is in the directions that hold most of them, and no two alike."""
    values, vectors_MM = torch.linalg.eigh(w_KM.T @ w_KM)
    least, size = values[-dim], values[-1]
    above = int((values > least + 1e-9 * size).sum())
    equal = int(((values - least).abs() <= 1e-9 * size).sum())
    tied_Mn = _basis(vectors_MM[:, len(values) - above - equal : len(values) - above], dim - above)
    basis_Md = _basis(torch.cat([tied_Mn, vectors_MM[:, len(values) - above :]], dim=1), dim)
    part_Kd = w_KM @ basis_Md
    kept = part_Kd.square().sum().item() / len(w_KM)
    told = ""
    if part_Kd.norm(dim=1).min() < 1e-6 or coherence(torch.nn.functional.normalize(part_Kd, dim=1)) > 1 - 1e-3:
        left_KM = w_KM - part_Kd @ basis_Md.T
        part_Kd = part_Kd + left_KM @ _normal(w_KM.shape[1], dim, 1) / dim**0.5
        told = " in its directions, the rest is laid over them at random because classes would be one without it"
    unit_Kd = torch.nn.functional.normalize(part_Kd, dim=1)
    if is_first_process():
        change = (unit_Kd @ unit_Kd.T - w_KM @ w_KM.T).abs().max().item()
        _logger.warning(
            f"{len(w_KM)} classes in {dim} dimensions: the frame keeps {100 * kept:.0f} % of the similarity{told}, "
            f"which would take {w_KM.shape[1]}, and a cosine changes by up to {change:.2f}."
        )
    return unit_Kd


def _basis(vectors_MN: Tensor, columns: int) -> Tensor:
    """Orthonormal columns [M, n] in a space, the same ones for whichever orthonormal basis of it is given.

    Which basis of a space with equal eigenvalues a routine finds depends on rounding, and so on the machine.
    """
    q_Mn, r_nn = torch.linalg.qr(vectors_MN @ (vectors_MN.T @ _normal(len(vectors_MN), columns, 0)))
    return q_Mn * r_nn.diagonal().sign()


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, device="cpu", generator=generator(seed))
