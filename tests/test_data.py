"""Packed data sets, the sample stream and the torch pipeline; also when anything is damaged."""

import ast
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import alexnet_dist, as_overrides, assert_close, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from made import SAMPLE, write_idx
from torchvision.io import decode_image, encode_jpeg

import alexnet_dist as package_of_ours
import launch
from alexnet_dist.config.from_data import NO_SPLIT
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, fingerprint
from alexnet_dist.data import loops
from alexnet_dist.data.batch import Batch, Metadata
from alexnet_dist.data.dataset import Dataset, Statistics, open_dataset, open_for, verify_shards
from alexnet_dist.data.pipelines.make import make_pipeline, train_batches
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.data.prepare.arrays import read_idx
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.preprocess import Preprocess, on_canvas
from alexnet_dist.data.sampler import TrainSampler, evaluation_plan, lighting_axes, views
from alexnet_dist.data.split import INDEX, Split
from alexnet_dist.errors import ConfigError, DatasetError, in_words
from alexnet_dist.files import sha256, within_memory
from alexnet_dist.parallel import spawn
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.reporting import doctor
from alexnet_dist.training import loop

# --- preparing


def test_the_bundled_sample_is_stratified_and_small() -> None:
    for stem, per_class in (("train", 1000), ("t10k", 200)):
        labels = read_idx(SAMPLE / f"{stem}-labels-idx1-ubyte.gz", dims=1)
        assert np.bincount(labels).tolist() == [per_class] * 10
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 6_000_000
    assert "Zalando" in (SAMPLE / "LICENSE").read_text()


def test_a_packed_data_set_holds_the_sources_images(packed: Path) -> None:
    from torchvision.io import decode_image

    dataset = open_dataset(packed)
    verify_shards(dataset, Topology())
    assert len(dataset.classes) == 10
    for split, stem, count in (("train", "train", 60), ("test", "t10k", 23)):
        images = read_idx(SAMPLE / f"{stem}-images-idx3-ubyte.gz", dims=3)
        labels = read_idx(SAMPLE / f"{stem}-labels-idx1-ubyte.gz", dims=1)
        samples = dataset.splits[split]
        assert len(samples) == count
        np.testing.assert_array_equal(samples.labels(np.arange(count)), labels[:count])
        for sample in range(count):
            encoded = torch.tensor(list(samples.read(sample)), dtype=torch.uint8)
            np.testing.assert_array_equal(decode_image(encoded)[0], images[sample])


def test_shards_are_webdatasets_tars(packed: Path) -> None:
    with tarfile.open(packed / "test" / "shard-00000.tar") as tar:
        names = tar.getnames()
        first = tar.extractfile("00000000.cls")
        assert first is not None
        label = int(first.read())
    assert names[:4] == ["00000000.png", "00000000.cls", "00000001.png", "00000001.cls"]
    assert len(names) == 46
    assert label == open_dataset(packed).splits["test"].index["label"][0]


def test_statistics_are_numpys_over_all_training_pixels(packed: Path) -> None:
    statistics = open_dataset(packed).statistics
    images = read_idx(SAMPLE / "train-images-idx3-ubyte.gz", dims=3)[:60].astype(np.float64)
    assert_close(statistics.mean_image, np.repeat(images.mean(0)[..., None], 3, 2), 1e-5)
    assert_close(statistics.mean_rgb, [images.mean()] * 3, 1e-10)
    pixels = np.repeat(images.reshape(-1, 1), 3, axis=1)
    covariance = np.cov(pixels.T, bias=True)
    rebuilt = (statistics.eigenvectors.T * statistics.eigenvalues) @ statistics.eigenvectors
    assert_close(rebuilt, covariance, 1e-8 * covariance.max())


def test_preparing_again_gives_the_same_bytes_or_says_done(tmp_path: Path) -> None:
    idx = write_idx(tmp_path / "idx", 30, 10)
    for name in ("a", "b"):
        assert "packed 30 train, 10 test" in prepare("fashion_mnist", idx, tmp_path / name)
    for path in (tmp_path / "a").rglob("*.*"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.is_dir() or path.read_bytes() == other.read_bytes()
    for options in (Options(), Options(part=(2, 3))):
        said = prepare("fashion_mnist", idx, tmp_path / "a", options)
        assert said.endswith("already prepared from these files, and complete")
    other = write_idx(tmp_path / "idx2", 31, 10)
    with pytest.raises(DatasetError, match="made from other files or with other options: name"):
        prepare("fashion_mnist", other, tmp_path / "a")


def test_idx_files_need_not_be_gzipped(tmp_path: Path) -> None:
    idx = write_idx(tmp_path / "idx", 20, 10)
    for path in list(idx.iterdir()):
        (idx / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert "packed 20 train" in prepare("fashion_mnist", idx, tmp_path / "out")


@pytest.mark.parametrize("damage", ["torn", "removed", "list"])
def test_preparing_over_a_damaged_data_set_says_so(tmp_path: Path, damage: str) -> None:
    idx = write_idx(tmp_path / "idx", 20, 10)
    prepare("fashion_mnist", idx, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    content = {"torn": path.read_text()[:50], "list": "[]"}.get(damage)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DatasetError, match=r"(not a packed|cannot be|is damaged).*another OUT"):
        prepare("fashion_mnist", idx, tmp_path / "out")


@pytest.mark.parametrize(
    "named", ["photos", "photos/train", "photos/train/ant", "photos/a b", "training/photos"]
)
def test_a_folder_of_images_is_told_how_to_pack_it(tmp_path: Path, named: str) -> None:
    made.image_folder(tmp_path / "photos", 2, 1)
    for other in ("photos/a b", "training/photos"):  # the latter, of a project called training
        made.image_folder(tmp_path / other, 1, 1)
    given = tmp_path / named
    root = tmp_path / named.partition("/train")[0]
    line = shlex.join(["alexnet-dist", "prepare", "folder", f"{root}", f"{root}-packed"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match=r"holds images .*, not a packed data set") as caught:
        open_dataset(given)
    assert f"`{line}`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_set_that_is_not_finished_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.partial").mkdir()
    with pytest.raises(DatasetError, match=r"partial: not finished: .*ues, and name /.*mine$"):
        open_dataset(tmp_path / "mine.partial")


def test_a_data_set_that_this_user_may_not_read_is_its_owners_to_open(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("alexnet_dist.data.dataset.read_bytes", refused)
    with pytest.raises(DatasetError, match=r"dataset\.json cannot .* have \w+ let you read it"):
        open_dataset(packed)


def test_every_command_says_that_images_are_images(
    tmp_path: Path, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launch.submit` and `inspect` open data sets as these do."""
    monkeypatch.setattr(spawn, "call", lambda *_: [0.002, 0.001])  # the doctor's exchange
    photos = made.image_folder(tmp_path / "photos", 2, 1)
    config = tiny(f"data.path={photos}", "layout.kind=one")
    result = alexnet_dist("train", *as_overrides(config))
    assert result.returncode == 1
    found = {one.what: one for one in doctor.examine(config, named=True)}
    for said in (result.stderr, found["data"].remedy):
        assert f"`alexnet-dist prepare folder {photos} {photos}-packed`" in said
        assert said.count("holds images") == 1


def test_prepare_never_fills_or_names_for_removal_what_it_did_not_make(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "photos", 2, 1)
    taken = made.image_folder(tmp_path / "out.partial", 1, 1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "note.txt").write_text("mine")
    other = "exists, but is not a packed data set: name another OUT"
    for out, said in (
        (
            tmp_path / "out",
            "out.partial holds '.*', which `prepare` did not make: name another OUT",
        ),
        (source, other),
        (tmp_path / "own", other),
        (tmp_path / "own" / "note.txt", other),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DatasetError, match=said):
            prepare("folder", source, out)
        assert sorted(tmp_path.rglob("*")) == before
    assert taken.exists()


def test_no_message_advises_to_remove_anything() -> None:
    """Whatever it is, it may be a user's own. Docstrings say what we do ourselves."""
    for package in (package_of_ours, launch):
        for path in Path(package.__file__).parent.rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            documented = [node.value for node in nodes if isinstance(node, ast.Expr)]
            for node in nodes:
                if isinstance(node, ast.Constant) and node not in documented:
                    found = re.search(r"\b(remove|delete|erase|rm)\b[^A-Z_]", f"{node.value} ")
                    assert not found or node.value == "rm", (path, node.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3", lambda raw: None, "neither .* nor .*dataset-fashion.* a sample: "),
        ("train-images-idx3", lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        ("train-images-idx3", lambda raw: b"hello", "cannot be read"),
        ("train-labels-idx1", lambda raw: gzip.compress(raw[:-1]), "29 values, but its header"),
        ("train-labels-idx1", lambda raw: gzip.compress(b"\0\0\x0d\1" + raw[4:]), "not an IDX"),
        ("train-labels-idx1", lambda raw: gzip.compress(raw[:-1] + b"\x0a"), "labels up to 10"),
        ("t10k-labels-idx1", lambda raw: gzip.compress(b"\0\0\x08\1\0\0\0\1\0"), "1 labels"),
    ],
)  # fmt: skip
def test_a_bad_source_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes | None], message: str
) -> None:
    idx = write_idx(tmp_path / "idx", 30, 10)
    path = idx / f"{name}-ubyte.gz"
    changed = change(gzip.decompress(path.read_bytes()))
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    with pytest.raises(DatasetError, match=message):
        prepare("fashion_mnist", idx, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_an_array_or_a_dataset_error(content: bytes, headed: bool) -> None:
    with tempfile.NamedTemporaryFile(suffix=".idx") as file:
        Path(file.name).write_bytes(b"\0\0\x08\1" + content if headed else content)
        with contextlib.suppress(DatasetError):
            assert read_idx(Path(file.name), dims=1).ndim == 1


def resolved_where(config: Config, folders: list[Path]) -> str:
    """Why a run cannot begin on ranks that each work in a folder of their own."""
    os.chdir(folders[int(os.environ["RANK"])])
    try:
        loop._resolve(config, connect(config))
    except DatasetError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_data_sets_do_not_begin(
    packed: Path, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    """As where each node has a copy on its own disk."""
    shutil.copytree(packed, tmp_path / "here" / "data")
    shutil.copytree(packed, tmp_path / "there" / "data")
    config = tiny("data.path=data", "layout.kind=replicas", "layout.ranks=2")
    folders = [tmp_path / "here", tmp_path / "there"]
    assert on_ranks(2, resolved_where, config, folders) == ["", ""]
    about = tmp_path / "there" / "data" / "dataset.json"
    about.write_text(about.read_text() + " ")
    said = on_ranks(2, resolved_where, config, folders)
    assert all("data.path='data': rank 1, on " in one for one in said), said
    edit_json(lambda m: m["classes"].append("zebra"))(tmp_path / "there" / "data")
    said = on_ranks(2, resolved_where, config, folders)
    assert all("data.path='data': rank 1, on " in one for one in said), said
    shutil.rmtree(tmp_path / "there" / "data")
    said = on_ranks(2, resolved_where, config, folders)
    assert said[0] == said[1] != ""


# --- damage


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        meta = json.loads((root / "dataset.json").read_text())
        change(meta)
        (root / "dataset.json").write_text(json.dumps(meta))

    return edit


def edit_index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the training index and what dataset.json says of it, as a hostile hand would."""

    def edit(root: Path) -> None:
        path = root / "train" / "samples.npy"
        index = np.load(path)
        change(index)
        np.save(path, index)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_json(lambda m: m["splits"]["train"]["index"].update(sha256=digest))(root)

    return edit


def flip(name: str, offset: int) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[offset] ^= 1
        (root / name).write_bytes(content)

    return edit


def pickled(root: Path) -> None:
    """An index that would run code if unpickled."""
    path = root / "train" / "samples.npy"
    np.save(path, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    described = {"sha256": digest, "size": size}
    edit_json(lambda m: m["splits"]["train"]["index"].update(described))(root)


def no_mean(root: Path) -> None:
    """A mean image without pixels, as dataset.json describes it."""
    path = root / "mean.npy"
    np.save(path, np.empty((0, 0, 3), np.float32))
    described = {"size": path.stat().st_size, "sha256": sha256(path)}
    edit_json(lambda m: m["mean_image"].update(described))(root)


def pipe(root: Path) -> None:
    """A file that cannot be read, where its size is right."""
    (root / "mean.npy").unlink()
    os.mkfifo(root / "mean.npy")
    edit_json(lambda m: m["mean_image"].update(size=0))(root)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no dataset.json", lambda r: (r / "dataset.json").unlink(), "dataset.json is missing: make"),
    ("a file", lambda r: [shutil.rmtree(r), r.touch()], "dataset.json is missing: make the data"),
    ("torn dataset.json", lambda r: (r / "dataset.json").write_text('{"ver'), "cannot be read"),
    ("a list", lambda r: (r / "dataset.json").write_text("[]"), "a list, not an object"),
    ("no splits", edit_json(lambda m: m.pop("splits")), "is damaged .*'splits'"),
    ("another version", edit_json(lambda m: m.update(version=9)), "version 9, but this program"),
    ("no shard", lambda r: (r / "train/shard-00000.tar").unlink(), "shard-00000.tar cannot be"),
    ("short shard", lambda r: (r / "train/shard-00000.tar").write_bytes(b"x"), "1 bytes, but"),
    ("flipped shard", flip("train/shard-00000.tar", 600), "shard-00000.tar: SHA-256"),
    ("no index", lambda r: (r / "train/samples.npy").unlink(), "samples.npy cannot be read"),
    ("flipped index", flip("train/samples.npy", 200), "samples.npy: SHA-256"),
    ("flipped mean", flip("mean.npy", 200), "mean.npy: SHA-256"),
    ("empty mean", no_mean, "colour statistics that training could not use"),
    ("negative", edit_json(lambda m: m.update(eigenvalues=[3, 2, -1])), "colour statistics that"),
    ("no file", pipe, r"mean\.npy cannot be read \(a pipe, not a file"),
    ("class", edit_index(lambda i: i["label"].put(3, 10)), "sample 3 has class 10, out of range"),
    ("offset", edit_index(lambda i: i["offset"].put(4, 2**40)), "sample 4 lies outside its shard"),
    ("shard number", edit_index(lambda i: i["shard"].put(5, 7)), "sample 5 lies outside its"),
    ("wrapping offset", edit_index(lambda i: i["offset"].put(6, 2**64 - 1)), "sample 6 lies out"),
    ("count", edit_json(lambda m: m["splits"]["train"].update(samples=9)), "60 samples, but"),
    ("pickle", pickled, "object in 1 dimensions"),
    ("../", edit_json(lambda m: m["splits"]["train"]["shards"][0].update(file="../x.tar")),
     r"names a file that it may not, '\.\./x\.tar'"),
    ("absolute", edit_json(lambda m: m["mean_image"].update(file="/etc/x.npy")), "names a file"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_one_clear_error(
    packed: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    root = tmp_path / "data"
    shutil.copytree(packed, root)
    damage(root)
    with pytest.raises(DatasetError, match=message) as caught:
        verify_shards(open_dataset(root), Topology())
    assert "\n" not in str(caught.value)


def of_shards(config: Config, count: int) -> Dataset:
    """The config's data set as if its training split had so many shards, which do not exist."""
    dataset = open_for(config)
    whole = dataset.splits["train"]
    shards = tuple(whole.shards[0].with_name(f"{n}.tar") for n in range(count))
    return dataclasses.replace(dataset, splits={"train": dataclasses.replace(whole, shards=shards)})


@pytest.mark.parametrize(("ranks", "cores"), [(1, 1), (1, 3), (2, 3), (3, 1)])
def test_every_shard_is_hashed_once_by_ranks_of_threads(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, ranks: int, cores: int
) -> None:
    dataset, hashed = of_shards(tiny(), 8), list[int]()
    monkeypatch.setattr(Split, "check_shard", lambda self, number: hashed.append(number))
    for rank in range(ranks):
        verify_shards(dataset, Topology(global_rank=rank, world_size=ranks, cores=cores))
    assert sorted(hashed) == [*range(8)]


def test_ranks_of_unequal_cores_meet_equally_often_while_they_hash(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the ranks of the larger node would wait for ever in another collective."""
    dataset, hashed = of_shards(tiny(), 40), list[int]()
    met = [0, 0]
    monkeypatch.setattr(Split, "check_shard", lambda self, number: hashed.append(number))
    for rank, cores in enumerate((1, 3)):
        topology = Topology(global_rank=rank, world_size=2, cores=cores)

        def met_by(self: Topology, text: str, rank: int = rank) -> str:
            met[rank] += 1
            return text

        monkeypatch.setattr(Topology, "first_message", met_by)
        verify_shards(dataset, topology)
    assert sorted(hashed) == [*range(40)]
    assert met[0] == met[1] > 1


@pytest.mark.parametrize("split", ["train", "test"])  # of two ranks each hashes one
def test_a_damaged_data_set_stops_training_before_it_starts(
    split: str, tiny: Callable[..., Config], packed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(packed, root)
    flip(f"{split}/shard-00000.tar", 600)(root)
    result = alexnet_dist("train", *as_overrides(tiny(f"data.path={root}")))
    assert result.returncode == 1
    assert result.stderr.startswith(f"alexnet-dist: {root}/{split}/shard-00000.tar: SHA-256")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_sample_damaged_later_is_found_by_its_checksum(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(packed, root)
    split = open_dataset(root).splits["train"]
    split.read(2)
    flip("train/shard-00000.tar", int(split.index["offset"][2]) + 40)(root)
    with pytest.raises(DatasetError, match=r"sample 2 of split 'train' .* does not match"):
        split.read(2)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_is_read_as_each_of_its_samples_is(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """In one call, by its whole ones alone; what is damaged in any way is named as by itself."""
    root = tmp_path / "data"
    shutil.copytree(packed, root)
    split = open_dataset(root).splits["train"]
    assert loops.can_read()
    monkeypatch.setattr(loops, "can_read", lambda: compiled)
    one_by_one = []
    read = Split.read
    monkeypatch.setattr(Split, "read", lambda self, i: one_by_one.append(i) or read(self, i))
    order = np.random.default_rng(0).permutation(len(split))
    found, encoded, why = split.read_with_warnings(order)
    assert one_by_one == ([] if compiled else order.tolist())
    assert found.tolist() == order.tolist()
    assert [bytes(one) for one in encoded] == [bytes(read(split, i)) for i in order.tolist()]
    assert not why
    assert [len(part) for part in split.read_with_warnings(order[:0])] == [0, 0, 0]

    # A flipped byte, a header of another size, and a shard that loses its end while it is open.
    offsets, index = split.index["offset"], split.index
    flip("train/shard-00000.tar", int(offsets[7]) + 40)(root)
    index["height"][20] += 1
    os.truncate(root / "train/shard-00000.tar", int(offsets[50]) + 5)
    one_by_one.clear()
    found, encoded, why = split.read_with_warnings(np.array([6, 7, 20, 49, 50, 59]))
    assert found.tolist() == [6, 8, 21, 49, 0, 0]
    assert bytes(encoded[1]) == bytes(read(split, 8))
    assert [*why] == [1, 2, 4, 5]
    assert not compiled or not {6, 49} & {*one_by_one}
    for place, sample in ((1, 7), (2, 20), (4, 50), (5, 59)):
        with pytest.raises(DatasetError) as alone:
            read(split, sample)
        assert why[place] == f"{alone.value}: sample {found[place]} is read instead"
    split.close()
    (root / "train/shard-00000.tar").unlink()
    with pytest.raises(DatasetError, match=r"sample 3 .*cannot be read .*no other sample"):
        split.read_with_warnings(np.array([3]))


def test_each_pipeline_has_files_of_its_own(tiny: Callable[..., Config]) -> None:
    """An evaluation on the training split closes none that training reads."""
    config = tiny()
    dataset = open_for(config)
    training, evaluation = (make_pipeline(config, Topology(), dataset, "train") for _ in range(2))
    split, ours = training.split, evaluation.split
    before = split.read_with_warnings(np.arange(9))
    ours.read_with_warnings(np.arange(9))
    held = split._descriptors.tolist()
    evaluation.close()
    assert split._descriptors.tolist() == held
    again = split.read_with_warnings(np.arange(9))
    training.close()
    assert [bytes(one) for one in before[1]] == [bytes(one) for one in again[1]]
    assert ours.read_with_warnings(np.arange(9))[0].tolist() == [*range(9)]  # opened anew


@contextlib.contextmanager
def few_files(most: int, hard: int) -> Iterator[None]:
    """Allow so many more open files at first, and `hard` more when this is asked for."""
    here, before = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    get, of_process = resource.getrlimit, resource.setrlimit
    with pytest.MonkeyPatch.context() as patch:
        # The real hard limit could not be raised again.
        patch.setattr(resource, "getrlimit", lambda kind: (get(kind)[0], here + hard))
        patch.setattr(
            resource, "setrlimit", lambda kind, limits: of_process(kind, (limits[0], before[1]))
        )
        of_process(resource.RLIMIT_NOFILE, (here + most, before[1]))
        try:
            yield
        finally:
            of_process(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_open_files_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ImageNet's 1,282 shards, where 1,024 files may be open."""
    monkeypatch.setattr("alexnet_dist.data.prepare.packing.ITEMS_PER_SHARD", 1)
    prepare("fashion_mnist", write_idx(tmp_path / "idx", 60, 1), tmp_path / "data")
    warm = open_dataset(tmp_path / "data").splits["train"]
    warm.read_with_warnings(np.arange(1))  # imports and compiles, which opens files too
    warm.read(0)
    warm.close()
    for hard, enough in ((300, True), (40, False)):
        with few_files(20, hard):
            split = open_dataset(tmp_path / "data").splits["train"]
            try:
                if enough:
                    _, _, damaged = split.read_with_warnings(np.arange(60))
                    assert not damaged
                else:
                    with pytest.raises(OSError, match="Too many open files") as caught:
                        split.read_with_warnings(np.arange(60))
                    assert "ulimit -n" in f"{in_words(caught.value)}"
            finally:
                split.close()


def test_a_config_must_agree_with_its_data(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"model\.classes=7: .* new network on it with model\.cl"):
        open_for(tiny("model.classes=7"))
    with pytest.raises(ConfigError, match=r"eval_split='val': .* the splits train, test"):
        open_for(tiny("data.eval_split=val"))


LEFT = ("model.classes=0", "data.eval_split=auto")


def test_a_share_of_the_training_images_is_held_out_by_their_checksums(
    tiny: Callable[..., Config],
) -> None:
    whole = open_for(tiny()).splits["train"].index
    config = tiny("data.hold_out=0.3", "data.eval_split=auto")
    assert config.data.eval_split == "held_out"
    splits = open_for(config).splits
    left, held = splits["train"].index, splits["held_out"].index
    assert (held["crc32"] < 0.3 * 2**32).all()
    assert sorted(np.concatenate([left, held]).tolist()) == sorted(whole.tolist())
    assert 5 < len(held) < 30  # of 60
    more = open_for(tiny("data.hold_out=0.5")).splits["held_out"].index
    assert {*held["crc32"]} < {*more["crc32"]}  # a larger share holds the smaller one
    _, (encoded,) = splits["held_out"].read_batch(np.zeros(1, np.int64))
    assert splits["held_out"].read(0) == encoded.tobytes()
    assert "held_out" not in open_for(tiny()).splits
    assert [*splits["test"].index] == [*open_for(tiny()).splits["test"].index]
    with pytest.raises(ConfigError, match=r"eval_split='held_out': .* the splits train, test"):
        open_for(tiny("data.eval_split=held_out"))
    with pytest.raises(DatasetError, match=r"'held_out': the split is empty: .*data\.hold_out"):
        open_for(tiny("data.hold_out=1e-9", "data.eval_split=held_out"))


def test_classes_and_the_evaluation_split_follow_the_data(
    tiny: Callable[..., Config], packed: Path, tmp_path: Path
) -> None:
    assert load_config([]) == load_config(["model.classes=1000", "data.eval_split=val"])
    followed = load_config(["demo", f"data.path={packed}"])
    assert (followed.model.classes, followed.data.eval_split) == (10, "test")
    # Recorded as if it had been typed: the run, and its checkpoints' fingerprint, are the same.
    assert fingerprint(tiny(*LEFT)) == fingerprint(tiny())
    # What is said is not changed; no split is taken that is trained on, empty or not there.
    assert tiny(*LEFT, "model.classes=7").model.classes == 7
    assert tiny(*LEFT, "data.eval_split=train").data.eval_split == "train"
    assert tiny(*LEFT, "data.train_split=test").data.eval_split == NO_SPLIT
    meta = json.loads((packed / "dataset.json").read_text())
    for splits, taken in (
        ({"val": {"samples": 1}, "test": {"samples": 1}}, "val"),
        ({"val": {"samples": 0}, "test": {"samples": 1}}, "test"),
        ({"test": {"samples": 0}}, NO_SPLIT),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps(meta | {"splits": splits}))
        assert tiny(*LEFT, f"data.path={tmp_path}").data.eval_split == taken
    (tmp_path / "dataset.json").write_text(json.dumps(meta | {"classes": ["cat"]}))
    with pytest.raises(ConfigError, match=r"dataset\.json: model\.classes=1: a network needs"):
        tiny(*LEFT, f"data.path={tmp_path}")


@settings(max_examples=50, deadline=None)
@given(st.binary() | st.sampled_from([b"{}", b'{"splits": []}', b'{"splits": {"val": 3}}']))
def test_a_description_that_is_none_leaves_the_papers_values(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "dataset.json").write_bytes(content)
        config = load_config([f"data.path={folder}"])
        assert (config.model.classes, config.data.eval_split) == (1000, "val")


# --- the stream

AXES = Statistics(
    mean_image=np.zeros((4, 4, 3), np.float32),
    mean_rgb=np.zeros(3),
    eigenvalues=np.array([400.0, 100.0, 25.0]),
    eigenvectors=np.eye(3)[[1, 2, 0]],
)


def test_the_stream_is_every_epochs_samples_once(tiny: Callable[..., Config]) -> None:
    sampler = TrainSampler(tiny("train.batch=8"), 20, AXES)
    ids = np.concatenate([sampler.samples(step, range(8)).ids for step in range(15)])
    epochs = ids.reshape(6, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    config = tiny("train.batch=23", "data.train_split=test")
    dataset = open_for(config)
    (batch,) = train_batches(config, Topology(), dataset, 0, 1)
    labels = Metadata.unpack(batch.metadata).labels
    assert sorted(labels.tolist()) == sorted(dataset.splits["test"].index["label"].tolist())


def test_any_slots_of_any_step_are_the_part_of_the_whole(tiny: Callable[..., Config]) -> None:
    whole = TrainSampler(tiny("train.batch=8"), 11, AXES)
    for step in (13, 2, 30):
        expected = whole.samples(step, range(8))
        for slots in (range(3, 8), range(0, 1), range(4, 4)):
            part = TrainSampler(tiny("train.batch=8"), 11, AXES).samples(step, slots)
            for field in ("ids", "corners", "flips", "lighting"):
                np.testing.assert_array_equal(
                    getattr(part, field), getattr(expected, field)[slots.start : slots.stop]
                )


def test_lighting_is_rounded_alike_whatever_the_number_of_samples(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With α and axes whose products cancel, so that a fused multiply-add shows."""
    near_1 = 1 + 2.0**-30
    monkeypatch.setattr(
        "alexnet_dist.network.philox.normals",
        lambda words: [np.full(words[0].shape, alpha) for alpha in (1.0, 0.0, near_1, 0.0)],
    )
    sampler = TrainSampler(tiny("data.lighting=1"), 20, AXES)
    sampler.axes = np.outer([-(near_1**2), 0.0, near_1], np.ones(3))
    alone, beside = (sampler.samples(0, range(count)).lighting[0] for count in (1, 8))
    np.testing.assert_array_equal(alone, beside)


def test_windows_flips_and_lighting_have_their_distributions(tiny: Callable[..., Config]) -> None:
    sampler = TrainSampler(tiny("train.batch=6000"), 3000, AXES)
    drawn = sampler.samples(0, range(6000))
    margin = 72 - 67
    for axis in (0, 1):
        counts = np.bincount(drawn.corners[:, 0, axis], minlength=margin + 1)
        assert len(counts) == margin + 1
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert abs(drawn.flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(6000)
    deviations = 0.1 * np.sqrt(AXES.eigenvalues)[[2, 0, 1]]  # eigenvector i is one colour
    assert np.abs(drawn.lighting.std(0) / deviations - 1).max() < 5 / np.sqrt(12000)


def drawn_by_id(config: Config, epoch: int) -> np.ndarray:
    """What is drawn for each of 3,000 samples in an epoch, in the order of their ids: (6, 3000)."""
    sampler, steps = TrainSampler(config, 3000, AXES), 3000 // config.train.batch
    slots = range(config.train.batch)
    found = [sampler.samples(epoch * steps + step, slots) for step in range(steps)]
    rows = [np.column_stack([s.corners[:, 0], s.flips, s.lighting]) for s in found]
    return np.concatenate(rows)[np.concatenate([s.ids for s in found]).argsort()].T


def test_every_draw_is_of_its_seed_epoch_and_sample(tiny: Callable[..., Config]) -> None:
    """And of nothing else: not of its place in a batch, nor of another draw."""
    found = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        config = tiny("train.batch=3000", f"seed={seed}")
        order = TrainSampler(config, 3000, AXES).samples(epoch, range(3000)).ids.argsort()
        found += [order, *drawn_by_id(config, epoch)]
    correlations = np.corrcoef(found) - np.eye(len(found))
    assert np.abs(correlations).max() < 5 / np.sqrt(3000)
    other = drawn_by_id(tiny("train.batch=500", "seed=1"), 0)
    np.testing.assert_array_equal(other, found[-6:])
    top, left, flips, *_ = drawn_by_id(
        tiny("train.batch=3000", "data.random_crop=false", "data.flip=false"), 0
    )
    assert ({*top, *left}, {*flips}) == ({2}, {0})


def test_lighting_by_eigenvalue_is_the_printed_formula(tiny: Callable[..., Config]) -> None:
    axes = lighting_axes(tiny("data.lighting_by=eigenvalue"), AXES)
    assert_close(axes[0], [0, 400 / 255, 0], 1e-12)


def test_the_ten_views_are_corners_centre_and_flips(tiny: Callable[..., Config]) -> None:
    corners, flips = views(tiny("evaluate.views=10"))
    assert corners[:5].tolist() == corners[5:].tolist()
    assert {tuple(corner) for corner in corners} == {(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)}
    assert flips.tolist() == [False] * 5 + [True] * 5
    assert [a.tolist() for a in views(tiny())] == [[[2, 2]], [False]]


# --- the pipeline


def batches(config: Config, split: str, plan: Any) -> list[Batch]:
    pipeline = make_pipeline(config, Topology(), open_for(config), split)
    found = [decoded.batch() for decoded in pipeline.batches(plan)]
    pipeline.close()
    return found


@pytest.mark.parametrize("size", [(1, 64), (7, 448), (300, 200), (72, 72), (6400, 100)])
def test_up_to_64_times_its_width_an_image_is_resized_whole_to_the_bit(
    size: tuple[int, int],
) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    scale = 72 / min(size)
    whole = F.interpolate(
        image[None], [max(72, round(side * scale)) for side in size], mode="bilinear",
        antialias=True,
    )[0]  # fmt: skip
    top, left = ((side - 72) // 2 for side in whole.shape[1:])
    assert torch.equal(on_canvas(image, 72), whole[:, top : top + 72, left : left + 72])


@pytest.mark.parametrize("length", [1001, 1002, 20_000])
def test_of_a_longer_image_the_centre_is_cut_before_it_is_resized(length: int) -> None:
    ramp = torch.arange(10 * length).reshape(1, 10, length).sin().mul(120).add(128)
    image = ramp.to(torch.uint8)
    whole = F.interpolate(image[None], (72, round(7.2 * length)), mode="bilinear", antialias=True)
    left = (whole.shape[3] - 72) // 2
    near = (on_canvas(image, 72).int() - whole[0, :, :, left : left + 72].int()).abs()
    assert near.float().mean() < 2  # half a pixel of the resized image, where it is odd
    turned = on_canvas(image.transpose(1, 2), 72).transpose(1, 2)
    assert (turned.int() - on_canvas(image, 72).int()).abs().max() <= 1
    with within_memory(2**28):
        assert on_canvas(torch.zeros(3, 1, 65535, dtype=torch.uint8), 256).shape == (3, 256, 256)


@pytest.mark.parametrize("subtract", ["mean_image", "mean_rgb"])
def test_windows_are_cut_flipped_lit_and_scaled_as_drawn(
    tiny: Callable[..., Config], packed: Path, subtract: str
) -> None:
    config = tiny("train.precision=fp64", f"data.subtract={subtract}", "data.divide_by=[60,50,40]")
    dataset = open_for(config)
    sampler = TrainSampler(config, 60, dataset.statistics)
    drawn = sampler.samples(0, range(8))
    (batch,) = batches(config, "train", [drawn])
    images = read_idx(SAMPLE / "train-images-idx3-ubyte.gz", dims=3)
    mean = on_canvas(torch.from_numpy(dataset.statistics.mean_image).movedim(-1, 0), 72).double()
    if subtract == "mean_rgb":
        mean = torch.from_numpy(dataset.statistics.mean_rgb)[:, None, None].expand(3, 72, 72)
    assert batch.windows.shape == (8, 3, 67, 67)
    assert batch.windows.is_contiguous(memory_format=torch.channels_last)
    assert drawn.flips.any()
    assert not drawn.flips.all()
    for n in range(8):
        image = torch.from_numpy(images[drawn.ids[n]].copy())[None]
        centred = on_canvas(image, 72).double() - mean
        top, left = drawn.corners[n, 0]
        window = centred[:, top : top + 67, left : left + 67]
        if drawn.flips[n, 0]:
            window = window.flip(-1)
        lit = window + torch.from_numpy(drawn.lighting[n])[:, None, None]
        expected = lit / torch.tensor([60.0, 50.0, 40.0], dtype=torch.float64)[:, None, None]
        assert_close(batch.windows[n], expected, 1e-12)
    np.testing.assert_array_equal(batch.ids, drawn.ids)
    np.testing.assert_array_equal(batch.labels, dataset.splits["train"].labels(drawn.ids))


def test_batches_do_not_depend_on_threads_or_prefetch(tiny: Callable[..., Config]) -> None:
    found = []
    for workers, prefetch in ((1, 1), (3, 4)):
        config = tiny(f"data.workers={workers}", f"data.prefetch={prefetch}")
        sampler = TrainSampler(config, 60, open_for(config).statistics)
        found.append(batches(config, "train", sampler.plan(0, 9, range(8))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.windows, other.windows)
        assert torch.equal(one.ids, other.ids)


def test_ten_views_are_windows_of_one_image(tiny: Callable[..., Config]) -> None:
    config = tiny("evaluate.views=10", "train.precision=fp32", "data.subtract=mean_rgb")
    (batch,) = batches(config, "test", evaluation_plan(config, [range(3, 5)]))
    assert not batch.lighting.any()
    windows = batch.windows.unflatten(0, (2, 10))
    assert torch.equal(windows[:, 5:], windows[:, :5].flip(-1))
    assert torch.equal(windows[0, 0, :, 5:, 5:], windows[0, 3, :, :-5, :-5])


def test_a_colour_jpeg_off_canvas_is_resized_and_centred(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """A packed data set made by other hands: JPEG, 90 × 120."""
    across = torch.linspace(0, 255, 120).expand(3, 90, 120)
    image = torch.stack([across[0], across[1].flip(1), across[2] * 0 + 80]).byte()
    encoded = encode_jpeg(image, quality=95).numpy().tobytes()
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = len(encoded)
        tar.addfile(member, io.BytesIO(encoded))
    import zlib

    index = np.array([(0, 512, len(encoded), 1, zlib.crc32(encoded), 90, 120)], INDEX)
    config = tiny("data.subtract=nothing", "data.divide_by=[1,1,1]", "train.precision=fp32")
    cpu = torch.device("cpu")
    preprocess = Preprocess(config, AXES, cpu, torch.float32)
    pipeline = TorchPipeline(config, Split("x", (path,), index), cpu, preprocess, 1)
    (decoded,) = pipeline.batches(evaluation_plan(config, [range(1)]))
    batch = decoded.batch()
    pipeline.close()
    whole = on_canvas(decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)), 72)
    assert torch.equal(batch.windows[0], whole[:, 2:69, 2:69].float())
    # 90 → 72 rows, 120 → 96 columns; the centre's 72; the window begins 2 in: column 14 of 96.
    columns = (torch.arange(67) + 14 + 0.5) * 120 / 96 - 0.5
    ramp = columns * 255 / 119
    assert_close(batch.windows[0, 0].mean(0), ramp, 3)
    assert_close(batch.windows[0, 1].mean(0), 255 - ramp, 3)
    assert_close(batch.windows[0, 2], torch.full((67, 67), 80.0), 3)
