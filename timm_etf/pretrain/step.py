"""One optimizer step."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from timm_etf.classifier import classifier_names
from timm_etf.loading.loader import Pixels
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.objective import Objective


class Step:
    """What happens to the batches of a step: schedule, mixup, forward, loss, backward, clipping, optimizer, average.

    Args:
        config: The run's settings.
        accelerator: The process, its device and precision.
        model: The prepared model.
        optimizer: Its prepared optimizer.
        schedule: timm's schedule of the learning rate; None for a constant one.
        objective: The loss.
        pixels: What makes images of the loader's batches.
        mixup: timm's mixup; None for none.
        ema: timm's average of the weights; None for none.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        objective: Objective,
        pixels: Pixels,
        mixup: Mixup | None,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.ema = accelerator, model, optimizer, ema
        self.schedule, self.objective, self.pixels, self.mixup = schedule, objective, pixels, mixup
        self.freeze_bn = config.freeze_bn
        objective.gather = accelerator.gather  # from here on, for where a run is tried out nothing is on its device
        if objective.teacher:
            objective.teacher.to(accelerator.device)
        self.clip_grad, self.clip_mode = config.clip_grad, config.clip_mode
        self.plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        # timm takes the last two parameters for the classifier's, which a fixed one does not have.
        spared = tuple(f"{name}." for name in classifier_names(self.plain)) if config.clip_mode == "agc" else ()
        self.clipped = [p for name, p in self.plain.named_parameters() if not name.startswith(spared)]

    def train(self) -> None:
        """Put the model into training mode; norms whose statistics are to stay are left in evaluation mode."""
        self.model.train()
        if self.freeze_bn:
            for module in self.plain.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def seen(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """A loader's batches as the model receives them when it is not trained."""
        return ((self.pixels(images), targets) for images, targets in batches)

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]], count: int, update: int) -> Tensor:
        """Train on `count` batches of uint8 images [B, C, H, W] with class indices [B], as update `update` of the run.

        Returns:
            The mean loss of the batches, still on the device: reading it would wait for the step to be done.
        """
        if self.schedule:
            self.schedule.step_update(update)
        statistics = None
        if self.objective.compares_samples and count > 1:
            batches = list(batches)
            statistics = self._looked_over(batches)
        losses = []
        for number, (images, targets) in enumerate(batches, 1):
            # Processes exchange their gradients once, with the last batch.
            with self.accelerator.no_sync(self.model) if number < count else nullcontext():
                losses.append(self._backward(images, targets, count, statistics))
        if self.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            dispatch_clip_grad(self.clipped, self.clip_grad, self.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.plain, step=update + 1)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _looked_over(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the batches of a step have to know of each other: the loss compares samples of different batches.

        It takes a forward pass of each that leaves no trace, and draws what the one with gradients will draw again.
        """
        with _random_states_kept(self.accelerator.device), _running_statistics_kept(self.plain):
            answers = []
            for images, targets in batches:
                pixels = self.pixels(images, training=True)
                with self.accelerator.autocast():
                    answers.append((self.model(pixels), targets.to(self.accelerator.device, non_blocking=True)))
            return self.objective.shared(answers)

    def _backward(self, images: Tensor, targets: Tensor, count: int, statistics: Tensor | None) -> Tensor:
        """Add the gradients of one of `count` batches; returns its part of the mean loss."""
        images = self.pixels(images, training=True)
        targets = targets.to(self.accelerator.device, non_blocking=True)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with self.accelerator.autocast():
            loss = self.objective(self.model, images, targets, statistics) / count
        self.accelerator.backward(loss)
        return loss.detach()

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step: the classifier's, where layers have rates of their own."""
        return max(group["lr"] for group in self.optimizer.param_groups)


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Draw in the block what is drawn again after it: timm's erasing from Python's state, all else from torch's."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(state)


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch in the block, as in training, without adding to the running statistics."""
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]
