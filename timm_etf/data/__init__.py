"""Real images that need no download: drawn from fonts and SVG packs that PyPI packages ship (`timm_etf[demo]`)."""

from timm_etf.data.pictograms import build_pictograms
from timm_etf.data.targets import build_targets

__all__ = ["build_pictograms", "build_targets"]
