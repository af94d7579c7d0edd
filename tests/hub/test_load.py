"""Loading from the Hub through the real client and a server that misbehaves, in processes of their own."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.hub.conftest import Client
from tests.hub.loopback import READ, Fault, Hub, Repo
from timm_etf import hub

# Loads every name and prints what came of it, one JSON list; "disk full" before a name limits the size of its files.
DRIVER = """
import json, resource, signal, sys, torch, timm_etf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
images, said = torch.load(sys.argv[1]), []
for name in sys.argv[2:]:
    full = name.startswith("disk full ")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        net = timm_etf.create_model("hf-hub:" + name.removeprefix("disk full "), pretrained=True).eval()
        with torch.no_grad():
            said.append([type(net.fc).__name__, net(images).flatten().tolist()])
    except timm_etf.UsageError as e:
        said.append(str(e))
print(json.dumps(said))
"""


class Loader:
    """Loads repositories in a process and knows what the exported model's answer is."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        torch.manual_seed(0)
        net = timm.create_model("test_resnet_etf", num_classes=10).eval()
        self.files = {p.name: p.read_bytes() for p in hub.export(net, folder / "model").iterdir()}
        images = torch.randn(2, 3, 64, 64)
        torch.save(images, folder / "images.pt")
        with torch.no_grad():
            self.right = ["FixedClassifier", net(images).flatten().tolist()]

    def __call__(self, *names: str, **environment: str) -> list[object]:
        done = self.client(sys.executable, "-c", DRIVER, self.folder / "images.pt", *names, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def changed(self, change: object) -> dict[str, bytes]:
        """The model's files with another config.json."""
        config = json.loads(self.files["config.json"])
        change(config)  # type: ignore[operator]
        return self.files | {"config.json": json.dumps(config).encode()}


@pytest.fixture
def loader(client: Client, tmp_path: Path) -> Loader:
    return Loader(client, tmp_path)


def test_what_passes_is_survived_and_what_stays_is_one_line(server: Hub, loader: Loader, tmp_path: Path) -> None:
    def weights(repo: str, kind: str, times: int = 10**6) -> None:
        server.add(f"org/{repo}", loader.files)
        server.faults.append(Fault(f"GET /org/{repo}/resolve/{server.repos[f'org/{repo}'].refs['main']}/", kind, times))

    for kind in ("drop", "cut", "reset", "slow", "swap"):
        weights(f"once-{kind}", kind, 1)
    passed = [f"org/once-{kind}" for kind in ("drop", "cut", "reset", "slow", "swap")]
    for kind in ("short", "swap"):
        weights(f"always-{kind}", kind)
    server.add("org/disk", loader.files)
    stayed = [*(f"org/always-{kind}" for kind in ("short", "swap")), "disk full org/disk"]
    for name, outcome in zip(passed + stayed, loader(*passed, *stayed), strict=True):
        if name in passed:
            assert outcome == loader.right, name
        else:
            assert isinstance(outcome, str), name
            assert outcome.startswith("Cannot get model.safetensors") or "is not the file that was published" in outcome
            assert "\n" not in outcome
    server.faults.clear()
    # What went wrong has left nothing behind that would be taken for the model: the cache heals by itself,
    assert loader(*(name.removeprefix("disk full ") for name in stayed)) == [loader.right] * len(stayed)
    # and then needs no network, not even a name to resolve.
    server.faults.append(Fault("/", "drop"))
    assert loader("org/disk", HF_HUB_OFFLINE="1") == [loader.right]
    assert loader("org/disk", HF_ENDPOINT="http://127.0.0.1:9") == [loader.right]
    [said] = loader("org/never", HF_HUB_OFFLINE="1")
    assert said == (
        "Cannot get config.json of org/never: it is not in the cache, and HF_HUB_OFFLINE forbids to download it."
    )


def test_a_large_file_is_continued_where_it_broke_off(server: Hub, client: Client, tmp_path: Path) -> None:
    folder = hub.export(timm.create_model("resnet10t_etf", num_classes=1000), tmp_path / "model")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(files["model.safetensors"]) > 21e6, "the client writes 10 MiB at a time"
    commit = server.add("org/large", files)
    server.faults.append(Fault(f"GET /org/large/resolve/{commit}/", "cut", 1))
    code = "import timm_etf; print(timm_etf.create_model('hf-hub:org/large', pretrained=True).fc)"
    done = client(sys.executable, "-c", code)
    assert "FixedClassifier" in done.stdout, done.stderr
    assert server.resumed == ["org/large/model.safetensors"]


def test_a_damaged_cache_is_mended_or_refused(server: Hub, loader: Loader, tmp_path: Path) -> None:
    server.add("org/name", loader.files)
    assert loader("org/name") == [loader.right]
    [blob] = (p for p in (tmp_path / "home").rglob("blobs/*") if p.stat().st_size > 10**6)
    for offline in ("1", "0"):
        content = bytearray(loader.files["model.safetensors"])
        content[-1] ^= 1
        blob.write_bytes(content)
        [said] = loader("org/name", HF_HUB_OFFLINE=offline)
        assert (said == loader.right) == (offline == "0"), said
        if offline == "1":
            assert "is not the file that was published" in str(said)


def test_repositories_that_are_not_what_they_should_be(server: Hub, loader: Loader, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    server.add("org/pickled", {"config.json": loader.files["config.json"], "pytorch_model.bin": pickled})
    elsewhere = loader.changed(lambda c: c["pretrained_cfg"].update(hf_hub_filename="../../pytorch_model.bin"))
    server.add("org/elsewhere", elsewhere | {"../../pytorch_model.bin": pickled})
    server.add("org/newer", loader.changed(lambda c: c["etf"].update(format=2)))
    server.add("org/hash", loader.changed(lambda c: c["etf"].update(weights_sha256="0" * 64)))
    server.add("org/frame", loader.changed(lambda c: c["etf"].update(frame="octopus")))
    server.add("org/transformers", {"config.json": b'{"model_type": "bert"}'})
    server.add("org/empty", {"README.md": b""})
    server.add("org/gated", loader.files, gated=True)
    server.add("org/private", loader.files, private=True)
    server.repos["org/escape"] = Repo(commits={"../../../../../escaped": loader.files})
    server.repos["org/escape"].refs["main"] = "../../../../../escaped"
    expected = {
        "org/pickled": "hf-hub:org/pickled has no model.safetensors. Pickled weights can run code",
        "org/elsewhere": "points to another file than model.safetensors",
        "org/newer": "was written by a newer timm_etf (etf format 2",
        "org/hash": "model.safetensors of org/hash",
        "org/frame": "frame 'octopus', which this version does not know",
        "org/transformers": "has no 'architecture': it is not one of timm's",
        "org/empty": "has no config.json: it is not a model of timm's",
        "org/gated": "access has to be asked for on its page",
        "org/private": "no such repository. If it is private, log in with: hf auth login",
        "org/missing": "no such repository",
        "org/newer@v9": "the repository has no such branch, tag or commit",
        "org/../name": "Cannot get config.json of org/../name",
        "org/escape": "",
    }
    for (name, says), outcome in zip(expected.items(), loader(*expected), strict=True):
        assert isinstance(outcome, str), name
        assert says in outcome, name
        assert "\n" not in outcome, name
    assert not (tmp_path / "ran").exists()
    assert not [*tmp_path.rglob("escaped"), *tmp_path.parent.glob("escaped")]
    assert loader("org/private", token=READ) == [loader.right]


@pytest.mark.slow  # the client tries again for half a minute
def test_a_hub_that_is_down_is_one_line(server: Hub, loader: Loader) -> None:
    server.faults.append(Fault("/org/down/", "500"))
    server.add("org/down", loader.files)
    [said] = loader("org/down")
    assert "the Hub answered with error 500" in str(said)


def test_a_revision_is_pinned_and_one_commit_gives_config_and_weights(server: Hub, loader: Loader) -> None:
    first = server.add("org/name", loader.files)
    server.repos["org/name"].refs["v1"] = first
    server.add("org/name", {"README.md": b"weights are gone"})
    new, tagged, commit = loader("org/name", "org/name@v1", f"org/name@{first}")
    assert "has no config.json" in str(new)
    assert tagged == commit == loader.right
    # The tag says which commit; everything after that names the commit.
    assert {line.split("/resolve/")[1] for line in server.seen if "model.safetensors" in line} == {
        f"{first}/model.safetensors"
    }
