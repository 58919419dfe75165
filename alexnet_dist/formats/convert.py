"""Weights from other programs into a checkpoint of ours, and a checkpoint's out to them.

| format | from | to |
|---|---|---|
| safetensors | our names: conv1.weight, … | the same, the config in its metadata |
| torchvision | a state dict (.pth, read without running a pickle, or .safetensors) | the same |
| caffe | .caffemodel, its first layer's BGR turned; --mean: its mean image | .caffemodel, BGR |
| onnx | | logits of windows (n, 3, crop, crop), by ONNX's own operators; how windows are made, and
names of classes, in its metadata |

What leaves expects the windows that conv1 sees here: the mean off, divided by data.divide_by.
"""

import base64
import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import open_for, open_trained_on
from alexnet_dist.data.prepare.convert import SIDE, as_packed
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.errors import CheckpointError, ConfigError, DatasetError
from alexnet_dist.files import (
    MOST_MEMORY,
    check_opcodes,
    opened,
    within_memory,
    write,
    written_aside,
)
from alexnet_dist.formats import caffe
from alexnet_dist.network.model import AlexNet, final_side, whole_shapes
from alexnet_dist.tensor_files import TensorFile, misfit, save_tensors

Tensors = dict[str, Tensor]
# Of a state dict; torchvision's alexnet has 500. Few, since each can make a copy of all before it.
_MOST_OPCODES = 2**15
# The places of weights in torchvision's alexnet.
_TORCHVISION = ("features.0", "features.3", "features.6", "features.8", "features.10",
                "classifier.1", "classifier.4", "classifier.6")  # fmt: skip
# What its forward has, whatever the weights.
_ARCHITECTURE = tuple(f"model.{key}" for key in (
    "columns", "conv", "kernel", "stride", "padding", "fc", "activation", "activation_last",
    "pool_after", "pool", "pool_average", "round_up", "lrn.layers", "spatial_norm.layers",
    "dropout_scaling",
))  # fmt: skip
log = logging.getLogger(__name__)


def import_weights(
    kind: str, path: Path, out: Path, sources: Sequence[str], mean: Path | None = None
) -> Path:
    """Make a checkpoint in `out`/checkpoints of another program's weights; its path.

    Args:
        kind: safetensors, torchvision or caffe.
        sources: the config of the network they are for, as for train.
        mean: Caffe's mean image, taken off in place of the data set's.

    Raises CheckpointError where the file is not of that kind, or of another network; ConfigError
    where `out` holds a run, or kind and network do not fit.
    """
    if checkpoints.traces(out / "checkpoints"):
        raise ConfigError(f"{out}: holds a run already: name a folder that is to be made")
    if mean is not None:
        if kind != "caffe":
            raise ConfigError(f"--mean {mean}: only with --format caffe")
        packed = io.BytesIO()
        np.save(packed, caffe.read_mean(mean))
        digest = hashlib.sha256(packed.getvalue()).hexdigest()
        own = ["data.subtract=mean_image", f"data.mean_from={(out / 'mean.npy').resolve()}",
               f"data.mean_sha256={digest}"]  # fmt: skip
        sources = [*sources, *own]
    config = load_config([*sources, f"name={out.name}", f"output_dir={out.parent}"])
    tensors = _READ[kind](path, config)
    wanted = whole_shapes(config.model)
    if wrong := misfit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted):
        raise CheckpointError(
            f"{path}: {wrong}, by the config: name the preset it is of (paper/torchvision-2014, "
            "paper/caffe-alexnet, paper/caffenet) and model.classes"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}: save it as float32")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite: take weights of an earlier step")
    whole = {name: tensors[name].float().contiguous() for name in wanted}
    progress = {"step": 0, "score": None}
    if mean is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "mean.npy", packed.getvalue())
    return checkpoints.save(out / "checkpoints", config, "imported", whole, {}, progress, None)


def export_weights(kind: str, source: Path, out: Path, data: Path | None = None) -> Path:
    """Write a run's best or a checkpoint's weights as another program reads them.

    Args:
        kind: safetensors, torchvision, caffe or onnx.
        data: onnx: the packed data set whose mean and names of classes go with it; that which it
            was trained on, if left out, and where that is not there, a warning.

    Raises CheckpointError; ConfigError where that program has no such network.
    """
    if data is not None and kind != "onnx":
        raise ConfigError(f"--data {data}: only with --format onnx")
    found = checkpoints.at(source)
    config, file = found.config, found.parameters()
    tensors = {name: file.rows(name, slice(None)).float() for name in file.keys()}  # noqa: SIM118
    with written_aside(out) as aside:
        if kind == "onnx":
            _write_onnx(aside, found, config, tensors, data)
        else:
            _WRITE[kind](aside, found, config, tensors)
    return out


def _read_safetensors(path: Path, config: Config) -> Tensors:
    file = TensorFile(path)
    return {name: file.rows(name, slice(None)) for name in file.keys()}  # noqa: SIM118


def _read_torchvision(path: Path, config: Config) -> Tensors:
    if path.suffix == ".safetensors":
        found = _read_safetensors(path, config)
    else:
        try:
            with opened(path) as file:
                _check_archive(file)
                with within_memory(MOST_MEMORY + 2 * path.stat().st_size):
                    found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle can fail in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(f"{path} is not a state dict: {reason}") from error
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            keys = f", but of {', '.join(map(str, found))[:200]}" if isinstance(found, dict) else ""
            raise CheckpointError(
                f"{path} is no dict of tensors{keys}: save the model's state_dict() alone"
            )
    names = {b: a for a, b in _torchvision_names(config).items()}
    return {names.get(name, name): tensor for name, tensor in found.items()}


def _check_archive(file: BinaryIO) -> None:
    """Raises where a .pth holds pickles of more opcodes, or more bytes unpacked, than it needs, or
    what its checksums do not fit: torch does not compare them. The file is at its start again."""
    if not zipfile.is_zipfile(file):  # before torch 1.6: five pickles, and then numbers
        file.seek(0)
        for _ in range(5):
            check_opcodes(file, _MOST_OPCODES)
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * file.seek(0, os.SEEK_END) + 2**20:  # torch packs nothing
            raise ValueError(f"{unpacked:,} bytes are packed in it")
        if (wrong := archive.testzip()) is not None:
            raise ValueError(
                f"{wrong} in it does not match its checksum: it was damaged, or saved without "
                "(torch.serialization.set_crc32_options): copy it, or save it, again"
            )
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as pickled:
                    check_opcodes(pickled, _MOST_OPCODES)
    file.seek(0)


def _read_caffe(path: Path, config: Config) -> Tensors:
    tensors: Tensors = {}
    for layer, blobs in caffe.read_layers(path).items():
        weight, *biases = (torch.from_numpy(blob.copy()) for blob in blobs)
        if layer.startswith("fc") and weight.shape[:-2] == (1, 1):  # the old format
            weight = weight[0, 0]
        blue_first = layer == "conv1" and weight.dim() == 4
        tensors[f"{layer}.weight"] = weight.flip(1) if blue_first else weight
        named = zip(("bias", "blob3"), biases, strict=False)  # no network here has a third
        tensors |= {f"{layer}.{name}": bias.flatten() for name, bias in named}
    return tensors


def _write_safetensors(out: Path, found: Checkpoint, config: Config, tensors: Tensors) -> None:
    save_tensors(out, tensors, {"config": json.dumps(flat(config)), "of": str(found.path)})


def _write_torchvision(out: Path, found: Checkpoint, config: Config, tensors: Tensors) -> None:
    _check_torchvision(config)
    names = _torchvision_names(config)
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    if out.suffix == ".safetensors":
        save_tensors(out, renamed)
    else:
        torch.save(renamed, out)


def _write_caffe(out: Path, found: Checkpoint, config: Config, tensors: Tensors) -> None:
    weights = tensors | {"conv1.weight": tensors["conv1.weight"].flip(1)}
    layers = {
        name: [weights[f"{name}.{kind}"].numpy() for kind in ("weight", "bias")]
        for name in config.model.layer_names
    }
    caffe.write_layers(out, config.name, layers)


def _write_onnx(
    out: Path, found: Checkpoint, config: Config, tensors: Tensors, data: Path | None
) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs {error.name}: pip install 'alexnet-dist[export]'"
        ) from error
    about = {"config": json.dumps(flat(config))} | _preprocessing(found, config, data)
    model = AlexNet(config.model, drawn=False).eval()
    model.load_state_dict(tensors)
    windows = torch.zeros(2, 3, config.model.crop, config.model.crop)
    batch = {"x": {0: torch.export.Dim("batch")}}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what it does not fold concerns nobody
    program = torch.onnx.export(
        model, (windows,), input_names=["windows"], output_names=["logits"],
        dynamic_shapes=batch, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    made = program.model_proto
    onnx.helper.set_model_props(made, about)
    onnx.save(made, out)


def _preprocessing(found: Checkpoint, config: Config, data: Path | None) -> dict[str, str]:
    """Metadata that says how a window is made of an image, and what the logits are of.

    preprocessing: JSON, as docs/checkpoints.md has it; mean: base64 of little-endian float32;
    classes: JSON, names. The data set's are left out where it is not there.
    """
    how = {
        "channels": "RGB",
        "canvas": config.data.canvas,
        "crop": config.model.crop,
        "divide_by": config.data.divide_by,
    }
    try:
        if data is None:
            dataset = open_trained_on(config, found.manifest["dataset"], found.path)
        else:
            moved = load_config([flat(config) | {"data.path": str(data)}])
            dataset = open_for(moved, found.path)
    except DatasetError as error:
        if data is not None:
            raise
        log.warning(f"exported without a mean image and names of classes: {error}")
        return {"preprocessing": json.dumps(how)}
    preprocess = Preprocess(config, dataset.statistics, torch.device("cpu"), torch.float32)
    mean = preprocess.mean if config.data.subtract == "mean_image" else preprocess.mean[:1, :1]
    keep, how["enlarge"] = as_packed(dataset)
    how["stored"] = None if keep else SIDE
    how["mean_shape"] = list(mean.shape)
    return {
        "preprocessing": json.dumps(how),
        "classes": json.dumps(dataset.classes),
        "mean": base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode(),
    }


def _check_torchvision(config: Config) -> None:
    """Raises ConfigError where a network is not torchvision's alexnet, but for its classes."""
    theirs = load_config("paper/torchvision-2014").model
    ours, wanted = flat(config), flat(load_config("paper/torchvision-2014"))
    for key in _ARCHITECTURE:
        if ours[key] != wanted[key]:
            raise ConfigError(
                f"{key}={_shown(ours[key])}: torchvision's alexnet has {_shown(wanted[key])}, and "
                "would compute something else: use --format onnx, or safetensors"
            )
    if final_side(config.model) != final_side(theirs):
        raise ConfigError(
            f"model.crop={config.model.crop}: it leaves maps of {final_side(config.model)} pixels "
            f"for fc6, and torchvision's alexnet has {final_side(theirs)}: use --format onnx, or "
            "safetensors"
        )


def _shown(value: Any) -> str:
    return f"{list(value) if isinstance(value, tuple) else value}".replace("'", "")


def _torchvision_names(config: Config) -> Mapping[str, str]:
    """Our parameters' names to torchvision's; raises ConfigError for other numbers of layers.

    In a layer that sees its own column only, weights keep our shape, half of torchvision's.
    """
    layers = config.model.layer_names
    if (len(config.model.conv), len(layers)) != (5, 8):
        raise ConfigError(
            f"model.conv={list(config.model.conv)}, model.fc={list(config.model.fc)}: "
            "torchvision's alexnet has 5 convolutions and 3 more layers: use --format safetensors"
        )
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in zip(layers, _TORCHVISION, strict=True)
        for kind in ("weight", "bias")
    }


_READ: dict[str, Callable[[Path, Config], Tensors]] = {
    "safetensors": _read_safetensors, "torchvision": _read_torchvision, "caffe": _read_caffe,
}  # fmt: skip
_WRITE: dict[str, Callable[[Path, Checkpoint, Config, Tensors], None]] = {
    "safetensors": _write_safetensors, "torchvision": _write_torchvision, "caffe": _write_caffe,
}  # fmt: skip
