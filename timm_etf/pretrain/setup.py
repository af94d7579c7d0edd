"""What a run needs before its first step, made and tried out before anything is written."""

import copy
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, gather_object, parse_flag_from_env, set_seed
from PIL import Image
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, random_seed
from torch import nn

from timm_etf.atomic import require_new_folder, write_json, write_text
from timm_etf.classifier import fixed_classifiers
from timm_etf.errors import UsageError, first_line
from timm_etf.frames import ClassTree
from timm_etf.loading.loader import Loader, Pixels
from timm_etf.pretrain import checkpoint, data, recipe, sharding, warm_frame
from timm_etf.pretrain.checkpoint import Position
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.objective import Objective
from timm_etf.pretrain.optimizer import optimizer_of, schedule_of
from timm_etf.pretrain.step import Step
from timm_etf.ready import Start, create_on_all, same_for_all, teacher
from timm_etf.variants import HEAD_ARGS, base_name


@dataclass
class Run:
    """The parts of a run, ready to train."""

    config: PretrainConfig
    settings: dict[str, Any]
    accelerator: Accelerator
    step: Step
    train: data.TrainLoader
    val: Loader
    data_config: dict[str, Any]
    """timm's preprocessing, exported with the weights."""
    class_names: list[str] | None
    tree: ClassTree | None
    position: Position
    old: int = 0
    """How many of the classes, the first, the weights that it started from knew, where there are others now."""
    on_record: bool = False

    @property
    def plain_model(self) -> nn.Module:
        """The model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.step.model, keep_torch_compile=False)

    def exported_model(self) -> nn.Module:
        """What is validated and exported, on the CPU: the average of the weights, where the run has one.

        Called on every process, for it may have to be gathered; only the main one is given all of it.
        """
        if not self.config.fsdp:
            return (self.step.ema.module if self.step.ema else self.plain_model).cpu()
        weights = sharding.gathered(self.plain_model)
        model = _create_model(self.config, self.settings["frame_seed"], self.settings["num_classes"], self.tree)
        if weights:
            model.load_state_dict(weights)
        return model

    @property
    def images_per_batch(self) -> int:
        """Images of a forward pass over all processes."""
        return self.config.batch_size * self.accelerator.num_processes

    def batches_of(self, step: int) -> int:
        """Forward passes of an epoch's step, on each process: the last step takes those that are left."""
        return min(self.config.grad_accum_steps, self.train.batches_per_epoch - step * self.config.grad_accum_steps)

    def record(self) -> None:
        """Write run.json and start the tracker; not before the first step or validation has worked."""
        if self.on_record:
            return
        self.on_record = True
        out, model = self.config.out, self.plain_model
        if self.accelerator.is_main_process:
            packages = ("timm_etf", "torch", "timm", "accelerate", "safetensors", "huggingface_hub")
            record = {
                "settings": self.settings,
                "data_config": self.data_config,
                "train_images": self.train.num_samples,
                "steps_per_epoch": self.train.steps_per_epoch,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "fixed_classifiers": [name for name, _ in fixed_classifiers(model)],
                "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
            }
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "run.json", record)
            recipe.write(self.config, out / "config.yaml")
            if self.config.data_dir and (licenses := self.config.data_dir / "LICENSES.md").exists():
                write_text(out / "DATA_LICENSES.md", licenses.read_text(encoding="utf-8"))
        if self.config.tracker:
            self.accelerator.init_trackers("timm_etf", config={k: str(v) for k, v in self.settings.items()})

    def close(self) -> None:
        """End the loaders' processes."""
        self.train.loader.close()
        self.val.close()


def setup(config: PretrainConfig) -> Run:
    """Open the data, build and try out the model and what trains it, and continue from a checkpoint.

    Every process does so, and finds what is wrong by itself, but in what the main one does for all.

    Args:
        config: The run's settings.

    Returns:
        The run, of which nothing is written yet.

    Raises:
        UsageError: For settings or data that cannot work.
    """
    config.check()
    warm_frame.check(config)
    if not config.resume:
        require_new_folder(config.out, "continue that run with --resume, or choose another --out")
    accelerator = _accelerator(config)
    start = _start(config, accelerator)
    taught = teacher(config.distill, in_chans=config.in_chans, **img_size_argument(config)) if config.distill else None
    first = start.class_names if start and config.keep_classifier else []
    task = data.open_on_all(config, getattr(taught, "num_classes", None), first)
    names = taught.pretrained_cfg.get("label_names") if taught else task.class_names
    tree = data.class_tree(config, names)
    settings = checkpoint.fingerprint(config, task.num_classes, accelerator.num_processes, task.held_out)
    settings["hierarchy"] = tree and tree.sha256  # the file may have moved, or changed
    if config.resume:
        checkpoint.check_resume(config.out, settings)
    set_seed(config.seed)
    create = partial(_create_model, config, settings["frame_seed"], task.num_classes, tree, start)
    model = create_on_all(create, accelerator)
    channels_last = _arrange_for_speed(model, taught, config, accelerator)
    objective, mixup = Objective(config, model, taught), data.mixup(config, task.num_classes)
    data_config = resolve_data_config(config, model, start)
    if taught:
        _require_same_pixels(taught, data_config, config)
    with _blaming("--auto-augment and the other options of the images"):
        transforms = data.transforms(config, data_config)
        images = _blank_batch(config, *transforms)
    task.train.transform, task.val.transform = transforms  # type: ignore[attr-defined]
    train = data.TrainLoader(task.train, config, accelerator.process_index, accelerator.num_processes)
    val = data.val_loader(task.val, config, accelerator.process_index, accelerator.num_processes)
    with _blaming("--img-size, --batch-size and --model-kwargs"):
        batch = Pixels(data_config, torch.device("cpu"))(images), torch.arange(len(images))
        # In a copy, because it changes the model's statistics.
        objective(copy.deepcopy(model).train(), *(mixup(*batch) if mixup else batch))
    _require_same_frames(model)
    model, ema = _arrange(model, config, accelerator)
    with _blaming("--opt"):
        optimizer = optimizer_of(model, config)
    if config.fsdp:
        with _blaming("--opt, which --fsdp makes work on shards"):
            sharding.try_optimizer(config, accelerator)
    with _blaming("--sched and --sched-kwargs"):
        schedule = schedule_of(optimizer, config, train.steps_per_epoch)
    if accelerator.is_main_process and not config.resume:  # a run that has begun has checked them
        data.check_images(task.train, task.val)
    # The weights are the same on every process; what is random in training (dropout, mixup) must not be.
    random_seed(config.seed, accelerator.process_index)
    if config.fsdp:
        sharding.keep_in_checkpoints(model, optimizer, accelerator)
        model = sharding.compiled(model, accelerator)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    pixels = Pixels(data_config, accelerator.device, channels_last=channels_last, reprob=config.reprob)
    step = Step(config, accelerator, model, optimizer, schedule, objective, pixels, mixup, ema)
    position = checkpoint.load_newest(accelerator, config.out) if config.resume else Position()
    old = len(first) if len(first) < len(task.class_names or ()) else 0
    return Run(config, settings, accelerator, step, train, val, data_config, names, tree, position, old)


def _accelerator(config: PretrainConfig) -> Accelerator:
    """accelerate's view of this process, if the launcher asks for nothing that training does not do."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UsageError(
                f"The launcher asks for {name}, which pretraining cannot do: switch it off in accelerate config, or "
                "launch with torchrun; for models that no GPU holds alone there is --fsdp."
            )
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        # accelerate sets the address for several processes, but starts one unless it is told of an MPI.
        print(
            "warning: accelerate launched a single process; several on the CPU need --mpirun_hostfile, or "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node N -m timm_etf.pretrain ...",
            file=sys.stderr,
        )
    folder = str(config.out) if config.tracker else None
    with _blaming("--amp and accelerate config"):
        accelerator = Accelerator(
            mixed_precision=config.amp,
            log_with=config.tracker,
            project_dir=folder,
        )
        # Set after all: an Accelerator leaves it as an earlier one of this process had it.
        accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="inductor" if config.compile else None)
    if config.fsdp:
        sharding.check(config, accelerator)
    if config.sync_bn and accelerator.device.type == "cpu":
        raise UsageError("--sync-bn needs GPUs: PyTorch has no BatchNorm over processes for CPUs.")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise UsageError(
            f"The launcher asks for gradient_accumulation_steps {steps}: set it to 1 there, and use "
            f"--grad-accum-steps {steps}, which is recorded with the run."
        )
    return accelerator


@contextmanager
def _blaming(options: str) -> Iterator[None]:
    """Turn any error of a library into one line that names the options it comes from."""
    try:
        yield
    except UsageError:
        raise
    except Exception as e:  # timm, torch and PIL each have their own kinds
        raise UsageError(f"These settings cannot work ({type(e).__name__}: {first_line(e)}): check {options}.") from e


def _start(config: PretrainConfig, accelerator: Accelerator) -> Start | None:
    """Weights to start from; a run that has checkpoints needs them no more, but for the classifier's origin."""
    resumed = config.resume and checkpoint.all_of(config.out)
    if not config.initial_weights or (resumed and not config.keep_classifier):
        return None
    start = Start(config.initial_weights, in_chans=config.in_chans, **img_size_argument(config))
    heads = fixed_classifiers(start.model) if start.model else ()
    if not config.keep_classifier and any(h.taken for _, h in heads) and accelerator.is_main_process:
        print(
            f"warning: {config.initial_weights} has vectors reserved for further classes, and this run begins with a "
            "classifier of its own: --keep-classifier goes on under the one that is there.",
            file=sys.stderr,
        )
    return start


def _create_model(
    config: PretrainConfig, frame_seed: int, num_classes: int, tree: ClassTree | None, start: Start | None = None
) -> nn.Module:
    kwargs, name = config.parsed_model_kwargs | ({"frame": tree} if tree else {}), config.architecture
    keep = config.keep_classifier and start
    fixed = name != base_name(name)
    if kwargs.get("frame") == "nearest":
        raise UsageError(
            "--model-kwargs frame=nearest: use --init with --keep-classifier, which is near to the one that is there."
        )
    # A frame near to a classifier takes its place once it has its weights.
    head_args = {k: kwargs.pop(k) for k in HEAD_ARGS if k in kwargs} if fixed and keep else {}
    if head_args.get("frame", "learned") != "learned":
        raise UsageError("--keep-classifier fixes the frame that is nearest to it: leave out --model-kwargs frame=.")
    if fixed and not keep:
        kwargs["frame_seed"] = frame_seed
    if config.frame_from_means is not None:
        kwargs["frame"] = "learned"
    try:
        model = timm.create_model(
            base_name(name) if keep else name,
            num_classes=num_classes,
            in_chans=config.in_chans,
            **img_size_argument(config),
            **kwargs,
        )
        if start:
            start.give(model, classifier=bool(keep))
        model = start.fix(model, **head_args) if start and keep and fixed else model
        for _, head in fixed_classifiers(model):
            head.taken = num_classes - config.reserve if config.reserve else None
        return warm_frame.as_saved(model, config)
    except UsageError as e:
        raise UsageError(f"{name}: {e}") from None
    except Exception as e:  # an argument that this architecture does not take, or a value that some layer refuses
        raise UsageError(f"{name}: {first_line(e).rstrip('.')}. Check --model-kwargs.") from e


def _arrange_for_speed(
    model: nn.Module, taught: nn.Module | None, config: PretrainConfig, accelerator: Accelerator
) -> bool:
    """What changes how the models compute but not what; returns whether images are in channels-last order.

    By default they are where convolutions are fast in it (tests/benchmarks/channels_last.py), and most of the layers.
    """
    if config.grad_checkpointing:
        with _blaming("--grad-checkpointing"):
            model.set_grad_checkpointing(True)  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in layers)
    channels_last = config.channels_last
    if channels_last is None:
        fast = accelerator.device.type == "cpu" or accelerator.mixed_precision != "no"
        channels_last = 2 * convolutions > len(layers) and fast
    for each in filter(None, (model, taught)):
        if channels_last:
            each.to(memory_format=torch.channels_last)
    return channels_last


def _arrange(model: nn.Module, config: PretrainConfig, accelerator: Accelerator) -> tuple[nn.Module, ModelEmaV3 | None]:
    """Statistics over processes, an average, shards: all before accelerate puts anything around the model."""
    if config.sync_bn:
        model = convert_sync_batchnorm(model)
    ema = None
    if config.model_ema:
        ema = ModelEmaV3(model.to(accelerator.device), decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        accelerator.register_for_checkpointing(ema)
    if config.fsdp:
        with _blaming("--fsdp and --model-kwargs"):
            sharding.shard(model.to(accelerator.device), accelerator)
    return model, ema


def img_size_argument(config: PretrainConfig) -> dict[str, Any]:
    """`img_size` for the architectures whose input size is fixed when they are built; the others take any."""
    cfg = timm.get_pretrained_cfg(config.architecture)
    return {"img_size": config.img_size} if config.img_size and cfg is not None and cfg.fixed_input_size else {}


def _require_same_pixels(taught: Any, data_config: dict[str, Any], config: PretrainConfig) -> None:
    """Both look at the same normalised images."""
    for option in ("mean", "std"):
        theirs = same_for_all(taught.pretrained_cfg[option], config.in_chans)
        if theirs != tuple(data_config[option]):
            values = " ".join(map(str, theirs))
            raise UsageError(f"{config.distill} was trained on images of another {option}: use --{option} {values}.")


def resolve_data_config(config: PretrainConfig, model: nn.Module, start: Start | None) -> dict[str, Any]:
    """timm's preprocessing of this model, or of the weights it starts from, with the run's changes."""
    if config.resume:  # the weights may be gone since
        recorded = json.loads((config.out / "run.json").read_text(encoding="utf-8")).get("data_config")
        if recorded:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
    size = {"input_size": (config.in_chans, config.img_size, config.img_size)} if config.img_size else {}
    changes = {"mean": config.mean, "std": config.std, "crop_pct": config.crop_pct, **size}
    given = {k: v for k, v in changes.items() if v is not None}
    resolved = timm.data.resolve_data_config(
        {**(start.data_config(config.in_chans) if start else {}), **given}, model=model
    )
    resolved["input_size"] = (config.in_chans, *resolved["input_size"][1:])
    for option in ("mean", "std"):
        resolved[option] = same_for_all(resolved[option], config.in_chans)
    return resolved


def _blank_batch(config: PretrainConfig, train: Any, val: Any) -> torch.Tensor:
    """Two blank images as training sees them (one, if its batches are of one)."""
    blank = Image.new("L" if config.in_chans == 1 else "RGB", (64, 64))
    val(blank)
    return torch.stack([train(blank) for _ in range(min(2, config.batch_size))])


def _require_same_frames(model: nn.Module) -> None:
    """Processes on machines of different kinds may compute different spherical codes, and frames are not exchanged."""
    heads = [head for _, head in fixed_classifiers(model)]
    mine = []
    for head in heads:
        w_KD = head.weight.double().flatten(1)
        # Unlike the plain sum over classes, which is zero for every simplex, this tells frames apart.
        mine += (torch.linspace(0, 1, len(w_KD), dtype=torch.float64) @ w_KD / w_KD[0].norm()).tolist()
    for other in gather_object([mine]):
        if not torch.allclose(torch.tensor(other), torch.tensor(mine), rtol=0, atol=1e-3):
            fix = "install the same versions of torch and timm_etf on all machines"
            if any(head.frame == "spherical_code" for head in heads):
                fix = "copy one machine's huggingface_hub assets cache (HF_ASSETS_CACHE) to the others"
            raise UsageError(f"The processes have computed different frames: {fix}.")
