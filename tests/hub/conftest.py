"""A Hub on loopback, processes that talk to it, and an environment without this package."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import commands
from tests.hub import loopback

Client = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def server() -> Iterator[loopback.Hub]:
    with loopback.serve() as hub:
        yield hub


@pytest.fixture
def client(server: loopback.Hub, tmp_path: Path) -> Client:
    """Runs a command whose huggingface_hub knows only the server, with a cache of its own.

    `timm-etf` and code of this interpreter run as forks, anything else as what it is.
    """

    def run(*command: object, token: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        own = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
            **environment,
        }
        first, *rest = map(str, command)
        if first == "timm-etf":
            return commands.run(*rest, env=own, cwd=tmp_path)
        if first == sys.executable and rest[0] == "-c":
            return commands.run(*rest[2:], code=rest[1], env=own, cwd=tmp_path)
        # Not in this repository's folder, from which Python would import.
        return subprocess.run(
            [first, *rest], env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="session")
def python_without_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a virtual environment that has all packages of this one but timm_etf."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    for kind in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        place = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        for package in Path(kind).iterdir():
            if "timm_etf" not in package.name and package.suffix != ".pth" and not (place / package.name).exists():
                (place / package.name).symlink_to(package)
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", "import timm_etf"], capture_output=True, text=True, check=False, cwd=folder)
    assert "No module named 'timm_etf'" in found.stderr
    return python
