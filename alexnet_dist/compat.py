"""What torch 2.11 has otherwise than torch 2.14; to be deleted once 2.14 is the oldest we take.

- `all_gather_single` and `set_timeout` have their older names.
- LaunchConfig takes no `shutdown_timeout`: ranks are killed 30 s after a signal, amid a long save.
"""

import signal
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed import distributed_c10d

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout


def elastic_launch(
    config: dict[str, Any], shutdown_timeout_s: int, entry: Any, *args: Any
) -> dict[int, Any]:
    """What the entry returns on each rank that torch's elastic agent starts.

    Args:
        config: LaunchConfig's arguments.
        shutdown_timeout_s: that ranks have to leave after a signal, before they are killed.
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
            super()._shutdown(death_sig)  # finds no rank to wait for

    with patch.object(api, "LocalElasticAgent", PatientAgent):
        returned = api.elastic_launch(api.LaunchConfig(**config), entry)(*args)
    return returned
