"""The house: which room may import which, and how large rooms and functions may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "timm_etf"
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__main__.py" and p != PACKAGE / "__init__.py"]


def floors() -> list[list[str]]:
    """Rooms by row of CONTRIBUTING's table."""
    rows = re.findall(r"^\| (`[a-z_` ]+`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return [re.findall(r"`(\w+)`", row) for row in rows]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("timm_etf."))
        elif isinstance(node, ast.ImportFrom) and node.module == "timm_etf":
            yield from (f"timm_etf.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm_etf."):
            names = (f"{node.module}.{a.name}" for a in node.names)
            yield from (n if is_module(n) else str(node.module) for n in names)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def test_the_map_names_every_room_once() -> None:
    named = [name for row in floors() for name in row]
    assert sorted(named) == sorted({room(p) for p in FILES})


def test_imports_only_go_down() -> None:
    floor = {name: number for number, row in enumerate(floors()) for name in row}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module in imported(path)
        if is_module(module) and floor[module.split(".")[1]] > floor[room(path)]
    ]
    assert not wrong


def test_no_circles() -> None:
    graph = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): set(imported(p)) for p in FILES
    }
    # A folder's face hands names of its files on; who imports those from it imports the files.
    left = {name: {m for m in modules if m in graph and m != name} for name, modules in graph.items()}
    while free := [name for name, modules in left.items() if not modules]:
        left = {name: modules - set(free) for name, modules in left.items() if name not in free}
    assert not left


def test_sizes() -> None:
    lines = {p: len(p.read_text().splitlines()) for p in FILES}
    assert not [p for p, n in lines.items() if n > 400]
    by_folder = {
        name: sum(n for p, n in lines.items() if room(p) == name and p.parent != PACKAGE) for name in map(room, FILES)
    }
    assert max(by_folder.values()) <= sum(lines.values()) / 6, by_folder
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                said = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1  # type: ignore[operator]
                long[f"{path.name}:{node.name}"] = node.end_lineno - node.lineno + 1 - said  # type: ignore[operator]
    assert not {name: n for name, n in long.items() if n > 60}


@pytest.mark.parametrize("name", ["collapse", "finetune", "knn", "fewshot", "publish", "linear_probe", "export"])
def test_no_function_hides_a_module_of_its_name(name: str) -> None:
    assert not list(PACKAGE.rglob(f"{name}.py"))


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, timm; before = set(sys.modules); import timm_etf; new = set(sys.modules) - before\n"
        "heavy = {'accelerate', 'datasets', 'matplotlib', 'sklearn', 'scipy', 'jinja2', 'tyro', 'PIL'}\n"
        "print(sorted({n.partition('.')[0] for n in new} & heavy))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
