"""What a config leaves to its data set: how many classes, and which split to evaluate on."""

from pathlib import Path
from typing import Any

from alexnet_dist.files import json_object, read_bytes

AUTO, NO_SPLIT, HELD_OUT = "auto", "none", "held_out"  # of data.eval_split
LEAVES = {"model.classes": 0, "data.eval_split": AUTO}  # a value that leaves it
_PAPERS = 1000, "val"  # where there is no data set yet


def follow_data(values: dict[str, Any], origin: dict[str, str]) -> None:
    """Put what data.path holds where `model.classes` is 0 and `data.eval_split` is auto.

    That split is `held_out` under `data.hold_out`; `val`, else `test`, where it has images and is
    not what is trained on; else none.
    Where no data set can be read, they are ImageNet's: whoever opens it says what is wrong.

    Args:
        values: of each dotted key, changed in place.
        origin: of each dotted key, where its value was said, changed in place.
    """
    path = Path(values["data.path"]) / "dataset.json"
    left = [key for key, leaves in LEAVES.items() if values[key] == leaves]
    if not left:
        return
    classes, split = _PAPERS
    try:
        meta = json_object(read_bytes(path))
        found = [
            name
            for name in ("val", "test")
            if meta["splits"].get(name, {"samples": 0})["samples"] != 0
            and name != values["data.train_split"]
        ]
        held = [HELD_OUT] if values["data.hold_out"] else []
        classes, split = len(meta["classes"]), [*held, *found, NO_SPLIT][0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    else:
        origin |= dict.fromkeys(left, str(path))
    values |= {k: v for k, v in zip(LEAVES, (classes, split), strict=True) if k in left}
