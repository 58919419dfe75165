"""`alexnet-dist compare`, as a user runs it."""

import json
import math
import re
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, alexnet_dist, in_a_fork
from torch import Tensor
from torch.futures import Future

from alexnet_dist.config.load import load_config
from alexnet_dist.engines import ddp
from alexnet_dist.errors import ConfigError
from alexnet_dist.reporting.compare_layouts import chosen, relative

KEYS = ["layout", "ranks", "final_loss", "max_difference", "bound", "holds", "images_per_s",
        "bytes_per_rank_step", "ranks_per_gpu"]  # fmt: skip


@pytest.fixture
def command(packed: Path) -> list[str]:
    return ["compare", *TINY, f"data.path={packed}", "--steps", "4"]


def test_columns_replicas_and_zero_hold_and_are_one_json_list(command: list[str]) -> None:
    result = alexnet_dist(*command, "--layouts", "columns:2,replicas:2,zero1:2", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["layout"], row["ranks"], row["bound"]) for row in rows] == [
        ("one", 1, 1e-12), ("columns", 2, 1e-12), ("replicas", 2, 1e-12), ("zero1", 2, 1e-5)
    ]  # fmt: skip
    for row in rows:
        assert list(row) == KEYS
        assert row["holds"] is True
        assert row["max_difference"] <= row["bound"]
        assert row["images_per_s"] > 0
        assert row["final_loss"] == pytest.approx(rows[0]["final_loss"], rel=1e-4)
        assert (row["bytes_per_rank_step"] > 0) == (row["ranks"] > 1)
    assert rows[1]["max_difference"] > 0  # other sums: not a network held against itself


def of_own_gradients(arguments: list[str]) -> None:
    """Run a command whose replicas each keep their own gradients."""

    def keep(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
        kept: Future[Tensor] = Future()
        kept.set_result(bucket.buffer())
        return kept

    ddp.sum_bucket = keep
    forks.run(arguments)


def test_a_layout_that_is_wrong_does_not_hold(command: list[str]) -> None:
    result = in_a_fork(of_own_gradients, [*command, "--layouts", "replicas:2"])
    assert result.returncode == 1, result.stderr
    heading, one, replicas = result.stdout.splitlines()
    assert heading.split()[:2] == ["layout", "ranks"]
    assert " yes " in one
    assert " NO " in replicas
    assert re.search(
        r"layout.kind=replicas: (parameters|optimizer): \S+ differs most", result.stderr
    )


def test_what_is_not_a_number_is_infinitely_far() -> None:
    """And not nothing: NaN is neither larger nor smaller than any bound."""
    none, nan, zeros = torch.ones(2), torch.tensor([1.0, math.nan]), torch.zeros(2)
    assert relative(none, none) == relative(zeros, zeros) == 0
    assert relative(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    for ours, theirs in ((nan, none), (none, nan), (nan, nan), (none, zeros)):
        assert relative(ours, theirs) == math.inf
        assert max([0.0, relative(ours, theirs)]) == math.inf


def test_a_layout_that_cannot_be_is_one_clear_line(command: list[str]) -> None:
    result = alexnet_dist(*command, "--layouts", "replicas:2,columns:3")
    assert result.returncode == 2
    assert "layout.kind=columns takes 2 ranks" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ("replicas:3", "train.batch=8: must be divisible by 3 replicas"),
        ("sharded_fc:3", "cannot be split over 3 ranks, only over 2, 4"),
        ("rows:2", "layout.kind=rows"),
        ("replicas:many", "must be LAYOUT or LAYOUT:RANKS"),
    ],
)
def test_a_wrong_choice_of_layouts_says_why(layouts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(load_config(TINY), layouts)


def test_rows_are_computed_on_devices_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config([*TINY, "layout.device=auto"])
    for here, device in ((0, "auto"), (1, "cpu"), (2, "auto")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: here)
        assert {one.layout.device for one in chosen(config, "replicas:2")} == {device}


def test_without_its_data_the_demo_says_how_to_make_them(tmp_path: Path) -> None:
    result = alexnet_dist("compare", "demo", cwd=tmp_path)
    assert result.returncode == 1
    missing = f"data/demo/dataset.json is missing (looked in {tmp_path}): make the data set with"
    assert missing in result.stderr
    made = result.stderr.partition("`alexnet-dist ")[2].partition("`")[0].split()
    assert made[-1] == "data/demo"
    done = alexnet_dist(*made, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "demo" / "dataset.json").exists()
