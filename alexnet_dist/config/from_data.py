"""Settings that a config can leave to its data set: its classes, and the split to evaluate on."""

from pathlib import Path
from typing import Any

from alexnet_dist.files import json_object, read_bytes

AUTO, NO_SPLIT, HELD_OUT = "auto", "none", "held_out"  # values of data.eval_split
FROM_DATA = {"model.classes": 0, "data.eval_split": AUTO}  # values that mean: from the data set
_IMAGENET = 1000, "val"  # assumed while there is no data set


def fill_from_data(values: dict[str, Any], origin: dict[str, str]) -> None:
    """Fill in `model.classes` where it is 0 and `data.eval_split` where it is auto, from data.path.

    The split becomes `held_out` if `data.hold_out` is set; otherwise `val`, or else `test`, if it
    has images and is not trained on; otherwise none. If no data set can be read, both get
    ImageNet's values, and whatever opens the data set later reports the error.

    Args:
        values: dotted key to value; changed in place.
        origin: dotted key to where its value was given; changed in place.
    """
    path = Path(values["data.path"]) / "dataset.json"
    left = [key for key, value in FROM_DATA.items() if values[key] == value]
    if not left:
        return
    classes, split = _IMAGENET
    try:
        meta = json_object(read_bytes(path))
        scored = [
            name
            for name in ("val", "test")
            if meta["splits"].get(name, {"samples": 0})["samples"] != 0
            and name != values["data.train_split"]
        ]
        held = [HELD_OUT] if values["data.hold_out"] else []
        classes, split = len(meta["classes"]), [*held, *scored, NO_SPLIT][0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    else:
        origin |= dict.fromkeys(left, str(path))
    values |= {k: v for k, v in zip(FROM_DATA, (classes, split), strict=True) if k in left}
