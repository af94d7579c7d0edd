"""Publishing through the real client to a real server, and loading what was published in other processes."""

import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.hub.conftest import Client
from tests.hub.loopback import READ, WRITE, Fault, Hub
from tests.hub.test_card import searched
from timm_etf import UsageError, hub
from timm_etf.atomic import file_sha256

RESULTS = {"source": {"data": "shapes", "count": 37, "top1": 61.25, "top5": 100.0, "epochs": 3, "seed": 5}}

PLAIN = """
import sys, timm, torch
from PIL import Image
assert not any(name.startswith("timm_etf") for name in sys.modules)
name, folder = sys.argv[1:]
images = torch.load(f"{folder}/images.pt")
net = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
assert type(net.fc) is torch.nn.Linear and net.fc.weight.requires_grad
with torch.no_grad():
    torch.save(net(images), f"{folder}/plain.pt")
    assert timm.create_model(f"hf-hub:{name}", pretrained=True, num_classes=7).eval()(images).shape == (2, 7)
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    pixels = AutoImageProcessor.from_pretrained(name)(Image.new("RGB", (200, 150)), return_tensors="pt")["pixel_values"]
    assert pixels.shape[1:] == net.pretrained_cfg["input_size"]
    other = AutoModelForImageClassification.from_pretrained(name).eval()
    torch.save(other(pixel_values=images).logits, f"{folder}/transformers.pt")
"""

OURS = """
import sys, timm_etf, torch
name, folder = sys.argv[1:]
net = timm_etf.create_model(f"hf-hub:{name}", pretrained=True).eval()
assert type(net.fc) is timm_etf.FixedClassifier and not list(net.fc.parameters())
with torch.no_grad():
    torch.save(net(torch.load(f"{folder}/images.pt")), f"{folder}/ours.pt")
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with an export, a log and the licences of its data."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet_etf", num_classes=10, frame_seed=3)
    hub.export(net, tmp_path / "run" / "export", results=RESULTS, tag="shapes")
    epoch = {"epoch": 1, "top1": 50.0, "top5": 100.0}
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps(epoch) + "\n")
    (tmp_path / "run" / "DATA_LICENSES.md").write_text("all mine\n")
    return tmp_path / "run"


def test_from_a_run_to_other_peoples_processes(
    server: Hub, client: Client, run: Path, tmp_path: Path, python_without_plugin: Path
) -> None:
    command = ["timm-etf", "publish", run, "org/name", "--license", "apache-2.0"]
    shown = client(Path(sys.executable).with_name("timm-etf"), *command[1:], token=WRITE)  # the installed script
    assert shown.returncode == 0, shown.stderr
    assert "org/name, which does not exist yet" in shown.stdout
    assert "# name" in shown.stdout
    assert "Nothing was sent. next: the same command with --yes uploads 7 files" in shown.stdout
    assert not [line for line in server.seen if line.startswith(("POST", "PUT"))]

    done = client(*command, "--private", "True", "--tag", "v1", "--yes", token=WRITE)
    assert done.returncode == 0, done.stderr
    repo = server.repos["org/name"]
    assert repo.private
    assert len(repo.commits) == 2, "one commit"
    assert repo.refs["v1"] == repo.refs["main"]
    files = repo.files("main") or {}
    assert set(files) == {
        *("model.safetensors", "config.json", "README.md", "results.json"),
        *("log.jsonl", "DATA_LICENSES.md", "results.png"),
    }
    assert b"license: apache-2.0" in files["README.md"]
    assert b"![Accuracy on the source task" in files["README.md"]

    server.seen.clear()
    again = client(*command, "--yes", token=WRITE)
    assert "nothing new to upload" in again.stdout, again.stderr
    assert not [line for line in server.seen if "commit" in line or line.startswith("PUT")]

    net = timm.create_model("test_resnet_etf", num_classes=10).eval()
    net.load_state_dict(timm.models.load_state_dict(run / "export" / "model.safetensors"))
    torch.save(torch.randn(2, 3, 64, 64), tmp_path / "images.pt")
    with torch.no_grad():
        expected = net(torch.load(tmp_path / "images.pt"))
    (tmp_path / "clean.py").write_text(PLAIN)
    for python, code in ((python_without_plugin, [tmp_path / "clean.py"]), (os.sys.executable, ["-c", OURS])):  # type: ignore[attr-defined]
        loaded = client(python, *code, "org/name", tmp_path, token=READ)
        assert loaded.returncode == 0, loaded.stderr
    for name in ("plain", "ours", "transformers"):
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected), name


def test_changes_branches_pull_requests_and_what_lies_there(server: Hub, client: Client, run: Path) -> None:
    old = {"README.md": b"# Old\n", "pytorch_model.bin": b"pickle", "notes.txt": b"keep me"}
    server.add("org/name", old)
    shown = client("timm-etf", "publish", run, "org/name", token=WRITE)
    assert "changed" in shown.stdout
    assert "-# Old" in shown.stdout
    assert "pytorch_model.bin (pickled weights: better deleted there)" in shown.stdout
    proposed = client("timm-etf", "publish", run, "org/name", "--pr", "--yes", token=WRITE)
    assert "/org/name/discussions/1" in proposed.stdout, proposed.stderr
    assert server.repos["org/name"].files("main") == old
    branched = client("timm-etf", "publish", run, "org/name", "--revision", "dev", "--yes", token=WRITE)
    assert "hf-hub:org/name@dev" in branched.stdout, branched.stderr
    assert server.repos["org/name"].files("main") == old
    files = server.repos["org/name"].files("dev") or {}
    assert files["notes.txt"] == b"keep me"
    assert files["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("token", "fault", "says"),
    [
        ("", None, "Publishing needs a login with write access: hf auth login"),
        (READ, None, "this login may not write there"),
        (WRITE, Fault("/commit/main", "drop"), "The same command tries again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_leaves_nothing_half(
    server: Hub, client: Client, run: Path, token: str, fault: Fault | None, says: str
) -> None:
    server.faults += [fault] if fault else []
    done = client("timm-etf", "publish", run, "org/name", "--yes", token=token)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert says in line
    assert "Traceback" not in done.stderr
    assert not any(files for repo in server.repos.values() for files in repo.commits.values())
    if fault:
        server.faults.clear()
        assert client("timm-etf", "publish", run, "org/name", "--yes", token=token).returncode == 0


def test_a_tag_is_never_left_on_other_weights(server: Hub, client: Client, run: Path, tmp_path: Path) -> None:
    def publish(folder: Path, *options: str) -> str:
        server.seen.clear()
        done = client("timm-etf", "publish", folder, "org/name", "--yes", *options, token=WRITE)
        assert (done.returncode == 2) == done.stderr.startswith("error"), done.stderr
        return done.stderr.strip()

    server.faults.append(Fault("/tag/", "500"))
    assert "error 500" in publish(run, "--tag", "v1")  # the commit is there, its tag not yet
    server.faults.clear()
    for _ in range(2):  # the same command puts it there, and then has nothing left to do
        assert not publish(run, "--tag", "v1")
    refs = server.repos["org/name"].refs
    first = refs["v1"]
    assert first == refs["main"]

    other = tmp_path / "other"
    hub.export(timm.create_model("test_resnet_etf", num_classes=10, frame_seed=4), other)
    for _ in range(2):
        assert publish(other, "--tag", "v1") == (
            "error: org/name already has a tag 'v1', on another commit, and nothing was sent: choose another tag, or "
            "delete that one there."
        )
        assert not [line for line in server.seen if line.startswith(("POST", "PUT"))]
        assert refs == {"main": first, "v1": first}
    assert not publish(other, "--tag", "v2")
    assert refs["v2"] == refs["main"] != first
    assert "already has a tag 'v1'" in publish(other, "--tag", "v1")  # nothing new to upload, and still another commit
    assert refs["v1"] == first
    assert not publish(run, "--revision", "dev", "--tag", "v3")
    assert refs["v3"] == refs["dev"]


def test_a_server_that_stumbles_is_asked_again(server: Hub, client: Client, run: Path) -> None:
    server.faults += [Fault("PUT /lfs", "500", 1), Fault("objects/batch", "500", 1), Fault("/commit/", "500", 1)]
    done = client("timm-etf", "publish", run, "org/name", "--yes", token=WRITE)
    assert done.returncode == 0, done.stderr
    assert not any(fault.times for fault in server.faults)
    assert len(server.repos["org/name"].files("main") or {}) == 7


@pytest.mark.parametrize("repo_id", ["name", "org/na me", "../name", "org/name/x", "org/..", "org/na--me"])
def test_names_that_no_repository_has(run: Path, repo_id: str) -> None:
    with pytest.raises(UsageError, match=r"(?i)repo"):
        hub.plan(run, repo_id)


def test_folders_that_are_no_model_of_ours(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a finished run nor an exported folder"):
        hub.plan(tmp_path / "nothing", "org/name")
    weights = run / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match="is not what config"):
        hub.plan(run, "org/name")


def test_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"log\.jsonl is a link"):
        hub.plan(run, "org/name")


def test_results_of_other_weights_stay_off_the_card(run: Path, tmp_path: Path) -> None:
    other = {"weights_sha256": {"etf": ["0" * 64]}, "reference": "etf", "protocols": {}}
    other |= {"settings": {}, "seconds": {}, "missing": {}, "collapse_of_train_features": {}}
    other |= {"notes": [], "t_intervals_over": ""}
    (tmp_path / "results.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="measured other weights than these"):
        hub.plan(run, "org/name", results=[tmp_path / "results.json"])
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UsageError, match=r"is not a results\.json of timm-etf transfer"):
        hub.plan(run, "org/name", results=[tmp_path / "results.json"])
    (tmp_path / "results.json").write_text(json.dumps(searched("0" * 64)))
    with pytest.raises(UsageError, match=r"measured other weights than these .* run timm-etf retrieval"):
        hub.plan(run, "org/name", results=[tmp_path / "results.json"])
    (tmp_path / "results.json").write_text('{"retrieval": {}}')
    with pytest.raises(UsageError, match=r"is not a results\.json of timm-etf retrieval"):
        hub.plan(run, "org/name", results=[tmp_path / "results.json"])


def test_results_of_retrieval_go_on_the_card(run: Path, tmp_path: Path) -> None:
    weights = file_sha256(run / "export" / "model.safetensors")
    (tmp_path / "results.json").write_text(json.dumps(searched(weights)))
    files = hub.gather(run, "org/name", results=[tmp_path / "results.json"])
    assert "| bars (122, 37) | this | this | 1 | 8.0 | 80.0 | - |" in files["README.md"].decode()
    assert json.loads(files["results.json"])["retrieval"]["bars"]["gallery"] == 122
