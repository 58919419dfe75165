"""docs/results.py, which makes docs/results.md, with small data sets and simulated rows."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import results
import results_page
from ledger import append_row, read_rows
from recipes import BY_NAME, PARTS, chosen, planned
from results_row import Bench, sources, trained

from alexnet_dist.config.load import load_config
from alexnet_dist.reporting import figures

CHOICES = {"tiny-imagenet": (41.0, 43.5, 42.0), "cifar10": (80.0, 70.0, 60.0)}


@pytest.fixture
def bench(packed: Path, tmp_path: Path) -> Bench:
    """Small data sets that are all the same."""
    for name in ("tiny-imagenet", "cifar10", "imagenette", "fashion-mnist"):
        (tmp_path / name).symlink_to(packed)
    return Bench.of(tmp_path, commit="abc123def")


def row(of: Any, **more: Any) -> dict[str, Any]:
    """A row of the ledger as a training leaves it."""
    scores = {views: {"top1": 42.0, "top5": 60.0, "samples": 9} for views in ("1", "10")}
    about = {"row": of.name, "part": of.variant.part, "variant": of.variant.name, "seed": of.seed,
             "candidate": of.candidate, "machine": "A card", "commit": "abc", "seconds": 90.0,
             "command": "alexnet-dist train x", "date": "2026-11-26", "training_error": 30.0,
             "colour": [[5, 0.6, 0.4]], "scores": scores}  # fmt: skip
    if of.variant.by_training:
        about["epochs_to"] = {"50": 1.0, "25": 5.0, "15": None}
        about["training"] = [[1, 60.0], [2, 30.0]]
    return about | more


def chosen_of(part: str) -> dict[str, Any]:
    """Rows by which a part's recipe is chosen."""
    own = [one for one in planned([part]) if one.candidate]
    return {
        one.name: row(one, scores={"1": {"top1": top1, "top5": 99, "samples": 9}})
        for one, top1 in zip(own, CHOICES[part], strict=True)
    }


def test_every_row_is_a_training_that_can_be() -> None:
    every = planned(PARTS)
    assert len({one.name for one in every}) == len(every)
    done = {one.name: row(one) for one in every}
    real = Bench.of(None)
    for one in (one for one in every if one.seed == 0 and not one.of):
        config = load_config(sources(one, done, real))
        held = bool(one.candidate) and not one.variant.by_training
        assert (config.data.hold_out > 0) == (config.data.eval_split == "held_out") == held
        assert config.layout.kind == "one"
        assert config.data.path.startswith("data/")
        small = sources(one, done, Bench.of(Path("/small")))
        assert small[-1] == f"data.path=/small/{Path(config.data.path).name}"
    assert set(results_page.TITLES) == set(PARTS)
    order = [one.name for one in every]
    assert order[:4] == ["tiny-imagenet-choose-0", "tiny-imagenet-choose-1",
                         "tiny-imagenet-choose-2", "tiny-imagenet-0"]  # fmt: skip
    assert order[-1] == "tiny-imagenet-average"
    assert order.index("ablation-none-0") < order.index("tiny-imagenet-1")


def test_a_recipe_is_chosen_by_what_is_held_out_and_seeds_wait_for_it(bench: Bench) -> None:
    real, tiny = Bench.of(None), BY_NAME["tiny-imagenet"]
    done = chosen_of("tiny-imagenet")
    final = next(one for one in planned(["ablations"]) if one.name == "ablation-no-lrn-1")
    assert sources(final, {}, real) is None
    given = sources(final, done, real)
    assert given[-4:] == [*tiny.candidates["He's, rate 0.01"], "train.epochs=12", "seed=1"]
    del done["tiny-imagenet-choose-2"]
    assert sources(final, done, real) is None
    tuned = next(one for one in planned(["imagenette"]) if one.variant.begins)
    done = chosen_of("tiny-imagenet")
    assert sources(tuned, done, real) is None
    done["imagenette-pretrain-0"] = {}
    given = sources(tuned, done, real)
    assert "train.init_from=runs/results/imagenette-pretrain-0" in given
    assert results._obstacle(tuned, done, bench).startswith("imagenette-pretrain-0's network is mi")


def test_figure_1s_rate_is_the_one_that_comes_first_to_25_percent() -> None:
    relu = BY_NAME["fig1-relu"]
    own = [one for one in planned(["fig1"]) if one.variant is relu and one.candidate]
    epochs = [None, 8.0, 6.2]
    done = {
        one.name: row(one, epochs_to={"50": 1.0, "25": at, "15": None})
        for one, at in zip(own, epochs, strict=False)
    }
    for one in own[3:]:
        done[one.name] = row(one, diverged="a loss of nan")
    assert chosen(relu, done) == ("schedule.rate=0.01",)
    for one in own[1:3]:  # none of them: the lowest training error
        done[one.name] = row(one, epochs_to={"25": None}, training_error=40.0)
    done[own[0].name]["training_error"] = 39.0
    assert chosen(relu, done) == ("schedule.rate=0.001",)


def test_a_row_is_trained_and_scored(bench: Bench) -> None:
    (bench.runs / "logs").mkdir(parents=True)
    choose, final = "cifar10-four-layers-choose-0", "cifar10-four-layers-no-lrn-0"
    rows = {one.name: one for one in planned(["lrn"], small=True)}
    found = trained(rows[choose], sources(rows[choose], {}, bench), bench)
    assert found["split"] == "held_out"
    assert [*found["scores"]] == ["1"]
    done = {name: row(one) for name, one in rows.items() if one.candidate}
    found = trained(rows[final], sources(rows[final], done, bench), bench)
    assert found["split"] == "test"
    assert found["scores"]["1"]["samples"] == found["scores"]["10"]["samples"] == 23
    assert found["steps"] == 3
    assert len(found["evaluated"]) == 3
    assert found["training"] == [[1, found["training_error"]]]
    json.dumps(found, allow_nan=False)
    saved = json.loads((bench.runs / final / "config.json").read_text())
    assert saved["model"]["conv"] == [8, 8, 8, 4]


def says(figures: Mapping[str, Any], then: str = "") -> str:
    return f"{then}\nprint('loading', flush=True)\nprint({json.dumps(figures)!r}, flush=True)"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Rows by name as Python code, in the place of trainings."""

    def play(codes: Mapping[str, str]) -> None:
        def started(one: Any, cores: Sequence[int], bench: Bench) -> Any:
            out, err = (bench.log(one, kind) for kind in ("out", "err"))
            out.parent.mkdir(parents=True, exist_ok=True)
            code = codes.get(one.name, says({"scores": {}, "seconds": 1.0, "steps": 1}))
            return processes.started([sys.executable, "-c", code], out, err, 20)

        monkeypatch.setattr(results, "_started", started)
        monkeypatch.setattr(results, "_machine", lambda variant: "A card")
        monkeypatch.setattr(results, "_draw_fig1", lambda bench: None)

    return play


def test_rows_are_passed_over_once_done_and_tried_again_where_they_failed(
    bench: Bench, played: Callable[[Mapping[str, str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    score = {"scores": {"1": {"top1": 50.0, "top5": 90.0, "samples": 9}}, "seconds": 2.0}
    choices = {f"cifar10-choose-{n}": says(score) for n in range(3)}
    kept = bench.runs / "cifar10-0/checkpoints/step-1"
    kept.mkdir(parents=True)
    played({**choices, "cifar10-choose-1": "raise SystemExit('no such key')"})
    assert not results.measure(["cifar10"], bench)
    said = capsys.readouterr().out
    assert "cifar10-choose-1: failed: exit 1: no such key" in said
    assert "cifar10-0: left: the run it is chosen by" in said
    assert kept.exists()
    played(choices)
    assert results.measure(["cifar10"], bench)
    rows = read_rows(bench.rows)
    names = [one["row"] for one in rows if "failed" not in one]
    assert names == ["cifar10-choose-0", "cifar10-choose-2", "cifar10-choose-1", "cifar10-0"]
    assert not kept.exists()  # it is scored, and no row wants it
    assert rows[-1]["command"].startswith("alexnet-dist train results/cifar10 seed=0")
    assert (rows[-1]["machine"], rows[-1]["commit"]) == ("A card", "abc123def")
    before = bench.rows.read_text()
    assert results.measure(["cifar10"], bench)
    assert bench.rows.read_text() == before


def test_time_that_is_short_leaves_rows_and_stops_gently(
    bench: Bench, played: Callable[[Mapping[str, str]], None],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    short = Bench.of(bench.small, within=results.START_S - 1)
    assert results.measure(["cifar10"], short)
    assert "cifar10-choose-0: left: it may take 45 s" in capsys.readouterr().out
    assert not bench.rows.exists()
    stops = "import signal, sys, time\n"
    stops += f"signal.signal({signal.SIGTERM.value}, lambda *_: (open('{bench.small}/saved', 'w'), "
    stops += "sys.exit(143)))\ntime.sleep(99)"
    played({f"cifar10-choose-{n}": stops for n in range(3)})
    monkeypatch.setattr(results, "START_S", 0.0)
    monkeypatch.setattr(results, "GRACE_S", 1)
    begin = time.monotonic()
    assert results.measure(["cifar10"], Bench.of(bench.small, within=4))
    assert time.monotonic() - begin < 15
    assert (bench.small / "saved").exists()
    assert "cifar10-choose-0: stopped; run the same command to continue" in capsys.readouterr().out
    assert not bench.rows.exists()


def test_rows_of_small_networks_run_together_and_data_that_is_missing_is_said(
    bench: Bench, played: Callable[[Mapping[str, str]], None],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    four = [[number] for number in range(4)]
    monkeypatch.setattr(results, "_shares_of_cores", lambda variant: four[: variant.together])
    waits = "import pathlib, time\n"
    waits += f"here = pathlib.Path('{bench.small}')\n(here / f'at-{{time.monotonic()}}').touch()\n"
    waits += "while len(list(here.glob('at-*'))) < 4: time.sleep(0.05)"
    found = {"epochs_to": {"25": 3.0}, "training_error": 20.0, "scores": {}, "seconds": 1.0}
    names = [one.name for one in planned(["fig1"]) if one.candidate]
    choices = {n: says(found, waits if n in names[:4] else "") for n in names}
    score = {"scores": {"1": {"top1": 50.0, "top5": 90.0, "samples": 9}}, "seconds": 2.0}
    played(choices | {f"tiny-imagenet-choose-{n}": says(score) for n in range(3)})
    (bench.small / "imagenette").unlink()
    assert results.measure(["fig1", "imagenette"], bench)
    done = {one["row"] for one in read_rows(bench.rows)}
    assert {*names, "fig1-relu-0", "fig1-tanh-0", "fig1-sigmoid-0"} <= done
    assert "imagenette-choose-0: left: " in capsys.readouterr().out


def test_rows_that_run_together_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, each in (
        ({5}, [[5]]),
        ({0, 1}, [[0], [1]]),
        ({*range(6)}, [[0], [1, 2], [3], [4, 5]]),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: cores)
        assert results._shares_of_cores(BY_NAME["fig1-relu"]) == each
        assert results._shares_of_cores(BY_NAME["cifar10"]) == [sorted(cores)]


def test_the_tables_show_means_choices_colour_and_commands() -> None:
    every = planned(["tiny-imagenet"])
    rows = [*chosen_of("tiny-imagenet").values()]
    for one in (one for one in every if not one.candidate):
        score = {"top1": 44.0 + one.seed, "top5": 70.0, "samples": 9}
        rows.append(row(one, scores={"1": score, "10": score}))
    rows[-1]["command"] = "alexnet-dist evaluate a b"
    told, front = results_page.tables(rows), results_page.front(rows)
    assert "| the paper's network | 5 | 46.00 ± 1.58 | 70.00 ± 0.00 | 46.00 ± 1.58 |" in told
    assert "| the average of them | 5 | 48.00 |" in told
    assert "He's, rate 0.01: 43.50 % with one view (taken)" in told
    assert "![kernels of seed 4](images/results-tiny-imagenet-4-kernels.png)" in told
    assert "\nalexnet-dist train x\n" in told
    assert told.count("Not yet run.") == len(PARTS) - 1
    assert "| Tiny ImageNet | 46.00 ± 1.58 | 5 | A card, abc, 2026-11-26 |" in front
    assert "CIFAR-10" not in front
    assert "that needs a GPU" in results_page.front([])
    fig1 = [one for one in planned(["fig1"]) if one.name == "fig1-relu-0"]
    once = row(fig1[0])
    assert "| ReLU | 1 | 1.0 | 5.0 | never | 1.5 |" in results_page.tables([once])
    again = once | {"row": "fig1-relu-1", "epochs_to": {"50": 1.0, "25": None, "15": None}}
    assert "| ReLU | 2 | 1.0 ± 0.0 | 5.0 (1 of 2) | never |" in results_page.tables([once, again])
    diverged = {key: it for key, it in rows[4].items() if key != "scores"} | {"diverged": "nan"}
    told = results_page.tables([rows[3], diverged])
    assert "| the paper's network | 2 | 44.00 (1 of 2) | 70.00 (1 of 2) |" in told
    kept, left_out = (row(one) for one in planned(["ablations"]) if one.name in
                      ("ablation-none-0", "ablation-no-lrn-0"))  # fmt: skip
    told = results_page.tables([kept, left_out])
    assert "\n| the paper's network, 0 | 5: 0.60, 0.40 |" in told
    assert "\n| no normalisation, 0 | 5: 0.60, 0.40 |" in told
    told = results_page.tables(rows[:2])
    assert "Recipes for the paper's network, 2 of 3 so far, judged on" in told


def test_figure_1_is_drawn_of_the_ledgers_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(one) for one in planned(["fig1"]) if one.candidate or one.seed < 2]
    rows[-1]["diverged"] = "loss is nan"
    for one in rows:
        append_row(bench.rows, one)
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "draw_fig1", lambda curves, path: drawn.update(curves))
    results._draw_fig1(bench)
    assert drawn["ReLU"] == [[(0.5, 0.6), (1.5, 0.3)]] * 2
    assert [len(curves) for curves in drawn.values()] == [2, 2, 2, 2, 1]


def test_the_pages_show_what_is_in_the_ledger() -> None:
    rows = read_rows(results_page.ROWS)
    for page in results_page.PAGES:
        text = page.path.read_text()
        assert text == page.documented(text, rows), "make docs"
    for one in rows:
        names = [other.name for other in planned(PARTS)]
        assert one["row"] in names
