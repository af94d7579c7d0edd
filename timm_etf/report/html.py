"""A report as one HTML file that a browser opens: pictures inside, tables that sort, intervals on hover."""

import re
from base64 import b64encode
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Template
from markdown_it import MarkdownIt
from markdown_it.token import Token

OVER = {"[": "over test images", "(": "over repetitions", "{": "over both"}
"""What a 95 % interval is over, by the bracket that it stands in."""

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?"
_INTERVAL = re.compile(rf"[\[({{]{_NUMBER} to {_NUMBER}[\])}}]")
_ESTIMATE = re.compile(rf"(\**)({_NUMBER})((?: {_INTERVAL.pattern})+)\1((?:; .*)?)")


def render(text: str, folder: Path) -> str:
    """A report in Markdown as a page without other files.

    Args:
        text: CommonMark with tables. HTML in it is shown, not obeyed.
        folder: Where its pictures are, PNG; of what is no picture in it only the description is shown.

    Returns:
        HTML.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h2"]
    body = markdown.renderer.render(_changed(tokens, folder), markdown.options, {})
    title = next((tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"), "Report")
    return _template().render(title=title, headings=headings, body=body)


def _changed(tokens: list[Token], folder: Path) -> list[Token]:
    """With sections to go to, tables that scroll by themselves, intervals apart and pictures inside."""
    changed: list[Token] = []
    section, cell = 0, False
    for token in tokens:
        match token.type:
            case "heading_open" if token.tag == "h2":
                section += 1
                token.attrSet("id", f"s{section}")
            case "td_open" | "td_close":
                cell = token.type == "td_open"
            case "inline" if cell and (found := _ESTIMATE.fullmatch(token.content)):
                token.children = [_html(_estimate(*found.groups()))]
            case "inline":
                token.children = [_picture(c, folder) if c.type == "image" else c for c in token.children or ()]
        opening = [_html('<div class="table">')] if token.type == "table_open" else []
        closing = [_html("</div>\n")] if token.type == "table_close" else []
        changed += [*opening, token, *closing]
    return changed


def _html(content: str) -> Token:
    return Token("html_inline", "", 0, content=content)


def _estimate(strong: str, value: str, intervals: str, more: str) -> str:
    """A cell's number, intervals and what follows; a difference is marked where they are all on one side of 0."""
    told = _INTERVAL.findall(intervals)
    low, high = zip(*([float(end) for end in re.findall(_NUMBER, interval)] for interval in told), strict=True)
    clear = value[0] in "+-" and (min(low) > 0 or max(high) < 0)
    shown = f"<strong>{value}</strong>" if strong else value
    spans = (f' <span class="interval" data-over="{OVER[interval[0]]}">{interval}</span>' for interval in told)
    return f'<span class="{"clear value" if clear else "value"}">{shown}</span>{"".join(spans)}{escape(more)}'


def _picture(image: Token, folder: Path) -> Token:
    """The image with its pixels inside. Names come from outside, too: only what lies in the folder is read."""
    name = unquote(str(image.attrs["src"]))
    found = folder / name
    content = found.read_bytes() if name == Path(name).name and found.is_file() else b""
    if not content.startswith(b"\x89PNG"):
        return _html(escape(image.content))
    image.attrSet("src", f"data:image/png;base64,{b64encode(content).decode()}")
    return image


@cache
def _template() -> Template:
    source: Any = files("timm_etf.report") / "page.html"
    return Template(source.read_text(encoding="utf-8"), autoescape=False, keep_trailing_newline=True)
