"""Import and export of weights: torchvision, Caffe, ONNX, safetensors; logits agree to 1e-6."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import alexnet_dist, assert_close
from safetensors.torch import save_file

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.cli.main import main
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import Statistics, open_dataset
from alexnet_dist.data.preprocess import Preprocess, on_canvas
from alexnet_dist.errors import CheckpointError, ConfigError, DatasetError
from alexnet_dist.formats import caffe, torchvision
from alexnet_dist.formats.convert import export_weights, import_weights
from alexnet_dist.network.model import AlexNet, whole_shapes
from alexnet_dist.network.precision import parameter_dtype

SMALL = ["model.conv=[8,12,16,16,8]", "model.fc=[20,12]", "model.classes=5"]


def network(source: Path) -> AlexNet:
    """The network in a checkpoint."""
    found = checkpoints.at(source)
    dtype = parameter_dtype(found.config.train.precision)
    model = AlexNet(found.config.model, dtype=dtype, init_weights=False).eval()
    model.load_state_dict(found.parameters().tensors())
    return model


@pytest.fixture
def ours(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint of drawn weights: ours("paper/caffenet", "model.crop=67", …)."""

    def make(*sources: str) -> Path:
        preset, *overrides = sources
        config = load_config([preset, *SMALL, *overrides])
        model = AlexNet(config.model, seed=3, dtype=parameter_dtype(config.train.precision))
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        progress = {"step": 0, "score": None}
        return checkpoints.save(tmp_path / "ours", config, "none", tensors, {}, progress, None)

    return make


@pytest.mark.parametrize(
    ("kind", "precision"), [("safetensors", "fp32"), ("safetensors", "fp64"), ("caffe", "fp32")]
)
def test_weights_return_as_they_left(
    ours: Callable[..., Path], tmp_path: Path, kind: str, precision: str
) -> None:
    sources = ["paper/caffenet", "model.crop=67", f"train.precision={precision}", *SMALL]
    left = ours(*sources)
    out = tmp_path / f"w.{kind}"
    export_weights(kind, left, out)
    assert import_weights(kind, out, tmp_path / "back", sources).parent.parent == tmp_path / "back"
    before, after = network(left), network(tmp_path / "back")
    x = torch.randn(3, 3, 67, 67, dtype=parameter_dtype(precision)) * 50
    assert_close(after(x).detach(), before(x).detach(), 1e-6)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name


def test_torchvisions_weights_give_torchvisions_logits(tmp_path: Path) -> None:
    from torchvision.models import alexnet

    theirs = alexnet(num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "alexnet.pth")
    result = alexnet_dist(
        "import", str(tmp_path / "alexnet.pth"), str(tmp_path / "tv"), "paper/torchvision-2014",
        "model.classes=3", "--format", "torchvision",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert_close(network(tmp_path / "tv")(x), theirs(x), 1e-6)
    out = tmp_path / "back.pth"
    result = alexnet_dist("export", str(tmp_path / "tv"), str(out), "--format", "torchvision")
    assert result.returncode == 0, result.stderr
    again = alexnet(num_classes=3).eval()
    again.load_state_dict(torch.load(out, weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(x), theirs(x))


def test_a_state_dict_from_before_torch_1_6_is_read(tmp_path: Path) -> None:
    theirs = {"features.0.weight": torch.randn(64, 3, 11, 11), "features.0.bias": torch.randn(64)}
    torch.save(theirs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = torchvision.read(tmp_path / "old.pth", load_config("paper/torchvision-2014"))
    assert torch.equal(read["conv1.weight"], theirs["features.0.weight"])
    assert torch.equal(read["conv1.bias"], theirs["features.0.bias"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("model.columns=2", r"model\.columns=2: torchvision's alexnet has 1, and would compute"),
        ("model.conv=[8,12,16,16,8]", r"model\.conv=\[8, 12, .*has \[64, 192, 384, 256, 256\]"),
        ("model.lrn.layers=[conv1]", r"model\.lrn\.layers=\[conv1\]: torchvision's .* has \[\]"),
        ("model.activation=tanh", r"model\.activation=tanh: torchvision's alexnet has relu"),
        ("model.dropout_scaling=test", r"model\.dropout_scaling=test: .* has train"),
        ("model.crop=195", r"model\.crop=195: leaves maps of 5 pixels for fc6, .* has 6"),
    ],
)
def test_torchvisions_format_takes_its_own_network_alone(
    tmp_path: Path, changed: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another, its weights would be read there, or not, and compute something else."""
    config = load_config(["paper/torchvision-2014", "model.classes=3", "layout.kind=one", changed])
    found = checkpoints.Checkpoint(tmp_path, {"config": flat(config)}, {})
    monkeypatch.setattr(checkpoints, "at", lambda _: found)
    monkeypatch.setattr(
        checkpoints.Checkpoint, "parameters", lambda _: SimpleNamespace(tensors=dict)
    )
    out = tmp_path / "net.pth"
    out.write_bytes(b"as it was")
    with pytest.raises(ConfigError, match=said):
        export_weights("torchvision", tmp_path, out)
    assert out.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["model.exchange=[conv3,fc7,fc8]"], r"=\[conv3, fc7, fc8\]: fc6 sees only its own column"),
        (["model.crop=68", "model.round_up=true"], "=true: conv1 .* of 16 and 8 .* 15 and 7 in"),
        (["model.crop=71"], "=false: conv1 .* maps of 16 and 7 pixels, but of 16 and 8 in Caffe"),
    ],
)
def test_caffes_format_takes_what_caffe_has_layers_for(
    ours: Callable[..., Path], tmp_path: Path, changed: list[str], said: str
) -> None:
    """Of another, a layer would not fit there, or compute something else."""
    with pytest.raises(ConfigError, match=said):
        export_weights("caffe", ours("paper/caffenet", "model.crop=67", *changed), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_caffes_format_leaves_no_parameter_out(tmp_path: Path) -> None:
    config = load_config("paper/caffenet")
    layers = [f"{name}.{kind}" for name in config.model.layer_names for kind in ("weight", "bias")]
    tensors = {name: torch.zeros(1, 1, 1, 1) for name in [*layers, "conv1.gain"]}
    with pytest.raises(ConfigError, match=r"conv1\.gain: a layer of Caffe's has a weight"):
        caffe.write(tmp_path / "net", config, tensors)


def test_an_unknown_format_is_written_and_read_as_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checkpoints.Checkpoint(tmp_path, {"config": flat(load_config([]))}, {})
    monkeypatch.setattr(checkpoints, "at", lambda _: found)
    monkeypatch.setattr(
        checkpoints.Checkpoint, "parameters", lambda _: SimpleNamespace(tensors=dict)
    )
    with pytest.raises(ValueError, match="tensorflow"):
        export_weights("tensorflow", tmp_path, tmp_path / "net")
    with pytest.raises(ValueError, match="tensorflow"):
        import_weights("tensorflow", tmp_path / "net", tmp_path / "run", ["demo"])
    assert not [*tmp_path.iterdir()]


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message, byte by byte."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def old_blob(array: np.ndarray) -> bytes:
    """A BlobProto as Caffe wrote it in 2014: four sizes and packed floats."""
    sizes = (1, 1, 1, 1, *array.shape)[-4:]
    head = b"".join(varint(n << 3) + varint(size) for n, size in enumerate(sizes, start=1))
    return head + field(5, array.astype("<f4").tobytes())


def test_a_caffemodel_of_2014_gives_the_logits_of_its_network(tmp_path: Path) -> None:
    """V1 layers, BGR, groups, made byte by byte; the reference reads blue first."""
    from torch.nn import functional as F

    random = np.random.default_rng(0)
    shapes = {
        "conv1": (8, 3, 11, 11), "conv2": (12, 4, 5, 5), "conv3": (16, 12, 3, 3),
        "conv4": (16, 8, 3, 3), "conv5": (8, 8, 3, 3), "fc6": (20, 8), "fc7": (12, 20),
        "fc8": (5, 12),
    }  # fmt: skip
    blobs = {n: (random.normal(0, 0.1, s), random.normal(0, 1, s[0])) for n, s in shapes.items()}
    layers = [field(4, b"data"), *(
        field(4, name.encode()) + b"".join(field(6, old_blob(a)) for a in pair)
        for name, pair in blobs.items()
    )]  # fmt: skip
    content = field(1, b"AlexNet") + b"".join(field(2, layer) for layer in layers)
    (tmp_path / "net.caffemodel").write_bytes(content)
    mean = random.uniform(90, 130, (3, 72, 72)).astype("<f4")
    (tmp_path / "mean.binaryproto").write_bytes(old_blob(mean))
    sources = ["paper/caffe-alexnet", *SMALL, "model.crop=67", "data.canvas=72"]
    import_weights(
        "caffe", tmp_path / "net.caffemodel", tmp_path / "run", sources,
        tmp_path / "mean.binaryproto",
    )  # fmt: skip

    pixels = torch.from_numpy(random.integers(0, 256, (2, 72, 72, 3), dtype=np.uint8))
    x = (pixels.movedim(-1, 1).flip(1).float() - torch.from_numpy(mean))[..., 2:69, 2:69]  # BGR
    p = {n: [torch.tensor(a, dtype=torch.float32) for a in pair] for n, pair in blobs.items()}

    def norm(maps: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [F.local_response_norm(h, 5, 1e-4, 0.75, 1.0) for h in maps.chunk(2, 1)], 1
        )

    y = F.max_pool2d(norm(F.relu(F.conv2d(x, *p["conv1"], 4))), 3, 2)
    y = F.max_pool2d(norm(F.relu(F.conv2d(y, *p["conv2"], 1, 2, 1, 2))), 3, 2)
    y = F.relu(F.conv2d(y, *p["conv3"], 1, 1))
    y = F.relu(F.conv2d(y, *p["conv4"], 1, 1, 1, 2))
    y = F.max_pool2d(F.relu(F.conv2d(y, *p["conv5"], 1, 1, 1, 2)), 3, 2).flatten(1)
    y = F.linear(F.relu(F.linear(F.relu(F.linear(y, *p["fc6"])), *p["fc7"])), *p["fc8"])

    config = checkpoints.at(tmp_path / "run").config
    nothing = Statistics(np.zeros((9, 9, 3), np.float32), np.zeros(3), np.ones(3), np.eye(3))
    preprocess = Preprocess(config, nothing, torch.device("cpu"), torch.float32)
    corners, flips = torch.full((2, 1, 2), 2), torch.zeros(2, 1, dtype=torch.bool)
    windows = preprocess(pixels[:, 2:69, 2:69], corners, flips, torch.zeros(2, 3))
    with torch.no_grad():
        logits = network(tmp_path / "run")(windows)
    assert_close(logits / y.abs().max(), y / y.abs().max(), 1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4, 4), (3, 4)])
def test_a_mean_of_caffes_that_is_no_image_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(old_blob(np.zeros(shape)))
    with pytest.raises(CheckpointError, match=r"a mean of shape .* must be 3 × height × width"):
        caffe.read_mean(path)


@pytest.mark.parametrize("preset", ["paper/released-code", "paper/caffenet", "paper/no-exchange"])
def test_onnxruntime_gives_our_logits(
    ours: Callable[..., Path], tmp_path: Path, preset: str
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    left = ours(preset, "model.crop=68", "model.lrn.alpha=0.1")
    export_weights("onnx", left, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for n in (1, 5):
        x = torch.randn(n, 3, 68, 68) * 50
        (theirs,) = session.run(None, {"windows": x.numpy()})
        with torch.no_grad():
            logits = network(left)(x)
        assert_close(theirs / logits.abs().max(), logits / logits.abs().max(), 1e-6)


def test_onnx_says_how_windows_are_made_and_what_logits_are_of(
    ours: Callable[..., Path],
    packed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    own = ["model.crop=67", "data.canvas=72", "model.classes=10", "data.eval_split=test",
           "data.divide_by=[2,3,4]", "model.init=he"]  # fmt: skip
    left, out = ours("paper/caffenet", *own), tmp_path / "net.onnx"

    def about() -> dict[str, str]:
        return {entry.key: entry.value for entry in onnx.load(out).metadata_props}

    command = ["export", str(left), str(out), "--format", "onnx"]
    assert main([*command, "--data", str(packed)]) == 0
    told, statistics = about(), open_dataset(packed).statistics
    assert json.loads(told["classes"])[-1] == "Ankle boot"
    assert json.loads(told["preprocessing"]) == {
        "channels": "RGB", "canvas": 72, "crop": 67, "divide_by": [2, 3, 4], "stored": None,
        "enlarge": False, "mean_shape": [72, 72, 3],
    }  # fmt: skip
    mean = np.frombuffer(base64.b64decode(told["mean"]), "<f4").reshape(72, 72, 3)
    expected = on_canvas(torch.from_numpy(statistics.mean_image).movedim(-1, 0), 72)
    assert_close(mean, expected.movedim(0, -1), 1e-5)

    before = out.read_bytes()
    assert main([*command, "--data", str(tmp_path)]) == 1
    assert out.read_bytes() == before
    caplog.set_level("WARNING")
    assert main(command) == 0  # its data set is not there: the network alone
    assert "exported without a mean image and class names" in caplog.text
    assert {*about()} == {"config", "preprocessing"}
    command[-1] = "caffe"
    assert main([*command, "--data", str(packed)]) == 2
    assert "is only for --format onnx" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_words(ours: Callable[..., Path], tmp_path: Path) -> None:
    sources, bad = ["paper/caffenet", "model.crop=67", *SMALL], tmp_path / "bad"
    bad.write_bytes(b"\xff\xff\xff\x01 nothing of ours")
    for kind, message in (
        ("caffe", "cannot be read as Caffe's NetParameter"),
        ("torchvision", "is not a state dict"),
        ("safetensors", "cannot be read as safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_weights(kind, bad, tmp_path / "run", sources)
        with pytest.raises(CheckpointError, match=r"none cannot be read: it is missing"):
            import_weights(kind, tmp_path / "none", tmp_path / "run", sources)
    torch.save({"a": Path("/")}, bad)  # asks for a class
    with pytest.raises(CheckpointError, match="is not a state dict"):
        import_weights("torchvision", bad, tmp_path / "run", sources)
    torch.save({"a": torch.zeros(1), 0: torch.zeros(1)}, bad)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is not there, but \[\d+, 3, "):
        import_weights("torchvision", bad, tmp_path / "run", sources)
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(1)}}, bad)
    with pytest.raises(
        CheckpointError, match=r"not a dict of tensors, but of epoch, state_dict: sav"
    ):
        import_weights("torchvision", bad, tmp_path / "run", sources)
    assert not (tmp_path / "run").exists()
    bad.write_bytes(field(100, field(1, b"conv1") + field(7, field(5, b"\0" * 8))))
    with pytest.raises(CheckpointError, match=r"8 bytes for a blob of shape \[0, 0, 0, 0\]"):
        import_weights("caffe", bad, tmp_path / "run", sources)
    bad.write_bytes(field(100, field(1, b"conv\xff") + field(7, field(5, b"\0" * 8))))
    with pytest.raises(CheckpointError, match=r"a layer's name is not UTF-8: b'conv\\xff'"):
        import_weights("caffe", bad, tmp_path / "run", sources)
    bad.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no layer in it has weights"):
        caffe.read_layers(bad)
    save_file({"conv1.weight": torch.zeros(2)}, bad)
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight is \[2\] there, but \[8, 3, 11, 11\] here"
    ):
        import_weights("safetensors", bad, tmp_path / "run", sources)
    with pytest.raises(ConfigError, match="is only for --format caffe"):
        import_weights("safetensors", bad, tmp_path / "run", sources, mean=bad)
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="torchvision's alexnet has 5 convolutions"):
        import_weights(
            "torchvision", tmp_path / "w.safetensors", tmp_path / "run", ["paper/fig1-relu"]
        )
    (tmp_path / "mean").write_bytes(struct.pack("<f", 1.0))
    nothing = Statistics(np.zeros((9, 9, 3), np.float32), np.zeros(3), np.ones(3), np.eye(3))
    config = load_config([*sources, f"data.mean_from={tmp_path / 'mean'}"])
    with pytest.raises(DatasetError, match=r"data\.mean_from=.*cannot be read as a \.npy file"):
        Preprocess(config, nothing, torch.device("cpu"), torch.float32)


def test_no_part_of_an_imported_network_is_cut_off_or_left_out(tmp_path: Path) -> None:
    sources, path = ["paper/caffenet", "model.crop=67", *SMALL], tmp_path / "net"
    config = load_config(sources).model
    sound = {name: torch.zeros(shape) for name, shape in whole_shapes(config).items()}
    for changed, said in (
        ({"fc8.weight": torch.zeros(9, 12)}, r"fc8\.weight is \[9, 12\] there, but \[5, 12\] here"),
        ({"conv1.bias": torch.zeros(16)}, r"conv1\.bias is \[16\] there, but \[8\] here"),
        ({"fc9.bias": torch.zeros(5)}, r"fc9\.bias is \[5\] there, but not here"),
        ({"fc8.bias": torch.zeros(5, dtype=torch.int8)}, r"fc8\.bias holds torch\.int8"),
    ):
        save_file(sound | changed, path)
        with pytest.raises(CheckpointError, match=said):
            import_weights("safetensors", path, tmp_path / "run", sources)
    layers = {
        name: [sound[f"{name}.{kind}"].numpy() for kind in ("weight", "bias")]
        for name in config.layer_names
    }
    for blobs, said in (
        ([*layers["fc6"], np.zeros(1, "f4")], r"fc6\.blob3 is \[1\] there, but not here"),
        ([np.zeros((2, 1, 20, 8), "f4")], r"fc6\.weight is \[2, 1, 20, 8\] there"),
    ):
        caffe.write_layers(path, "net", layers | {"fc6": blobs})
        with pytest.raises(CheckpointError, match=said):
            import_weights("caffe", path, tmp_path / "run", sources)
    assert not (tmp_path / "run").exists()


def test_an_imported_run_is_evaluated_like_any(tiny: Callable[..., Config], tmp_path: Path) -> None:
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
    from alexnet_dist.training.loop import train

    config = tiny("layout.kind=one", "train.precision=fp32", "train.epochs=0.5", "name=first")
    train(config)
    export_weights("safetensors", config.folder, tmp_path / "w.safetensors")
    from conftest import as_overrides

    import_weights("safetensors", tmp_path / "w.safetensors", tmp_path / "in", as_overrides(config))
    first, again = (evaluate_checkpoints([path]) for path in (config.folder, tmp_path / "in"))
    assert again.score == first.score
    with pytest.raises(ConfigError, match="in: already holds a run"):
        import_weights(
            "safetensors", tmp_path / "w.safetensors", tmp_path / "in", as_overrides(config)
        )
