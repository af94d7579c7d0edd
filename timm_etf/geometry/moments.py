"""Class means and within-class scatter of features, in one pass and mergeable: what every metric here is made of.

Legend: N samples of a batch, D features, K classes, P of them in the batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from timm_etf.errors import UsageError


@dataclass
class ClassMoments:
    """Sums over samples, float64, in memory of O(D^2 + K D).

    They are taken about running means, so that nothing cancels where features lie far from the origin: one pass is as
    exact as two (Chan, Golub and LeVeque 1983), and any order and any division of the samples gives the same up to
    rounding.

    Attributes:
        count: Samples of each class, [K].
        mean: Class means, [K, D]; zeros for a class without samples.
        upper: Upper triangle of `scatter()`, [D, D]; what is below it has no meaning.
        spread: Sum of |d|^2 for each class, [K].
        norm: Sum of the features' norms, [].

    Example:
        >>> x, y = torch.tensor([[1.0, 0], [3, 0], [0, 5]]), torch.tensor([0, 0, 2])
        >>> found = ClassMoments.of(x, y, num_classes=3)
        >>> found.mean.tolist(), found.scatter().diag().tolist()
        ([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]], [2.0, 0.0])
    """

    count: Tensor
    mean: Tensor
    upper: Tensor
    spread: Tensor
    norm: Tensor

    @classmethod
    def empty(cls, num_classes: int, dim: int, device: torch.device | str | None = None) -> "ClassMoments":
        """Moments of no sample."""
        shapes = ((num_classes,), (num_classes, dim), (dim, dim), (num_classes,), ())
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @classmethod
    def of(cls, x: Any, y: Any, num_classes: int | None = None) -> "ClassMoments":
        """Moments of features [N, D] and class numbers [N], tensors or arrays of any precision."""
        x_ND, y_N = torch.as_tensor(x), torch.as_tensor(y)
        found = cls.empty(num_classes or int(y_N.max()) + 1, x_ND.shape[-1], x_ND.device)
        for at in range(0, len(y_N), _BLOCK):  # bounds the memory of the float64 copies
            found.update(x_ND[at : at + _BLOCK], y_N[at : at + _BLOCK])
        return found

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: Features, [N, D], of any floating-point type.
            y: Class numbers, [N], from 0 to K - 1.

        Raises:
            UsageError: If the shapes or class numbers do not fit; nothing is added then.
        """
        num_classes, dim = self.mean.shape
        if x.ndim != 2 or x.shape[1] != dim or y.shape != x.shape[:1]:
            raise UsageError(
                f"Features of shape [N, {dim}] and labels [N] belong here, not {list(x.shape)}, {list(y.shape)}."
            )
        if not len(y):
            return
        y_N = y.to(self.mean.device, torch.int64)
        low, high = int(y_N.min()), int(y_N.max())
        if low < 0 or high >= num_classes:
            raise UsageError(f"Class numbers from {low} to {high} do not fit {num_classes} classes.")
        x_ND = x.to(self.mean.device, torch.float64)
        # P classes occur in the batch; the others are not touched, since there may be thousands.
        present, place_N, new = y_N.unique(return_inverse=True, return_counts=True)
        old = self.count[present]
        # Deviations are from the mean so far, in a class without one from a sample: equal samples deviate by exactly 0.
        first_PD = x_ND.new_empty(len(present), dim)
        first_PD[place_N] = x_ND
        about_PD = torch.where(old[:, None] > 0, self.mean[present], first_PD)
        d_ND = x_ND - about_PD[place_N]
        step_PD = torch.zeros_like(about_PD).index_add_(0, place_N, d_ND) / new[:, None]
        old_share = old / (old + new)
        # The scatter of old and new samples together is that of the old plus sum (d - c step)(d - c step)' with
        # 2c - c^2 = n_new / n: so a merge is one product of N rows and a sum of squares.
        d_ND -= ((1 - old_share.sqrt())[:, None] * step_PD)[place_N]
        for at in range(0, dim, _WIDTH):  # the product is symmetric: half of it is enough
            self.upper[at : at + _WIDTH, at:].addmm_(d_ND[:, at : at + _WIDTH].T, d_ND[:, at:])
        self.spread.index_add_(0, y_N, d_ND.square().sum(1))
        self.mean[present] = about_PD + (1 - old_share)[:, None] * step_PD
        self.count[present] = old + new
        self.norm += torch.linalg.vector_norm(x_ND, dim=1).sum()

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Moments of both sets of samples together."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        step_KD = other.mean - self.mean
        weight = self.count * share
        rows_KD = weight.sqrt()[:, None] * step_KD
        return ClassMoments(
            total,
            self.mean + share[:, None] * step_KD,
            (self.upper + other.upper).addmm_(rows_KD.T, rows_KD),
            self.spread + other.spread + rows_KD.square().sum(1),
            self.norm + other.norm,
        )

    def scatter(self) -> Tensor:
        """Sum of d d' over samples, d the deviation from the class mean, [D, D]."""
        return self.upper.triu() + self.upper.triu(1).T

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_BLOCK, _WIDTH = 2048, 256


def merged(parts: Iterable[ClassMoments]) -> ClassMoments:
    """Moments of all parts together, such as those of several processes."""
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first
