"""A storm of hours: kills of everything at any moment, and changed bytes for every reader.

    python docs/storm.py [--within SECONDS] [--only WHAT] [--number N]    (make drill DRILLS=full)
    python docs/storm.py --document                                       (make docs)

Each trial has a number, which seeds all its random choices. It continues where docs/drills.jsonl
left off, until each reader has had its 1,000 inputs, and all layouts together their 1,000 kills;
trials that went wrong last time come first. A row every few minutes records kind, numbers, and how
trials ended. Changed bytes are read in a fork of this process, whose memory and time are measured.
Exits with 1 if a trial was not as it should be: an input refused with more than one line, or beyond
its bounds; a process left behind; a run that ends differently from an undisturbed one.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from drills import LAYOUTS, RUN, SAVE, Ground, Row, Started, gone, logged, reach
from ledger import between, read_rows
from torchvision.io import decode_image

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare import archives
from alexnet_dist.data.prepare.convert import RefusedImage, convert
from alexnet_dist.data.prepare.devkit import read_synsets
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.engines.base import check_fit, check_values
from alexnet_dist.errors import AlexNetDistError, CheckpointError
from alexnet_dist.evaluation.load import load_checkpoint
from alexnet_dist.files import MOST_PIXELS, sha256
from alexnet_dist.formats.convert import export_weights, import_weights
from alexnet_dist.network.model import AlexNet
from alexnet_dist.reporting import figures
from alexnet_dist.reporting.report import report
from alexnet_dist.training.state import Progress
from launch.status import status

ROOT = Path(__file__).parent.parent
made = SimpleNamespace(**runpy.run_path(str(ROOT / "tests/made.py")))
sys.path.append(str(ROOT / "tests"))
forks = importlib.import_module("forks")  # by the name that its processes import it by
ROWS, PAGE = ROOT / "docs/drills.jsonl", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- made by make docs from drills.jsonl -->\n", "<!-- to here -->\n"
KILLS, INPUTS = 1000, 1000  # kills in all; inputs of each reader
# One input may take what the program promises for an image or header, and what a process takes.
LONGEST_S, LARGEST_MB = 30, 1500  # processor time, memory
PATIENCE = 4  # wall-clock time is bounded by this multiple: others may use the machine


@dataclass
class Tally:
    """The outcomes of a row's trials."""

    numbers: list[int] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    def add(self, number: int, ended: str, why: str = "", **most: float) -> None:
        """Add a trial's outcome; of each figure in `most` the largest is kept."""
        self.numbers.append(number)
        self.ended[ended] += 1
        if why:
            self.failed[number] = why[:300]
            print(f"\n{number}: {ended}: {why}", flush=True)
        for name, value in most.items():
            self.most[name] = round(max(self.most.get(name, 0), value), 1)


# --- inputs


def mutated(sound: bytes, dice: random.Random) -> bytes:
    """Return changed bytes: some flipped, overwritten, lost, repeated, moved or cut off."""
    found = bytearray(sound)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        # Headers, which matter most, are at the ends.
        at = dice.choice((dice.randrange, lambda n: min(n - 1, int(dice.expovariate(0.02)))))(
            max(1, len(found))
        )
        size = dice.choice((1, 2, 4, 8, 64, 512))
        match dice.choice(("flip", "byte", "zero", "full", "lose", "repeat", "move", "cut", "add")):
            case "flip" if found:
                found[min(at, len(found) - 1)] ^= 1 << dice.randrange(8)
            case "byte" if found:
                found[min(at, len(found) - 1)] = dice.randrange(256)
            case "zero":
                found[at : at + size] = bytes(len(found[at : at + size]))
            case "full":
                found[at : at + size] = b"\xff" * len(found[at : at + size])
            case "lose":
                del found[at : at + size]
            case "repeat":
                found[at:at] = bytes(found[at : at + size]) * dice.choice((1, 3, 100))
            case "move":
                other = dice.randrange(max(1, len(found)))
                found[at : at + size] = found[other : other + len(found[at : at + size])]
            case "cut" if dice.random() < 0.3:
                del found[at:]
            case "add":
                found += dice.randbytes(size)
    return bytes(found) if bytes(found) != sound else sound + b"\0"


@dataclass(frozen=True)
class Reader:
    """A reader of files that may hold anything.

    Attributes:
        files: files of which one at a time is changed in place, and then restored.
        read: raises AlexNetDistError or RefusedImage, or has checked what it read.
    """

    files: Sequence[Path]
    read: Callable[[Path, random.Random], object]


def readers(ground: Ground) -> dict[str, Reader]:
    """Return all readers, each with intact files of its own below the ground's folder."""
    root, whole = ground.root, ground.folder("whole-one")
    last = checkpoints.steps(whole / "checkpoints")[-1]
    forgeries = root / "forged" / last.name
    for source, to in ((last, forgeries), (root / "data", root / "packed"), (whole, root / "run")):
        shutil.copytree(source, to)
    made.imagenet(root / "imagenet", 2, 4)
    made.cifar10(root / "cifar10", 2, 2)
    images = list(_images(root / "images"))
    weights = _weights(root / "weights")
    archives.read_synsets = functools.cache(read_synsets)  # or each trial would start a process
    imagenet = _prepares("imagenet", root / "imagenet")
    return {
        "checkpoint": Reader(_files(last), _verifies),
        "checkpoint whose hashes are forged": Reader(
            _files(forgeries, "*.safetensors", "progress.json"), _answers
        ),
        "packed data set": Reader(
            _files(root / "packed"), lambda path, dice: _whole(root / "packed")
        ),
        "ImageNet's tars": Reader(_files(root / "imagenet", "*img*"), imagenet),
        "devkit": Reader(_files(root / "imagenet", "*devkit*"), imagenet),
        "CIFAR-10": Reader(_files(root / "cifar10"), _prepares("cifar10", root / "cifar10")),
        "IDX": Reader(_files(root / "idx"), _prepares("fashion_mnist", root / "idx")),
        "image": Reader(images, _converts),
        ".pth": Reader(_files(weights, "*.pth"), _imports("torchvision")),
        ".caffemodel": Reader(_files(weights, "*.caffemodel"), _imports("caffe")),
        ".safetensors": Reader(_files(weights, "w.safetensors"), _imports("safetensors")),
        "run folder": Reader(_files(root / "run", "*.json*"), _reports),
    }


def _files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files that match patterns."""
    found = [path for one in patterns or ("**/*",) for path in sorted(folder.glob(one))]
    return [path for path in found if path.is_file()]


def _images(folder: Path) -> Iterator[Path]:
    """Yield an image of each kind that is read, and of each oddity."""
    folder.mkdir()
    picture = made.photograph(1)
    for name, kind, mode, how in (
        ("plain", "JPEG", "RGB", {}), ("scans", "JPEG", "RGB", {"progressive": True}),
        ("ink", "JPEG", "CMYK", {}), ("plain", "PNG", "RGB", {}), ("grey", "PNG", "L", {}),
        ("palette", "PNG", "P", {}), ("plain", "GIF", "RGB", {}), ("plain", "BMP", "RGB", {}),
        ("plain", "WEBP", "RGB", {}), ("plain", "TIFF", "RGB", {}),
        ("packed", "TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):  # fmt: skip
        path = folder / f"{name}.{kind.lower()}"
        path.write_bytes(made.encoded(picture.convert(mode), kind, **how))
        yield path


def _weights(folder: Path) -> Path:
    """Export a small network's weights in every format that can be imported."""
    config = load_config(RUN)
    named = AlexNet(config.model, seed=3).named_parameters()
    tensors = {name: value.detach().contiguous() for name, value in named}
    state = {"step": 0, "score": None}
    ours = checkpoints.save(folder / "ours", config, "none", tensors, {}, state, None)
    export_weights("safetensors", ours, folder / "w.safetensors")
    export_weights("caffe", ours, folder / "w.caffemodel")
    torch.save(tensors, folder / "zipped.pth")
    torch.save(tensors, folder / "before-1.6.pth", _use_new_zipfile_serialization=False)
    return folder


def _verifies(path: Path, dice: random.Random) -> None:
    """Check that a changed checkpoint is not taken for an intact one."""
    checkpoints.verify(path.parent)
    if path.name != "manifest.json":  # its hash covers its content, not its whitespace
        raise AssertionError("bytes that are not as they were written were taken for good")


def _answers(path: Path, dice: random.Random) -> None:
    """Check that a checkpoint whose hashes fit is another network's weights, or an error."""
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][path.name] |= {"size": len(data), "sha256": digest}
    manifest["sha256"] = checkpoints.own_sha256(manifest)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(path.parent)
    found = checkpoints.verify(path.parent)
    config, states = found.config, found.optimizer()
    check_fit(config, found.parameters(), states)
    check_values(found.parameters(), states)
    try:
        Progress.of(found.progress)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # one line in the loop
        raise CheckpointError(f"{error!r}") from error


def _whole(folder: Path) -> None:
    """Check that every sample of a packed data set is one that was packed, or a stand-in."""
    dataset = open_dataset(folder)
    for split in dataset.splits.values():
        _, encoded = split.read_whole(np.arange(len(split)))
        for one in encoded:
            decode_image(torch.from_numpy(one))
        split.close()


def _prepares(kind: str, source: Path) -> Callable[[Path, random.Random], object]:
    """Return a reader that prepares a source."""

    def read(path: Path, dice: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=source.parent) as aside:
            prepare(kind, source, Path(aside) / "out", Options(workers=1, max_bad=1.0))
            _whole(Path(aside) / "out")

    return read


def _imports(kind: str) -> Callable[[Path, random.Random], object]:
    """Return a reader that imports weights."""

    def read(path: Path, dice: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            checkpoints.verify(import_weights(kind, path, Path(aside) / "out", RUN))

    return read


def _converts(path: Path, dice: random.Random) -> None:
    """Convert an image as `prepare` does."""
    image = convert(path.read_bytes(), keep=dice.random() < 0.5).image
    assert image.dtype == torch.uint8
    assert image.shape[0] in (1, 3)
    assert 0 < image[0].numel() <= MOST_PIXELS


def _reports(path: Path, dice: random.Random) -> None:
    """Run `report`, `status` and `train` on a run folder: an error in one must not hide others."""
    run, errors = path.parent, []
    for read in (
        lambda: report([run], run / "report.html"), lambda: status(run, None),
        lambda: load_config([run / "config.json"]), lambda: figures.draw(run),
    ):  # fmt: skip
        try:
            read()
        except AlexNetDistError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def inputs(reader: Reader, name: str, numbers: Iterator[int], until: float) -> Tally:
    """Read changed bytes, of one file after another, until a moment."""
    tally = Tally()
    for number in numbers:
        dice = random.Random(f"{name} {number}")
        path = dice.choice(reader.files)
        kept = {file: file.read_bytes() for file in (path, path.parent / "manifest.json")
                if file.exists()}  # fmt: skip
        path.write_bytes(mutated(kept[path], dice))
        try:
            tally.add(number, **tried(functools.partial(reader.read, path, dice)))
        finally:
            for file, sound in kept.items():
                file.write_bytes(sound)
        if time.monotonic() > until:
            break
    return tally


def tried(read: Callable[[], object]) -> dict[str, Any]:
    """Read in a fork of this process; return how it ended, as arguments of `Tally.add`."""
    ours, its = os.pipe()
    begin, child = time.monotonic(), os.fork()
    if not child:
        os.close(ours)
        _read_in_child(read, its)
    os.close(its)
    ended, why, status, seconds = "hung", f"more than {PATIENCE * LONGEST_S} s", None, 0.0
    while status is None and time.monotonic() - begin < PATIENCE * LONGEST_S:
        pid, code, used = os.wait4(child, os.WNOHANG)
        if pid:
            status, seconds = os.waitstatus_to_exitcode(code), used.ru_utime + used.ru_stime
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(ours, "rb") as said:
        told = said.read()
    took = {"longest_s": seconds or time.monotonic() - begin}
    if status == 0 and told:
        ended, why, largest_mb = json.loads(told)
        took["largest_mb"] = largest_mb
        if seconds > LONGEST_S or largest_mb > LARGEST_MB:
            why = why or f"{seconds:.1f} s, {largest_mb:.0f} MB"
    elif status is not None:
        ended, why = "crashed", f"ended with {status}"
    return {"ended": ended, "why": why, **took}


def _read_in_child(read: Callable[[], object], to: int) -> None:
    """Read in the fork, and report how it ended, why that is wrong if it is, and the MB it took."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    before, ended, why = psutil.Process().memory_info().rss, "accepted", ""
    try:
        read()
    except (AlexNetDistError, RefusedImage) as error:
        ended, why = "refused", "" if str(error).count("\n") == 0 else f"several lines: {error}"
    except BaseException:
        ended, why = "traceback", " ".join(traceback.format_exc().split())[-300:]
    # A child counts with this process's size until it executes another program.
    peaks = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    most = max(1024 * peak - before for peak in peaks)
    os.write(to, json.dumps((ended, why, max(0, most) / 1e6)).encode())
    os._exit(0)


# --- kills


class Forked(Started):
    """A run whose processes are forked with everything imported, which saves each seconds."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = forks.command(arguments, prints=(Path(os.devnull), Path(os.devnull)))

    def end(self) -> tuple[int, str]:
        """Wait for the run to end; return its exit code, and no output."""
        return self.process.wait(timeout=120), ""


def kills(ground: Ground, layout: str, numbers: Iterator[int], until: float) -> Tally:
    """SIGKILL a rank, the launcher or all, again and again until a moment; then let the run end."""
    tally, name = Tally(), f"killed-{layout}-{time.monotonic_ns()}"
    row = Row("kill", layout)
    ground.whole(layout)
    for number in numbers:
        dice = random.Random(f"kill {layout} {number}")
        moment = dice.choice(("starting", "step", "step", "evaluating", "saving"))
        # Starts are killed during their imports too.
        begins = Started if moment == "starting" else Forked
        run, saved = begins(ground.arguments(layout, name)), ground.saved(name)
        step = saved + dice.randint(1, 7)
        if moment == "evaluating":  # every 15 steps, right after the step is logged
            step = (saved // 15 + 1) * 15
        reach(run, ground.folder(name), moment.replace("evaluating", "step"), step, dice)
        processes = run.all() if run.process.poll() is None else []
        if not processes:  # it reached its last step
            run.end()
            name += "x"
            continue
        whom = dice.choice(("all", "launcher", "one"))
        for victim in {"all": processes, "launcher": processes[:1]}.get(
            whom, [dice.choice(processes)]
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        left = row.left
        gone(run, processes, row)
        lost = max(0, logged(ground.folder(name)) - ground.saved(name))
        why = "a process is left" if row.left > left else ""
        why = why or (f"{lost} steps lost" if lost > 2 * SAVE else "")
        tally.add(number, f"{moment}, {whom}", why, lost=lost, longest_s=row.gone_s[-1])
        if time.monotonic() > until:
            break
    return _finished(tally, ground.finish(layout, name))


def kills_of_prepare(ground: Ground, numbers: Iterator[int], until: float) -> Tally:
    """SIGKILL `prepare` with or without what it started; the same command then finishes it."""
    tally, identical = Tally(), True
    for number in numbers:
        dice, out = random.Random(f"kill prepare {number}"), ground.root / f"prepared-{number}"
        command = ["prepare", "fashion_mnist", str(ground.root / "idx"), str(out)]
        fresh = dice.random() < 0.2
        run = Started(command) if fresh else Forked(command)
        time.sleep(dice.uniform(0, 6 if fresh else 2))
        processes = run.all() if run.process.poll() is None else []
        whom = dice.choice(("all", "launcher"))
        for victim in processes if whom == "all" else processes[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        row = Row("kill", "prepare")
        gone(run, processes, row)
        code, _ = Forked(command).end()
        same = out.exists() and _hashes(out) == _hashes(ground.root / "data")
        why = "" if same and code == 0 else f"it is not whole: {code}"
        why = why or ("a process is left" if row.left else "")
        tally.add(number, f"preparing, {whom}", why, longest_s=max(row.gone_s))
        identical &= same
        shutil.rmtree(out, ignore_errors=True)
        if time.monotonic() > until:
            break
    return _finished(tally, identical)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files."""
    return {str(path.relative_to(folder)): sha256(path) for path in _files(folder)}


def _finished(tally: Tally, identical: bool) -> Tally:
    """Add whether the final state was identical to a tally."""
    if not identical and tally.numbers:
        tally.failed.setdefault(tally.numbers[-1], "the run did not end as one left alone")
        print(f"{tally.numbers}: the run did not end as one that nothing happened to", flush=True)
    return tally


# --- the ledger


def numbers_left(rows: Sequence[Mapping[str, Any]], what: str) -> Iterator[int]:
    """Yield the numbers of a kind's next trials: those that went wrong last time, then new ones."""
    of = [row for row in rows if row["what"] == what]
    yield from sorted(wrong(of))
    new = max((n for row in of for n in _spread(row["numbers"])), default=-1) + 1
    while True:
        yield new
        new += 1


def wrong(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return the trials of one kind that were wrong when they were last tried, with the reasons."""
    found: dict[int, str] = {}
    for row in rows:
        for number in _spread(row["numbers"]):
            found.pop(number, None)
        found |= {int(number): why for number, why in row["failed"].items()}
    return found


def _left(rows: Sequence[Mapping[str, Any]], target: int) -> int:
    """Return how many trials of one kind are left, those that were wrong included."""
    return max(0, target - sum(sum(row["ended"].values()) for row in rows)) + len(wrong(rows))


def _spread(numbers: Sequence[Sequence[int]]) -> Iterator[int]:
    """Yield the numbers in a list of ranges."""
    for first, last in numbers:
        yield from range(first, last + 1)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return numbers as a list of ranges, [first, last]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of all sessions' outcomes."""
    if not rows:
        return "No storm has been yet.\n"
    kinds = dict.fromkeys(row["what"] for row in rows)
    per = {kind: [row for row in rows if row["what"] == kind] for kind in kinds}

    def total(of: Sequence[Mapping[str, Any]]) -> int:
        return sum(sum(row["ended"].values()) for row in of)

    def most(of: Sequence[Mapping[str, Any]], name: str) -> str:
        return f"{max((row['most'].get(name, 0) for row in of), default=0):g}"

    def ended(of: Sequence[Mapping[str, Any]], *words: str) -> int:
        return sum(n for row in of for how, n in row["ended"].items() if how.startswith(words))

    killed = {kind: of for kind, of in per.items() if kind.startswith("kill ")}
    read = {kind: of for kind, of in per.items() if kind not in killed}
    hours = sum(row["seconds"] for row in rows) / 3600
    text = (
        f"{sum(map(total, killed.values())):,} kills and {sum(map(total, read.values())):,} "
        f"changed inputs in {hours:.1f} hours, {rows[0]['date']} to {rows[-1]['date']}, at commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}; "
        f"{'; '.join(dict.fromkeys(row['machine'] for row in rows))}.\n"
    )
    moments = ("starting", "step", "evaluating", "saving", "preparing")
    text += (
        "\n| SIGKILL in | trials | "
        + " | ".join(moments)
        + (
            " | most lost, steps | gone within, s | wrong |\n|---|"
            + "---|" * (len(moments) + 4)
            + "\n"
        )
    )
    for kind, of in killed.items():
        cells = [total(of), *(ended(of, moment) for moment in moments), most(of, "lost"),
                 most(of, "longest_s"), len(wrong(of))]  # fmt: skip
        text += f"| {kind.removeprefix('kill ')} | {' | '.join(map(str, cells))} |\n"
    text += (
        "\n| read | changed inputs | refused | accepted | longest, s | most memory, MB | wrong |\n"
    )
    text += "|---|---|---|---|---|---|---|\n"
    for kind, of in read.items():
        cells = [total(of), ended(of, "refused"), ended(of, "accepted"), most(of, "longest_s"),
                 most(of, "largest_mb"), len(wrong(of))]  # fmt: skip
        text += f"| {kind} | {' | '.join(map(str, cells))} |\n"
    return text


def documented(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made from the rows."""
    return between(page, BEGIN, END, tables(rows))


def about() -> dict[str, Any]:
    """Return what a row says of the code and the machine."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--abbrev=9", "--format=%h"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} cores, {name[1] if name else 'unknown'}, torch {torch.__version__}"
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit or "unknown",
            "machine": machine}  # fmt: skip


def storm(ground: Ground, options: argparse.Namespace, until: float) -> bool:
    """Run slices of each kind, the least tried first; return whether all was as it should be."""
    only, number, path = options.only, options.number, options.rows
    ground.whole("one")
    known = readers(ground)
    targets = {
        f"kill {layout}": -(-KILLS // (len(LAYOUTS) + 1)) for layout in (*LAYOUTS, "prepare")
    }
    targets |= dict.fromkeys(known, INPUTS)
    if unknown := {*only} - {*targets}:
        sys.exit(f"{', '.join(unknown)}: one of {', '.join(targets)}")
    sound = True
    while time.monotonic() < until:
        rows = read_rows(path)
        to_come = {what: _left([row for row in rows if row["what"] == what], targets[what])
                   for what in only or targets}  # fmt: skip
        what = max(to_come, key=lambda what: to_come[what] / targets[what])
        left = to_come[what]
        if left <= 0 and number is None:
            break
        numbers = iter([number]) if number is not None else numbers_left(rows, what)
        begin, end = time.monotonic(), min(until, time.monotonic() + options.slice)
        some = itertools.islice(numbers, max(1, left))
        if what in known:
            tally = inputs(known[what], what, some, end)
        elif what == "kill prepare":
            tally = kills_of_prepare(ground, some, end)
        else:
            tally = kills(ground, what.removeprefix("kill "), some, end)
        row = {"what": what, "numbers": _runs(tally.numbers), "ended": dict(tally.ended),
               "failed": tally.failed, "most": tally.most,
               "seconds": round(time.monotonic() - begin), **about()}  # fmt: skip
        print(f"{what}: {len(tally.numbers)}: {dict(tally.ended)}, {tally.most}", flush=True)
        sound &= not tally.failed
        if number is not None:
            break
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return sound


def main() -> int:
    """Run the storm, or write the page; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--within", type=float, default=86400, help="stop after this many seconds")
    parser.add_argument(
        "--slice", type=float, default=100, help="seconds that each row covers (default: 100)"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="only this kind of trial; may be repeated"
    )
    parser.add_argument(
        "--number", type=int, help="with --only: only this trial; no row is written"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=ROWS,
        help="file to append rows to (default: docs/drills.jsonl)",
    )
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of reliability.md"
    )
    options = parser.parse_args()
    if options.document:
        PAGE.write_text(documented(PAGE.read_text(), read_rows(ROWS)))
        return 0
    torch.set_num_threads(1)  # threads that wait for each other would hang in a fork
    until = time.monotonic() + options.within
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-storm-") as scratch:
        ground = Ground(Path(scratch), "layout.timeout_s=15")  # others may use the machine
        sound = storm(ground, options, until)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
