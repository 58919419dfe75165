"""Layout-free checkpoints: whole tensors in safetensors files, and JSON; no pickle.

    runs/NAME/checkpoints/step-00012000/
        model.safetensors       conv1.weight, conv1.bias, …
        optimizer.safetensors   momentum_buffer/conv1.weight, … as the optimiser holds them
        progress.json           step, schedule, best, what the metrics need to continue
        manifest.json           size and SHA-256 of the three, the config, the data set's digest
                                and class names, and the SHA-256 of all that

A checkpoint is written in a folder aside, the manifest last, synced, and renamed into place. So a
folder of that name is complete, or its manifest shows that it is not.
"""

import contextlib
import json
import logging
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from alexnet_dist.checkpoint.folder import (
    NAME,
    claimed_step,
    listed,
    put_aside,
    step_of,
    steps,
    sweep,
    traces,
)
from alexnet_dist.checkpoint.verify import (
    FILES,
    VERSION,
    Checkpoint,
    File,
    error_and_loss,
    own_sha256,
    read,
    verify,
)
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.errors import CheckpointError, ConfigError, Damaged, NotFinite
from alexnet_dist.files import check_trained, is_there, read_run, sha256, sync, write
from alexnet_dist.tensor_files import TensorFile, save_tensors

# What the rest of the program uses of checkpoints.
__all__ = [
    "Checkpoint", "at", "best", "check_same_run", "continue_from", "newest", "newest_good",
    "own_sha256", "prune", "read", "save", "step_of", "steps", "sweep", "traces", "verify",
]  # fmt: skip
log = logging.getLogger(__name__)


def save(
    folder: Path,
    config: Config,
    dataset_digest: str,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    error: float | None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a checkpoint durably, and return its path.

    Args:
        folder: the run's `checkpoints` folder.
        parameters, optimizer: whole tensors by name, on the CPU.
        progress: what the training loop needs to continue, with the step.
        error: the validation error, if one was measured at this step.
        classes: the data set's class names, if they are known.

    Raises:
        NotFinite: a tensor holds NaN or infinity; nothing was written.
        CheckpointError: it could not be written; older ones are untouched.
    """
    for name, tensor in (*parameters.items(), *optimizer.items()):
        # This takes a fifth of the time of isfinite().all().
        if not all(end.isfinite() for end in tensor.aminmax()):
            raise NotFinite(
                f"step {progress['step']}: {name} is not finite: this checkpoint was not saved, "
                "but older ones are. Lower schedule.rate, warm up longer, or look at the data"
            )
    manifest = {
        "version": VERSION,
        "step": int(progress["step"]),
        "error": error,
        "dataset": dataset_digest,
        **({} if classes is None else {"classes": classes}),
        "config": flat(config),
        "torch": torch.__version__,
    }
    try:
        return _write(folder, manifest, parameters, optimizer, progress)
    except (OSError, SafetensorError, CheckpointError) as failure:
        with contextlib.suppress(OSError, CheckpointError):
            sweep(folder)  # what was written may fill the disk
        size = sum(t.nbytes for tensors in (parameters, optimizer) for t in tensors.values())
        raise CheckpointError(
            f"{folder}: the checkpoint of step {progress['step']} could not be written "
            f"({failure}); older ones are untouched. Make room there for its {size / 1e6:.1f} MB, "
            "or mend what else prevents it; if the run has ended, the same command resumes it"
        ) from failure


def _write(
    folder: Path,
    manifest: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> Path:
    """Write the files aside, sync them and rename the folder.

    Args:
        manifest: without the hashes of the files and its own.
    """
    final = folder / f"step-{manifest['step']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-{secrets.token_hex(8)}-{final.name}"  # an unpredictable name
    aside.mkdir()
    # Every file is on the disk before its hash enters the manifest, which comes last.
    files = dict[str, File]()
    _write_tensors(aside / "model.safetensors", parameters)
    _write_tensors(aside / "optimizer.safetensors", optimizer)
    write(aside / "progress.json", _json(progress))
    for name in FILES:
        files[name] = {"size": (aside / name).stat().st_size, "sha256": sha256(aside / name)}
    whole = {**manifest, "files": files}
    write(aside / "manifest.json", _json(whole | {"sha256": own_sha256(whole)}))
    sync(aside)
    # Move away what has the name already, then take it.
    if claimed_step(final) == manifest["step"]:  # saved again, after an evaluation
        final.rename(folder / f".old-{final.name}")
    elif os.path.lexists(final):
        log.warning(
            f"{final} existed, but is not of that step: it is now {put_aside(final, 'kept')}"
        )
    aside.rename(final)
    sync(folder)
    sweep(folder, manifest["step"])
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors durably, and read them back: safetensors ignores errors of closing the file."""
    save_tensors(path, tensors)
    written = TensorFile(path)
    for name, tensor in tensors.items():
        if not torch.equal(written.rows(name, slice(None)), tensor):
            raise OSError(f"{path}: {name} could not be read back as it was written")


def newest(folder: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """Return the newest checkpoint that verifies, or None, and the newer ones that are damaged.

    Checkpoints that an interrupted replacement or removal left under a hidden name are considered
    too. Nothing is changed.

    Raises CheckpointError where there may be a better one: a newer one cannot be read, or one is in
    a folder that is named after another step.
    """
    good: Checkpoint | None = None
    damaged: list[Damaged] = []
    paths = [folder / name for name in listed(folder) if NAME.fullmatch(name)]
    for path in sorted(paths, key=lambda p: (step_of(p), p.name[0] != "."), reverse=True):
        # Older ones matter only where the manifest names another step than the folder does.
        if good is not None and claimed_step(path) in (step_of(path), None):
            continue
        try:
            checkpoint = verify(path)
        except Damaged as error:
            damaged += [error] if good is None else []
        else:
            good = good or checkpoint
    return good, damaged


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """Return what `newest` returns; raise CheckpointError where there are checkpoints and all are
    damaged."""
    good, damaged = newest(folder)
    if damaged and good is None:
        raise _none_valid(folder, damaged)
    return good, damaged


def best(folder: Path) -> Checkpoint:
    """Return the undamaged checkpoint with the lowest validation error, of equals the one with the
    lowest loss, as a run's progress has it; the newest where none was evaluated."""
    candidates, damaged = [], list[Damaged]()
    for path in steps(folder):
        try:
            # Those that were not evaluated come last, the newest of them first.
            standing = error_and_loss(path) or (math.inf, -step_of(path))
            candidates.append((*standing, path))
        except Damaged as error:
            damaged.append(error)
    for *_, path in sorted(candidates):
        try:
            found = verify(path)
        except Damaged as error:
            damaged.append(error)
        else:
            for wrong in damaged:
                log.warning(f"not used: {wrong}")
            return found
    if damaged:
        raise _none_valid(folder, damaged)
    if step := read_run(folder.parent).get("newest_step"):
        raise CheckpointError(
            f"{folder}: no checkpoint, though run.json says that there was one of step {step}: "
            "restore it"
        )
    raise CheckpointError(
        f"{folder}: no checkpoint yet: a run saves one every checkpoint.every_steps steps, "
        "after its best evaluation so far, and when it stops"
    )


def _none_valid(folder: Path, damaged: Sequence[Damaged]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: none of its checkpoints is valid ({damaged[0]}): restore one"
    )


def at(path: Path) -> Checkpoint:
    """Return the checkpoint at a path, or where that is a run folder its best one."""
    check_trained(path)
    if is_there(path / "checkpoints"):
        return best(path / "checkpoints")
    return verify(path)


def check_same_run(checkpoint: Checkpoint, config: Config, dataset_digest: str) -> None:
    """Raise ConfigError where the checkpoint is from another run than the config defines."""
    theirs, ours = fingerprint(checkpoint.config), fingerprint(config)
    given = {  # why it matters; of the hash of a file, by which key the config names it
        "train.epochs": f" (the rate of schedule.kind={config.schedule.kind} depends on it)",
        "train.init_sha256": f" (train.init_from={config.train.init_from!r})",
        "data.mean_sha256": f" (data.mean_from={config.data.mean_from!r})",
    }
    differ = [
        f"{key}: {theirs.get(key, 'unset')!r} there, {ours.get(key, 'unset')!r} here"
        f"{given.get(key, '')}"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if checkpoint.manifest["dataset"] != dataset_digest:
        differ.append(f"data.path: {checkpoint.config.data.path!r} there, with another data set")
    if differ:
        raise ConfigError(
            f"{checkpoint.path} belongs to another run ({'; '.join(differ)}): "
            "give this run another name=, or restore those keys"
        )


def continue_from(folder: Path, good: Checkpoint | None, damaged: Sequence[Damaged]) -> Path | None:
    """Prepare the folder of a run that continues from what `newest` returned; return the
    checkpoint's path, which may be new, or None where there is none.

    Damaged checkpoints are set aside, so that they do not count among those to keep.
    """
    for error in damaged:
        put_aside(error.args[0], "damaged")
    if good is None:
        sweep(folder)
        return None
    for name in traces(folder):
        step = claimed_step(folder / name)
        own = NAME.fullmatch(name) or name.startswith("damaged-")
        if not own and step is not None and step > good.step:
            log.warning(
                f"not used: {folder / name} holds step {step}, newer than {good.step}: to resume "
                f"from it, stop this run and rename it to step-{step:08d}, if that name is free"
            )
    path = good.path
    if path.name[0] == ".":  # its replacement is damaged, or its removal was interrupted
        path = path.rename(folder / f"step-{good.step:08d}")
    sweep(folder, good.step)
    return path


def prune(folder: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove checkpoints, except the newest `keep_last`, those at multiples of `keep_every` (0 =
    none), and the best; nor any whose step is not that of its name."""
    ours = [path for path in steps(folder) if claimed_step(path) == step_of(path)]
    for path in ours[:-keep_last]:
        step = step_of(path)
        if step != best_step and (not keep_every or step % keep_every):
            with contextlib.suppress(OSError):  # tried again after the next save
                path.rename(path.with_name(f".gone-{path.name}"))
    sweep(folder, max(map(step_of, ours), default=-1))


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()
