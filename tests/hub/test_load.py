"""`hf-hub:` names through the real huggingface_hub client and a real server on loopback, in processes of their own."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

from timm_etf import hub

COMMIT = "0" * 39 + "1"


class _Resolve(BaseHTTPRequestHandler):
    """The part of the Hub that a download uses: HEAD and GET of /ORG/NAME/resolve/REVISION/FILE."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        repo, _, rest = self.path.partition("/resolve/")
        file = self.folder / rest.partition("/")[2]
        if repo != "/org/name" or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repo == "/org/name" else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(_Resolve):
        folder = tmp_path / "model"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def _run(code: str, server: str, home: Path, *arguments: str, offline: bool = False) -> str:
    env = os.environ | {"HF_ENDPOINT": server, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    env["HF_HUB_OFFLINE"] = "1" if offline else "0"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


CODE = """
import sys, timm, torch
name, images, logits = sys.argv[1:]
if name.startswith("plain "):
    sys.modules["timm_etf"] = None
    net = timm.create_model(name.removeprefix("plain "), pretrained=True)
    assert type(net.fc).__name__ == "Linear"
else:
    import timm_etf
    net = timm_etf.create_model(name, pretrained=True)
    assert type(net.fc).__name__ == "FixedClassifier"
with torch.no_grad():
    torch.save(net.eval()(torch.load(images)), logits)
print("done")
"""


def test_a_hub_repository_loads_with_and_without_the_plugin_and_then_offline(tmp_path: Path, server: str) -> None:
    net = timm.create_model("test_resnet_etf", num_classes=10).eval()
    hub.export(net, tmp_path / "model")
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        expected = net(images)
    arguments = [str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    for name, offline in (
        ("hf-hub:org/name", False),
        ("plain hf-hub:org/name@main", False),
        ("hf-hub:org/name", True),  # from the cache of the first
    ):
        printed = _run(CODE, server, tmp_path / "home", name, *arguments, offline=offline)
        assert printed.endswith("done\n"), printed
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
        (tmp_path / "logits.pt").unlink()


def test_an_unknown_repository_is_one_clear_line(tmp_path: Path, server: str) -> None:
    code = (
        "import timm_etf; from timm_etf.errors import one_line_errors\n"
        "with one_line_errors(): timm_etf.create_model('hf-hub:org/other', pretrained=True)"
    )
    printed = _run(code, server, tmp_path / "home").strip()
    assert printed.startswith("error: Cannot get config.json of hf-hub:org/other")
    assert "\n" not in printed
