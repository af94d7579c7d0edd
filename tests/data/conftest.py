"""Two copies of the embedded data, built by processes of their own with different hash seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = "import sys; from timm_etf.data import build_targets; build_targets(sys.argv[1])"


@pytest.fixture(scope="session")
def copies(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two roots, built from nothing by two processes; the second's hash seed is another."""
    second = tmp_path_factory.mktemp("second")
    env = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", BUILD, str(second)], env=env, check=True, timeout=240)
    return embedded, second


@pytest.fixture(scope="session")
def root(embedded: Path) -> Path:
    """Folder with every embedded data set. Read-only by convention."""
    return embedded
