"""A training run from top to bottom: the project's only training loop.

`train` starts the ranks where no launcher has, `_train` connects them and takes the run folder, and
`_run` is the run itself: evaluate, save, one step of gradient descent, until the last step.
"""

import contextlib
import json
import math
import tempfile
from collections import deque
from dataclasses import dataclass

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
from alexnet_dist.engines.base import on_host
from alexnet_dist.engines.graph import release
from alexnet_dist.engines.make import make_engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import (
    NotFinite,
    RanksFailed,
    in_words,
)
from alexnet_dist.evaluation.evaluate import evaluate_engine
from alexnet_dist.evaluation.results import Score
from alexnet_dist.network.flops import training_flops
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import gpus
from alexnet_dist.parallel.layouts import check, ranks_wanted
from alexnet_dist.parallel.replicas import check_replicas
from alexnet_dist.parallel.stop_signals import CANNOT_SAVE, EXITS, StopSignals, handlers_restored
from alexnet_dist.parallel.topology import Topology, connect, leave
from alexnet_dist.plotting import MOST_CLASSES
from alexnet_dist.timing import TIMELINE
from alexnet_dist.training.checkpointing import resume, save
from alexnet_dist.training.loggers import check_installed, pictured
from alexnet_dist.training.logs import configure_logging, log
from alexnet_dist.training.metrics import Telemetry
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Pending, Progress
from alexnet_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit: 0 if the run reached its last step, else the exit code of the signal that stopped it.
        step: optimiser steps done.
        score: result of the final evaluation; None if the run was stopped or has no evaluation.
        leads: whether this process is rank 0, which prints.
    """

    exit: int
    step: int
    score: Score | None
    leads: bool


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
        failed = RanksFailed(
            f"{config.folder}: a rank ended with exit code {code}, and reported why"
        )
        failed.exit_code = code
        raise failed
    newest, _ = checkpoints.newest_good(config.folder / "checkpoints")
    reached = Progress() if newest is None else Progress.of(newest.progress)
    return Outcome(code, reached.step, None if code else reached.score, leads=True)


def _train(config: Config, signals: StopSignals) -> Outcome:
    """Train as one rank of the run, or as its only process.

    What rank 0 decides here and the others take over: the config with everything resolved that
    another run or the data set gives, the data set's digest, and whether the folder can be taken.
    """
    topology = connect(config)
    signals.last_words = None  # from here on, the loop polls for signals
    configure_logging(topology)
    topology.decided_by_rank_0(lambda: check_installed(config))
    asked = config.data.pipeline
    resolved = topology.decided_by_rank_0(
        lambda: flat(warm_start.with_its_pipeline(warm_start.resolved(config)))
    )
    config = load_config([resolved])
    digest = topology.decided_by_rank_0(lambda: open_for(config).digest)
    dataset = open_for(config)
    if config.data.verify_hashes:
        verify_shards(dataset, topology)
    as_before = asked != config.data.pipeline  # the run began with another one, and keeps it
    config, why = settled(config, topology, dataset)
    decoding = f"data.pipeline={config.data.pipeline} ({'as before' if as_before else why})"
    decoding += decoders(config, topology)
    folder = RunFolder(config)
    topology.decided_by_rank_0(folder.take)
    try:
        outcome = _run(config, signals, topology, dataset, digest, folder, decoding)
    except Exception as error:
        explained = in_words(error)
        with contextlib.suppress(OSError):  # the disk may be what failed
            known, code = explained is error, getattr(error, "exit_code", 1)
            folder.failed(code, f"{explained or error}", known)
        if explained is None or known:
            raise
        raise explained from error
    finally:
        folder.close()
    release()
    leave()
    return outcome


def _run(
    config: Config, signals: StopSignals, topology: Topology, dataset: Dataset, digest: str,
    folder: RunFolder, decoding: str,
) -> Outcome:  # fmt: skip
    """Run the training loop. The ranks are connected and the run folder is held.

    Args:
        digest: SHA-256 that identifies the data set.
        decoding: which pipeline decodes images and why, for the log.
    """
    # The network, its optimiser and its position in the schedule: new, or restored from the newest
    # checkpoint. The data need no state: the sampler computes the batch of any step.
    split = dataset.splits[config.data.train_split]
    schedule = Schedule.of(config, len(split))
    engine = make_engine(config, topology)
    progress = resume(folder, engine, schedule, config, digest, topology)
    folder.running(progress.step, schedule.last_step)
    log.info(_opening(config, topology, folder, progress, schedule, len(split), decoding))
    if config.data.pipeline == "resident" and not progress.finished(config, schedule):
        hold(config, topology, dataset, splits_of(config), signals)
    batches = train_batches(config, topology, dataset, progress.step, schedule.last_step)
    telemetry = Telemetry(
        config, folder, topology, dataset, schedule, progress.step, progress.evaluated_step,
        training_flops(config),
    )  # fmt: skip

    # What runs beside the steps: a thread that writes checkpoints, a watchdog for ranks that hang,
    # and statistics on their way from the device.
    saver = Saver(lambda: bool(checkpoints.steps(folder.checkpoints)))
    pending: deque[Pending] = deque()
    saved = progress.step, progress.evaluated_step  # the state in the newest checkpoint
    watchdog = Watchdog(
        topology, lambda: signals.polls, config.layout.timeout_s,
        lambda reason: folder.report("failed", exit=1, reason=reason),
    )  # fmt: skip
    compare_every, classes = config.train.compare_replicas_every, config.model.classes
    draw_confusion = config.log.pictures and pictured(config) and classes <= MOST_CLASSES
    confusion: Tensor | None = None  # (classes, classes) counts of the last evaluation
    pictures_due = False

    def settle(all_but: int) -> None:
        """Account for pending steps, oldest first, until `all_but` of them are left."""
        while len(pending) > all_but:
            progress.settle(pending.popleft(), config, split, folder, topology)

    try:
        while True:
            step, epoch = progress.step, progress.step / schedule.steps_per_epoch

            # Has a signal asked the run to stop, or has a save failed? All ranks learn it at the
            # same step.
            signals.cannot_save = saver.failed
            stop = signals.poll(topology)
            if stop == CANNOT_SAVE:
                topology.decided_by_rank_0(saver.finish)  # tries again, and raises if that fails
                continue

            # Evaluate. With schedule.kind=plateau the learning rate is divided when the validation
            # error stops improving, as in the paper's section 5.
            if not stop and progress.evaluation_due(config, schedule):
                settle(0)
                with TIMELINE.span("evaluate"):
                    shape = (classes, classes)
                    confusion = torch.zeros(shape, dtype=torch.int64) if draw_confusion else None
                    score = evaluate_engine(engine, config, topology, dataset, signals, confusion)
                    if score is None:
                        continue  # interrupted by a signal, which the poll above now returns
                    if not math.isfinite(score.loss):
                        raise NotFinite(
                            f"the evaluation after step {step} gave a loss of {score.loss}: "
                            "nothing has been saved since the last checkpoint. Lower "
                            "schedule.rate, or warm up longer"
                        )
                    progress.observe(score, schedule)
                    telemetry.evaluation(step, epoch, score, engine)
                    pictures_due = True

            # Save a checkpoint: at its interval, after the best evaluation so far, and before the
            # run stops or ends. Replicas must be equal, since only the first is saved.
            finished = progress.finished(config, schedule)
            due = step > 0 and step % config.checkpoint.every_steps == 0
            new_best = progress.best_step == step
            if (due or new_best or stop or finished) and saved != (step, progress.evaluated_step):
                settle(0)
                with TIMELINE.span("checkpoint"):
                    check_replicas(engine.replicated(), topology, step)
                    telemetry.flush()
                    save(saver, folder, engine, config, digest, progress, schedule)
                saved = step, progress.evaluated_step
            elif compare_every and step and step % compare_every == 0:
                check_replicas(engine.replicated(), topology, step)

            if stop or finished:
                topology.decided_by_rank_0(saver.finish)  # until the checkpoint is on the disk
            if pictures_due:  # only now: if drawing is killed, the evaluation is saved
                with TIMELINE.span("evaluate"):
                    telemetry.pictures(step, engine, confusion)
                pictures_due, confusion = False, None
            if stop or finished:
                break

            # One step of stochastic gradient descent: a batch of random crops, mirrored and lit
            # (section 4.1); forward, backward, and the update with momentum and weight decay
            # (section 5).
            batch = next(batches)
            rate, keep_gradients = schedule.rate(step), telemetry.histograms_due(step + 1)
            stats = engine.train_step(batch, step, rate, keep_gradients)
            pending.append(Pending(step + 1, batch, on_host(stats)))
            progress.step = step + 1

            # Account for the step before it. Reading this step's statistics now would make the
            # device idle until the next step is launched; at a log point all are read.
            log_now = progress.step % config.log.every_steps == 0
            settle(0 if log_now else 1)
            telemetry.stepped(progress.step, engine)
            if log_now:
                epoch = progress.step / schedule.steps_per_epoch
                means = progress.take_interval()
                means |= {"rate": rate, "damaged": float(progress.damaged)}
                means |= {"skipped": float(progress.skipped)}
                telemetry.train(progress.step, epoch, means)

        # All ranks leave together, so that none ends while another still needs it.
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


def _opening(
    config: Config, topology: Topology, folder: RunFolder, progress: Progress,
    schedule: Schedule, samples: int, decoding: str,
) -> str:  # fmt: skip
    """Return what the log says before the first step."""
    last = schedule.last_step
    begins = f"continues at step {progress.step} of {last}" if progress.step else "begins"
    parts, replica = config.train.micro_batches, config.train.batch // topology.replicas
    decoded = max(map(len, topology.shares(range(config.train.batch))))
    unscored = ""
    if config.data.eval_split == NO_SPLIT:
        unscored = f"data.eval_split={NO_SPLIT}: no evaluation; the last checkpoint is kept\n"
        if config.schedule.kind == "plateau":
            unscored = unscored[:-1] + ", and the rate of schedule.kind=plateau never drops\n"
    return (
        f"{folder.path} {begins}: {last} steps, {config.model.columns} column(s) on "
        f"{topology.world_size} process(es), {topology.device.type} ({torch.get_num_threads()} "
        f"thread(s) each), {config.train.precision}\n"
        f"batch {config.train.batch} in all, {replica} per replica, in {parts} micro-batch(es) of "
        f"{replica // parts}; each rank decodes {decoded}\n"
        f"{samples} training images of {config.data.path}, decoded by {decoding}\n"
        f"{unscored}watch: tensorboard --logdir {config.output_dir} --host localhost"
    )
