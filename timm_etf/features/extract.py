"""Features of every image of a split, from any timm model, kept on disk so that they are computed once."""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import timm.data
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_etf.atomic import atomic_file, write_json
from timm_etf.data.images import Images
from timm_etf.embedding import weights_hash
from timm_etf.errors import UsageError, first_line
from timm_etf.processes import any_problem, processes

CHUNK = 1024
"""Images in a file. It bounds the memory of an extraction, and what a kill in the middle of one loses."""

PRE_LOGITS = "pre_logits"
"""Pooled features as the classifier receives them; where it has a projector, before that."""

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Features:
    """Features and labels of one split.

    Attributes:
        x: Features, float32 of shape [n, d].
        y: Class numbers, int64 of shape [n].
        class_names: Class names by number.
        unreadable: Images that could not be read and are not among the n.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    class_names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """What to extract: the pre-logits, and `depths` layers before them, evenly spaced over the network."""

    depths: int = 0

    def names(self, model: nn.Module) -> tuple[list[str], list[int]]:
        """Names of the layers from the input to the pre-logits, and timm's indices of the intermediate ones."""
        if self.depths == 0:
            return [PRE_LOGITS], []
        intermediates = getattr(model, "forward_intermediates", None)
        if intermediates is None:
            raise UsageError(f"{type(model).__name__} gives no intermediate features: leave --depths out for it.")
        count = len(model.feature_info)  # type: ignore[arg-type]
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(self.depths, count))})
        return [f"{i + 1} of {count}" for i in chosen] + [PRE_LOGITS], chosen


def identity(model: nn.Module, weights: str | None = None) -> dict[str, Any]:
    """What a timm model computes: equal identities give equal logits and features.

    Args:
        model: A timm model.
        weights: SHA-256 of its weights' file, if they are from one; else its tensors are hashed.
    """
    transform = timm.data.resolve_data_config(model=model)
    # Arguments such as a pooling or a stride change neither the names nor the shapes of the weights. timm records
    # those that it was given; a later change of a module shows in the structure.
    arguments = {k: repr(v) for k, v in sorted(getattr(model, "_model_args", {}).items())}
    return {
        "model": (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__,
        "arguments": arguments,
        "structure": hashlib.sha256(repr(model).encode()).hexdigest(),
        "weights": weights or weights_hash(model),
        "transform": {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(transform.items())},
        "timm": timm.__version__,
    }


def key_hash(value: dict[str, Any]) -> str:
    """Name of a key's folder."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@torch.inference_mode()
def extract(
    model: nn.Module,
    images: Images,
    folder: Path,
    *,
    layers: Layers | None = None,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    workers: int = 2,
    made_from: dict[str, Any] | None = None,
) -> Path:
    """Compute the features of a split into safetensors files, unless they are there.

    Images go through the model's own evaluation transform, from its `pretrained_cfg`. Every `CHUNK` images are one
    file, written whole; a stopped extraction continues at the first file that is missing. Under accelerate's launcher
    the processes share the files between them.

    Args:
        model: A timm model, on the device to compute on; put into evaluation mode.
        images: The split.
        folder: Cache; the features get a folder of their own in it, named by what they depend on.
        layers: What to extract; by default the pre-logits.
        precision: Of the model's computations; features are stored as float32.
        batch_size: Images per forward pass; by default 256, on a CPU 64.
        workers: Loader processes.
        made_from: `identity(model)`, if known.

    Returns:
        The features' folder, for `load`.

    Raises:
        UsageError: If features are not finite or no image can be read.
    """
    layers = layers or Layers()
    made_from = {
        **(made_from or identity(model)),
        "images": images.fingerprint,
        "layers": layers.names(model)[0],
        "precision": precision,
    }
    out = folder / key_hash(made_from)
    state = processes()
    if _is_whole(out):
        return out
    out.mkdir(parents=True, exist_ok=True)
    chunks = [range(i, min(i + CHUNK, len(images))) for i in range(0, len(images), CHUNK)]
    todo = [c for c in chunks[state.process_index :: state.num_processes] if not _chunk_file(out, c).exists()]
    problem = ""
    try:
        for chunk, tensors, about in _compute(model.eval(), images, todo, layers, precision, batch_size, workers):
            with atomic_file(_chunk_file(out, chunk)) as new:
                save_file(tensors, new, metadata={"about": json.dumps(about)})
    except Exception as e:
        if state.num_processes == 1:
            raise
        problem = f"{type(e).__name__}: {first_line(e)}"
    if problem := any_problem(problem):
        raise UsageError(problem)
    abouts = [_about(_chunk_file(out, c)) for c in chunks]
    if bad := sum(a["not_finite"] for a in abouts):
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(out)
        raise UsageError(
            f"{bad} of {len(images)} images of {images.name} have features that are not finite: the model's weights "
            f"are damaged or diverged{'' if precision == 'fp32' else f', or {precision} is too narrow for it'}."
        )
    unreadable = [u for a in abouts for u in a["unreadable"]]
    if len(unreadable) == len(images):
        raise UsageError(f"None of the {len(images)} images of {images.name} can be read: {unreadable[0]}.")
    if state.is_main_process:
        about = {"class_names": list(images.class_names), "unreadable": unreadable, "made_from": made_from}
        write_json(out / "features.json", about)
    state.wait_for_everyone()
    return out


def _is_whole(out: Path) -> bool:
    """Whether the features are there; asked by all processes before any of them can write the last file."""
    found = (out / "features.json").exists()
    if processes().num_processes > 1:
        found = all(gather_object([found]))
    return found


def _chunk_file(folder: Path, chunk: range) -> Path:
    return folder / f"{chunk.start:09d}.safetensors"


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])


def layer_names(folder: Path) -> list[str]:
    """Layers whose features are in a folder that `extract` filled, from the input to the pre-logits."""
    return json.loads((folder / "features.json").read_text(encoding="utf-8"))["made_from"]["layers"]


def load(folder: Path, layer: str = PRE_LOGITS) -> Features:
    """Read what `extract` wrote.

    Args:
        folder: What `extract` returned.
        layer: One of `layer_names(folder)`.

    Returns:
        The features of all readable images, in the order of the split.
    """
    about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    count = sum(len(y) for _, y in _files(folder, "label"))
    x, labels, at = np.empty(0, np.float32), np.empty(count, np.int64), 0
    for x_file, y_file in stream(folder, layer):
        if not at:  # allocated once, because a list of pieces and their concatenation take the memory twice
            x = np.empty((count, x_file.shape[1]), np.float32)
        x[at : at + len(y_file)], labels[at : at + len(y_file)] = x_file, y_file
        at += len(y_file)
    return Features(x, labels, tuple(about["class_names"]), tuple(about["unreadable"]))


def stream(folder: Path, layer: str = PRE_LOGITS) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """What `extract` wrote, one file after the other: features and labels; a file without a readable image is none."""
    return ((x, y) for x, y in _files(folder, layer) if len(y))


def _files(folder: Path, name: str) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            yield file.get_tensor(name), file.get_tensor("label")


def features_of(model: nn.Module, images: Images, **kwargs: Any) -> Features:
    """Pre-logits of a split, without keeping them on disk; takes what `extract` takes."""
    with tempfile.TemporaryDirectory() as folder:
        return load(extract(model, images, Path(folder), **kwargs))


class _Decoded(Dataset[Any]):
    """Transformed images, or why there is none."""

    def __init__(self, images: Images, transform: Any, mode: str) -> None:
        self.images, self.transform, self.mode = images, transform, mode

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.transform(self.images.read(index, self.mode)), ""
        except Exception as e:  # a decoder may raise anything on hostile bytes
            return index, None, f"{self.images.where(index)} ({first_line(e)})"


def _collate(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list[str]]:
    read = [(index, image) for index, image, _ in items if image is not None]
    return (
        [index for index, _ in read],
        torch.stack([image for _, image in read]) if read else None,
        [problem for _, image, problem in items if image is None],
    )


def _compute(
    model: nn.Module,
    images: Images,
    chunks: list[range],
    layers: Layers,
    precision: Precision,
    batch_size: int | None,
    workers: int,
) -> Iterator[tuple[range, dict[str, Tensor], dict[str, Any]]]:
    """Tensors of one chunk after the other, and what is to be said about them."""
    data_config = timm.data.resolve_data_config(model=model)
    decoded = _Decoded(
        images, timm.data.create_transform(**data_config), "L" if data_config["input_size"][0] == 1 else "RGB"
    )
    device = next(model.parameters()).device
    size = batch_size or (64 if device.type == "cpu" else 256)
    batches = [list(c[i : i + size]) for c in chunks for i in range(0, len(c), size)]
    # The order that convolutions prefer; weights follow the images.
    fast = device.type == "cpu" or precision != "fp32"
    order = torch.channels_last if fast else torch.contiguous_format
    loader: DataLoader[Any] = DataLoader(
        decoded,
        batch_sampler=batches,
        num_workers=workers if len(batches) > 1 else 0,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = partial(torch.autocast, device.type, dtype=types[precision]) if precision != "fp32" else nullcontext
    names, indices = layers.names(model)
    bar = tqdm(
        total=sum(map(len, chunks)),
        desc=f"features of {images.name}",
        unit="img",
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file needs no more
        disable=not processes().is_main_process,
    )
    chunk_of = {c.start // CHUNK: c for c in chunks}
    rows: list[Tensor] = []
    kept: list[int] = []
    unreadable: list[str] = []
    with bar:
        for batch, (index, pixels, problems) in zip(batches, loader, strict=True):
            if pixels is not None:
                with autocast():
                    pooled = _pooled(model, pixels.to(device, non_blocking=True, memory_format=order), indices)
                rows.append([p.float().cpu() for p in pooled])  # type: ignore[arg-type]
            kept += index
            unreadable += problems
            bar.update(len(batch))
            chunk = chunk_of[batch[0] // CHUNK]
            if batch[-1] + 1 == chunk.stop:
                tensors = {
                    n: torch.cat([r[i] for r in rows]) if rows else torch.empty(0, 0) for i, n in enumerate(names)
                }
                bad = torch.stack([~t.isfinite().all(1) for t in tensors.values()]).any(0).sum().item()
                tensors["label"] = torch.from_numpy(images.labels[kept])
                yield chunk, tensors, {"unreadable": unreadable, "not_finite": bad}
                rows, kept, unreadable = [], [], []


def _pooled(model: Any, pixels: Tensor, indices: list[int]) -> list[Tensor]:
    """Features of a batch, [n, d] each: spatial means of the intermediate maps, then the pre-logits."""
    if not indices:
        return [model.forward_head(model.forward_features(pixels), pre_logits=True).flatten(1)]
    last, maps = model.forward_intermediates(pixels, indices=indices)
    return [m.mean((2, 3)) for m in maps] + [model.forward_head(last, pre_logits=True).flatten(1)]
