"""Measures on one GPU, part by part, and appends a row for each part to docs/gpu.jsonl. From these
rows come the tables of docs/performance.md and the step times that correct `plan`.

    python docs/gpu.py [PART ...] [--commit NAME] [--within SECONDS]    (make gpu)
    python docs/gpu.py --document                                       (make docs)

A part that has already succeeded on this card and commit is skipped, so the command can be repeated
until all are done; a part that failed is tried again. Any Python that has the packages will do:
nothing is installed or downloaded, and the data that parts need is generated. The parts' output is
kept in runs/gpu.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
from ledger import ROOT, append_row, between, commit_of, read_rows

ROWS, PAGE, LOGS = ROOT / "docs/gpu.jsonl", ROOT / "docs/performance.md", ROOT / "runs/gpu"
STEPS, FROM_ROWS = ROOT / "alexnet_dist/planning/measured.jsonl", "docs/gpu.jsonl"
MEASURED = (
    "alexnet_dist",
    "configs",
    "tests",
)  # a commit that changes none of these counts as the same
BEGIN, END = "<!-- made by make docs from gpu.jsonl -->\n", "<!-- to here -->\n"
CLASSES, PHOTOGRAPHS = 8, 4000
GRACE_S = 20  # kept back from a part's limit, for it to print results and a traceback
# Warnings that the figures are without the graphs or kernels that they are meant to measure.
LESS = ("could not be captured as a CUDA graph", "no kernels for this GPU")
Figures = dict[str, dict[str, float]]  # by group


def of_bench(printed: str) -> Figures:
    """Read the output of `bench … --json`: the medians of its times, and the costliest kernels."""
    found = json.loads(printed.splitlines()[-1])
    runs, kernels = found.get("runs", [{}]), found.get("kernels", [])
    timed = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    timed |= {name[:80]: us for name, us, _, _ in kernels[:20]}
    return {"ratios": found["ratios"], found["unit"]: timed, "more": found.get("ceilings", {})}


def of_pytest(printed: str) -> Figures:
    """Count tests by outcome, from pytest's output; also if it was killed before its summary."""
    ended = re.findall(r"^(?:tests/\S.* |\[gw\d+\].*)(PASSED|FAILED|SKIPPED|ERROR)", printed, re.M)
    if "PASSED" not in ended:
        raise ValueError("no test passed")
    return {"tests": {word.lower(): float(ended.count(word)) for word in sorted({*ended})}}


def amid(printed: str) -> list[str]:
    """Return the tests that have started and not ended, from the output of pytest with workers."""
    begun = re.findall(r"^(tests/\S+::.*?) *$", printed, re.M)
    ended = re.findall(r"^\[gw\d+\] \[ *\d+%\] [A-Z]+ (tests/\S+::.*?) *$", printed, re.M)
    return [name for name in begun if name not in ended]


def of_compare(printed: str) -> Figures:
    """Read the table of `compare`: each layout's difference from one process, speed and drift."""
    rows = re.findall(
        r"^(\w+) +(\d+) +\S+ +(\S+) +\S+ +(?:yes|NO) +(\S+) +\S+ *(?:noise floor )?(\S*)$",
        printed, re.M,
    )  # fmt: skip
    if len(rows) < 2:
        raise ValueError("no layout beside one process")
    named = {f"{kind}, {ranks} rank(s)": values for kind, ranks, *values in rows}
    heads = ("largest difference", "images/s of a shared GPU", "drift in fp32 (one: its floor)")
    return {
        head: {name: float(values[place]) for name, values in named.items() if values[place]}
        for place, head in enumerate(heads)
    }


@dataclass(frozen=True)
class Part:
    """One part of the measurements.

    Attributes:
        commands: arguments of Python, run one after another; the last one prints the figures.
        limit: seconds, for all commands together.
        read: turns the last command's output into figures.
    """

    commands: Sequence[Sequence[str]]
    limit: int
    read: Callable[[str], Figures] = of_bench


_IMAGES = "data/gpu-images"
_MAKE_IMAGES = ["docs/gpu.py", "--photographs", _IMAGES]


def _bench(*arguments: str) -> list[str]:
    name, *rest = arguments
    return ["-m", "alexnet_dist", "bench", name, "paper/alexnet-2012", *rest, "--json"]


def _data(*arguments: str) -> list[str]:
    return ["-m", "alexnet_dist", "bench", "data", _IMAGES, *arguments, "--json"]


def _from_shards(pipeline: str) -> Part:
    prepare = ["-m", "alexnet_dist", "prepare", "folder", _IMAGES, "data/gpu"]
    own = ["data.path=data/gpu", f"model.classes={CLASSES}", f"data.pipeline={pipeline}"]
    bench = _bench("end-to-end", *own, "--repeats", "3")
    return Part([_MAKE_IMAGES, prepare, bench], 110)


def _pytest(*which: str, workers: int = 4) -> list[str]:
    return ["-m", "pytest", *which, "-v", "-n", f"{workers}"]


def _ranks(*which: str) -> list[str]:
    """Tests of several ranks; with few workers, as all of them share the GPU."""
    return _pytest("-m", "gpu", *which, workers=2)


# Test files that are parts of their own; the last two are drills too.
_FIRST, _LAYOUTS, _GRAPHS, _RUNS, _HOSTS = (
    f"tests/test_{name}.py"
    for name in ("gpu_first", "gpu_layouts", "gpu_graphs", "gpu_runs", "two_hosts")
)
_OTHERS = (f"--ignore={file}" for file in (_FIRST, _LAYOUTS, _GRAPHS, _RUNS))
_ONE_RANK = ["-m", "gpu and not drill", *_OTHERS, "--continue-on-collection-errors"]
_DEMO = ["prepare", "fashion_mnist", "configs/fashion-mnist-sample", "data/demo"]
PARTS = {
    "first": Part([_pytest(_FIRST)], 170, of_pytest),
    "tests": Part([_pytest(*_ONE_RANK)], 170, of_pytest),
    "step": Part([_bench("step", "--batch", "128", "1024")], 300),
    "maps": Part([_bench("maps")], 60),
    "kernels": Part([_bench("step", "--kernels", "--repeats", "20")], 60),
    "end-to-end": _from_shards("dali"),
    "end-to-end-torch": _from_shards("torch"),
    "end-to-end-resident": _from_shards("resident"),
    "data": Part([_MAKE_IMAGES, _data("--images", "10000", "--repeats", "3")], 200),
    "decoders": Part([_MAKE_IMAGES, _data("--differences", "--images", "1400")], 90),
    "tests-kernels": Part([_pytest("tests/test_gpu_kernels.py")], 120, of_pytest),
    "compare-shared": Part(
        [["-m", "alexnet_dist", *_DEMO], ["-m", "alexnet_dist", "compare", "demo", "--share-gpu"]],
        400,
        of_compare,
    ),
    "tests-layouts": Part([_ranks(_LAYOUTS)], 280, of_pytest),
    "tests-graphs": Part([_ranks(_GRAPHS)], 280, of_pytest),
    "tests-runs": Part([_ranks(_RUNS, _HOSTS)], 280, of_pytest),
    "layouts-shared": Part([_bench("layouts", "--share-gpu", "--repeats", "1")], 400),
}


def facts(commit: str | None) -> dict[str, Any]:
    """Return a row's metadata about machine and code; exit with a message if there is no GPU, or no
    commit is known."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: `alexnet-dist doctor` says why")
    if commit is None:
        try:
            commit = commit_of(*MEASURED)
        except (OSError, subprocess.CalledProcessError):
            sys.exit("git cannot say which commit this is: name it, COMMIT=NAME")
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
    answered = {
        (row["part"], row["card"], row["commit"]) for row in read_rows(rows) if "failed" not in row
    }
    for name, part in parts.items():
        if (name, about["card"], about["commit"]) in answered and about["commit"][-1] != "+":
            print(f"{name}: answered for {about['commit']} on this card")
            continue
        if part.limit > end - time.monotonic():
            print(f"{name}: left for the next time: it may take {part.limit} s")
            continue
        print(f"{name}: up to {part.limit} s", flush=True)
        row = {"part": name, **about, **_answer(name, part, logs)}
        append_row(rows, row)
        sound &= "failed" not in row
        print(f"{name}: {row['seconds']} s; {row.get('failed', 'done')}", flush=True)
        if "failed" in row:
            print(*_last_lines(logs / f"{name}.out", logs / f"{name}.err"), sep="\n", flush=True)
    return sound


def _last_lines(*logs: Path, most: int = 20) -> Iterator[str]:
    """Yield the last lines of each log, for a reader who may not have access to the files."""
    for log in logs:
        if lines := log.read_text(errors="replace").rstrip().splitlines():
            yield f"--- the end of {log.name}"
            yield from (line[:300] for line in lines[-most:])


def _answer(name: str, part: Part, logs: Path) -> dict[str, Any]:
    """Run a part, and return its own entries of its row."""
    logs.mkdir(parents=True, exist_ok=True)
    output, errors = logs / f"{name}.out", logs / f"{name}.err"
    begin, failed = time.monotonic(), ""
    row = {
        "command": " ".join(part.commands[-1])
        .removeprefix("-m ")
        .replace("alexnet_dist", "alexnet-dist"),
    }
    # Run the commands; at the limit interrupt one, so that it can still print what it has.
    for command in part.commands:
        grace = min(GRACE_S, part.limit / 3)
        left = begin + part.limit - grace - time.monotonic()
        with ledger.started([sys.executable, *command], output, errors) as process:
            failed = ledger.failed(process, left)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        if failed:
            break
    # Read the figures, and any reason why they do not count.
    printed, figures = output.read_text(errors="replace"), {}
    said = errors.read_text(errors="replace")
    if part.read is of_pytest and failed.startswith("not done"):
        failed += f", amid {', '.join(amid(printed)) or 'no test'}"
    if less := next((line for line in said.splitlines() if any(it in line for it in LESS)), ""):
        failed = failed or f"its figures are of less than they say: {less}"
    if command == part.commands[-1]:
        try:
            figures = _rounded(part.read(printed))
        except Exception as error:  # the other parts go on
            failed = failed or f"its output says nothing: {error!r}"
    if failed:
        last = (printed.strip() or said.strip())[-400:]
        row["failed"] = f"{failed}: {last}"
    row |= {"seconds": round(time.monotonic() - begin, 1), "figures": figures}
    return row


def _rounded(figures: Figures) -> Figures:
    return {
        group: {name: float(f"{value:.4g}") for name, value in found.items()}
        for group, found in figures.items() if found
    }  # fmt: skip


def photographs(folder: Path, count: int) -> None:
    """Make `count` JPEGs of 256 × 256, smooth colours with some noise, unless the folder exists."""
    import numpy as np
    from PIL import Image

    if folder.exists():
        return
    aside = folder.with_suffix(".partial")

    def draw(number: int) -> None:
        split = "val" if number % 10 == 0 else "train"
        home = aside / split / f"class{number // 10 % CLASSES}"
        home.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC))
        image = (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(home / f"{number}.jpg", quality=85)

    with ThreadPoolExecutor() as threads:
        list(threads.map(draw, range(count)))
    aside.rename(folder)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table for each part and card: the figures of the first and last commit."""
    if not rows:
        return "Nothing has been measured by `make gpu` yet.\n"
    kinds = dict.fromkeys((row["card"], row["part"]) for row in rows)
    return "\n".join(
        "".join(_table([row for row in rows if (row["card"], row["part"]) == kind]))
        for kind in kinds
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of one part and card."""
    last = rows[-1]
    yield f"**{last['part']}**, {last['card']}: `{last['command']}`\n"
    if "failed" in last:
        said = " ".join(last["failed"].split())[:200].replace("`", "'")
        yield f"\nIt failed at {last['commit']}, {last['date']}: `{said}`\n"
    told = {row["commit"]: row for row in rows if row["figures"]}
    if not told:
        return
    shown = [told[commit] for commit in dict.fromkeys([next(iter(told)), [*told][-1]])]
    heads = [
        f"{row['commit']}, {row['date']}, torch {row['torch']}, triton {row['triton']}, CUDA "
        f"{row['cuda']}, driver {row['driver']}"
        for row in shown
    ]
    yield f"\n| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n"
    for group, name in dict.fromkeys((g, n) for row in shown for g in row["figures"]
                                     for n in row["figures"][g]):  # fmt: skip
        values = [row["figures"].get(group, {}).get(name) for row in shown]
        cells = ["" if value is None else f"{value:,.10g}" for value in values]
        unit = "" if group in ("ratios", "more", "tests") else f", {group}"
        yield f"| {name.replace('|', '¦')}{unit} | {' | '.join(cells)} |\n"


def documented(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made anew from the rows."""
    return between(page, BEGIN, END, tables(rows))


def steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return our step times, as planning/measured.py reads them, from the last row of each card."""
    last = {
        row["card"]: row
        for row in rows
        if row["part"] == "step" and row["figures"] and "failed" not in row
    }
    found = []
    for card, row in last.items():
        first = int(row["command"].partition("--batch ")[2].split()[0])
        for name, seconds in row["figures"]["seconds a step"].items():
            if ours := re.fullmatch(r"ours, (\w+)(?:, batch (\d+))?", name):
                found.append({
                    "card": card, "batch": int(ours[2] or first), "precision": ours[1],
                    "execution": "graph", "ms": float(f"{1e3 * seconds:.4g}"),
                    "commit": row["commit"], "source": FROM_ROWS,
                })  # fmt: skip
    return found


def main() -> int:
    """As the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="*", help=f"one or more of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--commit", help="the commit that is measured (default: git's)")
    parser.add_argument(
        "--within", type=float, default=570, help="stop after this many seconds (default: 570)"
    )
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of docs/performance.md"
    )
    parser.add_argument(
        "--photographs", type=Path, help="only make the photographs, in this folder"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    if unknown := {*options.part} - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))}: a part is one of {', '.join(PARTS)}")
    if options.photographs:
        photographs(options.photographs, PHOTOGRAPHS)
    elif options.document:
        PAGE.write_text(documented(PAGE.read_text(), read_rows(ROWS)))
        kept = [step for step in read_rows(STEPS) if step["source"] != FROM_ROWS]
        all_steps = [*kept, *steps(read_rows(ROWS))]
        STEPS.write_text("".join(json.dumps(step) + "\n" for step in all_steps))
    else:
        parts = {name: PARTS[name] for name in options.part or PARTS}
        return 0 if measure(parts, facts(options.commit), options.within, ROWS, LOGS) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
