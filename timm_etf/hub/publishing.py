"""`publish`: a trained model to the Hugging Face Hub in one commit, shown before anything is sent."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import unified_diff
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from timm_etf.atomic import file_sha256
from timm_etf.download import WEIGHTS
from timm_etf.errors import UsageError, first_line
from timm_etf.hub.card import DATA_LICENSES, LOG, PICTURE, card, own_results, own_searches
from timm_etf.hub.load import locate
from timm_etf.report.results import Checkpoint, Own, OwnGallery, Retrieval, Transfer, read, writer

_FROM_EXPORT = (WEIGHTS, "config.json", "results.json")
_FROM_RUN = (LOG, DATA_LICENSES)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Plan:
    """What publishing would do: the files as they would lie in the repository, beside what lies there.

    Attributes:
        repo_id: Repository, `org/name`.
        revision: Branch; None for the main one.
        files: Content of every file by name.
        remote: Hash of what the repository holds, by name; None if it does not exist or cannot be seen.
        remote_card: Its README.md, empty if there is none.
    """

    repo_id: str
    revision: str | None
    files: dict[str, bytes | Path]
    remote: dict[str, str] | None
    remote_card: str

    @cached_property
    def changed(self) -> list[str]:
        """Names of the files that the repository lacks or holds with another content."""
        return [name for name, content in self.files.items() if not self._is_there(name, content)]

    def _is_there(self, name: str, content: bytes | Path) -> bool:
        there = (self.remote or {}).get(name, "")
        return there == (_sha256(content) if len(there) == 64 else _git_sha1(content))

    def table(self) -> str:
        """Every file with its size and whether it is new, changed, the same, or kept because it lies there."""
        changed = self.changed
        lines = [f"{self.repo_id}{f' at {self.revision}' if self.revision else ''}"]
        lines[0] += "" if self.remote is not None else ", which does not exist yet (or is not visible to this login)"
        for name, content in self.files.items():
            state = "same" if name not in changed else "changed" if name in (self.remote or {}) else "new"
            lines.append(f"  {state:<8}{_size(content):>10}  {name}")
        for name in sorted((self.remote or {}).keys() - self.files.keys() - {".gitattributes"}):
            pickled = name.endswith(_PICKLES)
            lines.append(f"  {'kept':<18}  {name}" + (" (pickled weights: better deleted there)" if pickled else ""))
        return "\n".join(lines)

    def card_or_diff(self) -> str:
        """The card, or what changes in the one that lies there."""
        there, new = self.remote_card.splitlines(), _text(self.files["README.md"]).splitlines()
        if not there:
            return "\n".join(new)
        return "\n".join(unified_diff(there, new, "README.md there", "README.md", lineterm="", n=1)) or "Same card."


def plan(
    run: str | Path,
    repo_id: str,
    *,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Plan:
    """Put together what would be published, and compare it with what is on the Hub; nothing is sent or written.

    Args:
        run: Folder of `timm-etf pretrain`, or one that `timm_etf.hub.export` wrote.
        repo_id: Repository, `org/name`.
        results: results.json files of `timm-etf transfer` or `retrieval` that measured these weights; their numbers go
            on the card.
        license: The weights' licence, one of the Hub's identifiers such as `apache-2.0`.
        revision: Branch; by default the main one.
        token: By default that of huggingface_hub's login.

    Raises:
        UsageError: If the folder is no export, its weights are not those that its config.json or the results speak of,
            the repository's name is not valid, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise UsageError(first_line(e)) from e
    if repo_id.count("/") != 1:
        raise UsageError(f"A repository is called ORG/NAME, got {repo_id!r}.")
    files = gather(run, repo_id, results=results, license=license)
    remote, remote_card = _remote(HfApi(token=token), repo_id, revision)
    return Plan(repo_id, revision, files, remote, remote_card)


def publish(
    planned: Plan,
    *,
    private: bool | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str = "Publish with timm_etf",
    token: str | None = None,
) -> str:
    """Carry out a plan: create the repository if needed and upload what changed in one commit.

    Failed requests are tried again. After an interruption the same plan, made anew, uploads what is
    missing; the repository shows either the whole commit or nothing of it.

    Args:
        planned: What `plan` returned.
        private: Whether a new repository is private; by default as the organisation has it.
        tag: Tag of the published commit, such as `v1`.
        create_pr: Propose the commit as a pull request; the repository must exist.
        message: First line of the commit message.
        token: By default that of huggingface_hub's login.

    Returns:
        Address of the commit or pull request, or of the repository where nothing had changed.

    Raises:
        UsageError: If there is no login, the tag is there on another commit, or the Hub refuses or cannot be reached.
    """
    if not (token or get_token()):
        raise UsageError("Publishing needs a login with write access: hf auth login")
    api = HfApi(token=token)
    repo_id, revision = planned.repo_id, planned.revision
    try:
        if tag and not create_pr:
            _check_tag(api, planned, tag)
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision and planned.remote is None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit, url = revision, f"{api.endpoint}/{repo_id}"
        if made := _commit(api, planned, message, create_pr):
            commit, url = made.oid, made.pr_url or made.commit_url
        if tag and not create_pr:
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=not planned.changed)  # there: on this commit
    except (HfHubHTTPError, OSError, OfflineModeIsEnabled) as e:
        raise _refused(e, f"Cannot publish to {repo_id}") from e
    except Exception as e:  # huggingface_hub changed its HTTP library, and lets that one's errors through
        if not type(e).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        raise _refused(e, f"Cannot publish to {repo_id}") from e
    return url


def _check_tag(api: HfApi, planned: Plan, tag: str) -> None:
    """Refuse a tag that is there already, unless it is on the very commit that it would be put on."""
    try:
        refs = api.list_repo_refs(planned.repo_id)
    except RepositoryNotFoundError:
        return
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if tagged and (planned.changed or tagged != heads.get(planned.revision or "main")):
        raise UsageError(
            f"{planned.repo_id} already has a tag {tag!r}, on another commit, and nothing was sent: choose another "
            "tag, or delete that one there."
        )


def _commit(api: HfApi, planned: Plan, message: str, create_pr: bool) -> CommitInfo | None:
    """Upload what changed; None if nothing did, or an attempt whose answer was lost had gone through.

    huggingface_hub tries the uploads again, but not the request that makes the commit of them.
    """
    waits = iter((1, 2, 4))
    while planned.changed:
        operations = [CommitOperationAdd(name, planned.files[name]) for name in planned.changed]
        try:
            return api.create_commit(
                planned.repo_id,
                operations,
                commit_message=message,
                revision=planned.revision,
                create_pr=create_pr,
            )
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", 500)
            wait = next(waits, None)
            if wait is None or create_pr or status < 500:  # a second pull request would not be seen as one too many
                raise
            time.sleep(wait)
        remote, remote_card = _remote(api, planned.repo_id, planned.revision)
        planned = replace(planned, remote=remote, remote_card=remote_card)
    return None


def gather(
    run: str | Path, repo_id: str, *, results: Sequence[str | Path] = (), license: str | None = None
) -> dict[str, bytes | Path]:
    """The files that would be published, by name: those of the export and the run, the card and its picture.

    Arguments and errors are those of `plan`.
    """
    run, compared = Path(run), [Path(r) for r in results]
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / "config.json").is_file():
        raise UsageError(f"{run} is neither a finished run nor an exported folder: it has no config.json.")
    found = {name: folder / name for name in _FROM_EXPORT if (folder / name).exists()}
    found |= {name: path for name in _FROM_RUN for path in (run / name, folder / name) if path.exists()}
    for path in found.values():
        if path.is_symlink():
            raise UsageError(f"{path} is a link, and what it points to is not uploaded: copy the file there.")
    located = locate(f"local-dir:{folder}")
    measured = read(found["results.json"], Checkpoint) if "results.json" in found else Checkpoint()
    sha256 = file_sha256(folder / WEIGHTS)
    searched = [path for path in compared if writer(path) is Retrieval]
    if searches := {data: found for path in searched for data, found in _own_searches(path, sha256).items()}:
        measured["retrieval"] = searches
    if parts := [_own_results(path, sha256) for path in compared if path not in searched]:
        measured["transfer"] = parts
    files: dict[str, bytes | Path] = {WEIGHTS: found[WEIGHTS], "config.json": found["config.json"]}
    files["results.json"] = (json.dumps(measured, indent=2) + "\n").encode()
    files |= {name: found[name] for name in _FROM_RUN if name in found}
    if find_spec("matplotlib") and (picture := _picture(measured, found.get(LOG))):
        files[PICTURE] = picture
    text = card(located.config, measured, repo_id, license=license, beside=files)
    return {"README.md": text.encode(), **files}


def _own_results(path: Path, sha256: str) -> Own:
    own = own_results(read(path, Transfer), sha256)
    if own is None:
        raise _of_others(path, sha256, "transfer")
    return own


def _own_searches(path: Path, sha256: str) -> dict[str, OwnGallery]:
    own = own_searches(read(path, Retrieval), sha256)
    if not own:
        raise _of_others(path, sha256, "retrieval")
    return own


def _of_others(path: Path, sha256: str, verb: str) -> UsageError:
    return UsageError(
        f"{path} measured other weights than these (SHA-256 {sha256[:12]}...): run timm-etf {verb} on this model."
    )


def _picture(results: Checkpoint, log: Path | None) -> bytes | None:
    from timm_etf.hub.picture import draw

    with TemporaryDirectory() as folder:
        path = draw(results, log, Path(folder) / PICTURE)
        return path.read_bytes() if path else None


def _remote(api: HfApi, repo_id: str, revision: str | None) -> tuple[dict[str, str] | None, str]:
    """Hashes of the repository's files, by name, and its card."""
    try:
        there = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        hashes = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in there if isinstance(f, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, ""
    except HFValidationError as e:
        raise UsageError(first_line(e)) from e
    except Exception as e:
        raise _refused(e, f"Cannot look at {repo_id}") from e
    if "README.md" not in hashes:
        return hashes, ""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=api.token)
    except Exception as e:
        raise _refused(e, f"Cannot read the card of {repo_id}") from e
    return hashes, Path(path).read_text(encoding="utf-8", errors="replace")


def _refused(error: Exception, what: str) -> UsageError:
    """One line for an error of the Hub or the network."""
    if isinstance(error, OfflineModeIsEnabled):
        return UsageError(f"{what}: HF_HUB_OFFLINE is set.")
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f"{what}: this login may not write there, or it does not exist. Check the name, and hf auth whoami."
        )
    if status is not None:
        said = getattr(error, "server_message", None) or first_line(error)
        return UsageError(f"{what}: the Hub answered with error {status}: {said}. The same command tries again.")
    return UsageError(f"{what} ({type(error).__name__}: {first_line(error)}). The same command tries again.")


def _size(content: bytes | Path) -> str:
    size: float = len(content) if isinstance(content, bytes) else content.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _text(content: bytes | Path) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def _sha256(content: bytes | Path) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)


def _git_sha1(content: bytes | Path) -> str:
    """What git, and with it the Hub, calls a small file."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
