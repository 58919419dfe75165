"""Print how runs stand: `python -m launch.status --help`.

Read from run.json and, if there is a Slurm, from its queue; no accounting is needed.
"""

import argparse
import fcntl
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.cli.parser import Parser, add_json, path
from alexnet_dist.errors import RunFolderError, aligned, in_hours, printable
from alexnet_dist.files import RunState, opened, read_run
from launch.job import guarded, slurm


class NoRun(RunFolderError):
    """A path is not a run folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: has no run.json: name run folders, as in runs/demo")


_SILENT_S = 3600  # after which a run on another host need not be running any more
COLUMNS = ("run", "state", "job", "step", "ETA", "restarts", "goodput", "why")


def status(folder: Path, queue: Mapping[str, str] | None) -> dict[str, Any]:
    """Return how a run stands.

    | key | |
    |---|---|
    | state | as in run.json; "killed" if its process is gone, "queued" if its job waits, "unknown"
    if it is silent for an hour on a host that cannot be seen |
    | step, last_step | step of the newest checkpoint, last step of the run |
    | eta_s | seconds of training left, at the average pace so far; null if unknown |
    | goodput | share of the time since the first start whose steps a checkpoint holds |

    Args:
        queue: Slurm's state of every queued or running job; None if no Slurm answers.

    Raises:
        NoRun: the folder is not a run folder.
    """
    run = read_run(folder)
    if not run:
        raise NoRun(folder)
    if "state" not in run:
        raise RunFolderError(f"{folder}: its run.json is damaged: it has no state")
    state, job = str(run["state"]), run.get("job")
    why = str(run.get("reason", "")).partition("\n")[0]
    if (queue or {}).get(job or "") in ("PENDING", "REQUEUED"):
        state = "queued"
    elif state in ("starting", "running"):
        state, why = _seen(folder, run, queue)
    step, last = int(run.get("newest_step") or 0), run.get("last_step")
    kept_s, rested_s, now = float(run.get("kept_s") or 0), run.get("rested_s", 0.0), time.time()
    until = now if state in ("starting", "running", "queued") else float(run.get("updated", now))
    eta_s = None
    if state == "finished":
        eta_s = 0.0
    elif step and last and kept_s:
        eta_s = kept_s / step * max(0, int(last) - step)
    return {
        "run": str(folder),
        "state": state,
        "job": job,
        "step": step,
        "last_step": last,
        "eta_s": eta_s,
        "restarts": int(run.get("restarts", max(0, int(run.get("attempt", 1)) - 1))),
        # At most 1, even if a clock was set back.
        "goodput": kept_s / max(until - run.get("first_started", until) - rested_s, kept_s, 1e-9),
        "why": why,
    }


def _seen(folder: Path, run: RunState, queue: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the state of a run that has not ended by its run.json, and why, as far as can be
    seen."""
    state, job, host = run["state"], run.get("job"), run.get("host")
    if _is_held(folder):
        return state, ""
    if host == socket.gethostname():  # its lock went with its process
        goes_on = bool(job and job in (queue or {}))
        return "killed", f"its process is gone, but its job {job} goes on" if goes_on else ""
    if job and queue is not None and job not in queue:
        return "killed", ""
    # Another host's locks are not seen on every file system.
    files = (folder / name for name in ("run.json", "metrics.jsonl"))
    silent_s = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    if silent_s < _SILENT_S:
        return state, ""
    return (
        "unknown",
        f"it has written nothing for {in_hours(silent_s)}, and {host} is not seen here",
    )


def _is_held(folder: Path) -> bool:
    """Return whether a process that can be seen from here holds a run folder."""
    try:
        with opened(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def queued() -> dict[str, str] | None:
    """Return Slurm's state of each of this user's jobs in the queue; None if no Slurm answers."""
    answer, _ = slurm("squeue", "--me", "--noheader", "--format=%A %T")
    return None if answer is None else dict(line.split() for line in answer.splitlines())


def parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    made = Parser(
        prog="python -m launch.status",
        description="Show the state of runs, from run.json and, where there is Slurm, its queue.",
        examples=("python -m launch.status runs/demo runs/second --json",),
    )
    made.add_argument(
        "run_folder", type=path, nargs="+", help="run folders (runs/*); anything else is skipped"
    )
    add_json(made, "list")
    return made


def main(arguments: Sequence[str]) -> int:
    """Print a table or JSON of the runs; return 1 if one of them cannot be read."""
    options = parser().parse_args(arguments)
    queue, rows, others, wrong = queued(), [], [], False
    for folder in options.run_folder:
        try:
            rows.append(status(folder, queue))
        except RunFolderError as error:
            if isinstance(error, NoRun) and folder.exists() and len(options.run_folder) > 1:
                others.append(folder)
            else:
                wrong = True
                print(f"launch: {printable(str(error))}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows))
    elif rows:
        print(table(rows))
    if others:
        names = printable(", ".join(map(str, others)))
        print(f"skipped, not a run folder: {names}", file=sys.stderr)
    return 1 if wrong or not rows else 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a text table."""

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        eta = "?" if row["eta_s"] is None else in_hours(row["eta_s"])
        job, why = str(row["job"] or "-"), row["why"][:80]
        step = f"{row['step']}/{row['last_step'] or '?'}"
        return (row["run"], row["state"], job, step, eta, str(row["restarts"]),
                f"{row['goodput']:.0%}", why)  # fmt: skip

    return aligned([COLUMNS, *map(line, rows)])


if __name__ == "__main__":
    sys.exit(guarded(main))
