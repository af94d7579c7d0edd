"""`export`: a folder that plain timm loads, with everything needed to restore the fixed classifier."""

import copy
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_etf import frames
from timm_etf.atomic import atomic_folder, file_sha256, require_new_folder, write_json
from timm_etf.classifier import classifier_names, fixed_classifiers, replaced_classifiers
from timm_etf.download import WEIGHTS
from timm_etf.errors import UsageError, one_line
from timm_etf.growing import with_reserved
from timm_etf.heads import mismatch
from timm_etf.hub.card import write_card
from timm_etf.hub.load import FORMAT
from timm_etf.report.results import write as write_results
from timm_etf.variants import HEAD_ARGS, NO_PROVENANCE, base_name


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    tag: str | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
    recipe: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder for the Hub: config.json, model.safetensors, results.json and a card.

    The architecture is timm's plain one and the frame is stored under the plain classifier's own keys, so
    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits without this package. An `etf` block
    at the root of config.json, which plain timm ignores, lets `timm_etf.create_model` restore the frozen classifier.
    Nothing is said of where the base architecture's own weights came from: these weights have their own origin.

    What plain timm cannot give: after feature normalisation its logits are not normalised (the same ranking, other
    confidences); a classifier behind a projector is left out together with the projector, and the export is a backbone
    with `num_classes=0`; a model with switchable whitening (`_sw`) is known only where this package is imported. The
    `etf` block and the card say so.

    Args:
        model: A timm model, with fixed classifiers or a learned one; left as it is.
        folder: Folder to write, new or empty. It appears whole or not at all.
        tag: Name of these weights, after the architecture's dot (`resnet50.TAG`).
        data_config: Preprocessing that the weights were trained for, as `timm.data.resolve_data_config` gives it.
        label_names: Class names in the order of the logits; fewer than these where the others are reserved. By default
            those that the model was loaded with or `timm_etf.grow_classifier` has put together, if it has still as many
            classes. An empty list leaves them out.
        recipe: Training settings, recorded in config.json; JSON values.
        results: Measured numbers, written to results.json; the card is made from that file.
        half: Whether convolutions and linear layers are stored as float16, which halves the file; they are loaded as
            float32. Classifiers, norms, statistics, positions and tokens keep their precision.
        overwrite: Whether a folder that is there already is replaced.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder is not empty, the model was not made by `timm.create_model`, or what should be its
            fixed classifier is a learned one. Nothing is written then.
    """
    folder = Path(folder)
    if not overwrite:
        require_new_folder(folder, "choose another folder, or give overwrite=True")
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or "architecture" not in cfg or not hasattr(model, "num_classes"):
        raise UsageError(
            f"{type(model).__name__} is not a model made by timm.create_model (or is a features_only one), so its "
            "configuration cannot be written."
        )
    for name, fixed in fixed_classifiers(model):
        # Where a client sets tensors one by one, no `load_state_dict` has seen them.
        if wrong := mismatch(fixed.weight, fixed.bias, fixed.frame, cosine=1.0):
            raise UsageError(
                f"{name}.{wrong}, so nothing could restore this fixed classifier. To export it as it is, an ordinary "
                "one: timm_etf.free_classifier(model)."
            )
    if label_names is None:
        known = list(cfg.get("label_names") or ())
        label_names = known if len(known) == model.num_classes else None
    trained = model
    if any(head.projector is not None for _, head in replaced_classifiers(model)):
        model = copy.deepcopy(model)
        model.reset_classifier(0)  # type: ignore[operator]
        label_names = None
    tensors = model.state_dict()
    for name, head in replaced_classifiers(model):
        tensors[f"{name}.weight"] = head.plain_weight()
        tensors.pop(f"{name}.logit_scale", None)
    with atomic_folder(folder) as new:
        # Contiguous, because safetensors refuses channels_last and transposed tensors.
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        if half:
            heads = {f"{name}.weight" for name in classifier_names(model)} if model.num_classes else set()
            # By module: among other tensors are statistics, positions and tokens, which half precision would harm.
            kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
            layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
            tensors |= {k: tensors[k].half() for k in layers & tensors.keys() - heads}
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        etf = _etf_block(trained, file_sha256(new / WEIGHTS), recipe, results)
        write_json(new / "config.json", _config(model, new, tag, data_config, label_names, etf))
        (new / WEIGHTS).chmod((new / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        write_results(new / "results.json", results or {})
        try:
            write_card(new)
        except Exception as e:  # a week's weights are not lost for a page about them
            _logger.warning(f"{folder} has no card ({one_line(e)}); timm_etf.hub.write_card writes it.")
    return folder


_logger = logging.getLogger(__name__)


def _config(
    model: Any,
    folder: Path,
    tag: str | None,
    data_config: dict[str, Any] | None,
    label_names: list[str] | None,
    etf: dict[str, Any] | None,
) -> dict[str, Any]:
    """timm's own config.json, with the plain architecture and without anything only this package understands."""
    own = {**NO_PROVENANCE, "architecture": base_name(model.pretrained_cfg["architecture"]), "tag": tag}
    names = {"label_names": with_reserved(label_names, model.num_classes)} if label_names else {}
    save_config_for_hf(
        model,
        str(folder / "config.json"),
        model_config={"pretrained_cfg": own, **names},
        model_args=dict.fromkeys(HEAD_ARGS),  # a frame may be a tensor or a tree, which timm refuses to write
        data_config=data_config,
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if v is not None}
    # timm's factory records every argument it was given; plain timm does not know the classifier's, and transformers
    # refuses the number of classes here, which timm reads at the root.
    leave_out = {*HEAD_ARGS, "num_classes"}
    config["model_args"] = {k: v for k, v in config.get("model_args", {}).items() if k not in leave_out}
    return config if etf is None else {**config, "etf": etf}


def _etf_block(
    model: nn.Module, sha256: str, recipe: dict[str, Any] | None, results: dict[str, Any] | None
) -> dict[str, Any] | None:
    fixed = dict(fixed_classifiers(model))
    if not fixed:
        return None
    first = next(iter(fixed.values()))
    source = (results or {}).get("source", {})
    return {
        "format": FORMAT,
        "frame": first.frame,
        "seed": first.seed,
        "num_classes": first.out_features,
        "dims": {name: head.in_features for name, head in fixed.items()},
        "coherence": max(frames.coherence(head.weight.flatten(1)) for head in fixed.values()),
        "bound": max(frames.bound(*head.weight.shape[:2]) for head in fixed.values()),
        "logit_scale": first.scale,
        "feature_norm": first.feature_norm,
        "projector": first.projector_kind,
        "origin": {name: head.origin for name, head in fixed.items() if head.origin} or None,
        "taken": first.taken,
        "tree": first.tree and first.tree.record(),
        "weights_sha256": sha256,
        "data": {"name": source.get("data"), "images": source.get("train_images")},
        "recipe": recipe or {},
        "versions": {"timm_etf": version("timm_etf"), "timm": timm.__version__},
    }
