"""Fault drills: kill, stop, signal, damage and fill up, again and again, and check what is left.

    python docs/drills.py [--full] [--only NAME] [--seed N]

Prints a table of trials, recoveries, steps lost, seconds until every process of a broken run was
gone, processes left, and whether the final state (weights, optimiser, metrics, best) is bit-
identical to that of an undisturbed run. At most two intervals between saves may be lost: the one in
progress, and the one whose checkpoint was still being written. Exits with 1 unless all of it is as
it should be.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import configs_folder
from alexnet_dist.data.prepare.arrays import read_idx
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.errors import CheckpointError
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.run_folder import read_run

SAMPLE = configs_folder() / "fashion-mnist-sample"
COMMAND = [sys.executable, "-m", "alexnet_dist"]
SAVE = 4  # steps between two saves
LAYOUTS = {"one": 1, "columns": 2, "replicas": 3, "columns_x_replicas": 4, "zero1": 2}
RUN = [
    "model.classes=10", "model.crop=67", "model.conv=[8,12,16,16,8]", "model.fc=[256,128]",
    "model.init=he", "data.canvas=72", "data.eval_split=test", "data.divide_by=[60,60,60]",
    "data.workers=2", "layout.device=cpu", "layout.threads=1", "layout.timeout_s=5",
    "schedule.kind=polynomial", "schedule.rate=0.02", "train.batch=12", "train.epochs=40",
    "evaluate.batch=10", "evaluate.every_epochs=3", f"checkpoint.every_steps={SAVE}",
    "checkpoint.max_idle_restarts=1000", "log.every_steps=1", "log.histograms_every_steps=0",
    "log.pictures=false", "log.embedding=0",
]  # fmt: skip


def done(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=300
    )


class Started:
    """A run in the background."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def all(self) -> list[psutil.Process]:
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


def logged(folder: Path) -> int:
    """Return the newest step in a run's metrics.jsonl."""
    points = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return max((point["step"] for point in points), default=0)


def ended_state(folder: Path) -> dict[str, Any]:
    """Return what must be bit-identical: tensors' hashes, progress, metrics other than times."""
    last = checkpoints.verify(checkpoints.steps(folder / "checkpoints")[-1])
    best = checkpoints.best(folder / "checkpoints")
    return {
        "last": last.manifest["files"],
        "progress": last.progress,
        "best": (best.step, best.manifest["files"]),
        "metrics": [point for point in read_metrics(folder) if point["kind"] != "speed"],
    }


def few_images(folder: Path) -> Path:
    """Write the first 60 training and 23 test images of the sample, in the sample's format."""
    folder.mkdir()
    for stem, count in (("train", 60), ("t10k", 23)):
        for name, dims in (("images-idx3", 3), ("labels-idx1", 1)):
            file = f"{stem}-{name}-ubyte.gz"
            values = read_idx(SAMPLE / file, dims)[:count]
            header = bytes([0, 0, 8, dims]) + struct.pack(f">{dims}I", *values.shape)
            (folder / file).write_bytes(gzip.compress(header + values.tobytes()))
    return folder


@dataclass
class Row:
    """What a drill measured."""

    drill: str
    layout: str = ""
    trials: int = 0
    recovered: int = 0
    lost: list[int] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    left: int = 0
    identical: bool | None = None
    holds: bool = True
    note: str = ""

    def line(self) -> str:
        """Return the row as it is printed."""
        lost = f"{max(self.lost)}" if self.lost else "-"
        gone = f"{max(self.gone_s):.1f}" if self.gone_s else "-"
        same = {None: "-", True: "yes", False: "NO"}[self.identical]
        return (
            f"{self.drill:22}{self.layout:20}{self.trials:7}{self.recovered:10}{lost:>10}{gone:>12}"
            f"{self.left:6}{same:>11}{'yes' if self.sound else 'NO':>7}  {self.note}"
        )

    @property
    def sound(self) -> bool:
        """Return whether everything is as it should be."""
        within = max(self.lost, default=0) <= 2 * SAVE and max(self.gone_s, default=0) <= 10
        whole = self.recovered == self.trials > 0 and self.left == 0
        return self.holds and within and whole and self.identical is not False


HEADING = (
    f"{'drill':22}{'layout':20}{'trials':>7}{'recovered':>10}{'most lost':>10}{'gone in, s':>12}"
    f"{'left':>6}{'identical':>11}{'holds':>7}"
)


class Ground:
    """A data set, run folders, and the undisturbed runs that others are compared with.

    Args:
        settings: key=value arguments of every run, besides RUN's.
    """

    def __init__(self, root: Path, *settings: str) -> None:
        self.root, self._settings, self._whole = root, settings, dict[str, dict[str, Any]]()
        prepare("fashion_mnist", few_images(root / "idx"), root / "data", Options(workers=1))

    def arguments(self, layout: str, name: str, *more: str) -> list[str]:
        """Return the arguments that train a run."""
        places = [f"data.path={self.root / 'data'}", f"output_dir={self.root / 'runs'}"]
        kind = [f"layout.kind={layout}", f"layout.ranks={LAYOUTS[layout]}", f"name={name}"]
        return ["train", *RUN, *self._settings, *places, *kind, *more]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def whole(self, layout: str) -> dict[str, Any]:
        """Return the final state of an undisturbed run."""
        if layout not in self._whole:
            name = f"whole-{layout}"
            whole = done(self.arguments(layout, name))
            assert whole.returncode == 0, whole.stderr
            self._whole[layout] = ended_state(self.folder(name))
        return self._whole[layout]

    def finish(self, layout: str, name: str) -> bool:
        """Let a run end undisturbed; return whether its final state is the undisturbed run's."""
        last = done(self.arguments(layout, name))
        return last.returncode == 0 and ended_state(self.folder(name)) == self.whole(layout)

    def saved(self, name: str) -> int:
        """Return the step of a run's newest good checkpoint."""
        found = checkpoints.newest_good(self.folder(name) / "checkpoints")[0]
        return found.step if found else 0


def gone(run: Started, processes: Sequence[psutil.Process], row: Row) -> None:
    """Wait until every process of a broken run is gone; count and kill those that are not."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=20)
    row.gone_s.append(time.monotonic() - begin)
    row.left += len(alive)
    for process in alive:
        process.kill()
    run.end()


def kills(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """SIGKILL one rank, all, or the launcher, while the run starts, trains, evaluates or saves."""
    for layout in LAYOUTS:
        row, name = Row("kill", layout), f"killed-{layout}"
        ground.whole(layout)
        while row.trials < count:
            run = Started(ground.arguments(layout, name))
            moment = dice.choice(["starting", "step", "step", "saving"])
            reach(run, ground.folder(name), moment, ground.saved(name) + dice.randint(1, 7), dice)
            if run.process.poll() is not None:  # it reached its last step
                run.end()
                break
            processes = run.all()
            victims = {
                "all": processes, "launcher": processes[:1], "one": [dice.choice(processes)],
            }[dice.choice(["all", "launcher", "one"])]  # fmt: skip
            for victim in victims:
                victim.kill()
            row.trials += 1
            gone(run, processes, row)
            row.lost.append(logged(ground.folder(name)) - ground.saved(name))
            row.recovered += read_run(ground.folder(name)).get("state") != "finished"
        row.identical = ground.finish(layout, name)
        yield row


def reach(run: Started, folder: Path, moment: str, step: int, dice: random.Random) -> None:
    """Wait for a moment of a run, or until it has ended."""
    if moment == "starting":
        time.sleep(dice.uniform(0.1, 4))
        return
    while run.process.poll() is None:
        if moment == "saving" and list(folder.glob("checkpoints/.writing-*")):
            return
        if moment == "step" and logged(folder) >= step:
            return
        time.sleep(0.002)


def signals(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """Send each signal to the launcher or a rank, at any moment from the start on."""
    codes = {signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGTERM: 143, signal.SIGINT: 130}
    for layout in ("one", "columns", "columns_x_replicas"):
        row, name = Row("signal", layout), f"signalled-{layout}"
        ground.whole(layout)
        while row.trials < count:
            run = Started(ground.arguments(layout, name))
            time.sleep(dice.uniform(0.2, 6))
            if run.process.poll() is not None:
                run.end()
                break
            processes, number = run.all(), dice.choice(list(codes))
            # A rank that is still starting has no handler yet, but its launcher has.
            ranks = read_run(ground.folder(name)).get("pid") in [p.pid for p in processes]
            target = dice.choice(processes) if ranks else processes[0]
            target.send_signal(number)
            begin, row.trials = time.monotonic(), row.trials + 1
            code, _ = run.end()
            row.gone_s.append(time.monotonic() - begin)
            row.left += len([p for p in processes if p.is_running()])
            row.recovered += code in (codes[number], 0)  # 0: it had reached its end
        row.identical = ground.finish(layout, name)
        yield row


def freezes(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """SIGSTOP a rank: it is named, and the run ends."""
    for layout in ("columns", "columns_x_replicas"):
        row, name = Row("stop a rank", layout), f"frozen-{layout}"
        ground.whole(layout)
        for _ in range(count):
            run = Started(ground.arguments(layout, name))
            reach(run, ground.folder(name), "step", ground.saved(name) + 2, dice)
            if len(processes := run.all()) == 1:  # it has reached its end
                run.end()
                break
            frozen = dice.choice(processes[1:])
            frozen.suspend()
            begin, row.trials = time.monotonic(), row.trials + 1
            output, _ = run.process.communicate(timeout=60)
            row.gone_s.append(time.monotonic() - begin - 4)  # less the watchdog's patience
            row.left += len([p for p in processes if p.is_running()])
            row.recovered += f"process {frozen.pid} on" in output and "does not answer" in output
        row.identical = ground.finish(layout, name)
        yield row


def corruptions(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """Flip, zero, cut off and add bytes anywhere in a checkpoint: none is loaded."""
    ground.whole("columns")
    row = Row("damaged checkpoint", "columns")
    folder = ground.folder("whole-columns") / "checkpoints"
    newest, before = checkpoints.steps(folder)[-1], checkpoints.steps(folder)[-2]
    for _ in range(count):
        path = dice.choice(sorted(newest.iterdir()))
        sound = path.read_bytes()
        path.write_bytes(damaged(sound, dice))
        row.trials += 1
        try:
            checkpoints.verify(newest)
        except CheckpointError:
            found, wrong = checkpoints.newest_good(folder)
            row.recovered += found is not None and found.path == before and len(wrong) == 1
        path.write_bytes(sound)
    yield row
    row = Row("run on damaged ones", "columns", identical=True)
    for number in range(max(2, count // 100)):
        name = f"damaged-{number}"
        shutil.copytree(ground.folder("whole-columns"), ground.folder(name))
        last = checkpoints.steps(ground.folder(name) / "checkpoints")[-1]
        path = dice.choice(sorted(last.iterdir()))
        path.write_bytes(damaged(path.read_bytes(), dice))
        row.trials += 1
        same = ground.finish("columns", name)
        row.recovered, row.identical = row.recovered + same, row.identical and same
    yield row


def damaged(sound: bytes, dice: random.Random) -> bytes:
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
    return sound + b"\0"


def full_disk(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """Let the disk fill up under a run, and free it again; needs root, for a small tmpfs."""
    row, name = Row("full disk", "columns"), "full"
    ground.whole("columns")
    with tmpfs(ground.root / "small", "12m") as small:
        for _ in range(max(1, count)):
            shutil.rmtree(small / name, ignore_errors=True)
            run = Started(ground.arguments("columns", name, f"output_dir={small}"))
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
        row.identical = ended_state(small / name) == ground.whole("columns")
    yield row


@contextlib.contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size."""
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def two_writers(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """A second job on a run folder is refused; a third takes over from one that is dead."""
    row, name = Row("two writers", "columns"), "shared"
    ground.whole("columns")
    for _ in range(count):
        first = Started(ground.arguments("columns", name))
        reach(first, ground.folder(name), "step", ground.saved(name) + 2, dice)
        processes = first.all()
        for process in processes:
            process.suspend()  # or it would end before the second has imported torch
        second = done(ground.arguments("columns", name))
        for process in processes:
            process.kill()
        gone(first, processes, row)
        row.trials += 1
        row.recovered += second.returncode == 1 and "is in use by process" in second.stderr
    row.identical = ground.finish("columns", name)
    yield row


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
            batch.windows[0] = float("nan")
        stats = sound(self, batch, step, rate, *more)
        if step == at and what == "flip" and last:
            self.replicated()["conv2.weight"].detach().view(torch.int32)[0, 0, 0, 0] ^= 1 << 9
        return stats
    return train_step

for one in (ddp.TorchEngine, zero.ZeroEngine):
    one.train_step = patched(one.train_step)
sys.exit(main.main())
"""


def patched(ground: Ground, layout: str, name: str, what: str, at: int, *more: str) -> Any:
    """Start a run whose ranks (torchrun's) are patched to do something at a step."""
    script = ground.root / "patched.py"
    script.write_text(PATCHED)
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", str(LAYOUTS[layout]))
    command = [*ranks, str(script), what, str(at), *ground.arguments(layout, name, *more)]
    return subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, timeout=300
    )


def wrong_numbers(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """A batch of NaN on one rank: no rank applies it, and nothing of it is saved."""
    for layout in LAYOUTS:
        row, name = Row("poisoned batch", layout), f"poisoned-{layout}"
        ground.whole(layout)
        for _ in range(max(1, count // 5)):
            at = ground.saved(name) + dice.randint(1, 9)
            ended = patched(ground, layout, name, "poison", at)
            row.trials += 1
            said = f"step {at + 1}: the loss is nan" in ended.stderr
            row.recovered += said and ended.returncode == 1 and ground.saved(name) <= at
        row.identical = ground.finish(layout, name)
        yield row


def flipped_bits(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """A bit of a parameter that flips on one of several replicas is found before the next save."""
    for layout in ("replicas", "columns_x_replicas"):
        row, name = Row("flipped bit", layout), f"flipped-{layout}"
        ground.whole(layout)
        for _ in range(max(1, count // 5)):
            at = ground.saved(name) + dice.randint(1, 9)
            ended = patched(ground, layout, name, "flip", at)
            row.trials += 1
            said = "replicas are no longer bitwise equal: conv2.weight of rank" in ended.stderr
            row.recovered += said and ended.returncode == 1 and ground.saved(name) <= at
        row.identical = ground.finish(layout, name)
        yield row


def crash_loop(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """A run that always fails at the same step is refused after three starts that saved nothing."""
    row, name = Row("crash loop", "columns"), "looping"
    ground.whole("columns")
    starts, said = 0, ""
    while "starts in a row saved nothing" not in said and starts < 9:
        more = "checkpoint.max_idle_restarts=3"
        said = patched(ground, "columns", name, "raise", 6, more).stderr
        starts += 1
    run = read_run(ground.folder(name))
    row.trials, row.holds = 1, starts == 6  # one saved step 4, four saved nothing, one was refused
    row.recovered = int((run["state"], run["exit"]) == ("failed", 2))
    row.identical = ground.finish("columns", name)
    yield row


def goodput(ground: Ground, count: int, dice: random.Random) -> Iterator[Row]:
    """Kill the demo every two minutes: what share of the time went into steps that were kept."""
    if count == 0:
        return
    row, data = Row("kill every 2 minutes", "columns"), ground.root / "demo"
    prepare("fashion_mnist", SAMPLE, data, Options())
    places = [f"data.path={data}", f"output_dir={ground.root / 'runs'}", "name=demo",
              "checkpoint.every_steps=50"]  # fmt: skip
    while True:
        run = Started(["train", "demo", *places])
        try:
            run.process.communicate(timeout=120)
            break
        except subprocess.TimeoutExpired:
            processes = run.all()
            for process in processes:
                process.kill()
            gone(run, processes, row)
            row.trials += 1
    found = read_run(ground.folder("demo"))
    row.recovered = row.trials if found["state"] == "finished" else 0
    kept = found["kept_s"] / (found["updated"] - found["first_started"])
    row.note, row.holds = f"{kept:.1%} of the time kept", kept >= 0.9
    yield row


DRILLS: dict[str, tuple[Callable[[Ground, int, random.Random], Iterator[Row]], int, int]] = {
    "kills": (kills, 4, 25),
    "signals": (signals, 4, 20),
    "freezes": (freezes, 1, 5),
    "corruptions": (corruptions, 200, 1000),
    "full_disk": (full_disk, 1, 3),
    "two_writers": (two_writers, 1, 5),
    "wrong_numbers": (wrong_numbers, 1, 10),
    "flipped_bits": (flipped_bits, 1, 10),
    "crash_loop": (crash_loop, 1, 1),
    "goodput": (goodput, 0, 1),
}


def main() -> int:
    """Run the drills; return 1 unless all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="as often as docs/reliability.md says")
    parser.add_argument(
        "--only", action="append", choices=DRILLS, help="only this drill; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to append rows to")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-drills-") as scratch:
        ground = Ground(Path(scratch))
        print(HEADING, flush=True)
        for name in options.only or DRILLS:
            drill, few, many = DRILLS[name]
            count, dice = many if options.full else few, random.Random(options.seed)
            for row in drill(ground, count, dice):
                rows.append(row)
                print(row.line(), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    trials = sum(row.trials for row in rows)
    print(f"{trials} trials, {sum(row.recovered for row in rows)} recovered")
    return 0 if all(row.sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
