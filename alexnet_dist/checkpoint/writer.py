"""Write checkpoints in the background, one at a time, in a thread of rank 0."""

import logging
import threading
from collections.abc import Callable

from alexnet_dist.errors import CheckpointError

log = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints while training continues.

    A checkpoint that cannot be written is logged as a warning while there is an older one, and ends
    the run where there is none. Other ranks than 0 have nothing to write, but may call all methods.

    Args:
        remains: returns whether there is an older checkpoint to resume from.
    """

    def __init__(self, remains: Callable[[], bool]) -> None:
        self._remains = remains
        self._write: Callable[[], None] | None = None  # set until it has succeeded
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.failed = False  # the run must end; `finish` raises the reason

    def begin(self, write: Callable[[], None]) -> None:
        """Start to write, as soon as the previous write has ended."""
        self._join()
        self._write, self._error, self.failed = write, None, False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last write is on the disk; try once more if it failed.

        Raises:
            CheckpointError: it cannot be written.
            NotFinite: it holds NaN or infinity, and must not be written.
        """
        self._join()
        if isinstance(self._error, CheckpointError):
            self._error, self.failed = None, False
            self._run(last=True)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait, at most a minute, for the last write to end, ignoring its outcome."""
        if self._thread is not None:
            self._thread.join(60)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, last: bool = False) -> None:
        assert self._write is not None
        try:
            self._write()
            self._write = None  # frees a copy of the network
        except Exception as error:
            self._error, self.failed = error, True  # first, since `_remains` may fail too
            self.failed = not (isinstance(error, CheckpointError) and self._remains())
            if not (self.failed or last):  # the last try is reported by whoever raises it
                log.warning(f"NOT SAVED, but the run continues: {error}")
