"""The errors this package raises on purpose, and how a command shows them."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """Input that cannot be used; the message is one line and names the fix.

    A command prints the message alone (no traceback) and exits with status 2. A `ValueError`, so that library callers
    need not know this class.
    """


class Interrupted(Exception):
    """A long command was asked to stop (Ctrl-C, SIGTERM) and has saved what it needs to continue.

    Args:
        signum: Number of the signal; the command exits with status 128 + signum, as a shell expects.
        message: What was saved and how to continue.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


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
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _exit(f"error: {e.strerror}: {e.filename or 'the output folder'}. Free or choose another place for --out.", 2)


def _exit(message: str, status: int) -> None:
    # Under a launcher every process fails alike; the first one speaks for all.
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    sys.exit(status)
