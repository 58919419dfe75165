"""What a run writes but can do without: its failures are warnings, and the run goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

log = logging.getLogger(__name__)


class WarnOnce:
    """Context for drawing and logging, whose failures must not end a run: the first is logged as a
    warning, and the run goes on."""

    def __init__(self, what: str) -> None:
        self._what, self._said = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self._said:
            log.warning(
                f"{self._what} failed, but the run continues without it (further failures are not "
                f"reported): {type(error).__name__}: {error}"
            )
        self._said = True
        return True


@contextmanager
def warn_if_unwritable(path: Path) -> Iterator[None]:
    """Turn a failure to write what a run can do without, as on a full disk, into a warning."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        log.warning(f"NOT WRITTEN, but the run continues: {path}: {error}")
