"""Run the tests of other people's tools and write what they gave into docs/works_with.md.

    TIMM_CLONE=pytorch-image-models python tests/clients/works_with.py

with the extra `clients` installed and a clone of timm's repository, whose scripts are not in its wheel.
"""

import ast
import platform
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "works_with.md"
SECTION = re.compile(r"(?<=^## What was run\n\n).*?(?=^## )", re.DOTALL | re.MULTILINE)

Tested = tuple[str, str]
"""A client and what is tested of it, the docstring of the test."""


def there() -> Iterator[Tested]:
    """What the tests in this folder test, read without their clients."""
    for path in sorted(HERE.glob("test_*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assigned = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
        client = ast.literal_eval(assigned["CLIENT"])
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield client, ast.get_docstring(node) or ""


def said(page: str) -> list[Tested]:
    """What a page says is tested."""
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [(client, tested) for client, _, tested, _ in cells[1:]]


def table(versions: Mapping[str, str], results: Mapping[Tested, bool]) -> str:
    """The page's section, for what was run."""
    here = ", ".join(f"{name} `{version(name)}`" for name in ("torch", "timm", "timm_etf"))
    lines = [f"On Python `{platform.python_version()}` with {here}, on a CPU:", ""]
    lines += ["| client | version | what is tested | result |", "|---|---|---|---|"]
    for (client, tested), works in results.items():
        lines.append(f"| {client} | `{versions[client]}` | {tested} | {'works' if works else '**fails**'} |")
    return "\n".join([*lines, "", ""])


class Ran:
    """Plugin of pytest that keeps what the tests gave."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.results: dict[Tested, bool] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep a test's result; one with several parameters works if it does under all of them."""
        report = yield
        if report.when == "call" or report.failed:
            key = item.module.CLIENT, item.function.__doc__
            self.versions[item.module.CLIENT] = item.module.VERSION
            self.results[key] = self.results.get(key, True) and report.passed
        return report


def written(page: str, versions: Mapping[str, str], results: Mapping[Tested, bool]) -> str:
    """The page with what was run."""
    return SECTION.sub(lambda _: table(versions, results), page)


def missing(results: Iterable[Tested]) -> list[str]:
    """Clients with tests that were not run."""
    return sorted({client for client, _ in set(there()) - set(results)})


def main() -> int:
    """Run, write, and say whether everything works."""
    ran = Ran()
    status = pytest.main([str(HERE), "-q", "-p", "no:cacheprovider"], plugins=[ran])
    if left := missing(ran.results):
        sys.exit(f"Nothing was written: {', '.join(left)} did not run. pip install '.[clients]', and set TIMM_CLONE.")
    page = written(PAGE.read_text(encoding="utf-8"), ran.versions, ran.results)
    PAGE.write_text(page, encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
