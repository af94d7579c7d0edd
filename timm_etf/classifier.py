"""`FixedClassifier`: a linear classifier that never trains, and the functions that put one into a timm model."""

import logging
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_etf import frames
from timm_etf.errors import UsageError

__all__ = ["FixedClassifier", "classifier_names", "fix_classifier", "fixed_classifiers", "free_classifier"]

_logger = logging.getLogger(__name__)


class FixedClassifier(nn.Module):
    """Linear classifier whose weight is a frame: K unit class directions that are never updated.

    It stands where a timm model had its `nn.Linear` (or 1x1 `nn.Conv2d`) and keeps that layer's state-dict keys:
    `weight` and, where the plain layer had one, a zero `bias`. Both are buffers, so there is nothing to optimise, decay
    or synchronise, and a checkpoint of this model loads in plain timm and gives the same logits.

    A state dict whose weight is not a frame of this kind is refused on load: a learned classifier would otherwise
    silently replace the frame.

    Args:
        weight: Frame of shape [K, d], or [K, d, 1, 1] for a convolutional classifier.
        bias: Whether the plain layer had a bias; then a zero `bias` of shape [K] is kept.
        frame: Name of the frame, for the record.
        seed: Seed that the frame was drawn with, for the record; None where it is not known.

    Shape:
        - Input: [*, d] for a matrix weight, [B, d, H, W] for a convolutional one.
        - Output: [*, K], or [B, K, H, W].

    Example:
        >>> head = FixedClassifier(frames.simplex(10, 64).float())
        >>> head(torch.zeros(2, 64)).shape, sum(p.numel() for p in head.parameters())
        (torch.Size([2, 10]), 0)
    """

    is_conv: Final[bool]
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, *, bias: bool = False, frame: str = "simplex", seed: int | None = None) -> None:
        super().__init__()
        if weight.dim() not in (2, 4) or tuple(weight.shape[2:]) not in ((), (1, 1)):
            raise UsageError(f"A fixed classifier takes weight [K, d] or [K, d, 1, 1], got {list(weight.shape)}.")
        self.out_features, self.in_features = weight.shape[0], weight.shape[1]
        self.is_conv = weight.dim() == 4
        self.frame = frame
        self.seed = seed
        # Contiguous, because safetensors refuses anything else.
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", weight.new_zeros(weight.shape[0]) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the features `x`: see the class for shapes."""
        if self.is_conv:
            return F.conv2d(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        kind = ", kernel_size=(1, 1)" if self.is_conv else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"frame={self.frame!r}, seed={self.seed}{kind}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        if weight is not None and weight.shape == self.weight.shape and not weight.is_meta:
            if not frames.is_simplex(weight.flatten(1)) or (bias is not None and bias.any()):
                error_msgs.append(
                    f"{prefix}weight is no {self.frame} frame, so it cannot be this model's fixed classifier. For the "
                    "backbone of an ordinary checkpoint: load it into the plain architecture, then call "
                    "timm_etf.fix_classifier(model)."
                )
                return
            if not torch.allclose(weight.float(), self.weight.to(weight.device).float(), atol=1e-3):
                self.seed = None  # the same kind of frame under another rotation: taken, but no longer this seed's
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


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


def fix_classifier(model: nn.Module, frame: str = "auto", seed: int = 0) -> nn.Module:
    """Replace a timm model's classifier by a frozen frame of the same shape, device and dtype.

    Several heads all receive the frame of this seed: heads of one width share it, so that averaging their logits (as
    distilled pairs do) keeps one set of class directions.

    Args:
        model: A model made by `timm.create_model` with `num_classes` >= 2; changed in place.
        frame: `"auto"`, or a name in `timm_etf.frames.FRAMES`.
        seed: Seed of the frame's random rotation.

    Returns:
        The same model.

    Raises:
        UsageError: If the model has no classifier, or one that is neither `nn.Linear` nor a 1x1 `nn.Conv2d`, or if the
            frame cannot hold its classes. The model is then unchanged.

    Example:
        >>> import timm
        >>> model = fix_classifier(timm.create_model("test_resnet", num_classes=10))
        >>> [name for name, p in model.named_parameters() if name.startswith("fc")]
        []
    """
    heads = {}
    for name, head in _heads(model):
        num_classes, dim = head.weight.shape[:2]
        chosen = frames.resolve(frame, num_classes, dim)
        w_KD = frames.make(chosen, num_classes, dim, seed=seed)
        weight = w_KD.to(device=head.weight.device, dtype=head.weight.dtype).reshape(head.weight.shape)
        heads[name] = FixedClassifier(weight, bias=head.bias is not None, frame=chosen, seed=seed)
    for name, fixed in heads.items():
        model.set_submodule(name, fixed)
        _logger.info(f"Fixed classifier {name}: {fixed.extra_repr()}")
    return model


def free_classifier(model: nn.Module) -> nn.Module:
    """Turn every fixed classifier back into an ordinary trainable layer that starts from the frame.

    Args:
        model: A model with one or more `FixedClassifier`; changed in place. A model without any is left as it is.

    Returns:
        The same model, whose classifiers are `nn.Linear` or 1x1 `nn.Conv2d` with the same weights and logits.

    Example:
        >>> import timm
        >>> model = fix_classifier(timm.create_model("test_resnet", num_classes=10))
        >>> free_classifier(model).fc.weight.requires_grad
        True
    """
    for name, fixed in list(fixed_classifiers(model)):
        layer = nn.Conv2d if fixed.is_conv else nn.Linear
        kwargs: dict[str, Any] = {"kernel_size": 1} if fixed.is_conv else {}
        free = layer(
            fixed.in_features,
            fixed.out_features,
            bias=fixed.bias is not None,
            device=fixed.weight.device,
            dtype=fixed.weight.dtype,
            **kwargs,
        )
        free.load_state_dict(fixed.state_dict())
        model.set_submodule(name, free)
    return model


def fixed_classifiers(model: nn.Module) -> Iterator[tuple[str, FixedClassifier]]:
    """Name and module of every fixed classifier in `model`, in the order of its modules."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FixedClassifier))


def _heads(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d | FixedClassifier]]:
    """The classifier layers of a timm model, checked to be of a kind that can be fixed."""
    heads: list[tuple[str, nn.Linear | nn.Conv2d | FixedClassifier]] = []
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
        if not (is_conv1x1 or isinstance(head, nn.Linear | FixedClassifier)):
            raise UsageError(
                f"The classifier {name!r} of {type(model).__name__} is a {type(head).__name__}; only nn.Linear and 1x1 "
                "nn.Conv2d classifiers can be fixed."
            )
        heads.append((name, head))  # type: ignore[arg-type]
    return heads
