"""Small training runs for faults: docs/drills.py and docs/storm.py kill, stop and damage them, and
compare what becomes of them with runs that were left alone."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from ledger import ROOT

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.training.metrics_file import TIMES, read_metrics

sys.path.append(str(ROOT / "tests"))  # for `made`, here, and `forks`, in docs/storm.py

import made

COMMAND = [sys.executable, "-m", "alexnet_dist"]
SAVE = 4  # steps between two saves
LAYOUTS = {"one": 1, "columns": 2, "replicas": 3, "columns_x_replicas": 4, "zero1": 2}  # ranks
RUN = [
    "model.classes=10", "model.crop=67", "model.conv=[8,12,16,16,8]", "model.fc=[256,128]",
    "model.init=he", "data.canvas=72", "data.eval_split=test", "data.divide_by=[60,60,60]",
    "data.workers=2", "layout.device=cpu", "layout.threads=1", "layout.timeout_s=5",
    "schedule.kind=polynomial", "schedule.rate=0.02", "train.batch=12", "train.epochs=40",
    "evaluate.batch=10", "evaluate.every_epochs=3", f"checkpoint.every_steps={SAVE}",
    "checkpoint.max_idle_restarts=1000", "log.every_steps=1", "log.histograms_every_steps=0",
    "log.pictures=false", "log.embedding=0",
]  # fmt: skip


class Testbed:
    """A data set of 60 training and 23 test images, run folders, and for each layout the run that
    was left alone.

    Args:
        root: an empty folder.
        settings: key=value arguments of every run, besides RUN's.
    """

    def __init__(self, root: Path, *settings: str) -> None:
        self.root, self._settings = root, settings
        self._undisturbed = dict[str, dict[str, Any]]()
        idx = made.write_idx(root / "idx", 60, 23)
        prepare("fashion_mnist", idx, root / "data", Options(workers=1))

    def arguments(self, layout: str, name: str, *more: str) -> list[str]:
        """Return the arguments that train a run."""
        places = [f"data.path={self.root / 'data'}", f"output_dir={self.root / 'runs'}"]
        kind = [f"layout.kind={layout}", f"layout.ranks={LAYOUTS[layout]}", f"name={name}"]
        return ["train", *RUN, *self._settings, *places, *kind, *more]

    def folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.root / "runs" / name

    def undisturbed(self, layout: str) -> dict[str, Any]:
        """Return the final state of the run that was left alone; its name is whole-LAYOUT."""
        if layout not in self._undisturbed:
            name = f"whole-{layout}"
            ended = run_to_end(self.arguments(layout, name))
            assert ended.returncode == 0, ended.stderr
            self._undisturbed[layout] = final_state(self.folder(name))
        return self._undisturbed[layout]

    def finish(self, layout: str, name: str) -> bool:
        """Let a run end undisturbed; return whether its final state is as if it always had been,
        and print why not."""
        ended = run_to_end(self.arguments(layout, name))
        if ended.returncode:
            print(f"{name} ended with exit code {ended.returncode}: {ended.stderr[-2000:]}")
            return False
        whole = self.undisturbed(layout)
        other = [part for part, is_ in final_state(self.folder(name)).items() if is_ != whole[part]]
        if other:
            print(f"{name} is not as if undisturbed: {', '.join(other)}")
        return not other

    def saved(self, name: str) -> int:
        """Return the step of a run's newest good checkpoint; 0 if there is none."""
        found = checkpoints.newest_good(self.folder(name) / "checkpoints")[0]
        return found.step if found else 0

    def lost(self, name: str) -> int:
        """Return how many of the steps that a broken run has logged it will have to repeat."""
        return max(0, logged_step(self.folder(name)) - self.saved(name))


def logged_step(folder: Path) -> int:
    """Return the newest step in the metrics.jsonl of a run folder; 0 if there is none."""
    return max((point["step"] for point in read_metrics(folder)), default=0)


def final_state(folder: Path) -> dict[str, Any]:
    """Return what must be bit-identical: tensors' hashes, progress, metrics other than times."""
    last = checkpoints.verify(checkpoints.steps(folder / "checkpoints")[-1])
    best = checkpoints.best(folder / "checkpoints")
    return {
        "last": last.manifest["files"],
        "progress": last.progress,
        "best": (best.step, best.manifest["files"]),
        "metrics": [point for point in read_metrics(folder) if point["kind"] not in TIMES],
    }


def run_to_end(
    arguments: Sequence[str], command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run `alexnet-dist ARGUMENTS` to its end."""
    return subprocess.run(
        [*command, *arguments], check=False, capture_output=True, text=True, timeout=300
    )


class Started:
    """A run in the background."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def ended(self) -> bool:
        """Return whether the launcher has ended."""
        return self.process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return the launcher and its ranks; nothing if it has just ended."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self) -> tuple[int, str]:
        """Wait for the run to end; return its exit code and output."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


def reach(run: Started, folder: Path, moment: str, step: int, dice: random.Random) -> None:
    """Wait for a moment of a run, or until it has ended.

    Args:
        moment: "starting", "step" (when `step` has been logged) or "saving".
    """
    if moment == "starting":
        time.sleep(dice.uniform(0.1, 4))
        return
    while not run.ended():
        if moment == "saving" and list(folder.glob("checkpoints/.writing-*")):
            return
        if moment == "step" and logged_step(folder) >= step:
            return
        time.sleep(0.002)


def kill(processes: Sequence[psutil.Process], whom: str, dice: random.Random) -> None:
    """SIGKILL "all" processes of a run, its "launcher", or "one" of them."""
    if whom == "one":
        processes = [dice.choice(processes)]
    for process in processes[:1] if whom == "launcher" else processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_gone(run: Started, processes: Sequence[psutil.Process]) -> tuple[float, int]:
    """Wait until every process of a broken run is gone; kill those that are not after 20 s.

    Returns:
        Seconds waited, and the number of processes that were left.
    """
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=20)
    seconds = time.monotonic() - begin
    for process in alive:
        process.kill()
    run.end()
    return seconds, len(alive)
