"""How runs stand: `python -m launch.status --help`.

Read from run.json and, where Slurm is, its queue; no accounting is needed.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.cli.parser import Parser, add_json, path
from alexnet_dist.errors import RunFolderError, printable
from alexnet_dist.files import read_run
from launch.job import guarded, slurm


class NoRun(RunFolderError):
    """A path is not that of a run folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: no run.json here: name run folders, as in runs/demo")


COLUMNS = ("run", "state", "job", "step", "ETA", "restarts", "goodput", "why")


def status(folder: Path, queue: Mapping[str, str] | None) -> dict[str, Any]:
    """How a run stands.

    | key | |
    |---|---|
    | state | as in run.json; killed where its process is gone, queued where its job waits |
    | step, last_step | the newest checkpoint's, and the last of the run |
    | eta_s | seconds of training left, at the pace of what was kept so far; null if unknown |
    | goodput | seconds whose steps a checkpoint holds, of all since the first start |

    Args:
        queue: Slurm's state of each of its jobs that is not over; None where no Slurm answers.

    Raises:
        NoRun: it is no run folder.
    """
    run = read_run(folder)
    if not run:
        raise NoRun(folder)
    state, job = str(run["state"]), run.get("job")
    if (queue or {}).get(job or "") in ("PENDING", "REQUEUED"):
        state = "queued"
    elif state in ("starting", "running") and not _lives(run, queue):
        state = "killed"
    step, last = int(run.get("newest_step") or 0), run.get("last_step")
    kept_s, rested_s, now = float(run.get("kept_s") or 0), run.get("rested_s", 0.0), time.time()
    until = now if state in ("starting", "running", "queued") else float(run.get("updated", now))
    eta_s = None
    if state == "finished":
        eta_s = 0.0
    elif step and last and kept_s:
        eta_s = kept_s / step * (int(last) - step)
    return {
        "run": str(folder),
        "state": state,
        "job": job,
        "step": step,
        "last_step": last,
        "eta_s": eta_s,
        "restarts": int(run.get("restarts", int(run["attempt"]) - 1)),
        "goodput": kept_s / max(until - float(run["first_started"]) - rested_s, 1e-9),
        "why": str(run.get("reason") or "").partition("\n")[0],
    }


def _lives(run: Mapping[str, Any], queue: Mapping[str, str] | None) -> bool:
    if run.get("job") and queue is not None:
        return run["job"] in queue
    if run["host"] != socket.gethostname():
        return True  # as far as can be seen from here
    return Path(f"/proc/{run['pid']}").exists()


def queued() -> dict[str, str] | None:
    """Slurm's state of each of this user's jobs that is not over; None where no Slurm answers."""
    told = slurm("squeue", "--me", "--noheader", "--format=%A %T")
    return None if told is None else dict(line.split() for line in told.splitlines())


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m launch.status",
        description="How runs stand, by run.json and, where Slurm is, its queue.",
        examples=("python -m launch.status runs/demo runs/second --json",),
    )
    made.add_argument(
        "run_folder", type=path, nargs="+", help="as in runs/*; what else lies there is passed over"
    )
    add_json(made, "list")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    queue, rows, others = queued(), [], []
    for folder in options.run_folder:
        try:
            rows.append(status(folder, queue))
        except NoRun:
            if not folder.exists():
                raise
            others.append(folder)
    if others and not rows:
        raise NoRun(others[0])
    print(json.dumps(rows) if options.json else table(rows))
    if others:
        print(f"passed over, not of a run: {', '.join(map(str, others))}", file=sys.stderr)
    return 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        eta = "?" if row["eta_s"] is None else _clock(row["eta_s"])
        job, why = row["job"] or "-", printable(row["why"])[:80]
        step = f"{row['step']}/{row['last_step'] or '?'}"
        return (row["run"], row["state"], job, step, eta, str(row["restarts"]),
                f"{row['goodput']:.0%}", why)  # fmt: skip

    return laid_out([COLUMNS, *map(line, rows)])


def laid_out(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


if __name__ == "__main__":
    sys.exit(guarded(main))
