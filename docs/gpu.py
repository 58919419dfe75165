"""Measures on one GPU, part by part, and appends a row for each part to docs/gpu.jsonl. From these
rows come the tables of docs/gpu-measurements.md and the step times that correct `plan`.

    python docs/gpu.py [PART ...] [--commit NAME] [--within SECONDS]    (make gpu)
    python docs/gpu.py --document                                       (make docs)

A part that has already succeeded on this card and commit is skipped, so the command can be repeated
until all are done; a part that failed is tried again, after the others. Any Python that has the
packages will do: nothing is installed or downloaded, and the data that parts need is generated. The
output of every attempt is kept in runs/gpu.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_page
import processes
from gpu_parts import (
    GRACE_S,
    PARTS,
    PHOTOGRAPHS,
    Figures,
    Part,
    failures,
    of_pytest,
    photographs,
    tests_amid,
)
from ledger import ROOT, append_row, commit_of, parse_parts, part_parser, read_rows

LOGS = ROOT / "runs/gpu"
# A commit that changes none of these counts as the same.
MEASURED = ("alexnet_dist", "configs", "tests")
_MOST = 2000  # characters of what a failed part printed that its row keeps
# Warnings that the figures are without the graphs or kernels that they are meant to measure.
LESS = ("could not be captured as a CUDA graph", "no kernels for this GPU")


def facts(commit: str | None) -> dict[str, Any]:
    """Return a row's metadata about machine and code; exit with a message if there is no GPU, or no
    commit is known."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: `alexnet-dist doctor` says why")
    commit = commit_of(*MEASURED) if commit is None else commit
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.check_output(query, text=True, timeout=30).split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "commit": commit,
    }


def measure(
    parts: Mapping[str, Part], about: Mapping[str, Any], within: float, rows: Path, logs: Path
) -> bool:
    """Run the parts that are not done and fit into the time, and append a row for each.

    Args:
        about: the rows' metadata, as from `facts`.
        within: seconds, for all parts together.
        rows: the JSONL file.
        logs: folder for the parts' output.

    Returns:
        Whether no part failed.
    """
    end, sound = time.monotonic() + within, True
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background; inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = _tried(read_rows(rows), about)
    for name in sorted(parts, key=lambda name: failed.get(name, False)):
        part = parts[name]
        if failed.get(name) is False:
            print(f"{name}: answered for {about['commit']} on this card")
            continue
        left = int(end - time.monotonic())
        if part.least > left:
            print(f"{name}: left for the next time: it may take {part.least} s")
            continue
        limit = min(part.limit, left)
        print(f"{name}: up to {limit} s", flush=True)
        logs.mkdir(parents=True, exist_ok=True)
        attempt = logs / f"{name}-{time.strftime('%H%M%S')}"
        output, errors = attempt.with_suffix(".out"), attempt.with_suffix(".err")
        row = {"part": name, **about, **_answer(replace(part, limit=limit), output, errors)}
        append_row(rows, row)
        sound &= "failed" not in row
        print(f"{name}: {row['seconds']} s; {row.get('failed', 'done')}", flush=True)
        if "failed" in row:
            print(*_last_lines(output, errors), sep="\n", flush=True)
    return sound


def _tried(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether they failed, of the parts that were tried on this card and commit; none of a
    commit with changes, which may be others now."""
    known = [about["card"], about["commit"]]
    if about["commit"].endswith("+"):
        return {}
    return {row["part"]: "failed" in row for row in rows if [row["card"], row["commit"]] == known}


def _last_lines(*logs: Path, most: int = 20) -> Iterator[str]:
    """Yield the last lines of each log, for a reader who may not have access to the files."""
    for log in logs:
        if lines := log.read_text(errors="replace").rstrip().splitlines():
            yield f"--- the end of {log.name}"
            yield from (line[:300] for line in lines[-most:])


def _answer(part: Part, output: Path, errors: Path) -> dict[str, Any]:
    """Run a part, and return its own entries of its row."""
    begin = time.monotonic()
    last, failed = _run(part, output, errors)
    printed, said = output.read_text(errors="replace"), errors.read_text(errors="replace")
    # Read the figures, and any reason why they do not count.
    figures: Figures = {}
    if part.read is of_pytest and failed.startswith("not done"):
        failed += f", amid {', '.join(tests_amid(printed)) or 'no test'}"
    if less := next((line for line in said.splitlines() if any(it in line for it in LESS)), ""):
        failed = failed or f"its figures are of less than they say: {less}"
    if last == part.commands[-1]:
        try:
            found = part.read(printed)
            figures, odd = _rounded(found), _not_finite(found)
            failed = failed or (odd and f"{odd}, which a ledger cannot hold")
        except Exception as error:  # the other parts go on
            failed = failed or f"its output says nothing: {error!r}"
    typed = " ".join(part.commands[-1]).removeprefix("-m ").replace("alexnet_dist", "alexnet-dist")
    row: dict[str, Any] = {"command": typed}
    if failed:
        ends = [text.strip()[-_MOST:] for text in (said, printed)]
        told = failures(printed) if part.read is of_pytest else ""
        row["failed"] = f"{failed}: {told or ' '.join(filter(None, ends))}"
    return row | {"seconds": round(time.monotonic() - begin, 1), "figures": figures}


def _run(part: Part, output: Path, errors: Path) -> tuple[Sequence[str], str]:
    """Run a part's commands until one fails; return the last one that ran, and how it failed, "" if
    it did not. At the limit a command is interrupted, so that it can still print what it has."""
    grace = min(GRACE_S, part.limit / 3)
    end = time.monotonic() + part.limit - grace
    for command in part.commands:
        with processes.started([sys.executable, *command], output, errors) as process:
            failed = processes.failed(process, end - time.monotonic())
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        if failed:
            break
    return command, failed


def _not_finite(figures: Figures) -> str:
    """Return in words which figures are infinite or not a number; "" if none is."""
    return ", ".join(
        f"{name} is {value}"
        for found in figures.values()
        for name, value in found.items()
        if not math.isfinite(value)
    )


def _rounded(figures: Figures) -> Figures:
    """Return the finite figures to four digits, without empty groups."""
    return {
        group: {
            name: float(f"{value:.4g}") for name, value in found.items() if math.isfinite(value)
        }
        for group, found in figures.items() if found
    }  # fmt: skip


def main() -> int:
    """Measure, or write the page; see the module's docstring."""
    begin = time.monotonic()
    parser = part_parser(__doc__, PARTS, within=570)
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of docs/gpu-measurements.md"
    )
    parser.add_argument(
        "--photographs", type=Path, help="only make the photographs, in this folder"
    )
    options = parse_parts(parser, PARTS)
    processes.exit_at_sigterm()  # and end what was started
    if options.photographs:
        photographs(options.photographs, PHOTOGRAPHS)
    elif options.document:
        gpu_page.write()
    else:
        parts = {name: PARTS[name] for name in options.part}
        about = facts(options.commit)  # on a new machine torch alone may take half a minute
        left = options.within - (time.monotonic() - begin)
        return 0 if measure(parts, about, left, gpu_page.ROWS, LOGS) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
