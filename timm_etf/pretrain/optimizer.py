"""timm's optimizer and schedule of a run."""

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_etf.classifier import classifier_names
from timm_etf.pretrain.config import PretrainConfig


def optimizer_of(model: nn.Module, config: PretrainConfig) -> Any:
    """timm's optimizer of what is trainable."""
    optimizer: Any = create_optimizer_v2(
        model, opt=config.opt, layer_decay=config.layer_decay, **config.parsed_opt_kwargs
    )
    heads = tuple(f"{name}." for name in classifier_names(model))
    if config.layer_decay and not any(name.startswith(heads) for name, _ in model.named_parameters()):
        # timm counts layers from the last that is trained. Beside a learned classifier that is the classifier's, and
        # under a fixed one the backbone has to learn at the same rates.
        for group in optimizer.param_groups:
            group["lr_scale"] *= config.layer_decay
    return optimizer


def schedule_of(optimizer: Any, config: PretrainConfig, steps_per_epoch: int) -> Any:
    """timm's schedule of the learning rate, stepped at every update."""
    return create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
        **config.parsed_sched_kwargs,
    )[0]
