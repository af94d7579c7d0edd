"""Class means of a model's features over all images and processes, and what they are worth as a classifier."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from timm_etf.classifier import classifier_names, features_into, fixed_classifiers
from timm_etf.processes import exact_device

Batches = Iterable[tuple[Tensor, Tensor]]
"""Of one process: normalised images [B, C, H, W] on the model's device, class numbers [B]."""


@torch.no_grad()
def class_means(
    model: nn.Module, batches: Batches, accelerator: Accelerator, *, projected: bool = False
) -> tuple[Tensor, Tensor]:
    """Number of images and mean feature of each class.

    Args:
        model: A timm model with K classes, as it is without what accelerate puts around it; put into evaluation mode.
        batches: Each process's own.
        accelerator: The processes; all of them have to call this.
        projected: Of what meets the classifier's rows (behind its projector, divided by its norm where it is so)
            instead of what the backbone gives.

    Returns:
        Counts [K] and means [K, d], float64, the same on each process; zeros for a class without an image.
    """
    head: Any = model.get_submodule(classifier_names(model)[0])
    num_classes, width = head.weight.shape[:2]
    if not projected:
        width = head.in_features if hasattr(head, "in_features") else head.in_channels
    device = exact_device(accelerator.device)
    count_K = torch.zeros(num_classes, dtype=torch.float64, device=device)
    total_KD = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
    for x_BD, y_B in features(model, batches, accelerator, projected=projected):
        if projected and getattr(head, "feature_norm", False):
            x_BD = nn.functional.normalize(x_BD, dim=1)
        total_KD.index_add_(0, y_B, x_BD)
        count_K += torch.bincount(y_B, minlength=num_classes)
    count: Any = accelerator.reduce(count_K, "sum")
    total: Any = accelerator.reduce(total_KD, "sum")
    return count, total / count.clamp(min=1)[:, None]


@torch.no_grad()
def features(
    model: nn.Module, batches: Batches, accelerator: Accelerator, *, projected: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, d], float64, and class numbers [B] of each batch; of maps and tokens the mean, as for `class_means`.

    Its logits are the mean of theirs.
    """
    device = exact_device(accelerator.device)
    is_conv = model.get_submodule(classifier_names(model)[0]).weight.dim() == 4  # type: ignore[operator]
    model.eval()
    share_statistics(model)
    with features_into(model, projected=projected) as found:
        for images, targets in batches:
            with accelerator.autocast():
                model(images)
            x = found[-1].to(device, torch.float64)
            found.clear()
            if x.dim() > 2:
                x = x.flatten(2).mean(2) if is_conv else x.flatten(1, -2).mean(1)
            yield x, targets.to(device)


@torch.no_grad()
def nearest_mean(
    model: nn.Module, train: Batches, test: Batches, accelerator: Accelerator, old: int
) -> dict[str, float]:
    """Accuracy of the nearest class mean of a model's features: what a classifier of more classes is to be better than.

    Args:
        model: As for `class_means`.
        train: Images to take the means of.
        test: Images to classify; one of a class without a mean is never right.
        accelerator: The processes; all of them have to call this.
        old: How many of the classes, the first, are old ones.

    Returns:
        What `old_and_new` returns.
    """
    count_K, mean_KD = class_means(model, train, accelerator)
    centre_D = count_K @ mean_KD / count_K.sum()
    rows_KD = mean_KD - centre_D
    half_K = torch.where(count_K > 0, rows_KD.square().sum(1) / 2, torch.inf)
    totals = torch.zeros(4, dtype=torch.float64, device=count_K.device)
    for x_BD, y_B in features(model, test, accelerator):
        right_B = (half_K - (x_BD - centre_D) @ rows_KD.T).argmin(1) == y_B
        totals += torch.stack([right_B.sum(), torch.tensor(len(y_B)), right_B[y_B < old].sum(), (y_B < old).sum()])
    summed: Any = accelerator.reduce(totals, "sum")
    return old_and_new(*summed.tolist())


def old_and_new(right: float, count: float, old_right: float, old_count: float) -> dict[str, float]:
    """Accuracies in percent of old classes and of new ones, `top1_old` and `top1_new`, and their `harmonic` mean.

    Args:
        right: Images that were classified correctly.
        count: Images.
        old_right: Those of old classes among the first.
        old_count: Those of old classes among the latter.

    Returns:
        What there is: without images of one kind the accuracy of the other.

    Example:
        >>> old_and_new(90, 200, 60, 100)
        {'top1_old': 60.0, 'top1_new': 30.0, 'harmonic': 40.0}
    """
    parts = {"top1_old": (old_right, old_count), "top1_new": (right - old_right, count - old_count)}
    found = {name: 100 * hits / images for name, (hits, images) in parts.items() if images}
    if len(found) == 2:
        old, new = found.values()
        found["harmonic"] = 2 * old * new / (old + new) if old + new else 0.0
    return found


def share_statistics(model: nn.Module) -> None:
    """Give each process the first one's batch statistics, which are what is exported: after a step they differ."""
    frames = {id(head.weight) for _, head in fixed_classifiers(model)}
    broadcast([buffer for buffer in model.buffers() if id(buffer) not in frames])
