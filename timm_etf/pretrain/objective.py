"""What a run minimises: cross-entropy or dot regression, with timm's smoothing and mixup, and the entropy term."""

from typing import Any

from timm.data import Mixup
from torch import Tensor, nn

from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.errors import UsageError
from timm_etf.losses import DotRegressionLoss, FeatureEntropyLoss
from timm_etf.pretrain.config import PretrainConfig


class Objective:
    """Loss of a batch under a run's settings.

    Args:
        config: The run's settings.
        model: The model before it is wrapped for several processes.
        num_classes: K.

    Raises:
        UsageError: If the loss does not go with the model's classifier.
    """

    def __init__(self, config: PretrainConfig, model: nn.Module, num_classes: int) -> None:
        self.mixup = None
        smoothing = config.smoothing if config.loss == "cross_entropy" else 0.0
        if config.mixup or config.cutmix:
            # Its targets are probabilities, with the smoothing already in them.
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes)
            smoothing = 0.0
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if config.loss == "dot_regression":
            heads = [head for _, head in fixed_classifiers(model)]
            if not heads or not all(head.feature_norm and head.logit_scale is None for head in heads):
                raise UsageError(
                    "--loss dot_regression needs a fixed classifier of unit features: use an _etf model with "
                    "--model-kwargs feature_norm=True (and without learn_scale)."
                )
            self.loss = DotRegressionLoss(heads[0].scale)
        self.feature_entropy = config.feature_entropy
        self.features: Tensor | None = None
        if self.feature_entropy:
            # What enters the classifier: the backbone's features, before projector and normalisation.
            model.get_submodule(classifier_names(model)[0]).register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self.features = inputs[0]

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Loss of images [B, C, H, W] with class indices [B]: a scalar to differentiate."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        loss: Tensor = self.loss(model(images), targets)
        if self.features is not None:
            loss = loss + self.feature_entropy * FeatureEntropyLoss()(self.features)
            self.features = None
        return loss
