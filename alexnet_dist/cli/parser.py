"""The argument parser that all commands share, and the types of their arguments."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from alexnet_dist.config.names import nearest, nearest_key
from alexnet_dist.config.schema import keys
from alexnet_dist.errors import ConfigError

Run = Callable[[argparse.Namespace], int]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of an option with its default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has = action.option_strings and type(action.default) in (int, float, str)
        if has and action.default != argparse.SUPPRESS:
            return f"{action.help} (default: {action.default})"
        return action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes options and key=value arguments in any order, and whose error
    for --batch=64 suggests train.batch=…, and for a mistyped command or choice the nearest one.

    Args:
        examples: command lines, shown at the end of the help.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        lines = "\n".join(f"  {example}" for example in examples)
        super().__init__(
            **options, formatter_class=_Help, epilog=f"examples:\n{lines}" if examples else None
        )
        self._in_order = False

    def add_subparsers(self, **options: Any) -> Any:
        self._in_order = True  # arguments after a command's name belong to the command
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse intermixed arguments, unless this parser has commands: then the commands' own
        parsers, which argparse calls through this method, do so."""
        if self._in_order:
            return super().parse_known_args(args, namespace)
        self._in_order = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._in_order = False

    def error(self, message: str) -> NoReturn:
        """Add what may have been meant by an unknown option, command or choice."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))
        if found := re.search(r"unrecognized arguments: --?([\w.-]+)", message):
            key = nearest_key(found[1], [key for key, _, _ in keys()]) or "train.batch"
            message += f"; config keys are written key=value, as in {key}=…"
        super().error(message)


class AddCommand(Protocol):
    """A function that adds a command, given its name, the function that runs it (None if it only
    has commands of its own), a line of help, and example command lines."""

    def __call__(
        self, name: str, run: Run | None, help: str, examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser: ...


def commands_of(parser: argparse.ArgumentParser, metavar: str) -> AddCommand:
    """Return a function that adds commands to `parser`."""
    commands = parser.add_subparsers(required=True, metavar=metavar)

    def add(
        name: str, run: Run | None, help: str, examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, examples=examples)
        sub.set_defaults(run=run)
        return sub

    return add


def add_json(sub: argparse.ArgumentParser, what: str = "object") -> None:
    """Add --json, for a command whose output a program may read."""
    sub.add_argument("--json", action="store_true", help=f"print one JSON {what}")


def add_share_gpu(sub: argparse.ArgumentParser) -> None:
    """Add --share-gpu, which sets layout.share_gpu=true."""
    sub.add_argument(
        "--share-gpu", dest="shared", action="append_const", const="layout.share_gpu=true",
        default=[], help="set layout.share_gpu=true: ranks share the GPUs of this host",
    )  # fmt: skip


def refuse(given: Mapping[str, object], because: str) -> None:
    """Raise ConfigError for the first of these options whose value is set."""
    for option, value in given.items():
        if value:
            raise ConfigError(f"{option}: has no effect {because}: leave it out")


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type that parses a whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, {least} or more")
        return int(text)

    return parse


count = at_least(1)  # an argparse type, as the functions below are


def path(text: str) -> Path:
    """Parse a file or folder; ~ is expanded here too, because in key=~/x a shell leaves it."""
    return Path(os.path.expanduser(text))


def out(text: str) -> Path:
    """Parse the path of a file to write; refused now, if it cannot be created after the work."""
    file = path(text)
    if file.is_dir():
        why = "it is a folder"
    elif not os.access(file.parent, os.W_OK | os.X_OK):
        why = f"there is no folder {file.parent} that you may write in"
    else:
        return file
    raise argparse.ArgumentTypeError(f"{text!r}: {why}: name a file to write")


def picture(text: str) -> Path:
    """Parse the path of a PNG to write."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a picture to write, NAME.png")
    return out(text)


def part(text: str) -> tuple[int, int]:
    """Parse I/N, as in --part 2/8."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be I/N, as in 2/8, the second of eight")
    return int(match[1]), int(match[2])
