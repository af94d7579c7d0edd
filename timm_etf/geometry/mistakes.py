"""How bad mistakes are, where classes have distances: of decisions, of rankings, and of features.

Shape suffixes: N samples, K classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from timm_etf.errors import UsageError

_BLOCK = 1024
"""Samples that are compared with all others at once."""


def expected_cost(logits: Tensor, distance: Tensor) -> Tensor:
    r"""What each decision costs in the mean over a model's probabilities, :math:`\sum_j D_{kj} p_j`.

    Its argmin is conditional risk minimisation (CRM), which makes a trained model's mistakes milder without training:
    what a classifier that knows the distances is to be compared with. Its negative ranks the classes as logits do, for
    the other measures here.

    Args:
        logits: [N, K], before the softmax.
        distance: D, [K, K]: the cost of deciding k where j is right, such as `timm_etf.frames.ClassTree.distance`.

    Returns:
        [N, K], float64.

    Raises:
        UsageError: If the shapes do not fit.

    Source:
        Deng et al. 2010 (the cost of a mistake); Karthik et al. 2021, No cost likelihood manipulation at test time.

    Example:
        >>> distance = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 3.0], [3.0, 3.0, 0.0]])
        >>> logits = torch.tensor([[0.30, 0.30, 0.40]]).log()  # two near classes, and one far from both
        >>> logits.argmax(1).item(), expected_cost(logits, distance).argmin(1).item()
        (2, 0)
    """
    _check(logits, None, distance)
    return logits.double().softmax(1) @ distance.to(logits.device, torch.float64).T


def severity(logits: Tensor, labels: Tensor, distance: Tensor) -> float:
    """Mean distance of the first choice from the right class, over the samples where they differ.

    Args:
        logits: [N, K], or anything else that ranks classes.
        labels: Right classes, [N].
        distance: [K, K].

    Returns:
        A mean of distances; `nan` where no sample is wrong. Fewer mistakes can be worse ones: read it beside accuracy.

    Raises:
        UsageError: If the shapes do not fit.

    Example:
        >>> distance = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
        >>> severity(torch.eye(3), torch.tensor([0, 0, 0]), distance)
        1.5
    """
    _check(logits, labels, distance)
    wrong = distance.to(logits.device, torch.float64)[logits.argmax(1), labels][logits.argmax(1) != labels]
    return wrong.mean().item()


def distance_at(logits: Tensor, labels: Tensor, distance: Tensor, k: int) -> float:
    """Hierarchical distance at k, HD@k: mean distance of the k first choices from the right class.

    Args:
        logits: [N, K], or anything else that ranks classes.
        labels: Right classes, [N].
        distance: [K, K].
        k: Number of choices, 1 to K.

    Returns:
        A mean of distances: at k = 1 `severity` times the share of mistakes.

    Raises:
        UsageError: If the shapes do not fit, or k is not in that range.

    Example:
        >>> distance = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
        >>> distance_at(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0]), distance, 2)
        0.5
    """
    _check(logits, labels, distance)
    if not 1 <= k <= len(distance):
        raise UsageError(f"The first k of {len(distance)} choices are 1 to {len(distance)}, not {k}.")
    return distance.to(logits.device, torch.float64)[logits.topk(k, dim=1).indices, labels[:, None]].mean().item()


def average_hierarchical_precision(features: Tensor, labels: Tensor, distance: Tensor, k: int = 250) -> float:
    r"""Mean average hierarchical precision, mAHP@k: how near the classes of each sample's nearest neighbours are.

    With the similarity of classes :math:`s = 1 - D / \max D`, neighbours r_1, r_2, ... of a sample of class c by
    cosine, and the best order :math:`\pi` of all other samples, it is the mean over samples and n = 1 ... k of

    .. math:: \mathrm{HP@}n = \sum_{i \le n} s(c, r_i) \Big/ \sum_{i \le n} s(c, \pi_i)

    Args:
        features: [N, d], of any scale.
        labels: Classes, [N].
        distance: [K, K].
        k: Neighbours that count, at most; N-1 where there are fewer. O(1024 N) memory.

    Returns:
        In [0, 1], 1 where no order is better. Samples to which no other has any similarity are left out.

    Raises:
        UsageError: If the shapes do not fit, or there are fewer than two samples.

    Source:
        Deng et al. 2011 (HP@k); Barz and Denzler 2019, Hierarchy-based image embeddings (mAHP). Their area is by
        trapezoids, and less by under 1/k.

    Example:
        >>> features, distance = torch.eye(4)[[0, 0, 1, 1]] + 0.1, 1 - torch.eye(2)
        >>> average_hierarchical_precision(features, torch.tensor([0, 0, 1, 1]), distance)
        1.0
    """
    similar_KK = 1 - distance.to(features.device, torch.float64) / distance.max()
    total = count = 0.0
    for near_BN, labels_B, start in _neighbours(features, labels, distance):
        s_BN = similar_KK[labels_B][:, labels]
        s_BN.diagonal(start).fill_(-1)  # itself comes last in any order
        most = min(k, len(features) - 1)
        found_Bk = s_BN.gather(1, near_BN.topk(most, dim=1).indices).cumsum(1)
        best_Bk = s_BN.topk(most, dim=1).values.cumsum(1)
        any_B = best_Bk[:, 0] > 0
        total += (found_Bk[any_B] / best_Bk[any_B]).mean(1).sum().item()
        count += int(any_B.sum())
    return total / count if count else float("nan")


def sibling_neighbours(features: Tensor, labels: Tensor, distance: Tensor, height: float = 1.0) -> float:
    """Share of samples whose nearest neighbour of another class is of the same group (subgroup 1-NN).

    Neighbours of the own class tell whether classes are told apart; these tell whether what is left is in order.

    Args:
        features: [N, d], of any scale; neighbours are by cosine.
        labels: Classes, [N].
        distance: [K, K].
        height: Largest distance of two classes of one group; 1 for siblings in a tree whose classes are all of one
            depth. (In another, two classes beside a group are as far apart as that is high.)

    Returns:
        In [0, 1], over the samples for which there is one of another class in their group; `nan` without any.

    Raises:
        UsageError: If the shapes do not fit, or there are fewer than two samples.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8]])
        >>> distance = torch.tensor([[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]])
        >>> sibling_neighbours(features, torch.arange(4), distance)
        1.0
    """
    d_KK = distance.to(features.device, torch.float64)
    right = count = 0.0
    for near_BN, labels_B, _ in _neighbours(features, labels, distance):
        other_BN = labels_B[:, None] != labels
        group_BN = other_BN & (d_KK[labels_B][:, labels] <= height)
        nearest_B = near_BN.masked_fill(~other_BN, -torch.inf).argmax(1)
        any_B = group_BN.any(1)
        right += int((group_BN.gather(1, nearest_B[:, None])[:, 0] & any_B).sum())
        count += int(any_B.sum())
    return right / count if count else float("nan")


def of_rankings(logits: Tensor, labels: Tensor, distance: Tensor) -> dict[str, float]:
    """How bad the mistakes of logits are, by name: as they rank the classes, and as the least expected cost does.

    Args:
        logits: [N, K], before the softmax.
        labels: Right classes, [N].
        distance: [K, K].

    Returns:
        `severity`, `hd1`, `hd5` and `hd20` (as far as there are so many classes); with `crm_` before them those of
        `expected_cost`, and `crm_top1`, its accuracy from 0 to 1.

    Raises:
        UsageError: If the shapes do not fit.

    Example:
        >>> distance = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 3.0], [3.0, 3.0, 0.0]])
        >>> of_rankings(torch.tensor([[0.30, 0.30, 0.40]]).log(), torch.tensor([0]), distance)
        {'severity': 3.0, 'hd1': 3.0, 'crm_severity': nan, 'crm_hd1': 0.0, 'crm_top1': 1.0}
    """
    found = {}
    costs = expected_cost(logits, distance)
    for prefix, ranks in (("", logits), ("crm_", -costs)):
        found[f"{prefix}severity"] = severity(ranks, labels, distance)
        for k in (1, 5, 20):
            if k <= len(distance):
                found[f"{prefix}hd{k}"] = distance_at(ranks, labels, distance, k)
    return found | {"crm_top1": (costs.argmin(1) == labels).double().mean().item()}


def of_neighbours(features: Tensor, labels: Tensor, distance: Tensor) -> dict[str, float]:
    """`mahp`, mAHP@250, and `siblings`, the share of `sibling_neighbours`, of features [N, d] of classes [N]."""
    mahp = average_hierarchical_precision(features, labels, distance)
    return {"mahp": mahp, "siblings": sibling_neighbours(features, labels, distance)}


def _neighbours(features: Tensor, labels: Tensor, distance: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cosines [B, N] of a block of samples with all, -inf with themselves, their labels [B], and the first's number."""
    _check(features, labels, distance, ranks=False)
    if len(features) < 2:
        raise UsageError("A neighbour takes two samples.")
    unit_ND = torch.nn.functional.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    for start in range(0, len(unit_ND), _BLOCK):
        near_BN = unit_ND[start : start + _BLOCK] @ unit_ND.T
        near_BN.diagonal(start).fill_(-torch.inf)
        yield near_BN, labels[start : start + _BLOCK], start


def _check(samples: Tensor, labels: Tensor | None, distance: Tensor, *, ranks: bool = True) -> None:
    num_classes = len(distance)
    if distance.shape != (num_classes, num_classes) or samples.dim() != 2:
        wrong = f"{list(samples.shape)} and {list(distance.shape)}"
        raise UsageError(f"Samples [N, K] or [N, d] and a distance [K, K] belong here, not {wrong}.")
    if ranks and samples.shape[1] != num_classes:
        raise UsageError(f"The logits are of {samples.shape[1]} classes and the distance of {num_classes}.")
    if labels is not None and (labels.shape != samples.shape[:1] or not ((labels >= 0) & (labels < num_classes)).all()):
        raise UsageError(f"Labels are [N], a class from 0 to {num_classes - 1} for each of {len(samples)} samples.")
