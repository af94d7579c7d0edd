"""Putting a fixed classifier into a timm model, and taking it out again."""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_etf import frames
from timm_etf.errors import UsageError
from timm_etf.heads import FixedClassifier, Head, LearnedClassifier, Projector, plain_layer, projected_width

__all__ = ["classifier_names", "fix_classifier", "fixed_classifiers", "free_classifier", "place", "placed"]

_logger = logging.getLogger(__name__)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of a timm model's classifiers, from its `pretrained_cfg["classifier"]`.

    Args:
        model: A model made by `timm.create_model`.

    Returns:
        One name, or several for models with several heads (distilled pairs, multi-branch models).

    Raises:
        UsageError: If the configuration names no classifier.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not names:
        raise UsageError(
            f"{type(model).__name__} names no classifier in its pretrained_cfg, so none can be fixed: create the model "
            "with timm.create_model and a classifier (not features_only)."
        )
    return (names,) if isinstance(names, str) else tuple(names)


def fix_classifier(
    model: nn.Module,
    frame: str | Tensor = "auto",
    seed: int = 0,
    *,
    logit_scale: float = 1.0,
    feature_norm: bool = False,
    learn_scale: bool = False,
    projector: Projector | None = None,
) -> nn.Module:
    """Replace a timm model's classifier by a frozen frame of the same shape, device and dtype.

    Several heads all receive the frame of this seed: heads of one width share it, so that averaging their logits (as
    distilled pairs do) keeps one set of class directions.

    Args:
        model: A model made by `timm.create_model` with `num_classes` >= 2; changed in place.
        frame: `"auto"`, a name in `timm_etf.frames.FRAMES`, or `"learned"` for the control: a trained classifier with
            the same scale, normalisation and projector (with none of these a plain layer stays as it is). Or a simplex
            ETF of your own, [K, d], such as `timm_etf.frames.nearest_simplex(class_means)`.
        seed: Seed of the frame's random rotation.
        logit_scale: Factor s > 0 of the logits, folded into the weight.
        feature_norm: Divide the features by their norm, so that the logits are s times cosines. This cannot be folded:
            plain timm then ranks the classes alike, with other confidences.
        learn_scale: Learn a further factor of the logits, from 1 on.
        projector: `"linear"` or `"mlp"`, between the features and the frame. It widens the features to K-1 (up to
            2,048), so that a simplex fits, and is left out of exports.

    Returns:
        The same model.

    Raises:
        UsageError: If the model has no classifier, or one that is neither `nn.Linear` nor a 1x1 `nn.Conv2d`, or if the
            frame cannot hold its classes, or an option is not one of those above. The model is then unchanged.

    Example:
        >>> import timm
        >>> model = fix_classifier(timm.create_model("test_resnet", num_classes=10), logit_scale=16.0)
        >>> model.fc
        FixedClassifier(in_features=96, out_features=10, bias=True, frame='simplex', seed=0, scale=16)
    """
    if not (isinstance(logit_scale, int | float) and 0 < logit_scale < math.inf):
        raise UsageError(f"logit_scale must be a positive number, got {logit_scale!r}.")
    if projector not in (None, "linear", "mlp"):
        raise UsageError(f"Unknown projector {projector!r}: use None, 'linear' or 'mlp'.")
    learned = isinstance(frame, str) and frame == "learned"
    if learned and learn_scale:
        raise UsageError("A learned classifier learns its scale by itself: leave out learn_scale.")
    replaced: dict[str, FixedClassifier | LearnedClassifier] = {}
    for name, head in _plain_heads(model):
        num_classes = head.weight.shape[0]
        dim = head.in_features if isinstance(head, Head) else head.weight.shape[1]
        width = projected_width(projector, dim, num_classes)
        shared: dict[str, Any] = {"feature_norm": feature_norm, "projector": projector, "in_features": dim}
        shape = (num_classes, width, *head.weight.shape[2:])
        if learned:
            if feature_norm or projector or logit_scale != 1 or isinstance(head, Head):
                weight = head.weight
                if weight.shape != shape:
                    weight = nn.init.trunc_normal_(weight.new_empty(shape), std=width**-0.5)
                replaced[name] = LearnedClassifier(weight, head.bias, scale=logit_scale, **shared)
            continue
        if isinstance(frame, Tensor):
            if frame.shape != shape[:2] or not frames.is_simplex(frame):
                raise UsageError(f"A frame of your own must be a simplex ETF of shape {list(shape[:2])}.")
            kind, w_KD = "simplex", torch.nn.functional.normalize(frame.double(), dim=1)
        else:
            kind = frames.resolve(frame, num_classes, width)
            # On the meta device shapes are all that is wanted: nothing is computed.
            w_KD = head.weight.new_empty(shape) if head.weight.is_meta else frames.make(kind, *shape[:2], seed=seed)
        weight = (w_KD * logit_scale).to(device=head.weight.device, dtype=head.weight.dtype).reshape(shape)
        replaced[name] = FixedClassifier(
            weight,
            bias=head.bias is not None,
            frame=kind,
            seed=None if isinstance(frame, Tensor) else seed,
            learn_scale=learn_scale,
            **shared,
        )
    return place(model, replaced)


def place(model: nn.Module, classifiers: Mapping[str, FixedClassifier | LearnedClassifier]) -> nn.Module:
    """Put classifiers into `model` by name; returns the model."""
    for name, new in classifiers.items():
        model.set_submodule(name, new)
        _logger.info(f"Classifier {name}: {type(new).__name__}({new.extra_repr()})")
    # Under DistributedDataParallel rank 0 would send the frame, 8 MB at 1,000 x 2,048, before every forward pass.
    model._ddp_params_and_buffers_to_ignore = _FrameBuffers(model)  # type: ignore[assignment]
    return model


class _FrameBuffers:
    """Names of a model's frames, for DistributedDataParallel to leave alone: every process has the same.

    They are looked up when a model is wrapped: under a classifier that `reset_classifier` or `free_classifier` has put
    there since, the same names are parameters, whose gradients must be exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[str]:
        for name, head in fixed_classifiers(self._model):
            yield from (f"{name}.{buffer}" for buffer, _ in head.named_buffers(recurse=False))


def free_classifier(model: nn.Module) -> nn.Module:
    """Turn every fixed classifier back into an ordinary trainable layer that starts from the frame.

    Args:
        model: A model with one or more `FixedClassifier`; changed in place. A model without any is left as it is.

    Returns:
        The same model, whose classifiers are `nn.Linear` or 1x1 `nn.Conv2d` with the same weights and logits (after
        feature normalisation: with logits in the same ratio).

    Raises:
        UsageError: If a classifier has a projector: without it the weight does not belong to the features. Use
            `model.reset_classifier(num_classes)` for a fresh one.

    Example:
        >>> import timm
        >>> model = fix_classifier(timm.create_model("test_resnet", num_classes=10))
        >>> free_classifier(model).fc.weight.requires_grad
        True
    """
    fixed = list(fixed_classifiers(model))
    if any(head.projector is not None for _, head in fixed):
        raise UsageError(
            "A classifier behind a projector cannot be freed: without the projector its weight does not belong to the "
            "features. Use model.reset_classifier(num_classes) for a fresh one."
        )
    for name, head in fixed:
        model.set_submodule(name, plain_layer(head))
    return model


def fixed_classifiers(model: nn.Module) -> Iterator[tuple[str, FixedClassifier]]:
    """Name and module of every fixed classifier in `model`, in the order of its modules."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FixedClassifier))


def placed(model: nn.Module) -> Iterator[tuple[str, FixedClassifier | LearnedClassifier]]:
    """Name and module of every classifier that this package put into `model`, fixed or learned."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FixedClassifier | LearnedClassifier))


def _plain_heads(model: nn.Module) -> list[tuple[str, Any]]:
    """The classifier layers of a timm model, checked to be of a kind that can be fixed, with Linear's attributes."""
    found: list[tuple[str, Any]] = []
    for name in classifier_names(model):
        try:
            head = model.get_submodule(name)
        except AttributeError:
            raise UsageError(
                f"{type(model).__name__} has no module {name!r} although its pretrained_cfg names it."
            ) from None
        if isinstance(head, nn.Identity):
            raise UsageError(f"{type(model).__name__} has no classifier to fix: create it with num_classes=N, N >= 2.")
        is_conv1x1 = isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1) and head.groups == 1
        if not (is_conv1x1 or isinstance(head, nn.Linear | Head)):
            raise UsageError(
                f"The classifier {name!r} of {type(model).__name__} is a {type(head).__name__}; only nn.Linear and 1x1 "
                "nn.Conv2d classifiers can be fixed."
            )
        found.append((name, head))
    return found
