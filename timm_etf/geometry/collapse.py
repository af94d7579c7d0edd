"""How collapsed features are: within-class against between-class scatter.

Legend: N samples, D features, K classes that occur.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def collapse(x: NDArray[Any], y: NDArray[np.int64]) -> dict[str, float]:
    """Collapse metrics of labelled features, in float64.

    With class means m_k, within-class covariance S_W and between-class covariance S_B (weighted by class size):

    - `nc1` = tr(S_W pinv(S_B)) / K (Papyan et al. 2020); 0 when every class is a point.
    - `cdnv` = mean over pairs of (v_i + v_j) / (2 |m_i - m_j|^2), v the mean squared distance to the class mean
      (Galanti et al. 2022, arXiv 2112.15121).
    - `vci` = 1 - tr(pinv(S_W + S_B) S_B) / rank(S_B) (Xu et al. 2023, arXiv 2306.03440); 0 when collapsed.
    - `within` = tr(S_W) / D.

    Args:
        x: Features, [N, D].
        y: Class numbers, [N].

    Returns:
        The metrics by name; `nan` where one class makes a ratio meaningless.

    Example:
        >>> x, y = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]]), np.array([0, 0, 1, 1])
        >>> {k: round(v, 6) for k, v in collapse(x, y).items()}
        {'nc1': 0.0, 'cdnv': 0.0, 'vci': 0.0, 'within': 0.0}
    """
    x = np.asarray(x, dtype=np.float64)
    _, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    n, d, k = len(x), x.shape[1], len(counts)
    by_class = np.argsort(y, kind="stable")
    size = np.sqrt(np.square(x).sum() / max(n, 1))
    x = x - x.mean(0)  # nothing below depends on the origin, and rounding errors grow with the distance from it
    m_KD = np.add.reduceat(x[by_class], np.cumsum(counts) - counts) / counts[:, None]
    inside = x - m_KD[y]
    v_K = np.bincount(y, weights=np.square(inside).sum(1)) / counts
    within = float(counts @ v_K) / n / d
    if k < 2:
        return {"nc1": float("nan"), "cdnv": float("nan"), "vci": float("nan"), "within": within}
    # S_B = A'A with A of K rows, so its axes come from a K x D matrix and no D x D matrix is inverted for nc1.
    a_KD = m_KD * np.sqrt(counts / n)[:, None]
    _, s, axes = np.linalg.svd(a_KD, full_matrices=False)
    # K centred means span K - 1 directions, and they are exact to the features' size times eps, not to their own.
    rank = min(int((s > max(n, d) * np.finfo(float).eps * size).sum()), k - 1)
    if rank == 0:
        return {"nc1": float("inf"), "cdnv": float("inf"), "vci": float("nan"), "within": within}
    s, axes = s[:rank], axes[:rank]
    nc1 = float((np.square(inside @ axes.T).sum(0) / n / s**2).sum() / k)
    total, vectors = np.linalg.eigh((inside.T @ inside) / n + a_KD.T @ a_KD)
    keep = total > total[-1] * max(n, d) * np.finfo(float).eps
    between = np.square(a_KD @ vectors[:, keep]).sum(0) / total[keep]
    gram = m_KD @ m_KD.T
    distance = np.diag(gram)[:, None] + np.diag(gram) - 2 * gram
    pairs = np.triu_indices(k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cdnv = float(np.mean(((v_K[:, None] + v_K) / 2)[pairs] / np.maximum(distance[pairs], 0)))
    return {"nc1": nc1, "cdnv": cdnv, "vci": float(max(0.0, 1 - between.sum() / rank)), "within": within}
