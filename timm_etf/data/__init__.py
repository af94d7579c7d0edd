"""Images: their catalogue by name, opening them, and drawing those that machines without data pretrain on."""

from timm_etf.data.build import build_offline, build_pictograms, build_targets

__all__ = ["build_offline", "build_pictograms", "build_targets"]
