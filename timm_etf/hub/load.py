"""`create_model`: timm's, plus the frozen head that a published folder's `etf` block describes."""

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import parse_model_name
from torch import nn

from timm_etf import frames
from timm_etf.atomic import file_sha256
from timm_etf.classifier import restore
from timm_etf.download import WEIGHTS, MissingFile, download
from timm_etf.errors import UsageError, first_line

FORMAT = 1
"""Version of the `etf` block this package writes; it reads this one and older."""


@dataclass(frozen=True)
class Located:
    """A model outside timm's registry, its configuration read and checked.

    Attributes:
        name: What timm is to load: a Hub repository at the commit that the configuration is from, or a folder.
        config: Its config.json.
        weights: Its weights, checked against the `etf` block's hash; None where they were not asked for.
    """

    name: str
    config: dict[str, Any]
    weights: Path | None

    @property
    def etf(self) -> dict[str, Any] | None:
        """What says how to restore the fixed classifier; None for models without one."""
        return self.config.get("etf")

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights' file: that of the `etf` block, which was compared with it, if there is one."""
        if self.weights is None:
            return None
        return self.etf["weights_sha256"] if self.etf else file_sha256(self.weights)


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model as `timm.create_model` does, and restore the fixed classifier it was trained under.

    A folder or Hub repository written by `timm_etf.hub.export` holds an ordinary timm architecture whose classifier
    weight is the frame, and an `etf` block in its `config.json`. Plain timm ignores the block and gives the same logits
    from a trainable classifier; this function reads it and freezes the classifier again, bit for bit. Configuration
    and weights are of one commit, and the weights are compared with the SHA-256 in the block.

    Args:
        model_name: `"hf-hub:org/name"` (or `org/name@revision`), `"local-dir:folder"`, or any timm name.
        pretrained: Whether to load the weights.
        **kwargs: Everything else `timm.create_model` takes. With another `num_classes` than the published one there is
            no frame to restore: the model gets timm's fresh trainable classifier (or none, for 0).

    Returns:
        The model.

    Raises:
        UsageError: If the repository or folder cannot be read, is not one of timm's or timm cannot make the model of
            it; if it holds pickled weights only, or weights of another hash; if its `etf` block is from a newer
            version; if its weights are not finite, or its classifier's not the frame that the block promises.
    """
    if parse_model_name(model_name)[0] is None:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    return create_located(locate(model_name, weights=pretrained, cache_dir=kwargs.get("cache_dir")), **kwargs)


def create_located(located: Located, **kwargs: Any) -> nn.Module:
    """`create_model` of what `locate` has found, with its weights if they were located; arguments, errors as there."""
    model_name, pretrained = located.name, located.weights is not None
    try:
        model = timm.create_model(located.name, pretrained=pretrained, **kwargs)
    except UsageError:
        raise
    except Exception as e:  # timm has many, for arguments and weights that do not fit
        raise UsageError(
            f"timm cannot make {model_name} ({textwrap.shorten(str(e), 300)}): check the arguments, or download or "
            "export the model again."
        ) from e
    if located.etf is None:
        return model
    if pretrained:
        _check_finite(model, model_name)
    if kwargs.get("features_only"):
        return model
    try:
        return restore(model, located.etf, weights_loaded=pretrained)
    except UsageError as e:
        raise UsageError(f"{model_name}: {e}") from None


def locate(model_name: str, *, weights: bool = True, cache_dir: str | Path | None = None) -> Located:
    """Read and check the configuration of a Hub repository or an exported folder, and where its weights are.

    Args:
        model_name: `"hf-hub:org/name"` (or `org/name@revision`) or `"local-dir:folder"`.
        weights: Whether to get the weights too, and to check them.
        cache_dir: huggingface_hub's cache; by default its own setting.

    Raises:
        UsageError: If anything about it is wrong, in one line.
    """
    source, path = parse_model_name(model_name)
    if source == "hf-hub":
        config_path = _config_of_repo(path, cache_dir)
        # Everything else is taken from this file's commit, whatever is pushed meanwhile.
        name = f"{source}:{path.partition('@')[0]}@{config_path.parent.name}"
    else:
        config_path, name = Path(path) / "config.json", model_name
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"{model_name} has no readable config.json ({first_line(e)}): is it an exported folder?"
        ) from None
    _check_config(config, model_name)
    if not weights:
        return Located(name, config, None)
    sha256 = (config.get("etf") or {}).get("weights_sha256")
    if source == "hf-hub":
        try:
            file = download(name.partition(":")[2], WEIGHTS, cache_dir=cache_dir, sha256=sha256)
        except MissingFile as e:
            raise _no_safetensors(model_name) from e
    else:
        file = Path(path) / WEIGHTS
        if not file.is_file():
            raise _no_safetensors(model_name)
        if sha256 and file_sha256(file) != sha256:
            raise UsageError(
                f"{file} is not what config.json describes: its SHA-256 is not {sha256[:12]}.... Copy or export the "
                "model again."
            )
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {k: tensors.get_slice(k).get_shape() for k in tensors.keys()}
    except (SafetensorError, OSError) as e:
        raise UsageError(f"The {WEIGHTS} of {model_name} is damaged ({first_line(e)}): get it again.") from None
    if config.get("etf") is not None:
        _check_shapes(shapes, config["etf"], model_name)
    return Located(name, config, file)


def _config_of_repo(repo: str, cache_dir: str | Path | None) -> Path:
    try:
        return download(repo, "config.json", cache_dir=cache_dir)
    except MissingFile as e:
        raise UsageError(f"hf-hub:{repo} has no config.json: it is not a model of timm's.") from e


def _no_safetensors(name: str) -> UsageError:
    return UsageError(
        f"{name} has no {WEIGHTS}. Pickled weights can run code and are not read here: ask its author for safetensors."
    )


def _check_config(config: Any, name: str) -> None:
    """Refuse what is not timm's, what points to other files, and what this version cannot restore."""
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UsageError(f"The config.json of {name} has no 'architecture': it is not one of timm's.")
    if not timm.is_model(config["architecture"]):
        raise UsageError(
            f"{name} is a {config['architecture']!r}, which timm {timm.__version__} does not know: "
            "pip install --upgrade timm, or import the package that adds it."
        )
    cfg = config.get("pretrained_cfg", config)
    if not isinstance(cfg, dict) or any(cfg.get(k) for k in ("hf_hub_filename", "state_dict")):
        raise UsageError(
            f"The config.json of {name} points to another file than {WEIGHTS}, which is not followed: "
            "timm.create_model reads it, if you trust it."
        )
    num_classes, model_args = config.get("num_classes", 0), config.get("model_args", {})
    if type(num_classes) is not int or num_classes < 0 or not isinstance(model_args, dict):
        wrong = "model_args" if not isinstance(model_args, dict) else "num_classes"
        raise UsageError(f"The config.json of {name} is damaged (see {wrong!r}): download or export the model again.")
    etf = config.get("etf")
    if etf is not None:
        _check_block(etf, name)
        if num_classes != (etf["num_classes"] if etf["projector"] is None else 0):
            raise UsageError(
                f"The config.json of {name} contradicts itself: num_classes is {num_classes}, and "
                f"{etf['num_classes']} in its etf block. Download or export the model again."
            )


def _check_block(etf: Any, name: str) -> None:
    """Refuse an `etf` block that another version wrote or that was damaged."""
    if isinstance(etf, dict) and isinstance(etf.get("format"), int) and etf["format"] > FORMAT:
        raise UsageError(
            f"{name} was written by a newer timm_etf (etf format {etf['format']}, this version reads up to "
            f"{FORMAT}): pip install --upgrade timm_etf"
        )
    wrong = [k for k, valid in _BLOCK.items() if not isinstance(etf, dict) or k not in etf or not valid(etf[k])]
    if not wrong and not (etf.get("taken") is None or etf["taken"] in range(etf["num_classes"] + 1)):
        wrong = ["taken"]
    if not wrong and etf["frame"] == "hierarchy" and not _is_tree(etf.get("tree"), etf["num_classes"]):
        wrong = ["tree"]
    if wrong:
        raise UsageError(
            f"The etf block in the config.json of {name} is damaged (see {wrong[0]!r}): download or export the model "
            "again, or use timm.create_model to load it without its fixed classifier."
        )
    if etf["frame"] not in (*frames.FRAMES, *frames.FITTED):
        raise UsageError(
            f"{name} has a classifier of frame {etf['frame']!r}, which this version does not know: pip install "
            "--upgrade timm_etf, or use timm.create_model to load it without its fixed classifier."
        )


def _is_tree(tree: Any, num_classes: int) -> bool:
    try:
        found = frames.ClassTree(tuple(tree["paths"]), tree["gamma"])
        return len(found.paths) == num_classes and found.sha256 == tree["sha256"] and found.gamma > 0
    except Exception:  # whatever it is instead
        return False


_BLOCK: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: type(v) is int and v >= 1,
    "frame": lambda v: isinstance(v, str),
    "seed": lambda v: v is None or type(v) is int,
    "num_classes": lambda v: type(v) is int and v >= 2,
    "dims": lambda v: isinstance(v, dict) and all(type(dim) is int for dim in v.values()),
    "coherence": lambda v: type(v) in (int, float) and -1 <= v <= 1 + 1e-6,
    "logit_scale": lambda v: type(v) in (int, float) and 0 < v < math.inf,
    "feature_norm": lambda v: isinstance(v, bool),
    "projector": lambda v: v is None or isinstance(v, str),
    "weights_sha256": lambda v: isinstance(v, str),
}
"""What an `etf` block must hold to be restored, and how it is known to be whole."""


def _check_shapes(shapes: dict[str, list[int]], etf: dict[str, Any], name: str) -> None:
    """Refuse classifier weights of other shapes than the `etf` block's, before a model of that size is made."""
    if etf["projector"] is not None:
        return  # they were left out
    for classifier, dim in etf["dims"].items():
        expected, there = [etf["num_classes"], dim], shapes.get(f"{classifier}.weight")
        if there is None or there[:2] != expected:
            raise UsageError(
                f"{name}: config.json promises a classifier {classifier!r} of shape {expected}, and {WEIGHTS} has "
                f"{'none' if there is None else there}. Download or export the model again."
            )


def _check_finite(model: nn.Module, name: str) -> None:
    """Refuse damaged or diverged weights, whose logits would be no numbers; buffers may mask with infinity."""
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.isnan().any() or (isinstance(tensor, nn.Parameter) and tensor.isinf().any()):
            raise UsageError(
                f"The weights of {name} are not finite (see {key!r}): its training diverged, or they were damaged. "
                "Export an earlier checkpoint, or use timm.create_model to look at them."
            )
