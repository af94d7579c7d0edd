"""The validation line of a run: accuracies, loss and how collapsed the features are, over all processes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from timm_etf.classifier import classifier_names
from timm_etf.errors import UsageError


@torch.inference_mode()
def validate(accelerator: Accelerator, model: nn.Module, loader: Any) -> dict[str, Any]:
    """Score a model on the validation split.

    Each process scores its own share and only sums are exchanged, so the shares may differ in size and every image
    counts once.

    Returns:
        `top1` and `top5` in percent, `loss` (mean cross-entropy, nats), `count` of images, and what
        `timm_etf.geometry.collapse` says of the features that enter the classifier, as far as it is a number.

    Raises:
        UsageError: If the split gave no image.
    """
    # The plain module: processes may have different numbers of batches, and DDP would wait for a partner.
    plain = accelerator.unwrap_model(model).eval()
    # Batch statistics of the last step differ from process to process; those of the first are what is exported.
    broadcast(list(plain.buffers()))
    totals = [0.0, 0.0, 0.0, 0]
    with _geometry(plain, accelerator.device) as geometry:
        for images, targets in loader:
            images, targets = images.to(accelerator.device), targets.to(accelerator.device)
            with accelerator.autocast():
                logits = plain(images).float()
            geometry.add(targets)
            hits = logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            sums = torch.stack([hits[:, 0].sum(), hits.sum(), loss]).tolist()
            totals = [t + s for t, s in zip(totals, [*sums, len(targets)], strict=True)]
    top1, top5, loss_sum, count = (sum(column) for column in zip(*gather_object([totals]), strict=True))
    if count == 0:
        raise UsageError("The validation split gave no image.")
    found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "count": int(count)}
    return found | geometry.compute()


class _Geometry:
    """Collapse metrics of what enters a model's first classifier."""

    def __init__(self, head: Any, device: torch.device) -> None:
        from timm_etf.geometry.metrics import CollapseMetrics  # two seconds, which wrong input need not wait for

        self.dim = head.in_features if hasattr(head, "in_features") else head.in_channels
        weight = head.weight.flatten(1)
        metric = CollapseMetrics(len(weight), self.dim, weight if weight.shape[1] == self.dim else None)
        self.metric = metric.to("cpu" if device.type == "mps" else device)  # which has no float64
        self.features: Tensor | None = None

    def keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features = inputs[0].flatten(1)

    def add(self, labels: Tensor) -> None:
        # A classifier in front of the pooling receives maps, of which there is no one feature.
        if self.features is not None and self.features.shape[1] == self.dim:
            self.metric.update(self.features, labels)
        self.features = None

    def compute(self) -> dict[str, float]:
        with self.metric.sync_context():
            moments = self.metric.moments()
        if not moments.count.any() or not moments.norm.isfinite():
            return {}
        from timm_etf.geometry import collapse

        return {k: v for k, v in collapse(moments, self.metric.weight).items() if math.isfinite(v)}


@contextmanager
def _geometry(model: nn.Module, device: torch.device) -> Iterator[_Geometry]:
    head = model.get_submodule(classifier_names(model)[0])
    geometry = _Geometry(head, device)
    handle = head.register_forward_pre_hook(geometry.keep)
    try:
        yield geometry
    finally:
        handle.remove()
