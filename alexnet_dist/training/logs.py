"""What a run logs: `log`, how ranks format it, and the file of damaged samples."""

import io
import json
import logging
from pathlib import Path

from alexnet_dist.errors import printable
from alexnet_dist.files import appended
from alexnet_dist.parallel.topology import Topology

log = logging.getLogger("alexnet_dist")


def configure_logging(topology: Topology) -> None:
    """Log at INFO on rank 0, and at WARNING with a prefix of rank and column on the others."""
    name = "" if topology.is_rank_0 else f"[r{topology.global_rank} c{topology.column}] "
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable(f"{name}%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    log.setLevel(logging.INFO if topology.is_rank_0 else logging.WARNING)


class _Printable(logging.Formatter):
    """Escapes control characters, which a name in a data set or a path may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _RegularFile(logging.FileHandler):
    """Appends to a regular file; refuses to follow a link or to open a pipe."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(appended(self.baseFilename), "utf-8")


class _JsonLine(logging.Formatter):
    """Formats a record as a line of quarantine.jsonl."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": record.created, "reason": record.getMessage()})


def quarantine(path: Path) -> logging.Handler:
    """Return a handler, already added, that appends each damaged sample that the data pipeline
    reports to quarantine.jsonl; the file is made with its first line."""
    handler = _RegularFile(path, delay=True)
    handler.setFormatter(_JsonLine())
    logging.getLogger("alexnet_dist.data").addHandler(handler)
    return handler
