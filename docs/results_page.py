"""What is made from docs/results.jsonl: the tables of docs/results.md, and the README's."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ledger import ROOT, Page, Rows, table_head, table_line
from recipes import BY_NAME, PARTS, VARIANTS, merit, succeeded
from results_row import ERRORS

ROWS = ROOT / "docs/results.jsonl"
TITLES = {
    "tiny-imagenet": ("Tiny ImageNet", "Aim: 45 % right or more."),
    "fig1": ("Figure 1: CIFAR-10 with ReLU, tanh and logistic units",
             "Published: ReLU reaches 25 % training error in a sixth of tanh's epochs."),
    "cifar10": ("CIFAR-10", "Aim: 90 % right or more with ten views."),
    "imagenette": ("Imagenette",
                   "Aim: 86 % right or more with ten views, from random weights."),
    "lrn": ("Response normalisation in four layers, CIFAR-10",
            "Published: 87 % right without it, 89 % with it."),
    "fashion-mnist": ("Fashion-MNIST", "Aim: 93.5 % right or more with ten views."),
    "review": ("A third party's notebook, CIFAR-10", "Its 15 epochs, scored on all test images."),
    "ablations": ("Ablations, Tiny ImageNet", "12 epochs each; the paper's results are above."),
}  # fmt: skip


def tables(rows: Rows) -> str:
    """Return the page's section for each part."""
    done = [*succeeded(rows).values()]
    return "\n".join(line for part in PARTS for line in _section(part, done))


def _section(part: str, rows: Rows) -> Iterator[str]:
    """Yield the lines of a part's section."""
    title, aim = TITLES[part]
    own = [row for row in rows if row["part"] == part]
    yield f"\n### {title}\n\n`make results PARTS={part}`. {aim}\n"
    if not own:
        yield "Not yet run."
        return
    # A line for each network: the mean of its seeds, and what averaging their outputs gives.
    by_training = any(variant.by_training for variant in VARIANTS if variant.part == part)
    trained = [row for row in own if not row["candidate"]]
    if trained:
        yield table_head("", "n", *([f"epochs to {error} %" for error in ERRORS] if by_training else
                               ["one view, %", "top-5", "ten views, %", "top-5"]),
                    "minutes a run", "where")  # fmt: skip
    for variant in VARIANTS:
        found = [row for row in trained if row["variant"] == variant.name]
        average = [row for row in found if row["row"] == f"{variant.name}-average"]
        alone = [row for row in found if row not in average]
        for label, some in ((variant.told, alone), ("the average of them", average)):
            if some:
                cells = _epochs(some) if by_training else _scores(some)
                minutes = statistics.fmean(row["seconds"] for row in some) / 60
                yield table_line(label, len(alone), *cells, f"{minutes:.1f}", _where(some))
    yield from _choices(part, own)
    yield from _colours(trained)
    yield from _commands(trained)


def _spread(values: Sequence[float], rows: Rows, digits: int = 2) -> str:
    """Return the mean, the standard deviation over seeds, and, if some of the rows have no value,
    how many have one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return mean + spread + (f" ({len(values)} of {len(rows)})" if len(values) < len(rows) else "")


def _scores(rows: Rows) -> Iterator[str]:
    """Yield the cells of scores, %."""
    for views in ("1", "10"):
        for top in ("top1", "top5"):
            found = [row["scores"][views][top] for row in rows if views in row.get("scores", {})]
            yield _spread(found, rows) if found else "diverged"


def _epochs(rows: Rows) -> Iterator[str]:
    """Yield the cells of epochs to each training error."""
    for error in ERRORS:
        every = [row.get("epochs_to", {}).get(f"{error}") for row in rows]
        reached = [epochs for epochs in every if epochs is not None]
        yield _spread(reached, rows, digits=1) if reached else "never"


def _where(rows: Rows) -> str:
    """Say when and on what rows were measured."""
    return "; ".join(dict.fromkeys(f"{row['machine']}, {row['commit']}, {row['date']}"
                                   for row in rows))  # fmt: skip


def _choices(part: str, rows: Rows) -> Iterator[str]:
    """Yield what was chosen among the candidates."""
    for variant in (variant for variant in VARIANTS if variant.part == part):
        found = [row for row in rows if row["candidate"] and row["variant"] == variant.name]
        found.sort(key=lambda row: str(row["row"]))  # in the order of the candidates
        if not found:
            continue
        how = "by training error" if variant.by_training else "on a tenth held out of training"
        best = max(found, key=lambda row: merit(variant, row))
        whole = len(found) == len(variant.candidates)
        each = "; ".join(
            f"{row['candidate']}: {'diverged' if 'diverged' in row else in_words(row)}"
            + (" (taken)" if whole and row is best else "")
            for row in found
        )
        so_far = "" if whole else f"{len(found)} of {len(variant.candidates)} so far, "
        yield f"\nRecipes for {variant.told}, {so_far}judged {how} ({_where(found)}): {each}."


def in_words(figures: Mapping[str, Any]) -> str:
    """Return a row's figures in words."""
    if "diverged" in figures:
        return f"diverged: {figures['diverged']}"
    words = [f"{score['top1']:.2f} % with {'one view' if views == '1' else f'{views} views'}"
             for views, score in figures["scores"].items()]  # fmt: skip
    if "epochs_to" in figures:
        reached = figures["epochs_to"]["25"]
        words.append(
            f"25 % training error after {reached} epochs"
            if reached
            else f"{figures['training_error']:.1f} % training error at the end"
        )
    return ", ".join(words)


def _colours(rows: Rows) -> Iterator[str]:
    """Yield the colour of each column's conv1 kernels, and some of these kernels."""
    found = [row for row in rows if two_columns(row)]
    several = len({row["variant"] for row in found}) > 1  # networks
    if found:
        yield "\nColour's share of the energy of conv1's kernels (of noise, it is 2/3):\n"
        yield table_head(
            "network, seed" if several else "seed",
            "by epoch: first column, second", "kernels, a column above the other",
        )  # fmt: skip
    for row in found:
        variant = BY_NAME[row["variant"]]
        shares = "; ".join(f"{epoch:g}: {one:.2f}, {two:.2f}" for epoch, one, two in row["colour"])
        picture = f"images/results-{row['row']}-kernels.png"
        shown = row["seed"] == 0 or variant.average
        kernels = f"![kernels of seed {row['seed']}]({picture})" if shown else ""
        whose = f"{variant.told}, {row['seed']}" if several else row["seed"]
        yield table_line(whose, shares, kernels)


def two_columns(row: Mapping[str, Any]) -> bool:
    """Whether a row has the colour of the kernels of two columns."""
    return bool(row.get("colour")) and len(row["colour"][0]) == 3


def _commands(rows: Rows) -> Iterator[str]:
    """Yield the command of each network's first seed."""
    first = {row["variant"]: row for row in reversed(rows) if row["command"].split()[1] == "train"}
    if first:
        yield "\n```bash"
        for variant in (variant for variant in VARIANTS if variant.name in first):
            yield first[variant.name]["command"]
        yield "```"


def front(rows: Rows) -> str:
    """Return the README's table: the paper's network on each data set."""
    lines = [table_head("the paper's network, right with ten views, on", "%", "n", "where")]
    for variant in (variant for variant in VARIANTS if variant.name == variant.part):
        alone = [row for row in succeeded(rows).values() if row["variant"] == variant.name
                 and not row["candidate"] and "10" in row.get("scores", {})
                 and row["row"] != f"{variant.name}-average"]  # fmt: skip
        title, _ = TITLES[variant.part]
        if alone:
            score = _spread([row["scores"]["10"]["top1"] for row in alone], alone)
            lines.append(table_line(title, score, len(alone), _where(alone)))
    page = "docs/results.md#trainings-on-what-can-be-had"
    if len(lines) == 1:
        return (
            f"No network of `make results` has been scored yet: that needs a GPU "
            f"([what there is so far]({page}))."
        )
    return "\n".join([*lines, "", f"[Every row]({page})."])


PAGES = (Page(ROOT / "docs/results.md", ROWS, tables), Page(ROOT / "README.md", ROWS, front))
