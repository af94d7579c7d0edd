"""mkdocs: pages at their paths in the repository; griffe: what docstrings here have that Markdown has not."""

import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

SHOWN = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
    *("docs/**/*", "examples/**/*", "hub_cards/**/*", "tests/benchmarks/results/*"),
    *("tests/clients/works_with.py", "tests/hub/loopback.py", "tests/test_classifier.py"),
)
"""Pages, and what they link to: one relative link works on a code host and in the site."""

AT = {"docs/index.md": "index.html", "README.md": "README.html"}
"""Pages that are elsewhere: the front page, and the one that would be in its place."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put files at their paths in the repository, instead of those in docs/."""
    for file in [f for f in files if f.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({p for pattern in SHOWN for p in ROOT.glob(pattern) if p.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        file = File.generated(config, name, abs_src_path=str(path))
        file.dest_uri = AT.get(name, file.dest_uri)
        files.append(file)
    return files


class Docstrings(griffe.Extension):
    """Sections `Example:`, which Griffe calls `Examples:`, and formulas as MathML, which needs no script."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^\.\. math::\s+((?:.+\n?)+)", _block, text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":math:`([^`]+)`", lambda found: convert(found[1]), text)


def _block(found: re.Match[str]) -> str:
    formula = rf"\begin{{align*}}{found[1]}\end{{align*}}" if "&" in found[1] else found[1]
    return f"<div>{convert(' '.join(formula.split()), display='block')}</div>\n"
