"""The errors this package raises on purpose, and how a command shows them."""

import errno
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from timm_etf.processes import is_first_process


class UsageError(ValueError):
    """Input that cannot be used; the message is one line and names the fix.

    A command prints the message alone (no traceback) and exits with status 2. A `ValueError`, so that library callers
    need not know this class.
    """


class Interrupted(BaseException):
    """A long command was asked to stop (Ctrl-C, SIGTERM) and has saved what it needs to continue.

    As KeyboardInterrupt it is no `Exception`, which whoever goes on after a failure would take it for.

    Args:
        signum: Number of the signal; the command exits with status 128 + signum, as a shell expects, or after SIGUSR1,
            with which schedulers announce the end of a job's time, with 75 (EX_TEMPFAIL: try again).
        message: What was saved and how to continue.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 75 if signum == getattr(signal, "SIGUSR1", None) else 128 + signum


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Run a command so that the user's errors end it with one line on stderr; everything else keeps its traceback."""
    try:
        yield
    except UsageError as e:
        _exit(f"error: {e}", 2)
    except Interrupted as e:
        _exit(str(e), e.exit_status)
    except KeyboardInterrupt:
        _exit("Stopped.", 130)
    except Exception as e:
        if _is_failed_write(e):
            fix = "make room and continue (pretrain and demo: --resume)"
            _exit(f"error: Cannot write ({first_line(e)}). What was saved before is whole: {fix}.", 2)
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG):
            _exit(f"error: Cannot use {e.filename} ({e.strerror}): check the path and its permissions.", 2)
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: Exception) -> str:
    """Why one part of a command could not be done, for the others to go on.

    Raises:
        Exception: `error` itself, where nothing could go on either: nothing can be written.
    """
    if _is_failed_write(error):
        raise error
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("Caught "):  # a loader's process passes its error on with a traceback before it
        return lines[-1].removeprefix(f"{UsageError.__module__}.{UsageError.__qualname__}: ")
    return lines[0] if isinstance(error, UsageError) else f"{type(error).__name__}: {lines[0]}"


def _is_failed_write(error: Exception) -> bool:
    """Whether the disk is full or refuses to be written to; safetensors and torch have errors of their own for that."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    written_by_libraries = r"os error (27|28|122)\)|PytorchStreamWriter failed|enforce fail at inline_container"
    return re.search(written_by_libraries, str(error)) is not None


def _exit(message: str, status: int) -> None:
    if is_first_process():  # under a launcher every process fails alike
        print(message, file=sys.stderr)
    sys.exit(status)
