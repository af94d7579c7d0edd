"""Two copies of the embedded data, each built by a process of its own, with another hash seed, at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

BUILD = "import sys; from timm_etf.data import build_targets; build_targets(sys.argv[1])"


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two roots, built by two processes from nothing."""
    roots = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    # A hash seed of its own needs a Python of its own.
    other = subprocess.Popen([sys.executable, "-c", BUILD, str(roots[1])], env=os.environ | {"PYTHONHASHSEED": "1"})
    commands.run(roots[0], code=BUILD, check=True, timeout=240)
    assert other.wait(timeout=240) == 0
    return roots


@pytest.fixture(scope="session")
def root(copies: tuple[Path, Path]) -> Path:
    """Folder with every embedded data set. Read-only by convention."""
    return copies[0]
