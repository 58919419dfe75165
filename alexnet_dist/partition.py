"""Divide a number of things into parts: rows among columns, samples among ranks."""


def share(count: int, part: int, parts: int) -> slice:
    """Return one of `parts` consecutive parts of `count` things, as even as possible; earlier parts
    are the larger ones."""
    small, larger = divmod(count, parts)
    begin = part * small + min(part, larger)
    return slice(begin, begin + small + (part < larger))
