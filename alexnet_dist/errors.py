"""Errors that need no traceback: one line that names what, why, and what to do."""


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


class NonFiniteLoss(AlexNetDistError, RuntimeError):
    """The loss left the finite numbers; that step's update was not made."""

    on_every_rank = True


class SaidByRank0(AlexNetDistError, RuntimeError):
    """Rank 0 failed, and says why."""

    on_every_rank = True
