"""The engine for ZeRO stages 1 and 2, by DeepSpeed: replicas that share out the optimiser's state,
and at stage 2 the gradients. The only module that imports DeepSpeed.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import StepInput
from alexnet_dist.engines.base import (
    AT,
    WholeTensors,
    check_fit,
    loss_and_counts,
    skip_flag,
    with_damaged,
)
from alexnet_dist.engines.graph import capture_forward, captures, on_stream
from alexnet_dist.engines.optimizer import Optimizer, initial_state
from alexnet_dist.errors import ConfigError, one_line
from alexnet_dist.files import json_object, read_bytes
from alexnet_dist.network import kernels
from alexnet_dist.network.layers import Layer
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.columns import merge
from alexnet_dist.parallel.layouts import ZERO_STAGES
from alexnet_dist.parallel.replicas import summed
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE


def deepspeed_config(config: Config, replicas: int) -> dict[str, Any]:
    """Return DeepSpeed's config: made from ours, overridden by the user's file.

    Raises:
        ConfigError: `layout.deepspeed` is no JSON file of DeepSpeed keys.
    """
    parts = config.train.micro_batches
    ours: dict[str, Any] = {
        "train_batch_size": config.train.batch,
        "train_micro_batch_size_per_gpu": config.train.batch // replicas // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": ZERO_STAGES[config.layout.kind],
            "reduce_bucket_size": 2**24,  # its default of 2 GB is always allocated
            "allgather_bucket_size": 2**24,
            "compute_grad_norm": False,  # it would cost a collective and a host sync
        },
        # DeepSpeed's `bf16` would cast the network's parameters.
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise
    }
    if config.layout.compress_gradients:
        ours["communication_data_type"] = "bf16"
        # Under autocast DeepSpeed goes by the layers' classes, and knows only torch's own.
        ours["torch_autocast"]["lower_precision_safe_modules"] = [
            f"{layer.__module__}.{layer.__qualname__}" for layer in Layer.__subclasses__()
        ]
    if config.layout.deepspeed == "none":
        return ours
    try:
        theirs = json_object(read_bytes(Path(config.layout.deepspeed)))
        return _laid_over(ours, theirs)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"layout.deepspeed={config.layout.deepspeed!r}: not a JSON file of DeepSpeed keys: "
            f"{error}"
        ) from error


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _laid_over(inner, value) if both else value  # type: ignore[arg-type]
    return merged


class ZeroEngine:
    """Runs a whole network on each rank, of which each rank updates a part of the flat float32
    weights.

    DeepSpeed flattens weights and biases (our two parameter groups) each into one long vector,
    padded to a multiple of the ranks, and gives every rank an equal piece of it.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        assert topology.replica_group is not None
        self.config, self.topology, self.group = config, topology, topology.replica_group
        with topology.device:
            self.model = model = AlexNet(config.model, config.seed)
        fused = kernels.fused(config.train.execution, topology.device)
        for layer in model.layers():
            layer.fused = fused
        for parameter in model.parameters():  # DeepSpeed flattens their bytes: no channels_last
            parameter.data = parameter.data.contiguous()
        self.optimizer = Optimizer(config.optimizer, model.named_parameters())
        self.optimizer.optimizer.state.clear()  # the flat pieces get their own
        # With stage 2, gradients of a captured backward were not finite on a GPU: docs/log.md.
        stage1 = ZERO_STAGES[config.layout.kind] == 1
        graph = fused and stage1 and captures(config.train.execution, topology.device)
        stream = torch.cuda.Stream() if graph else None
        with on_stream(stream):  # where autograd will work with the nodes that DeepSpeed keeps
            self.engine = self._initialised(model)
        self.zero = self.engine.optimizer
        for piece in self._pieces():
            self.optimizer.optimizer.state[piece] = initial_state(config.optimizer, piece)
        if stream is not None:
            self._capture(stream)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Capture forward and backward; DeepSpeed's own step reads a flag on the host."""
        config, device = self.config, self.topology.device
        n, side = config.train.batch // self.topology.replicas, config.model.crop
        if config.train.micro_batches > 1:  # their sums would lie where the graph writes each
            return
        windows = torch.zeros(n, 3, side, side, dtype=DTYPES[config.train.precision], device=device)
        windows = windows.contiguous(memory_format=torch.channels_last)
        numbers = torch.zeros(n + 1, dtype=torch.int64, device=device)
        capture_forward(self.model, stream, windows, numbers[1:].clone(), numbers[0].clone())

    def train_step(
        self, batch: StepInput, step: int, rate: float, keep_gradients: bool = False
    ) -> Tensor:
        self.engine.train()
        batch = batch.batch()
        size, parts = self.config.train.batch, self.config.train.micro_batches
        n, replicas = len(batch.labels), self.topology.replicas
        first = self.topology.replica * n
        slots = torch.arange(first, first + n, device=self.topology.device)
        now = torch.full((), step, device=self.topology.device)
        # DeepSpeed averages gradients over ranks; ours are to be summed.
        scale = self.optimizer.loss_scale(rate) / size * replicas
        stats = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for part in range(parts):
            rows = slice(part * n // parts, (part + 1) * n // parts)
            with TIMELINE.span("forward"):
                logits = self.engine(batch.windows[rows], slots[rows], now)
                loss, counts = loss_and_counts(logits, batch.labels[rows])
            with TIMELINE.span("backward"):
                self.engine.backward(loss * scale, scale_wrt_gas=False)
            stats = stats + counts
            if part == parts - 1:
                stats = with_damaged(stats, batch)
                stats[AT.norm] = get_total_norm(self._gradients()).double() ** 2
                skip = skip_flag(summed(stats, self.group), self.optimizer.loss_scale(rate))
                self.optimizer.prepare(rate, skip=skip)
            with TIMELINE.span("optimizer"):
                self.engine.step()  # counts micro-batches, and updates after the last
        return stats

    @torch.no_grad()
    def predict(self, windows: Tensor) -> Tensor:
        self.engine.eval()
        logits: Tensor = self.engine(windows)
        return logits.float()

    def parameter(self, name: str) -> Tensor | None:
        whole = self.model.get_parameter(name).detach()
        return whole.to("cpu", copy=True) if self.topology.is_rank_0 else None

    def gradient(self, name: str) -> Tensor | None:
        return None

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        for group, piece in enumerate(self._pieces()):
            parameters |= self._cut(group, merge(piece, self._length(group), self.group))
            for kind, value in self.optimizer.optimizer.state[piece].items():
                whole = merge(value, self._length(group), self.group)
                tensors = self._cut(group, whole)
                optimizer |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return parameters, optimizer

    def replicated(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        check_fit(self.config, parameters, optimizer)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(parameters.rows(name, slice(None)))
        for group, piece in enumerate(self._pieces()):
            mine = slice(self.group.rank() * len(piece), (self.group.rank() + 1) * len(piece))
            piece.copy_(self.zero.bit16_groups_flat[group][mine])
            if optimizer is None:
                continue
            for kind, state in self.optimizer.optimizer.state[piece].items():
                flat = torch.zeros(self._length(group))
                for name, _, rows in self._places(group):
                    flat[rows] = optimizer.rows(f"{kind}/{name}", slice(None)).flatten()
                state.copy_(flat[mine] if state.dim() else flat[0])  # a number is that of all

    def _gradients(self) -> list[Tensor]:
        """Return this rank's part of the summed gradients; none if DeepSpeed offloads them."""
        return [part for parts in self.zero.averaged_gradients.values() for part in parts or ()]

    def _pieces(self) -> list[Tensor]:
        """Return this rank's flat float32 pieces: of the weights, and of the biases."""
        return list(self.zero.single_partition_of_fp32_groups)

    def _length(self, group: int) -> int:
        return len(self.zero.bit16_groups_flat[group])

    def _places(self, group: int) -> Iterator[tuple[str, torch.Size, slice]]:
        """Yield each parameter's name, shape and position in the group's flat vector."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter in self.zero.bit16_groups[group]:
            begin = parameter.storage_offset()
            yield names[parameter], parameter.shape, slice(begin, begin + parameter.numel())

    def _cut(self, group: int, flat: Tensor | None) -> dict[str, Tensor]:
        """Cut a flat vector into the parameters' tensors; a scalar is copied to each."""
        if flat is None or not self.topology.is_rank_0:
            return {}
        return {
            name: (flat[rows].view(shape) if flat.dim() else flat).clone()
            for name, shape, rows in self._places(group)
        }

    def _initialised(self, model: AlexNet) -> Any:
        device = self.topology.device
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed wants it; srun sets none
        warnings.filterwarnings(
            "ignore", message=".*all_gather_into_tensor", category=FutureWarning
        )
        import deepspeed
        from deepspeed.runtime import compiler, torch_autocast
        from deepspeed.utils import groups, logger

        logger.setLevel(logging.ERROR)  # it warns of optimisers that it has not tested; ours is
        # Compile no kernels for collectives that are not used; use our group, with our timeout.
        deepspeed.ops.__compatible_ops__ = {}
        groups._WORLD_GROUP = self.group
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # an earlier engine may have set it
        config = deepspeed_config(self.config, self.topology.replicas)
        optimizer, theirs = self.optimizer.optimizer, self.config.layout.deepspeed
        try:
            # It imports Muon in any case, where torch.compile would import Inductor, for seconds.
            with patch.object(compiler, "compile", _not_compiled, create=True):
                engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=config, dist_init_required=False
                )
        except (ValueError, AssertionError) as error:
            if theirs == "none":
                raise
            raise ConfigError(
                f"layout.deepspeed={theirs!r}: DeepSpeed refuses it: {one_line(error)}"
            ) from None
        return engine


def _not_compiled(function: Any = None, **_: Any) -> Any:
    """Stand in for torch.compile as a decorator, with or without arguments."""
    return function or _not_compiled
