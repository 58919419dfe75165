"""Checkpoints written behind the loop, one at a time, by a thread of the rank that leads."""

import logging
import threading
from collections.abc import Callable

from alexnet_dist.errors import CheckpointError

log = logging.getLogger(__name__)


class Saver:
    """Writes what it is given while the run goes on.

    A checkpoint that cannot be written is a loud warning while an older one remains, and ends the
    run where none does. Ranks that do not lead have nothing to write, and may call all of this.

    Args:
        remains: whether an older checkpoint is there to go on from.
    """

    def __init__(self, remains: Callable[[], bool]) -> None:
        self._remains = remains
        self._write: Callable[[], None] | None = None  # until it has succeeded
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.failed = False  # the run must end: `finish` says why

    def begin(self, write: Callable[[], None]) -> None:
        """Start writing, once what was begun before has ended."""
        self._join()
        self._write, self._error, self.failed = write, None, False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until what was begun is on the disk; one that could not be written is tried again.

        Raises:
            CheckpointError: it cannot be written.
            NotFinite: it must not be.
        """
        self._join()
        if isinstance(self._error, CheckpointError) and self._write is not None:
            self._error, self.failed = None, False
            self._run()
        if self._error is not None:
            raise self._error

    def close(self, timeout_s: float = 60) -> None:
        """Let what was begun end, without saying how."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._write is not None
        try:
            self._write()
            self._write = None  # and with it a copy of the network
        except Exception as error:
            self._error, self.failed = error, True  # to look for an older one may fail too
            self.failed = not (isinstance(error, CheckpointError) and self._remains())
            if not self.failed:
                log.warning(f"NOT SAVED, the run goes on: {error}")
