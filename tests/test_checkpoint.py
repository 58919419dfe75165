"""Checkpoints: durable, verified, layout-free; the newest good one, or an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_overrides
from safetensors.torch import save_file

from alexnet_dist import checkpoint as checkpoints
from alexnet_dist.config import Config
from alexnet_dist.errors import CheckpointError, ConfigError, NotFinite

TENSORS = {"conv1.weight": torch.randn(4, 3, 2, 2), "conv1.bias": torch.randn(4)}
BUFFERS = {f"momentum_buffer/{name}": tensor * 2 for name, tensor in TENSORS.items()}


def save(folder: Path, config: Config, step: int, error: float | None = None) -> Path:
    buffers = {**BUFFERS, "step/conv1.bias": torch.tensor(float(step))}
    return checkpoints.save(folder, config, "digest", TENSORS, buffers, {"step": step}, error)


def test_what_is_saved_is_what_is_read(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = save(tmp_path, tiny("seed=7"), 12, error=0.25)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json",
    ]  # fmt: skip
    found = checkpoints.verify(path)
    assert (found.step, found.error, found.progress["step"]) == (12, 0.25, 12)
    assert found.config == tiny("seed=7")
    for name, tensor in TENSORS.items():
        assert torch.equal(found.parameters().rows(name, slice(None)), tensor)
        assert torch.equal(found.parameters().rows(name, slice(1, 3)), tensor[1:3])
    optimizer = found.optimizer()
    assert optimizer.rows("step/conv1.bias", slice(0, 2)) == 12
    assert set(optimizer.keys()) == {*BUFFERS, "step/conv1.bias"}


def test_the_same_state_gives_the_same_bytes(tiny: Callable[..., Config], tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, tiny(), 3) for name in ("a", "b"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_the_newest_good_one_is_used_and_bad_ones_are_named(
    tiny: Callable[..., Config], tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, tiny(), 1)
    bad = save(tmp_path, tiny(), 2) / name
    content = bytearray(bad.read_bytes())
    match damage:
        case "cut":
            bad.write_bytes(content[: len(content) // 2])
        case "flip":
            content[len(content) // 2] ^= 0x80
            bad.write_bytes(content)
        case "remove":
            bad.unlink()
        case "empty":
            bad.write_bytes(b"")
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [str(tmp_path / "step-00000002") in str(error) for error in wrong] == [True]


def test_none_good_is_an_error_and_none_at_all_is_not(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    assert checkpoints.newest_good(tmp_path) == (None, [])
    (save(tmp_path, tiny(), 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints is good .* start anew under"):
        checkpoints.newest_good(tmp_path)


def test_an_interrupted_write_is_no_checkpoint(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tiny(), 1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, tiny(), 2)
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found is not None
    assert (found.step, wrong) == (1, [])
    checkpoints.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_checkpoint_being_replaced_is_not_lost(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Killed before the first or the second of the two renames."""
    save(tmp_path, tiny(), 7, error=None)
    rename, calls = Path.rename, iter(range(1, 9))

    def killed(self: Path, target: Path) -> Path:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, tiny(), 7, error=0.5)
    checkpoints.sweep(tmp_path)
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found is not None
    assert (found.step, found.error, wrong) == (7, None, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_the_best_and_the_last_are_kept(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for step, error in ((1, 0.5), (2, 0.2), (3, None), (4, 0.2), (5, None)):
        save(tmp_path, tiny(), step, error)
        checkpoints.prune(tmp_path, keep_last=2, keep_every=0, best_step=2 if step > 1 else 1)
    assert [p.name for p in checkpoints.steps(tmp_path)] == [
        "step-00000002", "step-00000004", "step-00000005",
    ]  # fmt: skip
    assert checkpoints.best(tmp_path).step == 2


def test_those_of_every_so_many_steps_are_kept_for_good(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, tiny(), step)
        checkpoints.prune(tmp_path, keep_last=1, keep_every=30, best_step=None)
    assert [checkpoints.step_of(p) for p in checkpoints.steps(tmp_path)] == [30, 60, 70]


def test_damaged_checkpoints_never_displace_good_ones(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """A run that continues before damaged checkpoints keeps what it saves."""
    for step in (16, 20, 24):
        path = save(tmp_path, tiny(), step)
        if step > 16:
            (path / "model.safetensors").write_bytes(b"")
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found is not None
    assert (found.step, len(wrong)) == (16, 2)
    checkpoints.set_aside(tmp_path, after=16)
    save(tmp_path, tiny(), 18)
    checkpoints.prune(tmp_path, keep_last=2, keep_every=0, best_step=None)
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step-00000016", "step-00000018"]


def test_the_best_that_is_good_is_the_best(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for step, error in ((1, 0.2), (2, 0.5), (3, 0.3)):
        save(tmp_path, tiny(), step, error)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    assert checkpoints.best(tmp_path).step == 3


def test_tensors_that_are_not_finite_are_not_saved(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    bad = {"conv1.bias": torch.tensor([1.0, float("nan")])}
    for parameters, buffers in ((bad, BUFFERS), (TENSORS, bad)):
        with pytest.raises(NotFinite, match=r"conv1\.bias is not finite; not saved"):
            checkpoints.save(tmp_path, tiny(), "d", parameters, buffers, {"step": 1}, None)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_named(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tiny(), 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left"):
        save(tmp_path, tiny(), 2)
    assert checkpoints.newest_good(tmp_path)[0].step == 1  # type: ignore[union-attr]


def test_another_runs_checkpoint_is_refused_by_key(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    found = checkpoints.verify(save(tmp_path, tiny(), 1))
    checkpoints.check_same_run(found, tiny("layout.kind=one", "log.every_steps=7"), "digest")
    with pytest.raises(ConfigError, match=r"another run \(seed: 0 there, 3 here\): give"):
        checkpoints.check_same_run(found, tiny("seed=3"), "digest")
    with pytest.raises(ConfigError, match=r"data\.path: another data set there"):
        checkpoints.check_same_run(found, tiny(), "other")


def test_a_hostile_file_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = save(tmp_path, tiny(), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for content in (b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}" + b"x" * 9, b"\x80\x04N."):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoints.TensorFile(path / "model.safetensors").rows("conv1.weight", slice(None))
    save_file({"conv1.bias": TENSORS["conv1.bias"]}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'conv1\.weight'"):
        checkpoints.TensorFile(path / "model.safetensors").rows("conv1.weight", slice(None))
    for change in ({"version": 9}, {"files": {}}, {"files": None}, {"error": 0.0}):
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError):
            checkpoints.verify(path)


def test_as_overrides_makes_the_config_again(tiny: Callable[..., Config]) -> None:
    from alexnet_dist.config_files import load_config

    config = tiny("model.exchange=[conv3,fc8]", "schedule.at_epochs=[1,2]")
    assert load_config(as_overrides(config)) == config
