"""`timm-etf run`: scripts that know nothing of this package, run as python runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

SCRIPT = """
import os, sys, helper, timm
print(__name__, os.path.basename(__file__), sys.argv[1:], helper.VALUE, sys.modules["__main__"].__dict__ is globals())
print(type(timm.create_model(sys.argv[1], num_classes=10).fc).__name__)
import timm_etf
print(timm_etf.create_model.__name__, timm_etf.coverage.__name__)
sys.exit(7)
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 'beside it'")
    return folder


def expected(script: str) -> list[str]:
    said = f"__main__ {script} ['test_resnet_etf', '--help', '-x', '--', 'a b'] beside it True"
    return [said, "FixedClassifier", "create_model coverage"]


def test_a_script_runs_as_python_runs_it(scripts: Path) -> None:
    given = ("test_resnet_etf", "--help", "-x", "--", "a b")
    done = commands.run("run", scripts / "train.py", *given)
    assert (done.returncode, done.stdout.splitlines()) == (7, expected("train.py")), done.stderr
    done = commands.run("run", "-m", "train", *given, cwd=scripts)
    assert (done.returncode, done.stdout.splitlines()) == (7, expected("train.py")), done.stderr


def test_its_errors_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise FileNotFoundError('theirs')")
    done = commands.run("run", tmp_path / "broken.py")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("FileNotFoundError: theirs\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.py"], "error: No script nowhere.py to run."),
        (["-m", "no.such.module"], "error: No module no.such.module to run."),
        (["-m"], "error: timm-etf run -m takes a module."),
    ],
)
def test_what_is_not_there_is_one_line(arguments: list[str], says: str) -> None:
    done = commands.run("run", *arguments)
    assert (done.returncode, done.stderr.strip()) == (2, says)


@pytest.mark.slow
def test_under_launchers(scripts: Path) -> None:
    for launcher in ("torch.distributed.run --nproc-per-node 2", "accelerate.commands.launch --cpu --num_processes 1"):
        command = [sys.executable, "-m", *launcher.split(), "-m", "timm_etf", "run", scripts / "train.py"]
        (scripts / "train.py").write_text(SCRIPT.replace("sys.exit(7)", "print('rank', os.environ.get('RANK', '0'))"))
        done = subprocess.run([*command, "test_resnet_etf"], capture_output=True, text=True, cwd=scripts, check=False)
        assert done.returncode == 0, done.stderr
        ranks = {line for line in done.stdout.splitlines() if line.startswith("rank")}
        assert ranks == ({"rank 0", "rank 1"} if "nproc" in launcher else {"rank 0"})
