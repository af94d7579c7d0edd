"""Real images for machines that have none: drawn from, or unpacked from, what packages ship, and named targets."""

from timm_etf.data.offline import build_offline
from timm_etf.data.pictograms import build_pictograms
from timm_etf.data.targets import build_targets

__all__ = ["build_offline", "build_pictograms", "build_targets"]
