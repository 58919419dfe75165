"""The engine of Krizhevsky 2014, scheme (a): a rank's convolutions see its own samples, its part
of the fully-connected layers sees the samples of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.data.batch import Batch
from alexnet_dist.engines.base import AT, squared_norm
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import parameter_dtype
from alexnet_dist.parallel.columns import gathered
from alexnet_dist.parallel.replicas import ShardExchange, summed


class ShardedFcEngine(TorchEngine):
    """Replicates the convolutions with DDP, and splits the rows of fc6 … fc8 over all ranks."""

    @property
    def shards(self) -> dist.ProcessGroup:
        """The group of all ranks."""
        group = self.topology.replica_group
        assert group is not None
        return group

    def build(self, init_weights: bool) -> AlexNet:
        return AlexNet(
            self.config.model,
            self.config.seed,
            exchange=ShardExchange(self.shards, self.config.model.classes),
            dtype=parameter_dtype(self.config.train.precision),
            fc_part=(self.topology.replica, self.topology.replicas),
            init_weights=init_weights,
        )

    def shard_group(self, name: str) -> dist.ProcessGroup | None:
        return self.shards if name.rpartition("/")[2].startswith("fc") else None

    def labels_and_slots(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return gathered(batch.labels, self.shards), self.slots(len(batch.labels))

    def complete_stats(self, stats: Tensor) -> None:
        """Fill in the norm, and sum what ranks counted of their own samples; each rank has scored
        the samples of all ranks."""
        named = list(self.model.named_parameters())
        split_norm = squared_norm(p for name, p in named if self.shard_group(name))
        whole_norm = squared_norm(p for name, p in named if not self.shard_group(name))
        stats[AT.norm] = split_norm + whole_norm / self.shards.size()
        summed(stats[AT.damaged :], self.shards)

    @torch.no_grad()
    def predict(self, windows: Tensor) -> Tensor:
        n = len(windows)
        most = int(max(self.topology.gather(n))[0])  # collectives need the same n on all ranks
        windows = torch.cat([windows, windows.new_zeros(most - n, *windows.shape[1:])])
        logits: Tensor = super().predict(windows)
        mine: Tensor = logits.unflatten(0, (-1, most))[self.topology.replica, :n]
        return mine

    def replicated(self) -> dict[str, Tensor]:
        return {n: t for n, t in super().replicated().items() if not self.shard_group(n)}

    def sum_over_shards(self, sums: Tensor) -> Tensor:
        named = self.model.named_parameters()
        names = (name for name, _ in named if not name.endswith(".bias"))  # as `Optimizer` groups
        sums = sums.clone()
        for index, name in enumerate(names):
            if self.is_replicated(name) and self.shards.rank() > 0:  # rank 0 counts it
                sums[:, index] = 0
        return summed(sums, self.shards)

    def is_replicated(self, name: str) -> bool:
        return self.shard_group(name) is None

    def replicate(self, group: dist.ProcessGroup) -> nn.Module:
        split = [name for name, _ in self.model.named_parameters() if self.shard_group(name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, split)
        return super().replicate(group)
