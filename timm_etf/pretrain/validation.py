"""The validation line of a run: accuracies, loss and how collapsed the features are, over all processes."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from timm_etf.classifier import classifier_names, features_into
from timm_etf.errors import UsageError
from timm_etf.geometry import ClassMoments, collapse, merged
from timm_etf.loading.loader import Loader, Pixels
from timm_etf.losses import divergence
from timm_etf.means import old_and_new, share_statistics
from timm_etf.pretrain.sharding import in_step
from timm_etf.processes import exact_device


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    pixels: Pixels,
    teacher: nn.Module | None = None,
    *,
    geometry: bool = True,
    reserved: int = 0,
    old: int = 0,
) -> dict[str, Any]:
    """Score a model on the validation split.

    Each process scores its own share and only sums are exchanged, so the shares may differ in size and every image
    counts once.

    Args:
        accelerator: The process and those beside it.
        model: The prepared model; it is left in evaluation mode.
        loader: Batches of this process's share: uint8 images [B, C, H, W], class numbers [B].
        pixels: What makes images of them.
        teacher: A model whose answers take the place of the class numbers.
        geometry: Whether to measure how collapsed the features are.
        reserved: How many of the logits, the last, are of classes to come: they do not count.
        old: How many of the classes, the first, were there before; their accuracy and that of the others are told, too.

    Returns:
        `top1` and `top5` in percent, `loss` (mean cross-entropy, or divergence from a teacher, nats), `count` of
        images and, if asked for and on the main process, what `timm_etf.geometry.collapse` says of the features that
        enter the classifier, as far as it is a number.

    Raises:
        UsageError: If the split gave no image.
    """
    # The plain module: processes may have different numbers of batches, and DDP would wait for a partner.
    plain = accelerator.unwrap_model(model, keep_torch_compile=False).eval()
    share_statistics(plain)
    totals = [0.0] * 6
    collapsed = _Geometry(plain, accelerator.device) if geometry else None
    with features_into(plain) as features:
        for images, targets in in_step(plain, loader, accelerator, pixels.shape):
            images, targets = pixels(images), targets.to(accelerator.device)
            with accelerator.autocast():
                logits = plain(images)[: len(targets)].float()
                logits = logits[:, : logits.shape[1] - reserved]
                if teacher is not None:
                    taught = teacher(images)[: len(targets)].float()
                    targets = taught.argmax(dim=1)
            if collapsed:
                collapsed.add(features, targets)
            features.clear()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)
            if teacher is None:
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            else:
                loss = divergence(logits, taught).sum()
            is_old = targets < old
            sums = [hits[:, 0].sum(), hits.sum(), loss, hits[is_old, 0].sum(), is_old.sum()]
            totals = [t + s for t, s in zip(totals, [*torch.stack(sums).tolist(), len(targets)], strict=True)]
    top1, top5, loss_sum, *of_old, count = (sum(column) for column in zip(*gather_object([totals]), strict=True))
    if count == 0:
        raise UsageError("The validation split gave no image.")
    found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "count": int(count)}
    found |= old_and_new(top1, count, *of_old) if old else {}
    return found | (collapsed.compute(accelerator) if collapsed else {})


class _Geometry:
    """Collapse metrics of what enters a model's first classifier."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        head: Any = model.get_submodule(classifier_names(model)[0])
        self.dim = head.in_features if hasattr(head, "in_features") else head.in_channels
        weight = head.weight.flatten(1)
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        self.weight = weight if weight.shape[1] == self.dim else None
        self.moments = ClassMoments.empty(len(weight), self.dim, exact_device(device))

    def add(self, features: list[Tensor], labels: Tensor) -> None:
        """Add a batch, except of a classifier in front of the pooling: it receives maps, and no one feature."""
        x = features[-1][: len(labels)].flatten(1)
        if len(labels) and x.shape[1] == self.dim:
            self.moments.update(x, labels)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics over all processes, all of which have to call this; only the main one receives and computes them."""
        moments = self.moments
        if accelerator.num_processes > 1:
            parts = {name: _to_the_main_process(t, accelerator) for name, t in moments.tensors().items()}
            if not accelerator.is_main_process:
                return {}
            moments = merged(ClassMoments(*tensors) for tensors in zip(*parts.values(), strict=True))
        if not moments.count.any() or not moments.norm.isfinite():
            return {}
        weight = None if self.weight is None else self.weight.to(moments.mean.device)
        return {k: v for k, v in collapse(moments, weight).items() if math.isfinite(v)}


def _to_the_main_process(tensor: Tensor, accelerator: Accelerator) -> list[Tensor]:
    """One tensor of each process, on the main one; nothing on the others, which need not hold all of them."""
    count = accelerator.num_processes if accelerator.is_main_process else 0
    received = [torch.empty_like(tensor) for _ in range(count)]
    torch.distributed.gather(tensor.contiguous(), received or None)
    return received
