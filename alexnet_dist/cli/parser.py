"""What every command's arguments are made of."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from alexnet_dist.config.names import nearest_key
from alexnet_dist.config.schema import keys

Run = Callable[[argparse.Namespace, Sequence[str]], int]


class Parser(argparse.ArgumentParser):
    """argparse's, that takes options and key=value in any order, and knows what somebody who
    writes --batch=64 means.

    Args:
        examples: command lines, shown at the end of the help.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        lines = "\n".join(f"  {example}" for example in examples)
        super().__init__(
            **options,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{lines}" if examples else None,
        )
        self._in_order = False

    def add_subparsers(self, **options: Any) -> Any:
        self._in_order = True  # what follows a command's name is the command's
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's parse_known_intermixed_args, which calls this; a parser of commands calls
        those of its commands by this."""
        if self._in_order:
            return super().parse_known_args(args, namespace)
        self._in_order = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._in_order = False

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"unrecognized arguments: --?([\w.-]+)", message):
            key = nearest_key(found[1], [key for key, _, _ in keys()]) or "train.batch"
            message += f"; a config's keys are written key=value, as in {key}=…"
        super().error(message)


class AddCommand(Protocol):
    """Adds a command: its name, the function that runs it, a line of help, examples."""

    def __call__(
        self, name: str, run: Run | None, help: str, examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser: ...


def commands_of(parser: argparse.ArgumentParser, metavar: str) -> AddCommand:
    """A function that adds a command to a parser."""
    commands = parser.add_subparsers(required=True, metavar=metavar)

    def add(
        name: str, run: Run | None, help: str, examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, examples=examples)
        sub.set_defaults(run=run)
        return sub

    return add


def add_json(sub: argparse.ArgumentParser, what: str = "object") -> None:
    """The option of a command whose answer a program may read."""
    sub.add_argument("--json", action="store_true", help=f"print one JSON {what}")


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, 1 or more")
    return int(text)


def path(text: str) -> Path:
    """A file or folder; ~ is the home folder, also where a shell left it as it is."""
    return Path(os.path.expanduser(text))


def out(text: str) -> Path:
    """A file that can be made: known before the work that ends in it."""
    path = Path(os.path.expanduser(text))
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        why = "is a folder" if path.is_dir() else f"no folder {path.parent} that you may write in"
        raise argparse.ArgumentTypeError(f"{text!r}: {why}: name a file to write")
    return path


def picture(text: str) -> Path:
    """A PNG that can be made."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: a picture to write, NAME.png")
    return out(text)


def part(text: str) -> tuple[int, int]:
    """i/n, as in --part 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, as in 2/8, the second of eight")
    return int(found[1]), int(found[2])
