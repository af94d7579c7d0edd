"""What a run minimises: a loss of labels or of a teacher's answers, and the entropy term."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from timm_etf.classifier import features_into, fixed_classifiers
from timm_etf.errors import UsageError
from timm_etf.losses import DotRegressionLoss, FeatureEntropyLoss, NONLLoss, NTCELoss, divergence, gram_loss
from timm_etf.pretrain.config import BATCH_LOSSES, PretrainConfig


class Objective:
    """Loss of a batch under a run's settings.

    Args:
        config: The run's settings.
        model: The model, for the scale of its classifier.
        teacher: A model whose answers are learned in place of labels.

    Raises:
        UsageError: If the loss does not go with the model's classifier.
    """

    def __init__(self, config: PretrainConfig, model: nn.Module, teacher: nn.Module | None = None) -> None:
        self.teacher = teacher
        self.gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """What makes a tensor [N * processes, ...] of a tensor [N, ...] of each process; set by the step."""
        # Mixed targets are smoothed already.
        smoothing = config.smoothing if config.loss == "cross_entropy" and not (config.mixup or config.cutmix) else 0.0
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if config.loss in BATCH_LOSSES:
            self.loss = {"ntce": NTCELoss, "nonl": NONLLoss}[config.loss]()
        if config.loss == "dot_regression":
            heads = [head for _, head in fixed_classifiers(model)]
            if not heads or not all(head.feature_norm and head.logit_scale is None for head in heads):
                raise UsageError(
                    "--loss dot_regression needs a fixed classifier of unit features: use an _etf model with "
                    "--model-kwargs feature_norm=True (and without learn_scale)."
                )
            self.loss = DotRegressionLoss(heads[0].scale)
        self.gram = config.loss == "gram"
        if self.gram and len(list(fixed_classifiers(model))) != 1:
            raise UsageError("--loss gram needs one fixed classifier: use an _etf model of one, without frame=learned.")
        self.feature_entropy = config.feature_entropy

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Loss of images [B, C, H, W] with class indices [B] or probabilities [B, K]: a scalar to differentiate.

        A loss that compares samples does so with those of all processes, or with those of `statistics`.
        """
        if not self.feature_entropy:
            return self._loss(model, images, targets, statistics)
        with features_into(model) as features:
            loss = self._loss(model, images, targets, statistics)
        return loss + self.feature_entropy * FeatureEntropyLoss()(features[-1])

    def _loss(self, model: nn.Module, images: Tensor, targets: Tensor, statistics: Tensor | None) -> Tensor:
        if self.gram:
            with features_into(model, projected=True) as features:
                logits = model(images)
            frame = next(head.weight for _, head in fixed_classifiers(model))
            return (self.loss(logits, targets) + gram_loss(features[-1], frame, targets)) / 2
        logits = model(images)
        if self.teacher:
            with torch.no_grad():
                taught = self.teacher(images)
            return divergence(logits, taught).mean()
        if not isinstance(self.loss, NTCELoss):
            return self.loss(logits, targets)
        return self.loss(logits, targets, self.shared([(logits, targets)]) if statistics is None else statistics)

    @property
    def compares_samples(self) -> bool:
        """Whether the loss of a sample depends on the other samples of its step."""
        return isinstance(self.loss, NTCELoss)

    @torch.no_grad()
    def shared(self, answers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """What batches, and those of the other processes, have to know of each other, to count as one.

        Args:
            answers: Logits [B, K] and class indices [B] of each batch.

        Returns:
            [2, K], see `NTCELoss.statistics`.
        """
        assert isinstance(self.loss, NTCELoss)
        own = self.loss.together(torch.stack([self.loss.statistics(*answer) for answer in answers]))
        return self.loss.together(self.gather(own[None]))
