"""A run's folder: which process holds it, the config it was made with, and how the run went."""

import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Unpack

from alexnet_dist.checkpoint.store import step_of, steps, traces
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.errors import RANK_LOST, CheckpointError, CrashLoop, RunFolderError
from alexnet_dist.files import (
    RunState,
    appended,
    overwrite_json,
    read_run,
    sweep_writing,
    write,
    write_json,
)
from alexnet_dist.parallel import environment
from alexnet_dist.tensor_files import save_tensors
from alexnet_dist.training.tolerance import warn_if_unwritable

log = logging.getLogger(__name__)


class RunFolder:
    """The folder `runs/NAME`, held by one process while it trains.

    A kernel lock (flock) on the file `lock` keeps two jobs from training one run; the kernel
    releases it when its holder dies. `run.json` tells launchers how the run stands:

    | key | |
    |---|---|
    | state | starting, running, finished, stopped or failed; unchanged if the process is killed |
    | exit, reason | of a run that ended: the exit code of its ranks, and why |
    | known | of a failed run: whether the failure has a name, and would recur |
    | attempt, host, pid | number of this start, counting from 1, and where it runs |
    | restarts, rested_s | starts after one that had not finished; seconds the run lay finished |
    | job, restart | Slurm's job number, or null, and how often Slurm restarted it before |
    | idle_restarts | starts in a row, this one included, after others that saved nothing new |
    | step, last_step | steps done when the state was written, steps in all |
    | resumed_at, newest_step | the newest checkpoint's step when this attempt began, and now |
    | first_started, started, updated | Unix times of the first attempt, this one, and this file |
    | kept_s | seconds of training, over all attempts, whose result a checkpoint holds |
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, config.folder
        self.checkpoints = self.path / "checkpoints"
        self._run: RunState = {}
        self._previous: RunState = {}  # run.json of the previous attempt
        self._last_save_s = 0.0  # time.monotonic() of the last checkpoint, or of the first step
        self._lock: FileIO | None = None

    def take(self) -> None:
        """Create the folder and hold it; raises RunFolderError if another process holds it."""
        try:
            self._hold()
            self._begin_attempt()
        except Exception:
            self.close()
            raise
        sweep_writing(self.path)
        self.report("starting")

    def _begin_attempt(self) -> None:
        """Set what run.json says of this attempt.

        Raises CrashLoop after too many starts that saved nothing, and CheckpointError or
        RunFolderError if the folder cannot be read.
        """
        before, now = read_run(self.path), time.time()
        self._previous = before
        newest = max((step_of(path) for path in steps(self.checkpoints)), default=0)
        # A stop that asks to be resumed (exit code 75) counts as well: the time limit of a job may
        # be shorter than its start-up.
        failed = before.get("state") in ("starting", "running", "failed") or (
            before.get("state") == "stopped" and before.get("exit") == 75
        )
        refused = before.get("exit") == 2  # it was rejected before it ran anything
        idle = failed and newest <= before.get("resumed_at", 0)
        job, restart = environment.job()
        attempts, finished = int(before.get("attempt", 0)), before.get("state") == "finished"
        restarts = int(before.get("restarts", max(0, attempts - 1)))
        # Wall clocks may have been set back between attempts, so the difference may be negative.
        rested_s = now - before.get("updated", now) if finished else 0
        self._run = {
            "attempt": attempts + 1,
            "restarts": restarts + (attempts > 0 and not finished),
            "rested_s": before.get("rested_s", 0.0) + max(0, rested_s),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job,
            "restart": restart,
            "first_started": before.get("first_started", now),
            "started": now,
            "resumed_at": newest,
            "newest_step": newest or before.get("newest_step", 0),
            "idle_restarts": before.get("idle_restarts", 0) + (not refused) if idle else 0,
            "kept_s": before.get("kept_s", 0.0),
        }
        self._check_crash_loop(str(before.get("reason") or "it was killed"))

    def check_begins(self) -> None:
        """Check that a run without a good checkpoint may start at step 0.

        Raises CheckpointError if there once was a checkpoint, unless checkpoint.begin_anew=true.
        """
        left, newest = traces(self.checkpoints), self._run["newest_step"]
        if (left or newest) and not self.config.checkpoint.begin_anew:
            tells = ", ".join(left[:3]) or f"run.json says that there was one of step {newest}"
            raise CheckpointError(
                f"{self.checkpoints}: none of its checkpoints is valid ({tells}), and nothing was "
                "changed: restore one, give this run another name=, or set "
                "checkpoint.begin_anew=true to begin at step 0 beside what is left"
            )

    def resumes_at(self, step: int) -> None:
        """Note the step of the checkpoint that this attempt resumes from; 0 if there is none."""
        self._run |= {"resumed_at": step, "newest_step": step}

    def _hold(self) -> None:
        """Create the folder and take its lock."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = appended(self.path / "lock")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._run = {}  # run.json is the holder's
            holder = read_run(self.path)
            raise RunFolderError(
                f"{self.path} is in use by process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}: wait for it, stop it, or give this run another name="
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise RunFolderError(
                    f"{self.path}: its file system has no locks ({error.strerror}), which keep "
                    "two jobs out of one run: set output_dir= to another file system, or mount "
                    "it with locks (NFS: without nolock; Lustre: with flock)"
                ) from error
            raise RunFolderError(
                f"{error.filename or self.path}: cannot be written ({error.strerror}): set "
                "output_dir= or name="
            ) from error

    def close(self) -> None:
        """Release the folder, for another process or another run in this one."""
        if self._lock is not None:
            self._lock.close()

    def check_held(self) -> None:
        """Check that the folder is still this process's before writing to it. If it has vanished,
        create it again; raises RunFolderError if it was moved, or another process holds it."""
        assert self._lock is not None
        if (at := self._current_path()) is None:
            lost = "/lock has vanished"
            if not self.checkpoints.exists():
                lost = " has vanished, with all that was saved in it"
            log.warning(f"{self.path}{lost}: created again")
            self._lock.close()
            self._hold()
            self.save_config()
        elif at != self.path:
            raise RunFolderError(
                f"{self.path} was moved to {at} while this run writes to it: the run ends, and "
                "nothing was written elsewhere. Move it back and run the same command to resume "
                "from the last checkpoint, or give the command the folder's new place by name= "
                "and output_dir="
            )

    def _current_path(self) -> Path | None:
        """Return where the folder that this process holds lies now; None if it was deleted."""
        assert self._lock is not None
        held, path = os.fstat(self._lock.fileno()), self.path / "lock"
        with suppress(OSError):
            if os.path.samestat(path.stat(), held):
                return self.path
        if held.st_nlink == 0:
            return None
        return Path(os.readlink(f"/proc/self/fd/{self._lock.fileno()}")).parent

    def _check_crash_loop(self, last: str) -> None:
        """Raise CrashLoop if more starts in a row than checkpoint.max_idle_restarts saved nothing.

        Args:
            last: why the previous attempt ended.
        """
        idle, most = self._run["idle_restarts"], self.config.checkpoint.max_idle_restarts
        if idle > most:
            loop = CrashLoop(
                f"{self.path}: {idle} starts in a row saved nothing after step "
                f"{self._run['newest_step']}; the last one: {last}. Fix that, then start with "
                f"checkpoint.max_idle_restarts={idle} (now {most})"
            )
            self.report("failed", exit=loop.exit_code, reason=last, known=True)
            raise loop

    def report(self, state: str, /, **more: Unpack[RunState]) -> None:
        """Rewrite run.json with a new state; does nothing unless this process holds the folder (it
        is rank 0)."""
        if self._run:
            self._run.update({"state": state, "updated": time.time()})
            self._run.update(more)
            held = self._lock is not None and not self._lock.closed
            path = ((self._current_path() if held else None) or self.path) / "run.json"
            with warn_if_unwritable(path):
                try:
                    write_json(path, self._run)
                except OSError:  # a full disk still takes what fits into the file's own blocks
                    overwrite_json(path, self._run)

    def failed(self, code: int, reason: str, known: bool) -> None:
        """Note that this attempt failed. Before its first step, a finished run that was asked for
        something impossible stays finished, and a stopped one that was given another config stays
        stopped (outside Slurm, whose jobs read here why their ranks left)."""
        before = self._previous.get("state")
        mistyped = before == "stopped" and code == 2 and self._run.get("job") is None
        if self._run.get("state") == "starting" and (before == "finished" or mistyped):
            write_json(self.path / "run.json", self._previous)
        else:
            self.report("failed", exit=code, reason=reason, known=known)

    def killed(self, reason: str, attempts_before: int) -> bool:
        """Note in run.json that ranks were killed, as seen by the launcher.

        Returns whether `reason` says more than run.json does: that the run still goes on, or only
        that another rank was lost.

        Args:
            attempts_before: number of attempts before the launcher started the ranks.
        """
        try:
            with appended(self.path / "lock") as lock:
                # Fails if another process has taken the folder in the meantime.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                run = read_run(self.path)
                ended = run.get("state") not in ("starting", "running")
                if ended and not str(run.get("reason")).startswith(RANK_LOST):
                    return bool(run.get("attempt", 0) == attempts_before)
                if run.get("attempt", 0) > attempts_before:
                    self._run = run
                    self.report("failed", exit=1, reason=reason, known=False)
        except (OSError, RunFolderError) as error:
            log.warning(f"{self.path / 'run.json'} could not record that {reason}: {error}")
        return True

    def running(self, step: int, last_step: int) -> None:
        """Note that the first step of this attempt begins."""
        self._last_save_s = time.monotonic()
        self.report("running", step=step, last_step=last_step)

    def saved(self, step: int) -> None:
        """Note that a checkpoint is on the disk; the time since the last one counts as kept."""
        now = time.monotonic()
        kept_s, self._last_save_s = self._run["kept_s"] + now - self._last_save_s, now
        self.report("running", newest_step=step, kept_s=round(kept_s, 3))

    def goodput(self) -> float:
        """Return the share of the time since the first attempt that went into steps that still
        count: those in a checkpoint, and those since. NaN unless this process holds the folder."""
        if not self._run:
            return math.nan
        counts_s = self._run["kept_s"] + time.monotonic() - self._last_save_s
        asked_for = time.time() - self._run["first_started"] - self._run["rested_s"]
        # A clock that was set back must not give more than 1.
        return float(counts_s / max(asked_for, counts_s, 1e-9))

    def keep_batch(self, batch: Batch, step: int, rank: int) -> Path:
        """Write this rank's part of a batch, as the first layer saw it, for the user to look at;
        return the file."""
        path = self.path / "not_finite" / f"step-{step:08d}-rank-{rank}.safetensors"
        with warn_if_unwritable(path):
            path.parent.mkdir(exist_ok=True)
            save_tensors(path, {name: t.contiguous().cpu() for name, t in batch.changing().items()})
        return path

    def save_config(self) -> None:
        """Write config.json durably: other commands read it, and a later start of this run, which
        needs what it says was resolved."""
        content = json.dumps(dataclasses.asdict(self.config), indent=1)
        write(self.path / "config.json", content.encode() + b"\n")
