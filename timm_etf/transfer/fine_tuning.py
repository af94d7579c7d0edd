"""Fine-tuning: the whole network and a new classifier; the learning rate chosen on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_etf.data.images import Images, Splits
from timm_etf.data.seeded import SeededDataset
from timm_etf.errors import UsageError
from timm_etf.transfer.result import Result, validation_mask

Head = Literal["learned", "etf", "nearest"]
"""The target's classifier: fresh and trained; fixed to a frame of the seed; fixed to the simplex nearest to the class
means of the pretrained features."""

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Wide: a model whose best rate is at an end of them is compared by the grid, not by what it has learned."""
FIRST_RATES = (0.03, 0.1, 0.3)
"""What every model is tried with; their neighbours only while the best is at an end of what was tried."""
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Budget:
    """What every model gets for each of its trainings.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images per step.
        workers: Loader processes.
    """

    steps: int = 500
    batch_size: int = 64
    workers: int = 2

    @property
    def words(self) -> str:
        """The budget as a report states it."""
        return (
            f"{self.steps} steps of {self.batch_size} images, SGD with momentum 0.9, weight decay of {WEIGHT_DECAY}, "
            f"cosine schedule, learning rate of {FIRST_RATES} chosen on validation images, or further ones of "
            f"{LEARNING_RATES} while the best is the last"
        )


@dataclass(frozen=True)
class _Part:
    """Some images of some splits, as one data set."""

    splits: Sequence[Images]
    rows: Sequence[tuple[int, int]]

    def labels(self) -> Tensor:
        return torch.tensor([self.splits[s].labels[i] for s, i in self.rows])


class _Transformed(Dataset[Any]):
    def __init__(self, part: _Part, transform: Any, mode: str) -> None:
        self.part, self.transform, self.mode = part, transform, mode

    def __len__(self) -> int:
        return len(self.part.rows)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        split, index = self.part.rows[item]
        images = self.part.splits[split]
        try:
            pixels = images.read(index, self.mode)
        except Exception as e:
            raise UsageError(f"Unreadable image: {images.where(index)} ({str(e).splitlines()[0]})") from None
        return self.transform(pixels), int(images.labels[index])


def finetune(
    build: Callable[[int], nn.Module],
    splits: Splits,
    budget: Budget,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    keep: Callable[[nn.Module], object] | None = None,
) -> Result:
    """Fine-tune on a target and score it; a function of the seed, whatever the number of loader processes.

    Learning rates are trained with on the training images and scored on the validation images; the best, again on
    both. Training images are cropped at random (60 to 100 % of the area) and mirrored if the target allows.

    Args:
        build: Makes the pretrained model for a number of classes, with the classifier that is to be tuned or kept; it
            is called with torch's seed set to `seed`.
        splits: The target.
        budget: The same for every model that is compared.
        seed: Seed of the classifier, the order and the crops, and of the validation images where the target has none.
        device: Where to train.
        keep: Is given the model that the result is of, in evaluation mode.

    Returns:
        The result on every test image; `chosen` has the learning rate.

    Raises:
        UsageError: If an image cannot be read.
    """
    everything = [splits.train] + ([splits.validation] if splits.validation else [])
    rows = [(s, i) for s, images in enumerate(everything) for i in range(len(images))]
    held = (
        np.array([s == 1 for s, _ in rows])
        if splits.validation is not None
        else validation_mask(splits.train.labels, seed)
    )
    fit = _Part(everything, [r for r, h in zip(rows, held, strict=True) if not h])
    validation = _Part(everything, [r for r, h in zip(rows, held, strict=True) if h]) if held.any() else fit
    test = _Part([splits.test], [(0, i) for i in range(len(splits.test))])
    run = _Runner(build, len(splits.train.class_names), splits.target.hflip, budget, seed, torch.device(device))
    with tqdm(
        total=(len(FIRST_RATES) + 1) * budget.steps,
        desc=f"fine-tuning on {splits.target.name}",
        unit="step",
        leave=False,
        disable=None,
    ) as bar:
        truth = validation.labels()
        lr = best_rate(lambda lr: (run(fit, validation, lr, bar) == truth).double().mean().item())
        predicted = run(_Part(everything, rows), test, lr, bar, keep).numpy()
    y = splits.test.labels
    statement = f"all other layers trained; {budget.words}"
    return Result((predicted == y).astype(np.float32), y, statement, {"lr": lr})


def best_rate(score: Callable[[float], float]) -> float:
    """The learning rate with the highest score; of those that are alike the one nearest to the middle of the first.

    Example:
        >>> tried = []
        >>> best_rate(lambda lr: tried.append(lr) or -abs(lr - 0.9)), tried
        (1.0, [0.03, 0.1, 0.3, 1.0, 3.0])
    """
    middle = LEARNING_RATES.index(FIRST_RATES[len(FIRST_RATES) // 2])
    scores = {LEARNING_RATES.index(lr): score(lr) for lr in FIRST_RATES}
    while True:
        best = max(sorted(scores, key=lambda place: abs(place - middle)), key=scores.__getitem__)
        beyond = {best - 1, best + 1}.intersection(range(len(LEARNING_RATES))) - scores.keys()
        if not beyond:
            return LEARNING_RATES[best]
        scores |= {place: score(LEARNING_RATES[place]) for place in beyond}


@dataclass(frozen=True)
class _Runner:
    build: Callable[[int], nn.Module]
    num_classes: int
    hflip: bool
    budget: Budget
    seed: int
    device: torch.device

    def __call__(
        self,
        train: _Part,
        test: _Part,
        lr: float,
        bar: Any,
        keep: Callable[[nn.Module], object] | None = None,
    ) -> Tensor:
        """Train once and predict the classes of `test`."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model: Any = self.build(self.num_classes).to(self.device)
            config = timm.data.resolve_data_config(model=model)
            mode = "L" if config["input_size"][0] == 1 else "RGB"
            self._train(model, _Transformed(train, self._augmentation(config), mode), lr, bar)
            still = _Transformed(test, timm.data.create_transform(**config), mode)
            model.eval()
            with torch.inference_mode():
                loader: DataLoader[Any] = DataLoader(still, self.budget.batch_size * 4, num_workers=self.budget.workers)
                predicted = torch.cat([model(pixels.to(self.device)).argmax(1).cpu() for pixels, _ in loader])
            if keep:
                keep(model)
            return predicted

    def _augmentation(self, config: dict[str, Any]) -> Any:
        shared = {k: config[k] for k in ("input_size", "interpolation", "mean", "std")}
        flip = 0.5 if self.hflip else 0.0
        return timm.data.create_transform(
            **shared, is_training=True, scale=(0.6, 1.0), hflip=flip, color_jitter=0.0, auto_augment=None
        )

    def _train(self, model: Any, images: _Transformed, lr: float, bar: Any) -> None:
        steps, size = self.budget.steps, min(self.budget.batch_size, len(images))
        optimizer = create_optimizer_v2(model, opt="sgd", lr=lr, weight_decay=WEIGHT_DECAY, momentum=0.9)
        schedule = CosineLRScheduler(
            optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=lr / 10, t_in_epochs=False
        )
        if bar.n + steps > bar.total:  # one more rate than was planned
            bar.total = bar.n + steps
        generator = torch.Generator().manual_seed(self.seed)
        per_epoch = len(images) // size
        epochs = [torch.randperm(len(images), generator=generator) for _ in range(-(-steps // per_epoch))]
        items = [e[: per_epoch * size] + number * len(images) for number, e in enumerate(epochs)]
        loader: DataLoader[Any] = DataLoader(
            SeededDataset(images, self.seed),
            batch_sampler=torch.cat(items).view(-1, size)[:steps].tolist(),
            num_workers=self.budget.workers,
            generator=generator,
        )
        model.train()
        for step, (pixels, labels) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(pixels.to(self.device)), labels.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            schedule.step_update(step)
            optimizer.step()
            bar.update()
