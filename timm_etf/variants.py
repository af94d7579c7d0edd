"""`<arch>_etf` for every timm architecture that has a classifier, and `<resnet>_sw`: importing this registers them.

A variant wraps timm's own entry point: the base builder makes the model, with every keyword argument it takes, and then
norms are replaced by switchable whitening (`_sw`), or the classifiers that its `pretrained_cfg` names by frozen frames
(`_etf`), or both (`_sw_etf`). Nothing in timm is patched.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, list_models, list_pretrained, model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from torch import nn

from timm_etf import published
from timm_etf.classifier import fix_classifier, fixed_classifiers, restore
from timm_etf.errors import UsageError
from timm_etf.heads import Projector
from timm_etf.processes import is_first_process
from timm_etf.whitening import whiten_resnet

_logger = logging.getLogger(__name__)

SUFFIX = "_etf"
"""What the name of a variant with a fixed classifier adds to its base's."""

SW_SUFFIX = "_sw"
"""What the name of a variant with switchable whitening adds to timm's."""

HEAD_ARGS = ("frame", "frame_seed", "logit_scale", "feature_norm", "learn_scale", "projector")
"""Keyword arguments of the `_etf` variants: those of `fix_classifier`, with `frame_seed` for its seed."""

_SOURCES = ("url", "file", "hf_hub_id", "state_dict")
"""Where timm may find weights, in a configuration or an overlay of it."""

skipped: dict[str, str] = {}
"""timm architectures without a variant, and why."""

default_cfgs: dict[str, DefaultCfg] = {}
"""Published weights by variant, in the form `timm.models.register_model` reads."""

__all__: list[str] = []  # register_model appends the variants; they are entry points, not names to import


def base_name(name: str) -> str:
    """Name of a variant with a learned classifier: `"resnet50_etf"` gives `"resnet50"`, any other name itself."""
    return name.removesuffix(SUFFIX)


NO_PROVENANCE: dict[str, Any] = {
    **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag")),
    **dict.fromkeys(("license", "description", "origin_url", "paper_name", "paper_ids", "notes")),
    **dict.fromkeys(("label_offset", "label_names", "label_descriptions")),
    "custom_load": False,
}
"""A variant's weights are never the base's: nothing that says where those came from may be inherited."""


def _entry_point(name: str, base: Callable[..., nn.Module], *, whiten: bool) -> Callable[..., nn.Module]:
    fix = name.endswith(SUFFIX)

    def variant(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        # timm would call it by the base's name wherever its configuration comes from a file.
        overlay = {"architecture": name, **(pretrained_cfg_overlay or {})}
        ready = fix and not whiten and _is_the_bases(name, pretrained_cfg)
        cfg: Any = pretrained_cfg
        exported: dict[str, Any] = {}
        if not ready:
            cfg, overlay, exported = _find_weights(name, pretrained, cfg, overlay, kwargs.get("cache_dir"))
        kwargs = {**exported.get("model_args", {}), **kwargs}
        head_args = {k: kwargs.pop(k) for k in HEAD_ARGS if k in kwargs} if fix else {}
        sw_args = kwargs.pop("sw_kwargs", None) or {} if whiten else {}
        if whiten and pretrained:
            # timm calls this between building the model and loading: the weights are those of the whitened model.
            kwargs["pretrained_filter_fn"] = lambda state_dict, built: (whiten_resnet(built, **sw_args), state_dict)[1]
        model: Any = base(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
        if whiten and not pretrained:
            whiten_resnet(model, **sw_args)
        if not cfg:
            model.pretrained_cfg.pop("tag", None)
        if fix and not kwargs.get("features_only") and getattr(model, "num_classes", 0) != 0:
            if ready and pretrained:
                _fix_ready(model, **head_args)
            else:
                _fix(model, pretrained, exported.get("etf"), **head_args)
        return model

    variant.__name__ = variant.__qualname__ = name
    variant.__module__ = __name__
    takes = ["all of its keyword arguments"]
    takes += ["`sw_kwargs` (a dict of arguments of `timm_etf.whitening.SwitchWhiten2d`)"] if whiten else []
    takes += [f"{', '.join(HEAD_ARGS)} (see `timm_etf.fix_classifier`)"] if fix else []
    what = " and ".join(["switchable whitening"] * whiten + ["a fixed classifier"] * fix)
    original = base_name(name).removesuffix(SW_SUFFIX) if whiten else base_name(name)
    variant.__doc__ = f"timm's `{original}` with {what}. Takes {' and '.join(takes)}."
    return variant


def _is_the_bases(name: str, tag: object) -> bool:
    """Whether a tag is none of the variant's own published ones, but one of timm's for its base: `resnet50.TAG`."""
    if not isinstance(tag, str) or tag in default_cfgs[name].cfgs:
        return False
    base = base_name(name)
    return tag in sys.modules[model_entrypoint(base).__module__].default_cfgs[base].cfgs


def _fix_ready(model: nn.Module, frame: str = "auto", **options: Any) -> None:
    """Fix the classifiers of a backbone that was trained under learned ones; the nearest frame unless another is named.

    With another number of classes than the weights have, their classifier is gone, and nothing is near to it.
    """
    cfg: Any = model.pretrained_cfg
    known = getattr(model, "num_classes", 0) == cfg["num_classes"]
    frame = "nearest" if known and frame == "auto" and not options.get("projector") else frame
    _fix(model, pretrained=False, etf=None, frame=frame, **options)
    for _, head in fixed_classifiers(model):
        if head.origin:
            head.origin |= {"from": f"{base_name(cfg['architecture'])}.{cfg['tag']}", "license": cfg.get("license")}
    if is_first_process():
        origins = [head.origin["mean_cosine"] for _, head in fixed_classifiers(model) if head.origin]
        near = f", the nearest to it: mean cosine {' and '.join(map(str, origins))}" if origins else ""
        kind = next(head.frame for _, head in fixed_classifiers(model))
        _logger.warning(
            f"{cfg['architecture']}.{cfg['tag']}: the backbone was trained under a learned classifier; in its place is "
            f"a fixed frame now ({kind}{near})."
        )


def _find_weights(
    name: str,
    pretrained: bool,
    tag_or_cfg: str | dict[str, Any] | PretrainedCfg | None,
    overlay: dict[str, Any],
    cache_dir: str | Path | None,
) -> tuple[dict[str, Any] | PretrainedCfg | None, dict[str, Any], dict[str, Any]]:
    """What a variant's base builder is to be given: its configuration (None: the base's own) and the overlay of it.

    With them the config.json of published weights, empty for all others.
    """
    if isinstance(tag_or_cfg, str):  # timm's own message where there is no such tag
        cfg: dict[str, Any] | PretrainedCfg | None = get_pretrained_cfg(f"{name}.{tag_or_cfg}")
    else:
        cfg = tag_or_cfg
    if not cfg and pretrained and default_cfgs[name].is_pretrained:
        # Without weights a variant is its base, with the base's input size and number of classes.
        cfg = default_cfgs[name].default
    if not cfg:
        # An overlay and not a configuration of our own, and one that leaves the tag: some builders look at it.
        inherited = {k: v for k, v in NO_PROVENANCE.items() if k != "tag"}
        overlay = {**inherited, **overlay}
    if not pretrained:
        return cfg, overlay, {}
    known = cfg if isinstance(cfg, dict) else vars(cfg or PretrainedCfg())
    if not any({**known, **overlay}.get(k) for k in _SOURCES):
        raise UsageError(
            f"No pretrained weights exist for {name}; timm.list_models('*{SUFFIX}', pretrained=True) lists those "
            f"that do. {_of_timm(name)}Make one with: timm-etf pretrain --model {name} --data-dir DATA --out RUN"
        )
    published_as = f"{name}.{known.get('tag')}"
    if published_as not in published.NAMES or any(overlay.get(k) for k in _SOURCES):
        return cfg, overlay, {}
    file = published.weights(published_as, cache_dir)
    _say_what_it_is(published_as)
    return cfg, {**overlay, "file": str(file)}, published.config(published_as)


def _of_timm(name: str) -> str:
    """How to take the base's own weights, where it has some."""
    tagged = list_pretrained(f"{base_name(name)}.*")
    return f"{name}.{tagged[0].partition('.')[2]} is timm's under the nearest frame. " if tagged else ""


@cache  # once is enough
def _say_what_it_is(name: str) -> None:
    """To timm's users `pretrained=True` means ImageNet."""
    if is_first_process():
        base = base_name(name.partition(".")[0])
        _logger.warning(
            f"{name}: trained on {published.about(name)}, not on ImageNet. For weights of ImageNet, under a learned "
            f"classifier: timm.create_model({base!r}, pretrained=True)"
        )


def _fix(
    model: nn.Module,
    pretrained: bool,
    etf: dict[str, Any] | None,
    frame: str = "auto",
    frame_seed: int = 0,
    projector: Projector | None = None,
    **options: Any,
) -> None:
    """Fix a variant's classifiers; loaded weights that were trained under such a frame keep it, bit for bit."""
    if etf and projector is None and frame in ("auto", etf["frame"]):
        restore(model, etf, **options)
        if any(fixed_classifiers(model)):
            return
    loaded = model.state_dict() if pretrained and not etf else {}
    fix_classifier(model, frame, frame_seed, projector=projector, **options)
    for name, fixed in fixed_classifiers(model):
        weight = loaded.get(f"{name}.weight")
        if weight is None:
            continue
        if options.get("logit_scale") is not None:
            weight = weight * (options["logit_scale"] / weight[0].double().norm())
        fixed.adopt(weight, loaded.get(f"{name}.bias"))


def _register() -> None:
    for base in list_models():
        entry_point = model_entrypoint(base)
        # timm's own table of the module, because its get_pretrained_cfg copies deeply: 0.15 s for all names.
        cfgs = getattr(sys.modules[entry_point.__module__], "default_cfgs", {})
        if base not in cfgs or not cfgs[base].default.classifier:
            skipped[base] = "its pretrained_cfg names no classifier"
            continue
        if base.endswith("_enc"):
            skipped[base] = "an encoder: its pretrained_cfg names a classifier that the model does not have"
            continue
        cfg = cfgs[base].default
        _add(base + SUFFIX, entry_point, cfg)
        # Pruned widths do not divide into groups, and there is no BatchNorm to replace in the GroupNorm model.
        if entry_point.__module__ == "timm.models.resnet" and not base.endswith(("_pruned", "_gn")):
            _add(base + SW_SUFFIX, entry_point, cfg, whiten=True)
            _add(base + SW_SUFFIX + SUFFIX, entry_point, cfg, whiten=True)


def _add(name: str, base: Callable[..., nn.Module], cfg: PretrainedCfg, *, whiten: bool = False) -> None:
    cfgs = published.pretrained_cfgs(name) or {"": replace(cfg, architecture=name, **NO_PROVENANCE)}
    default_cfgs[name] = DefaultCfg(deque(cfgs), cfgs, is_pretrained="" not in cfgs)
    entry_point = _entry_point(name, base, whiten=whiten)
    setattr(sys.modules[__name__], name, entry_point)
    register_model(entry_point)


_register()
