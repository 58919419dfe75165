"""Figures and reports made from runs."""

import base64
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import alexnet_dist, as_overrides
from made import image_folder

from alexnet_dist.config.load import configs_folder, load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import ConfigError, RunFolderError
from alexnet_dist.evaluation.results import Score
from alexnet_dist.plotting import chroma, confusion_picture, distinct, kernel_picture
from alexnet_dist.reporting import figures
from alexnet_dist.reporting.compare_runs import compare_runs
from alexnet_dist.reporting.report import PUBLISHED, _classes, _groups, report
from alexnet_dist.reporting.runs import Scored, _best_and_last, read_run_folder
from alexnet_dist.training.loop import train
from alexnet_dist.training.metrics_file import TIMES, read_metrics
from alexnet_dist.training.state import Progress


def test_chroma_is_0_of_grey_2_thirds_of_noise_and_1_of_colour() -> None:
    grey = torch.randn(8, 1, 5, 5).expand(-1, 3, -1, -1)
    opponent = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None] * torch.randn(8, 1, 5, 5)
    assert chroma(torch.cat([grey, opponent]), 2) == pytest.approx([0, 1], abs=1e-6)
    assert chroma(torch.randn(500, 3, 11, 11), 1) == pytest.approx([2 / 3], abs=0.01)


def test_the_best_of_equal_errors_is_that_of_training() -> None:
    scores = {
        step: Score(4, right, 4, loss)
        for step, (right, loss) in enumerate([(2, 0.1), (3, 0.9), (3, 0.5), (3, 0.5), (3, 0.7)], 1)
    }
    progress, config = Progress(), load_config(["demo"])
    schedule = Schedule.of(config, 8)
    for progress.step, score in scores.items():
        progress.observe(score, config, schedule)
    assert _best_and_last(scores) == {progress.best_step: "best", 5: "last"}


def test_a_report_of_nothing_is_refused_and_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folders, where in (([], ""), ([tmp_path / "runs"], " in runs")):
        with pytest.raises(ConfigError, match=f"no evaluated run{where}: name run folders"):
            report(folders, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_of_a_newer_version_is_left_out_and_the_reason_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs/newer"
    run.mkdir(parents=True)
    (tmp_path / "runs/logs").mkdir()
    newer = flat(load_config(["demo"])) | {"model.attention": True}
    (run / "config.json").write_text(json.dumps(newer))
    why = r"runs/newer cannot be read: .*unknown key model\.attention.* \(if a newer alexnet-dist"
    with pytest.raises(ConfigError, match="no evaluated run in newer, logs: "):
        report([run, run.with_name("logs")], tmp_path / "report.html")
    (said,) = caplog.messages
    assert re.search(why, said)
    with pytest.raises(RunFolderError, match=why):
        compare_runs([run, run], tmp_path / "compare.png")


def test_small_kernels_are_drawn_as_large_as_the_papers() -> None:
    sides = [kernel_picture(torch.randn(6, 3, k, k), 1).shape[0] for k in (11, 5, 3)]
    assert sides[0] == 3 * (33 + 2)
    assert all(100 <= side <= 120 for side in sides)


def test_nearest_rows_are_those_of_all_distances() -> None:
    rows = torch.randn(40, 6)
    rows[33] = rows[2]  # a tie across parts
    queries = torch.cat([rows[2:3] + 0.01, torch.randn(3, 6)])
    places, distances = figures.nearest(queries, rows.split(7), 6)
    every = (queries[:, None].double() - rows[None].double()).norm(dim=2)
    expected = every.argsort(dim=1, stable=True)[:, :6]
    assert places[0, :2].tolist() == [2, 33]
    assert places.tolist() == expected.tolist()
    assert torch.allclose(distances.double(), every.gather(1, expected), atol=1e-5)


def test_the_report_is_one_page_of_all_runs_and_says_what_was_not_run(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    one = ["layout.kind=one", "train.precision=fp32", "train.epochs=1", "log.every_steps=2"]
    runs = {
        "tiny-alexnet-2012-0": ["seed=0"],
        "tiny-alexnet-2012-1": ["seed=1"],
        "tiny-no-lrn-0": ["model.lrn.layers=[]"],
        "tiny-fig1-relu": [],
    }
    folders = []
    for name, overrides in runs.items():
        config = tiny(*one, f"name={name}", *overrides)
        assert train(config).exit == 0
        folders.append(config.folder)
    points = [p for p in read_metrics(folders[0]) if p["kind"] == "eval"]
    assert 0 < points[-1]["chroma_1"] < 1
    _, colour = figures.draw(folders[0])
    assert colour == [points[-1]["chroma_1"], points[-1]["chroma_2"]]
    ten_views = alexnet_dist("evaluate", str(folders[0]), "--views", "10", "--json")
    assert ten_views.returncode == 0, ten_views.stderr
    ten = {"of": ["runs/x/checkpoints/step-00000008"], "samples": 24, "correct1": 12,
           "correct5": 20, "loss": 2.0}  # fmt: skip
    (folders[1] / "evaluation-views-10.json").write_text(json.dumps(ten))  # before they were kept

    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    (folders[0] / "figures" / "fig4-theirs.png").symlink_to(secret)  # in a stranger's run folder
    result = alexnet_dist("figures", str(folders[0]), "--fig4")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^column 2: 0\.\d{3}$", result.stdout, re.M)
    for name in ("kernels", "curves", "fig4-left", "fig4-right"):
        picture = folders[0] / "figures" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")

    hostile = tmp_path / "runs" / "<b>hostile"
    hostile.mkdir()
    (hostile / "config.json").write_text("{")
    damaged = tmp_path / "runs" / "damaged"
    shutil.copytree(folders[1], damaged)
    (damaged / "evaluation-views-10.json").write_text('{"top1": 0.5}')
    several = tmp_path / "runs" / "tiny-ensemble.json"
    averaged = ["evaluate", str(folders[0]), str(folders[1]), "--views", "10", "--json"]
    scored = alexnet_dist(*averaged)
    several.write_text(scored.stdout)
    of_train = tmp_path / "runs" / "of-train.json"
    of_train.write_text(alexnet_dist(*averaged, "data.eval_split=train").stdout)
    out = tmp_path / "report.html"
    said = report([*folders, hostile, damaged, several, of_train, out], out)
    assert said.endswith("5 runs; no evaluated run in 1: <b>hostile")
    assert not (folders[1] / "figures").exists()  # a run may be another user's
    mine = tmp_path / "mine.html"
    mine.write_text("<title>Report</title> of my own")
    result = alexnet_dist("report", str(folders[0]), "--out", str(mine))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "mine.html: there is such a file, and it is no report" in result.stderr
    assert mine.read_text() == "<title>Report</title> of my own"
    result = alexnet_dist("report", *map(str, folders), str(tmp_path / "typo"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "typo: there is no such run folder" in result.stderr
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=.(?!data:)", page), "nothing lies outside the page"
    assert page.count("data:image/png;base64,") >= 4 * 2 + 2 + 2
    assert base64.b64encode(b"hunter2").decode() not in page
    assert "tiny-alexnet-2012 on" in page
    assert re.search(r"tiny-alexnet-2012 on \S+ [0-9.]+ ± [0-9.]+ \(1 view, n = 2\) ", page)
    assert "50.00 [" in page
    assert page.index("<h2>tiny-fig1-relu</h2>") < page.index("<h2>Published</h2>")
    first = page[page.index("<h2>tiny-alexnet-2012-0</h2>") :].partition("<h2>")[2]
    first = first.partition("<h2>")[0]
    assert "shipped config nearest to it is" in first
    assert "<td>model.fc</td><td>[36, 28]</td>" in first
    assert "Classes: best and last, test, 10 views" in first
    assert first.count('alt="confusion"') == 1
    assert re.search(r"<td>Ankle boot</td><td>\d+\.\d</td><td>\d+ of \d+</td>", first)
    assert f"evaluate {folders[1]} --views 10" in page  # its classes are not known
    assert "recipe complete (paper/no-exchange), not among these runs: needs ILSVRC-2012" in page
    error = 100 * (1 - json.loads(scored.stdout)["top1"])
    row = f"<td>tiny-ensemble</td><td>2</td><td>{error:.2f}</td><td>[0-9.]+</td>"
    (alone,) = re.findall(f"{row}<td>([^<]+)</td>", page)
    of_ten = [100 * (1 - json.loads(ten_views.stdout)["top1"]), 50]
    assert alone.startswith(f"{sum(of_ten) / 2:.2f} ± "), "their own, by as many views"
    report([folders[0], several], out)
    assert re.search(rf"{row}<td>–</td>", out.read_text()), "not the mean of one of two"
    assert re.search(r"<td>of-train</td><td>2</td>.*?<td>–</td></tr>", page), "of another split"
    assert "<td>tiny-fig1-relu</td><td>1</td><td>never</td>" in page
    assert "epochs to 25 % training error" in page


def test_runs_are_averaged_if_they_differ_in_their_seed_alone(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """Not because of a number in their name; and a preset's own number is no seed."""
    folders = []
    for name, more in {
        "alexnet-2012": [], "alexnet-2012-1": ["seed=1"], "batch-4": ["train.batch=4"],
        "batch-8": [], "batch-8-1": ["seed=1"], "two/alexnet-2012-1": ["seed=2"],
    }.items():  # fmt: skip
        folder = tmp_path / name
        config = tiny(f"name={folder.name}", f"output_dir={folder.parent}", *more)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(flat(config)))
        point = {"kind": "eval", "step": 8, "epoch": 1, "loss": 1.0, "top1": 0.5, "top5": 0.75,
                 "samples": 24, "correct1": 12, "correct5": 18}  # fmt: skip
        (folder / "metrics.jsonl").write_text(json.dumps(point) + "\n")
        folders.append(folder)
    said = report(folders, tmp_path / "report.html")
    assert said.endswith("report.html: 6 runs")
    published = (tmp_path / "report.html").read_text().partition("<h2>Published</h2>")[2]
    assert re.search(r"<td>alexnet-2012 on \S+ 50\.00 ± 0\.00 \(1 view, n = 3\)", published)
    runs = [run for folder in folders if (run := read_run_folder(folder))]
    groups = {name: len(alike) for name, alike in _groups(runs).items()}
    assert groups == {"alexnet-2012": 3, f"{tmp_path}/batch-4": 1, f"{tmp_path}/batch-8": 1,
                      "batch-8": 1}  # fmt: skip


def test_a_run_with_an_odd_name_or_impossible_numbers_hides_no_other(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """matplotlib took what is between two $ for a formula; no calendar has such a year."""
    train_point = {"kind": "train", "step": 1, "epoch": None, "loss": 1.0, "top1": 0.5, "top5": 1.0}
    point = {"kind": "eval", "step": 8, "epoch": 1, "loss": 1.0, "top1": 0.5, "top5": 0.75,
             "samples": 24, "correct1": 12, "correct5": 18}  # fmt: skip
    folders = [tmp_path / "odd$_$", tmp_path / "tiny-fig1-relu", tmp_path / "wrong"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(flat(tiny())))
        made = point | ({"correct1": -1} if folder.name == "wrong" else {})
        (folder / "metrics.jsonl").write_text(f"{json.dumps(train_point)}\n{json.dumps(made)}\n")
    (folders[0] / "run.json").write_text(json.dumps({"state": "finished", "updated": 1e18}))
    (folders[0] / "evaluations").mkdir()
    average = point | {"views": 1, "date": "", "split": "test", "of": [1, 2], "changed": {},
                       "machine": {}, "classes": [], "confusion": []}  # fmt: skip
    (folders[0] / "evaluations" / "average.json").write_text(json.dumps(average))
    said = report(folders, tmp_path / "report.html")
    assert said.endswith("report.html: 2 runs; no evaluated run in 1: wrong")
    page = (tmp_path / "report.html").read_text()
    assert "<td>?, in training on ?</td>" in page
    assert "<h2>Averages of networks</h2>" in page
    compare_runs(folders[:2], tmp_path / "both.png")
    figures.draw_ablations({"odd$_$": [0.5]}, tmp_path / "ablations.png")
    figures._curves(folders[0], 10, tmp_path / "curves.png")
    figures.draw_fig1({"odd$_$": [[(1, 0.5)]]}, tmp_path / "fig1.png")


def test_mistakes_among_many_classes_are_listed_without_a_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the square of the classes in cells: of 100,000, which a small file can name, 80 GB."""
    monkeypatch.setattr("alexnet_dist.reporting.report.MOST_CLASSES", 2)
    monkeypatch.setattr("alexnet_dist.reporting.report.confusion_of", None)
    right = {"ant": 4, "bee": 3, "cat": 2}
    kept = {
        "classes": [{"name": name, "samples": 4, "right": n} for name, n in right.items()],
        "confusion": [[0, 0, 4], [1, 0, 1], [1, 1, 3], [2, 0, 2], [2, 2, 2]],
    }
    one = Scored("best", 8, "test", "data", 1, Score(12, 9, 12, 1.0), "", {}, kept)
    page = "".join(_classes(one, kept))
    cat, bee = (f"<tr><td>{name}</td><td>ant</td><td>{n}</td></tr>" for name, n in
                (("cat", 2), ("bee", 1)))  # fmt: skip
    assert cat + bee in page
    assert "<tr><td>cat</td><td>50.0</td><td>2 of 4</td></tr><tr><td>bee</td>" in page


def test_curves_of_a_run_without_evaluations_name_none(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("layout.kind=one", "train.epochs=1", "log.every_steps=1", "data.eval_split=none")
    assert train(config).exit == 0
    named: list[str] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.legend",
        lambda axes, *_, **__: named.extend(axes.get_legend_handles_labels()[1]),
    )
    figures.draw(config.folder)
    assert named == ["train", "train, top-1", "train, top-5"]


def test_epochs_are_counted_to_where_the_epochs_means_cross_the_error() -> None:
    halves = [(0.5, 0.9), (1, 0.7), (1.5, 0.2), (2, 0.4), (2.5, 0.1), (3, 0.3)]
    falling = [(1.0, 0.8), (2.0, 0.4), (3.0, 0.2)]
    never = [(1.0, 0.9), (2.0, 0.8), (3.0, 0.7)]
    assert figures.by_epoch(halves) == [(0.5, 0.8), (1.5, pytest.approx(0.3)), (2.5, 0.2)]
    assert figures.epochs_to(0.25, [halves]) == pytest.approx(2), "not 1.5, by one point"
    assert figures.epochs_to(0.3, [falling]) == pytest.approx(2)
    assert figures.epochs_to(0.4, [falling]) == pytest.approx(1.5)
    assert figures.epochs_to(0.25, [falling, halves, never]) == pytest.approx(2.25)
    assert figures.epochs_to(0.25, [falling, never, never]) == math.inf
    assert figures.epochs_to(0.25, [[]]) == math.inf
    assert figures.epochs_to(0.6, [[(0.1, 0.9), (0.2, 0.5), (1, 0.2)]]) == 0.2, "in the first epoch"


def test_published_rows_have_presets() -> None:
    stems = {path.stem for path in (configs_folder() / "paper").glob("*.yaml")}
    assert {row.preset for row in PUBLISHED} - {""} <= stems


def test_names_beside_a_confusion_fit_and_tell_classes_apart() -> None:
    names = ["crane, bird", "crane, machine", "tench, Tinca tinca", "x" * 300, "caf\udce9\n"]
    assert distinct(names)[:3] == ["crane, bird", "crane, machine", "tench"]
    picture = confusion_picture(torch.eye(5, dtype=torch.int64), names)
    height, width, _ = picture.shape
    assert width == height <= 5 * 24 + 150 + 8
    margin = width - 5 * 24
    rows = [(picture[24 * row : 24 * row + 24, :margin] < 128).any(2).any(0) for row in range(5)]
    for row in rows:
        assert row.any()
        assert not row[0]  # nothing is cut off
    below = picture[5 * 24 :, margin:]
    assert (below[:, :24] < 128).any()
    assert confusion_picture(torch.eye(51, dtype=torch.int64), ["c"] * 51).shape == (561, 561, 3)


def test_names_are_drawn_beyond_ascii() -> None:
    once = torch.eye(2, dtype=torch.int64)
    drawn = [confusion_picture(once, [name, "b"]).tobytes() for name in ("ä", "ö", "é", "я")]
    assert len(set(drawn)) == 4, "not the same box for each"


def test_runs_side_by_side_show_what_differs(tiny: Callable[..., Config], tmp_path: Path) -> None:
    one = ["layout.kind=one", "train.precision=fp32", "train.epochs=1", "log.every_steps=2"]
    folders = []
    for name, more in {"plain": [], "other": ["seed=7", "model.dropout=0.25"]}.items():
        config = tiny(*one, *more, f"name={name}")
        assert train(config).exit == 0
        folders.append(str(config.folder))
    assert alexnet_dist("evaluate", folders[1], "--views", "10").returncode == 0
    out = tmp_path / "both.png"
    result = alexnet_dist("compare", *folders, "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^key +plain +other$", result.stdout, re.M)
    assert re.search(r"^model.dropout +0.5 +0.25$", result.stdout, re.M)
    assert re.search(r"^other +best and last +8 +test +10 ", result.stdout, re.M)
    assert out.read_bytes().startswith(b"\x89PNG")
    result = alexnet_dist("compare", *folders, "--out", str(out), "--json")
    found = json.loads(result.stdout)
    assert found["differ"] == {"seed": [0, 7], "model.dropout": [0.5, 0.25]}
    assert [len(scores) for scores in found["scores"]] == [1, 2]
    metrics = Path(folders[0], "metrics.jsonl")
    lost = re.sub(r'("kind": "eval".*?"loss": )[^,}]+', r"\1null", metrics.read_text())
    metrics.write_text(lost)
    result = alexnet_dist("compare", *folders, "--out", str(out), "--json")
    assert json.loads(result.stdout)["scores"][0][0]["loss"] is None, "JSON has no NaN"
    mine = str(tmp_path / "mine.png")
    Path(mine).write_bytes(out.read_bytes().replace(b"alexnet-dist", b"an own image"))
    for arguments, said in (
        ([*folders, "--out", mine], f"{mine}: there is such a file, and it is no comparison"),
        (folders[:1], "name another run folder"),
        ([*folders, "--steps", "9"], "--steps: has no effect on a comparison of run folders"),
        ([folders[0], "demo"], "compare demo: not a run folder (looked in "),
    ):
        result = alexnet_dist("compare", *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert said in result.stderr


def test_top_5_is_not_shown_of_five_classes_or_fewer(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    prepare("folder", image_folder(tmp_path / "three", 8, 4), tmp_path / "packed", Options())
    config = tiny(
        "layout.kind=one", "train.epochs=1", "log.every_steps=1", "model.classes=3",
        f"data.path={tmp_path / 'packed'}", "data.eval_split=val",
    )  # fmt: skip
    folder, page = str(config.folder), tmp_path / "report.html"
    said = ""
    for command in (
        ["train", *as_overrides(config)], ["evaluate", folder],
        ["compare", folder, folder, "--out", str(tmp_path / "both.png")],
        ["report", folder, "--out", str(page)],
    ):  # fmt: skip
        result = alexnet_dist(*command)
        assert result.returncode == 0, result.stderr
        said += result.stdout + result.stderr
    assert said.count("top-1 ") == 3 + 2 + 2 + 1  # steps; evaluation, end; score, error; a heading
    assert "top-5" not in said
    runs, published = page.read_text().split("<h2>Published</h2>")
    assert "top-5" not in runs
    assert "top-5" in published
    assert all(
        "top5" in point for point in read_metrics(config.folder) if point["kind"] not in TIMES
    )
