"""Where a run's checkpoints and its loop meet: `resume` at the start, `save` during the run."""

import dataclasses
from pathlib import Path

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint import warm_start
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.config.schema import Config
from alexnet_dist.engines.base import Engine, check_values
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.logs import log
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress


def resume(
    folder: RunFolder, engine: Engine, schedule: Schedule, config: Config, digest: str,
    topology: Topology,
) -> Progress:  # fmt: skip
    """Load the engine and the schedule from where the run continues, and return its progress.
    Collective. In this order:

    1. the newest checkpoint in the run folder that verifies; newer, damaged ones are logged;
    2. the weights that train.init_from names, if no checkpoint was ever made;
    3. the initial weights, if none are named.

    Raises CheckpointError or ConfigError, with nothing changed on the disk, if all checkpoints are
    damaged or gone (unless checkpoint.begin_anew=true), or if the newest belongs to another run,
    cannot be read, or lies under another step's name.
    """

    def choose() -> str | None:
        """Return the path of the checkpoint to load. Called on rank 0; the others are told."""
        found, wrong = checkpoints.newest(folder.checkpoints)
        for error in wrong:
            log.warning(f"not used: {error}")
        if found is None:
            folder.check_begins()
        else:
            checkpoints.check_same_run(found, config, digest)
            if found.step > schedule.last_step:
                raise ConfigError(
                    f"train.epochs={config.train.epochs:g}: ends at step {schedule.last_step}, "
                    f"but the run in {folder.path} is already at step {found.step}: raise it, or "
                    "give another name="
                )
            check_values(found.parameters(), found.optimizer())
        path = checkpoints.settle(folder.checkpoints, found, wrong)
        folder.begins_at(0 if found is None else found.step)
        folder.save_config()
        return None if path is None else str(path)

    path = topology.decided_by_rank_0(choose)
    if path is None:
        if config.train.init_from != "none":
            engine.load(warm_start.InitialWeights(config), None)
        return Progress()
    found = checkpoints.read(Path(path))
    engine.load(found.parameters(), found.optimizer())
    try:
        schedule.load(found.progress["schedule"])
        return Progress.of(found.progress)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}/progress.json: is not what a run writes ({error!r}): move that checkpoint "
            "out of the run folder to resume from the one before"
        ) from error


def save(
    saver: Saver, folder: RunFolder, engine: Engine, config: Config, digest: str,
    progress: Progress, schedule: Schedule,
) -> None:  # fmt: skip
    """Start writing a checkpoint, then removing those no longer kept, in the saver's thread.
    Collective: every rank contributes its part of the tensors."""
    parameters, optimizer = engine.whole_tensors()
    state = dataclasses.asdict(progress) | {"schedule": schedule.state()}
    evaluated = progress.score if progress.evaluated_step == progress.step else None
    error = None if evaluated is None else 1 - evaluated.top1

    def write() -> None:
        folder.still_held()
        at, keep, best = folder.checkpoints, config.checkpoint, state["best_step"]
        checkpoints.save(at, config, digest, parameters, optimizer, state, error)
        checkpoints.prune(at, keep.keep_last, keep.keep_every_steps, best)
        folder.saved(state["step"])

    if parameters:  # empty on all ranks but 0
        saver.begin(write)
