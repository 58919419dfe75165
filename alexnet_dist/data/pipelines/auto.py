"""`data.pipeline=auto`: choose a pipeline for this machine and data set."""

import contextlib
from dataclasses import replace
from typing import Literal

from alexnet_dist.config.from_data import AUTO, NO_SPLIT
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.dali_pipeline import check_dali
from alexnet_dist.data.pipelines.resident import FreeMemory, decoded_bytes, gb
from alexnet_dist.errors import in_words
from alexnet_dist.parallel.topology import Topology

SHARE = 0.5  # of the memory left free by the network, which decoded images may take


def splits_of(config: Config) -> list[str]:
    """Return the splits that a run reads."""
    seen = config.data.train_split, config.data.eval_split
    return [name for name in dict.fromkeys(seen) if name != NO_SPLIT]


def choose_pipeline(config: Config, topology: Topology, dataset: Dataset) -> tuple[Config, str]:
    """Return the config with `auto` replaced by a pipeline, alike on every rank, and the reason.
    Collective."""
    if config.data.pipeline != AUTO:
        return config, "set"
    kind: Literal["resident", "dali", "torch"] = "torch"
    if topology.device.type == "cpu":  # there decoding is 1 % of a step: docs/log.md
        why = "auto: on a CPU"
    else:
        size = decoded_bytes(config, dataset, splits_of(config))
        free = FreeMemory.of(config, topology).device
        why = f"auto: decoded images would take {gb(size)} per rank, of {gb(free)} free"
        if size <= SHARE * free:
            kind = "resident"
        elif wrong := _dali_fails(topology):
            why += f", and DALI cannot decode here: {wrong}"
        else:
            kind = "dali"
    return replace(config, data=replace(config.data, pipeline=kind)), why


def decoders(config: Config, topology: Topology) -> str:
    """Return what decodes images for a GPU, for the log; empty where there is nothing to say."""
    if config.data.pipeline == "dali" and topology.device.type == "cuda" and topology.is_rank_0:
        with contextlib.suppress(Exception):  # the pipeline will say so
            return f", {check_dali(topology.device.index)}"
    return ""


def _dali_fails(topology: Topology) -> str:
    """Return why DALI cannot decode on a rank's GPU; empty if it can on all ranks. Collective."""
    wrong = ""
    try:
        check_dali(topology.device.index)
    except Exception as error:  # of any of its libraries
        wrong = f"{in_words(error) or ' '.join(str(error).split())[:200]}" or repr(error)
    return topology.first_message(wrong)
