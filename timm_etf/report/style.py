"""How pictures look, and how they are written."""

from pathlib import Path
from typing import Any

from timm_etf.atomic import atomic_file

COLOURS = ("#7a7a7a", "#c8102e", "#1f5fa8", "#d98a00", "#2f8f4e", "#7a3fa0", "#00868b", "#8a5a2b")
"""Of the labels of a comparison, the reference first, in grey."""

STYLE: Any = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
"""matplotlib's settings, for `rc_context`."""


def save(figure: Any, path: Path, dpi: int = 140) -> str:
    """Write a matplotlib figure as PNG, atomically; returns its file name."""
    with atomic_file(path) as new:
        figure.savefig(new, dpi=dpi, format="png")
    return path.name
