"""Evaluation: ensembles, ten views, confusion, intervals, predictions."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides, assert_close

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.cli.main import main
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.split import Split
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.errors import CheckpointError, ConfigError, MachineError, RunFolderError
from alexnet_dist.evaluation import results
from alexnet_dist.evaluation.evaluate import _changed, evaluate, evaluate_checkpoints
from alexnet_dist.evaluation.load import load_checkpoint
from alexnet_dist.evaluation.results import (
    Evaluation,
    Score,
    add_confusion,
    save_score,
    saved_scores,
)
from alexnet_dist.progress import progress_bar
from alexnet_dist.reporting import figures
from alexnet_dist.reporting.runs import RunResults, read_run_folder
from alexnet_dist.training.loop import train
from alexnet_dist.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    one = ["layout.kind=one", "train.precision=fp32", "train.epochs=1", "model.columns=1"]
    places = [f"data.path={packed}", f"output_dir={tmp_path_factory.mktemp('trained')}"]
    configs = [load_config([*TINY, *one, *places, f"name=seed-{s}", f"seed={s}"]) for s in (1, 2)]
    for config in configs:
        assert train(config).exit == 0
    return [config.folder for config in configs]


@pytest.fixture
def two_runs(trained: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that may be changed."""
    return [shutil.copytree(run, tmp_path / "runs" / run.name) for run in trained]


def test_an_ensemble_averages_softmax_outputs_and_says_all_of_them(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [evaluate_checkpoints([run]) for run in two_runs]
    both = evaluate_checkpoints(two_runs)
    mean = (alone[0].probabilities + alone[1].probabilities) / 2
    assert_close(both.probabilities, mean, 1e-7)
    assert both.labels.tolist() == alone[0].labels.tolist()
    assert both.score.correct1 == int((mean.argmax(1) == both.labels).sum())
    assert int(both.confusion.diag().sum()) == both.score.correct1
    assert both.confusion.sum(1).tolist() == torch.bincount(both.labels, minlength=10).tolist()

    read: list[int] = []
    whole = Split.read_with_warnings
    monkeypatch.setattr(
        Split, "read_with_warnings", lambda split, i: (read.extend(i), whole(split, i))[1]
    )
    ten = evaluate_checkpoints(two_runs[:1], ["evaluate.views=10"])
    assert sorted(read) == list(range(23)), "ten views, and an image is decoded once"
    assert not torch.equal(ten.probabilities, alone[0].probabilities)
    monkeypatch.undo()

    out = tmp_path / "predictions.npz"
    command = ["evaluate", *map(str, two_runs), "--predictions", str(out)]
    result = alexnet_dist(*command, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["correct1"] == both.score.correct1
    assert len(found["of"]) == 2
    assert sum(row["right"] for row in found["classes"]) == both.score.correct1
    assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]
    with np.load(out, allow_pickle=False) as kept:
        assert_close(kept["probabilities"], both.probabilities, 1e-6)
        assert kept["confusion"].sum() == 23
        assert tuple(kept["classes"]) == open_for(both.checkpoints[0].config).classes
    said = alexnet_dist(*command).stdout
    assert "95 % of resamples between" in said
    assert "mistaken for" in said


def test_one_network_is_scored_without_its_probabilities_in_memory(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = evaluate_checkpoints(two_runs[:1], ["evaluate.batch=5"])
    monkeypatch.setattr("alexnet_dist.evaluation.evaluate.free_host_memory", lambda: 919)
    alone = evaluate_checkpoints(two_runs[:1], ["evaluate.batch=5"], keep=False)
    assert alone.probabilities is alone.labels is None
    assert alone.score == whole.score
    assert torch.equal(alone.confusion, whole.confusion)
    assert main(["evaluate", str(two_runs[0])]) == 0

    with pytest.raises(MachineError, match=r"networks takes 23 x 10 probabilities, .* one by one"):
        evaluate_checkpoints(two_runs, keep=False)
    assert main(["evaluate", str(two_runs[0]), "--predictions", str(tmp_path / "all.npz")]) == 1
    assert "keeping predictions takes 23 x 10 probabilities" in capsys.readouterr().err
    assert not (tmp_path / "all.npz").exists()


def test_networks_are_averaged_on_images_that_none_was_trained_on(
    tiny: Callable[..., Config],
) -> None:
    """A smaller share held out leaves a part of the larger one to be trained on."""
    runs = []
    for share in (0.5, 0.3):
        held = [f"data.hold_out={share}", "data.eval_split=held_out", f"name=held-{share}"]
        config = tiny("layout.kind=one", "train.precision=fp32", "train.epochs=0.2", *held)
        assert train(config).exit == 0
        runs.append(config.folder)
    with pytest.raises(ConfigError, match=r"data\.hold_out=0\.3, but 0\.5 in .*/held-0\.5/"):
        evaluate_checkpoints(runs)
    with pytest.raises(
        ConfigError, match=r"0\.5: .*held-0\.3/.* trained on .*hold_out=0\.3 or less"
    ):
        evaluate_checkpoints(runs, ["data.hold_out=0.5"])
    both = evaluate_checkpoints(runs, ["data.hold_out=0.3"])
    assert both.score.samples == evaluate_checkpoints(runs[1:]).score.samples
    assert evaluate_checkpoints(runs, ["data.eval_split=test"]).score.samples == 23


def test_a_gpu_computes_with_the_networks_present_weights(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, layers compute with narrow copies of their weights."""
    config = tiny("layout.kind=one", "train.precision=bf16", "train.epochs=0.2")
    assert train(config).exit == 0
    trained = load_checkpoint(config.folder)
    with torch.no_grad():
        trained.model.get_parameter("fc8.weight").mul_(3)
    named = dict(trained.model.named_parameters())
    seen: list[bool] = []

    def predict(engine: TorchEngine, windows: torch.Tensor) -> torch.Tensor:
        for name, copy in (engine.optimizer.narrow or {}).items():
            seen.append(torch.equal(copy, named[name].bfloat16()))
        return torch.zeros(len(windows), config.model.classes)

    monkeypatch.setattr("alexnet_dist.network.kernels.fused", lambda *_: True)
    monkeypatch.setattr(TorchEngine, "predict", predict)
    evaluate(trained, views=1)
    assert len(seen) >= 8
    assert all(seen)


def test_a_network_is_never_cut_to_the_classes_of_other_data(
    two_runs: list[Path], tmp_path: Path
) -> None:
    made.image_folder(tmp_path / "images", 3, 2)
    prepare("folder", tmp_path / "images", tmp_path / "three", Options(workers=1))
    data = [f"data.path={tmp_path / 'three'}", "data.eval_split=val"]
    run, at = two_runs[0], checkpoints.at(two_runs[0]).path
    said = (
        rf"model\.classes=10: .*three has 3 classes: set data\.path= to data of the classes that "
        rf"{at} .*fine-tune it: train CONFIG name=NEW data\.path=.*three model\.classes=3 "
        rf"train\.init_from={at} "
        r"'train\.init_new=\[fc8\]'$"
    )
    for look in (
        lambda: evaluate_checkpoints([run], data),
        lambda: figures.draw_fig4(run, data),
    ):
        with pytest.raises(ConfigError, match=said):
            look()
    cut = [*data, "model.classes=3"]
    said = (
        r"model\.safetensors is of another network: fc8\.weight is \[10, 28\] there, but \[3, 28\]"
    )
    for look in (
        lambda: evaluate_checkpoints([run], cut),
        lambda: figures.draw_fig4(run, cut),
    ):
        with pytest.raises(CheckpointError, match=said):
            look()
    result = alexnet_dist("evaluate", str(run), *cut)
    assert result.returncode == 1
    assert "of another network" in result.stderr


def test_a_network_never_predicts_other_classes_than_it_was_trained_on(
    two_runs: list[Path], packed: Path, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    """Not even where there are as many."""
    other, at = tmp_path / "other", checkpoints.at(two_runs[0]).path
    shutil.copytree(packed, other)
    meta = json.loads((other / "dataset.json").read_text())
    meta["classes"][3] = "Cape"
    (other / "dataset.json").write_text(json.dumps(meta))
    run, data = two_runs[0], [f"data.path={other}"]
    said = (
        rf"other': its class 3 is 'Cape', which was 'Dress' where {at} was trained: set data\.path"
    )
    for look in (
        lambda: evaluate_checkpoints([run], data),
        lambda: evaluate(run, other),
        lambda: load_checkpoint(run, other).classes,
        lambda: figures.draw_fig4(run, data),
    ):
        with pytest.raises(ConfigError, match=said):
            look()

    own = ["layout.kind=one", "model.columns=1", "train.precision=fp32", "train.epochs=0.2"]
    warm = [*own, *data, f"train.init_from={run}", "name=warm"]
    with pytest.raises(
        ConfigError, match=r"fc8 would predict other classes: its class 3 is 'Cape'"
    ):
        train(tiny(*warm))
    assert train(tiny(*warm, "train.init_new=[fc8]")).exit == 0
    with pytest.raises(ConfigError, match="which was 'Cape'"):
        evaluate_checkpoints([run, tmp_path / "runs" / "warm"], [f"data.path={packed}"])


def test_a_score_says_what_was_changed_of_any_schedule(tiny: Callable[..., Config]) -> None:
    """The length of a run defines it on some schedules only."""
    changed = _changed(tiny("schedule.kind=steps"), tiny("schedule.kind=polynomial"))
    assert changed.keys() == {"schedule.kind", "train.epochs"}


def test_confusion_leaves_damaged_samples_out() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1, -1])
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    add_confusion(confusion, probabilities, labels)
    assert confusion.tolist() == [[1, 1], [1, 0]]
    found = Evaluation(Score(3, 1, 3, 1.0), (), ("cat", "dog"), confusion)
    report = found.report()
    assert report["mistakes"] == [
        {"of": "cat", "taken_for": "dog", "samples": 1},
        {"of": "dog", "taken_for": "cat", "samples": 1},
    ]
    assert report["classes"][1] == {"name": "dog", "samples": 1, "right": 0}


def test_ten_views_are_advised_only_where_they_tell_more(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    advised = []
    for more in ([], ["evaluate.views=10"], ["data.canvas=67"]):
        config = tiny("layout.kind=one", "train.epochs=0.2", f"name={len(advised)}", *more)
        assert main(["train", *as_overrides(config)]) == 0
        advised.append(
            f"next: alexnet-dist evaluate {config.folder} --views 10" in capsys.readouterr().out
        )
    assert advised == [True, False, False]


def test_the_bootstraps_interval_is_the_binomials() -> None:
    score = Score(10_000, 8_000, 10_000, 0.5)
    low, high = score.interval(8_000)
    deviation = (0.8 * 0.2 / 10_000) ** 0.5
    assert low == pytest.approx(0.8 - 1.96 * deviation, abs=3e-4)
    assert high == pytest.approx(0.8 + 1.96 * deviation, abs=3e-4)
    assert score.interval(8_000) == (low, high)
    assert score.interval(10_000) == (1.0, 1.0)


def test_a_run_counts_by_its_own_split_and_data(
    tiny: Callable[..., Config], packed: Path, tmp_path: Path
) -> None:
    config = tiny("layout.kind=one", "train.precision=fp32", "train.epochs=1", "name=own")
    assert train(config).exit == 0
    other = shutil.copytree(packed, tmp_path / "other")
    same = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(same, indent=1))  # another digest

    def read() -> RunResults:
        found = read_run_folder(config.folder)
        assert found is not None
        return found

    before = read().views
    for changes in ([], ["data.eval_split=train"], [f"data.path={other}"]):
        assert save_score(evaluate_checkpoints([config.folder], changes)) is not None
    found = read()
    assert len(found.scores) == 1 + 3
    assert {views: score.samples for views, score in found.views.items()} == {1: 23}
    assert found.views[1].correct1 == before[1].correct1
    assert found.detailed is not None
    assert (found.detailed.split, found.detailed.changed) == ("test", {})
    assert any(f"with data.path={other}" in one.circumstances for one in found.scores)

    imported = tmp_path / "imported"  # `import` makes a checkpoint alone
    for folder in ("checkpoints", "evaluations"):
        shutil.copytree(config.folder / folder, imported / folder)
    for path in (imported / "evaluations").iterdir():
        score = json.loads(path.read_text())
        if score["data"] == str(other):  # all data are alike to a network that was imported
            path.write_text(json.dumps(score | {"changed": {}, "date": "2999-01-01"}))
    alone = read_run_folder(imported)
    assert alone is not None
    assert len(alone.scores) == 3
    assert alone.detailed is not None
    assert alone.detailed.data == str(other), "the newest of equals"


def test_scores_are_kept_in_the_run_folder_even_of_a_training_that_holds_it(
    two_runs: list[Path], tiny: Callable[..., Config], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = two_runs[0]
    holder = RunFolder(tiny("layout.kind=one", "name=seed-1"))
    holder.take()
    before = (run / "run.json").read_bytes()
    result = alexnet_dist("evaluate", str(run), "--views", "10")
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith(": evaluating 23 images, 10 views each\n")
    path = run / "evaluations" / "step-00000008-test-views-10.json"
    assert result.stdout.splitlines()[-1] == f"saved: {path}"
    assert (run / "run.json").read_bytes() == before
    holder.close()

    (score,) = saved_scores(run)
    at = checkpoints.at(run)
    assert (score["step"], score["views"], score["split"]) == (8, 10, "test")
    assert score["checkpoint_sha256"] == [at.manifest["sha256"]]
    assert score["data_sha256"] == at.manifest["dataset"]
    assert score["date"].startswith("20")
    assert score["machine"]["torch"] == torch.__version__
    assert sum(count for *_, count in score["confusion"]) == score["samples"] == 23
    right = sum(count for of, taken_for, count in score["confusion"] if of == taken_for)
    assert right == score["correct1"]

    again = evaluate_checkpoints([run], ["evaluate.views=10"])
    assert save_score(again) == path
    other = save_score(evaluate_checkpoints([run], ["data.divide_by=[30,30,30]"]))
    both = save_score(evaluate_checkpoints(two_runs))
    assert other is not None
    assert both is not None
    assert len({path, other, both, *(run / "evaluations").iterdir()}) == 3
    changed = {tuple(score["changed"]) for score in saved_scores(run)}
    assert changed == {(), ("data.divide_by",)}
    whole = path.read_bytes()
    endless = [whole.replace(b'"step": 8', b'"step": Infinity'), whole.replace(b'"split"', b'"s"')]
    for number, damage in enumerate([b"", b"[]", b'{"top1": 2}', whole[:-9], *endless]):
        (run / "evaluations" / f"{number}.json").write_bytes(damage)
    (run / "evaluations" / f".writing-0-{path.name}").write_bytes(whole)  # by a killed process
    assert len(saved_scores(run)) == 3
    found = read_run_folder(run)
    assert found is not None
    assert len(found.scores) == 3
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"correct1": \d+', '"correct1": Infinity', lines))
    with pytest.raises(RunFolderError, match=f"{run} cannot be read: .*infinity"):
        read_run_folder(run)

    alone = shutil.copytree(at.path, tmp_path / "alone")
    assert save_score(evaluate_checkpoints([alone])) is None
    assert {file.name for file in tmp_path.iterdir()} == {"alone", "runs"}

    def full(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(results.files, "write", full)
    assert save_score(again) is None
    assert "this score is printed, but could not be saved" in caplog.text


def test_an_evaluation_without_a_terminal_logs_how_far_it_is(
    two_runs: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("alexnet_dist.progress.LOGGED_EVERY_S", 0)
    monkeypatch.setattr(
        "alexnet_dist.evaluation.evaluate.progress_bar",
        lambda doing, **options: progress_bar(doing, **options | {"delay": 0}),
    )
    with caplog.at_level("INFO", "alexnet_dist.evaluation"):
        evaluate_checkpoints(two_runs[:1], ["evaluate.batch=10"])
    (begins,) = caplog.messages
    assert begins.endswith("evaluating 23 images, 1 view each")
    assert re.findall(r"\| (\d+)/23 ", capsys.readouterr().err) == ["0", "10", "20", "23"]
