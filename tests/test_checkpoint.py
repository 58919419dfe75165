"""Checkpoints: durable, verified, layout-independent; the newest good one is loaded."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import as_overrides
from safetensors.torch import save_file

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint import verify
from alexnet_dist.config.schema import Config
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import CheckpointError, ConfigError, Damaged, NotFinite
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.checkpointing import RunCheckpoints
from alexnet_dist.training.loop import train
from alexnet_dist.training.run_folder import RunFolder

TENSORS = {"conv1.weight": torch.randn(4, 3, 2, 2), "conv1.bias": torch.randn(4)}
BUFFERS = {f"momentum_buffer/{name}": tensor * 2 for name, tensor in TENSORS.items()}


def save(folder: Path, config: Config, step: int, error: float | None = None) -> Path:
    buffers = {**BUFFERS, "step/conv1.bias": torch.tensor(float(step))}
    progress = {"step": step, "score": error and {"loss": 10 - step}}
    return checkpoints.save(folder, config, "digest", TENSORS, buffers, progress, error)


def test_what_is_saved_is_what_is_read(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = save(tmp_path, tiny("seed=7"), 12, error=0.25)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json",
    ]  # fmt: skip
    found = checkpoints.verify(path)
    assert (found.step, found.error, found.progress["step"]) == (12, 0.25, 12)
    assert found.config == tiny("seed=7")
    parameters = checkpoints.TensorFile(path / "model.safetensors")
    for name, tensor in TENSORS.items():
        assert torch.equal(parameters.rows(name, slice(None)), tensor)
        assert torch.equal(parameters.rows(name, slice(1, 3)), tensor[1:3])
    with pytest.raises(CheckpointError, match=r"no tensor 'conv2\.bias'"):
        parameters.rows("conv2.bias", slice(None))
    optimizer = found.optimizer()
    assert optimizer.rows("step/conv1.bias", slice(0, 2)) == 12
    assert set(optimizer.keys()) == {*BUFFERS, "step/conv1.bias"}


def test_a_checkpoint_that_only_rank_0_sees_is_named(tmp_path: Path) -> None:
    """As on a node that does not share the run's folder."""
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read.* every node must"):
        checkpoints.read(tmp_path / "step-00000003")


@pytest.mark.parametrize(
    "schedule",
    [{}, 3, {"best_error": 10**400, "stalled": 0, "drops": 0}],
    ids=["none", "3", "large"],
)
def test_a_position_that_no_run_writes_is_named(
    tiny: Callable[..., Config], schedule: object
) -> None:
    config, progress = tiny(), {"step": 1, "schedule": schedule}
    folder = RunFolder(config)
    folder.take()
    engine = TorchEngine(config, Topology())
    whole = engine.whole_tensors()
    checkpoints.save(folder.checkpoints, config, "digest", *whole, progress, None)
    dataset: Any = SimpleNamespace(digest="digest")
    with pytest.raises(CheckpointError, match=r"step-00000001/progress\.json: is not what a run"):
        RunCheckpoints(folder, engine, Schedule.of(config, 60), dataset).resume()
    folder.close()


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
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is valid .*: restore one"):
        checkpoints.newest_good(tmp_path)


def test_what_is_wrong_with_a_runs_only_checkpoint_is_said(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    path = save(tmp_path / "checkpoints", tiny(), 1)
    assert checkpoints.at(tmp_path).path == path
    (path / "progress.json").unlink()
    said = r"valid \(.*step-00000001 is damaged: progress\.json is missing\): restore one"
    with pytest.raises(CheckpointError, match=said):
        checkpoints.at(tmp_path)
    shutil.rmtree(path)
    (tmp_path / "run.json").write_text('{"newest_step": 1}')
    with pytest.raises(CheckpointError, match=r"though run\.json says .* of step 1: restore it"):
        checkpoints.at(tmp_path)


def test_an_interrupted_write_is_no_checkpoint(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tiny(), 1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, tiny(), 2)
    found, wrong = checkpoints.newest_good(tmp_path)
    assert found is not None
    assert (found.step, wrong) == (1, [])
    assert checkpoints.continue_from(tmp_path, found, wrong) == found.path
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
    for step, error in ((1, 0.5), (2, 0.2), (3, None), (4, 0.3), (5, None)):
        save(tmp_path, tiny(), step, error)
        checkpoints.prune(tmp_path, keep_last=2, keep_every=0, best_step=2 if step > 1 else 1)
    assert [p.name for p in checkpoints.steps(tmp_path)] == [
        "step-00000002", "step-00000004", "step-00000005",
    ]  # fmt: skip
    assert checkpoints.best(tmp_path).step == 2
    for _ in range(2):  # the second replaces the first
        save(tmp_path, tiny(), 6, 0.2)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert checkpoints.best(tmp_path).step == 6, "of equal errors, the lowest loss, as in a run"
    with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint yet: a run saves"):
        checkpoints.best(tmp_path / "checkpoints")


def test_those_of_every_so_many_steps_are_kept_for_good(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    for step in range(10, 90, 10):
        save(tmp_path, tiny(), step)
        checkpoints.prune(tmp_path, keep_last=1, keep_every=30, best_step=None)
    assert sorted(os.listdir(tmp_path)) == [f"step-000000{step}" for step in (30, 60, 80)]
    assert checkpoints.best(tmp_path).step == 80, "the newest, where none was evaluated"


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
    checkpoints.continue_from(tmp_path, found, wrong)
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
        with pytest.raises(
            NotFinite, match=r"conv1\.bias is not finite: this checkpoint was not saved"
        ):
            checkpoints.save(tmp_path, tiny(), "d", parameters, buffers, {"step": 1}, None)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_named(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tiny(), 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def lossy(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        save_file({name: tensor * 0 for name, tensor in tensors.items()}, path)

    for fails, said in ((full, "No space left"), (lossy, r"conv1\.weight could not be read back")):
        monkeypatch.setattr(checkpoints, "save_tensors", fails)
        with pytest.raises(CheckpointError, match=rf"step 2 could not be written .*{said}"):
            save(tmp_path, tiny(), 2)
        assert checkpoints.newest_good(tmp_path)[0].step == 1  # type: ignore[union-attr]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, rename = list[str](), os.fsync, Path.rename

    def synced(opened: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{opened}")).name
        done.append(re.sub(r"^\.writing-[0-9a-f]+-", "", name))
        fsync(opened)

    def renamed(path: Path, to: Path) -> Path:
        done.append(f"renamed {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, tiny(), 1)
    assert done == [
        "model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json",
        "step-00000001", "renamed step-00000001", tmp_path.name,
    ]  # fmt: skip


def test_another_runs_checkpoint_is_refused_by_key(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    found = checkpoints.verify(save(tmp_path, tiny(), 1))
    checkpoints.check_same_run(found, tiny("layout.kind=one", "log.every_steps=7"), "digest")
    with pytest.raises(ConfigError, match=r"another run \(seed: 0 there, 3 here\): give"):
        checkpoints.check_same_run(found, tiny("seed=3"), "digest")
    longer = tiny("schedule.kind=polynomial", "train.epochs=77")
    with pytest.raises(ConfigError, match=r"77.* here \(the rate of schedule\.kind=polynomial dep"):
        checkpoints.check_same_run(found, longer, "digest")
    with pytest.raises(ConfigError, match=r"data\.path: '.*packed.*' there, with another"):
        checkpoints.check_same_run(found, tiny(), "other")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("how", ["renamed", "swapped", "copied"])
def test_a_good_checkpoint_in_a_folder_of_another_step_is_an_error_that_changes_nothing(
    tiny: Callable[..., Config], tmp_path: Path, how: str
) -> None:
    """And what the error says to do loses nothing."""
    folder = tmp_path / "run" / "checkpoints"
    four, eight = (save(folder, tiny(), step) for step in (4, 8))
    twelve = folder / "step-00000012"
    match how:
        case "renamed":  # the newest is in a folder of a lower number than another's
            four.rename(twelve)
            eight.rename(four)
        case "swapped":
            eight.rename(twelve)
            four.rename(eight)
            twelve.rename(four)
        case "copied":
            shutil.copytree(eight, twelve)
    before = contents(tmp_path)
    said = (
        r"holds a valid checkpoint of another step, [48]; nothing was changed.*: (mv -nT \S+ \S+)$"
    )
    for _ in range(3):
        with pytest.raises(CheckpointError, match=said) as raised:
            checkpoints.newest(folder)
        assert not isinstance(raised.value, Damaged)
        assert contents(tmp_path).keys() == before.keys()
        checkpoints.prune(folder, keep_last=2, keep_every=0, best_step=None)
        assert sorted(contents(tmp_path).values()) == sorted(before.values())
        move = re.search(said, str(raised.value))
        assert move is not None
        subprocess.run(move[1], shell=True, check=True)
        assert sorted(contents(tmp_path).values()) == sorted(before.values())
        before = contents(tmp_path)
        with contextlib.suppress(CheckpointError):
            found, wrong = checkpoints.newest(folder)
            assert found is not None
            assert (found.step, wrong) == (8, [])
            return
    raise AssertionError("three moves did not mend it")


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder that other users may pass through, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("what", ["model.safetensors", "manifest.json", ".", ".."])
def test_a_checkpoint_that_this_user_may_not_read_is_not_damaged(
    tiny: Callable[..., Config], elsewhere: Path, what: str
) -> None:
    folder = elsewhere / "checkpoints"
    for step in (1, 2):
        path = save(folder, tiny(), step, error=0.5 / step)
    (path / what).chmod(0o600)
    said = r"cannot be read \(Permission denied; owner root, mode 0\d+\).*have root let you read it"
    with as_another_user():
        for look in (checkpoints.newest, checkpoints.newest_good, checkpoints.best):
            with pytest.raises(CheckpointError, match=said) as raised:
                look(folder)
            assert not isinstance(raised.value, Damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.at(path)
    assert checkpoints.newest(folder)[1] == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_an_error_of_the_disk_is_not_damage(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for step in (1, 2):
        path = save(tmp_path, tiny(), step)

    def fails(file: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(verify, "sha256", fails)
    said = rf"{path}/model\.safetensors cannot be read \({os.strerror(number)}; owner "
    with pytest.raises(CheckpointError, match=said) as raised:
        checkpoints.newest(tmp_path)
    assert not isinstance(raised.value, Damaged)


def test_a_link_that_leads_nowhere_is_not_damage(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """As where another disk is not mounted."""
    save(tmp_path, tiny(), 1)
    (tmp_path / "step-00000002").symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest\.json cannot be read"):
        checkpoints.newest(tmp_path)


def test_another_versions_checkpoint_is_not_damaged(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    path = save(tmp_path, tiny(), 1) / "manifest.json"
    manifest = json.loads(path.read_text()) | {"version": 2}
    manifest["sha256"] = checkpoints.own_sha256(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"version 2, but this program reads version 1"
    ) as raised:
        checkpoints.newest(tmp_path)
    assert not isinstance(raised.value, Damaged)


def test_a_checkpoint_with_a_newer_versions_key_is_named(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    folder = save(tmp_path, tiny(), 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["data.new"] = 1
    manifest["sha256"] = checkpoints.own_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    newer = r"step-00000003: .* unknown key data\.new; .*if a newer alexnet-dist saved it"
    with pytest.raises(CheckpointError, match=newer):
        _ = checkpoints.verify(folder).config


@pytest.mark.parametrize("saved_with", ["2.11.0", torch.__version__])
def test_a_run_says_that_it_continues_with_another_torch(
    saved_with: str, tiny: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ("layout.kind=one", "schedule.kind=steps", "schedule.at_epochs=[]")
    config = tiny(*keys, "train.epochs=0.1")
    assert train(config).exit == 0
    path = checkpoints.at(config.folder).path / "manifest.json"
    manifest = json.loads(path.read_text()) | {"torch": saved_with}
    path.write_text(json.dumps(manifest | {"sha256": checkpoints.own_sha256(manifest)}))
    capfd.readouterr()
    assert train(tiny(*keys, "train.epochs=0.2")).exit == 0
    said = f"was saved with torch 2.11.0, and the run continues with {torch.__version__}: it may"
    assert (said in capfd.readouterr().err) == (saved_with == "2.11.0")


def test_what_is_set_aside_displaces_nothing(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Not what was set aside before, and not a stranger in the place of a new checkpoint."""
    save(tmp_path, tiny(), 1)
    for content in (b"first", b"second", b"third"):
        (save(tmp_path, tiny(), 2) / "progress.json").write_bytes(content)
        checkpoints.continue_from(tmp_path, *checkpoints.newest(tmp_path))
    kept = {path.name: path for path in tmp_path.glob("damaged-*")}
    assert kept.keys() == {f"damaged-step-00000002{end}" for end in ("", "-2", "-3")}
    found = {(path / "progress.json").read_bytes() for path in kept.values()}
    assert found == {b"first", b"second", b"third"}

    stranger = save(tmp_path, tiny(), 5)
    stranger.rename(tmp_path / "step-00000003")
    save(tmp_path, tiny(), 3)
    assert checkpoints.verify(tmp_path / "step-00000003").step == 3
    assert json.loads((tmp_path / "kept-step-00000003/manifest.json").read_text())["step"] == 5


def test_a_newer_checkpoint_of_a_name_of_ones_own_is_not_passed_over_in_silence(
    tiny: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, name in ((2, "before-the-move"), (6, "step-6"), (4, "kept-4"), (4, "")):
        path = save(tmp_path, tiny(), step)
        path.rename(path.with_name(name or path.name))
    checkpoints.continue_from(tmp_path, *checkpoints.newest(tmp_path))
    (said,) = caplog.messages
    assert f"{tmp_path}/step-6 holds step 6, newer than 4: to resume from it, stop this run" in said
    assert len(checkpoints.traces(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["old", "gone"])
def test_a_hidden_checkpoint_is_used_where_what_hides_it_is_damaged(
    tiny: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """Of a replacement, or a removal, that was interrupted."""
    save(tmp_path, tiny(), 1)
    save(tmp_path, tiny(), 2, error=0.5).rename(tmp_path / f".{kind}-step-00000002")
    newer = save(tmp_path / "aside", tiny(), 2).rename(tmp_path / "step-00000002")
    (newer / "progress.json").write_bytes(b"")
    found, wrong = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.step, found.error, len(wrong)) == (2, 0.5, 1)
    path = checkpoints.continue_from(tmp_path, found, wrong)
    assert path == tmp_path / "step-00000002"
    assert checkpoints.verify(path).error == 0.5
    save(tmp_path, tiny(), 3)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_only_an_interrupted_first_save_leaves_no_trace(tmp_path: Path) -> None:
    assert checkpoints.traces(tmp_path / "none") == []
    (tmp_path / ".writing-step-00000004").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoints.traces(tmp_path) == []
    names = [".gone-step-00000001", ".old-step-00000001", "damaged-step-00000001", "step-12"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup/manifest.json").touch()
    assert checkpoints.traces(tmp_path) == sorted([*names, "backup"])


def test_as_overrides_makes_the_config_again(tiny: Callable[..., Config]) -> None:
    from alexnet_dist.config.load import load_config

    config = tiny("model.exchange=[conv3,fc8]", "schedule.at_epochs=[1,2]")
    assert load_config(as_overrides(config)) == config
