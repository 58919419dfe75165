"""How a number of things is shared out: rows to columns, samples to ranks."""


def share(count: int, part: int, parts: int) -> slice:
    """The part of `count` things in a row: as even as can be, earlier parts larger."""
    small, larger = divmod(count, parts)
    begin = part * small + min(part, larger)
    return slice(begin, begin + small + (part < larger))
