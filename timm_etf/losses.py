"""Losses for fixed classifiers beside cross-entropy, for which torch's and timm's own are used.

NormFace (Wang et al. 2017, arXiv 1704.06369) is the cross-entropy of logits that are cosines over a temperature.

Shape suffixes: B samples, K classes, D features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_etf.errors import UsageError

__all__ = ["DotRegressionLoss", "FeatureEntropyLoss", "NONLLoss", "NTCELoss", "divergence", "gram_loss"]


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


class NTCELoss(nn.Module):
    r"""Cross-entropy over the samples of a batch in place of the classes.

    .. math:: L = -\frac{1}{B} \sum_i \log \frac{e^{z_{i y_i}}}{\sum_j e^{z_{j y_i}}},
    \; z_{ik} = \cos(w_k, h_i) / \tau

    The softmax of each sample runs over the batch, for the row of its class: that sample has to be nearer to the row
    than the others are. Larger batches (512 and more) give it more to compare with. What a batch has to share for that
    is two numbers for each class (`statistics`), so that batches which are computed one after the other, or on several
    processes, can count as one; the gradient is exact, and no larger than the logits.

    Shape:
        - logits: [B, K], cosines divided by the temperature.
        - targets: class indices [B].
        - statistics: [2, K], of the batches that count as one; by default those of this one.
        - Output: scalar, the mean over this batch. Over several batches of equal size that count as one, the mean of
          their losses has the gradient of the whole.

    Source:
        Koromilas et al. 2026 (arXiv 2605.20302), there with trained rows.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
        >>> round(NTCELoss()(z, torch.tensor([0, 1])).item() - expected, 6)
        0.0
    """

    negatives_only = False

    def forward(self, logits: Tensor, targets: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Mean loss over the batch."""
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if statistics is None:
            statistics = self.statistics(logits, targets)
        loss: Tensor = _OverBatch.apply(logits, targets, statistics.to(logits.dtype), self.negatives_only)
        return loss

    @torch.no_grad()
    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """For each class the log of the sum of exp(z) over the samples it is compared with, and its number of samples.

        Args:
            logits: [B, K].
            targets: Class indices [B].

        Returns:
            [2, K]; the first is minus infinity for a class without a sample to compare with.
        """
        z_BK = logits.float() if logits.dtype != torch.float64 else logits
        count_K = torch.bincount(targets, minlength=z_BK.shape[1]).to(z_BK.dtype)
        if self.negatives_only:
            z_BK = z_BK.scatter(1, targets[:, None], -math.inf)
        return torch.stack([z_BK.logsumexp(0), count_K])

    @staticmethod
    def together(statistics: Tensor) -> Tensor:
        """The statistics [2, K] of several batches that count as one, from those of each, [N, 2, K]."""
        return torch.stack([statistics[:, 0].logsumexp(0), statistics[:, 1].sum(0)])


class NONLLoss(NTCELoss):
    r"""`NTCELoss` without the samples of the same class in the denominator.

    .. math:: L = -\frac{1}{B} \sum_i \log \frac{e^{z_{i y_i}}}{\sum_{j: y_j \ne y_i} e^{z_{j y_i}}}

    Shape:
        As for `NTCELoss`. A class that all samples are of is compared with none: its denominator is left out.

    Source:
        Koromilas et al. 2026 (arXiv 2605.20302), there with trained rows.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> NONLLoss()(z, torch.tensor([0, 1])).item()  # ((0 - 1) + (0 - 2)) / 2
        -1.5
    """

    negatives_only = True


class _OverBatch(torch.autograd.Function):
    r"""Value and gradient of the two losses above, from the statistics c and n of all samples that are compared.

    .. math:: \frac{\partial L}{\partial z_{jk}} = \frac{1}{B} \left( n_k e^{z_{jk} - c_k} - [y_j = k] \right)

    since L depends on the sample j through the denominators of all n_k samples of each class k.
    """

    @staticmethod
    def forward(ctx: Any, z_BK: Tensor, y_B: Tensor, statistics: Tensor, negatives_only: bool) -> Tensor:
        c_K, n_K = statistics
        y_B1 = y_B[:, None]
        own_B = z_BK.gather(1, y_B1)[:, 0]
        gradient_BK = (z_BK - c_K).exp_()
        if negatives_only:  # before the product: a class without others has the exponential of infinity here
            gradient_BK.scatter_(1, y_B1, 0.0)
        gradient_BK.mul_(n_K).scatter_add_(1, y_B1, own_B.new_full(y_B1.shape, -1.0)).div_(len(y_B))
        ctx.save_for_backward(gradient_BK)
        denominator_B = c_K[y_B]
        return (denominator_B.where(denominator_B > -math.inf, 0.0) - own_B).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None, None


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


def gram_loss(features: Tensor, frame: Tensor, targets: Tensor) -> Tensor:
    r"""Distance of a feature's cosines with all class vectors from those that its own class's vector has.

    .. math:: L = \frac{1}{B} \sum_i \sum_k \big( \cos(h_i, w_k) - S_{y_i k} \big)^2, \qquad S_{jk} = \cos(w_j, w_k)

    Where cosines follow a tree it says how near to every other class a sample belongs, and not only to which. With unit
    features u and vectors it is :math:`(u - w_y)^\top W^\top W (u - w_y)`: 0 where the feature lies along its vector
    in the frame's span, and an error between groups costs more than one within a group, as W'W has its largest
    eigenvalues there. For a simplex all errors cost alike.

    Args:
        features: What meets the vectors, h, [B, D] or [B, D, 1, 1], of any norm.
        frame: Class vectors, [K, D] or [K, D, 1, 1], of any norm.
        targets: Class indices [B], or class probabilities [B, K] as mixup makes them: the loss is then their mean.

    Returns:
        Scalar, not negative.

    Source:
        Liang and Davis 2023, Inducing neural collapse to a fixed hierarchy-aware frame (arXiv 2303.05689), where half
        of it is added to half of the cross-entropy.

    Example:
        >>> frame = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> gram_loss(torch.tensor([[0.0, 3.0], [9.0, 0.0]]), frame, torch.tensor([1, 0])).item()  # (1 + 1) and 0
        1.0
    """
    with torch.autocast(features.device.type, enabled=False):
        h_BD, w_KD = (x.flatten(1) if x.dtype == torch.float64 else x.flatten(1).float() for x in (features, frame))
        h_BD, w_KD = F.normalize(h_BD, dim=1), F.normalize(w_KD, dim=1)
        own_BD = w_KD[targets] if targets.dim() == 1 else targets.to(w_KD) @ w_KD
        loss_B = ((h_BD - own_BD) @ w_KD.T).square().sum(1)
        if targets.dim() > 1:  # the mean of the distances is that from the mean, and how far the classes lie from it
            square_K = ((w_KD @ (w_KD.T @ w_KD)) * w_KD).sum(1)
            loss_B = loss_B + targets.to(w_KD) @ square_K - (own_BD @ w_KD.T).square().sum(1)
        return loss_B.mean()


def divergence(logits: Tensor, taught: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of a model's probabilities from those of its teacher, in nats.

    .. math:: \sum_k p_k (\log p_k - \log q_k)

    Args:
        logits: Of the model that learns, q, [B, K].
        taught: Of the teacher, p, [B, K].

    Returns:
        [B], not negative.
    """
    log_q, log_p = logits.float().log_softmax(dim=1), taught.float().log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
