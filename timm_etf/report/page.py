"""The page of a report, and the last lines that its command prints."""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from timm_etf.atomic import write_text
from timm_etf.report import html
from timm_etf.report.results import write as write_results


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def write(out: Path, results: Mapping[str, Any], text: str, draw: Callable[[Path], Mapping[str, str]]) -> None:
    """Write results.json, and report.md and report.html with the pictures at their end where matplotlib is installed.

    Args:
        out: Folder.
        results: What goes into results.json.
        text: The report.
        draw: Draws the pictures into a folder; gives what each shows, by file name. Called only if matplotlib is there.
    """
    pictures = draw(out) if find_spec("matplotlib") else {}
    write_results(out / "results.json", results)
    shown = (f"![{title}]({quote(name)})\n" for name, title in pictures.items())
    text = "\n".join([text, *shown])
    write_text(out / "report.md", text)
    write_text(out / "report.html", html.render(text, out))


def remarks(missing: Mapping[str, str], notes: Iterable[str]) -> list[str]:
    """What is missing and what was noted, as a Markdown list."""
    return [f"- **missing**: {k}: {v}" for k, v in missing.items()] + [f"- {n}" for n in notes]


def closing(out: Path, missing: Mapping[str, str], pictures: str, *, then: str) -> list[str]:
    """Last lines of what a command prints: what is missing, where the rest is, and what to do `then`.

    Args:
        out: Folder of the report.
        missing: Why something has no result, by what it is.
        pictures: Wildcard of the pictures' names.
        then: The next command.
    """
    lines = []
    if missing:
        name, reason = next(iter(missing.items()))
        lines.append(f"missing: {len(missing)}, such as {name} ({reason})")
    drawn = (f"picture: {p}" for p in sorted(out.glob(pictures)))
    return [*lines, f"report:  {out / 'report.md'} or .html", *drawn, f"next:    {then}"]
