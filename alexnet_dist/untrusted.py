"""Files that may hold anything: read within bounds, so that none takes memory, time or a stack."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST = 16 * 2**20  # bytes; ImageNet's dataset.json has a few hundred thousand


def read_bytes(path: Path, most: int = _MOST) -> bytes:
    """A whole file; raises ValueError where it is longer than `most` bytes, OSError as ever."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most:,} bytes")
    return content


def json_object(text: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are; raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


@contextmanager
def within_memory(most: int) -> Iterator[None]:
    """This process may take so many bytes more; beyond them allocations raise MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (used + most, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
