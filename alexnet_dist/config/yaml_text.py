"""Checks on YAML text before it is parsed.

A small file can expand beyond any memory or stack, through aliases of aliases or deep nesting, or
take minutes to parse, with many interpolations; and YAML 1.1 reads some numbers in a base that
nobody meant.
"""

import re
from pathlib import Path

import yaml

from alexnet_dist.files import read_bytes

NOT_YAML = (yaml.YAMLError, OSError, ValueError, RecursionError)  # raised for a bad file
_LONGEST, _DEEPEST, _MOST_INTERPOLATIONS = 200_000, 20, 10
# Numbers that YAML 1.1 reads in base 8, 2, 16 or 60.
_ODD_NUMBER = re.compile(r"[-+]?(0[\d_]+|0b[01_]+|0x[\da-fA-F_]+|[\d_]+(:[\d_]+)+(\.\d*)?)")


def bounded_yaml(path: Path) -> str:
    """Return the text of a YAML file that passes `check_yaml`.

    Raises:
        OSError, ValueError, yaml.YAMLError: the file cannot be read, could expand, or is not YAML.
    """
    text = read_bytes(path, _LONGEST).decode()
    check_yaml(text, of_file=True)
    return text


def check_yaml(text: str, of_file: bool = False) -> None:
    """Raise ValueError where parsing the text could take far more memory than the text itself, or
    where a number in it is not the one it looks like; yaml.YAMLError where it is not YAML.

    Args:
        of_file: the text is a whole file, which must hold more than one bare value.
    """
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("has aliases (*name)")
        if isinstance(event, yaml.ScalarEvent):
            if depth == 0 and of_file:
                raise ValueError("a single value")
            if event.implicit[0] and not event.style and _ODD_NUMBER.fullmatch(event.value):
                raise ValueError(
                    f"YAML would read {event.value} as another number: write it in decimal, "
                    "without leading zeros, or in quotes if it is text"
                )
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
    if text.count("${") > _MOST_INTERPOLATIONS:
        raise ValueError(f"more than {_MOST_INTERPOLATIONS} interpolations (${{…}})")
