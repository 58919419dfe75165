"""The parts that docs/gpu.py measures: the commands of each, its time limit, and how figures are
read from what it prints."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CLASSES, PHOTOGRAPHS = 8, 4000
GRACE_S = 20  # kept back from a part's limit, for it to print results and a traceback
Figures = dict[str, dict[str, float]]  # by group


# --- what commands print


def of_bench(printed: str) -> Figures:
    """Read the output of `bench … --json`: the medians of its times; or a step's time, launches and
    time by group, and the costliest kernels."""
    found = json.loads(printed.splitlines()[-1])
    runs, more = found.get("runs", [{}]), found.get("ceilings", {})
    timed = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    if "kernels" in found:
        groups = found["groups"]
        timed |= {"elapsed": found["elapsed"]} | {name: us for name, (us, _) in groups.items()}
        more |= {f"{name}, launches a step": calls for name, (_, calls) in groups.items()}
        for name, us, *_ in found["kernels"][:20]:
            timed[name[:80]] = timed.get(name[:80], 0.0) + us  # long names may begin alike
    return {"ratios": found["ratios"], found["unit"]: timed, "more": more}


def of_pytest(printed: str) -> Figures:
    """Count tests by outcome, from pytest's output; also if it was killed before its summary."""
    ended = re.findall(r"^(?:tests/\S.* |\[gw\d+\].*)(PASSED|FAILED|SKIPPED|ERROR)", printed, re.M)
    if "PASSED" not in ended:
        raise ValueError("no test passed")
    return {"tests": {word.lower(): float(ended.count(word)) for word in sorted({*ended})}}


def tests_amid(printed: str) -> list[str]:
    """Return the tests that have started and not ended, from the output of pytest with workers."""
    begun = re.findall(r"^(tests/\S+::.*?) *$", printed, re.M)
    ended = re.findall(r"^\[gw\d+\] \[ *\d+%\] [A-Z]+ (tests/\S+::.*?) *$", printed, re.M)
    return [name for name in begun if name not in ended]


def failures(printed: str, most: int = 6000) -> str:
    """Return what pytest's summary says of each test that failed, in about `most` characters: of
    longer messages their beginning and end. Empty if it has no summary, or names no failure."""
    _, _, summary = printed.rpartition(" short test summary info ")
    parts = re.split(r"^(?=(?:FAILED|ERROR|SKIPPED) |=+ .* in .*s.* =+$)", summary, flags=re.M)
    told = [part.partition("Full diff:")[0].strip() for part in parts
            if part.startswith(("FAILED ", "ERROR "))]  # fmt: skip
    each = most // max(1, len(told))
    ends = [text if len(text) <= each else f"{text[: each // 3]} … {text[-2 * each // 3 :]}"
            for text in told]  # fmt: skip
    return "\n".join(ends)


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


# --- parts


@dataclass(frozen=True)
class Part:
    """One part of the measurements.

    Attributes:
        commands: arguments of Python, run one after another; the last one prints the figures.
        limit: seconds, for all commands together.
        read: turns the last command's output into figures.
        expected: seconds that they take on an H200; None if they may take all of the limit.
    """

    commands: Sequence[Sequence[str]]
    limit: int
    read: Callable[[str], Figures] = of_bench
    expected: int | None = None

    @property
    def least(self) -> int:
        """Seconds that must be left for the part to be started: until the limit, it is interrupted
        GRACE_S before which."""
        return self.limit if self.expected is None else min(self.limit, self.expected + GRACE_S)


_ALEXNET_DIST = ("-m", "alexnet_dist")
_IMAGES = "data/gpu-images"
_MAKE_IMAGES = ["docs/gpu.py", "--photographs", _IMAGES]


def _bench(name: str, *arguments: str) -> list[str]:
    """Return a benchmark of the paper's network."""
    return [*_ALEXNET_DIST, "bench", name, "paper/alexnet-2012", *arguments, "--json"]


def _bench_data(*arguments: str) -> list[str]:
    return [*_ALEXNET_DIST, "bench", "data", _IMAGES, *arguments, "--json"]


def _from_shards(pipeline: str, expected: int, *more: str) -> Part:
    """Return the part that trains from packed images by one pipeline."""
    prepare = [*_ALEXNET_DIST, "prepare", "folder", _IMAGES, "data/gpu"]
    own = ["data.path=data/gpu", f"model.classes={CLASSES}", f"data.pipeline={pipeline}"]
    bench = _bench("end-to-end", *own, "--repeats", "3", *more)
    return Part([_MAKE_IMAGES, prepare, bench], 260, expected=expected)


def _pytest(*which: str, workers: int = 8) -> list[str]:
    return ["-m", "pytest", *which, "-vv", "-n", f"{workers}"]  # -vv cuts no message


def _ranks(*which: str) -> list[str]:
    """Return tests of several ranks; with fewer workers, as each starts up to four."""
    return _pytest("-m", "gpu", *which, workers=4)


def _compared(*layouts: str) -> Part:
    """Return the part that compares these layouts, and one process, on a shared GPU."""
    demo = [*_ALEXNET_DIST, "prepare", "fashion_mnist", "configs/fashion-mnist-sample", "data/demo"]
    compare = [*_ALEXNET_DIST, "compare", "demo", "--share-gpu", "--layouts", ",".join(layouts)]
    return Part([demo, compare], 280, of_compare, expected=200)


# By file, as to collect all tests takes each worker long, and needs packages that these do not.
_FIRST, _ONE_RANK, _LAYOUTS, _GRAPHS, _RUNS, _HOSTS = (
    f"tests/test_{name}.py"
    for name in ("gpu_first", "gpu", "gpu_layouts", "gpu_graphs", "gpu_runs", "two_hosts")
)
_FUSED = "tests/test_fused_kernels.py"  # with or without a GPU; with one worker, as it starts many
_BEST = Part([_bench("step", "--best", "--batch", "128", "1024")], 240, expected=80)
# What has never been measured comes first. `expected` is an estimate for these.
PARTS = {
    "first": Part([_pytest(_FIRST)], 240, of_pytest, expected=130),
    "tests-fused": Part([_pytest(_FUSED, workers=1)], 200, of_pytest, expected=120),
    "sweep": Part([_bench("maps", "--sweep", "128", "1024", "--repeats", "3")], 330, expected=220),
    "data": Part(
        [_MAKE_IMAGES, _bench_data("--images", "10000", "--repeats", "2")], 330, expected=150
    ),
    "decoders": Part(
        [_MAKE_IMAGES, _bench_data("--differences", "--images", "1400")], 120, expected=50
    ),
    "end-to-end-torch": _from_shards("torch", 80),
    "end-to-end-resident": _from_shards("resident", 80),
    "tests-kernels": Part(
        [_pytest("tests/test_gpu_kernels.py", workers=1)], 200, of_pytest, expected=80
    ),
    "tests": Part([_pytest(_ONE_RANK)], 280, of_pytest, expected=200),
    "compare-shared": _compared("columns", "replicas"),
    "compare-shared-mixed": _compared("columns_x_replicas:4", "sharded_fc"),
    "compare-shared-zero": _compared("zero1", "zero2"),
    "tests-layouts": Part([_ranks(_LAYOUTS)], 280, of_pytest),
    "tests-graphs": Part([_ranks(_GRAPHS)], 280, of_pytest),
    "tests-runs": Part([_ranks(_RUNS, _HOSTS)], 280, of_pytest),
    "layouts-shared": Part([_bench("layouts", "--share-gpu", "--repeats", "1")], 400, expected=300),
    # What has been measured.
    "maps": Part([_bench("maps")], 90, expected=16),
    "kernels": Part([_bench("step", "--kernels", "--repeats", "20")], 90, expected=16),
    "step": Part([_bench("step", "--batch", "128", "1024")], 390, expected=190),
    "end-to-end": _from_shards("dali", 180, "--cold"),
    # To see quickly what a change gives, and how much runs differ; `step` has all of it.
    "step-best": _BEST,
    "step-best-2": _BEST,
    "step-best-3": _BEST,
}


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
