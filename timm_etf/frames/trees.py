"""Class trees: who is near whom, from nested folders, a table or a map of parents."""

import hashlib
import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_etf.errors import UsageError, first_line
from timm_etf.frames.hierarchy import hierarchy


@dataclass(frozen=True)
class ClassTree:
    """A tree of K classes, and the frame whose cosines follow it; `timm_etf.fix_classifier` takes it as `frame`.

    Args:
        paths: The way down to each class, in the order of the logits, with the class at its end: `"animal/dog/poodle"`.
            A class may be another's group.
        gamma: How fast cosines fall with the height of the lowest common ancestor, see `timm_etf.frames.hierarchy`.

    Raises:
        UsageError: If a class comes twice, or there are not two of them.

    Example:
        >>> tree = ClassTree(("animal/dog", "animal/cat", "tool/saw"))
        >>> tree.distance.int().tolist()
        [[0, 1, 2], [1, 0, 2], [2, 2, 0]]
        >>> tree.frame(8).shape
        torch.Size([3, 8])
    """

    paths: tuple[str, ...]
    gamma: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))
        if len(self.paths) < 2 or not all(isinstance(path, str) and path for path in self.paths):
            raise UsageError("A class tree is two paths or more, texts such as 'animal/dog/poodle'.")
        if twice := _twice(self.paths):
            raise UsageError(f"The class {twice!r} is in the tree twice: leave one out.")

    @classmethod
    def read(cls, file: str | Path, class_names: Sequence[str], gamma: float = 3.0) -> "ClassTree":
        """The tree of a data set's classes.

        Args:
            file: A folder with nested folders of classes, whose innermost ones are named like the classes; a .json file
                with the group of each class, `{"poodle": "animal/dog"}`, or each one's parent, `{"poodle": "dog",
                "dog": "animal"}`; or a table with a class, a tab and its group on each line.
            class_names: Names of the classes in the order of the logits; what else is in the file does not count.
            gamma: See the class.

        Raises:
            UsageError: If the file cannot be read, lacks a class, names one twice, or has a cycle.
        """
        groups = _groups(Path(file))
        if missing := [name for name in class_names if name not in groups]:
            listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise UsageError(f"{file} lacks {len(missing)} of {len(class_names)} classes ({listed}): add them to it.")
        # A slash in a class's own name is none of the tree's.
        ways = (f"{groups[name]}/{name.replace('/', '|')}" for name in class_names)
        return cls(tuple(way.lstrip("/") for way in ways), gamma)

    @cached_property
    def distance(self) -> Tensor:
        """Height of the lowest common ancestor of each two classes, [K, K], float64: 1 for siblings, 0 for a class.

        The height of a group is the number of steps down to the deepest class in it.
        """
        ways = [tuple(path.split("/")) for path in self.paths]
        height: dict[tuple[str, ...], int] = {}
        for way in ways:
            for depth in range(len(way)):
                height[way[:depth]] = max(height.get(way[:depth], 0), len(way) - depth)
        d_KK = torch.zeros(len(ways), len(ways), dtype=torch.float64, device="cpu")
        numbers = {group: i for i, group in enumerate(height)}
        heights = torch.tensor([0.0, *height.values()], dtype=torch.float64, device="cpu")
        for depth in range(max(map(len, ways))):  # from the root down: the last group that two classes share counts
            group_K = torch.tensor(
                [numbers.get(way[:depth], -1) if len(way) >= depth else -1 for way in ways], device="cpu"
            )
            shared_KK = (group_K[:, None] == group_K) & (group_K >= 0)
            d_KK = torch.where(shared_KK, heights[group_K + 1], d_KK)
        return d_KK.fill_diagonal_(0)

    @property
    def sha256(self) -> str:
        """Hash of the paths, in the order of the classes."""
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()

    def frame(self, dim: int, seed: int = 0) -> Tensor:
        """`timm_etf.frames.hierarchy` of this tree, [K, dim], float64."""
        return hierarchy(self.distance, dim, gamma=self.gamma, seed=seed)

    def __str__(self) -> str:
        """The tree as text: a line for each group, with the number of classes in it and the names of those right below.

        Example:
            >>> print(ClassTree(("animal/dog/poodle", "animal/cat", "tool/saw", "sky")))
            all (4): sky
              animal (2): cat
                dog (1): poodle
              tool (1): saw
        """
        lines, groups = [], dict[str, list[str]]()
        for path in self.paths:
            groups.setdefault(path.rpartition("/")[0], []).append(path.rpartition("/")[2])
        prefixes = {"/".join(group.split("/")[:n]) for group in groups for n in range(1, group.count("/") + 2)} | {""}
        for group in sorted(prefixes, key=lambda g: g.split("/")):
            inside = sum(path.startswith(f"{group}/") for path in self.paths) if group else len(self.paths)
            names = ", ".join(groups.get(group, []))
            indent = "  " * (group.count("/") + 1 if group else 0)
            line = f"{group.rpartition('/')[2] or 'all'} ({inside})"
            lines.append(indent + (textwrap.shorten(f"{line}: {names}", 100, placeholder=" ...") if names else line))
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """What a configuration keeps; `ClassTree(record["paths"], record["gamma"])` is this tree."""
        return {"sha256": self.sha256, "gamma": self.gamma, "paths": list(self.paths)}


def _groups(file: Path) -> dict[str, str]:
    """The way down to the group of each class; empty for the root."""
    try:
        if file.is_dir():
            return _unique(((f.name, _above(f, file)) for f in _innermost(file)), file)
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            parents = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
            if not isinstance(parents, dict):
                raise ValueError("it holds no classes with their groups")
            return {name: _group(name, parents, file) for name in parents}
        rows = [line.split("\t") for line in text.split("\n") if line.strip()]
        if wrong := next((row for row in rows if len(row) != 2), None):
            raise UsageError(f"{file} has the line {' '.join(wrong)!r}: write a class, a tab and its group, a/b/c.")
        return _unique(rows, file)
    except (OSError, ValueError, RecursionError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f"Cannot read the class tree {file} ({first_line(e)}): check the file.") from None


def _innermost(root: Path) -> list[Path]:
    """Folders below `root` that hold files, as those of images do, or no folder."""
    return [
        Path(f) for f, folders, files in os.walk(root, followlinks=True) if (files or not folders) and Path(f) != root
    ]


def _above(folder: Path, root: Path) -> str:
    return folder.parent.relative_to(root).as_posix().removeprefix(".")


def _unique(rows: Iterable[Sequence[Any]], file: Path) -> dict[str, str]:
    rows = [(name, "" if parent is None else parent) for name, parent in rows]
    if any(not isinstance(parent, str) for _, parent in rows):
        raise UsageError(f"{file} must give each class the text of its group, as in {{'poodle': 'animal/dog'}}.")
    if twice := _twice([name for name, _ in rows]):
        raise UsageError(f"{file} has the class {twice!r} twice: leave one out.")
    return {name: "/".join(filter(None, map(str.strip, parent.split("/")))) for name, parent in rows}


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _group(name: str, parents: dict[str, str], file: Path) -> str:
    """The way down to a group: where its top has a parent itself, from there."""
    way, seen = parents[name], {name}
    while above := parents.get(top := way.partition("/")[0]):
        if top in seen:
            raise UsageError(
                f"{file} has a cycle: {top!r} is above itself. Give it another parent, or rename the group."
            )
        seen.add(top)
        way = f"{above}/{way}"
    return way
