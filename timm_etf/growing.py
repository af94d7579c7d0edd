"""More classes for a classifier that never changes: vertices that were reserved for them, or further ones."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from timm_etf import frames
from timm_etf.classifier import fixed_classifiers
from timm_etf.errors import UsageError
from timm_etf.heads import FixedClassifier

_logger = logging.getLogger(__name__)


def grow_classifier(model: nn.Module, names: Sequence[str], *, seed: int = 0) -> nn.Module:
    """Give further classes vectors of a fixed classifier; the vectors of the old ones stay, bit for bit.

    Classes take the vertices that were reserved for them, in order (`timm-etf pretrain --reserve`, or
    `FixedClassifier.taken`): nothing is computed, and as long as the backbone stays, every logit stays, too. Beyond
    these the frame is enlarged by `timm_etf.frames.enlarged`, and a warning says what that costs in coherence; the old
    classes' logits then stay to rounding, because a larger matrix product may add up in another order.

    Args:
        model: A model with one or more `FixedClassifier`; changed in place.
        names: Names of the new classes. They are put behind the old ones in `model.pretrained_cfg["label_names"]`,
            numbers where the model has none, and from there into exports.
        seed: Of the new vectors, where the frame is enlarged.

    Returns:
        The same model, whose first `taken` classes have names.

    Raises:
        UsageError: If the model has no fixed classifier, or a name is there already or a reserved one's. The model is
            then unchanged.

    Example:
        >>> import timm, timm_etf
        >>> model = timm.create_model("test_resnet_etf", num_classes=10)
        >>> model.fc.taken = 8
        >>> grow_classifier(model, ["lynx"]).fc.taken
        9
    """
    heads = list(fixed_classifiers(model))
    if not heads:
        raise UsageError(
            f"{type(model).__name__} has no fixed classifier to grow: fix it with timm_etf.fix_classifier."
        )
    first = heads[0][1]
    taken = first.out_features if first.taken is None else first.taken
    known = [*own_class_names(model), *map(str, range(taken))][:taken]
    names = names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"The names of the new classes are a list of texts, got {names!r}.")
    if name := next((name for name in names if not without_reserved([name])), None):
        raise UsageError(f"{name!r} is what a class that is still to come is called: give it a name of its own.")
    if twice := next((n for i, n in enumerate(names) if n in known or n in names[:i]), None):
        raise UsageError(f"The class {twice!r} is there already: leave it out.")
    further = taken + len(names) - first.out_features
    for name, head in heads:
        if further > 0:
            _enlarge(name, head, further, seed)
        head.taken = taken + len(names)
    model.num_classes = first.out_features  # type: ignore[assignment]
    label_names = with_reserved([*known, *names], first.out_features)
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "label_names": label_names}  # type: ignore[assignment]
    return model


def own_class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes in the order of its classifier's rows, without those that are reserved.

    Empty where the model names none, or as many as another classifier had that was there before.
    """
    names = list(map(str, getattr(model, "pretrained_cfg", {}).get("label_names") or ()))
    if len(names) != getattr(model, "num_classes", 0):
        return []
    taken = next((head.taken for _, head in fixed_classifiers(model)), None)
    return without_reserved(names) if taken is None else names[:taken]


def without_reserved(names: Sequence[str]) -> list[str]:
    """Without the names at the end that `with_reserved` has given.

    Example:
        >>> without_reserved(with_reserved(["lynx", "seal"], 4))
        ['lynx', 'seal']
    """
    there = list(names)
    while there and there[-1].startswith("reserved ") and there[-1].removeprefix("reserved ").isdecimal():
        there.pop()
    return there


def with_reserved(names: Sequence[str], num_classes: int) -> list[str]:
    """A name for every class, also for those that are to come."""
    return [*names, *(f"reserved {i + 1}" for i in range(num_classes - len(names)))]


@torch.no_grad()
def _enlarge(name: str, head: FixedClassifier, count: int, seed: int) -> None:
    old = head.weight.flatten(1)
    frame_KD = frames.enlarged(old, count, seed=seed)
    rows = (frame_KD[len(old) :] * old[0].double().norm().item()).to(head.weight)
    before, after = frames.coherence(old), frames.coherence(frame_KD)
    head.weight = torch.cat([head.weight, rows.reshape(count, *head.weight.shape[1:])])
    if head.bias is not None:
        head.bias = head.weight.new_zeros(len(head.weight))
    head.out_features = len(head.weight)
    if not (head.frame == "orthoplex" and after < 1e-4):
        head.frame, head.seed, head.origin, head.tree = "own", None, None, None
    _logger.warning(
        f"{name}: {count} more {'class' if count == 1 else 'classes'} than were reserved. The largest cosine of two "
        f"vectors goes from {before:.4f} to {after:.4f}; no frame has less than {frames.bound(*frame_KD.shape):.4f}."
    )
