"""How features are arranged: collapse."""

from timm_etf.geometry.collapse import collapse

__all__ = ["collapse"]
