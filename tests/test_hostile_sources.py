"""Untrusted sources, indexes, configs and run folders: each gives the right value or one error, and
takes no more memory, time or stack than its own size justifies."""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare import imagenet as imagenet_module
from alexnet_dist.data.prepare.arrays import read_idx, read_pickle
from alexnet_dist.data.prepare.devkit import read_synsets
from alexnet_dist.data.prepare.prepare import list_source
from alexnet_dist.data.split import INDEX
from alexnet_dist.errors import AlexNetDistError, ConfigError, DatasetError
from alexnet_dist.files import json_object, read_bytes, read_run, within_memory
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress

ROOT = Path(__file__).parent.parent
FEW = settings(
    max_examples=50 * int(os.environ.get("FUZZ", "1")),  # `make drill` looks harder
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Change = tuple[int, int, int, bool]
# Where, in thousandths of a file; the byte there; how many bytes after it go; whether all do.
CHANGES = st.tuples(
    st.integers(0, 999), st.integers(0, 255), st.sampled_from([0, 0, 0, 1, 512]), st.booleans()
)


def changed(sound: bytes, change: Change) -> bytes:
    place, value, less, cut = change
    at = place * len(sound) // 1000
    return sound[:at] + bytes([value]) + (b"" if cut else sound[at + 1 + less :])


def refused(call: Callable[[], Any], match: str, most: int = 48 * 2**20) -> None:
    """It is one line, within seconds and some bytes."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(AlexNetDistError, match=match) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 5
    assert "\n" not in str(caught.value)


# --- files that grow


def test_a_gzip_of_a_million_times_its_size_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28))
        for _ in range(4):
            file.write(bytes(2**24))
    refused(
        lambda: read_idx(path, dims=3), r"1569 values or more, but its header says \(2, 28, 28\)"
    )


@pytest.mark.parametrize("shape", [(5, 0, 28), (2**22, 0, 0), (1, 2**17, 2), (2**21, 1, 1)])
def test_an_idx_header_of_no_images_that_can_be_packed_is_refused_at_once(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + bytes(math.prod(shape)))
    refused(lambda: read_idx(path, dims=3), r"its header says .*(more than|1 to 65,535 rows)")


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (0, 2**32 - 1, 2**32 - 1)])
def test_a_header_beyond_any_memory_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape))
    refused(lambda: read_idx(path, dims=3), "its header says")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r" + struct.pack("<I", 2**23) + b".",
        b"\x80\x02}p8000000\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b".",
        b"\x80\x05\x8e" + struct.pack("<Q", 2**28) + b".",
        b"\x80\x05\x95" + struct.pack("<Q", 2**28) + b".",
        b"\x80\x02" + b"(" * 100_000 + b".",
    ],
    ids=["memo", "memo in text", "bytearray", "bytes", "frame", "marks"],
)
def test_a_pickle_takes_no_more_memory_than_its_size(content: bytes) -> None:
    refused(lambda: read_pickle(content, "batch"), "batch is not a pickle of CIFAR-10")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}" + b"}" * 2**22 + b".", "more than 262,144 opcodes"),
        (b"\x80\x02}" + b"(\x8a\x09" + b"\xff" * 8 + b"\0" + b"K\0u.", "such a file does not need"),
        # The same million letters to bytes, again and again.
        (b"\x80\x02}(" + pickle.dumps("a" * 10**6, 2)[2:-1] + b"q\1c_codecs\nencode\nq\2"
         + b"h\2h\1U\1x\x86R" * 5000 + b"u.", "more bytes than its own length"),
    ],
    ids=["dictionaries", "numbers that share a hash", "text again and again"],
)  # fmt: skip
def test_a_pickle_is_counted_before_it_is_read(content: bytes, said: str) -> None:
    refused(lambda: read_pickle(content, "batch"), said)


def test_memory_is_bounded_where_a_library_would_not() -> None:
    much = 2**33  # more than any heap kept from earlier tests could give without asking
    with pytest.raises(MemoryError), within_memory(2**26):
        np.empty(much, np.uint8)
    assert np.empty(much, np.uint8).size == much  # asked for, never touched


# --- archives


def imagenet_of(folder: Path, inner: bytes) -> Path:
    """ImageNet's three files, with this tar of the first class, and no images of the others."""
    source = made.imagenet(folder, 1, 1)
    first, *others = (f"{wnid}.tar" for wnid in made.WNIDS)
    members = {first: inner} | dict.fromkeys(others, made.NOTHING)
    made.tar_of(source / "ILSVRC2012_img_train.tar", members)
    return source


def tar_with(size: bytes, kind: bytes = b"0", rest: bytes = b"") -> bytes:
    """A member whose header says a size, as 12 raw bytes."""
    member = tarfile.TarInfo("a.JPEG")
    member.type = kind
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + rest + bytes(1024)


@pytest.mark.parametrize(
    "inner",
    [
        # The second header, for ever: it has -512 bytes.
        tar_with(b"0" * 11 + b"\0")[:512] + tar_with(b"\xff" * 10 + b"\xfe\x00"),
        tar_with(b"\xff" * 10 + b"\xfe\x00", b"L"),
        tar_with(b"00010000000\0", b"x", b"1" * 2**21),  # quadratic in tarfile's patterns
        tar_with(b"00010000000\0", b"L", b"a" * 2**21),
    ],
    ids=["backwards", "name backwards", "pax", "long name"],
)
def test_a_tar_that_would_keep_us_for_ever_is_refused(inner: bytes, tmp_path: Path) -> None:
    source = imagenet_of(tmp_path / "source", inner)
    refused(lambda: list_source("imagenet", source), "its tar's header gives it")


def pax(body: bytes, kind: bytes = b"x") -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    "inner",
    [
        pax(b"9" * 15000 + b" x") * 200 + tar_with(b"0" * 12),
        pax(b"9 a=bcde\n") * 9 + tar_with(b"0" * 12),
        (pax(b"9 a=bcde\n" * 1000, b"g") + tar_with(b"0" * 12)[:512]) * 2 + bytes(1024),
    ],
    ids=["digits", "many", "global"],
)
def test_a_tars_own_headers_are_counted(inner: bytes, tmp_path: Path) -> None:
    source = imagenet_of(tmp_path / "source", inner)
    refused(lambda: list_source("imagenet", source), "unusual pax headers")


def test_a_packed_tar_of_a_thousand_times_its_size_is_not_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "cifar-10-python.tar.gz", "wb", compresslevel=1) as file:
        for _ in range(17):
            file.write(bytes(2**24))
    refused(lambda: list_source("cifar10", tmp_path), "it unpacks to more than", 2**30)


def test_a_tar_with_pax_headers_of_today_is_read(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT,
                      pax_headers={"comment": "0123456789" * 4}) as tar:  # fmt: skip
        for n in range(3):
            member = tarfile.TarInfo("ż" * 300 + f"{n}.JPEG")
            member.pax_headers, member.mtime = {"SCHILY.xattr.user.a": "x" * 900}, 1.234567891
            tar.addfile(member)
    found = list_source("imagenet", imagenet_of(tmp_path / "source", inner.getvalue()))
    names = [item.name for item in found.splits["train"]]
    assert names == [f"{'ż' * 300}{n}.JPEG" for n in range(3)]


def test_a_damaged_header_does_not_shorten_a_listing_in_silence(tmp_path: Path) -> None:
    inner = io.BytesIO()
    made.tar_of(inner, {f"{n}.JPEG": b"x" * 600 for n in range(3)})
    sound, at = inner.getvalue(), 1536  # the second header
    source = imagenet_of(tmp_path / "source", sound)
    assert len(list_source("imagenet", source).splits["train"]) == 3
    for bad in (sound[:at] + b"?" * 10 + sound[at + 10 :], sound[: 2 * at]):
        source = imagenet_of(tmp_path / f"{len(bad)}", bad)
        with pytest.raises(DatasetError, match=r"damaged or cut short at byte \d+"):
            list_source("imagenet", source)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("sources")
    cifar = made.cifar10(root / "cifar10", 2, 2)
    with tarfile.open(cifar / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(cifar / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(cifar / "cifar-10-batches-py")
    # The same meta.mat again and again need not start a process again and again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet_module, "read_synsets", functools.cache(read_synsets))
        yield {"imagenet": made.imagenet(root / "imagenet", 2, 4), "cifar10": cifar}


@FEW
@given(st.sampled_from(["train.tar", "val.tar", "devkit", "cifar-10"]), CHANGES)
def test_any_change_of_a_sources_files_is_an_error_or_the_same_number_of_images(
    sources: dict[str, Path], which: str, change: Change
) -> None:
    kind = "cifar10" if which == "cifar-10" else "imagenet"
    (path,) = sources[kind].glob(f"*{which}*")
    sound = path.read_bytes()
    expected = {"imagenet": [8, 4], "cifar10": [10, 2]}[kind]
    try:
        path.write_bytes(changed(sound, change))
        with contextlib.suppress(DatasetError):
            found = list_source(kind, sources[kind]).splits
            assert [len(items) for items in found.values()] == expected
    finally:
        path.write_bytes(sound)


@settings(FEW, max_examples=FEW.max_examples // 8)
@given(CHANGES)
def test_any_change_of_meta_mat_is_classes_or_an_error(
    sources: dict[str, Path], change: Change
) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(read_synsets(changed(meta_mat(sources["imagenet"]), change)), list)


def test_a_meta_mat_that_kills_scipys_reader_is_an_error(sources: dict[str, Path]) -> None:
    """By SIGSEGV with scipy 1.17.1."""
    with pytest.raises(ValueError, match=r"meta\.mat: its reader ended with code -?\d+"):
        read_synsets(changed(meta_mat(sources["imagenet"]), (550, 80, 0, False)))


def meta_mat(source: Path) -> bytes:
    (path,) = source.glob("*devkit*")
    with tarfile.open(path) as tar:
        return tar.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()  # type: ignore[union-attr]


@FEW
@given(CHANGES)
def test_any_change_of_a_pickle_is_a_dictionary_or_an_error(change: Change) -> None:
    labels, data = [1, 2], np.zeros((2, 3072), np.uint8)
    sound = pickle.dumps({b"labels": labels, b"data": data}, protocol=2)
    with contextlib.suppress(DatasetError):
        assert isinstance(read_pickle(changed(sound, change), "batch"), dict)


@FEW
@given(st.booleans(), CHANGES)
def test_any_change_of_an_idx_file_is_its_shape_or_an_error(
    tmp_path: Path, packed: bool, change: Change
) -> None:
    sound = bytes([0, 0, 8, 2]) + struct.pack(">2I", 3, 40) + bytes(range(120))
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(changed(gzip.compress(sound, mtime=0) if packed else sound, change))
    with contextlib.suppress(DatasetError):
        assert read_idx(path, dims=2).size == 120


# --- the index of a packed data set


def forged(packed: Path, to: Path, index: bytes) -> Path:
    """A data set with another index, whose size and hash are right."""
    if not to.exists():
        shutil.copytree(packed, to)
    meta = json.loads((packed / "dataset.json").read_text())
    entry = meta["splits"]["train"]["index"]
    (to / entry["file"]).write_bytes(index)
    entry |= {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    (to / "dataset.json").write_text(json.dumps(meta))
    return to


@FEW
@given(CHANGES, st.integers(0, 140))
def test_any_index_reads_inside_its_shards_or_is_an_error(
    packed: Path, tmp_path: Path, change: Change, header: int
) -> None:
    """Its hashes fit: a change in the header, or of any record."""
    sound = (packed / "train" / "samples.npy").read_bytes()
    for content in (changed(sound, change), sound[:header] + changed(sound[header:], change)):
        with contextlib.suppress(DatasetError):
            split = open_dataset(forged(packed, tmp_path / "copy", content)).splits["train"]
            assert split.index.dtype == INDEX
            assert split.labels(np.arange(len(split))).max() < 10
            for sample in range(0, len(split), 7):
                with contextlib.suppress(DatasetError):
                    assert split.read(sample)
            split.close()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\3\4", b"\x80\x04N.", b"\x93NUMPY\1\0", b"\x93NUMPY\7\0\2\0{}",
        b"\x93NUMPY\1\0\x40\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}" + b" " * 9,
        b"\x93NUMPY\1\0\x60\0"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999,)}".ljust(96),
        b"\x93NUMPY\1\0\x60\0" + (b"{'descr': " + b"(" * 80).ljust(96),
        b"\x93NUMPY\2\0\xff\xff\xff\x7f{}",
    ],
)  # fmt: skip
def test_what_is_no_array_is_refused(packed: Path, tmp_path: Path, content: bytes) -> None:
    copy = forged(packed, tmp_path / "copy", content)
    refused(lambda: open_dataset(copy), r"is not an array|must be|is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"kind": "a\x1b[2J"}}, {"source": {}}, {"source": 3}, {"splits": {"../up": {}}},
        {"splits": {"a\x1b[2J": {}}}, {"splits": {"": {}}},
    ],
)  # fmt: skip
def test_names_in_a_description_are_names(
    packed: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """`inspect` prints them."""
    meta = json.loads((packed / "dataset.json").read_text()) | change
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    refused(lambda: open_dataset(tmp_path), r"dataset\.json is damaged")


# --- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: " + "[" * 50_000, "nested more than 20 levels"),
        ("- " * 50_000, "nested more than 20 levels"),
        ("a0: xxxxxxxxxx\n" + "".join(f"a{n + 1}: ${{a{n}}}${{a{n}}}\n" for n in range(30)),
         "more than 10 interpolations"),
        ("seed: &a [1]\nname: *a", "has aliases"),
        ("0", "a single value"),
        ("x" * 300_000, "longer than 200,000 bytes"),
        ('data: {path: "a\\0b"}', r"data\.path='a\\x00b': must be text without control"),
        ('output_dir: "a\\e[2Jb"', "must be text without control characters"),
    ],
    ids=["nested", "lists", "interpolations", "aliases", "number", "long", "NUL", "escape"],
)  # fmt: skip
def test_a_config_that_would_grow_or_steer_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(lambda: load_config([tmp_path / "bad.yaml"]), message)


@FEW
@given(st.one_of(st.binary(max_size=200), CHANGES))
def test_any_bytes_are_a_config_or_a_config_error(tmp_path: Path, content: bytes | Change) -> None:
    sound = (ROOT / "configs" / "demo.yaml").read_bytes()
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else changed(sound, content))
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config([path]), Config)


@settings(FEW, max_examples=20)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_argument_is_a_config_or_a_config_error(key: str, value: str) -> None:
    for argument in (f"{key}={value}", f"name={value}"):
        with contextlib.suppress(ConfigError):
            config = load_config([argument])
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.name)


# --- run folders


@pytest.mark.parametrize(
    "content",
    [
        b"[1]", b"3", b"[" * 10_000, b"\xff", b'{"attempt": "x"}', b'{"attempt": 1e999}',
        b'{"state": "failed", "resumed_at": "x", "idle_restarts": []}', b'{"attempt": NaN}',
        b'{"kept_s": -1, "first_started": null, "newest_step": {}}',
    ],
)  # fmt: skip
def test_a_run_json_of_anything_is_begun_anew(content: bytes, tiny: Callable[..., Config]) -> None:
    folder = RunFolder(tiny())
    folder.path.mkdir(parents=True)
    (folder.path / "run.json").write_bytes(content)
    folder.take()
    assert read_run(folder.path)["attempt"] == 1


@pytest.mark.parametrize(
    "line", [b"[1]", b"3", b"x", b"\xff", b'{"step": "x", "kind": "eval"}', b"[" * 10_000,
             b'{"step": 2, "kind": "other"}', b'{"step": 2}'],
)  # fmt: skip
def test_a_line_of_metrics_that_is_no_point_costs_that_line(line: bytes, tmp_path: Path) -> None:
    point = {"step": 1, "kind": "train", "epoch": 0.5, "loss": 2.5, "top1": 0.5, "top5": 1.0}
    sound = json.dumps(point).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(sound + line + b"\n" + sound)
    assert read_metrics(tmp_path) == [point] * 2


@pytest.mark.parametrize("state", [{}, {"score": 3}, {"score": {"top9": 1}}])
def test_a_progress_that_no_run_writes_is_no_progress(state: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):  # which a resuming run makes one line of
        Progress.of(state)


@FEW
@given(st.binary(max_size=60))
def test_json_is_an_object_or_a_value_error(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(json_object(content), dict)


def test_a_file_longer_than_its_bound_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="longer than 1,000 bytes"):
        read_bytes(tmp_path / "sparse", 1000)


# --- what is suggested


def test_tensorboard_is_only_ever_suggested_on_localhost() -> None:
    """It has no passwords."""
    files = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.yaml", "*.sbatch", "Makefile"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    suggested = [line for line in lines if "tensorboard --log" + "dir" in line]
    assert len(suggested) >= 2
    assert all("--host localhost" in line for line in suggested)
