"""Putting a fixed classifier into a timm model, and taking it out again."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_etf import frames
from timm_etf.errors import UsageError
from timm_etf.frames.nearest import least_squares_scale, looks_random, mean_cosine
from timm_etf.heads import FixedClassifier, Head, LearnedClassifier, Projector, mismatch, plain_layer, projected_width

__all__ = [
    "classifier_names",
    "features_into",
    "fix_classifier",
    "fixed_classifiers",
    "free_classifier",
    "replaced_classifiers",
    "restore",
]

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
    frame: str | Tensor | frames.ClassTree = "auto",
    seed: int = 0,
    *,
    logit_scale: float | None = None,
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
            the same scale, normalisation and projector (with none of these a plain layer stays as it is). It starts
            from the weight that is there, or from the unit directions of a frame. `"nearest"`, around weights that
            are there: the frame closest to each classifier's own rows, `timm_etf.frames.nearest`, which changes what
            the model says least. A `timm_etf.frames.ClassTree`, whose near classes get near directions. Or a frame of
            your own, [K, d] with rows of one norm, such as `timm_etf.frames.nearest_simplex(class_means)`.
        seed: Seed of the frame's random rotation.
        logit_scale: Factor s > 0 of the logits, folded into the weight; by default 1, and for `"nearest"` what fits
            the rows best by least squares.
        feature_norm: Divide the features by their norm, so that the logits are s times cosines. This cannot be folded:
            plain timm then ranks the classes alike, with other confidences.
        learn_scale: Learn a further factor of the logits, from 1 on; exports fold it into the weight.
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
    _check_options(seed, logit_scale, feature_norm, learn_scale, projector)
    shared: dict[str, Any] = {"feature_norm": feature_norm, "projector": projector}
    new: dict[str, FixedClassifier | LearnedClassifier] = {}
    if isinstance(frame, str) and frame == "learned":
        if learn_scale:
            raise UsageError("A learned classifier learns its scale by itself: leave out learn_scale.")
        for name, head in _plain_heads(model):
            if feature_norm or projector or logit_scale not in (None, 1) or isinstance(head, Head):
                new[name] = _learned(head, logit_scale or 1.0, **shared)
    else:
        for name, head in _plain_heads(model):
            new[name] = fixed = _fixed(head, frame, seed, logit_scale, learn_scale=learn_scale, **shared)
            if fixed.origin:
                _tell_origin(model, name, head, fixed.origin)
    return _set_classifiers(model, new)


def restore(
    model: nn.Module,
    etf: Mapping[str, Any],
    *,
    weights_loaded: bool = True,
    logit_scale: float | None = None,
    feature_norm: bool | None = None,
    learn_scale: bool = False,
) -> nn.Module:
    """Put back the fixed classifiers that the `etf` block of an exported model describes.

    A model whose classifiers the block does not describe is left as it is: one with another number of classes, or a
    backbone whose classifier was left out together with its projector.

    Args:
        model: Model of the plain architecture, as it was exported; changed in place.
        etf: The block, with `frame`, `seed`, `num_classes`, `coherence`, `logit_scale`, `feature_norm` and `projector`.
        weights_loaded: Whether the model holds the exported weights: their frame stays, bit for bit. Otherwise it is
            drawn from the block's seed.
        logit_scale: Another scale than the exported one.
        feature_norm: Another normalisation than the exported one.
        learn_scale: Learn a further factor of the logits, from 1 on; what was learned before is in the weight.

    Returns:
        The same model.

    Raises:
        UsageError: If a classifier's weights are not the frame that the block promises, or an option is not one of
            those of `fix_classifier`. The model is then unchanged.
    """
    if etf["projector"] is not None or getattr(model, "num_classes", 0) != etf["num_classes"]:
        return model
    seed, norm = etf["seed"], etf["feature_norm"] if feature_norm is None else feature_norm
    scale = etf["logit_scale"] if logit_scale is None else logit_scale
    told = etf.get("tree")
    tree = frames.ClassTree(tuple(told["paths"]), told["gamma"]) if told else None
    if not weights_loaded:
        seed = 0 if seed is None else seed  # a frame of unknown rotation is as good under any other
        frame = tree or ("auto" if etf["frame"] in frames.FITTED else etf["frame"])
        return fix_classifier(model, frame, seed, logit_scale=scale, feature_norm=norm, learn_scale=learn_scale)
    _check_options(0, scale, norm, learn_scale, None)
    new: dict[str, FixedClassifier | LearnedClassifier] = {}
    for name, head in _plain_heads(model):
        weight, bias = head.weight, head.bias
        if wrong := mismatch(weight, bias, etf["frame"], etf["coherence"]):
            raise UsageError(
                f"The etf block promises a fixed {etf['frame']} classifier, but {name}.{wrong}. Download or export the "
                "model again, or use timm.create_model to load it as it is."
            )
        if logit_scale is not None:
            weight = weight * (logit_scale / weight[0].double().norm().item())
        new[name] = FixedClassifier(
            weight,
            bias=bias is not None,
            frame=etf["frame"],
            seed=seed,
            scale=scale,
            feature_norm=norm,
            learn_scale=learn_scale,
            origin=(etf.get("origin") or {}).get(name),
            tree=tree,
            taken=etf.get("taken"),
        )
    return _set_classifiers(model, new)


def _check_options(seed: Any, logit_scale: Any, feature_norm: Any, learn_scale: Any, projector: Any) -> None:
    if not hasattr(seed, "__index__") or isinstance(seed, bool):
        raise UsageError(f"The seed of a frame is a whole number, got {seed!r}.")
    if not (logit_scale is None or (isinstance(logit_scale, int | float) and 0 < logit_scale < math.inf)):
        raise UsageError(f"logit_scale must be a positive number, got {logit_scale!r}.")
    for option, value in (("feature_norm", feature_norm), ("learn_scale", learn_scale)):
        if not isinstance(value, bool):
            raise UsageError(f"{option} must be True or False, got {value!r}.")
    if projector not in (None, "linear", "mlp"):
        raise UsageError(f"Unknown projector {projector!r}: use None, 'linear' or 'mlp'.")


def _fixed(
    head: Any,
    frame: str | Tensor | frames.ClassTree,
    seed: int,
    scale: float | None,
    projector: Projector | None,
    **options: Any,
) -> FixedClassifier:
    """Fixed classifier for the place of `head`, on its device and of its dtype."""
    dim, shape = _shape(head, projector)
    drawn, origin, tree = True, None, None
    if isinstance(frame, str) and frame == "nearest":
        if projector is not None:
            raise UsageError("A projector's output is new, so there is no frame nearest to it: leave out one of them.")
        kind, drawn = "simplex" if shape[0] <= shape[1] + 1 else "nearest", False
        if head.weight.is_meta:
            w_KD = head.weight.new_empty(shape)
        else:
            rows = head.weight.detach().flatten(1)
            w_KD = frames.nearest(rows)
            scale = least_squares_scale(rows, w_KD) if scale is None else scale
            origin = {"from": None, "mean_cosine": round(mean_cosine(rows, w_KD), 4), "rows_sha256": _sha256(rows)}
    elif isinstance(frame, Tensor):
        if frame.shape != shape[:2] or not frames.matches(frame, "own", 1.0):
            raise UsageError(f"A frame of your own must have the shape {list(shape[:2])} and rows of one norm.")
        kind, drawn = "simplex" if frames.is_simplex(frame) else "own", False
        w_KD = torch.nn.functional.normalize(frame.double(), dim=1)
    elif isinstance(frame, frames.ClassTree):
        if len(frame.paths) != shape[0]:
            raise UsageError(f"The tree has {len(frame.paths)} classes and the model {shape[0]}: give it the model's.")
        kind, tree = "hierarchy", frame
        w_KD = head.weight.new_empty(shape) if head.weight.is_meta else frame.frame(shape[1], seed)
    else:
        kind = frames.resolve(frame, *shape[:2])
        # On the meta device shapes are all that is wanted: nothing is computed.
        w_KD = head.weight.new_empty(shape) if head.weight.is_meta else frames.make(kind, *shape[:2], seed=seed)
    scale = 1.0 if scale is None else scale
    return FixedClassifier(
        (w_KD * scale).to(device=head.weight.device, dtype=head.weight.dtype).reshape(shape),
        bias=head.bias is not None,
        frame=kind,
        seed=int(seed) if drawn else None,
        scale=scale,
        projector=projector,
        in_features=dim,
        origin=origin,
        tree=tree,
        **options,
    )


def _sha256(rows: Tensor) -> str:
    return hashlib.sha256(rows.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _tell_origin(model: nn.Module, name: str, head: Any, origin: dict[str, Any]) -> None:
    """Say how near the frame came.

    Whose classifier it was is recorded where it is known, by who loaded it: a model's `pretrained_cfg` has a tag even
    where its weights were never loaded.
    """
    if looks_random(head.weight.flatten(1)):
        _logger.warning(
            f"The rows of {type(model).__name__}'s classifier {name!r} are spread as random ones are: the frame "
            "nearest to them means no more than any other. Load trained weights first (pretrained=True)."
        )
    _logger.info(f"{name}: frame nearest to the rows that were there: mean cosine {origin['mean_cosine']}")


def _learned(head: Any, scale: float, projector: Projector | None, *, feature_norm: bool) -> LearnedClassifier:
    """Trained classifier for the place of `head`, starting from its weight, or from the directions of its frame."""
    dim, shape = _shape(head, projector)
    weight = head.weight
    if weight.shape != shape:
        weight = nn.init.trunc_normal_(weight.new_empty(shape), std=shape[1] ** -0.5)
    elif isinstance(head, FixedClassifier):  # whose weight holds a scale
        weight = torch.nn.functional.normalize(weight, dim=1)
    return LearnedClassifier(
        weight, head.bias, scale=scale, feature_norm=feature_norm, projector=projector, in_features=dim
    )


def _shape(head: Any, projector: Projector | None) -> tuple[int, tuple[int, ...]]:
    """Width of the features that enter the classifier at `head`'s place, and the shape of its weight."""
    num_classes, width, *kernel = head.weight.shape
    dim = head.in_features if isinstance(head, Head) else width
    return dim, (num_classes, projected_width(projector, dim, num_classes), *kernel)


def _set_classifiers(model: nn.Module, new: Mapping[str, FixedClassifier | LearnedClassifier]) -> nn.Module:
    for name, classifier in new.items():
        model.set_submodule(name, classifier)
        _logger.info(f"Classifier {name}: {type(classifier).__name__}({classifier.extra_repr()})")
    # Under DistributedDataParallel rank 0 would send the frame, 8 MB at 1,000 x 2,048, before every forward pass.
    model._ddp_params_and_buffers_to_ignore = _FrameBuffers(model)  # type: ignore[assignment]
    return model


class _FrameBuffers:
    """State-dict names of a model's frames, which DistributedDataParallel need not send: every process has the same.

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


def replaced_classifiers(model: nn.Module) -> Iterator[tuple[str, FixedClassifier | LearnedClassifier]]:
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
                f"The classifier {name!r} of {type(model).__name__} is a {type(head).__module__}."
                f"{type(head).__name__}; only torch.nn.Linear and 1x1 torch.nn.Conv2d classifiers can be fixed: fix it "
                "before the model is quantised or the layer exchanged."
            )
        found.append((name, head))
    return found


@contextmanager
def features_into(model: nn.Module, *, projected: bool = False) -> Iterator[list[Tensor]]:
    """Collect what enters the first classifier, before projector and normalisation: a tensor for each forward pass.

    Args:
        model: A timm model, also compiled or wrapped for several processes.
        projected: Collect what leaves the projector instead, where there is one.

    Yields:
        A list that grows while the block runs.
    """
    from accelerate.utils import extract_model_from_parallel

    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    features: list[Tensor] = []
    head = plain.get_submodule(classifier_names(plain)[0])
    projector: Any = getattr(head, "projector", None) if projected else None
    if projector is None:
        handle = head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    else:
        handle = projector.register_forward_hook(lambda module, inputs, output: features.append(output))
    try:
        yield features
    finally:
        handle.remove()
