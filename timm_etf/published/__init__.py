"""Published checkpoints: a folder here for each, with its config.json, and its weights where they are small.

The folder's name is the checkpoint's: variant, dot, tag; its repository on the Hub has the same name.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_etf.atomic import file_sha256
from timm_etf.download import WEIGHTS, download
from timm_etf.errors import UsageError

if TYPE_CHECKING:
    from timm.models._pretrained import PretrainedCfg

NAMES = ("resnet10t_etf.icons400", "resnet50_etf.icons400")
"""All of them; the first of a variant is what `pretrained=True` loads without a tag."""

ORG = os.environ.get("TIMM_ETF_HUB_ORG") or "timm-etf"
"""Organisation on the Hub that the checkpoints are downloaded from; the environment's `TIMM_ETF_HUB_ORG`."""

_HERE = Path(__file__).parent


@cache
def config(name: str) -> dict[str, Any]:
    """config.json of a published checkpoint."""
    return json.loads((_HERE / name / "config.json").read_text(encoding="utf-8"))


def about(name: str) -> str:
    """What a published checkpoint was trained on.

    Example:
        >>> about("resnet10t_etf.icons400")
        '21,163 images of icons-400, 399 classes, 40 pixels'
    """
    found = config(name)
    data, size = found["etf"].get("data") or {}, found["pretrained_cfg"]["input_size"][-1]
    images = f"{data['images']:,} images of {data['name']}, " if data.get("images") else ""
    return f"{images}{found['num_classes']} classes, {size} pixels"


def pretrained_cfgs(variant: str) -> "dict[str, PretrainedCfg]":
    """timm's configuration of each published checkpoint of a variant, by tag, the default first."""
    from timm.models._pretrained import PretrainedCfg

    cfgs = {}
    for name in NAMES:
        architecture, _, tag = name.partition(".")
        if architecture != variant:
            continue
        about = config(name)
        embedded = _HERE / name / WEIGHTS
        own = {"architecture": variant, "tag": tag, "num_classes": about["num_classes"]}
        own |= {"label_names": tuple(about.get("label_names", ())), "hf_hub_id": f"{ORG}/{name}"}
        own |= {"file": str(embedded)} if embedded.exists() else {}
        cfg: dict[str, Any] = {**about["pretrained_cfg"], **own}
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}  # as timm's own are
        cfgs[tag] = PretrainedCfg(**cfg)
    return cfgs


def weights(name: str, cache_dir: str | Path | None = None) -> Path:
    """Weights of a published checkpoint: those that came with the package, or the Hub's; the hash is checked.

    Raises:
        UsageError: If they cannot be had, or are not those that were published.
    """
    sha256 = config(name)["etf"]["weights_sha256"]
    embedded = _HERE / name / WEIGHTS
    if not embedded.exists():
        return download(f"{ORG}/{name}", WEIGHTS, cache_dir=cache_dir, sha256=sha256)
    if file_sha256(embedded) != sha256:
        raise UsageError(f"{embedded} is damaged: pip install --force-reinstall --no-deps timm_etf")
    return embedded
