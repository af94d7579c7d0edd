"""Who finds whom: rankings of a gallery by cosine, in bounded memory, and the rotation between two spaces."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from timm_etf.errors import UsageError

__all__ = ["METRICS", "procrustes", "ranked"]

METRICS = ("recall@1", "recall@5", "mAP")

_SIMILARITIES = 1 << 23
"""Similarities held at once, and as many sorted ones."""


def ranked(gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor) -> dict[str, float]:
    r"""How well queries find the gallery's images of their class, by cosine.

    recall@k is the share of queries with an image of their class among the k nearest; mAP the mean over queries of

    .. math:: \mathrm{AP} = \frac1P \sum_{p} \frac{\#\{p' : s_{p'} \ge s_p\}}{\#\{i : s_i \ge s_p\}},

    p over the P images of the query's class, i over the gallery, s the similarities. Where images of other classes tie
    with one of the query's class they count as nearer (as in scikit-learn's `average_precision_score`), so that the
    order of the gallery does not matter and a space in which everything is alike finds nothing.

    Memory is that of the vectors and of one block of similarities, whatever their number. Both are ordered by class, so
    that a class's queries and its images are one slice each, whose places are looked up in the sorted block.

    Args:
        gallery: Vectors of any length but 0, [n, D].
        gallery_labels: Their class numbers, [n].
        queries: Vectors, [m, D].
        query_labels: Their class numbers, [m]. Queries without an image of their class are left out.

    Returns:
        `METRICS` in percent, and `queries`, the number of those that were ranked.

    Raises:
        UsageError: If no query has an image of its class in the gallery.

    Example:
        >>> gallery, queries = torch.tensor([[1.0, 0], [1, 1], [0, 1]]), torch.tensor([[3.0, 1], [1, 2]])
        >>> ranked(gallery, torch.tensor([0, 1, 0]), queries, torch.tensor([0, 0]))
        {'recall@1': 50.0, 'recall@5': 100.0, 'mAP': 70.83333333333333, 'queries': 2}
    """
    order = gallery_labels.argsort(stable=True)
    gallery_ND, sizes = gallery[order], gallery_labels.bincount(minlength=int(query_labels.max()) + 1)
    normalize(gallery_ND, out=gallery_ND)
    ends = sizes.cumsum(0).tolist()
    asking = query_labels.argsort(stable=True)
    asking = asking[sizes[query_labels[asking]] > 0]
    if not len(asking):
        raise UsageError("No query has an image of its class in the gallery: give both the same classes.")
    totals = torch.zeros(len(METRICS), dtype=torch.float64)
    for rows in asking.split(max(1, _SIMILARITIES // len(gallery_ND))):
        similarities_BN = normalize(queries[rows]) @ gallery_ND.T
        ordered_BN = _in_order(similarities_BN)
        classes, counts = query_labels[rows].unique_consecutive(return_counts=True)
        places = counts.cumsum(0).tolist()
        ranks = []
        for label, start, stop in zip(classes.tolist(), [0, *places], places, strict=False):
            own = slice(ends[label] - int(sizes[label]), ends[label])
            ranks.append(_ranks(similarities_BN[start:stop, own], ordered_BN[start:stop]))
        nearer, precisions = (torch.cat(of) for of in zip(*ranks, strict=True))
        found = [(nearer < 1).sum(), (nearer < 5).sum(), precisions.sum()]
        totals += torch.stack([f.double().cpu() for f in found])
    count = len(asking)
    return dict(zip(METRICS, (100 * totals / count).tolist(), strict=True)) | {"queries": count}


def _ranks(own_BP: Tensor, ordered_BN: Tensor) -> tuple[Tensor, Tensor]:
    """By query: images of other classes at least as near as the nearest of its own, [B]; average precision, [B].

    Args:
        own_BP: Similarities of the images of its class.
        ordered_BN: Similarities of all images, ascending.
    """
    own_BP = own_BP.sort(dim=1).values
    at_least_BP = ordered_BN.shape[1] - torch.searchsorted(ordered_BN, own_BP)  # of all images, how many are as near
    own_at_least_BP = own_BP.shape[1] - torch.searchsorted(own_BP, own_BP)
    precisions_BP = own_at_least_BP.double() / at_least_BP
    return at_least_BP[:, -1] - own_at_least_BP[:, -1], precisions_BP.mean(1)


def _in_order(values_BN: Tensor) -> Tensor:
    """Every row in ascending order."""
    if values_BN.device.type != "cpu":
        return values_BN.sort(dim=1).values
    return torch.from_numpy(np.sort(values_BN.numpy(), axis=1))  # torch's also gives places, and takes longer for it


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    r"""The rotation that takes vectors of one space nearest to their partners in another.

    .. math:: R = \mathrm{polar}(X^\top Y) = \arg\min_{R} \| X R - Y \|_F

    over all isometries between the directions that X and Y determine. With fewer pairs than dimensions the rest is not
    determined, and R drops it: turned at random it would only add noise.

    Args:
        source: Vectors X, [n, D].
        target: Their partners Y, [n, E].

    Returns:
        R, [D, E], for `vectors @ R`.

    Source:
        Schönemann 1966, Psychometrika 31, 1.

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> turn = torch.linalg.qr(torch.tensor([[1.0, 2, 0], [0, 1, 1], [1, 0, 3]]).double()).Q
        >>> torch.allclose(procrustes(x, x @ turn), turn)
        True
    """
    # Through n x n matrices, because few pairs are common, and a decomposition of D x E takes seconds at D = 2,048.
    (x_DM, within_MN), (y_EM, within_other_MN) = (torch.linalg.qr(v.double().T) for v in (source, target))
    left, singular, right = torch.linalg.svd(within_MN @ within_other_MN.T, full_matrices=False)
    rank = int((singular > singular[0] * 1e-7 * max(source.shape)).sum())
    return ((x_DM @ left[:, :rank]) @ (y_EM @ right[:rank].T).T).to(source.dtype)
