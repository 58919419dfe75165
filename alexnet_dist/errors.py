"""Errors that need no traceback: one line that names what, why, and what to do."""


def printable(text: str) -> str:
    """Control characters escaped, lines kept: names come from files, and terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class AlexNetDistError(Exception):
    """Something a user can understand and mend.

    Attributes:
        exit_code: of the program that ends by it.
        on_every_rank: raised on all ranks alike, so that rank 0 alone says it.
    """

    exit_code = 1
    on_every_rank = False


class ConfigError(AlexNetDistError, ValueError):
    """What a user wrote cannot be used; the message names the key, value, rule and remedy."""

    exit_code = 2
    on_every_rank = True


class DatasetError(AlexNetDistError, ValueError):
    """A source of images or a packed data set is missing, damaged, or not what the config says."""


class CheckpointError(AlexNetDistError, RuntimeError):
    """A checkpoint is damaged, missing, or of another run."""


class RunFolderError(AlexNetDistError, RuntimeError):
    """The run folder cannot be used."""


class NotFinite(AlexNetDistError, RuntimeError):
    """A loss, gradient or parameter left the finite numbers; nothing was made or saved of it."""

    on_every_rank = True


class ReplicasDiffer(AlexNetDistError, RuntimeError):
    """Copies that must be equal to the bit are not: a rank's memory or arithmetic is at fault."""

    on_every_rank = True


class CrashLoop(RunFolderError):
    """A run ended again and again before it saved anything new."""

    exit_code = 2


class SaidByRank0(AlexNetDistError, RuntimeError):
    """Rank 0 failed, and says why."""

    on_every_rank = True


class RanksFailed(AlexNetDistError, RuntimeError):
    """Ranks that this process started failed, and have said why on standard error."""
