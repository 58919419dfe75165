"""The command line: parse, call, print."""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from alexnet_dist import __version__
from alexnet_dist.cli.streams import reader_left, with_usable
from alexnet_dist.errors import in_words, printable
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.stop_signals import EXITS, FLAGS, heard

try:
    from alexnet_dist.cli import answers, datasets, measures, results, runs
    from alexnet_dist.cli.parser import Parser, commands_of
except ImportError as error:  # a Python in which nothing was installed
    sys.exit(f"alexnet-dist: {in_words(error) or error}")

# How long one of torch's threads spins for the others before it sleeps. By default milliseconds, in
# which, where cores are shared, it keeps from its core the one it waits for. OpenMP reads it as it
# loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    if sys.platform != "linux":
        sys.exit(f"alexnet-dist: this is {sys.platform}, and it runs on Linux: use a container")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    return with_usable(lambda: _run(typed))


def _run(arguments: Sequence[str]) -> int:
    options = build_parser().parse_args(arguments)
    here, own = None, os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:  # not in a forked child
            raise _Stopped(signal.Signals(number))

    for number in {*heard()} - {signal.SIGINT}:  # outside a run, which has its own handlers
        signal.signal(number, stop)
    try:
        here = environment.place()
        return int(options.run(options, arguments))
    except KeyboardInterrupt as stopped:
        number = stopped.number if isinstance(stopped, _Stopped) else signal.SIGINT
        print("alexnet-dist: interrupted; the same command goes on", file=sys.stderr)
        code = EXITS[FLAGS[number]]
    except Exception as error:
        if reader_left(error):
            raise
        code = _say(error, here.rank if here else 0)
    if here:
        os._exit(code)  # leave fast: peers and their threads may never answer again
    return code


def _say(error: Exception, rank: int) -> int:
    """In a line where it is known what to do, else with its traceback; the exit code."""
    said = in_words(error)
    if said is None:
        print(f"[r{rank}] {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    if said.on_every_rank and rank:
        time.sleep(1)  # rank 0 says it, and is ended as soon as another has left
    else:
        which = f"alexnet-dist [r{rank}]" if rank else "alexnet-dist"
        print(f"{which}: {printable(str(said))}", file=sys.stderr, flush=True)
    return said.exit_code


class _Stopped(KeyboardInterrupt):
    """A signal that asks a command to stop."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands: each sets `run`, the function that takes its options."""
    parser = Parser(
        prog="alexnet-dist",
        description="Train the 2012 AlexNet, its two columns on two devices, or as you like it.",
        examples=(
            "alexnet-dist configs                      # the shipped configs",
            "alexnet-dist train demo                   # after `make demo`, or prepare",
            "alexnet-dist evaluate runs/demo --views 10",
            "alexnet-dist COMMAND --help               # its options, and more examples",
        ),
    )
    parser.add_argument("--version", action="version", version=f"alexnet-dist {__version__}")
    command = commands_of(parser, "COMMAND")
    for family in (runs, answers, datasets, results, measures):
        family.add(command)
    return parser
