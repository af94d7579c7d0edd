"""Writes the tables of docs/targets.md from the catalogue: python -m tests.data.targets_page."""

import re
from collections.abc import Iterable
from pathlib import Path

from timm_etf.data.catalogue import HUB, METRICS, NOWHERE, VTAB, Target
from timm_etf.data.checked import FACTS, SOURCES

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"

COLUMNS = ("target", "on the Hub", "fitted, chosen and scored on", "columns", "classes", "images", "metric")
"""Of the tables, before what was read where and what is open."""


def tables() -> dict[str, str]:
    """The tables, by the heading of their section."""
    sources = [f"- {name}: <{url}>" for name, url in SOURCES.items()]
    nowhere = [f"- `{name}`: {reason}." for name, reason in NOWHERE.items()]
    found = {"Named": [*_table(HUB.values())], "VTAB-1k": [*_table(VTAB.values()), "", *nowhere], "Sources": sources}
    return {heading: "\n".join(lines) for heading, lines in found.items()}


def written(page: str) -> str:
    """The page with its tables, which end its sections, made anew."""
    for heading, table in tables().items():
        section = re.compile(rf"(^## {heading}\n.*?\n\n)(?:\||- ).*?(?=\n## |\Z)", re.MULTILINE | re.DOTALL)
        page, count = section.subn(lambda found, table=table: f"{found[1]}{table}\n", page)
        assert count == 1, heading
    return page


def _table(targets: Iterable[Target]) -> Iterable[str]:
    header = [*COLUMNS, "read in", "open"]
    return [_row(header), "|" + "---|" * len(header), *map(_cells, targets)]


def _cells(target: Target) -> str:
    facts = FACTS[target.name]
    where: dict[str, list[str]] = {}
    for aspect, sources in facts.read.items():
        where.setdefault(sources, []).append(aspect)
    read = "; ".join(f"{', '.join(aspects)}: {sources}" for sources, aspects in where.items() if sources)
    splits = [f"`{split}`" if split else "a fifth of it" for split in (target.train, target.validation, target.test)]
    if target.train_images and not target.validation:
        splits[1] = "200 of it"
    hub = f"[{target.location}](https://huggingface.co/datasets/{target.location})"
    hub += f", `{target.config}`" if target.config else ""
    images = f"{facts.fit:,} + {facts.test:,}"
    return _row(
        [
            *(f"`{target.name}`", hub, ", ".join(splits), f"`{target.image}`, `{target.label}`"),
            *(str(facts.classes), images, METRICS[target.metric], read, facts.open),
        ]
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
