"""The command line's entry point: parse the arguments, run the command, report errors."""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from alexnet_dist import __version__

try:
    from multiprocessing import current_process

    # A process that this program spawned imports this module first, and then for seconds what it
    # works with. A Ctrl-C is reported by the process that spawned it.
    if current_process().name != "MainProcess":
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from alexnet_dist.cli.streams import reader_left, with_usable
    from alexnet_dist.errors import in_words, printable
    from alexnet_dist.parallel import environment
    from alexnet_dist.parallel.stop_signals import EXITS, FLAGS, signals_heeded

    try:
        from alexnet_dist.cli import benchmarks, datasets, measures, predictions, results, runs
        from alexnet_dist.cli.parser import Parser, commands_of
        from alexnet_dist.config.load import source_of
    except ImportError as error:  # dependencies are missing from this Python
        sys.exit(f"alexnet-dist: {in_words(error) or error}")
except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)

# How often a thread of OpenMP checks for work before it sleeps. With the default it spins for
# milliseconds, which, where cores are shared, takes the core from the thread it waits for. OpenMP
# reads the variable as it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A program that is a rank ends here instead."""
    if sys.platform != "linux":
        sys.exit(
            f"alexnet-dist: this is {sys.platform}, but it runs only on Linux: use a container"
        )
    typed = list(sys.argv[1:] if arguments is None else arguments)
    code = with_usable(lambda: _run(typed))
    if arguments is None and environment.launched():
        os._exit(code)  # a thread that gloo left behind may abort an interpreter that ends
    return code


def _run(arguments: Sequence[str]) -> int:
    """Parse and run a command; turn signals and errors into a message and an exit code."""
    options = build_parser().parse_args(arguments)
    here, own = None, os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:  # a forked child must not handle it
            raise _Stopped(signal.Signals(number))

    # While training, `train` replaces these handlers by its own.
    for number in {*signals_heeded()} - {signal.SIGINT}:
        signal.signal(number, stop)
    try:
        here = environment.place()
        return int(options.run(options))
    except KeyboardInterrupt as stopped:
        number = stopped.number if isinstance(stopped, _Stopped) else signal.SIGINT
        print("alexnet-dist: interrupted", file=sys.stderr)
        code = EXITS[FLAGS[number]]
    except Exception as error:
        if reader_left(error):
            raise
        code = _say(error, here.rank if here else 0, getattr(options, "config", ()))
    if here:
        os._exit(code)  # skip clean-up: it might wait for ranks and threads that never answer
    return code


def _say(error: Exception, rank: int, sources: Sequence[str]) -> int:
    """Print an error, in one line if it is a known kind and else with its traceback; return the
    exit code.

    Args:
        sources: those of the command's config, one of which may have given the value at fault.
    """
    explained = in_words(error)
    if explained is None:
        print(f"[r{rank}] {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    if explained.on_every_rank and rank:
        time.sleep(1)  # time for rank 0 to print it, before the launcher sees that a rank has ended
    else:
        which = f"alexnet-dist [r{rank}]" if rank else "alexnet-dist"
        text = f"{source_of(explained, sources)}{explained}"
        print(f"{which}: {printable(text)}", file=sys.stderr, flush=True)
    return explained.exit_code


class _Stopped(KeyboardInterrupt):
    """Raised in the main thread when a signal asks the command to stop."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, the function that executes it."""
    parser = Parser(
        prog="alexnet-dist",
        description="Train the 2012 AlexNet as its authors did, in two columns on two devices, "
        "or on any other layout.",
        examples=(
            "alexnet-dist configs                      # the shipped configs",
            "alexnet-dist train demo                   # needs data/demo, which `make demo` packs",
            "alexnet-dist evaluate runs/demo --views 10",
            "alexnet-dist COMMAND --help               # a command's options, and more examples",
        ),
    )
    parser.add_argument("--version", action="version", version=f"alexnet-dist {__version__}")
    command = commands_of(parser, "COMMAND")
    for family in (runs, predictions, datasets, results, benchmarks, measures):
        family.add(command)
    return parser
