"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm_etf.errors import UsageError

_UNFINISHED = ".unfinished-"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder under a temporary name beside `path` and rename it when the block ends without an error.

    A folder already at `path` is replaced only then. Whatever an earlier kill left under a temporary name is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name)
    new = path.parent / f"{_UNFINISHED}{path.name}"
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        # A rename cannot replace a folder with content, so the old one steps aside first.
        old = path.parent / f"{_UNFINISHED}{path.name}.old"
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    else:
        new.rename(path)


def remove_unfinished(parent: Path, name: str = "") -> None:
    """Remove what writers of `parent / name` (of any name, by default) left when they were killed."""
    for leftover in parent.glob(f"{_UNFINISHED}{name}*"):
        shutil.rmtree(leftover)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it to `path`."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def require_new_folder(path: Path, fix: str) -> None:
    """Raise `UsageError` unless `path` can be created or is an empty folder; `fix` says what to do instead."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} already exists and is not empty: {fix}.")
