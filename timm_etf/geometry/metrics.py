"""The metrics for training and validation loops: torchmetrics that any number of processes can share."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from timm_etf.errors import UsageError
from timm_etf.geometry.moments import ClassMoments, merged
from timm_etf.geometry.neural_collapse import collapse


class CollapseMetrics(Metric):
    """Collapse metrics of a stream of features, in one pass.

    The states are `ClassMoments`: float64 and about running means. They are merged rather than summed over processes,
    because plain sums of squares lose the digits in which collapsed features differ.

    Args:
        num_classes: K.
        dim: D, the features' width.
        weight: The classifier's weight, [K, D], for `nc3`.
        **kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> metric = CollapseMetrics(num_classes=2, dim=3)
        >>> metric.update(torch.eye(3)[[0, 0]], torch.tensor([0, 0]))
        >>> metric.update(torch.eye(3)[[1, 1]], torch.tensor([1, 1]))
        >>> metric.compute()["nc1"]
        0.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # moments of a batch and of the rest do not add up
    count: Tensor
    mean: Tensor
    upper: Tensor
    spread: Tensor
    norm: Tensor

    def __init__(self, num_classes: int, dim: int, weight: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in ClassMoments.empty(num_classes, dim).tensors().items():
            self.add_state(name, value, dist_reduce_fx=None)
        self.weight = None if weight is None else weight.detach().clone()

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features [N, D] of any floating-point type, class numbers [N]."""
        moments = self._moments()
        moments.update(features, labels)
        for name, value in moments.tensors().items():
            setattr(self, name, value)

    def compute(self) -> dict[str, float]:
        """What `collapse` returns, over the samples of all processes."""
        return collapse(self.moments(), self.weight)

    def moments(self) -> ClassMoments:
        """The samples' moments; inside `compute`, and under `sync_context`, those of all processes."""
        mine = self._moments()
        if mine.count.ndim == 1:
            return mine
        return merged(ClassMoments(*parts) for parts in zip(*mine.tensors().values(), strict=True))

    def _moments(self) -> ClassMoments:
        return ClassMoments(self.count, self.mean, self.upper, self.spread, self.norm)


class NearestMeanAgreement(Metric):
    """NC4: the share of samples to which two rules give one class, the second being the nearest class mean.

    The means are those of the training features (Papyan, Han and Donoho 2020), so they are known before the first
    sample. With labels in place of predictions it is the accuracy of the nearest class mean.

    Args:
        moments: Of the training features; a class without samples is nearest to nothing.
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        UsageError: If there are no training features.

    Example:
        >>> train = ClassMoments.of(torch.eye(2), torch.tensor([0, 1]))
        >>> metric = NearestMeanAgreement(train)
        >>> metric(torch.tensor([[2.0, 0], [0, 3], [1, 0]]), torch.tensor([0, 1, 1])).item()
        0.6666666666666666
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    agree: Tensor
    total: Tensor
    centre: Tensor
    means: Tensor
    half_squares: Tensor

    def __init__(self, moments: ClassMoments, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not moments.count.any():
            raise UsageError("There is no sample to take class means of.")
        share = moments.count / moments.count.sum()
        self.register_buffer("centre", share @ moments.mean, persistent=False)
        means = moments.mean - self.centre
        self.register_buffer("means", means, persistent=False)
        half = torch.where(moments.count > 0, means.square().sum(1) / 2, torch.inf)
        self.register_buffer("half_squares", half, persistent=False)
        self.add_state("agree", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, predictions: Tensor) -> None:
        """Add a batch: features [N, D], class numbers of the other rule [N]."""
        nearest = self.nearest(features)
        self.agree += (nearest == predictions.to(nearest.device)).sum()
        self.total += len(nearest)

    def nearest(self, features: Tensor) -> Tensor:
        """Class number of the nearest mean, [N]."""
        x = features.to(self.means) - self.centre
        return (self.half_squares - x @ self.means.T).argmin(1)

    def compute(self) -> Tensor:
        """The share, from 0 to 1."""
        return self.agree / self.total
