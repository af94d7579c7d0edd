"""One optimizer step."""

from typing import Any

from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn

from timm_etf.pretrain.data import Pixels
from timm_etf.pretrain.objective import Objective


class Step:
    """What happens to a batch: schedule, mixup, forward, loss, backward, optimizer.

    Args:
        accelerator: The process, its device and precision.
        model: The prepared model.
        optimizer: Its prepared optimizer.
        schedule: timm's schedule of the learning rate; None for a constant one.
        objective: The loss.
        pixels: What makes images of the loader's batches.
        mixup: timm's mixup; None for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        objective: Objective,
        pixels: Pixels,
        mixup: Mixup | None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.schedule, self.objective, self.pixels, self.mixup = schedule, objective, pixels, mixup

    def __call__(self, images: Tensor, targets: Tensor, update: int) -> Tensor:
        """Train on uint8 images [B, C, H, W] with class indices [B], as update number `update` of the run.

        Returns:
            The loss, still on the device: reading it would wait for the step to be done.
        """
        if self.schedule:
            self.schedule.step_update(update)
        images = self.pixels(images, training=True)
        targets = targets.to(self.accelerator.device, non_blocking=True)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with self.accelerator.autocast():
            loss = self.objective(self.model, images, targets)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]
