"""The classifier modules: `FixedClassifier`, whose weight is a frame, and its trained control `LearnedClassifier`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from timm_etf import frames
from timm_etf.errors import UsageError

__all__ = ["FixedClassifier", "LearnedClassifier", "Projector", "mismatch", "plain_layer", "projected_width"]

Projector = Literal["linear", "mlp"]

_PROJECTED = 2048
"""Width of a projector's hidden layer, and the most it widens its output so that a simplex fits."""


class Head(nn.Module):
    """What the two classifiers share: projector, feature normalisation and the product with the weight.

    The projector's parameters are the only ones beside the plain layer's own `weight` and `bias`; it lies inside the
    classifier, so that `forward_head(pre_logits=True)` of the model still gives the backbone's features.
    """

    is_conv: Final[bool]
    feature_norm: Final[bool]
    weight: Tensor
    if TYPE_CHECKING:  # TorchScript would keep what is annotated as optional out of its state dict
        bias: Tensor | None
    __jit_unused_properties__ = ("scale",)

    def __init__(self, weight: Tensor, in_features: int, feature_norm: bool, projector: Projector | None) -> None:
        super().__init__()
        if weight.dim() not in (2, 4) or tuple(weight.shape[2:]) not in ((), (1, 1)):
            raise UsageError(f"A classifier takes weight [K, d] or [K, d, 1, 1], got {list(weight.shape)}.")
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.is_conv = weight.dim() == 4
        self.feature_norm = feature_norm
        self.projector_kind = projector
        self.projector = None if projector is None else _projector(projector, in_features, weight)

    def prepared(self, x: Tensor) -> Tensor:
        """What meets the weight: the features behind the projector, divided by their norm where that is asked."""
        if self.projector is not None:
            x = self.projector(x)
        # The smallest norm is one that float16 can hold, so that a feature of zeros gives zeros there too.
        return F.normalize(x, dim=1 if self.is_conv else -1, eps=1e-6) if self.feature_norm else x

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias) if self.is_conv else F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{', kernel_size=(1, 1)' if self.is_conv else ''}{', feature_norm=True' if self.feature_norm else ''}"
        )


class FixedClassifier(Head):
    r"""Linear classifier whose weight is a frame: K class directions that are never updated.

    .. math:: \mathrm{logits}(x) = s W f(x), \qquad f(x) = \mathrm{projector}(x), \text{ or that divided by its norm}

    It stands where a timm model had its `nn.Linear` (or 1x1 `nn.Conv2d`) and keeps that layer's state-dict keys:
    `weight`, which is s W, and, where the plain layer had one, a zero `bias`. Both are buffers, so there is nothing to
    optimise, decay or synchronise, and without projector, normalisation and learned scale a state dict of it loads in
    plain timm and gives the same logits.

    A state dict whose weight is not a frame of this kind, or whose bias is not zero, is refused on load: a learned
    classifier would otherwise silently replace the frame.

    On the meta device there is no frame yet: `to_empty` (by way of `reset_parameters`) draws it from its seed, and so
    does `load_state_dict`, to compare.

    Args:
        weight: Frame times logit scale, of shape [K, d], or [K, d, 1, 1] for a convolutional classifier.
        bias: Whether the plain layer had a bias; then a zero `bias` of shape [K] is kept.
        frame: Name of the frame, for the record.
        seed: Seed that the frame was drawn with, for the record; None where it is not known.
        scale: Logit scale that the weight holds, for `reset_parameters`; by default the norm of its first row.
        feature_norm: Divide the features by their norm, so that the logits are s times cosines.
        learn_scale: Multiply the weight by a learned factor as well, the parameter `logit_scale`, which starts at 1.
            Its gradient costs as much as that of a trained weight.
        projector: `"linear"` or `"mlp"` (Linear 2048, BatchNorm, GELU, Linear): trained with the backbone and
            discarded at export.
        in_features: Width of the features; needed with a projector alone, whose output has the weight's width.
        origin: Of a frame fitted to a classifier that was there: `from`, `mean_cosine` with its rows, and their
            `rows_sha256`; for the record.
        tree: Of a frame that follows one.
        taken: How many of the classes, the first, there are: the vectors of the others are reserved for classes to come
            (`timm_etf.grow_classifier`). None: all.

    Shape:
        - Input: [*, d] for a matrix weight ([B, d] with an MLP projector), [B, d, H, W] for a convolutional one.
        - Output: [*, K], or [B, K, H, W].

    Example:
        >>> head = FixedClassifier(frames.simplex(10, 64).float())
        >>> head(torch.zeros(2, 64)).shape, sum(p.numel() for p in head.parameters())
        (torch.Size([2, 10]), 0)
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bias: bool = False,
        frame: str = "simplex",
        seed: int | None = None,
        scale: float | None = None,
        feature_norm: bool = False,
        learn_scale: bool = False,
        projector: Projector | None = None,
        in_features: int | None = None,
        origin: dict[str, Any] | None = None,
        tree: frames.ClassTree | None = None,
        taken: int | None = None,
    ) -> None:
        super().__init__(weight, in_features or weight.shape[1], feature_norm, projector)
        self.frame = frame
        self.seed, self.origin, self.tree, self.taken = seed, origin, tree, taken
        if scale is None:
            scale = 1.0 if weight.is_meta else weight[0].double().norm().item()
        self._made_scale = scale
        # Contiguous, because safetensors refuses anything else.
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", weight.new_zeros(weight.shape[0]) if bias else None)
        self.logit_scale = nn.Parameter(weight.new_ones(())) if learn_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the features `x`: see the class for shapes."""
        # The learned factor goes into the weight and not into the features, so that an export, whose weight holds it,
        # gives the same logits to the last bit.
        weight = self.weight if self.logit_scale is None else self.weight * self.logit_scale
        return self._product(self.prepared(x), weight)

    @property
    def scale(self) -> float:
        """Logit scale s: the norm of the rows of `plain_weight()`, to six digits."""
        if self.weight.is_meta:
            return self._made_scale
        return float(f"{self.plain_weight().flatten(1).double().norm(dim=1).mean().item():.6g}")

    @torch.no_grad()
    def plain_weight(self) -> Tensor:
        """The weight with which a plain layer gives these logits (with feature normalisation: logits in this ratio)."""
        return self.weight if self.logit_scale is None else self.weight * self.logit_scale

    @torch.no_grad()
    def again(
        self, *, logit_scale: float | None = None, feature_norm: bool | None = None, learn_scale: bool = False
    ) -> "FixedClassifier":
        """The same frame, without its projector, under another scale or normalisation: options as `fix_classifier`'s.

        Without another scale the weight stays bit for bit, its learned factor folded in.
        """
        weight = self.plain_weight().detach().clone()
        if logit_scale is not None:
            weight *= logit_scale / weight[0].double().norm().item()
        about = {name: getattr(self, name) for name in ("frame", "seed", "origin", "tree", "taken")}
        norm = self.feature_norm if feature_norm is None else feature_norm
        has_bias = self.bias is not None
        return FixedClassifier(weight, bias=has_bias, feature_norm=norm, learn_scale=learn_scale, **about)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the frame again, from the seed and with the scale that it was made with; a projector stays as it is.

        Raises:
            UsageError: If the seed is not known.
        """
        if self.seed is None:
            raise UsageError(
                f"This {self.frame} frame has no seed to be drawn from again: load its weights into the meta model "
                "with load_state_dict(..., assign=True) instead of to_empty, or fix the classifier on the real device."
            )
        self.weight.copy_((self._draw(self.seed) * self._made_scale).reshape(self.weight.shape))
        if self.bias is not None:
            self.bias.zero_()
        if self.logit_scale is not None:
            self.logit_scale.fill_(1)

    def _draw(self, seed: int) -> Tensor:
        num_classes, dim = self.weight.shape[:2]
        return self.tree.frame(dim, seed) if self.tree else frames.make(self.frame, num_classes, dim, seed=seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedClassifier":
        """Move or convert the tensors, as every module does; a frame that leaves the meta device is drawn."""
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        scale = f", scale={self.scale:.3g}"
        taken = "" if self.taken is None else f", taken={self.taken}"
        scale = "" if scale == ", scale=1" else scale
        return f"{super().extra_repr()}{taken}, frame={self.frame!r}, seed={self.seed}{scale}"

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
            if wrong := self.adopt(weight, bias):
                error_msgs.append(
                    f"{prefix}{wrong}, so it cannot be this model's fixed classifier. For the backbone of an ordinary "
                    "checkpoint: load it into the plain architecture, then call timm_etf.fix_classifier(model)."
                )
                return
        # With assign=True a parameter would take the buffer's place.
        stored = {prefix + name: t.detach() for name, t in (("weight", weight), ("bias", bias)) if t is not None}
        super()._load_from_state_dict(
            {**state_dict, **stored}, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def adopt(self, weight: Tensor, bias: Tensor | None = None) -> str | None:
        """Take a stored weight for this classifier's if it is one: its kind of frame, at any rotation and scale.

        Args:
            weight: Of this classifier's shape; otherwise it is not taken.
            bias: Zero, or None; otherwise the weight is not taken.

        Returns:
            What is wrong with it, as `mismatch` says it; None if the weight is now this one.
        """
        if weight.shape != self.weight.shape:
            return f"weight has shape {list(weight.shape)} and not {list(self.weight.shape)}"
        own = self.weight.flatten(1)
        if own.is_meta and self.seed is not None:
            own = self._draw(self.seed)
        cosine = 1.0 if own.is_meta else frames.coherence(own[:1000])  # a fitted frame is not known without its weight
        if wrong := mismatch(weight, bias, self.frame, cosine):
            return wrong
        if not own.is_meta:
            stored, own = (F.normalize(w.float(), dim=1) for w in (weight.flatten(1), own.to(weight.device)))
            if self.tree:  # of another tree the largest cosine may be the same
                cosines, expected = (w[:1000] @ w[:1000].T for w in (stored, own))
                if not torch.allclose(cosines, expected, rtol=0, atol=5e-3):
                    return f"weight is no {self.frame} frame of this tree"
            if not torch.allclose(stored, own, rtol=1e-2, atol=1e-3):
                self.seed = self.origin = None  # another rotation than this seed's, or than the one that was fitted
        self.weight.copy_(weight)
        return None


class LearnedClassifier(Head):
    r"""The control beside `FixedClassifier`: a trained weight with the same scale, normalisation and projector.

    .. math:: \mathrm{logits}(x) = s W f(x) + b, \qquad \text{or } s \hat W \hat f(x) \text{ with feature normalisation}

    Args:
        weight: Initial weight of shape [K, d] or [K, d, 1, 1].
        bias: Initial bias [K], or None; feature normalisation leaves it out.
        scale: Logit scale s.
        feature_norm: Divide the features and the rows of the weight by their norms (a cosine classifier).
        projector: As for `FixedClassifier`.
        in_features: As for `FixedClassifier`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        scale: float = 1.0,
        feature_norm: bool = False,
        projector: Projector | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(weight, in_features or weight.shape[1], feature_norm, projector)
        self.scale = scale
        self.weight = nn.Parameter(weight.detach().clone())
        if bias is None or feature_norm:  # cosines have none, but the plain layer's key stays
            self.register_buffer("bias", None if bias is None else torch.zeros_like(bias))
        else:
            self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the features `x`."""
        weight = F.normalize(self.weight, dim=1) if self.feature_norm else self.weight
        return self._product(self.prepared(x) * self.scale, weight)

    @torch.no_grad()
    def plain_weight(self) -> Tensor:
        """The weight with which a plain layer gives these logits (with feature normalisation: logits in this ratio)."""
        return self.scale * (F.normalize(self.weight, dim=1) if self.feature_norm else self.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        return f"{super().extra_repr()}, scale={self.scale:.4g}"


def _projector(kind: Projector, in_features: int, weight: Tensor) -> nn.Module:
    """Projector from the features to the weight's width: the MLP is t-ReX's, with one hidden layer."""
    conv, width = weight.dim() == 4, weight.shape[1]
    to = {"device": weight.device, "dtype": weight.dtype}

    def layer(n: int, m: int) -> nn.Module:
        return nn.Conv2d(n, m, 1, bias=False, **to) if conv else nn.Linear(n, m, bias=False, **to)  # type: ignore[arg-type]

    if kind == "linear":
        return layer(in_features, width)
    norm = nn.BatchNorm2d if conv else nn.BatchNorm1d
    return nn.Sequential(
        layer(in_features, _PROJECTED),
        norm(_PROJECTED, **to),  # type: ignore[arg-type]
        nn.GELU(),
        layer(_PROJECTED, width),
    )


def projected_width(projector: Projector | None, dim: int, num_classes: int) -> int:
    """Width of the features that meet the weight: a projector widens them to K-1, up to its limit."""
    return dim if projector is None else max(dim, min(num_classes - 1, _PROJECTED))


def mismatch(weight: Tensor, bias: Tensor | None, frame: str, cosine: float) -> str | None:
    """What keeps tensors from being those of a fixed classifier, to be read after its name and a dot.

    Args:
        weight: Of shape [K, d] or [K, d, 1, 1], at any rotation and scale.
        bias: Of shape [K], or None.
        frame: Name of the frame that the weight should be.
        cosine: That frame's coherence.

    Returns:
        `"weight is no FRAME frame"` or `"bias is not zero"`; None if they are a fixed classifier's.
    """
    if not frames.matches(weight.flatten(1), frame, cosine):
        return f"weight is no {frame} frame"
    return "bias is not zero" if bias is not None and bias.any() else None


def plain_layer(head: FixedClassifier) -> nn.Linear | nn.Conv2d:
    """An `nn.Linear` or 1x1 `nn.Conv2d` with a classifier's weights: the same logits, but for feature normalisation."""
    layer: Any = nn.Conv2d if head.is_conv else nn.Linear
    kwargs: dict[str, Any] = {"kernel_size": 1} if head.is_conv else {}
    kwargs |= {"bias": head.bias is not None, "device": head.weight.device, "dtype": head.weight.dtype}
    plain: nn.Linear | nn.Conv2d = skip_init(layer, head.in_features, head.out_features, **kwargs)
    with torch.no_grad():
        plain.weight.copy_(head.plain_weight())
        if plain.bias is not None and head.bias is not None:
            plain.bias.copy_(head.bias)  # zero, but where something else has written to it
    return plain
