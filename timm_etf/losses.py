"""Losses for fixed classifiers beside cross-entropy, for which torch's and timm's own are used.

Shape suffixes: B samples, K classes, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_etf.errors import UsageError

__all__ = ["DotRegressionLoss", "FeatureEntropyLoss"]


class DotRegressionLoss(nn.Module):
    r"""Dot regression: pull the features to their own class direction, without pushing them from the others.

    .. math:: L = \frac{1}{B} \sum_i \frac{(w_{y_i}^\top h_i - s)^2}{2 s}

    where s is the largest logit there is, sqrt(E_W E_H): for unit features (`feature_norm=True`) the logit scale. It
    needs a fixed classifier: a learned one would align all its rows.

    Args:
        scale: s > 0, the logit scale of the classifier.

    Shape:
        - logits: [B, K].
        - targets: class indices [B], or class probabilities [B, K] as mixup makes them: the loss is then their mean.
        - Output: scalar.

    Raises:
        UsageError: If `scale` is not positive.

    Source:
        Yang et al. 2022, Inducing neural collapse in imbalanced learning (arXiv 2203.09081), eq. 9; with mixup as in
        the authors' experiments.

    Example:
        >>> loss = DotRegressionLoss()
        >>> loss(torch.tensor([[1.0, 0.3], [0.0, 0.0]]), torch.tensor([0, 1])).item()
        0.25
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise UsageError(f"scale must be positive, got {scale}.")
        self.scale = scale

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch."""
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if targets.dim() == 1:
            return (logits.gather(1, targets.unsqueeze(1)) - self.scale).square().mean() / (2 * self.scale)
        return ((logits - self.scale).square() * targets).sum(1).mean() / (2 * self.scale)


class FeatureEntropyLoss(nn.Module):
    r"""Keeps features spread out: minus the (Kozachenko-Leonenko) entropy of a batch's directions.

    .. math:: L = -\frac{1}{B} \sum_i \log(\| z_i - z_{NN(i)} \|_2 + \epsilon), \qquad z_i = h_i / \|h_i\|

    with NN(i) the nearest other sample of the batch. Added to the classification loss with a small weight, on the
    backbone's features under a fixed projector or classifier, it works against their collapse.

    Args:
        eps: Added to the distances, so that equal features give a finite loss.

    Shape:
        - features: [B, D] with B >= 2, or [B, D, 1, 1].
        - Output: scalar.

    Raises:
        UsageError: On a batch of one sample, which has no neighbour.

    Source:
        Harun et al. 2025, Controlling neural collapse enhances out-of-distribution detection and transfer learning
        (arXiv 2502.10691), with weight 0.05 and eps 1e-8; Sablayrolles et al. 2019 (KoLeo, arXiv 1806.03198).

    Example:
        >>> square = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]])
        >>> round(FeatureEntropyLoss()(square).item(), 4)  # all neighbours at distance sqrt(2)
        -0.3466
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Loss of one batch of features."""
        features_BD = features.flatten(1)
        if len(features_BD) < 2:
            raise UsageError("The feature entropy needs two samples or more in a batch: raise the batch size.")
        z_BD = F.normalize(features_BD if features.dtype == torch.float64 else features_BD.float(), dim=1)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            neighbour_B = (z_BD @ z_BD.T).fill_diagonal_(-2).argmax(dim=1)
        # The norm's gradient at distance zero is taken as zero, not as not-a-number.
        distance_B = torch.linalg.vector_norm(z_BD - z_BD[neighbour_B], dim=1)
        return -torch.log(distance_B + self.eps).mean()
