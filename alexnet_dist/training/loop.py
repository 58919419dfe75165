"""A training run, top to bottom. The only loop."""

import contextlib
import dataclasses
import json
import math
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint import warm_start
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.config.from_data import NO_SPLIT
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import Dataset, open_for, verify_shards
from alexnet_dist.data.pipelines.auto import decoders, settled, splits_of
from alexnet_dist.data.pipelines.make import train_batches
from alexnet_dist.data.pipelines.resident import hold
from alexnet_dist.engines.base import Engine, check_values, on_host
from alexnet_dist.engines.graph import release
from alexnet_dist.engines.make import make_engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import (
    CheckpointError,
    ConfigError,
    NotFinite,
    RanksFailed,
    in_words,
)
from alexnet_dist.evaluation.evaluate import Score, evaluate_engine
from alexnet_dist.network.flops import training_flops
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import gpus
from alexnet_dist.parallel.layouts import check, ranks_wanted
from alexnet_dist.parallel.replicas import check_replicas
from alexnet_dist.parallel.stop_signals import CANNOT_SAVE, EXITS, StopSignals, handlers_restored
from alexnet_dist.parallel.topology import Topology, connect, leave
from alexnet_dist.plotting import MOST_CLASSES
from alexnet_dist.timing import TIMELINE
from alexnet_dist.training.loggers import check_installed, pictured
from alexnet_dist.training.metrics import Telemetry, configure_logging, log
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Pending, Progress
from alexnet_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit: 0 when it reached its end, else the code of the signal that stopped it.
        step: optimiser steps done.
        score: of the evaluation at the end; None where the run was stopped, or evaluates nothing.
        leads: whether this process is the one that prints.
    """

    exit: int
    step: int
    score: Score | None
    leads: bool


def train(config: Config, signals: StopSignals | None = None) -> Outcome:
    """Train to the end or until a signal, from the run folder's newest good checkpoint.

    Where no launcher did, the ranks of a layout that has several are started here.

    Args:
        signals: handlers that are in place already; if left out, those of the calling program,
            which calls from its main thread, are back when this returns.

    Raises:
        ConfigError, DatasetError, CheckpointError, RunFolderError: before the first step.
        NotFinite: a loss, or more gradients than train.max_skipped, were not.
        ReplicasDiffer: copies of the network were no longer equal.
        MachineError: memory, a GPU or a disk was full, or what is installed does not fit.
        SaidByRank0: on the other ranks, where one of these is rank 0's.
        RanksFailed: ranks that were started here did, and have said why.
    """
    if signals is not None:
        return _train(config, signals)
    wanted = ranks_wanted(config, gpus(config))
    with handlers_restored():
        if wanted > 1 and environment.place() is None:
            return _on_own_ranks(config, wanted)
        return _train(config, StopSignals())


def _on_own_ranks(config: Config, count: int) -> Outcome:
    """`alexnet-dist train` of this config, in this many processes."""
    from alexnet_dist.parallel import spawn  # torchrun's, which ranks themselves do without

    check(config, count)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(flat(config), file)
        file.flush()
        code = spawn.start(["train", file.name], count, config.folder, RunFolder(config).killed)
    if code not in (0, *EXITS.values()):
        failed = RanksFailed(f"{config.folder}: a rank ended with exit code {code}, and said why")
        failed.exit_code = code
        raise failed
    newest, _ = checkpoints.newest_good(config.folder / "checkpoints")
    reached = Progress() if newest is None else Progress.of(newest.progress)
    return Outcome(code, reached.step, None if code else reached.score, leads=True)


def _train(config: Config, signals: StopSignals) -> Outcome:
    """As one of the run's ranks, or alone."""
    topology = connect(config)
    signals.last_words = None
    configure_logging(topology)
    topology.decided_by_rank_0(lambda: check_installed(config))
    asked = config.data.pipeline
    begun = topology.decided_by_rank_0(
        lambda: flat(warm_start.with_its_pipeline(warm_start.resolved(config)))
    )
    config = load_config([begun])
    digest = topology.decided_by_rank_0(lambda: open_for(config).digest)
    dataset = open_for(config)
    if config.data.verify_hashes:
        verify_shards(dataset, topology)
    kept = asked != config.data.pipeline
    config, why = settled(config, topology, dataset)
    decoding = f"data.pipeline={config.data.pipeline} ({'as before' if kept else why})"
    decoding += decoders(config, topology)
    folder = RunFolder(config)
    topology.decided_by_rank_0(folder.take)
    try:
        outcome = _run(config, signals, topology, dataset, digest, folder, decoding)
    except Exception as error:
        said = in_words(error)
        with contextlib.suppress(OSError):  # the disk may be what failed
            known, code = said is error, getattr(error, "exit_code", 1)
            folder.failed(code, f"{said or error}", known)
        if said is None or known:
            raise
        raise said from error
    finally:
        folder.close()
    release()
    leave()
    return outcome


def _run(
    config: Config, signals: StopSignals, topology: Topology, dataset: Dataset, digest: str,
    folder: RunFolder, decoding: str,
) -> Outcome:  # fmt: skip
    """The run itself, of ranks that are connected and a folder that is held.

    Args:
        decoding: by which pipeline, and why, for the log.
    """
    # The network, its optimiser and its place in the schedule: new, or as the newest checkpoint has
    # them.
    split = dataset.splits[config.data.train_split]
    schedule = Schedule.of(config, len(split))
    engine = make_engine(config, topology)
    progress = _resume(folder, engine, schedule, config, digest, topology)
    folder.running(progress.step, schedule.last_step)
    log.info(_opening(config, topology, folder, progress, schedule, len(split), decoding))
    if config.data.pipeline == "resident" and not progress.finished(config, schedule):
        hold(config, topology, dataset, splits_of(config), signals)
    batches = train_batches(config, topology, dataset, progress.step, schedule.last_step)
    telemetry = Telemetry(
        config, folder, topology, dataset, schedule, progress.step, progress.evaluated_step,
        training_flops(config),
    )  # fmt: skip

    # What goes on beside the steps: saving, looking out for ranks that hang, numbers on their way
    # from the device.
    saver = Saver(lambda: bool(checkpoints.steps(folder.checkpoints)))
    pending: deque[Pending] = deque()
    saved = progress.step, progress.evaluated_step  # what the newest checkpoint holds
    watchdog = Watchdog(
        topology, lambda: signals.polls, config.layout.timeout_s,
        lambda reason: folder.report("failed", exit=1, reason=reason),
    )  # fmt: skip
    every, classes = config.train.compare_replicas_every, config.model.classes
    drawn = config.log.pictures and pictured(config) and classes <= MOST_CLASSES
    confusion: Tensor | None = None
    to_draw = False

    def settle(but: int) -> None:
        """Account for the steps that were begun, all `but` the newest."""
        while len(pending) > but:
            progress.settle(pending.popleft(), config, split, folder, topology)

    try:
        while True:
            step, epoch = progress.step, progress.step / schedule.steps_per_epoch

            # Is the run to stop, or a save to be tried again? All ranks hear it at the same step.
            signals.cannot_save = saver.failed
            stop = signals.poll(topology)
            if stop == CANNOT_SAVE:
                topology.decided_by_rank_0(saver.finish)  # raises, unless it now can
                continue

            # Evaluate. The rate falls where the validation error no longer does (section 5).
            if not stop and progress.evaluation_due(config, schedule):
                settle(0)
                with TIMELINE.span("evaluate"):
                    confusion = torch.zeros(classes, classes, dtype=torch.int64) if drawn else None
                    score = evaluate_engine(engine, config, topology, dataset, signals, confusion)
                    if score is None:
                        continue  # a signal: the poll above says so now
                    if not math.isfinite(score.loss):
                        raise NotFinite(
                            f"the evaluation after step {step} gave a loss of {score.loss}: "
                            "nothing was saved since. Lower schedule.rate, or warm up longer"
                        )
                    progress.observe(score, schedule)
                    telemetry.evaluation(step, epoch, score, engine)
                    to_draw = True

            # Save what is due, the best so far, and where the run stops or ends.
            finished = progress.finished(config, schedule)
            due = step > 0 and step % config.checkpoint.every_steps == 0
            new_best = progress.best_step == step
            if (due or new_best or stop or finished) and saved != (step, progress.evaluated_step):
                settle(0)
                with TIMELINE.span("checkpoint"):
                    check_replicas(engine.replicated(), topology, step)
                    telemetry.flush()
                    _save(saver, folder, engine, config, digest, progress, schedule)
                saved = step, progress.evaluated_step
            elif every and step and step % every == 0:
                check_replicas(engine.replicated(), topology, step)

            if stop or finished:
                topology.decided_by_rank_0(saver.finish)
            if to_draw:  # when what it may cost is saved
                with TIMELINE.span("evaluate"):
                    telemetry.pictures(step, engine, confusion)
                to_draw, confusion = False, None
            if stop or finished:
                break

            # One step: windows cut, mirrored and lit; forward, backward, update.
            batch = next(batches)
            rate, keep_gradients = schedule.rate(step), telemetry.histograms_due(step + 1)
            stats = engine.train_step(batch, step, rate, keep_gradients)
            pending.append(Pending(step + 1, batch, on_host(stats)))
            progress.step = step + 1

            # Account for the step before it: a device asked for this one's numbers now would have
            # nothing to do until the next is begun.
            log_now = progress.step % config.log.every_steps == 0
            settle(0 if log_now else 1)
            telemetry.stepped(progress.step, engine)
            if log_now:
                epoch = progress.step / schedule.steps_per_epoch
                means = progress.take_interval()
                means |= {"rate": rate, "damaged": float(progress.damaged)}
                means |= {"skipped": float(progress.skipped)}
                telemetry.train(progress.step, epoch, means)

        exit_code = 0 if finished else EXITS[stop]
        state = "stopped" if exit_code else "finished"
        folder.report(state, exit=exit_code, step=progress.step, reason="signal" if stop else "")
        topology.barrier()
        signals.ignore()
    finally:
        watchdog.close()
        saver.close()
        batches.close()
        telemetry.close()
    return Outcome(exit_code, progress.step, None if exit_code else progress.score, topology.leads)


def _resume(
    folder: RunFolder, engine: Engine, schedule: Schedule, config: Config, digest: str,
    topology: Topology,
) -> Progress:  # fmt: skip
    """Where to begin. In this order:

    1. the newest checkpoint in the run folder that verifies; newer, damaged ones are named;
    2. the weights that train.init_from names, where no checkpoint was ever made;
    3. the initial weights, where none are named.

    An error that changes nothing: checkpoints that are all damaged or gone, unless
    checkpoint.begin_anew=true; one of another run, one that cannot be read, one that is misnamed.
    """

    def choose() -> str | None:
        found, wrong = checkpoints.newest(folder.checkpoints)
        for error in wrong:
            log.warning(f"not used: {error}")
        if found is None:
            folder.check_begins()
        else:
            checkpoints.check_same_run(found, config, digest)
            if found.step > schedule.last_step:
                raise ConfigError(
                    f"train.epochs={config.train.epochs:g}: ends at step {schedule.last_step}, and "
                    f"the run in {folder.path} is at step {found.step}: raise it, or give another "
                    "name="
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
            f"{path}/progress.json: not what a run writes ({error!r}): move that checkpoint out of "
            "the run folder to go on from the one before"
        ) from error


def _save(
    saver: Saver, folder: RunFolder, engine: Engine, config: Config, digest: str,
    progress: Progress, schedule: Schedule,
) -> None:  # fmt: skip
    """Begin a checkpoint, and the removal of those no longer kept. Collective."""
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

    if parameters:  # on rank 0
        saver.begin(write)


def _opening(
    config: Config, topology: Topology, folder: RunFolder, progress: Progress,
    schedule: Schedule, samples: int, decoding: str,
) -> str:  # fmt: skip
    """What is about to happen, for the log."""
    last = schedule.last_step
    begins = f"continues at step {progress.step} of {last}" if progress.step else "begins"
    parts, replica = config.train.micro_batches, config.train.batch // topology.replicas
    rank = max(map(len, topology.shares(range(config.train.batch))))
    unscored = ""
    if config.data.eval_split == NO_SPLIT:
        unscored = f"data.eval_split={NO_SPLIT}: no evaluation; the last checkpoint is kept\n"
        if config.schedule.kind == "plateau":
            unscored = unscored[:-1] + ", and the rate of schedule.kind=plateau never falls\n"
    return (
        f"{folder.path} {begins}: {last} steps, {config.model.columns} column(s) on "
        f"{topology.world_size} process(es), {topology.device.type} ({torch.get_num_threads()} "
        f"threads each), {config.train.precision}\n"
        f"batch {config.train.batch} global, {replica} a replica, {rank} decoded a rank; "
        f"{parts} micro-batch(es) of {replica // parts}; "
        f"{samples} training images of {config.data.path}, by {decoding}\n"
        f"{unscored}watch: tensorboard --logdir {config.output_dir} --host localhost"
    )
