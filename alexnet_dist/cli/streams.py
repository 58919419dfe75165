"""Standard output and error that may be closed, of another encoding, or read by nobody."""

import errno
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_READER_LEFT = 128 + 13  # the exit code of a process that SIGPIPE ends


def with_usable(program: Callable[[], int]) -> int:
    """Run a program with standard streams that can be written to, and return its exit code.

    If nobody reads standard output or error any more, as after `| head` or in a terminal that was
    closed, it ends without a message.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: without this the next file opened would get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # escape what it cannot encode
    try:
        return program()
    except OSError as error:
        if not reader_left(error):
            raise
        return _READER_LEFT
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
            if unread(stream):  # or Python would report a broken pipe at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reader_left(error: Exception) -> bool:
    """Return whether an error means that nobody reads a standard stream any more."""
    gone = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO)
    return gone and any(map(unread, (sys.stdout, sys.stderr)))


def unread(stream: Any) -> bool:
    """Return whether a stream is a pipe without a reader, or a terminal that was hung up."""
    with suppress(OSError, ValueError, AttributeError):  # a notebook's stream has no descriptor
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
