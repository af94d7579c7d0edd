"""Commands and pieces of code as real processes, without the seconds that importing torch and timm takes.

A server process imports the package once and forks: each command is a process of its own, in its own session and
process group, with its own environment, working directory, file descriptors, signals and exit status. huggingface_hub
reads its environment (HF_HOME, HF_ENDPOINT) when it is imported: a command that is given such a variable, or another
PYTHONPATH, or is to be `fresh`, imports it and all that stands on it again.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *(
            "timm_etf.convert",
            "timm_etf.pretrain.loop",
            "timm_etf.transfer.run",
            "timm_etf.studies.geometry",
            "timm_etf.demo",
            "timm_etf.cli",
        ),
        *("timm_etf.geometry.metrics", "timm_etf.transfer.plots", "timm_etf.hub.picture", "datasets", "webdataset"),
    ]
)


_READ_THE_ENVIRONMENT = {"huggingface_hub", "accelerate", "datasets", "timm", "timm_etf"}


class Command:
    """A running `timm-etf ARGUMENTS`, or `python -c CODE ARGUMENTS`, with the methods of `subprocess.Popen`."""

    def __init__(
        self,
        *arguments: object,
        code: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        largest_file: int = resource.RLIM_INFINITY,
        fresh: bool = False,
    ) -> None:
        self.args = [str(a) for a in arguments]
        self._output = tempfile.mkdtemp(prefix="timm_etf-command-")
        weakref.finalize(self, shutil.rmtree, self._output, ignore_errors=True)
        self._process: Any = _server.Process(
            target=_main,
            args=(code, self.args, dict(env or {}), str(cwd or Path.cwd()), self._output, largest_file, fresh),
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit status, or None while it runs; a signal's number, negative, if one ended it."""
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """Wait for the exit status; after `timeout` seconds the command is killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        """Signal the process alone."""
        os.kill(self.pid, signum)

    def send_signal_to_group(self, signum: int) -> None:
        """Signal the process and all it has started, as a terminal does for Ctrl-C."""
        os.killpg(self.pid, signum)

    def kill(self) -> None:
        """End it, and all it has started, at once."""
        if self.poll() is None:
            try:
                self.send_signal_to_group(signal.SIGKILL)
            except ProcessLookupError:  # it is too young to have a group of its own
                self._process.kill()
        self._process.join()

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._read("out")

    @property
    def stderr(self) -> str:
        """What it has printed to the error stream."""
        return self._read("err")

    def _read(self, name: str) -> str:
        path = Path(self._output, name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def run(*arguments: object, check: bool = False, timeout: float = 120, **options: Any) -> Any:
    """Run `timm-etf ARGUMENTS` to its end; what `subprocess.run` returns, with text. `options` are `Command`'s."""
    command = Command(*arguments, **options)
    command.wait(timeout)
    done = subprocess.CompletedProcess(command.args, command.poll(), command.stdout, command.stderr)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command.args)}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return done


def start_ranks(
    count: int,
    *arguments: object,
    more: Sequence[Sequence[object]] = (),
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Command]:
    """Start the processes that torchrun would start on one machine without GPUs: one command for each rank.

    `more` are further arguments for each rank, where they are to differ.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    return [
        Command(*arguments, *rest, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r), **(env or {})}, **options)
        for r, rest in enumerate(more or [()] * count)
    ]


def run_ranks(count: int, *arguments: object, timeout: float = 120, **options: Any) -> list[Any]:
    """Run the processes of `start_ranks` to their end, without errors; what `subprocess.run` returns for each."""
    commands = start_ranks(count, *arguments, **options)
    deadline = time.monotonic() + timeout
    try:
        for command in commands:
            status = command.wait(max(0.1, deadline - time.monotonic()))
            assert status == 0, f"{' '.join(command.args)}: exit status {status}\n{command.stderr[-4000:]}"
    finally:
        for command in commands:
            command.kill()
    return [subprocess.CompletedProcess(c.args, c.poll(), c.stdout, c.stderr) for c in commands]


def _main(
    code: str, arguments: list[str], env: dict[str, str], cwd: str, output: str, largest_file: int, fresh: bool
) -> None:
    """In the new process: become the command."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # and not the server's, for the processes of loaders
    os.environ.update(env)
    sys.path[:0] = filter(None, [env.get("PYTHONPATH")])
    if fresh or any(name.startswith(("HF_", "PYTHONPATH")) for name in env):
        for module in [m for m in sys.modules if m.partition(".")[0] in _READ_THE_ENVIRONMENT]:
            del sys.modules[module]
    os.chdir(cwd)
    for name, stream, number in (("out", sys.stdout, 1), ("err", sys.stderr, 2)):
        stream.flush()
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["-c" if code else "timm-etf", *arguments]
    if code:
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    else:
        from timm_etf.cli import main

        main()
