"""Untrusted files: each is refused in one line, or means what it says; none executes code."""

import ast
import contextlib
import hashlib
import io
import json
import logging
import pickle
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import Unpickler
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import alexnet_dist
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare import arrays
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import (
    AlexNetDistError,
    CheckpointError,
    ConfigError,
    DatasetError,
    printable,
)
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.evaluation.load import load_checkpoint
from alexnet_dist.files import within_memory
from alexnet_dist.formats.convert import export_weights, import_weights
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.reporting import figures
from alexnet_dist.tensor_files import TensorFile
from alexnet_dist.training.logs import configure_logging, log
from alexnet_dist.training.loop import train

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_no_pickle_is_loaded_but_cifars_and_that_without_running_it() -> None:
    """Nor one that another rank sends: torch's collectives of objects unpickle."""
    loads = []
    for path in Path(alexnet_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                true = {k.arg for k in node.keywords if getattr(k.value, "value", 0) is True}
                if called == "torch.load" and "weights_only" in true:  # a list of tensors' own
                    continue
                if called in (
                    "pickle.load", "pickle.loads", "torch.load", "joblib.load", "eval", "exec",
                    "yaml.load", "yaml.unsafe_load",
                ) or "allow_pickle" in true or re.match(r"dist\.\w+_object", called):  # fmt: skip
                    loads.append((path.name, called))
    assert loads == []
    readers = [c for c in vars(arrays).values() if isinstance(c, type) and issubclass(c, Unpickler)]
    assert len(readers) == 1
    assert all("find_class" in vars(reader) for reader in readers)


# --- checkpoints


@pytest.fixture
def saved(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    tensors = {"conv1.bias": torch.ones(4)}
    return checkpoints.save(tmp_path / "run", tiny(), "d", tensors, {}, {"step": 3}, 0.25)


def forge(path: Path, **changes: Any) -> None:
    """Change the manifest, and make every hash right again."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | changes
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = checkpoints.own_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"}, {"step": -1}, {"step": 4}, {"step": True}, {"error": "low"}, {"error": -1},
        {"error": float("nan")}, {"config": []}, {"config": None}, {"version": "1"},
        {"classes": 10}, {"classes": None},
    ],
)  # fmt: skip
def test_a_manifest_that_no_run_writes_is_refused_though_its_hashes_fit(
    saved: Path, changes: dict[str, Any]
) -> None:
    checkpoints.verify(saved)
    forge(saved, **changes)
    with pytest.raises(CheckpointError, match=r"not what a run writes|version"):
        checkpoints.verify(saved)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 1 << 62),
        header(b"{}", 3),
        header(b"not json"),
        header(b"{}") + b"x",
        b"\x80\x04N.",  # a pickle
        header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"XX","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
               b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}') + bytes(6),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    forge(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoints.verify(saved)


@FEW
@given(st.sampled_from(["manifest.json", "progress.json"]), JSON, st.binary(max_size=30))
def test_any_json_is_a_checkpoint_or_a_checkpoint_error(
    saved: Path, name: str, content: Any, raw: bytes
) -> None:
    sound = (saved / name).read_bytes()
    try:
        for data in (json.dumps(content).encode(), raw, sound[: len(raw)], raw + sound):
            (saved / name).write_bytes(data)
            with contextlib.suppress(CheckpointError):
                assert checkpoints.verify(saved).step == 3
    finally:
        (saved / name).write_bytes(sound)


@FEW
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
@example(288, 13, False)  # in the manifest, a line's end for another
@example(164, 49, False)  # an error of 0.15 for 0.25
def test_no_changed_or_missing_byte_is_loaded(
    saved: Path, place: int, value: int, cut: bool
) -> None:
    """Any byte of any file; but the manifest's content counts, not how it is written."""
    files = sorted(saved.iterdir())
    path = files[place % len(files)]
    sound = path.read_bytes()
    at = place // len(files) % len(sound)
    changed = sound[:at] if cut else sound[:at] + bytes([value]) + sound[at + 1 :]
    same = changed == sound
    if path.name == "manifest.json":
        with contextlib.suppress(ValueError):
            same = json.loads(changed) == json.loads(sound)
    try:
        path.write_bytes(changed)
        if not same:
            with pytest.raises(CheckpointError):
                checkpoints.verify(saved)
    finally:
        path.write_bytes(sound)
    checkpoints.verify(saved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv2.bias": torch.ones(1)}, r"conv2\.bias is \[1\] there, but \[12\] here"),
        ({"conv2.weight": None}, r"conv2\.weight is not there, but \[12, "),
        ({"momentum_buffer/conv2.bias": torch.ones(3)}, r"momentum_buffer/conv2\.bias is \[3\] "),
        ({"conv2.bias": torch.ones(99)}, r"conv2\.bias is \[99\] there, but \[12\] here"),
        ({"conv1.weight": torch.ones(9, 3, 11, 11)}, r"conv1\.weight is \[9, 3, 11, 11\] there"),
        ({"fc9.bias": torch.ones(3)}, r"fc9\.bias is \[3\] there, but not here"),
        ({"conv2.bias": torch.ones(12, dtype=torch.int8)}, r"conv2\.bias holds I8"),
        (
            {"momentum_buffer/fc8.bias": torch.ones(99)},
            r"momentum_buffer/fc8\.bias is \[99\] there",
        ),
        ({"momentum_buffer/fc8.bias": torch.tensor(1.0)}, r"momentum_buffer/fc8\.bias is \[\] the"),
        ({"momentum_buffer/fc8.bias": None}, r"momentum_buffer/fc8\.bias is not there"),
        ({"momentum_buffer/conv9.bias": torch.ones(3)}, r"conv9\.bias is \[3\] there, but not her"),
    ],
)
def test_tensors_that_do_not_fit_the_network_are_named(
    changed: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    engine = make_engine(load_config([*TINY, "layout.kind=one"]), Topology())
    files = []
    for name, tensors in zip("po", engine.whole_tensors(), strict=True):
        mine = {key: tensor for key, tensor in changed.items() if ("/" in key) == (name == "o")}
        kept = {key: t for key, t in (tensors | mine).items() if t is not None}
        save_file(kept, tmp_path / name)
        files.append(TensorFile(tmp_path / name))
    with pytest.raises(CheckpointError, match=message):
        engine.load(*files)


@pytest.mark.parametrize("kind", ["wider", "extra", "missing"])
def test_a_forged_networks_rows_are_never_cut_whoever_reads_them(
    tiny: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """Every hash is right, and conv1, fc8 and the momenta have rows more; or a layer is more, or
    less."""
    config = tiny("layout.kind=one", "train.precision=fp32", "name=forged", "train.epochs=0.5")
    assert train(config).exit == 0
    path = checkpoints.at(config.folder).path
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(path / name)
        for key in [key for key in tensors if "conv1" in key or "fc8" in key]:
            if kind == "wider":
                tensors[key] = torch.cat([tensors[key], tensors[key]])
            elif kind == "extra":
                tensors[key.replace("fc8", "fc9")] = tensors[key].clone()
            elif key.endswith("fc8.bias"):
                del tensors[key]
        save_file(tensors, path / name)
    forge(path)
    checkpoints.verify(path)
    said = {"wider": r"conv1\.weight is \[16, ", "extra": "fc9", "missing": r"fc8\.bias is not"}[
        kind
    ]
    for read in (
        lambda: train(config),
        lambda: train(tiny("layout.kind=one", f"train.init_from={config.folder}", "name=warm")),
        lambda: evaluate_checkpoints([config.folder]),
        lambda: load_checkpoint(config.folder),
        lambda: export_weights("safetensors", config.folder, tmp_path / "out"),
        lambda: figures.draw(config.folder),
    ):
        with pytest.raises(
            CheckpointError, match=rf"model\.safetensors: does not fit its own.*{said}"
        ):
            read()
    assert not (tmp_path / "out").exists()


def test_a_header_of_more_tensors_than_any_network_is_refused(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    tensors = {f"{n}": tensor for n in range(20_000)}
    (tmp_path / "many").write_bytes(header(json.dumps(tensors).encode()))
    with pytest.raises(CheckpointError, match=r"many cannot be read as safetensors: a header of 1"):
        TensorFile(tmp_path / "many")


def zipped(content: bytes, packing: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


DICTIONARIES = b"\x80\x02}" + b"}" * 2**22 + b"l."
BEFORE_1_6 = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + DICTIONARIES


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("torchvision", zipped(DICTIONARIES, zipfile.ZIP_DEFLATED), "it unpacks to"),
        ("torchvision", zipped(DICTIONARIES, zipfile.ZIP_STORED), "more than 32,768 opcodes"),
        ("torchvision", BEFORE_1_6, "more than 32,768 opcodes"),
        ("torchvision", BEFORE_1_6 + zipped(b"N.", 0), "more than 32,768 opcodes"),
        ("torchvision", DICTIONARIES, "does not begin as torch.save's files do"),
        ("torchvision", zipped(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x08\x85R.", 0),
         "is not a state dict"),
        ("caffe", b"\x12\0" * 2**20, "more than 65,536 fields"),
        ("caffe", b"\x12\x80\x80\x40" + b"\x3a\0" * 2**19, "more than 65,536 fields|cut short"),
        ("caffe", b"\xff" * 11, "a number without an end"),
    ],
    ids=["packed", "zip", "before 1.6", "a zip at its end", "bare", "bytearray", "layers", "blobs",
         "number"],
)  # fmt: skip
def test_weights_are_counted_before_they_are_read(
    kind: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(content)
    begin = time.process_time()
    with within_memory(2**31), pytest.raises(CheckpointError, match=said):
        import_weights(kind, tmp_path / "weights", tmp_path / "run", ["paper/torchvision-2014"])
    assert time.process_time() - begin < 10


def test_a_mean_whose_header_lies_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999, 999999, 3)}".ljust(118)
    (tmp_path / "mean.npy").write_bytes(b"\x93NUMPY\1\0v\0" + head + bytes(12))
    config = tiny(f"data.mean_from={tmp_path / 'mean.npy'}")
    with pytest.raises(DatasetError, match=r"data\.mean_from=.*cannot be read as a \.npy file"):
        Preprocess(config, open_dataset(Path(config.data.path)).statistics, torch.device("cpu"),
               torch.float32)  # fmt: skip


# --- data sets


@FEW
@given(st.data())
def test_any_change_of_a_data_sets_description_is_an_error_or_harmless(
    packed: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Any value of dataset.json, at any depth, replaced by any other."""
    meta = json.loads((packed / "dataset.json").read_text())
    node, place = meta, data.draw(st.sampled_from(sorted(meta)))
    while isinstance(node[place], dict | list) and node[place] and data.draw(st.booleans()):
        node = node[place]
        options = sorted(node) if isinstance(node, dict) else range(len(node))
        place = data.draw(st.sampled_from(list(options)))
    node[place] = data.draw(JSON)
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(packed, copy)
    (copy / "dataset.json").write_text(json.dumps(meta))
    with contextlib.suppress(AlexNetDistError):
        found = open_dataset(copy)
        for split in found.splits.values():
            split.labels(split.index["label"].astype("int64") * 0)
            assert split.read(len(split) - 1)


# --- configs, names, logs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system [id]", "not determine a constructor for the tag"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("? [a, b]\n: c", "unhashable key"),
    ],
)
def test_a_config_that_bites_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config([tmp_path / "bad.yaml"])


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**40])
def test_numbers_beyond_an_integer_of_the_machine_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch"):
        load_config([f"train.batch={value}"])


@pytest.mark.parametrize(
    "name", ["../up", "/tmp/x", "a/b", "..", "", "-x", "a\nb", "a\x1b[2J", "a\0"]
)
def test_a_runs_name_is_a_name_and_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        load_config([{"name": name}])


def test_names_from_files_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = logging.getLogger().handlers[:], log.level
    try:
        configure_logging(Topology())
        log.warning("sample 'a\x1b[2J\rb'\nnext line, naïve")
    finally:
        logging.getLogger().handlers[:] = handlers
        log.setLevel(level)
    assert capsys.readouterr().err == "sample 'a\\x1b[2J\\rb'\nnext line, naïve\n"
    assert printable("\x07") == "\\x07"
