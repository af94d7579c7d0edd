"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm_etf.errors import UsageError

UNFINISHED = ".unfinished-"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder under a temporary name beside `path` and rename it when the block ends without an error.

    A folder already at `path` is replaced only then. What a kill left under a temporary name is cleaned away, except a
    folder that was just stepping aside: it is put back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f"{UNFINISHED}{path.name}"
    old = path.parent / f"{UNFINISHED}{path.name}.old"
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        # A rename cannot replace a folder with content, so the old one steps aside first.
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    else:
        new.rename(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside `path` and rename it when the block ends without an error."""
    new = path.with_name(f".{path.name}.tmp")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_new_folder(path: Path, fix: str) -> None:
    """Raise `UsageError` unless `path` can be created or is an empty folder; `fix` says what to do instead."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} already exists and is not empty: {fix}.")
