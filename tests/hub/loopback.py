"""A Hugging Face Hub on loopback: what the real huggingface_hub client needs to create, upload, list and download.

It shows that the client and this package fit together, not how huggingface.co itself behaves: no xet, no multipart
uploads, no scopes of tokens. Faults are switched on by the test that wants them.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"
"""The two tokens that it knows."""


@dataclass
class Repo:
    """Files by name for every commit; refs are branches, tags and pull requests, `tags` says which are tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: set[str] = field(default_factory=set)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path` contains `where`, the first `times` times."""

    where: str
    kind: str
    """`500`; `drop`: no answer; `cut`: half the body, then the end; `reset`: then a reset; `short`: half, called whole;
    `swap`: another byte; `slow`: four seconds before the answer."""
    times: int = 10**6


@dataclass
class Hub:
    """State of the server; the requests it answered are in `seen`, the files it sent from the middle in `resumed`."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)

    def add(self, repo_id: str, files: dict[str, bytes], **options: Any) -> str:
        """Put a commit into a repository, as if somebody had pushed it; returns its hash."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        return self.commit(repo, files, "main")

    def commit(self, repo: Repo, files: dict[str, bytes], ref: str) -> str:
        sha = hashlib.sha1(repr((len(repo.commits), sorted(files))).encode()).hexdigest()
        repo.commits[sha] = files
        repo.refs[ref] = sha
        return sha


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def etag(path: str, content: bytes) -> str:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return (hashlib.sha256(content) if is_lfs(path) else git).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.state
        self.body = self._read()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        hub.seen.append(f"{self.command} {path}")
        self.fault = next((f for f in hub.faults if f.times and f.where in hub.seen[-1]), None)
        if self.fault:
            self.fault.times -= 1
            if self.fault.kind == "500":
                return self._error(500, "")
            if self.fault.kind == "drop":
                return self._end(reset=True)
            if self.fault.kind == "slow":
                time.sleep(4)
        routes = [
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/(\w+)", self._put),
            (r"POST /lfs/verify", lambda: self._json({})),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", lambda r, rev: self._commit(r, rev, "create_pr" in query)),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"POST /api/models/([^/]+/[^/]+)/tag/(.+)", self._tag),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"GET /api/(datasets/[^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"GET /api/(datasets/[^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", lambda r, v, f: self._tree(r, v, f, query)),
            (r"POST /api/(datasets/[^/]+/[^/]+)/paths-info/([^/]+)", self._paths),
            (r"(?:GET|HEAD) /(datasets/[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"GET /api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, handle in routes:
            if match := re.fullmatch(pattern, hub.seen[-1]):
                return handle(*match.groups())
        self._error(404, "")

    # writing

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may_write():
            return
        url = {"url": f"{self.state.url}/{name}", "name": name}
        if name in self.state.repos:
            return self._json(url, 409)
        self.state.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json(url)

    def _preupload(self, repo: str, revision: str) -> None:
        if self._repo(repo, revision) and self._may_write():
            files = [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def _batch(self, repo: str) -> None:
        if not self._may_write():
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.state.url}/lfs/verify"}
            objects.append(wanted | ({} if wanted["oid"] in self.state.lfs else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "")
        self.state.lfs[oid] = self.body
        self._json({})

    def _commit(self, name: str, revision: str, create_pr: bool) -> None:
        if not (repo := self._repo(name, revision)) or not self._may_write():
            return
        files = dict(repo.files(revision) or {})
        for line in self.body.splitlines():
            action = json.loads(line)
            value = action["value"]
            if action["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif action["key"] == "lfsFile":
                files[value["path"]] = self.state.lfs[value["oid"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        sha = self.state.commit(repo, files, f"refs/pr/{number}" if create_pr else revision)
        answer = {"commitUrl": f"{self.state.url}/{name}/commit/{sha}", "commitOid": sha}
        answer |= {"pullRequestUrl": f"{self.state.url}/{name}/discussions/{number}"} if create_pr else {}
        self._json(answer)

    def _branch(self, name: str, branch: str) -> None:
        if (repo := self._repo(name, "main")) and self._may_write():
            taken = branch in repo.refs
            repo.refs.setdefault(branch, repo.refs["main"])
            self._json({}, 409 if taken else 200)

    def _tag(self, name: str, revision: str) -> None:
        if (repo := self._repo(name, revision)) and self._may_write():
            tag = json.loads(self.body)["tag"]
            taken = tag in repo.refs
            repo.refs.setdefault(tag, repo.refs.get(revision, revision))
            repo.tags.add(tag)
            self._json({}, 409 if taken else 200)

    # reading

    def _info(self, name: str, revision: str | None) -> None:
        if repo := self._repo(name, revision or "main"):
            files = [{"rfilename": path} for path in repo.files(revision or "main") or {}]
            sha = repo.refs.get(revision or "main", revision)
            about = {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
            self._json({**about, "id": name.partition("/")[2], "sha": sha, "tags": [], "siblings": files})

    def _tree(self, name: str, revision: str, folder: str | None = None, query: Any = None) -> None:
        """All files; of data sets, as the Hub has it, those of a folder, and the folders in it."""
        repo = self._repo(name, revision)
        if not repo:
            return
        files = repo.files(revision) or {}
        if query is None:
            return self._rows(files)
        base = PurePosixPath(folder or "")
        below = {path: content for path, content in files.items() if base in PurePosixPath(path).parents}
        folders = {str(f) for path in below for f in PurePosixPath(path).parents if base in f.parents}
        if query.get("recursive", ["False"])[0].lower() != "true":
            below = {path: content for path, content in below.items() if PurePosixPath(path).parent == base}
            folders = {path for path in folders if PurePosixPath(path).parent == base}
        self._rows(below, folders)

    def _paths(self, name: str, revision: str) -> None:
        if repo := self._repo(name, revision):
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            files = repo.files(revision) or {}
            self._rows({path: files[path] for path in asked if path in files})

    def _rows(self, files: dict[str, bytes], folders: Collection[str] = ()) -> None:
        rows = [{"type": "directory", "path": path, "size": 0, "oid": "2" * 40} for path in sorted(folders)]
        for path, content in files.items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "1" * 40}
            if is_lfs(path):
                row["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
            else:
                row["oid"] = etag(path, content)
            rows.append(row)
        self._json(rows)

    def _refs(self, name: str) -> None:
        if repo := self._repo(name, "main"):
            refs = [{"name": r, "ref": r, "targetCommit": commit} for r, commit in repo.refs.items()]
            tags = [ref for ref in refs if ref["name"] in repo.tags]
            branches = [ref for ref in refs if ref not in tags]
            self._json({"branches": branches, "converts": [], "tags": tags})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._repo(name, revision)):
            return
        commit = repo.refs.get(revision, revision)
        content = repo.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if self.fault and self.fault.kind == "swap":  # as long, with as good a name, but something else
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
            self.state.resumed.append(f"{name}/{path}")
        self._send(status, content, headers)

    # the wire

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repo(self, name: str, revision: str) -> Repo | None:
        """The repository if this token may see it and it has that revision; otherwise the error is sent."""
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and self._token() not in (WRITE, READ)):
            self._error(401 if not self._token() else 404, "RepoNotFound")
        elif repo.gated and "/resolve/" in self.path and self._token() != WRITE:
            self._error(403, "GatedRepo")
        elif repo.files(revision) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _may_write(self) -> bool:
        token = self._token()
        if token != WRITE:
            self._error(403 if token == READ else 401, "")
        return token == WRITE

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.kind if self.fault and self.command != "HEAD" else ""
        if kind == "short":
            body = body[: len(body) // 2]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # the client may have gone
            half = kind in ("cut", "reset")
            self.wfile.write(body[: len(body) // 2] if half else body)
            self.wfile.flush()
            if half:
                self._end(reset=kind == "reset")

    def _end(self, *, reset: bool) -> None:
        """End the connection without a word."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_WR)
