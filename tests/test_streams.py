"""Standard streams that are closed, in another encoding, unread, or not files at all."""

import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from alexnet_dist import train
from alexnet_dist.cli import main, measures
from alexnet_dist.config.schema import Config

PROGRAM = f"{sys.executable} -m alexnet_dist"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], check=False, capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["configs", "--help", "train --help", "configs --json"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    for unbuffered in ("", "1"):
        ended = shell(f"{PROGRAM} {command} | true", PYTHONUNBUFFERED=unbuffered)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    ended = shell(f"{PROGRAM} configs | head -n 1; echo ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED="1")
    assert ended.stdout.splitlines()[0].startswith("base ")
    assert (ended.stdout.splitlines()[1:], ended.stderr) in ((["141"], ""), (["0"], ""))


def test_a_reader_that_leaves_while_a_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `doctor | head` does, which flushes each line."""

    def examine(*_: object, **__: object) -> object:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(measures, "load_config", examine)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        assert main.main(["doctor"]) == 141
    assert main.main(["doctor"]) == 1  # of something else: not in silence


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(closed: str) -> None:
    assert shell(f"{PROGRAM} configs {closed}").returncode == 0
    assert shell(f"{PROGRAM} train demo lr=1 {closed}").returncode == 2


@pytest.mark.parametrize("stream", ["", "2>&1 >/dev/null"])
def test_what_cannot_be_encoded_is_told_all_the_same(stream: str) -> None:
    command = "train demo name=é" if stream else "configs"
    ended = shell(f"{PROGRAM} {command} {stream}", PYTHONIOENCODING="ascii:strict")
    assert (r"name='\xe9': must be" if stream else r"(\xa74.1: more than") in ended.stdout
    assert ended.returncode == (2 if stream else 0)
    plain = shell(f"{PROGRAM} {command} {stream}", LC_ALL="C", LANG="C")
    assert ("name='é'" if stream else "§4.1") in plain.stdout


class NoFile(io.StringIO):
    """A notebook's: text goes to a page."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@pytest.mark.parametrize("stream", [NoFile(), None], ids=["notebook", "closed"])
def test_a_run_needs_no_files_for_streams(
    stream: NoFile | None, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    config = tiny("layout.kind=one", "train.epochs=0.3")
    assert train(config).exit == 0
    if stream:
        assert "evaluation: top-1" in stream.getvalue()
        again = [f"{key}={value}" for key, value in (
            ("name", config.name), ("output_dir", config.output_dir))]  # fmt: skip
        assert main.main(["train", str(config.folder / "config.json"), *again]) == 0
        assert "done, 2 steps" in stream.getvalue()
