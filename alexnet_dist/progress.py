"""Show how far a command is that takes a while."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOGGED_EVERY_S = 30.0  # where there is no terminal


def progress_bar(doing: str, over: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """Return tqdm's progress bar: one line on a terminal, a line now and then elsewhere.

    Args:
        over: what to iterate over; None where the caller updates the bar.
        options: tqdm's.
    """
    every_s = 0.5 if sys.stderr.isatty() else LOGGED_EVERY_S
    return tqdm(over, doing, mininterval=every_s, miniters=1, **options)
