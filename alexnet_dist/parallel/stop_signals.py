"""Stopping on signals: a handler sets a flag, the ranks agree on it, the loop saves and exits.

| what arrives | what happens | exit |
|---|---|---|
| SIGUSR1, SIGUSR2 | saved; resume me | 75 |
| SIGTERM; SIGHUP, but under nohup | saved; do not resume by yourself | 143 |
| first SIGINT | saved; do not resume by yourself | 130 |
| second SIGINT | left at once, the last good checkpoint intact | 130 |
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # handlers are installed before torch is imported
    import torch
    import torch.distributed as dist

    from alexnet_dist.parallel.topology import Topology

# Exit codes by the flag's value; where ranks saw different signals, the highest counts.
EXITS = {1: 75, 2: 143, 3: 130}
CANNOT_SAVE = 4  # no signal: what `poll` returns on all ranks while rank 0 cannot save
FLAGS = {
    signal.SIGUSR1: 1, signal.SIGUSR2: 1, signal.SIGTERM: 2, signal.SIGHUP: 2, signal.SIGINT: 3,
}  # fmt: skip


def signals_heeded() -> list[signal.Signals]:
    """Return the signals that ask this process to stop; without SIGHUP under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in FLAGS if number != signal.SIGHUP or not ignored]


class StopSignals:
    """Signal handlers of this process, active until `ignore`; forked children are not affected."""

    def __init__(self) -> None:
        self.flag = 0
        self.cannot_save = False  # on rank 0: all polls, an evaluation's too, tell the other ranks
        # While there is nothing to save yet: print this and exit as soon as a signal arrives.
        self.exit_message: str | None = None
        self.polls = 0
        self._pid = os.getpid()
        self._agreed = 0
        self._waiting: tuple[torch.Tensor, dist.Work] | None = None
        for number in signals_heeded():
            signal.signal(number, self._handle)

    def poll(self, topology: "Topology") -> int:
        """Return the flag that all ranks agree on, 0 for none. Collective; does not wait for slow
        ranks.

        The all-reduce that one call starts is read by the next, so that no step waits for it.
        """
        import torch
        import torch.distributed as dist

        self.polls += 1
        mine, said = CANNOT_SAVE if self.cannot_save else self.flag, 0
        if topology.control is None:
            return mine
        if self._waiting is not None:
            flags, work = self._waiting
            work.wait()
            said = int(flags)
            if said != CANNOT_SAVE:
                self._agreed = max(self._agreed, said)
        flags = torch.tensor(mine)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=topology.control, async_op=True)
        assert work is not None
        self._waiting = flags, work
        return max(self._agreed, said)

    @property
    def exit_code(self) -> int | None:
        """The exit code for the signals that have arrived here; None if none has."""
        return EXITS.get(self.flag)

    def ignore(self) -> None:
        """Ignore these signals from now on, so that none changes the exit code while leaving."""
        for number in FLAGS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if number == signal.SIGINT and self.flag == FLAGS[signal.SIGINT]:
            os._exit(130)
        self.flag = max(self.flag, FLAGS[signal.Signals(number)])
        if self.exit_message is not None:
            os.write(2, self.exit_message.encode())
            os._exit(EXITS[self.flag])


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the program's own signal handlers at the end, whatever was set meanwhile."""
    before = {number: signal.getsignal(number) for number in FLAGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
