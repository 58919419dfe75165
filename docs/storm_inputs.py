"""An input of docs/storm.py: a file whose bytes are changed, and how its reading is judged."""

import contextlib
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from alexnet_dist.data.prepare.convert import RefusedImage
from alexnet_dist.errors import AlexNetDistError

# One input may take what the program promises for an image or header, and what a process takes.
LONGEST_S, LARGEST_MB = 30, 1500  # processor time, memory
PATIENCE = 4  # wall-clock time is bounded by this multiple: others may use the machine


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
            case _:
                pass  # there is nothing to flip, or it is not cut this time
    return bytes(found) if bytes(found) != sound else sound + b"\0"


@contextlib.contextmanager
def changed(files: Sequence[Path], dice: random.Random) -> Iterator[Path]:
    """Change one of the files; restore it, and the manifest beside it, at the end."""
    path = dice.choice(files)
    kept = {file: file.read_bytes() for file in (path, path.parent / "manifest.json")
            if file.exists()}  # fmt: skip
    path.write_bytes(mutated(kept[path], dice))
    try:
        yield path
    finally:
        for file, sound in kept.items():
            file.write_bytes(sound)


def tried(read: Callable[[], object]) -> dict[str, Any]:
    """Read in a fork of this process; return how it ended, as arguments of `Tally.add`."""
    ours, its = os.pipe()
    begin, child = time.monotonic(), os.fork()
    if not child:
        os.close(ours)
        _read_in_child(read, its)
    os.close(its)
    # Wait for the child, and kill it if it hangs.
    ended, why, status, seconds = "hung", f"more than {PATIENCE * LONGEST_S} s", None, 0.0
    while status is None and time.monotonic() - begin < PATIENCE * LONGEST_S:
        pid, code, used = os.wait4(child, os.WNOHANG)
        if pid:
            status, seconds = os.waitstatus_to_exitcode(code), used.ru_utime + used.ru_stime
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # Judge it by its own report, or by how it died.
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
