"""A classifier that is learned for some epochs, and then fixed to the frame of the class means of the features."""

from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from timm_etf import frames
from timm_etf.classifier import classifier_names, fix_classifier
from timm_etf.errors import UsageError
from timm_etf.frames.nearest import centred, mean_cosine
from timm_etf.means import class_means
from timm_etf.pretrain import checkpoint
from timm_etf.pretrain.config import FIXED_LOSSES, PretrainConfig
from timm_etf.pretrain.data import TrainLoader
from timm_etf.pretrain.optimizer import schedule_of
from timm_etf.pretrain.step import Step


def check(config: PretrainConfig) -> None:
    """Refuse what does not go with a frame from class means.

    Raises:
        UsageError: With the option to change.
    """
    epochs, kwargs = config.frame_from_means, config.parsed_model_kwargs
    if epochs is None:
        return
    if epochs >= config.epochs:
        raise UsageError(f"--frame-from-means must be less than --epochs ({config.epochs}), got {epochs}.")
    if not epochs and (not config.initial_weights or kwargs.get("projector")):
        raise UsageError(
            "--frame-from-means 0 takes the features of weights that are there, without a projector: name them with "
            "--init, or train for some epochs first."
        )
    if config.hierarchy or config.keep_classifier or {"frame", "learn_scale"} & kwargs.keys():
        raise UsageError(
            "--frame-from-means says which frame: leave out --hierarchy, --keep-classifier and --model-kwargs frame= "
            "and learn_scale=."
        )
    if config.reserve or config.distill or config.fsdp or config.loss in FIXED_LOSSES:
        raise UsageError(
            "--frame-from-means needs labelled images of every class, whole weights, and a loss for learned "
            f"classifiers, too: leave out --reserve, --distill, --fsdp and --loss {' and '.join(FIXED_LOSSES)}."
        )


def as_saved(model: nn.Module, config: PretrainConfig) -> nn.Module:
    """The model as the run's newest checkpoint has it: under a fixed classifier, if its frame was set before.

    Raises:
        UsageError: If the frame is to be set, and the model has several classifiers.
    """
    if config.frame_from_means is None:
        return model
    if len(names := classifier_names(model)) > 1:
        raise UsageError(f"--frame-from-means is for one classifier, and this model has {len(names)}: leave it out.")
    saved = checkpoint.all_of(config.out) if config.resume else []
    if saved and checkpoint.epoch_of(saved[-1]) >= config.frame_from_means:
        num_classes, dim = _classifier(model).weight.shape[:2]
        # Of the kind that the checkpoint's is, whatever its directions.
        simplex = num_classes <= dim + 1
        frame_KD = frames.simplex(num_classes, dim) if simplex else torch.ones(num_classes, dim, device="cpu")
        _fix(model, frame_KD, config, 1.0)
    return model


def set_frame(step: Step, config: PretrainConfig, train: TrainLoader, data_config: dict[str, Any]) -> tuple[Step, str]:
    """Fix the classifier to the frame of the class means, the same on every process; all else goes on as it is.

    The means are of all training images as validation sees them, behind the projector where there is one. Logits keep
    their scale: it is the mean norm of the rows that were trained, unless one was asked for.

    Args:
        step: Under a learned classifier.
        config: The run's settings.
        train: Its training images.
        data_config: Their preprocessing.

    Returns:
        The step under the fixed classifier, whose optimizer has forgotten the learned one; what was done, in a line.

    Raises:
        UsageError: If a class has no image, or the means are no frame.
    """
    plain = step.plain
    images = train.still(data_config)
    try:
        count_K, mean_KD = class_means(plain, step.seen(images), step.accelerator, projected=True)
    finally:
        images.close()
    if not count_K.all():
        missing = int((count_K == 0).nonzero()[0])
        raise UsageError(f"Class {missing} has no training images, so no mean: leave out --frame-from-means.")
    # One process computes for all: machines of different kinds round differently.
    frame_KD: Any = broadcast(frames.from_means(mean_KD).contiguous())
    head = _classifier(plain)
    rows_KD, asked = head.weight.detach().flatten(1), config.parsed_model_kwargs
    scale = asked.get("logit_scale") or 1.0
    if config.frame_from_means and not {"logit_scale", "feature_norm"} & asked.keys():
        scale = centred(rows_KD).norm(dim=1).mean().item()
    near = mean_cosine(rows_KD.to(frame_KD.device), frame_KD)
    learned = {id(p) for p in (head.weight, head.bias)}
    for model in filter(None, (plain, step.ema and step.ema.module)):
        _fix(model, frame_KD, config, scale)
    _forget(step.optimizer.optimizer, learned)
    kind = "simplex nearest to the class means" if _classifier(plain).frame == "simplex" else "class means' directions"
    cosines = f"largest cosine {frames.coherence(frame_KD):.3f}, mean cosine with the rows before {near:.3f}"
    return _prepared_again(step, config, train.steps_per_epoch), f"classifier fixed to the {kind}: {cosines}"


def _forget(optimizer: Any, learned: set[int]) -> None:
    """Take parameters out of an optimizer, with their state, and groups that nothing is left of."""
    state = getattr(optimizer, "_base_optimizer", optimizer).state  # Lookahead's is that of the optimizer inside
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in learned:
                state.pop(p, None)
        group["params"][:] = [p for p in group["params"] if id(p) not in learned]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _prepared_again(step: Step, config: PretrainConfig, steps_per_epoch: int) -> Step:
    """The step of a model and an optimizer from which parameters were taken."""
    accelerator, groups = step.accelerator, step.optimizer.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    schedule = schedule_of(step.optimizer.optimizer, config, steps_per_epoch)  # it knows the groups by their number
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    # Nothing may hold on to what is around the model, which would wait for gradients of what is gone.
    step.model = plain = accelerator.unwrap_model(step.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    accelerator.free_memory()
    vars(plain).pop("_is_accelerate_prepared", None)
    model, optimizer = accelerator.prepare(plain, step.optimizer)
    return Step(config, accelerator, model, optimizer, schedule, step.objective, step.pixels, step.mixup, step.ema)


def _classifier(model: nn.Module) -> Any:
    return model.get_submodule(classifier_names(model)[0])


def _fix(model: nn.Module, frame: Tensor, config: PretrainConfig, scale: float) -> None:
    """Exchange the classifier and keep its projector."""
    old, kwargs = _classifier(model), config.parsed_model_kwargs
    kind = kwargs.get("projector")
    norm = bool(kwargs.get("feature_norm", False))
    with torch.random.fork_rng(devices=[]):  # a projector is drawn in vain
        fix_classifier(model, frame, logit_scale=scale, feature_norm=norm, projector=kind)
    if kind:
        _classifier(model).projector = old.projector
