"""FSDP2: weights, gradients and optimizer state in shards over the processes, for models that one device cannot hold.

A frame is a buffer, and PyTorch shards parameters: it stays whole on every process, and is never sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from timm_etf.errors import UsageError
from timm_etf.pretrain.config import PretrainConfig


def check(config: PretrainConfig, accelerator: Accelerator) -> None:
    """Refuse what shards cannot do.

    Raises:
        UsageError: With the option to change.
    """
    if accelerator.num_processes == 1:
        raise UsageError("--fsdp divides a model among processes, and this is the only one: leave it out.")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UsageError(f"--fsdp computes in float32 or bf16, not {accelerator.mixed_precision}: use --amp bf16.")
    if config.opt.lower().startswith("lookahead_"):
        raise UsageError(f"--fsdp cannot resume --opt {config.opt} exactly: leave out lookahead_.")
    refused = {"--model-ema": config.model_ema, "--clip-mode agc": config.clip_mode == "agc"}
    if asked := [option for option, given in refused.items() if given]:
        raise UsageError(f"--fsdp does not go with {asked[0]}, which needs whole weights: leave one out.")


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Divide the parameters of a model among the processes: each block by itself, and what is left together.

    Args:
        model: A timm model on the processes' device; changed in place.
        accelerator: The processes and their precision.

    Raises:
        Exception: PyTorch's, of several kinds, for a parameter that is a single number or belongs to several blocks.
    """
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other; images can still be channels-last
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = _precision(model, accelerator)
    for module in [*reversed(list(blocks(model))), model]:  # inner ones before those around them
        fully_shard(module, mesh=mesh, mp_policy=policy)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What a model repeats: members with parts of their own of its sequences and lists, outer ones first."""
    containers = (nn.Sequential, nn.ModuleList)
    for group in model.modules():
        if isinstance(group, containers):
            for member in group:
                if any(member.children()) and any(True for _ in member.parameters()) and type(member) not in containers:
                    yield member


def _precision(model: nn.Module, accelerator: Accelerator) -> MixedPrecisionPolicy:
    """Weights travel in the precision of the computation, gradients in float32."""
    # BatchNorm takes no weights of less precision than its statistics: there autocast converts what has arrived.
    if accelerator.mixed_precision == "no" or any(isinstance(m, _BatchNorm) for m in model.modules()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def try_optimizer(config: PretrainConfig, accelerator: Accelerator) -> None:
    """Make two steps with the optimizer on a small layer in shards, which not every one can; called on every process.

    Raises:
        Exception: PyTorch's, of several kinds.
    """
    layer = nn.Linear(256, 256, device=accelerator.device)  # some optimizers treat large weights in another way
    shard(layer, accelerator)
    optimizer = create_optimizer_v2(layer, opt=config.opt, **config.parsed_opt_kwargs)
    for _ in range(2):
        layer(torch.ones(2, 256, device=accelerator.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    get_state_dict(layer, optimizer)


def compiled(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A sharded model as accelerate would compile it, if it is asked to."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend.value == "NO":
        return model
    optimized: Any = torch.compile(model, **plugin.to_kwargs())
    return optimized


def keep_in_checkpoints(model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
    """Have accelerate's checkpoints hold the shards of a model and of its optimizer's state."""

    def save(models: Any, whole: Any, folder: str) -> None:
        weights, state = get_state_dict(model, optimizer)
        with _plain_errors():
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / "shards")

    def load(models: Any, folder: str) -> None:
        weights, state = get_state_dict(model, optimizer)
        with _plain_errors():
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / "shards")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong, such as a full disk, instead of PyTorch's table of it, which is no `Exception`."""
    try:
        yield
    except dcp.CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None


def gathered(model: nn.Module) -> dict[str, Any]:
    """The whole weights of a sharded model, on the CPU of the main process; called on every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def in_step(model: nn.Module, batches: Any, accelerator: Accelerator, shape: tuple[int, ...]) -> Iterator[Any]:
    """Batches for a forward pass in which all processes take part, as they do with a sharded model.

    Args:
        model: The model; one without shards gets the batches as they are.
        batches: Images [B, C, H, W] and targets [B] of this process, not as many as of the others.
        accelerator: The processes.
        shape: [C, H, W] of an image.

    Yields:
        A batch for each; on a process that has run out a blank image without a target.
    """
    if not isinstance(model, FSDPModule):
        yield from batches
        return
    for batch in chain(batches, repeat(None)):
        left = torch.tensor([int(batch is not None)], device=accelerator.device)
        if not accelerator.gather(left).any():
            return
        yield batch or (torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
