"""`<arch>_etf` for every timm architecture that has a classifier: importing this module registers them.

A variant wraps timm's own entry point: the base builder makes the model, with every keyword argument it takes, and the
classifiers that its `pretrained_cfg` names are then replaced by frozen frames. Nothing in timm is patched.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import get_pretrained_cfg, list_models, model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from torch import nn

from timm_etf import frames
from timm_etf.classifier import fix_classifier, fixed_classifiers
from timm_etf.errors import UsageError

SUFFIX = "_etf"
"""What a variant's name adds to timm's."""

skipped: dict[str, str] = {}
"""timm architectures without a variant, and why."""

default_cfgs: dict[str, DefaultCfg] = {}
"""Published weights by variant, in the form `timm.models.register_model` reads."""

__all__: list[str] = []  # register_model appends the variants; they are entry points, not names to import


def base_name(name: str) -> str:
    """timm's own architecture name of a variant: `"resnet50_etf"` gives `"resnet50"`, any other name itself."""
    return name.removesuffix(SUFFIX)


NO_PROVENANCE: dict[str, Any] = {
    **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag")),
    **dict.fromkeys(("license", "description", "origin_url", "paper_name", "paper_ids", "notes")),
    **dict.fromkeys(("label_offset", "label_names", "label_descriptions")),
    "custom_load": False,
}
"""A variant's weights are never the base's: nothing that says where those came from may be inherited."""


def _entry_point(name: str, base: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def variant(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        *,
        frame: str = "auto",
        frame_seed: int = 0,
        **kwargs: Any,
    ) -> nn.Module:
        overlay = dict(pretrained_cfg_overlay or {})
        if isinstance(pretrained_cfg, str):  # a tag: timm's own message where there is no such tag
            pretrained_cfg = get_pretrained_cfg(f"{name}.{pretrained_cfg}")
        elif not pretrained_cfg and default_cfgs[name].is_pretrained:
            pretrained_cfg = default_cfgs[name].default
        from_base = not pretrained_cfg
        if from_base:
            # An overlay and not a configuration of our own, and one that leaves the tag: some builders look at it.
            overlay = {**NO_PROVENANCE, "architecture": name, **overlay}
            del overlay["tag"]
        known = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg or PretrainedCfg())
        if pretrained and not any({**known, **overlay}.get(k) for k in ("url", "file", "hf_hub_id", "state_dict")):
            raise UsageError(
                f"No pretrained weights exist for {name}; timm.list_models('*{SUFFIX}', pretrained=True) lists those "
                f"that do. Make one with: timm-etf pretrain --model {name} --data-dir DATA --out RUN"
            )
        model: Any = base(
            pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, **kwargs
        )
        if from_base:
            model.pretrained_cfg.pop("tag", None)
        if kwargs.get("features_only") or getattr(model, "num_classes", 0) == 0:
            return model
        weights = model.state_dict() if pretrained else {}
        fix_classifier(model, frame=frame, seed=frame_seed)
        for head_name, fixed in fixed_classifiers(model):
            # Weights that were trained under a frame keep it, bit for bit; a learned classifier gives way to the frame.
            loaded = weights.get(f"{head_name}.weight")
            if loaded is not None and frames.is_simplex(loaded.flatten(1)):
                fixed.load_state_dict({"weight": loaded}, strict=False)
        return model

    variant.__name__ = variant.__qualname__ = name
    variant.__module__ = __name__
    variant.__doc__ = (
        f"timm's `{base_name(name)}` with a fixed simplex ETF classifier. Takes all of its keyword arguments, and "
        "`frame` and `frame_seed` (see `timm_etf.fix_classifier`)."
    )
    return variant


def _register() -> None:
    module = sys.modules[__name__]
    for base in list_models():
        base_entry_point = model_entrypoint(base)
        # timm's own table of the module, because its get_pretrained_cfg copies deeply: 0.15 s for all names.
        cfgs = getattr(sys.modules[base_entry_point.__module__], "default_cfgs", {})
        if base not in cfgs or not cfgs[base].default.classifier:
            skipped[base] = "its pretrained_cfg names no classifier"
        elif base.endswith("_enc"):
            skipped[base] = "an encoder: its pretrained_cfg names a classifier that the model does not have"
        else:
            name = base + SUFFIX
            cfg = replace(cfgs[base].default, architecture=name, **NO_PROVENANCE)
            default_cfgs[name] = DefaultCfg(tags=deque([""]), cfgs={"": cfg})
            entry_point = _entry_point(name, base_entry_point)
            setattr(module, name, entry_point)
            register_model(entry_point)


_register()
