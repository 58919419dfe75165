"""Differences between torch 2.11 and 2.14; delete this once 2.14 is the oldest supported version.

- `all_gather_single` and `set_timeout` have other names.
- LaunchConfig has no `shutdown_timeout`: ranks would be killed 30 s after a signal, even while they
  save.
- After a capture that failed, the allocator behaves as if it were still capturing: memory that
  several streams have used is never freed.
"""

import signal
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout


def abandon_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """After a capture that failed: have the allocator know that it is over, and give up its memory
    as torch 2.14 does by itself."""
    if device.type != "cuda":
        return
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # torch has done so
        return
    torch._C._cuda_releasePool(device.index, pool)


def elastic_launch(
    config: dict[str, Any], shutdown_timeout_s: int, entry: Any, *args: Any
) -> dict[int, Any]:
    """Start ranks with torch's elastic agent; return what `entry` returns, by rank.

    Args:
        config: LaunchConfig's arguments.
        shutdown_timeout_s: time ranks have to leave after a signal before they are killed.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    returned: dict[int, Any]
    if hasattr(api.LaunchConfig, "shutdown_timeout"):
        patient = api.LaunchConfig(**config, shutdown_timeout=shutdown_timeout_s)
        returned = api.elastic_launch(patient, entry)(*args)
        return returned

    class PatientAgent(LocalElasticAgent):
        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            if self._pcontext:
                self._pcontext.close(death_sig, shutdown_timeout_s)
            super()._shutdown(death_sig)  # no rank is left to wait for

    with patch.object(api, "LocalElasticAgent", PatientAgent):
        returned = api.elastic_launch(api.LaunchConfig(**config), entry)(*args)
    return returned
