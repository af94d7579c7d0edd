"""`create_model`: timm's, plus the frozen head that a published folder's `etf` block describes."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import parse_model_name
from timm.models._hub import download_from_hf
from torch import nn

from timm_etf import frames
from timm_etf.classifier import classifier_names, fix_classifier, place
from timm_etf.errors import UsageError
from timm_etf.heads import FixedClassifier

FORMAT = 1
"""Version of the `etf` block this package writes; it reads this one and older."""


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model as `timm.create_model` does, and restore the fixed classifier it was trained under.

    A folder or Hub repository written by `timm_etf.hub.export` holds an ordinary timm architecture whose classifier
    weight is the frame, and an `etf` block in its `config.json`. Plain timm ignores the block and gives the same logits
    from a trainable classifier; this function reads it and freezes the classifier again, bit for bit.

    Args:
        model_name: `"hf-hub:org/name"`, `"local-dir:folder"`, or any timm name.
        pretrained: Whether to load the weights.
        **kwargs: Everything else `timm.create_model` takes. With another `num_classes` than the published one there is
            no frame to restore: the model gets timm's fresh trainable classifier (or none, for 0).

    Returns:
        The model.

    Raises:
        UsageError: If the folder has no readable `config.json`, its `etf` block is from a newer version, or its
            classifier weight is not the frame that the block promises.
    """
    source, path = parse_model_name(model_name)
    if source is None:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    etf = _etf_block(source, path, kwargs.get("cache_dir"))
    model = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    if etf is None or kwargs.get("features_only") or getattr(model, "num_classes", 0) != etf["num_classes"]:
        return model
    if etf["projector"] is not None:  # it was left out, and the frame was not in the backbone's own features
        return model
    norm = etf["feature_norm"]
    if not pretrained:
        seed = etf["seed"] or 0  # a frame of unknown rotation is as good under any other
        return fix_classifier(model, etf["frame"], seed, logit_scale=etf["logit_scale"], feature_norm=norm)
    fixed = {}
    for name in classifier_names(model):
        head: Any = model.get_submodule(name)
        is_frame = frames.matches(head.weight.flatten(1), etf["frame"], etf["coherence"])
        if not is_frame or (head.bias is not None and head.bias.any()):
            raise UsageError(
                f"{model_name}: config.json promises a fixed {etf['frame']} classifier, but the weights of {name!r} "
                "are not one. Download or export the model again, or use timm.create_model to load it as it is."
            )
        fixed[name] = FixedClassifier(
            head.weight, bias=head.bias is not None, frame=etf["frame"], seed=etf["seed"], feature_norm=norm
        )
    return place(model, fixed)


def _etf_block(source: str, path: str, cache_dir: str | Path | None) -> dict[str, Any] | None:
    """The `etf` block of a source's config.json, or None if it has none."""
    name = f"{source}:{path}"
    try:
        config_path = (
            download_from_hf(path, "config.json", cache_dir=cache_dir)
            if source == "hf-hub"
            else Path(path) / "config.json"
        )
    except Exception as e:  # huggingface_hub has many: no such repository, no access, no network, not in the cache
        raise UsageError(
            f"Cannot get config.json of {name} ({type(e).__name__}: {_first_line(e)}). Check the name, your login "
            "and the network."
        ) from e
    try:
        config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"{name} has no readable config.json ({_first_line(e)}): is it an exported folder?") from None
    if not isinstance(config, dict) or "architecture" not in config:
        raise UsageError(f"The config.json of {name} has no 'architecture': it is not one of timm's.")
    etf = config.get("etf")
    if etf is not None:
        _check_block(etf, name)
    return etf


def _check_block(etf: Any, name: str) -> None:
    """Refuse an `etf` block that another version wrote or that was damaged."""
    if isinstance(etf, dict) and isinstance(etf.get("format"), int) and etf["format"] > FORMAT:
        raise UsageError(
            f"{name} was written by a newer timm_etf (etf format {etf['format']}, this version reads up to "
            f"{FORMAT}): pip install --upgrade timm_etf"
        )
    types: dict[str, Any] = {"format": int, "frame": str, "seed": int | None, "num_classes": int, "coherence": float}
    types |= {"logit_scale": float, "feature_norm": bool, "projector": str | None}
    wrong = [k for k, t in types.items() if not isinstance(etf, dict) or k not in etf or not isinstance(etf[k], t)]
    if wrong or etf["frame"] not in frames.FRAMES:
        raise UsageError(
            f"The etf block in the config.json of {name} is damaged (see {(wrong or ['frame'])[0]!r}): download or "
            "export the model again, or use timm.create_model to load it without its fixed classifier."
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
