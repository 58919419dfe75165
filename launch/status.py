"""Print how runs stand: `python -m launch.status --help`.

Read from run.json and, if there is a Slurm, from its queue; no accounting is needed.
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
    """A path is not a run folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: has no run.json: name run folders, as in runs/demo")


COLUMNS = ("run", "state", "job", "step", "ETA", "restarts", "goodput", "why")


def status(folder: Path, queue: Mapping[str, str] | None) -> dict[str, Any]:
    """Return how a run stands.

    | key | |
    |---|---|
    | state | as in run.json; "killed" if its process is gone, "queued" if its job waits |
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
    if (queue or {}).get(job or "") in ("PENDING", "REQUEUED"):
        state = "queued"
    elif state in ("starting", "running") and not _is_alive(run, queue):
        state = "killed"
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
        "why": run.get("reason", "").partition("\n")[0],
    }


def _is_alive(run: Mapping[str, Any], queue: Mapping[str, str] | None) -> bool:
    """Return whether the process of a run that has not ended still exists, as far as can be
    seen."""
    if run.get("job") and queue is not None:
        return run["job"] in queue
    if run.get("host") != socket.gethostname():
        return True  # it cannot be seen from this host
    return Path(f"/proc/{run.get('pid')}").exists()


def queued() -> dict[str, str] | None:
    """Return Slurm's state of each of this user's jobs in the queue; None if no Slurm answers."""
    answer = slurm("squeue", "--me", "--noheader", "--format=%A %T")
    return None if answer is None else dict(line.split() for line in answer.splitlines())


def parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    made = Parser(
        prog="python -m launch.status",
        description="Show the state of runs, from run.json and, where there is Slurm, its queue.",
        examples=("python -m launch.status runs/demo runs/second --json",),
    )
    made.add_argument(
        "run_folder",
        type=path,
        nargs="+",
        help="run folders, as in runs/*; anything else is skipped",
    )
    add_json(made, "list")
    return made


def main(arguments: Sequence[str]) -> int:
    """Print a table or JSON of the runs; return 1 if one of them cannot be read."""
    options = parser().parse_args(arguments)
    queue, rows, others, wrong = queued(), [], [], 0
    for folder in options.run_folder:
        try:
            rows.append(status(folder, queue))
        except NoRun as error:
            if folder.exists() and len(options.run_folder) > 1:
                others.append(folder)
                continue
            wrong += _print_error(error)
        except RunFolderError as error:
            wrong += _print_error(error)
    if options.json:
        print(json.dumps(rows))
    elif rows:
        print(table(rows))
    if others:
        print(f"skipped, not a run folder: {', '.join(map(str, others))}", file=sys.stderr)
    return 1 if wrong or not rows else 0


def _print_error(error: RunFolderError) -> int:
    """Print an error, and return 1."""
    print(f"launch: {printable(str(error))}", file=sys.stderr)
    return 1


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a text table."""

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        eta = "?" if row["eta_s"] is None else _clock(row["eta_s"])
        job, why = row["job"] or "-", row["why"][:80]
        step = f"{row['step']}/{row['last_step'] or '?'}"
        return (row["run"], row["state"], job, step, eta, str(row["restarts"]),
                f"{row['goodput']:.0%}", why)  # fmt: skip

    return laid_out([COLUMNS, *map(line, rows)])


def laid_out(lines: Sequence[Sequence[str]]) -> str:
    """Return aligned columns; control characters are escaped."""
    lines = [[printable(cell).replace("\n", " ") for cell in cells] for cells in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def _clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


if __name__ == "__main__":
    sys.exit(guarded(main))
