"""`timm-etf convert`: a ready checkpoint under the fixed frame that is nearest to its classifier."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from timm.models import parse_model_name
from torch import Tensor, nn
from tqdm import tqdm

from timm_etf import hub
from timm_etf.atomic import require_new_folder, write_json
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.errors import UsageError, first_line
from timm_etf.frames.nearest import mean_cosine, turned
from timm_etf.hub.load import locate
from timm_etf.loading.loader import Pixels
from timm_etf.losses import divergence
from timm_etf.pretrain import data
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.loop import pretrain
from timm_etf.pretrain.setup import img_size_argument, resolve_data_config
from timm_etf.processes import exact_device, processes
from timm_etf.ready import Start
from timm_etf.report.results import write as write_results
from timm_etf.variants import SUFFIX, base_name

LOOKS, MOST_OF_EACH = 10_000, 20
"""Views of training images that the frame is turned by, and how many of one image at most."""

RECIPE: dict[str, Any] = {
    "opt": "adamw",
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "freeze_bn": True,
    "scale": (0.35, 1.0),
    "color_jitter": 0.2,
    "smoothing": 0.0,
    "export": "best",
}
"""How a backbone is tuned to its new classifier; examples/convert has what else was tried."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Put a ready checkpoint under the fixed frame nearest to its classifier, and tune the backbone to it.

    Without images the classifier is exchanged for the frame nearest to its rows, and nothing else. With images the
    frame is turned until it says most nearly what the classifier said of them; the backbone stays as it is. With
    --epochs it is then tuned: with --images to what the original says, which takes no labels, with --data-dir to the
    labels. OUT/export is what comes out; OUT/turned is what the frame alone has made of it, OUT/tuning the run of
    timm-etf pretrain.
    """

    name: tyro.conf.Positional[str]
    """Checkpoint: resnet50.a1_in1k, hf-hub:ORG/NAME or local-dir:FOLDER."""
    out: Path
    """Folder to write, new or empty (or, with --resume, the one to continue)."""
    images: Path | None = None
    """Folder of images, in any folders below it. A tenth of them, at most 5,000, is held out: on these the answers
    before and after are compared. Folders train and validation are taken as such."""
    data_dir: Path | None = None
    """Folder with train and validation, one folder per class of the checkpoint in each."""
    img_size: int | None = None
    """Image side in pixels; by default the checkpoint's own."""
    epochs: int = 0
    """Passes over the images that tune the backbone, of which the best is kept, if it is better than none."""
    batch_size: int = 32
    """Images of a step."""
    lr: float = 1e-5
    """Peak learning rate of AdamW; several times as much makes a checkpoint forget what the images do not show."""
    amp: Literal["no", "fp16", "bf16"] | None = None
    """Mixed precision; by default what accelerate was launched with."""
    seed: int = 0
    """Seed of the order of the images, of their augmentation and of those that are held out."""
    workers: int = PretrainConfig.workers
    """Loader processes."""
    resume: bool = False
    """Continue in --out."""


def run(settings: Settings) -> str:
    """Convert a checkpoint as `settings` say; returns what came out of it, in a few lines.

    Raises:
        UsageError: For input that cannot work, before anything is written.
        Interrupted: After Ctrl-C or SIGTERM while the backbone is tuned, once a checkpoint is written.
    """
    _check(settings)
    start, model_args = _ready(settings.name)
    model: Any = start.model
    folder, images = settings.out / "export", settings.images or settings.data_dir
    if not images:
        start.fix(model)
        _export(start, folder, {}, None)
        return _summary(settings, folder)
    cfg = model.pretrained_cfg
    config = PretrainConfig(
        model=base_name(cfg["architecture"]) + SUFFIX,
        init=f"local-dir:{(settings.out / 'turned').resolve()}",
        keep_classifier=True,
        distill=settings.name if settings.images else None,
        data_dir=images,
        out=settings.out / "tuning",
        model_kwargs=tuple(f"{name}={value!r}" for name, value in model_args.items()),
        in_chans=cfg["input_size"][0],
        img_size=settings.img_size or cfg["input_size"][-1],
        epochs=max(1, settings.epochs),
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        workers=settings.workers,
        amp=settings.amp,
        resume=settings.resume and (settings.out / "tuning" / "run.json").exists(),
        **RECIPE,
    )
    config.check()
    if sized := img_size_argument(config):
        start = Start(settings.name, **sized)
    with _own_options(settings):
        task = data.open_task(config, model.num_classes if config.distill else None)
    _require_same_classes(settings, model, task)
    begun = settings.out / "convert.json"
    what = {"name": settings.name, "seed": settings.seed, "img_size": config.img_size, "images": task.held_out}
    what |= {"data": str(images.resolve())}
    if not begun.exists():
        _turn(config, start, task, settings.out / "turned", settings.name)
        write_json(begun, what)
    _require_same(begun, what)
    if config.out.exists() and not config.resume:  # killed before its first checkpoint
        shutil.rmtree(config.out)
    if not settings.epochs:
        os.replace(settings.out / "turned", folder)
        return _summary(settings, folder)
    pretrain(config)
    _tell_what_was_before(config.out / "export", settings.out / "turned")
    os.replace(config.out / "export", folder)
    return _summary(settings, folder)


def _check(settings: Settings) -> None:
    if settings.images and settings.data_dir:
        raise UsageError("--images are learned without labels and --data-dir with them: give one of the two.")
    for folder in filter(None, (settings.images, settings.data_dir)):
        if not folder.is_dir():
            raise UsageError(f"No folder {folder}: give one of images.")
    least = 1 if settings.data_dir else 0
    if settings.epochs < least:
        what = "1 or more to learn labels" if least else "0 or more"
        raise UsageError(f"--epochs must be {what}, got {settings.epochs}.")
    if not (settings.images or settings.data_dir) and (settings.epochs or settings.img_size):
        raise UsageError("--epochs and --img-size are for images: give some with --images or --data-dir.")
    for split in ("train", "validation"):
        if settings.data_dir and not (settings.data_dir / split).is_dir():
            fix = "with a folder for each class; --images takes images without labels, in any folders"
            raise UsageError(f"--data-dir {settings.data_dir} needs a folder {split!r}, {fix}.")
    if (settings.out / "export").exists():
        raise UsageError(f"{settings.out} holds a converted checkpoint already: choose another --out.")
    if not settings.resume:
        require_new_folder(settings.out, "continue there with --resume, or choose another --out")
    if processes().num_processes > 1:
        raise UsageError(
            "timm-etf convert runs in one process. To tune on several, launch timm-etf pretrain afterwards, with "
            "--init local-dir:OUT/export --keep-classifier --freeze-bn and, without labels, --distill NAME."
        )


@contextmanager
def _own_options(settings: Settings) -> Iterator[None]:
    """Have the errors of pretraining's data name the option that was given here."""
    try:
        yield
    except UsageError as e:
        raise UsageError(str(e).replace("--data-dir", "--images") if settings.images else str(e)) from None


def _require_same_classes(settings: Settings, model: Any, task: data.Task) -> None:
    if task.num_classes != model.num_classes:
        raise UsageError(
            f"{settings.name} has {model.num_classes} classes and {settings.data_dir} {task.num_classes}: they differ."
        )
    names = model.pretrained_cfg.get("label_names")
    if task.class_names and names and list(names) != task.class_names:
        raise UsageError(f"{settings.data_dir} has other classes, or in another order, than {settings.name} names.")


def _require_same(begun: Path, what: dict[str, Any]) -> None:
    """Refuse to continue with another checkpoint or other images: those held out might have been learned from."""
    recorded = json.loads(begun.read_text(encoding="utf-8"))
    for key, value in what.items():
        if recorded.get(key) != value:
            raise UsageError(
                f"{begun.parent} was begun with {key} {recorded.get(key)}, now it is {value}: choose another --out."
            )


def _ready(name: str) -> tuple[Start, dict[str, Any]]:
    """The weights, and the arguments that their architecture was made with."""
    model_args: dict[str, Any] = {}
    try:
        source = parse_model_name(name)[0]
    except ValueError as e:
        raise UsageError(f"{name} is no name of timm's ({first_line(e)}).") from None
    if source is not None:
        located = locate(name)
        own = ("in_chans", "img_size", "num_classes")  # which are options of their own
        model_args = {k: v for k, v in located.config.get("model_args", {}).items() if k not in own}
        if located.etf:
            raise UsageError(f"{name} is under a fixed frame already: timm_etf.create_model loads it with that.")
    elif not timm.is_model(architecture := name.partition(".")[0]):
        raise UsageError(f"timm knows no {name}: timm.list_pretrained() lists what has weights.")
    elif base_name(architecture) != architecture:
        raise UsageError(f"{name} is a variant with a fixed classifier: name the checkpoint that it is to be made of.")
    start = Start(name)
    if getattr(start.model, "num_classes", 0) < 2:
        raise UsageError(f"{name} has no classifier of two or more classes, so no frame is near to it.")
    return start, model_args


def _turn(config: PretrainConfig, start: Start, task: data.Task, folder: Path, name: str) -> None:
    """Exchange the classifiers, turn their frames by images, and export with how often both agree."""
    model: Any = start.model
    data_config = resolve_data_config(config, model, start)
    task.train.transform, task.val.transform = data.transforms(config, data_config)  # type: ignore[attr-defined]
    data.check_images(task.train, task.val)
    train, val = data.TrainLoader(task.train, config, 0, 1), data.val_loader(task.val, config, 0, 1)
    looks = min(LOOKS, MOST_OF_EACH * train.num_samples)
    device = exact_device(processes().device)
    model.to(device, memory_format=torch.channels_last)
    pixels = Pixels(data_config, device, channels_last=True)
    heads = {n: model.get_submodule(n) for n in classifier_names(model)}
    try:
        features = _features(model, heads, _shown(_views(train, looks), "looking", looks), pixels)
        said = _answers(model, _shown(val, "held out"), pixels)
        start.fix(model)
        exchanged = _agreement(said, _answers(model, val, pixels))
        for n, fixed in fixed_classifiers(model):
            rows_KD = heads[n].weight.detach().flatten(1)
            unit_KD = nn.functional.normalize(fixed.weight.double().flatten(1), dim=1)
            says = partial(nn.functional.linear, weight=rows_KD, bias=heads[n].bias)
            frame_KD, scale = turned(unit_KD, fixed.scale, features[n], says, progress=partial(_BAR, desc="turning"))
            fixed.weight.copy_((scale * frame_KD).reshape(fixed.weight.shape))
            near: dict[str, Any] = {"mean_cosine": round(mean_cosine(rows_KD, frame_KD), 4)}
            if not torch.equal(frame_KD, unit_KD):
                near["turned_on"] = f"{len(features[n])} views of {train.num_samples} images"
            fixed.origin = (fixed.origin or {}) | near
        found = _agreement(said, _answers(model, val, pixels))
    finally:
        train.loader.close()
        val.close()
    about = {
        "data": config.data_dir.name if config.data_dir else None,
        "teacher": name,
        **found,
        "exchanged": exchanged,
    }
    model.cpu()
    _export(start, folder, {"source": about}, data_config)


_BAR = partial(tqdm, leave=False, mininterval=0.2 if sys.stderr.isatty() else 30)


def _shown(batches: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """Pass batches on under a progress bar that counts images."""
    with _BAR(desc=what, total=total, unit="img") as bar:
        for images, targets in batches:
            yield images, targets
            bar.update(len(images))


def _views(train: data.TrainLoader, looks: int) -> Iterator[Any]:
    """Augmented images in batches, in as many passes as it takes."""
    epoch, seen = 0, 0
    while seen < looks:
        for images, targets in train.epoch(epoch):
            yield images, targets
            seen += len(images)
            if seen >= looks:
                return
        epoch += 1


@torch.no_grad()
def _features(model: nn.Module, heads: dict[str, nn.Module], batches: Any, pixels: Pixels) -> dict[str, Tensor]:
    """What enters each classifier, [N, d]; of maps and tokens the mean, which gives the mean of their logits."""
    found: dict[str, list[Tensor]] = {name: [] for name in heads}

    def keep(name: str, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        if x.dim() > 2:
            x = x.flatten(2).mean(2) if isinstance(head, nn.Conv2d) else x.flatten(1, -2).mean(1)
        found[name].append(x.float())

    hooks = [head.register_forward_pre_hook(partial(keep, name)) for name, head in heads.items()]
    for images, _ in batches:
        model(pixels(images))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def _answers(model: nn.Module, batches: Any, pixels: Pixels) -> Tensor:
    return torch.cat([model(pixels(images)).float() for images, _ in batches])


def _agreement(said: Tensor, logits: Tensor) -> dict[str, Any]:
    """How near the second logits, [N, K], are to the first: as `pretrain` validates a model that is taught."""
    answers = said.argmax(dim=1, keepdim=True)
    hits = logits.topk(min(5, logits.shape[1])).indices == answers
    percent = {"top1": hits[:, 0], "top5": hits.any(dim=1)}
    found: dict[str, Any] = {key: 100 * hit.float().mean().item() for key, hit in percent.items()}
    return found | {"loss": divergence(logits, said).mean().item(), "count": len(said)}


def _export(start: Start, folder: Path, results: dict[str, Any], data_config: dict[str, Any] | None) -> None:
    model: Any = start.model
    hub.export(
        model,
        folder,
        data_config=data_config or timm.data.resolve_data_config(model=model),
        results=results,
        overwrite=True,
    )


def _tell_what_was_before(folder: Path, before: Path) -> None:
    """Add to the results of a tuning what the exchange alone had kept."""
    results, earlier = (json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (folder, before))
    results["source"]["exchanged"] = earlier["source"]["exchanged"]
    write_results(folder / "results.json", results)
    hub.write_card(folder)


_UNTRAINED = "epoch-0000-step-000000"
"""Name of the checkpoint that a tuning begins with."""


def _summary(settings: Settings, folder: Path) -> str:
    """What came out, and what to type next."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("source", {})
    near = " and ".join(str(origin["mean_cosine"]) for origin in config["etf"]["origin"].values())
    lines = [f"{settings.name} under a fixed frame ({config['etf']['frame']}), mean cosine with its classifier {near}"]
    if source.get("teacher"):
        stages = [("exchanged", source["exchanged"]), ("frame turned", source.get("before", source))]
        tuned = "before" in source and not source["exported"].endswith(_UNTRAINED)
        stages += [("backbone tuned", source)] if tuned else []
        shown = ", ".join(f"{stage} {found['top1']:.1f} %" for stage, found in stages)
        lines.append(f"same answer on {source['count']} held-out images: {shown}")
        if "before" in source and not tuned:
            lines.append("tuning the backbone kept no more of them, so it is left as it was")
    elif source:
        before = f"frame turned {source['before']['top1']:.1f} %"
        lines.append(f"top-1 on {source['count']} images: {before}, backbone tuned {source['top1']:.1f} %")
    lines.append(f"model: {folder}")
    if source:
        lines.append(f"next:  timm-etf transfer --models local-dir:{folder} {settings.name} --targets DATA --out OUT")
    else:
        lines.append(f"next:  timm-etf convert {settings.name} --images FOLDER --out OUT   # keeps more of its answers")
    return "\n".join(lines)
