"""Import weights from other programs into a checkpoint, and export a checkpoint's to them.

| format | from | to |
|---|---|---|
| safetensors | our names: conv1.weight, … | the same dtype and names, the config in its metadata |
| torchvision | a state dict (.pth, read without running a pickle, or .safetensors) | the same |
| caffe | .caffemodel, conv1's BGR turned to RGB; --mean: its mean image | .caffemodel, BGR |
| onnx | | windows (n, 3, crop, crop) to logits, by ONNX's own operators, with how windows are made
and class names in its metadata |

Exported networks expect windows as conv1 sees them here: the mean subtracted, divided by
data.divide_by.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.files import write, written_aside
from alexnet_dist.formats import caffe, onnx, torchvision
from alexnet_dist.network.model import whole_shapes
from alexnet_dist.network.precision import parameter_dtype
from alexnet_dist.tensor_files import Shape, TensorFile, misfit, save_tensors


def import_weights(
    kind: str, path: Path, out: Path, sources: Sequence[str], mean: Path | None = None
) -> Path:
    """Make a checkpoint of another program's weights, in `out`/checkpoints; return its path.

    Args:
        kind: safetensors, torchvision or caffe.
        out: the run folder to make.
        sources: the config of the network, as for train.
        mean: Caffe's mean image, to be subtracted instead of the data set's.

    Raises CheckpointError where the file is of another kind or network; ConfigError where `out`
    holds a run already, or the format cannot hold this network.
    """
    if checkpoints.traces(out / "checkpoints"):
        raise ConfigError(f"{out}: already holds a run: name a new folder")
    # The network's config; Caffe's mean image becomes a file of the run.
    if mean is not None:
        if kind != "caffe":
            raise ConfigError(f"--mean {mean}: is only for --format caffe")
        packed = io.BytesIO()
        np.save(packed, caffe.read_mean(mean))
        digest = hashlib.sha256(packed.getvalue()).hexdigest()
        own = ["data.subtract=mean_image", f"data.mean_from={(out / 'mean.npy').resolve()}",
               f"data.mean_sha256={digest}"]  # fmt: skip
        sources = [*sources, *own]
    config = load_config([*sources, f"name={out.name}", f"output_dir={out.parent}"])
    # Its tensors, checked before anything is written.
    tensors = _read(kind, path, config)
    wanted = whole_shapes(config.model)
    _check(tensors, wanted, path)
    # A checkpoint of step 0.
    dtype = parameter_dtype(config.train.precision)
    whole = {name: tensors[name].to(dtype).contiguous() for name in wanted}
    progress = {"step": 0, "score": None}
    if mean is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "mean.npy", packed.getvalue())
    return checkpoints.save(out / "checkpoints", config, "imported", whole, {}, progress, None)


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], path: Path) -> None:
    """Raise CheckpointError unless a file's tensors are finite numbers of the wanted shapes."""
    if wrong := misfit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted):
        raise CheckpointError(
            f"{path}: {wrong}, by the config: name the one that it was exported from, or another "
            "program's preset (paper/torchvision-2014, paper/caffe-alexnet, paper/caffenet), and "
            "set model.classes"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}: save it as float32")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite: use weights of an earlier step")


def export_weights(kind: str, source: Path, out: Path, data: Path | None = None) -> Path:
    """Write a checkpoint's weights, or those of a run's best, for another program; return `out`.

    Args:
        kind: safetensors, torchvision, caffe or onnx.
        source: a checkpoint or a run folder.
        data: onnx: the packed data set whose mean and class names are included; by default the one
            it was trained on, or with a warning none where that is missing.

    Raises CheckpointError; ConfigError where the other program has no such network.
    """
    if data is not None and kind != "onnx":
        raise ConfigError(f"--data {data}: is only for --format onnx")
    found = checkpoints.at(source)
    config = found.config
    own = found.parameters().tensors()
    tensors = {name: tensor.float() for name, tensor in own.items()}
    with written_aside(out) as aside:
        match kind:
            case "safetensors":
                about = {"config": json.dumps(flat(config)), "of": str(found.path)}
                save_tensors(aside, own, about)
            case "torchvision":
                torchvision.write(aside, config, tensors)
            case "caffe":
                caffe.write(aside, config, tensors)
            case "onnx":
                onnx.write(aside, found, config, tensors, data)
            case _:
                raise ValueError(kind)
    return out


def _read(kind: str, path: Path, config: Config) -> dict[str, Tensor]:
    """Return the tensors in a file by our names."""
    match kind:
        case "torchvision":
            return torchvision.read(path, config)
        case "caffe":
            return caffe.read(path)
        case "safetensors":
            return TensorFile(path).tensors()
        case _:
            raise ValueError(kind)
