"""One checkpoint: what its files hold, and whether every byte of them is as written."""

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from alexnet_dist.checkpoint.folder import NAME, free_path, step_of
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset, open_for, other_class
from alexnet_dist.errors import CheckpointError, ConfigError, Damaged, cannot_be_read
from alexnet_dist.files import json_object, read_bytes, sha256
from alexnet_dist.network.model import whole_shapes
from alexnet_dist.tensor_files import TensorFile, misfit

VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")


class File(TypedDict):
    """A file's size, bytes, and SHA-256."""

    size: int
    sha256: str


class Manifest(TypedDict):
    """What manifest.json holds.

    Attributes:
        version: version of the format.
        error: the validation error at this step; None where none was measured.
        dataset: the data set's digest.
        classes: its class names; missing in older checkpoints and imported ones.
        config: every key of the run's config.
        torch: torch's version.
        files: the other files, by name.
        sha256: hash of all other entries.
    """

    version: int
    step: int
    error: float | None
    dataset: str
    classes: NotRequired[Sequence[str]]
    config: Mapping[str, Any]
    torch: str
    files: Mapping[str, File]
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    manifest: Manifest
    progress: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def error(self) -> float | None:
        """The validation error at this step; None where none was measured."""
        value = self.manifest["error"]
        return None if value is None else float(value)

    @property
    def config(self) -> Config:
        """The config it was made with; keys added since then have base.yaml's values. Raises
        CheckpointError where this version cannot read it."""
        try:
            return load_config([self.manifest["config"]])
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def open_data(self, config: Config) -> Dataset:
        """Open the data set that a config names for this network; raises as `open_for` and
        `check_classes` do."""
        dataset = open_for(config, self.path)
        self.check_classes(dataset)
        return dataset

    def check_classes(self, dataset: Dataset) -> None:
        """Raise ConfigError where the classes are others than the network was trained on."""
        if other := other_class(self.manifest.get("classes"), dataset.classes):
            last = self.config.model.layer_names[-1]
            data, init = shlex.quote(str(dataset.folder)), shlex.quote(str(self.path))
            raise ConfigError(
                f"data.path={str(dataset.folder)!r}: {other} where {self.path} was trained: set "
                "data.path= to data of the same classes, or fine-tune it: train CONFIG "
                f"name=NEW data.path={data} train.init_from={init} "
                f"'train.init_new=[{last}]'"
            )

    def parameters(self) -> TensorFile:
        """Open its parameters; raise CheckpointError unless they fit its config's network."""
        file = TensorFile(self.path / "model.safetensors")
        if wrong := misfit(file.shapes(), whole_shapes(self.config.model)):
            raise CheckpointError(f"{file}: does not fit its own config: {wrong}")
        return file

    def optimizer(self) -> TensorFile:
        """Open the optimiser's tensors."""
        return TensorFile(self.path / "optimizer.safetensors")


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder, after checking every byte of it.

    Raises:
        Damaged: bytes are wrong, or a file is missing.
        CheckpointError: it cannot be read, was not written by this program, or is in a folder
            that is named after another step.
    """
    name = "manifest.json"
    try:
        manifest = json_object(read_bytes(path / name))
        if manifest["sha256"] != own_sha256(manifest):
            raise Damaged(path, f"{name}: its SHA-256 differs from the one it holds itself")
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path}: version {manifest['version']!r}, but this program reads version "
                f"{VERSION}: continue with the program that wrote it"
            )
        for name in FILES:
            expected, size = manifest["files"][name], (path / name).stat().st_size
            if size != expected["size"]:
                raise Damaged(path, f"{name}: {size} bytes, but {expected['size']} were written")
            if sha256(path / name) != expected["sha256"]:
                raise Damaged(path, f"{name}: its SHA-256 differs from what was written")
        progress = json_object(read_bytes(path / "progress.json"))
    except OSError as error:
        raise _unread(path, name, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, f"{name}: {error!r}") from error
    checkpoint = Checkpoint(path, cast("Manifest", manifest), progress)
    _check_meaning(checkpoint)
    return checkpoint


def _check_meaning(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the contents make sense and are of the step that the folder is
    named after."""
    path, manifest = checkpoint.path, checkpoint.manifest
    step, error = manifest.get("step"), manifest.get("error")
    sound = type(step) is int and step >= 0 and checkpoint.progress.get("step") == step
    sound &= error is None or (type(error) in (int, float) and 0 <= error <= 1)
    sound &= isinstance(manifest.get("classes", []), list)
    if not (sound and isinstance(manifest.get("config"), dict)):
        raise CheckpointError(f"{path / 'manifest.json'}: is not what a run writes")
    for name in ("model.safetensors", "optimizer.safetensors"):
        TensorFile(path / name)
    if NAME.fullmatch(path.name) and step_of(path) != step:
        right = path.with_name(f"step-{step:08d}")
        if os.path.lexists(right):
            to = free_path(path.parent.parent / path.name)
            why = f"{right} exists too: move it out of the run"
        else:
            to, why = right, "Give it its own name"
        move = shlex.join(["mv", "-nT", str(path), str(to)])
        raise CheckpointError(
            f"{path} holds a valid checkpoint of another step, {step}; nothing was changed. "
            f"{why}: {move}"
        )


def _unread(path: Path, name: str, error: OSError) -> CheckpointError:
    """Return the error for a file that cannot be read: Damaged where it is missing; CheckpointError
    where it may be intact, as behind a link to a disk that is not mounted."""
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    if missing and not any(p.is_symlink() and not p.exists() for p in (path, path / name)):
        return Damaged(path, f"{name} is missing")
    return CheckpointError(cannot_be_read(path / name, error))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that another rank has verified.

    Raises CheckpointError where this rank cannot, as on a node that does not share its folder.
    """
    try:
        manifest, progress = (
            json_object(read_bytes(path / name)) for name in ("manifest.json", "progress.json")
        )
    except OSError as error:
        raise CheckpointError(
            f"{cannot_be_read(path, error)}; every node must see what rank 0 has verified"
        ) from error
    return Checkpoint(path, cast("Manifest", manifest), progress)


def error_and_loss(path: Path) -> tuple[float, float] | None:
    """Return a checkpoint's validation error and loss, unverified; None if it was not evaluated."""
    name = "manifest.json"
    try:
        error = json_object(read_bytes(path / name))["error"]
        if error is None:
            return None
        name = "progress.json"
        return float(error), float(json_object(read_bytes(path / name))["score"]["loss"])
    except OSError as failure:
        raise _unread(path, name, failure) from failure
    except (ValueError, KeyError, TypeError, OverflowError) as failure:
        raise Damaged(path, f"{name}: {failure!r}") from failure


def own_sha256(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest's other entries, which it holds itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
