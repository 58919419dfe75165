"""Ranks that share a GPU (`layout.share_gpu`): whether they fit on it together, and what cannot be
concluded from their speed."""

import torch

from alexnet_dist.config.schema import Config
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import device
from alexnet_dist.planning.machines import kind_of


def check(config: Config, ranks: int) -> None:
    """Raise ConfigError if so many ranks cannot share this host's GPUs, as `layout.share_gpu` asks,
    or if one needs more memory than its share. Takes seconds if they share GPUs."""
    if problem := device.share_problem(config, ranks):
        raise ConfigError(problem)
    if not config.layout.share_gpu or (each := device.ranks_per_gpu(config, ranks)) < 2:
        return
    properties = (torch.cuda.get_device_properties(i) for i in range(device.gpus(config)))
    least = min(properties, key=lambda gpu: gpu.total_memory)
    share = device.memory_share(least.total_memory, each)
    from alexnet_dist.planning.dry_run import needed  # takes a second to import

    need = needed(config, ranks)
    if need > share:
        raise ConfigError(
            f"layout.share_gpu=true: a rank of layout.kind={config.layout.kind} needs about "
            f"{need / 1e9:.1f} GB in train.precision={config.train.precision}, but {each} ranks on "
            f"{least.name} ({least.total_memory / 1e9:.0f} GB) have {share / 1e9:.1f} GB each: "
            "raise train.micro_batches, lower train.batch, or start fewer ranks"
        )


def unseen(config: Config, ranks: int) -> str:
    """Return what the images/s of ranks that share a GPU do not tell; "" if each has its own."""
    if (each := device.ranks_per_gpu(config, ranks)) < 2:
        return ""
    name = torch.cuda.get_device_name()
    kind = kind_of(name) or "KIND"
    return (
        f"images/s are those of {name}, which up to {each} ranks share in turn, not of a GPU for "
        f"each, and no bytes cross a link; `alexnet-dist plan CONFIG --gpus {kind}:{ranks}` "
        "estimates both"
    )
