"""What a pretraining run is told: one dataclass, which is also the command line and `run.json`."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from timm_etf import specs
from timm_etf.errors import UsageError

_READERS = ("hfds", "hfids", "tfds", "torch", "wds")
"""Prefixes of timm's data sets; any other name it would take for an image folder."""

_SCHEDULES = ("constant", "cosine", "multistep", "none", "poly", "rsqrt", "step", "tanh", "wsd")
"""timm's schedules that can be stepped at every update: all but plateau, which waits for a metric."""

BATCH_LOSSES = ("ntce", "nonl")
"""Losses that compare the samples of a step with each other."""

FIXED_LOSSES = ("dot_regression", "gram")
"""Losses that a classifier has to be fixed for from the first step."""

COSINE_LOSSES = ("normface", *BATCH_LOSSES)
"""Losses of cosines over a temperature."""

_RANGES = {
    "num_classes": "[2, inf)",
    "hierarchy_gamma": "(0, inf)",
    "frame_from_means": "[0, inf)",
    "reserve": "[0, inf)",
    "img_size": "[1, 4096]",
    "mean": "(-inf, inf)",
    "std": "[1e-6, inf)",
    "crop_pct": "(0, 1]",
    "scale": "(0, 1]",
    "ratio": "(0, inf)",
    "hflip": "[0, 1]",
    "color_jitter": "[0, inf)",
    "reprob": "[0, 1]",
    "epochs": "[1, inf)",
    "epoch_repeats": "[0, inf)",
    "aug_repeats": "[0, inf)",
    "batch_size": "[1, inf)",
    "grad_accum_steps": "[1, inf)",
    "lr": "(0, inf)",
    "momentum": "[0, 1)",
    "weight_decay": "[0, inf)",
    "layer_decay": "(0, 1]",
    "clip_grad": "(0, inf)",
    "warmup_epochs": "[0, inf)",
    "drop_path": "[0, 1)",
    "temperature": "(0, inf)",
    "smoothing": "[0, 1)",
    "mixup": "[0, inf)",
    "cutmix": "[0, inf)",
    "feature_entropy": "[0, inf)",
    "model_ema_decay": "[0, 1)",
    "checkpoint_hist": "[1, inf)",
    "checkpoint_steps": "[1, inf)",
    "checkpoint_minutes": "(0, inf)",
    "seed": "[0, 2147483647]",  # each process adds its number, and numpy takes 32 bits
    "workers": "[0, inf)",
}
"""Interval of each numeric option, or of each of its values."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a timm architecture, with a fixed or a learned classifier.

    --config FILE reads options from a yaml file, one per line under their own names (batch_size: 256); options beside
    it count more. The run folder receives run.json, config.yaml (all options; --config repeats the run), log.jsonl,
    curves.png, checkpoints/ and, at the end, results.json and export/ (ready for the Hub). Ctrl-C or SIGTERM saves a
    checkpoint first, and so does SIGUSR1, which then exits with status 75; the same command with --resume continues.
    """

    model: str
    """timm architecture: resnet50_etf has a fixed classifier, resnet50 a learned one, resnet50_sw whitening."""
    out: Path
    """Run folder, new or empty (or, with --resume, the one to continue)."""
    data_dir: Path | None = None
    """Root of the images: for a folder data set it holds one folder per split, with one folder per class in each."""
    dataset: str = "folder"
    """timm data set name: folder, hfds/NAME, hfids/NAME, wds/NAME, torch/NAME ..."""
    train_split: str = "train"
    """Split to train on; a stream of unknown length takes its number of images after a bar: train|1281167."""
    val_split: str = "validation"
    """Split to validate on after every epoch."""
    num_classes: int | None = None
    """Number of classes, where the data set does not tell (wds)."""
    reserve: int = 0
    """Further vectors of the classifier, reserved for classes to come: timm_etf.grow_classifier names them."""
    frame_seed: int | None = None
    """Seed of the fixed classifier's random rotation; by default --seed, so that trainings of several seeds vary it."""
    model_kwargs: tuple[str, ...] = ()
    """Further arguments of the model as NAME=VALUE: the architecture's, such as drop_path_rate=0.1, and the fixed
    classifier's: frame=gaussian (or learned), logit_scale=16, feature_norm=yes, learn_scale=yes, projector=mlp."""
    pretrained: bool = False
    """Start from timm's own weights of the architecture, under a new classifier."""
    init: str | None = None
    """Start from other weights, under a new classifier: resnet50.a1_in1k, hf-hub:ORG/NAME, local-dir:FOLDER or a file
    of weights."""
    keep_classifier: bool = False
    """With --init: start from its classifier, too, as it is; under a fixed one from the frame nearest to a learned
    one."""
    distill: str | None = None
    """Learn what another model answers instead of labels, which the images need not have: resnet50.a1_in1k,
    hf-hub:ORG/NAME, local-dir:FOLDER. Validation then counts how often the two agree. Images that are not in folders of
    the splits are divided, a tenth for validation."""
    hierarchy: Path | None = None
    """Tree of the classes, which the cosines of the fixed classifier follow: nested folders (DATA/train), a .json file
    with the group or parent of each class, or a table of CLASS, tab, GROUP/SUBGROUP."""
    hierarchy_gamma: float = 3.0
    """How fast these cosines fall from siblings on; a large one gives the simplex."""
    frame_from_means: int | None = None
    """Train the classifier for so many epochs, then fix it: to the simplex nearest to the class means of the features,
    or, where there are too many classes for one, to these means' own directions. 0, with --init: before the first
    step."""
    drop_path: float | None = None
    """Rate of stochastic depth."""
    freeze_bn: bool = False
    """Keep BatchNorm's statistics as they are, for weights that are only tuned."""

    img_size: int | None = None
    """Image side in pixels; by default the architecture's own."""
    in_chans: Literal[1, 3] = 3
    """Image channels: 3 for colour, 1 for grey."""
    mean: tuple[float, ...] | None = None
    """Channel means of the normalisation; by default those of --init or the architecture."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of the normalisation; by default those of --init or the architecture."""
    crop_pct: float | None = None
    """Share of the resized side that validation crops; by default that of --init or the architecture."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect range of the random resized crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Strength of the colour jitter (colour images only)."""
    auto_augment: str | None = None
    """timm's AutoAugment policy, such as rand-m9-mstd0.5-inc1."""
    reprob: float = 0.0
    """Probability of random erasing."""
    aug_repeats: int = 0
    """Augmentations of an image that follow each other in the order of training, 0 or 1 for one; an epoch then sees
    that many times fewer images."""

    epochs: int = 100
    """Passes over the training images."""
    epoch_repeats: int = 0
    """Passes that count as one epoch, for small data sets; 0 or 1 for one."""
    batch_size: int = 128
    """Images of a forward pass on each process."""
    grad_accum_steps: int = 1
    """Forward passes of a step on each process, for steps of more images than memory holds."""
    opt: str = "sgd"
    """timm optimizer (its "sgd" has Nesterov momentum)."""
    opt_kwargs: tuple[str, ...] = ()
    """Further arguments of the optimizer as NAME=VALUE, such as betas=(0.9,0.95)."""
    lr: float = 0.1
    """Peak learning rate, for the whole batch over all processes."""
    momentum: float = 0.9
    """Momentum, for the optimizers that have it."""
    weight_decay: float = 5e-5
    """Weight decay; biases and norms are left out, as timm does."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below, such as 0.75 for a backbone that is tuned."""
    clip_grad: float | None = None
    """Limit of the gradients, in the sense of --clip-mode."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What --clip-grad limits: the norm of all gradients, each value, or (agc) each unit's norm relative to its
    weights', except of the classifier's."""
    sched: str = "cosine"
    """timm learning-rate schedule, stepped at every update; none keeps --lr."""
    sched_kwargs: tuple[str, ...] = ()
    """Further arguments of timm's schedule as NAME=VALUE, such as min_lr=1e-5 or decay_milestones=(30,60,90)."""
    warmup_epochs: int | None = None
    """Epochs of linear warm-up, part of --epochs; by default a fifth of them, 5 at most."""
    loss: Literal["cross_entropy", "normface", "ntce", "nonl", "dot_regression", "gram"] = "cross_entropy"
    """Loss. normface is the cross-entropy of cosines over --temperature, ntce compares the samples of a step (all of
    --grad-accum-steps and all processes; 512 or more) for the row of each class instead of the rows for each sample,
    nonl leaves out those of the same class: these are for _etf models (--model-kwargs frame=learned for a trained
    classifier). gram, for --hierarchy, is half the cross-entropy and half the distance of a sample's cosines with all
    vectors from those of its own vector. dot_regression needs a fixed classifier with feature_norm=True; features
    pretrained with it transfer far worse than with cross-entropy (by 12 points on ImageNet, arXiv 2605.20302)."""
    temperature: float | None = None
    """What cosines are divided by in normface, ntce and nonl: 0.1 unless given; lower for many classes."""
    smoothing: float = 0.1
    """Label smoothing (cross-entropy only)."""
    mixup: float = 0.0
    """Alpha of timm's mixup, 0 for none."""
    cutmix: float = 0.0
    """Alpha of timm's cutmix, 0 for none; with --mixup each batch takes one of the two."""
    feature_entropy: float = 0.0
    """Weight of the feature-entropy regulariser, which works against collapse of the backbone's features."""
    model_ema: bool = False
    """Average the weights over the steps; the average is what is validated and exported."""
    model_ema_decay: float = 0.9998
    """Weight of the past in that average at each step."""
    model_ema_warmup: bool = False
    """Let the decay grow to its value from the start on, as suits short runs."""
    amp: Literal["no", "fp16", "bf16"] | None = None
    """Mixed precision; by default what accelerate was launched with."""
    seed: int = 0
    """Seed of the weights, of the frame, of the order of the images and of their augmentation."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool | None = None
    """Keep images and weights in channels-last order, which convolutions prefer; by default for networks that are
    mostly convolutions, on CPUs and under --amp."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    fsdp: bool = False
    """Divide weights, gradients and optimizer state among the processes (FSDP2), for models that no GPU holds alone."""
    sync_bn: bool = False
    """Compute BatchNorm's statistics over all processes; GPUs only."""
    workers: int = min(4, os.cpu_count() or 1)
    """Loader processes per training process; by default four, or as many as there are cores."""
    geometry: bool = True
    """Measure at every validation how collapsed the features are; it holds K x d + d x d doubles, and with tens of
    thousands of classes takes a minute."""
    checkpoint_hist: int = 2
    """Checkpoints to keep, the newest; that of the epoch with the best top-1 is kept in any case."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints inside an epoch."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints inside an epoch."""
    export: Literal["last", "best"] = "last"
    """Epoch to export; choosing the best by the validation images makes their accuracy look better than it is."""
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = None
    """Experiment tracker, through accelerate; log.jsonl is written in any case."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""

    @property
    def architecture(self) -> str:
        """timm name of the model.

        Raises:
            UsageError: If timm does not know the name, or it names weights.
        """
        import timm

        import timm_etf  # noqa: F401 - registers the variants
        from timm_etf.variants import SUFFIX, base_name, skipped

        name = self.model
        if base_name(name) in skipped and name.endswith(SUFFIX):
            raise UsageError(f"{base_name(name)} has no {SUFFIX} variant: {skipped[base_name(name)]}.")
        if ":" in name or "." in name:
            raise UsageError(
                f"--model takes a timm architecture, got {name!r}: leave out the source and the tag; weights to start "
                "from are named with --init."
            )
        if not timm.is_model(name):
            raise UsageError(specs.unknown("model", name, timm.list_models(), "timm.list_models() lists the names"))
        return name

    @property
    def parsed_model_kwargs(self) -> dict[str, Any]:
        """`model_kwargs` as a dictionary, with `drop_path` and what the loss asks of the classifier.

        Raises:
            UsageError: If one is not NAME=VALUE, or has an option of its own.
        """
        own = {"frame_seed": "--frame-seed", "drop_path_rate": "--drop-path"}
        if self.loss in COSINE_LOSSES:
            own["logit_scale"] = "--temperature, its inverse"
        parsed = specs.arguments("--model-kwargs", self.model_kwargs, own)
        if self.loss in COSINE_LOSSES:
            if not parsed.setdefault("feature_norm", True):
                raise UsageError(f"--loss {self.loss} takes cosines: leave out --model-kwargs feature_norm.")
            parsed["logit_scale"] = 1 / (self.temperature or 0.1)
        return parsed if self.drop_path is None else {**parsed, "drop_path_rate": self.drop_path}

    @property
    def parsed_opt_kwargs(self) -> dict[str, Any]:
        """`opt_kwargs` as a dictionary, with learning rate, weight decay and momentum.

        Raises:
            UsageError: If one is not NAME=VALUE, or has an option of its own.
        """
        own = {name: f"--{name.replace('_', '-')}" for name in ("opt", "lr", "weight_decay", "momentum", "layer_decay")}
        parsed = specs.arguments("--opt-kwargs", self.opt_kwargs, own)
        return {"lr": self.lr, "weight_decay": self.weight_decay, "momentum": self.momentum, **parsed}

    @property
    def parsed_sched_kwargs(self) -> dict[str, Any]:
        """`sched_kwargs` as a dictionary.

        Raises:
            UsageError: If one is not NAME=VALUE, or has an option of its own.
        """
        own = {"sched": "--sched", "num_epochs": "--epochs", "warmup_epochs": "--warmup-epochs"}
        return specs.arguments("--sched-kwargs", self.sched_kwargs, own)

    @property
    def warmup(self) -> int:
        """Epochs of warm-up."""
        return min(5, self.epochs // 5) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def initial_weights(self) -> str | None:
        """What the backbone starts from, as timm names it; None for random weights."""
        from timm_etf.variants import base_name

        return base_name(self.architecture) if self.pretrained else self.init

    def check(self) -> None:
        """Refuse values that cannot work, before anything is loaded or written.

        Raises:
            UsageError: With the option to change.
        """
        from timm_etf.variants import SUFFIX

        # Each of these checks what it parses.
        self.architecture, self.parsed_model_kwargs, self.parsed_opt_kwargs, self.parsed_sched_kwargs  # noqa: B018
        specs.require_ranges(vars(self), _RANGES)
        for option in ("scale", "ratio"):
            low, high = getattr(self, option)
            if low > high:
                raise UsageError(f"--{option} takes the smaller value first, got {low} {high}.")
        self._check_names()
        for option in ("mean", "std"):
            if len(getattr(self, option) or ()) not in (0, 1, self.in_chans):
                raise UsageError(f"--{option} takes one value for all channels or {self.in_chans}, one for each.")
        if self.warmup >= self.epochs:
            raise UsageError(f"--warmup-epochs must be less than --epochs ({self.epochs}), got {self.warmup_epochs}.")
        if self.pretrained and self.init:
            raise UsageError("--pretrained and --init both name weights to start from: leave one out.")
        if self.keep_classifier and not self.initial_weights:
            raise UsageError("--keep-classifier needs weights to start from: name them with --init.")
        for option, given in (("hierarchy", self.hierarchy), ("frame-from-means", self.frame_from_means is not None)):
            if given and not self.architecture.endswith(SUFFIX):
                raise UsageError(f"--{option} makes a fixed classifier: use --model {self.model}{SUFFIX}.")
        if self.reserve and (self.hierarchy or self.distill):
            raise UsageError("--hierarchy and --distill say which classes there are: leave out --reserve.")
        if self.reserve and self.parsed_model_kwargs.get("projector"):
            raise UsageError("An export has no projector and no classifier behind it: leave it out, or --reserve.")
        if self.hierarchy and (self.keep_classifier or "frame" in self.parsed_model_kwargs):
            raise UsageError("--hierarchy says which frame: leave out --keep-classifier and --model-kwargs frame=.")
        if self.keep_classifier and self.fsdp:
            raise UsageError("--keep-classifier does not work on shards: leave out --fsdp.")
        if self.layer_decay and self.sched == "none":
            raise UsageError("--layer-decay scales what a schedule gives: use --sched constant instead of none.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UsageError(f"Mixup pairs the images of a batch: --batch-size must be even, got {self.batch_size}.")
        if self.temperature and self.loss not in COSINE_LOSSES:
            raise UsageError(f"--temperature belongs to --loss {', '.join(COSINE_LOSSES)}, not to {self.loss}.")
        if self.loss in COSINE_LOSSES and not self.architecture.endswith(SUFFIX):
            raise UsageError(
                f"--loss {self.loss} takes cosines: use --model {self.model}{SUFFIX}, with --model-kwargs "
                "frame=learned for a trained classifier."
            )
        if self.loss in BATCH_LOSSES and (self.mixup or self.cutmix):
            raise UsageError(f"--loss {self.loss} takes images of one class: leave out --mixup and --cutmix or give 0.")
        if self.loss in BATCH_LOSSES and self.batch_size * self.grad_accum_steps < 2:
            raise UsageError(f"--loss {self.loss} compares the images of a step: --batch-size must be at least 2.")
        if self.feature_entropy and self.batch_size < 2:
            raise UsageError("--feature-entropy compares the images of a batch: --batch-size must be at least 2.")
        if self.data_dir is None and self.dataset == "folder":
            raise UsageError("Give the images' folder with --data-dir, or a data set with --dataset hfds/NAME.")
        if self.distill and self.loss != "cross_entropy":
            raise UsageError("--distill has a loss of its own: leave out --loss.")
        if self.distill and self.data_dir and not (self.data_dir / self.train_split).exists():
            if self.out.resolve().is_relative_to(self.data_dir.resolve()):
                raise UsageError(f"--out {self.out} lies among the images: choose a folder outside of {self.data_dir}.")
        if any(parent.exists() and not parent.is_dir() for parent in (self.out, *self.out.parents)):
            raise UsageError(f"--out {self.out} is a file, or below one: choose a folder.")
        for split in (self.train_split, self.val_split):
            if self.data_dir and self.out.resolve().is_relative_to((self.data_dir / split).resolve()):
                raise UsageError(f"--out {self.out} lies among the images of {split!r}: choose a folder outside of it.")

    def _check_names(self) -> None:
        import timm.optim

        prefix, slash, _ = self.dataset.partition("/")
        if self.dataset != "folder" and not (slash and prefix.lower() in _READERS):
            names = ", ".join(f"{reader}/NAME" for reader in _READERS)
            raise UsageError(f"Unknown --dataset {self.dataset!r}: use folder, {names}.")
        optimizers = [str(name) for name in timm.optim.list_optimizers()]
        if self.opt.lower().removeprefix("lookahead_") not in optimizers:
            raise UsageError(
                specs.unknown("--opt", self.opt, optimizers, "timm.optim.list_optimizers() lists the names")
            )
        if self.sched not in _SCHEDULES:
            raise UsageError(specs.unknown("--sched", self.sched, _SCHEDULES, f"use one of {', '.join(_SCHEDULES)}"))
        if self.tracker:
            try:
                version(self.tracker)
            except PackageNotFoundError:
                fix = f"pip install 'timm_etf[{self.tracker}]'"
                raise UsageError(f"--tracker {self.tracker} needs a package that is not installed: {fix}.") from None
