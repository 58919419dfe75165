"""Read and write Caffe's .caffemodel and .binaryproto, by the few fields of caffe.proto that hold
weights."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

from alexnet_dist.config.schema import Config, ModelConfig
from alexnet_dist.config.values import as_typed
from alexnet_dist.errors import CheckpointError, ConfigError, cannot_be_read
from alexnet_dist.files import opened
from alexnet_dist.network.shapes import map_sides, pooled_side, windows_along

_MOST_FIELDS = 2**16  # fields read of a file: AlexNet has hundreds, and each takes 100 bytes

Floats = npt.NDArray[np.float32]

# Message: field (number, type, repeated). Packed floats are bytes on the wire, and read as such.
_FIELDS = {
    "BlobShape": {"dim": (1, "INT64", True)},
    "BlobProto": {
        "num": (1, "INT32", False), "channels": (2, "INT32", False), "height": (3, "INT32", False),
        "width": (4, "INT32", False), "data": (5, "BYTES", True), "shape": (7, "BlobShape", False),
    },
    "V1LayerParameter": {"name": (4, "STRING", False), "blobs": (6, "BlobProto", True)},
    "LayerParameter": {
        "name": (1, "STRING", False), "type": (2, "STRING", False), "blobs": (7, "BlobProto", True),
    },
    "NetParameter": {
        "name": (1, "STRING", False), "layers": (2, "V1LayerParameter", True),
        "layer": (100, "LayerParameter", True),
    },
}  # fmt: skip


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights in a .caffemodel by our names; conv1's BGR is turned to RGB."""
    tensors: dict[str, Tensor] = {}
    for layer, blobs in read_layers(path).items():
        weight, *biases = (torch.from_numpy(blob.copy()) for blob in blobs)
        if layer.startswith("fc") and weight.shape[:-2] == (1, 1):  # the old format has 4 dims
            weight = weight[0, 0]
        blue_first = layer == "conv1" and weight.dim() == 4
        tensors[f"{layer}.weight"] = weight.flip(1) if blue_first else weight
        named = zip(("bias", "blob3"), biases, strict=False)  # no network of ours has a third blob
        tensors |= {f"{layer}.{name}": bias.flatten() for name, bias in named}
    return tensors


def write(out: Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Write weights as a .caffemodel; conv1's RGB is turned to BGR. Raise ConfigError where Caffe
    has no such layer."""
    _check_network(config.model)
    weights = {**tensors, "conv1.weight": tensors["conv1.weight"].flip(1)}
    layers = {
        name: [weights.pop(f"{name}.{kind}").numpy() for kind in ("weight", "bias")]
        for name in config.model.layer_names
    }
    for name in weights:
        raise ConfigError(
            f"{name}: a layer of Caffe's has a weight and a bias alone: use --format safetensors"
        )
    write_layers(out, config.name, layers)


def _check_network(model: ModelConfig) -> None:
    """Raise ConfigError where Caffe has no layer that computes one of a network's."""
    remedy = "use --format onnx or safetensors"
    for name in model.fc_names:
        if model.columns > 1 and name not in model.exchange:
            raise ConfigError(
                f"model.exchange={as_typed(model.exchange)}: {name} sees only its own column, but "
                f"a fully-connected layer of Caffe's sees all units: {remedy}"
            )
    side, shapes = model.crop, zip(model.kernel, model.stride, model.padding, strict=True)
    ours = zip(model.conv_names, shapes, map_sides(model), strict=True)
    for name, (kernel, stride, padding), sides in ours:
        made = pooled = windows_along(side + 2 * padding, kernel, stride, round_up=False)
        if name in model.pool_after:
            window, apart = model.pool
            pooled = pooled_side(made, window, apart, round_up=True)
        if (made, pooled) != sides:
            raise ConfigError(
                f"model.round_up={as_typed(model.round_up)}: {name} and its pooling leave maps of "
                f"{sides[0]} and {sides[1]} pixels, but of {made} and {pooled} in Caffe, which "
                f"rounds up in pooling alone: {remedy}"
            )
        side = pooled


def read_layers(path: Path) -> dict[str, list[Floats]]:
    """Return the blobs of each layer of a .caffemodel, in the old format (V1) or the present one.

    Raises CheckpointError where it is no .caffemodel.
    """
    net = _parsed("NetParameter", path)
    layers = {layer.name: layer.blobs for layer in (*net.layers, *net.layer) if layer.blobs}
    if not layers:
        raise CheckpointError(f"{path}: no layer in it has weights: is it a .caffemodel?")
    for name in layers:
        if not isinstance(name, str):  # protobuf returns bytes that are not UTF-8
            raise CheckpointError(f"{path}: a layer's name is not UTF-8: {name!r}")
    return {name: [_array(blob, path) for blob in blobs] for name, blobs in layers.items()}


def read_mean(path: Path) -> Floats:
    """Read a mean image (.binaryproto): (height, width, 3), red first; raise CheckpointError."""
    mean = _array(_parsed("BlobProto", path), path)
    if mean.shape[-3:-2] != (3,) or mean.size != math.prod(mean.shape[-3:]):
        raise CheckpointError(
            f"{path}: a mean of shape {mean.shape}, but must be 3 × height × width"
        )
    return np.ascontiguousarray(mean.reshape(mean.shape[-3:])[::-1].transpose(1, 2, 0))


def write_layers(path: Path, name: str, layers: Mapping[str, list[Floats]]) -> None:
    """Write a .caffemodel in the present format, with each layer's blobs."""
    net = _message("NetParameter")(name=name)
    for layer, blobs in layers.items():
        kind = "Convolution" if blobs[0].ndim == 4 else "InnerProduct"
        part = net.layer.add(name=layer, type=kind)
        for blob in blobs:
            message = part.blobs.add()
            message.shape.dim.extend(blob.shape)
            message.data.append(np.ascontiguousarray(blob, "<f4").tobytes())
    path.write_bytes(net.SerializeToString())


def _parsed(kind: str, path: Path) -> Any:
    """Parse a file as one message of this kind; raise CheckpointError."""
    message = _message(kind)()
    try:
        with opened(path) as file:
            content = file.read()
        _check_fields(memoryview(content), kind, _MOST_FIELDS)
        message.ParseFromString(content)
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from error
    except (ValueError, DecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as Caffe's {kind}: {error}") from error
    return message


def _check_fields(content: memoryview, kind: str, left: int) -> int:
    """Count a message's fields; return how many of the `left` may still follow; raise ValueError.

    An empty field is only two bytes, and protobuf ends the process where memory runs out.
    """
    messages = {number: of for number, of, _ in _FIELDS[kind].values()}
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire_type = key & 7  # 0: a varint, which is read here; 1, 5: 8 and 4 bytes; 2: see below
        size = {0: 0, 1: 8, 5: 4}.get(wire_type)
        number, at = _varint(content, at) if wire_type in (0, 2) else (0, at)
        left -= 1
        if size is None:  # bytes, a message, or packed numbers, of which each has a byte at least
            if wire_type != 2 or number > len(content) - at:
                raise ValueError("a field that is cut short, or of an unknown kind")
            of, size = messages.get(key >> 3, ""), number
            if of in _FIELDS:
                left = _check_fields(content[at : at + size], of, left)
            elif of in ("INT32", "INT64"):
                left -= size
        at += size
        if left < 0:
            raise ValueError(f"more than {_MOST_FIELDS:,} fields")
    return left


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, and where it ends."""
    value = 0
    for place in range(10):
        if at + place >= len(content):
            break
        byte = content[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number without an end")


def _array(blob: Any, path: Path) -> Floats:
    """Return a blob's values in its shape; raise CheckpointError where they do not fit it."""
    content = b"".join(blob.data)
    old = [blob.num, blob.channels, blob.height, blob.width]
    shape = list(blob.shape.dim) if blob.HasField("shape") else old
    if min(shape, default=0) < 1 or int(np.prod(shape, dtype=object)) * 4 != len(content):
        raise CheckpointError(f"{path}: {len(content)} bytes for a blob of shape {shape}")
    return np.frombuffer(content, "<f4").reshape(shape)


@cache
def _message(kind: str) -> Any:
    """Return the class of a message of caffe.proto, with the fields that are needed here."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe_weights")
    types = descriptor_pb2.FieldDescriptorProto
    for message, fields in _FIELDS.items():
        made = file.message_type.add(name=message)
        for name, (number, of, repeated) in fields.items():
            field = made.field.add(name=name, number=number)
            field.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            if of in _FIELDS:
                field.type, field.type_name = types.TYPE_MESSAGE, f".caffe_weights.{of}"
            else:
                field.type = types.Type.Value(f"TYPE_{of}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe_weights.{kind}"))
