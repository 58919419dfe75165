"""A packed data set, a checkpoint and a run folder from before the modules moved still work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import alexnet_dist
from safetensors.torch import load_file

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.training.metrics_file import TIMES, read_metrics

OLD = Path(__file__).parent / "before_the_move"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Copies that may be changed; run.yaml names them relative to their folder."""
    return shutil.copytree(OLD, tmp_path / "old")


def test_an_old_run_resumes_to_the_end_it_would_have_had(old: Path) -> None:
    resumed = alexnet_dist("train", "run.yaml", cwd=old)
    assert resumed.returncode == 0, resumed.stderr
    assert "continues at step 16 of 24" in resumed.stderr
    expected = json.loads((old / "whole.json").read_text())
    found = [point for point in read_metrics(old / "run") if point["kind"] not in TIMES]
    assert [(p["kind"], p["step"]) for p in found] == [(p["kind"], p["step"]) for p in expected]
    for here, there in zip(found, expected, strict=True):
        del here["kind"], there["kind"]
        assert here == pytest.approx(there, rel=1e-4), here["step"]
    ended = load_file(old / "run/checkpoints/step-00000024/model.safetensors")
    for name, tensor in load_file(old / "whole.safetensors").items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-6)


def test_an_old_checkpoint_is_verified_and_evaluated(old: Path) -> None:
    for path in checkpoints.steps(old / "run/checkpoints"):
        assert checkpoints.verify(path).step == checkpoints.step_of(path)
    scored = alexnet_dist("evaluate", "run/checkpoints/step-00000015", "--json", cwd=old)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["samples"] == 8


def test_an_old_packed_data_set_is_verified(old: Path) -> None:
    assert len(open_dataset(old / "packed").splits["train"]) == 24
    inspected = alexnet_dist("inspect", "packed", "--json", cwd=old)
    assert inspected.returncode == 0, inspected.stderr
