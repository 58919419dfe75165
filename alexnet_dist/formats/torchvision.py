"""Weights of torchvision's alexnet: a state dict as .pth or .safetensors."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.config.values import as_typed
from alexnet_dist.errors import CheckpointError, ConfigError, cannot_be_read, one_line
from alexnet_dist.files import MOST_MEMORY, check_opcodes, opened, within_memory
from alexnet_dist.network.shapes import final_side
from alexnet_dist.tensor_files import TensorFile, save_tensors

# Most opcodes of a state dict's pickle, of which torchvision's alexnet has 500. Few are allowed,
# since each can make a copy of everything before it.
_MOST_OPCODES = 2**15
# How a .pth begins: since torch 1.6 as a zip does; before, with a pickle of a number longer than
# `check_opcodes` allows, so that it is compared instead.
_ZIP = b"PK\3\4"
_NUMBER = pickle.dumps(torch.serialization.MAGIC_NUMBER, torch.serialization.DEFAULT_PROTOCOL)
# The names of the layers with weights in torchvision's alexnet.
_LAYERS = ("features.0", "features.3", "features.6", "features.8", "features.10",
           "classifier.1", "classifier.4", "classifier.6")  # fmt: skip
# Keys that must be as in torchvision's alexnet, since its code fixes them.
_ARCHITECTURE = tuple(f"model.{key}" for key in (
    "columns", "conv", "kernel", "stride", "padding", "fc", "activation", "activation_last",
    "pool_after", "pool", "pool_average", "round_up", "lrn.layers", "spatial_norm.layers",
    "dropout_scaling",
))  # fmt: skip


def read(path: Path, config: Config) -> dict[str, Tensor]:
    """Read a state dict by our names; layers we do not have keep theirs."""
    if path.suffix == ".safetensors":
        found: Any = TensorFile(path).tensors()
    else:
        try:
            with opened(path) as file:
                _check_archive(file)
                with within_memory(MOST_MEMORY + 2 * path.stat().st_size):
                    found = torch.load(file, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(cannot_be_read(path, error)) from error
        except Exception as error:  # a pickle can fail in any way
            raise CheckpointError(f"{path} is not a state dict: {one_line(error)}") from error
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            keys = f", but of {', '.join(map(str, found))[:200]}" if isinstance(found, dict) else ""
            raise CheckpointError(
                f"{path} is not a dict of tensors{keys}: save only the model's state_dict()"
            )
    names = {b: a for a, b in _names(config).items()}
    return {names.get(name, str(name)): tensor for name, tensor in found.items()}


def write(out: Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Write weights as a state dict; raise ConfigError where torchvision would compute another
    network with them."""
    _check_network(config)
    names = _names(config)
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    if out.suffix == ".safetensors":
        save_tensors(out, renamed)
    else:
        torch.save(renamed, out)


def _check_archive(file: BinaryIO) -> None:
    """Raise where a .pth has pickles of more opcodes, or more bytes unpacked, than it needs, or a
    wrong checksum, which torch does not check. The file is left at its start."""
    begins = file.read(len(_NUMBER))
    if begins == _NUMBER:  # four more pickles, then the tensors' bytes
        for _ in range(4):
            check_opcodes(file, _MOST_OPCODES)
        file.seek(0)
        return
    # zipfile.is_zipfile goes by the end of a file, torch by its beginning.
    if not begins.startswith(_ZIP):
        raise ValueError("it does not begin as torch.save's files do")
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * file.seek(0, os.SEEK_END) + 2**20:  # torch does not compress
            raise ValueError(f"it unpacks to {unpacked:,} bytes")
        if (wrong := archive.testzip()) is not None:
            raise ValueError(
                f"{wrong} in it does not match its checksum: it was damaged, or saved without "
                "checksums (torch.serialization.set_crc32_options): copy or save it again"
            )
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as pickled:
                    check_opcodes(pickled, _MOST_OPCODES)
    file.seek(0)


def _check_network(config: Config) -> None:
    """Raise ConfigError where a network differs from torchvision's alexnet in more than classes."""
    theirs = load_config("paper/torchvision-2014")
    ours, wanted = flat(config), flat(theirs)
    for key in _ARCHITECTURE:
        if ours[key] != wanted[key]:
            raise ConfigError(
                f"{key}={as_typed(ours[key])}: torchvision's alexnet has {as_typed(wanted[key])}, "
                "and would compute something else: use --format onnx or safetensors"
            )
    side, their_side = final_side(config.model), final_side(theirs.model)
    if side != their_side:
        raise ConfigError(
            f"model.crop={config.model.crop}: leaves maps of {side} pixels for fc6, but "
            f"torchvision's alexnet has {their_side}: use --format onnx or safetensors"
        )


def _names(config: Config) -> Mapping[str, str]:
    """Map our parameters' names to torchvision's; raise ConfigError for other numbers of layers.

    The weights of a layer whose columns see only their own maps have half of torchvision's inputs.
    """
    layers = config.model.layer_names
    if (len(config.model.conv), len(layers)) != (5, 8):
        raise ConfigError(
            f"model.conv={list(config.model.conv)}, model.fc={list(config.model.fc)}: "
            "torchvision's alexnet has 5 convolutions and 3 more layers: use --format safetensors"
        )
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in zip(layers, _LAYERS, strict=True)
        for kind in ("weight", "bias")
    }
