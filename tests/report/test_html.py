"""report.html: one file that needs no other, shows what report.md says, and obeys nothing that a name holds."""

import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_etf.report import html, page

EXAMPLES = Path(__file__).parents[2] / "examples"
REPORTS = sorted(EXAMPLES.glob("*/report.md"))


class Tree(HTMLParser):
    """Attributes by tag, and the text of cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data

    def found(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.parent.name)
def test_a_page_says_what_the_report_says_and_needs_no_other_file(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    tree = Tree(html.render(text, report.parent))
    rows = [line.strip("|\n ") for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    said = [re.sub(r"\*\*|`", "", cell).strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell.strip() for cell in tree.cells] == [cell.replace("\\|", "|") for cell in said]
    pictures = [report.parent / name for name in re.findall(r"!\[.*?\]\((.*?)\)", text)]
    shown = [str(image["src"]) for image in tree.found("img")]
    assert [b64decode(src.removeprefix("data:image/png;base64,")) for src in shown] == [
        p.read_bytes() for p in pictures
    ]
    linked = [str(a["href"]) for a in tree.found("a") if str(a["href"]).startswith("#")]
    assert linked == [f"#{h['id']}" for h in tree.found("h2")]
    assert not any("src" in s for s in tree.found("script"))
    assert [link["href"] for link in tree.found("link")] == ["data:,"]


ends = st.tuples(st.floats(-99, 99), st.floats(-99, 99)).map(sorted)


@given(st.floats(-99, 99), st.lists(ends, min_size=1, max_size=3), st.booleans())
def test_a_difference_is_marked_where_all_of_its_intervals_are_on_one_side_of_0(
    mean: float, intervals: list[list[float]], bold: bool
) -> None:
    told = [f"{o}{a:+.1f} to {b:+.1f}{c}" for (a, b), (o, c) in zip(intervals, ("[]", "()", "{}"), strict=False)]
    value = f"{mean:+.1f} {' '.join(told)}"
    source = html.render(f"| a |\n|---|\n| {f'**{value}**' if bold else value} |\n", Path())
    tree = Tree(source)
    assert tree.cells[1] == value
    spans = [span for span in tree.found("span") if span["class"] == "interval"]
    assert [s["data-over"] for s in spans] == list(html.OVER.values())[: len(told)]
    rounded = [[float(f"{end:.1f}") for end in of] for of in intervals]
    clear = all(low > 0 for low, _ in rounded) or all(high < 0 for _, high in rounded)
    marked = any(span["class"] == "clear value" for span in tree.found("span"))
    assert marked == clear


def test_an_accuracy_is_not_marked() -> None:
    tree = Tree(html.render("| a |\n|---|\n| 79.7 (77.0 to 82.4) |\n", Path()))
    assert [span["class"] for span in tree.found("span")][:2] == ["value", "interval"]


def test_pictures_are_those_of_the_folder(tmp_path: Path) -> None:
    inside, png = tmp_path / "out", (EXAMPLES / "demo" / "demo.png").read_bytes()
    inside.mkdir()
    for folder, name in ((inside, "données a.png"), (tmp_path, "other.png")):
        (folder / name).write_bytes(png)
    (inside / "text.png").write_text("secret")
    names = [f"![{name}]({name})" for name in ("../other.png", tmp_path / "other.png", "none.png", "text.png", ".")]
    outside = " ".join([*names, "![https](https://example.org/a.png)", "![data](data:image/png;base64,AA)"])
    page.write(inside, {}, f"# Pictures\n\n{outside}\n", lambda out: {"données a.png": "drawn"})
    tree = Tree((inside / "report.html").read_text())
    assert [(image["alt"], b64decode(str(image["src"]).split(",")[1])) for image in tree.found("img")] == [
        ("drawn", png)
    ]


def test_what_follows_an_interval_stays() -> None:
    tree = Tree(html.render("| a |\n|---|\n| +5.0 (+1.0 to +9.0); 50 % |\n", Path()))
    assert tree.cells[1] == "+5.0 (+1.0 to +9.0); 50 %"
    assert [span["class"] for span in tree.found("span")][:2] == ["clear value", "interval"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_click_sorts_and_a_pointer_shows_the_interval(tmp_path: Path) -> None:
    rows = ["| b | 10 | 5.0 [1.0 to 9.0] |", "| 2a | 9 | - |", "| c | 100 | -1.0 |", "| **mean** | 1 | 3.0 |"]
    source = html.render("\n".join(["| x | y | z |", "|---|---|---|", *rows]), Path())
    script = """<script>
    const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent).join("");
    const said = [0, 0, 1, 1, 2].map(i => { document.querySelectorAll("th button")[i].click(); return names(); });
    document.querySelector(".interval").closest("td").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    document.title = [...said, document.getElementById("over").textContent].join(" ");
    </script></body>"""
    (tmp_path / "page.html").write_text(source.replace("</body>", script))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, check=True
    )
    title = re.search("<title>(.*)</title>", done.stdout)[1]  # type: ignore[index]
    assert title == "2abcmean cb2amean cb2amean 2abcmean bc2amean [1.0 to 9.0] over test images"


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    text = f"# {name}\n\n## {name}\n\n- {name}\n\n| {name} |\n|---|\n| {name} |\n"
    page.write(tmp_path, {}, text, lambda out: {})
    source = (tmp_path / "report.html").read_text()
    assert "alert(1)" in source
    assert len(Tree(source).found("script")) == 1
    assert (tmp_path / "report.md").read_text() == text
