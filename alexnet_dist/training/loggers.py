"""The loggers of `log.to` other than TensorBoard: CSV, Weights & Biases, MLflow.

Each works in a thread of its own on rank 0: neither a server that does not answer nor a full disk
delays a run or ends it.
"""

import csv
import errno
import importlib.util
import io
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from alexnet_dist import files
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError
from alexnet_dist.plotting import Picture
from alexnet_dist.training.tolerance import WarnOnce

log = logging.getLogger(__name__)

PROJECT = "alexnet-dist"  # wandb's project, MLflow's experiment, if the environment names no other
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # by module, which has the logger's name
_CLOSE_S = 20  # to wait at the end for queued calls: a stopped job is soon killed
_MOST_QUEUED = 10_000  # calls
_PARAMS = 100  # parameters that MLflow takes in one call
Row = Mapping[str, float]  # "step", and numbers by tag


class Logger(Protocol):
    """A place that scalars and pictures are sent to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, tag: str, picture: Picture) -> None: ...

    def close(self, finished: bool) -> None: ...


def check_installed(config: Config) -> None:
    """Raise ConfigError if log.to names a logger that is not installed, or that has no key."""
    for name, package in _PACKAGES.items():
        if name in config.log.to and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.to={list(config.log.to)}: {name} is not installed in this Python: "
                f"pip install {package}, or leave it out of log.to"
            )
    if "wandb" in config.log.to:
        import wandb

        asked = wandb.setup().settings.mode == "online"
        if asked and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                f"log.to={list(config.log.to)}: wandb has no key: run `wandb login`, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline to log only to the run folder"
            )


def pictured(config: Config) -> bool:
    """Return whether any logger of log.to can show pictures."""
    return any(name != "csv" for name in config.log.to)


def start(config: Config, before: Sequence[Row]) -> "list[LoggerThread]":
    """Start the loggers of log.to other than TensorBoard; each continues its own record of the run.

    Args:
        before: rows of metrics.jsonl from earlier starts.
    """
    makes: dict[str, Callable[[], Logger]] = {
        "csv": lambda: _Csv(config.folder / "metrics.csv", before),
        "wandb": lambda: _Wandb(config),
        "mlflow": lambda: _Mlflow(config),
    }
    return [
        LoggerThread(name, makes[name]) for name in dict.fromkeys(config.log.to) if name in makes
    ]


class LoggerThread:
    """Runs a logger's calls in order in a thread; only its first failure is logged."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self._name, self._guard = name, WarnOnce(f"log.to={name}")
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(_MOST_QUEUED)
        self._given_up = False
        self._thread = threading.Thread(target=self._run, args=[make], name=name, daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[], Logger]) -> None:
        with self._guard:
            logger = make()
            while (call := self._calls.get()) is not None:
                with self._guard:
                    call(logger)
        self._given_up = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._queue(lambda to: to.scalars(step, values))

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for tag, picture in pictures.items():
            self._queue(methodcaller("picture", step, tag, picture))

    def _queue(self, call: Callable[[Logger], None] | None) -> None:
        if not self._given_up:
            with self._guard:
                self._calls.put_nowait(call)

    def finish(self, finished: bool) -> None:
        """Close the logger after the calls that are queued; no call may follow."""
        self._queue(lambda to: to.close(finished))
        self._queue(None)

    def wait(self, until: float) -> None:
        """Wait for the queued calls, until time.monotonic() reaches `until`."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning(f"log.to={self._name} could not take everything within {_CLOSE_S} s")


def close(threads: Sequence[LoggerThread], finished: bool) -> None:
    """Close all loggers, within _CLOSE_S in all."""
    until = time.monotonic() + _CLOSE_S
    for logger in threads:
        logger.finish(finished)
    for logger in threads:
        logger.wait(until)


class _Csv:
    """metrics.csv: a row for each point, a column for each tag."""

    def __init__(self, path: Path, before: Sequence[Row]) -> None:
        self._path = path
        self._begin(before)

    def _begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the file anew, with a column for every key of `rows`."""
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        with (
            files.written_aside(self._path, durably=False) as aside,
            aside.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": step, **values}
        if row.keys() <= {*self._columns}:
            line = io.StringIO(newline="")
            csv.DictWriter(line, self._columns).writerow(row)
            self._append(line.getvalue().encode())
        else:  # a new tag needs a new header
            with io.TextIOWrapper(files.opened(self._path), newline="") as file:
                known = list(csv.DictReader(file))
            self._begin([*known, row])

    def _append(self, line: bytes) -> None:
        """Append a whole line, or raise OSError and leave the file as it was: of what is written
        last, a full disk takes a part."""
        with files.appended(self._path) as file:
            before = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


class _Wandb:
    """Weights & Biases. It reads WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, … itself; `wandb/` and
    `wandb.id` are in the run folder."""

    def __init__(self, config: Config) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            id=_stored_id(config.folder / "wandb.id", lambda: secrets.token_hex(4)),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name, dir=config.folder, config=flat(config), resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", finish_timeout=_CLOSE_S - 5.0),
        )  # fmt: skip
        # wandb's own step may only rise, but a run that was killed repeats some of its steps.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        offline = f"wandb sync {self._run.settings.sync_dir}"
        log.info(f"wandb: {offline if self._run.offline else self._run.url}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        self._run.log({"step": step, tag: self._image(picture)})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _Mlflow:
    """MLflow. It reads MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME itself; without the former it
    writes to the folder `mlruns` in output_dir. `mlflow.id` is in the run folder."""

    def __init__(self, config: Config) -> None:
        folder = (Path(config.output_dir) / "mlruns").absolute()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns at every retry
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri()
        self._client = MlflowClient(uri)

        def make() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            place = known.experiment_id if known else self._client.create_experiment(name)
            run = str(self._client.create_run(place, run_name=config.name).info.run_id)
            keys = [Param(key, str(value)[:6000]) for key, value in flat(config).items()]
            for first in range(0, len(keys), _PARAMS):
                self._client.log_batch(run, params=keys[first : first + _PARAMS])
            return run

        self._id = _stored_id(config.folder / "mlflow.id", make)
        self._client.update_run(self._id, status="RUNNING")
        log.info(f"mlflow: run {self._id} in {uri}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        self._client.log_image(self._id, picture, key=tag, step=step)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _stored_id(path: Path, make: Callable[[], str]) -> str:
    """Return the id in a file; if there is none, make one and write it there."""
    known = files.read_bytes(path).decode().strip() if path.exists() else ""
    if not known:
        known = make()
        files.write(path, known.encode())
    return known
