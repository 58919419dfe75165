"""Drills in which checkpoints are damaged, the disk is full, or numbers go wrong during a step."""

import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from drills_table import Row
from small_runs import LAYOUTS, Started, Testbed, final_state, reach, run_to_end

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.errors import CheckpointError
from alexnet_dist.files import read_run

# --- files


def corruptions(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """Flip, zero, cut off and add bytes anywhere in a checkpoint: none is loaded."""
    testbed.undisturbed("columns")
    row = Row("damaged checkpoint", "columns")
    folder = testbed.folder("whole-columns") / "checkpoints"
    newest, before = checkpoints.steps(folder)[-1], checkpoints.steps(folder)[-2]
    for _ in range(count):
        path = dice.choice(sorted(newest.iterdir()))
        sound = path.read_bytes()
        path.write_bytes(_damaged(sound, dice))
        row.trials += 1
        try:
            checkpoints.verify(newest)
        except CheckpointError:
            found, wrong = checkpoints.newest_good(folder)
            row.recovered += found is not None and found.path == before and len(wrong) == 1
        path.write_bytes(sound)
    yield row
    row = Row("run on damaged ones", "columns", identical=True)
    for number in range(count // 100):
        name = f"damaged-{number}"
        shutil.copytree(testbed.folder("whole-columns"), testbed.folder(name))
        last = checkpoints.steps(testbed.folder(name) / "checkpoints")[-1]
        path = dice.choice(sorted(last.iterdir()))
        path.write_bytes(_damaged(path.read_bytes(), dice))
        row.trials += 1
        same = testbed.finish("columns", name)
        row.recovered, row.identical = row.recovered + same, row.identical and same
    yield row


def _damaged(sound: bytes, dice: random.Random) -> bytes:
    """Return bytes that differ from `sound`."""
    at = dice.randrange(len(sound))
    match dice.choice(["flip", "zero", "cut", "add"]):
        case "flip":
            return sound[:at] + bytes([sound[at] ^ 1 << dice.randrange(8)]) + sound[at + 1 :]
        case "zero":
            zeroed = sound[:at] + bytes(len(sound[at : at + 512])) + sound[at + 512 :]
            return zeroed if zeroed != sound else sound[:at]
        case "cut":
            return sound[:at]
        case _:
            return sound + b"\0"


def full_disk(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """Let the disk fill up under a run, and free it again; needs root, for a small tmpfs."""
    row, name = Row("full disk", "columns"), "full"
    testbed.undisturbed("columns")
    with _tmpfs(testbed.root / "small", "12m") as small:
        for _ in range(count):
            shutil.rmtree(small / name, ignore_errors=True)
            run = Started(testbed.arguments("columns", name, f"output_dir={small}"))
            reach(run, small / name, "step", 9, dice)
            fill = small / "fill"
            with fill.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            newest = checkpoints.newest_good(small / name / "checkpoints")[0]
            time.sleep(1.5)  # meanwhile saves and metrics fail
            kept = checkpoints.newest_good(small / name / "checkpoints")[0]
            fill.unlink()
            code, output = run.end()
            row.trials += 1
            row.recovered += code == 0 and "NOT SAVED, but the run continues" in output
            row.holds &= bool(newest and kept and kept.step >= newest.step)
        row.identical = final_state(small / name) == testbed.undisturbed("columns")
    yield row


@contextlib.contextmanager
def _tmpfs(at: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size."""
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


# --- steps that go wrong

PATCHED = """
import os, sys
import torch
from alexnet_dist.cli import main
from alexnet_dist.engines import ddp
from alexnet_dist.engines import zero

what, at = sys.argv.pop(1), int(sys.argv.pop(1))
last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1

def patched(sound):
    def train_step(self, batch, step, rate, *more):
        if step == at and what == "raise":
            raise RuntimeError("broken on purpose")
        if step == at and what == "poison" and last:
            batch.metadata[0, 3] = float("nan")  # its lighting
        stats = sound(self, batch, step, rate, *more)
        if step == at and what == "flip" and last:
            self.replicated()["conv2.weight"].detach().view(torch.int32)[0, 0, 0, 0] ^= 1 << 9
        return stats
    return train_step

for one in (ddp.TorchEngine, zero.ZeroEngine):
    one.train_step = patched(one.train_step)
sys.exit(main.main())
"""


def _patched(
    testbed: Testbed, layout: str, name: str, what: str, at: int, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run with ranks (torchrun's) that are patched to do something at a step."""
    script = testbed.root / "patched.py"
    script.write_text(PATCHED)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(LAYOUTS[layout])]
    command = [sys.executable, *torchrun, str(script), what, str(at)]
    return run_to_end(testbed.arguments(layout, name, *more), command)


def wrong_numbers(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """A batch of NaN on one rank: no rank applies it, and nothing of it is saved."""
    for layout in LAYOUTS:
        row, name = Row("poisoned batch", layout), f"poisoned-{layout}"
        yield _found_at_once(testbed, row, name, "poison", "step {}: the loss is nan", count, dice)


def flipped_bits(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """A bit of a parameter that flips on one of several replicas is found before the next save."""
    said = "replicas are no longer bitwise equal: conv2.weight of rank"
    for layout in ("replicas", "columns_x_replicas"):
        row, name = Row("flipped bit", layout), f"flipped-{layout}"
        yield _found_at_once(testbed, row, name, "flip", said, count, dice)


def _found_at_once(
    testbed: Testbed, row: Row, name: str, what: str, error: str, count: int, dice: random.Random
) -> Row:
    """Let a step go wrong on one rank: the run must end with an error that names it, and save
    nothing of that step.

    Args:
        error: part of the message, with {} for the step's number.
    """
    testbed.undisturbed(row.layout)
    for _ in range(max(1, count // 5)):
        at = testbed.saved(name) + dice.randint(1, 9)
        ended = _patched(testbed, row.layout, name, what, at)
        row.trials += 1
        named = error.format(at + 1) in ended.stderr
        row.recovered += named and ended.returncode == 1 and testbed.saved(name) <= at
    row.identical = testbed.finish(row.layout, name)
    return row


def crash_loop(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """A run that always fails at the same step is refused after three starts that saved nothing."""
    row, name = Row("crash loop", "columns"), "looping"
    testbed.undisturbed("columns")
    starts, said = 0, ""
    while "starts in a row saved nothing" not in said and starts < 9:
        more = "checkpoint.max_idle_restarts=3"
        said = _patched(testbed, "columns", name, "raise", 6, more).stderr
        starts += 1
    run = read_run(testbed.folder(name))
    row.trials, row.holds = 1, starts == 6  # one saved step 4, four saved nothing, one was refused
    row.recovered = int((run["state"], run["exit"]) == ("failed", 2))
    row.identical = testbed.finish("columns", name)
    yield row
