"""What every command's arguments are made of."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

Run = Callable[[argparse.Namespace, Sequence[str]], int]
AddCommand = Callable[[str, Run | None, str], argparse.ArgumentParser]


class Parser(argparse.ArgumentParser):
    """argparse's, that knows what somebody who writes --batch=64 means."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments: -" in message:
            message += "; a config's keys are written key=value, as in train.batch=64"
        super().error(message)


def commands_of(parser: argparse.ArgumentParser, metavar: str) -> AddCommand:
    """A function that adds a command to a parser: its name, the function that runs it, a line."""
    commands = parser.add_subparsers(required=True, metavar=metavar)

    def add(name: str, run: Run | None, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
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


def out(text: str) -> Path:
    """A file that can be made: known before the work that ends in it."""
    path = Path(text)
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
