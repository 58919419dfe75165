"""Where a run's checkpoints and its loop meet: restored at the start, saved during the run."""

import dataclasses
from pathlib import Path

import torch

from alexnet_dist.checkpoint import store, warm_start
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.engines.base import Engine, check_values
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.training.logs import log
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress


class RunCheckpoints:
    """The checkpoints of a run. Rank 0 writes them in the background; every rank calls every
    method.

    Args:
        dataset: the data set that the run is trained on.
    """

    def __init__(
        self, folder: RunFolder, engine: Engine, schedule: Schedule, dataset: Dataset
    ) -> None:
        self._config, self._folder, self._dataset = folder.config, folder, dataset
        self._engine, self._schedule, self._topology = engine, schedule, engine.topology
        self._saver = Saver(lambda: bool(store.steps(folder.checkpoints)))
        self._newest = 0, 0  # step and evaluated_step of the newest checkpoint

    def resume(self) -> Progress:
        """Load the engine and the schedule from where the run continues, and return its progress.
        Collective. In this order:

        1. the newest checkpoint in the run folder that verifies; newer, damaged ones are logged;
        2. the weights that train.init_from names, if no checkpoint was ever made;
        3. the initial weights, if none are named.

        Raises CheckpointError or ConfigError, with nothing changed on the disk, if all checkpoints
        are damaged or gone (unless checkpoint.begin_anew=true), or if the newest belongs to another
        run, cannot be read, or lies under another step's name.
        """
        path = self._topology.decided_by_rank_0(self._choose)
        if path is None:
            if self._config.train.init_from != "none":
                own = warm_start.InitialWeights(self._config, self._dataset.classes)
                self._engine.load(own, None)
            return Progress()
        checkpoint = store.read(Path(path))
        self._engine.load(checkpoint.parameters(), checkpoint.optimizer())
        try:
            self._schedule.load(checkpoint.progress["schedule"])
            progress = Progress.of(checkpoint.progress)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path}/progress.json: is not what a run writes ({error!r}): move that checkpoint "
                "out of the run folder to resume from the one before"
            ) from error
        self._newest = progress.step, progress.evaluated_step
        return progress

    def _choose(self) -> str | None:
        """Return the path of the checkpoint to load, None if there is none, and prepare the folder
        for the run to continue from it. Called on rank 0."""
        config, folder, last_step = self._config, self._folder, self._schedule.last_step
        newest, damaged = store.newest(folder.checkpoints)
        for error in damaged:
            log.warning(f"not used: {error}")
        if newest is None:
            folder.check_begins()
        else:
            store.check_same_run(newest, config, self._dataset.digest)
            if newest.step > last_step:
                raise ConfigError(
                    f"train.epochs={config.train.epochs:g}: ends at step {last_step}, but the "
                    f"run in {folder.path} is already at step {newest.step}: raise it, or give "
                    "another name="
                )
            check_values(newest.parameters(), newest.optimizer())
            before, now = newest.manifest.get("torch"), torch.__version__
            if before != now and newest.step < last_step:
                log.warning(
                    f"{newest.path} was saved with torch {before}, and the run continues with "
                    f"{now}: it may end with other bits than if it had never stopped"
                )
        path = store.continue_from(folder.checkpoints, newest, damaged)
        folder.resumes_at(0 if newest is None else newest.step)
        folder.save_config()
        return None if path is None else str(path)

    def due(self, progress: Progress, ending: bool) -> bool:
        """Return whether to save now: at the interval, at a new best, and before the run stops or
        ends; but not what the newest checkpoint holds already."""
        step = progress.step
        at_interval = step % self._config.checkpoint.every_steps == 0
        wanted = at_interval or progress.best_step == step or ending
        return wanted and self._newest != (step, progress.evaluated_step)

    def save(self, progress: Progress) -> None:
        """Start to write a checkpoint in the background, and then to remove those that are no
        longer kept. Collective: every rank contributes its part of the tensors."""
        parameters, optimizer = self._engine.whole_tensors()
        state = dataclasses.asdict(progress) | {"schedule": self._schedule.state()}
        evaluated = progress.score if progress.evaluated_step == progress.step else None
        error = None if evaluated is None else 1 - evaluated.top1

        def write() -> None:
            self._folder.check_held()
            at, keep, best = self._folder.checkpoints, self._config.checkpoint, state["best_step"]
            data = self._dataset
            store.save(
                at, self._config, data.digest, parameters, optimizer, state, error, data.classes
            )
            store.prune(at, keep.keep_last, keep.keep_every_steps, best)
            self._folder.saved(state["step"])

        if parameters:  # empty on all ranks but 0
            self._saver.begin(write)
        self._newest = progress.step, progress.evaluated_step

    @property
    def failed(self) -> bool:
        """Whether the run must end because nothing can be saved; `finish` raises the reason."""
        return self._saver.failed

    def finish(self) -> None:
        """Wait until the newest checkpoint is on the disk; raise on every rank if it cannot be
        written. Collective."""
        self._topology.decided_by_rank_0(self._saver.finish)

    def close(self) -> None:
        """Wait for the last write to end, ignoring its outcome."""
        self._saver.close()
