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

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alexnet_dist.config import Config, fingerprint, flat
from alexnet_dist.config_files import load_config
from alexnet_dist.durable import sha256, sync, write
from alexnet_dist.errors import CheckpointError, ConfigError, NotFinite, looked_in
from alexnet_dist.untrusted import MOST_HEADER, json_object, read_bytes

VERSION = 1
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

    def parameters(self) -> "TensorFile":
        return TensorFile(self.path / "model.safetensors")

    def optimizer(self) -> "TensorFile":
        return TensorFile(self.path / "optimizer.safetensors")


class TensorFile:
    """Whole tensors in a safetensors file, of which rows can be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if header > MOST_HEADER:
                raise ValueError(f"a header of {header:,} bytes, more than {MOST_HEADER:,}")
            self._file = safe_open(path, framework="pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows (dim 0) of a tensor; a scalar whole."""
        try:
            tensor = self._file.get_slice(name)
            return tensor[rows] if tensor.get_shape() else self._file.get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: no tensor {name!r}: {error}") from error


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
    aside = folder / f".writing-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {}
    _write_tensors(aside / "model.safetensors", parameters)
    _write_tensors(aside / "optimizer.safetensors", optimizer)
    write(aside / "progress.json", _json(progress))
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        files[name] = {"size": (aside / name).stat().st_size, "sha256": sha256(aside / name)}
    whole = {**manifest, "files": files}
    write(aside / "manifest.json", _json(whole | {"sha256": _own_sha256(whole)}))
    sync(aside)
    if final.exists():  # the same step again: a damaged one, or one from before an evaluation
        final.rename(folder / f".old-{final.name}")
    aside.rename(final)
    sync(folder)
    sweep(folder)
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Durably, and read back: safetensors does not say whether closing the file succeeded."""
    save_file(dict(tensors), path)
    sync(path)
    found = TensorFile(path)
    for name, tensor in tensors.items():
        if not torch.equal(found.rows(name, slice(None)), tensor):
            raise OSError(f"{path}: {name} does not read back as it was written")


def verify(path: Path) -> Checkpoint:
    """The checkpoint in a folder; raises CheckpointError unless every byte is as written."""
    try:
        found = read(path)
        manifest = found.manifest
        if manifest["sha256"] != _own_sha256(manifest):
            raise CheckpointError(f"{path / 'manifest.json'}: SHA-256 differs from its own")
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']!r}, expected {VERSION}")
        for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
            expected = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path / name}: {size} bytes, wrote {expected['size']}")
            if sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name}: SHA-256 differs from what was written")
        step, error = manifest["step"], manifest["error"]
        sound = type(step) is int and step >= 0 and found.progress["step"] == step
        sound &= error is None or (type(error) in (int, float) and 0 <= error <= 1)
        if not (sound and isinstance(manifest["config"], dict)):
            raise CheckpointError(f"{path / 'manifest.json'}: not what a run writes")
        for tensors in (found.parameters(), found.optimizer()):
            tensors.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return found


def read(path: Path) -> Checkpoint:
    """A checkpoint that another rank has verified."""
    manifest, progress = (
        json_object(read_bytes(path / name)) for name in ("manifest.json", "progress.json")
    )
    return Checkpoint(path, manifest, progress)


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    None where no checkpoint was ever made; raises CheckpointError where none that was made is good.
    """
    wrong: list[CheckpointError] = []
    for path in reversed(steps(folder)):
        try:
            return verify(path), wrong
        except CheckpointError as error:
            wrong.append(error)
    if wrong:
        raise CheckpointError(
            f"{folder}: none of {len(wrong)} checkpoints is good ({wrong[0]}); restore one, or "
            "start anew under another name="
        )
    return None, wrong


def best(folder: Path) -> Checkpoint:
    """The good checkpoint with the lowest validation error, the earliest of equals."""
    found = []
    for path in steps(folder):
        try:
            found.append((_error_of(path), path))
        except CheckpointError:
            continue  # a manifest that cannot be read cannot be the best
    for _, path in sorted((error, path) for error, path in found if error is not None):
        try:
            return verify(path)
        except CheckpointError as error:
            log.warning(f"not used: {error}")
    raise CheckpointError(f"{folder}: no good checkpoint has a validation error")


def at(path: Path) -> Checkpoint:
    """The checkpoint that a path names; of a run folder the best, or its only one."""
    if (path / "checkpoints").is_dir():
        only = steps(path / "checkpoints")
        return verify(only[0]) if len(only) == 1 else best(path / "checkpoints")
    if (path / "manifest.json").is_file():
        return verify(path)
    raise CheckpointError(
        f"{path} is neither a run folder nor a checkpoint{looked_in(path)}: name runs/NAME or "
        "runs/NAME/checkpoints/step-…"
    )


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


def set_aside(folder: Path, after: int) -> None:
    """Rename checkpoints newer than the step a run continues from: they did not verify."""
    for path in steps(folder):
        if step_of(path) > after:
            shutil.rmtree(folder / f"damaged-{path.name}", ignore_errors=True)
            path.rename(folder / f"damaged-{path.name}")


def prune(folder: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints, those of every so many steps, and the best."""
    for path in steps(folder)[:-keep_last]:
        step = step_of(path)
        if step != best_step and (not keep_every or step % keep_every):
            path.rename(path.with_name(f".gone-{path.name}"))
    sweep(folder)


def sweep(folder: Path) -> None:
    """Undo an interrupted replacement, and remove what interrupted writes and removals left."""
    for old in folder.glob(".old-step-*"):
        name = old.name.removeprefix(".old-")
        if not (folder / name).exists():
            old.rename(folder / name)
    for kind in ("old", "gone", "writing"):
        for left in folder.glob(f".{kind}-step-*"):
            shutil.rmtree(left, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The checkpoints' folders, oldest first."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def _error_of(path: Path) -> float | None:
    try:
        value = json_object(read_bytes(path / "manifest.json"))["error"]
        return None if value is None else float(value)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash a manifest carries of its other entries."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()
