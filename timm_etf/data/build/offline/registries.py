"""Packages fetched from npm, Debian and PyPI by those registries' own clients, used as files and never run."""

import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

from timm_etf.errors import UsageError


class Unavailable(UsageError):
    """A package cannot be had on this machine; says how to get its client or what the client answered."""


class Registries:
    """Fetches packages into a folder, each once.

    Args:
        folder: Where downloads go; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()  # the clients run inside it
        self.npm, self.debian, self.wheel = cache(self._npm), cache(self._debian), cache(self._wheel)

    def _npm(self, name: str, version: str) -> Path:
        """Folder of an npm package. Its scripts are not run and its dependencies not fetched."""
        folder = self._new("npm")
        command = [
            "pack",
            "--ignore-scripts",
            "--loglevel=error",
            "--pack-destination",
            str(folder),
            f"{name}@{version}",
        ]
        _client("npm", "install Node.js (on Debian: apt install npm)", command, folder)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):  # extractall has no filter in every Python 3.11
                path = (folder / member.name).resolve()
                content = tar.extractfile(member)
                if content is None or not path.is_relative_to(folder):
                    raise Unavailable(f"{name} {version} is no package: a file of it is to go to {member.name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
        return folder / "package"

    def _debian(self, names: tuple[str, ...]) -> Path:
        """Folder with one folder for each Debian package: its files, unpacked but not installed."""
        folder = self._new("debian")
        _client("apt-get", "it comes with Debian and Ubuntu", ["download", "--quiet", *names], folder)
        for package in folder.glob("*.deb"):
            name = package.name.split("_")[0]
            _client("dpkg-deb", "it comes with Debian and Ubuntu", ["-x", package.name, name], folder)
            package.unlink()
        return folder

    def _wheel(self, name: str, version: str) -> Path:
        """Wheel of a PyPI package, not installed and without its dependencies."""
        folder = self._new("wheel")
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"{name}=={version}"]
        _client(sys.executable, "install pip", command, folder)
        (wheel,) = folder.glob("*.whl")
        return wheel

    def _new(self, name: str) -> Path:
        folder = self.folder / f"{name}-{sum(1 for _ in self.folder.glob('*'))}"
        folder.mkdir(parents=True)
        return folder


def debian_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the Debian packages among `names` that apt can get, by package name.

    Raises:
        Unavailable: If there is no apt, or it knows none of them.
    """
    shown = _client("apt-cache", "it comes with Debian and Ubuntu", ["policy", *names], Path.cwd())
    versions = dict(re.findall(r"^(\S+):\n.*\n  Candidate: (?!\(none\))(\S+)", shown, flags=re.MULTILINE))
    if not versions:
        raise Unavailable(f"apt knows none of {', '.join(names[:3])}{' ...' if names[3:] else ''}: run apt-get update")
    return versions


def _client(program: str, how_to_get_it: str, arguments: list[str], folder: Path) -> str:
    path = shutil.which(program)
    if path is None:
        raise Unavailable(f"needs {program}: {how_to_get_it}")
    result = subprocess.run([path, *arguments], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        errors = [line for line in said if re.match(r"(npm (error|ERR!)|E:|ERROR)", line)]
        reason = (errors or said or [f"exit status {result.returncode}"])[0]
        raise Unavailable(f"{Path(program).name} could not download: {reason.strip()}")
    return result.stdout
