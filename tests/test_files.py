"""Only regular files are read and written, never through a link; checksums are verified."""

import logging
import os
import random
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from alexnet_dist import train
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.warm_start import resolved
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import open_dataset, open_for
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.data.verified import read_array
from alexnet_dist.errors import (
    AlexNetDistError,
    CheckpointError,
    ConfigError,
    DatasetError,
    NotAFile,
    RunFolderError,
    in_words,
)
from alexnet_dist.evaluation.predict import canvas_of
from alexnet_dist.files import (
    appended,
    opened,
    read_bytes,
    read_run,
    sha256,
    sweep_writing,
    write_json,
    written_aside,
)
from alexnet_dist.formats.convert import import_weights
from alexnet_dist.parallel.workers import worker_pool
from alexnet_dist.tensor_files import TensorFile, save_tensors
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.run_folder import RunFolder

SHORT = ("layout.kind=one", "train.epochs=0.5", "train.precision=fp32")
ONE = Options(workers=1)


@pytest.fixture
def at_once() -> Iterator[None]:
    """Whoever waits for the other end of a pipe fails."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "bytes": read_bytes,
    "sha256": sha256,
    "append": appended,
    "tensors": TensorFile,
    "array": read_array,
    "run.json": lambda p: read_run(pipe(p.with_name("run.json")).parent),
    "metrics.jsonl": lambda p: read_metrics(pipe(p.with_name("metrics.jsonl")).parent),
    "dataset.json": lambda p: open_dataset(pipe(p.with_name("dataset.json")).parent),
    "manifest.json": lambda p: checkpoints.verify(pipe(p.with_name("manifest.json")).parent),
    "pth": lambda p: import_weights("torchvision", p, p / "run", ["paper/torchvision-2014"]),
    "caffe": lambda p: import_weights("caffe", p, p / "run", ["paper/caffe-alexnet"]),
    "image": lambda p: canvas_of(p, (False, False), 64),
    "folder": lambda p: prepare("folder", p, p.with_name("out"), ONE),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_pipe_in_a_files_place_is_refused_at_once(
    reader: Callable[[Path], object], tmp_path: Path, at_once: None
) -> None:
    with pytest.raises((OSError, ValueError, AlexNetDistError)) as said:
        reader(pipe(tmp_path / "place"))
    assert "pipe" in f"{said.value}" or "is not a folder" in f"{said.value}"


def test_sockets_devices_folders_and_links_are_named(
    tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # whose own path may be too long for a socket
        server.bind("socket")
        with pytest.raises(NotAFile, match="a socket, not a file"):
            opened(tmp_path / "socket")
    with pytest.raises(NotAFile, match="a device, not a file"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        opened(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotAFile, match="a link, not a file") as said:
        appended(tmp_path / "link")
    assert str(in_words(said.value)) == (
        f"{tmp_path / 'link'} is a link, not a file: move it away, or name a file"
    )
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_file_is_named_from_a_worker_too(tmp_path: Path) -> None:
    place = pipe(tmp_path / "place")
    with worker_pool(1, "opens", "") as pool, pytest.raises(NotAFile, match="a pipe, not a file"):
        pool.submit(opened, place).result()


def test_what_is_no_file_is_not_replaced(tmp_path: Path, at_once: None) -> None:
    """As root, `--out /dev/null` made a file of it."""
    pipe(tmp_path / "place")
    with pytest.raises(NotAFile, match="a pipe, not a file"), written_aside(tmp_path / "place"):
        pass
    assert stat.S_ISFIFO((tmp_path / "place").stat().st_mode)
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "run.json", "config.json"])
def test_a_pipe_in_a_run_folder_is_named_and_kept(
    name: str, tiny: Callable[..., Config], at_once: None
) -> None:
    config = tiny(*SHORT)
    config.folder.mkdir(parents=True)
    pipe(config.folder / name)
    with pytest.raises((RunFolderError, AlexNetDistError), match=rf"run/{name}.*a pipe, not a fi"):
        train(config)
    assert stat.S_ISFIFO((config.folder / name).stat().st_mode)
    assert not logging.getLogger("alexnet_dist.data").handlers


def test_no_link_leads_out_of_a_run_folder(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Neither by names that files aside once had, nor by those of files that are replaced."""
    config = tiny(*SHORT, "log.every_steps=1")
    (config.folder / "checkpoints").mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    names = (".run.json.writing", ".config.json.writing", ".metrics.jsonl.writing", "run.json",
             "config.json")  # fmt: skip
    for name in names:
        (precious / name).write_text("{}")
        (config.folder / name).symlink_to(precious / name)
    (config.folder / "checkpoints/.writing-step-00000004").symlink_to(precious)
    assert train(config).exit == 0
    assert train(config).exit == 0  # cuts metrics.jsonl
    assert {path.name: path.read_text() for path in precious.iterdir()} == dict.fromkeys(
        names, "{}"
    )
    assert [p.name for p in (config.folder / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_lock_that_is_a_link_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(*SHORT)
    config.folder.mkdir(parents=True)
    (config.folder / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=r"run/lock: cannot be written \(a link, not a file\)"):
        train(config)
    assert not (tmp_path / "elsewhere").exists()


def test_files_aside_have_the_mode_of_any_file_and_go_when_they_are_old(
    tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    (tmp_path / "any").touch()
    write_json(tmp_path / "a.json", {"a": 1})
    save_tensors(tmp_path / "b.safetensors", {"b": torch.zeros(2)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}
    for name, age in ((".writing-0-old", 10_000), (".writing-0-new", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (2e9 - age, (tmp_path / "any").stat().st_mtime - age))
    sweep_writing(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "any", "a.json", "b.safetensors", ".writing-0-new"
    }  # fmt: skip
    folder = RunFolder(tiny())
    left = folder.path / ".writing-0-old"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    folder.take()  # a run that begins removes them
    folder.close()
    assert not left.exists()


# --- checksums that formats bring


def test_no_changed_bit_of_a_pth_is_loaded(tmp_path: Path) -> None:
    sources = ["paper/torchvision-2014", "model.crop=67", "model.classes=5",
               "model.conv=[8,12,16,16,8]", "model.fc=[20,12]"]  # fmt: skip
    weights = {f"features.{n}.weight": torch.randn(8, 12, 3, 3) for n in (0, 3, 6, 8, 10)}
    torch.save(weights, tmp_path / "sound.pth")
    whole = (tmp_path / "sound.pth").read_bytes()
    with pytest.raises(CheckpointError, match=r"conv1\.weight is \["):
        import_weights("torchvision", tmp_path / "sound.pth", tmp_path / "run", sources)
    at = whole.index(b"data/0") + 200
    for place in (at, *random.Random(0).sample(range(at, len(whole) // 2), 20)):
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        (tmp_path / "flipped.pth").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="is not a state dict") as said:
            import_weights("torchvision", tmp_path / "flipped.pth", tmp_path / "run", sources)
    assert "does not match its checksum" in str(said.value) or "Bad CRC" in str(said.value)


# --- the mean image of data.mean_from


def test_a_mean_images_content_is_part_of_a_run(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    mean = tmp_path / "mean.npy"
    np.save(mean, np.full((8, 8, 3), 100, np.float32))
    config = tiny(*SHORT, f"data.mean_from={mean}")
    assert train(config).exit == 0
    saved = checkpoints.at(config.folder).config
    assert saved.data.mean_sha256 == sha256(mean)
    mean.rename(tmp_path / "moved.npy")
    moved = tiny(*SHORT, f"data.mean_from={tmp_path / 'moved.npy'}")
    assert train(moved).exit == 0, "where it lies does not count"
    np.save(mean, np.full((8, 8, 3), 101, np.float32))
    with pytest.raises(
        ConfigError, match=r"data\.mean_sha256: '[0-9a-f]{64}' there, '[0-9a-f]{64}"
    ):
        train(config)
    np.save(mean, np.arange(6, dtype=np.float32).reshape(3, 2, 1).T)  # by columns
    assert read_array(mean).tolist() == [[[0, 2, 4], [1, 3, 5]]]
    statistics = open_for(config).statistics
    with pytest.raises(
        DatasetError, match=r"its SHA-256 is .*, not data\.mean_sha256=.*: name the"
    ):
        Preprocess(saved, statistics, torch.device("cpu"), torch.float32)
    mean.unlink()
    with pytest.raises(
        DatasetError, match=r"data\.mean_from=.*mean\.npy cannot be read: .*missing"
    ):
        train(config)


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (np.full((8, 8, 3), np.nan), "holds NaN or infinity"),
        (np.empty((0, 8, 3)), r"of shape \(0, 8, 3\), but must be"),
    ],
)
def test_a_mean_that_training_could_not_use_is_refused(
    tiny: Callable[..., Config], tmp_path: Path, mean: npt.NDArray[np.float64], said: str
) -> None:
    np.save(tmp_path / "mean.npy", mean)
    config = tiny(f"data.mean_from={tmp_path / 'mean.npy'}")
    statistics = open_for(config).statistics
    with pytest.raises(DatasetError, match=rf"data\.mean_from=.*{said}"):
        Preprocess(config, statistics, torch.device("cpu"), torch.float32)


def test_a_run_from_before_the_hash_of_its_mean_goes_on(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    np.save(tmp_path / "mean.npy", np.full((8, 8, 3), 100, np.float32))
    config = tiny(*SHORT, f"data.mean_from={tmp_path / 'mean.npy'}")
    old = {key: value for key, value in flat(config).items() if key != "data.mean_sha256"}
    (config.folder / "checkpoints/step-00000004").mkdir(parents=True)
    nested = {"data": {"mean_from": old["data.mean_from"]}}
    write_json(config.folder / "config.json", nested)
    assert resolved(config).data.mean_sha256 == "any"
    shutil.rmtree(config.folder)
    assert resolved(config).data.mean_sha256 == sha256(tmp_path / "mean.npy")
