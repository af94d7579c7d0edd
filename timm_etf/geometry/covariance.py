"""The classes' covariances: their average, and how they differ.

Legend: N samples, D features, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_etf.geometry.moments import ClassMoments

_BLOCK = 2048


def class_covariance(moments: ClassMoments) -> Tensor:
    """The average within-class covariance, C = sum_k (n_k / n) C_k, float64 [D, D].

    The heat map of arXiv 2402.18614, figure 3; the trace beside it, over D, is `collapse(moments)["within"]`.

    Example:
        >>> x, y = torch.tensor([[1.0, 0], [-1, 0], [5, 2], [5, -2]]), torch.tensor([0, 0, 1, 1])
        >>> class_covariance(ClassMoments.of(x, y)).tolist()
        [[0.5, 0.0], [0.0, 2.0]]
    """
    return moments.scatter() / moments.count.sum()


def spectrum(covariance: Tensor) -> Tensor:
    """Eigenvalues of a covariance, the largest first, none below 0."""
    return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)


def total_variance(moments: ClassMoments) -> float:
    """Mean squared distance of the samples from the mean of them all: what makes traces of two models comparable."""
    share = moments.count / moments.count.sum()
    between = (share @ (moments.mean - share @ moments.mean).square().sum(1)).item()
    return between + (moments.spread.sum() / moments.count.sum()).item()


def covariance_differences(x: Any, y: Any, num_classes: int) -> tuple[Tensor, Tensor]:
    """How the classes' covariances C_k differ: t and T of the random-feature theory (arXiv 2110.01899, section 2).

    The theory writes the classes' covariances as C_k / D; then t_k = tr(C_k - C) / sqrt(D) and T_kl = tr(C_k C_l) / D.
    Linear random features see neither. The diagonal of T is corrected for the samples that it takes twice, exactly so
    for Gaussian samples (Bai and Saranadasa 1996). Takes N^2 D operations and memory of a block of the Gram matrix.

    Args:
        x: Features, [N, D], best `scaled` to mean squared norm 1.
        y: Class numbers, [N].
        num_classes: K.

    Returns:
        t of shape [K] and T of shape [K, K], float64; `nan` for a class with too few samples (2, for the diagonal 3).
    """
    order = torch.as_tensor(y).argsort(stable=True)
    x_ND, y_N = torch.as_tensor(x)[order].double(), torch.as_tensor(y)[order]
    d = x_ND.shape[1]
    moments = ClassMoments.of(x_ND, y_N, num_classes)
    freedom = (moments.count - 1).where(moments.count > 1, torch.nan)
    trace_K = moments.spread / freedom
    z_ND = x_ND - moments.mean[y_N]
    present, counts = y_N.unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).numpy()
    squares_KK = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for at in range(0, len(y_N), _BLOCK):
        gram = (z_ND[at : at + _BLOCK] @ z_ND.T).square_()
        rows = torch.zeros(len(gram), num_classes, dtype=torch.float64)
        rows[:, present] = torch.from_numpy(np.add.reduceat(gram.numpy(), starts, axis=1))
        squares_KK.index_add_(0, y_N[at : at + _BLOCK], rows)
    t_KK = squares_KK / freedom[:, None] / freedom
    own = freedom.square() / ((freedom + 2) * (freedom - 1)) * (t_KK.diag() - trace_K.square() / freedom)
    t_KK.diagonal().copy_(own.where(freedom > 1, torch.nan))
    known = freedom.isfinite()
    mean_trace = (trace_K * moments.count)[known].sum() / moments.count[known].sum()
    return (trace_K - mean_trace) * np.sqrt(d), t_KK * d
