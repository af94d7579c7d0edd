"""How well a backbone's features serve other data: extract them once, then probe them."""

from timm_etf.transfer.features import Features, extract
from timm_etf.transfer.probe import Probe, linear_probe, paired_difference

__all__ = ["Features", "Probe", "extract", "linear_probe", "paired_difference"]
