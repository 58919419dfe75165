"""Checkpoints that know no layout: whole tensors, safetensors and JSON, no pickle.

    runs/NAME/checkpoints/step-00012000/
        model.safetensors       conv1.weight, conv1.bias, …
        optimizer.safetensors   momentum_buffer/conv1.weight, … as the optimiser holds them
        progress.json           step, schedule, best, what the metrics need to go on
        manifest.json           size and SHA-256 of the three, the config, the data set's digest,
                                and the SHA-256 of all that

A checkpoint is written aside, synced, and renamed into place, the manifest last: what carries the
name is whole, or its manifest says that it is not.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.errors import (
    CheckpointError,
    ConfigError,
    Damaged,
    NotFinite,
    cannot_be_read,
)
from alexnet_dist.files import check_trained, is_there, json_object, read_bytes, sha256, sync, write
from alexnet_dist.network.model import whole_shapes
from alexnet_dist.tensor_files import TensorFile, misfit, save_tensors

VERSION = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
# Beside step-00012000: .old-… while it is replaced, .gone-… while it is removed.
_NAME = re.compile(r"(\.old-|\.gone-)?step-(\d{8,})")
_WRITING = re.compile(r"\.writing-([0-9a-f]+-)?step-\d{8,}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]
    progress: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def error(self) -> float | None:
        """The validation error measured at this step, if one was."""
        value = self.manifest["error"]
        return None if value is None else float(value)

    @property
    def config(self) -> Config:
        """The config it was made with; keys younger than it have base.yaml's values."""
        return load_config([self.manifest["config"]])

    def parameters(self) -> TensorFile:
        """Raises CheckpointError unless they are those of its config's network."""
        file = TensorFile(self.path / "model.safetensors")
        if wrong := misfit(file.shapes(), whole_shapes(self.config.model)):
            raise CheckpointError(f"{file}: not what a run writes: {wrong}, by its own config")
        return file

    def optimizer(self) -> TensorFile:
        return TensorFile(self.path / "optimizer.safetensors")


def save(
    folder: Path,
    config: Config,
    dataset_digest: str,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    error: float | None,
) -> Path:
    """Write a checkpoint durably; its path. `folder` is the run's `checkpoints`.

    Raises:
        NotFinite: a tensor holds NaN or infinity; nothing was written.
        CheckpointError: it could not be written; older ones are untouched.
    """
    for name, tensor in (*parameters.items(), *optimizer.items()):
        if not all(
            end.isfinite() for end in tensor.aminmax()
        ):  # a fifth of isfinite().all()'s time
            raise NotFinite(
                f"step {progress['step']}: {name} is not finite; not saved, older checkpoints are. "
                "Lower schedule.rate, warm up longer, or look at the data"
            )
    manifest = {
        "version": VERSION,
        "step": int(progress["step"]),
        "error": error,
        "dataset": dataset_digest,
        "config": flat(config),
        "torch": torch.__version__,
    }
    try:
        return _write(folder, manifest, parameters, optimizer, progress)
    except (OSError, SafetensorError, CheckpointError) as failure:
        with contextlib.suppress(OSError, CheckpointError):
            sweep(folder)  # a full disk is not to stay so
        raise CheckpointError(
            f"{folder}: the checkpoint of step {progress['step']} could not be written "
            f"({failure}); older ones are untouched"
        ) from failure


def _write(
    folder: Path,
    manifest: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> Path:
    """Aside, synced, renamed; `manifest` lacks the files' hashes and its own."""
    final = folder / f"step-{manifest['step']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-{secrets.token_hex(8)}-{final.name}"  # that nobody can foretell
    aside.mkdir()
    files = {}
    _write_tensors(aside / "model.safetensors", parameters)
    _write_tensors(aside / "optimizer.safetensors", optimizer)
    write(aside / "progress.json", _json(progress))
    for name in _FILES:
        files[name] = {"size": (aside / name).stat().st_size, "sha256": sha256(aside / name)}
    whole = {**manifest, "files": files}
    write(aside / "manifest.json", _json(whole | {"sha256": own_sha256(whole)}))
    sync(aside)
    if _claimed(final) == manifest["step"]:  # as it was before an evaluation
        final.rename(folder / f".old-{final.name}")
    elif os.path.lexists(final):
        log.warning(f"{final} was there, and is not of that step: now {_put_aside(final, 'kept')}")
    aside.rename(final)
    sync(folder)
    sweep(folder, manifest["step"])
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Durably, and read back: safetensors does not say whether closing the file succeeded."""
    save_tensors(path, tensors)
    sync(path)
    found = TensorFile(path)
    for name, tensor in tensors.items():
        if not torch.equal(found.rows(name, slice(None)), tensor):
            raise OSError(f"{path}: {name} does not read back as it was written")


def verify(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte of which is as it was written.

    Raises:
        Damaged: bytes are wrong, or a file is missing.
        CheckpointError: it cannot be read, is not what this program writes, or is in a folder that
            is named for another step.
    """
    name = "manifest.json"
    try:
        manifest = json_object(read_bytes(path / name))
        if manifest["sha256"] != own_sha256(manifest):
            raise Damaged(path, f"{name}: its SHA-256 differs from its own")
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path}: version {manifest['version']!r}, and this program reads {VERSION}: go on "
                "with the program that wrote it"
            )
        for name in _FILES:
            expected, size = manifest["files"][name], (path / name).stat().st_size
            if size != expected["size"]:
                raise Damaged(path, f"{name}: {size} bytes, wrote {expected['size']}")
            if sha256(path / name) != expected["sha256"]:
                raise Damaged(path, f"{name}: its SHA-256 differs from what was written")
        progress = json_object(read_bytes(path / "progress.json"))
    except OSError as error:
        raise _unread(path, name, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, f"{name}: {error!r}") from error
    found = Checkpoint(path, manifest, progress)
    _check_meaning(found)
    return found


def _check_meaning(found: Checkpoint) -> None:
    """Raises CheckpointError unless what was written is a checkpoint, of the step that its folder
    is named after."""
    path, manifest = found.path, found.manifest
    step, error = manifest.get("step"), manifest.get("error")
    sound = type(step) is int and step >= 0 and found.progress.get("step") == step
    sound &= error is None or (type(error) in (int, float) and 0 <= error <= 1)
    if not (sound and isinstance(manifest.get("config"), dict)):
        raise CheckpointError(f"{path / 'manifest.json'}: not what a run writes")
    for name in ("model.safetensors", "optimizer.safetensors"):
        TensorFile(path / name)
    if _NAME.fullmatch(path.name) and step_of(path) != step:
        right = path.with_name(f"step-{step:08d}")
        if os.path.lexists(right):
            to, why = _free(path.parent.parent / path.name), f"{right} is there too: move it out"
        else:
            to, why = right, "Give it its name"
        move = shlex.join(["mv", "-nT", str(path), str(to)])
        raise CheckpointError(
            f"{path} holds a good checkpoint, of step {step}; nothing was changed. {why}: {move}"
        )


def _unread(path: Path, name: str, error: OSError) -> CheckpointError:
    """What to say of a file of a checkpoint: one that is missing is damage, one that cannot be read
    may be whole, and so may one that a link leads to."""
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    if missing and not any(p.is_symlink() and not p.exists() for p in (path, path / name)):
        return Damaged(path, f"{name} is missing")
    return CheckpointError(cannot_be_read(path / name, error))


def read(path: Path) -> Checkpoint:
    """A checkpoint that another rank has verified."""
    manifest, progress = (
        json_object(read_bytes(path / name)) for name in ("manifest.json", "progress.json")
    )
    return Checkpoint(path, manifest, progress)


def newest(folder: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """The newest checkpoint that verifies, None if none does, and newer ones that are damaged.

    One that an interrupted replacement or removal has left hidden is as good as any. Nothing is
    changed. Raises CheckpointError where it cannot be told: a newer one cannot be read, or one is
    in a folder that is named for another step.
    """
    found: Checkpoint | None = None
    wrong: list[Damaged] = []
    paths = [folder / name for name in _listed(folder) if _NAME.fullmatch(name)]
    for path in sorted(paths, key=lambda p: (step_of(p), p.name[0] != "."), reverse=True):
        if found is not None and _claimed(path) in (step_of(path), None):
            continue
        try:
            checkpoint = verify(path)
        except Damaged as error:
            wrong += [error] if found is None else []
        else:
            found = found or checkpoint
    return found, wrong


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """What `newest` gives, where one verifies or there is none; raises CheckpointError where none
    of those there is good."""
    found, wrong = newest(folder)
    if wrong and found is None:
        raise CheckpointError(
            f"{folder}: none of {len(wrong)} checkpoints is good ({wrong[0]}): restore one"
        )
    return found, wrong


def best(folder: Path) -> Checkpoint:
    """The good checkpoint with the lowest validation error, the earliest of equals; the newest
    where none was evaluated."""
    found = []
    for path in steps(folder):
        with contextlib.suppress(Damaged):  # a manifest that is cannot be the best
            error = _error_of(path)
            order = (0, error, path) if error is not None else (1, -step_of(path), path)
            found.append(order)
    for *_, path in sorted(found):
        try:
            return verify(path)
        except Damaged as error:
            log.warning(f"not used: {error}")
    raise CheckpointError(f"{folder}: none of its checkpoints is good")


def at(path: Path) -> Checkpoint:
    """The checkpoint that a path names; of a run folder the best, or its only one."""
    check_trained(path)
    if is_there(path / "checkpoints"):
        only = steps(path / "checkpoints")
        return verify(only[0]) if len(only) == 1 else best(path / "checkpoints")
    return verify(path)


def check_same_run(checkpoint: Checkpoint, config: Config, dataset_digest: str) -> None:
    """Raises ConfigError where the checkpoint was made by another run than `config` defines."""
    theirs, ours = fingerprint(checkpoint.config), fingerprint(config)
    differ = [
        f"{key}: {theirs.get(key, 'unset')!r} there, {ours.get(key, 'unset')!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if checkpoint.manifest["dataset"] != dataset_digest:
        differ.append("data.path: another data set there")
    if differ:
        raise ConfigError(
            f"{checkpoint.path} belongs to another run ({'; '.join(differ)}): "
            "give this run another name=, or restore those keys"
        )


def settle(folder: Path, found: Checkpoint | None, wrong: Sequence[Damaged]) -> Path | None:
    """Make a folder ready for a run that goes on from what `newest` found, or from nothing; where
    that now lies. What is damaged is set aside: it must not be kept in place of what is good."""
    for error in wrong:
        _put_aside(error.args[0], "damaged")
    if found is None:
        sweep(folder)
        return None
    for name in traces(folder):
        step = _claimed(folder / name)
        own = _NAME.fullmatch(name) or name.startswith("damaged-")
        if not own and step is not None and step > found.step:
            log.warning(
                f"not used: {folder / name} holds step {step}, newer than {found.step}: to go on "
                f"from it, stop this run and rename it to step-{step:08d}, if that is free"
            )
    path = found.path
    if path.name[0] == ".":  # what replaced it is damaged, or it was not to go
        path = path.rename(folder / f"step-{found.step:08d}")
    sweep(folder, found.step)
    return path


def prune(folder: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints, those of every so many steps, and the best; none that
    is not of the step it is named after."""
    ours = [path for path in steps(folder) if _claimed(path) == step_of(path)]
    for path in ours[:-keep_last]:
        step = step_of(path)
        if step != best_step and (not keep_every or step % keep_every):
            path.rename(path.with_name(f".gone-{path.name}"))
    sweep(folder, max(map(step_of, ours), default=-1))


def sweep(folder: Path, good: int = -1) -> None:
    """Undo an interrupted replacement, and remove what interrupted writes and removals left.

    Args:
        good: step of a checkpoint that is: it supersedes what was being removed, up to its step.
    """
    for name in _listed(folder):
        path, kind = folder / name, name.partition("step-")[0]
        if _WRITING.fullmatch(name):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
        elif kind in (".old-", ".gone-") and _NAME.fullmatch(name):
            if kind == ".old-" and not os.path.lexists(folder / name.removeprefix(kind)):
                path.rename(folder / name.removeprefix(kind))
            elif step_of(path) <= good:
                shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The checkpoints' folders, oldest first; raises CheckpointError where that cannot be read."""
    names = [name for name in _listed(folder) if name[0] != "." and _NAME.fullmatch(name)]
    return sorted((folder / name for name in names), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.rpartition("step-")[2])


def traces(folder: Path) -> list[str]:
    """Names of what tells that there were checkpoints, good or not; an interrupted first save does
    not."""
    return sorted(
        name for name in _listed(folder)
        if not name.startswith(".writing-")
        and ("step-" in name or os.path.lexists(folder / name / "manifest.json"))
    )  # fmt: skip


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(cannot_be_read(folder, error)) from error


def _claimed(path: Path) -> int | None:
    """The step that a folder's manifest says it is of, unverified; None where it says none."""
    try:
        step = json_object(read_bytes(path / "manifest.json")).get("step")
    except (OSError, ValueError):
        return None
    return step if type(step) is int else None


def _put_aside(path: Path, word: str) -> Path:
    """Rename a folder to WORD-NAME; where that is taken, to WORD-NAME-2, and so on."""
    return path.rename(_free(path.with_name(f"{word}-{path.name.removeprefix('.')}")))


def _free(path: Path) -> Path:
    name, number = path.name, 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def _error_of(path: Path) -> float | None:
    try:
        value = json_object(read_bytes(path / "manifest.json"))["error"]
        return None if value is None else float(value)
    except OSError as error:
        raise _unread(path, "manifest.json", error) from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged(path, f"manifest.json: {error!r}") from error


def own_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash a manifest carries of its other entries."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()
