"""A training run from top to bottom: the project's only training loop.

`train` starts the ranks where no launcher has, `_train` connects them and takes the run folder, and
`_run` is the run itself: evaluate, save, one step of gradient descent, until the last step.
A step's forward, backward and update are `_step` in engines/ddp.py. `START` and `TIMELINE` only
measure where the time goes.
"""

import contextlib
import json
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alexnet_dist.checkpoint import store, warm_start
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import (
    Dataset,
    matched,
    open_dataset,
    open_for,
    raised_on_every_rank,
    verify_shards,
)
from alexnet_dist.data.pipelines.make import (
    choose_pipeline,
    decoder_in_words,
    splits_of,
    train_batches,
)
from alexnet_dist.data.pipelines.resident import decode_to_memory
from alexnet_dist.engines.graph import release_graphs
from alexnet_dist.engines.make import make_engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import DatasetError, RanksFailed, in_words
from alexnet_dist.evaluation.evaluate import evaluate_engine
from alexnet_dist.evaluation.results import Score
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import gpus
from alexnet_dist.parallel.layouts import check, ranks_wanted
from alexnet_dist.parallel.replicas import check_replicas
from alexnet_dist.parallel.stop_signals import CANNOT_SAVE, EXITS, StopSignals, handlers_restored
from alexnet_dist.parallel.topology import Topology, connect, leave_groups
from alexnet_dist.timing import START, TIMELINE, now
from alexnet_dist.training.checkpointing import RunCheckpoints
from alexnet_dist.training.loggers import check_installed
from alexnet_dist.training.logs import configure_logging, log, opening
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import PendingSteps, Progress
from alexnet_dist.training.telemetry import Telemetry
from alexnet_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit: 0 if the run reached its last step, else the exit code of the signal that stopped it.
        step: optimiser steps done.
        score: result of the final evaluation; None if the run was stopped or has no evaluation.
        is_rank_0: whether this process is rank 0, which prints.
    """

    exit: int
    step: int
    score: Score | None
    is_rank_0: bool


def train(config: Config, signals: StopSignals | None = None) -> Outcome:
    """Train to the last step or until a signal, resuming from the run folder's newest good
    checkpoint.

    If the layout has several ranks and no launcher started them, they are started here.

    Args:
        signals: signal handlers that are already installed. If None, handlers are installed for the
            duration of the call, which must come from the main thread, and the caller's own are
            restored on return.

    Raises:
        ConfigError, DatasetError, CheckpointError, RunFolderError: before the first step.
        NotFinite: an evaluation loss, or more than train.max_skipped training steps, were not.
        ReplicasDiffer: the replicas' weights were no longer equal.
        MachineError: memory, a GPU or a disk was full, or the installed packages do not fit.
        SaidByRank0: on the other ranks, if rank 0 raised one of these.
        RanksFailed: ranks that were started here failed, and have reported why.
    """
    if signals is not None:
        return _train(config, signals)
    START.begin(now())
    wanted = ranks_wanted(config, gpus(config))
    with handlers_restored():
        if wanted > 1 and environment.place() is None:
            return _on_own_ranks(config, wanted)
        return _train(config, StopSignals())


def _on_own_ranks(config: Config, count: int) -> Outcome:
    """Run `alexnet-dist train` with this config in `count` processes, and wait for them."""
    from alexnet_dist.parallel import spawn  # loads torchrun, which a rank itself does not need

    check(config, count)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(flat(config), file)
        file.flush()
        code = spawn.start(["train", file.name], count, config.folder, RunFolder(config).killed)
    if code not in (0, *EXITS.values()):
        raise RanksFailed(
            f"{config.folder}: a rank ended with exit code {code}, and reported why", exit_code=code
        )
    newest, _ = store.newest_good(config.folder / "checkpoints")
    reached = Progress() if newest is None else Progress.of(newest.progress)
    return Outcome(code, reached.step, None if code else reached.score, is_rank_0=True)


def _train(config: Config, signals: StopSignals) -> Outcome:
    """Train as one rank of the run, or as its only process."""
    START.reached("imports")
    topology = connect(config)
    START.reached("device")
    signals.exit_message = None  # a signal no longer ends the process at once: the run polls
    configure_logging(topology)
    config, dataset, decoding = _resolve(config, topology)
    folder = RunFolder(config)
    topology.decided_by_rank_0(folder.take)
    try:
        outcome = _run(folder, signals, topology, dataset, decoding)
    except Exception as error:
        explained = in_words(error)
        known = explained is error  # one of ours, which would recur
        with contextlib.suppress(OSError):  # the disk may be what failed
            folder.failed(getattr(error, "exit_code", 1), f"{explained or error}", known)
        if explained is None or known:
            raise
        raise explained from error
    finally:
        folder.close()
    release_graphs()  # first, since they hold on to the groups
    leave_groups()
    return outcome


def _resolve(config: Config, topology: Topology) -> tuple[Config, Dataset, str]:
    """Fill in what the config leaves to another run, to the data set or to this machine, alike on
    every rank: what depends on files, rank 0 decides. Collective.

    Returns the config, its data set, and what decodes the images, in words.
    """
    topology.decided_by_rank_0(lambda: check_installed(config))
    # What rank 0 decides is sent as JSON, so the config travels as a mapping.
    values = topology.decided_by_rank_0(lambda: flat(warm_start.resolved(config)))
    resolved = load_config([values])
    digest = topology.decided_by_rank_0(lambda: open_for(resolved).digest)
    with raised_on_every_rank(topology):
        # Each node may have a copy on its own disk. It must be rank 0's data set, which fits the
        # config.
        dataset = open_dataset(Path(resolved.data.path))
        if dataset.digest != digest:
            raise DatasetError(
                f"data.path={resolved.data.path!r}: rank {topology.global_rank}, on "
                f"{socket.gethostname()}, has another data set than rank 0: copy the same one to "
                "every node"
            )
        dataset = matched(dataset, resolved)
    topology.decided_by_rank_0(lambda: warm_start.check_fits(resolved, dataset.classes))
    if config.data.verify_hashes:
        verify_shards(dataset, topology)
    START.reached("data set")
    resolved, why = choose_pipeline(resolved, topology, dataset)
    pipeline = resolved.data.pipeline
    if why == "set" and config.data.pipeline != pipeline:  # resolved from an earlier start
        why = "as before"
    decoding = f"data.pipeline={pipeline} ({why}){decoder_in_words(resolved, topology)}"
    START.reached("decoder")
    return resolved, dataset, decoding


def _run(
    folder: RunFolder, signals: StopSignals, topology: Topology, dataset: Dataset, decoding: str
) -> Outcome:
    """Run the training loop. The ranks are connected and the run folder is held."""
    config = folder.config
    # The network, its optimiser and its position in the schedule: new, or restored from the newest
    # checkpoint. The data need no state: the sampler computes the batch of any step.
    split = dataset.splits[config.data.train_split]
    schedule = Schedule.of(config, len(split))
    engine = make_engine(config, topology)
    checkpoints = RunCheckpoints(folder, engine, schedule, dataset)
    progress = checkpoints.resume()
    START.reached("network")
    folder.running(progress.step, schedule.last_step)
    log.info(opening(config, topology, progress.step, schedule.last_step, len(split), decoding))
    if config.data.pipeline == "resident" and not progress.finished(config, schedule):
        decode_to_memory(config, topology, dataset, splits_of(config), signals)
        START.reached("decoding to memory")
    batches = train_batches(config, topology, dataset, progress.step, schedule.last_step)

    # What runs beside the steps: statistics on their way from the device, what is written of them,
    # and a watchdog for ranks that hang.
    pending = PendingSteps(progress, split, folder, topology)
    telemetry = Telemetry(folder, topology, dataset, schedule, progress)
    watchdog = Watchdog(topology, signals, folder)
    compare_every = config.train.compare_replicas_every
    exit_code: int | None = None  # stays None if an error ends the run

    try:
        while True:
            step = progress.step

            # Has a signal asked the run to stop, or can rank 0 not save? All ranks learn it at the
            # same step.
            signals.cannot_save = checkpoints.failed
            stop = signals.poll(topology)
            if stop == CANNOT_SAVE:
                checkpoints.finish()  # rank 0 tries once more; all ranks raise if that fails
                continue  # it is saved: nothing stops the run, unless a signal came meanwhile
            if stop:
                log.info(f"step {step}: a stop was requested, saving first")

            # Evaluate. With schedule.kind=plateau the learning rate is divided when the validation
            # error stops improving, as in the paper's section 5.
            if not stop and progress.evaluation_due(config, schedule):
                pending.read()  # the step just made may fail the run: then no evaluation
                with TIMELINE.span("evaluate"):
                    confusion = telemetry.new_confusion()
                    score = evaluate_engine(engine, config, dataset, signals, confusion)
                    if score is None:
                        continue  # the poll above now returns what interrupted it
                    progress.observe(score, config, schedule)
                    telemetry.evaluation(step, score, engine, confusion)

            # Save a checkpoint: at its interval, after the best evaluation so far, and before the
            # run stops or ends. Replicas must be equal, since only the first is saved.
            finished = progress.finished(config, schedule)
            ending = finished or stop != 0
            if checkpoints.due(progress, ending):
                pending.read()
                with TIMELINE.span("checkpoint"):
                    check_replicas(engine.replicated(), topology, step)
                    telemetry.flush()
                    checkpoints.save(progress)
            elif compare_every and step and step % compare_every == 0:
                check_replicas(engine.replicated(), topology, step)
            if ending:
                checkpoints.finish()
            telemetry.pictures(engine)  # only now: if drawing is killed, the evaluation is saved
            if ending:
                break

            # One step of stochastic gradient descent: a batch of random crops, mirrored and lit
            # (section 4.1); forward, backward, and the update with momentum and weight decay
            # (section 5).
            batch = next(batches)
            rate, keep_gradients = schedule.rate(step), telemetry.histograms_due(step + 1)
            stats = engine.train_step(batch, step, rate, keep_gradients)
            progress.step += 1
            pending.add(progress.step, batch, stats)

            # Account for the step before it. Reading this step's statistics now would make the
            # device idle until the next step is launched; at a log point all are read.
            log_now = progress.step % config.log.every_steps == 0
            pending.read(all_but=0 if log_now else 1)
            telemetry.stepped(progress.step, engine)
            if log_now:
                telemetry.train(progress.step, progress.take_interval(rate))

        # All ranks leave together, so that none ends while another still needs it.
        exit_code = 0 if finished else EXITS[stop]
        state = "stopped" if exit_code else "finished"
        folder.report(state, exit=exit_code, step=progress.step, reason="signal" if stop else "")
        topology.barrier()
        signals.ignore()
    finally:
        watchdog.close()
        checkpoints.close()
        batches.close()
        telemetry.close(finished=exit_code == 0)
    return Outcome(
        exit_code, progress.step, None if exit_code else progress.score, topology.is_rank_0
    )
