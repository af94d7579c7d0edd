"""The documentation site: it builds without a warning, its links lead somewhere, and what people look for is found."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Where a page can be entered, and where it leads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given["href"]] if tag == "a" and "href" in given else []
        self.parts += [given[name] for name in ("href", "src") if tag != "a" and name in given]


class Site(dict[str, Page]):
    """The pages of a built site by their paths in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__({str(file.relative_to(folder)): Page(file) for file in sorted(folder.rglob("*.html"))})

    def inside(self, page: str, links: list[str]) -> Iterator[tuple[str, str]]:
        """Path and anchor of the links that stay in the site."""
        for link in links:
            path, anchor = urldefrag(link)
            if not urlsplit(link).scheme:
                target = os.path.normpath(Path(page).parent / unquote(path)) if path else page
                yield target.lstrip("/"), unquote(anchor)  # a page for what is lost has paths from the root


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    warnings = [line for line in (built.stderr + built.stdout).splitlines() if not line.startswith("INFO")]
    assert (built.returncode, warnings) == (0, [])
    return Site(folder)


def test_every_link_leads_somewhere(site: Site) -> None:
    lost = []
    for name, page in site.items():
        for path, anchor in site.inside(name, page.links + page.parts):
            target = site.get(path)
            if target is None and not (site.folder / path).is_file():
                lost.append(f"{name}: {path}")
            elif anchor and (target is None or anchor not in target.anchors):
                lost.append(f"{name}: {path}#{anchor}")
    assert lost == []


def test_nothing_is_fetched_from_elsewhere(site: Site) -> None:
    assert {part for page in site.values() for part in page.parts if urlsplit(part).netloc} == set()


def test_every_page_of_the_documentation_is_in_the_navigation(site: Site) -> None:
    reached = {path for path, _ in site.inside("index.html", site["index.html"].links)}
    paths = {str(page.relative_to(ROOT).with_suffix(".html")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(paths) > 20
    assert paths - {"docs/index.html"} <= reached


@pytest.mark.parametrize(
    "module", ["", "classifier", "embedding", "frames", "geometry", "heads", "hub", "losses", "transfer", "whitening"]
)
def test_every_public_name_has_its_place(site: Site, module: str) -> None:
    anchors = set().union(*(page.anchors for name, page in site.items() if name.startswith("docs/api/")))
    found = importlib.import_module(f"timm_etf.{module}".rstrip("."))
    lost = []
    for name in found.__all__:
        value = getattr(found, name)
        made = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"  # or where it comes from
        if not {f"{found.__name__}.{name}", f"timm_etf.{name}", made} & anchors:
            lost.append(name)
    assert lost == []


def test_docstrings_are_shown_as_they_are_meant(site: Site) -> None:
    pages = "".join((site.folder / name).read_text(encoding="utf-8") for name in site if name.startswith("docs/api/"))
    assert pages.count("<math") > 20
    assert re.findall(r"math::|:math:|<mi>&<|Example:|(?:Args|Returns|Raises):\n", pages) == []


@pytest.mark.parametrize(
    ("asked", "path", "anchor", "answer"),
    [
        ("Which head for my K and d?", "docs/choosing.html", "", "Which frame"),
        ("How do I resume?", "docs/pretraining.html", "resume", "--resume"),
        ("What does the interval mean?", "docs/intervals.html", "", "interval_over_runs_and_images"),
    ],
)
def test_a_newcomers_question_is_one_click_away(site: Site, asked: str, path: str, anchor: str, answer: str) -> None:
    text = (site.folder / "index.html").read_text(encoding="utf-8")
    [link] = re.findall(rf'<a href="([^"]*)">{re.escape(asked)}</a>', text)
    assert list(site.inside("index.html", [link])) == [(path, anchor)]
    assert answer in (site.folder / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("simplex", "docs/heads.html"),
        ("simplex", "docs/api/frames.html"),
        ("resume", "docs/pretraining.html"),
        ("hf-hub", "README.html"),
        ("hf-hub", "docs/converting.html"),
    ],
)
def test_the_search_finds(site: Site, words: str, path: str) -> None:
    index = json.loads((site.folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    separator = re.compile(index["config"]["separator"])
    found = {
        urldefrag(entry["location"])[0]
        for entry in index["docs"]
        if set(separator.split(words)) <= set(separator.split(f"{entry['title']} {entry['text']}".lower()))
    }
    assert path in found
