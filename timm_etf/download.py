"""`download`: one file of a Hub repository, checked against its hash, and one clear line for whatever goes wrong."""

import errno
import re
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_etf.atomic import file_sha256
from timm_etf.errors import UsageError, first_line

WEIGHTS = "model.safetensors"
"""The one file of weights that is written and read: never a pickle."""


class MissingFile(UsageError):
    """The repository and revision exist, but hold no such file."""


def download(repo: str, filename: str, *, cache_dir: str | Path | None = None, sha256: str | None = None) -> Path:
    """Get a file of a Hub model repository from huggingface_hub's cache or the Hub.

    A large file is compared with the hash the Hub gave for it, every file with `sha256` if given. One that differs is
    taken out of the cache and downloaded once more, so that neither a silent error of the network nor a damaged disk
    leaves a wrong model behind.

    Args:
        repo: `org/name`, or `org/name@revision` with a branch, tag or commit.
        filename: Path of the file in the repository.
        cache_dir: huggingface_hub's cache; by default its own setting.
        sha256: What the file's SHA-256 must be, in hexadecimal.

    Returns:
        Path in the cache, in the folder of the commit it is from.

    Raises:
        MissingFile: If the repository has no such file.
        UsageError: If it cannot be had for another reason: name, login, network, disk, or a wrong hash.
    """
    again = not constants.HF_HUB_OFFLINE
    while True:
        path = _download(repo, filename, cache_dir)
        expected = sha256 or _hash_in_name(path.resolve().name)
        if expected is None or file_sha256(path) == expected:
            return path
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if not again:
            raise UsageError(
                f"{filename} of {repo} is not the file that was published: its SHA-256 is not {expected[:12]}.... It "
                "was taken out of the cache. Try again; if that does not help, the repository itself is damaged."
            )
        again = False


def _download(repo: str, filename: str, cache_dir: str | Path | None) -> Path:
    repo_id, _, revision = repo.partition("@")
    waits = iter((1, 2))
    while True:
        try:
            return Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))
        except Exception as e:
            # huggingface_hub resumes most broken connections itself, but lets a reset one's error through.
            wait = next(waits, None) if type(e).__module__.startswith("httpx") else None
            if wait is None:
                raise _explained(e, repo, filename) from e
            time.sleep(wait)


def _hash_in_name(blob: str) -> str | None:
    """The cache names a large file by the SHA-256 that the Hub sends as its ETag, and others by a git hash."""
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None


def _explained(error: Exception, repo: str, filename: str) -> UsageError:
    """One line for an error of huggingface_hub, the network or the disk."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    what = f"Cannot get {filename} of {repo}"
    if isinstance(error, HFValidationError):
        return UsageError(f"{what}: {first_line(error)}")
    if isinstance(cause, GatedRepoError):
        return UsageError(f"{what}: access has to be asked for on its page; then log in with: hf auth login")
    if isinstance(cause, RepositoryNotFoundError):
        return UsageError(f"{what}: no such repository. If it is private, log in with: hf auth login")
    if isinstance(cause, RevisionNotFoundError):
        return UsageError(f"{what}: the repository has no such branch, tag or commit.")
    if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return UsageError(f"{what}: it is not in the cache, and HF_HUB_OFFLINE forbids to download it.")
    if isinstance(cause, EntryNotFoundError):
        return MissingFile(f"{what}: there is no such file in it.")
    if isinstance(cause, HfHubHTTPError):
        status: Any = getattr(cause.response, "status_code", None)
        if status in (401, 403):
            return UsageError(f"{what}: access denied ({status}). Log in with: hf auth login")
        return UsageError(f"{what}: the Hub answered with error {status}. Try again later.")
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return UsageError(f"{what}: cannot write to the cache ({cause.strerror}). Make room, or set HF_HOME.")
    return UsageError(f"{what} ({type(cause).__name__}: {first_line(cause)}). Check the network and try again.")
