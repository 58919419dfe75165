"""Export a network as ONNX: windows (n, 3, crop, crop) to logits, by ONNX's own operators."""

import base64
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import open_trained_on
from alexnet_dist.data.prepare.convert import SIDE, options_of
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.errors import ConfigError, DatasetError
from alexnet_dist.network.model import AlexNet

log = logging.getLogger(__name__)


def write(
    out: Path, found: Checkpoint, config: Config, tensors: Mapping[str, Tensor], data: Path | None
) -> None:
    """Write an ONNX model, with how windows are made, and class names, in its metadata.

    Args:
        data: packed data set whose mean and class names are included; None for the one the network
            was trained on.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs {error.name}: pip install 'alexnet-dist[export]'"
        ) from error
    about = {"config": json.dumps(flat(config))} | _preprocessing(found, config, data)
    model = AlexNet(config.model, init_weights=False).eval()
    model.load_state_dict(tensors)
    windows = torch.zeros(2, 3, config.model.crop, config.model.crop)
    batch = {"x": {0: torch.export.Dim("batch")}}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # silences notes on constant folding
    program = torch.onnx.export(
        model, (windows,), input_names=["windows"], output_names=["logits"],
        dynamic_shapes=batch, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    made = program.model_proto
    onnx.helper.set_model_props(made, about)
    onnx.save(made, out)


def _preprocessing(found: Checkpoint, config: Config, data: Path | None) -> dict[str, str]:
    """Return metadata on how a window is made from an image, and what the logits stand for.

    preprocessing: JSON, described in docs/checkpoints.md; mean: base64 of little-endian float32;
    classes: JSON, the class names. The latter two are left out where the data set is missing.
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
            moved = overridden(config, {"data.path": str(data)})
            dataset = found.open_data(moved)
    except DatasetError as error:
        if data is not None:
            raise
        log.warning(f"exported without a mean image and class names: {error}")
        return {"preprocessing": json.dumps(how)}
    preprocess = Preprocess(config, dataset.statistics, torch.device("cpu"), torch.float32)
    mean = preprocess.mean if config.data.subtract == "mean_image" else preprocess.mean[:1, :1]
    keep, how["enlarge"] = options_of(dataset)
    how["stored"] = None if keep else SIDE
    how["mean_shape"] = list(mean.shape)
    return {
        "preprocessing": json.dumps(how),
        "classes": json.dumps(dataset.classes),
        "mean": base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode(),
    }
