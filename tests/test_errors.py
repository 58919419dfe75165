"""Every mistake of a newcomer gives one line that says what to do.

Here: machines, installations and launchers. Elsewhere: configs (test_config.py), data sets
(test_data.py), sources (test_prepare.py, test_hostile_sources.py), layouts (test_layouts.py),
checkpoints and run folders (test_checkpoint.py, test_run.py, test_paper.py), Slurm
(test_launch.py), signals (test_run.py).
"""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import forks
import pytest
import torch
from conftest import as_overrides, in_a_fork
from torch.distributed.elastic.multiprocessing import SignalException

import alexnet_dist
from alexnet_dist import errors, load_checkpoint, train
from alexnet_dist.cli import main
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.errors import ConfigError, MachineError, RanksFailed, filled_by, in_words
from alexnet_dist.files import read_run
from alexnet_dist.formats.convert import export_weights
from alexnet_dist.network.precision import allow_tf32
from alexnet_dist.parallel import environment, rendezvous, spawn, topology
from alexnet_dist.parallel.device import take_device
from alexnet_dist.parallel.stop_signals import handlers_restored
from alexnet_dist.training.run_folder import RunFolder

Tiny = Callable[..., Config]
Patch = pytest.MonkeyPatch
ALONE = "layout.kind=one"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: Patch) -> Iterator[None]:
    """What a run sets in its process is set back."""
    log = logging.getLogger()
    handlers, level = log.handlers[:], log.level
    with handlers_restored():
        yield
    log.handlers[:], log.level = handlers, level


def raises(error: Exception) -> Callable[..., None]:
    """A function that does nothing else."""

    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


def out_of_gpu_memory(tiny: Tiny, patch: Patch) -> None:
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10 GiB"
    patch.setattr(TorchEngine, "train_step", raises(torch.OutOfMemoryError(full)))
    train(tiny(ALONE))


def out_of_memory(tiny: Tiny, patch: Patch) -> None:
    train(tiny(ALONE, "model.fc=[8000000,8000000]"))  # 256 TB


def no_gpu(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(torch.cuda, "device_count", lambda: 0)
    train(tiny(ALONE, "layout.device=cuda"))


def one_gpu_for_two_columns(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    take_device(tiny("layout.device=cuda"), environment.Place(0, 2, 0, 2))


def tf32_on_a_cpu(tiny: Tiny, patch: Patch) -> None:
    train(tiny(ALONE, "train.precision=tf32"))


def bf16_on_an_old_gpu(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    patch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    old = ("layout.device=cuda", "layout.kind=one", "train.precision=fp32")
    assert take_device(tiny(*old), environment.Place()).type == "cuda"
    take_device(tiny(*old, "train.precision=bf16"), environment.Place())


def dali_without_driver(tiny: Tiny, patch: Patch) -> None:
    if torch.cuda.is_available():
        import nvidia.dali

        patch.setattr(nvidia.dali.Pipeline, "build", raises(RuntimeError("Please install CUDA")))
    _decode(tiny, torch.device("cuda", 0))


def dali_not_installed(tiny: Tiny, patch: Patch) -> None:
    patch.setitem(sys.modules, "nvidia.dali", None)
    _decode(tiny, torch.device("cpu"))


def _decode(tiny: Tiny, device: torch.device) -> None:
    from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline
    from alexnet_dist.data.sampler import evaluation_plan

    config = tiny("data.pipeline=dali")
    split = open_for(config).splits["test"]
    preprocess = Preprocess(config, open_for(config).statistics, torch.device("cpu"), torch.float32)
    plan = evaluation_plan(config, [range(2)])
    next(DaliPipeline(config, split, device, preprocess, 1).batches(plan))


def onnx_not_installed(tiny: Tiny, patch: Patch) -> None:
    config = tiny(ALONE, "train.epochs=0.1")
    train(config)
    patch.setitem(sys.modules, "onnx", None)
    export_weights("onnx", config.folder, config.folder / "out.onnx")


def no_compiler(tiny: Tiny, patch: Patch) -> None:
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    patch.setattr(Preprocess, "__call__", raises(error))
    train(tiny(ALONE))


def driver_too_old(tiny: Tiny, patch: Patch) -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")


def address_space_full(tiny: Tiny, patch: Patch) -> None:
    raise ImportError("libtorch_cuda.so: failed to map segment from shared object")


def port_taken(tiny: Tiny, patch: Patch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        _rank(patch, other.getsockname()[1])
        topology.connect(tiny("layout.kind=columns"))


def rank_1_never_comes(tiny: Tiny, patch: Patch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    _rank(patch, port)
    topology.connect(tiny("layout.kind=columns", "layout.timeout_s=1"))


def node_without_its_name(tiny: Tiny, patch: Patch) -> None:
    rendezvous.store_at("192.0.2.1", timedelta(seconds=1))  # RFC 5737: nobody's


def no_address(tiny: Tiny, patch: Patch) -> None:
    _rank(patch, 1)
    patch.delenv("MASTER_ADDR")
    topology.connect(tiny("layout.kind=columns"))


def _rank(patch: Patch, port: int) -> None:
    """As launchers do."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        patch.setenv(name, str(value))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    patch.setenv("MASTER_PORT", str(port))


def peer_lost(tiny: Tiny, patch: Patch) -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:2093")


def read_only(tiny: Tiny, patch: Patch) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/demo/figures")


def no_space(tiny: Tiny, patch: Patch) -> None:
    config = tiny(ALONE)
    full = raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    patch.setattr(RunFolder, "save_config", full)
    train(config)


def not_ours(tiny: Tiny, patch: Patch) -> None:
    train(tiny(ALONE, "output_dir=/proc"))


def no_locks(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(fcntl, "flock", raises(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    train(tiny(ALONE))


def no_locks_on_lustre(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(fcntl, "flock", raises(OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    train(tiny(ALONE))


def too_many_files(tiny: Tiny, patch: Patch) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shard-00000.tar")


def data_elsewhere(tiny: Tiny, patch: Patch) -> None:
    patch.chdir("/")
    train(tiny(ALONE, "data.path=data/imagenet"))


def run_elsewhere(tiny: Tiny, patch: Patch) -> None:
    patch.chdir("/")
    load_checkpoint("runs/demo")


@pytest.mark.parametrize(
    ("provoke", "said"),
    [
        (out_of_gpu_memory, r"GPU's memory is full: raise train\.micro_batches, lower"),
        (out_of_memory, r"this machine's memory is full: raise train\.micro_batches.*tried to all"),
        (no_gpu, r"device=cuda: .* need 1 GPU, but it has 0; set layout\.device=auto; .*doctor"),
        (one_gpu_for_two_columns, r"need 2 GPUs, but it has 1; set .*=auto, layout\.kind=one or "),
        (tf32_on_a_cpu, r"train\.precision=tf32: only GPUs have it, .*precision=fp32 or bf16$"),
        (bf16_on_an_old_gpu, r"bf16: needs .*, but Tesla V100 has 7\.0: .*precision=fp16$"),
        (dali_without_driver, r"data\.pipeline=dali: no pipeline .* on cuda:0 .*pipeline=torch"),
        (dali_not_installed, r"nvidia\.dali is not installed .*pip install nvidia-dali-cuda120"),
        (onnx_not_installed, r"--format onnx needs onnx: pip install 'alexnet-dist\[export\]'"),
        (driver_too_old, r"torch and this GPU's driver do not match: update the driver, or "),
        (address_space_full, r"library cannot be loaded: raise .*ulimit -v unlimited.*noexec"),
        (no_compiler, r"kernels cannot be built: install gcc and Python's headers .*Debian"),
        (port_taken, r"port where the ranks meet is taken: set MASTER_PORT to another, or "),
        (rank_1_never_comes, r"did not meet within layout\.timeout_s: start all.*1/2 clients"),
        (node_without_its_name, r"this node's name does not .* set GLOO_SOCKET_IFNAME to .*192\.0"),
        (no_address, r"RANK and WORLD_SIZE say .* set MASTER_ADDR and MASTER_PORT.*unset"),
        (peer_lost, r"connection to another rank is lost.* to resume from the last checkpoint"),
        (no_space, r"No space left on device.*: make room, or name another disk by output_dir="),
        (read_only, r"Read-only file system: 'runs/demo/fig.*: name .*, or copy the run to one$"),
        (not_ours, r"/proc/run: cannot be written .*: set output_dir= or name="),
        (no_locks, r"file system has no locks .*set output_dir= to another file system, or"),
        (no_locks_on_lustre, r"file system has no locks .*Lustre: with flock"),
        (too_many_files, r"'shard-00000\.tar': raise the limit on open files: ulimit -n"),
        (data_elsewhere, r"data/imagenet/dataset\.json is missing \(looked in /.*: make .* data"),
        (run_elsewhere, r"runs/demo is neither .* checkpoint \(looked in /.*: name runs/NAME"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_failure_is_one_line_that_says_what_to_do(
    provoke: Callable[[Tiny, Patch], None], said: str, tiny: Tiny, monkeypatch: Patch
) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        provoke(tiny, monkeypatch)
    words = in_words(caught.value)
    assert words is not None, repr(caught.value)
    assert "\n" not in str(words)
    with pytest.raises(type(words), match=said):
        raise words


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no")])
def test_full_memory_names_the_input_that_was_read(error: Exception) -> None:
    said = r"'train/ant/0\.jpg': this machine ran out of memory while reading it"
    with pytest.raises(MachineError, match=said), filled_by("train/ant/0.jpg"):
        raise error
    with pytest.raises(RuntimeError, match="another"), filled_by("train/ant/0.jpg"):
        raise RuntimeError("another")


def test_the_command_says_it_without_a_traceback(
    tiny: Tiny, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(TorchEngine, "train_step", raises(full))
    config = tiny(ALONE)
    assert main.main(["train", *as_overrides(config)]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("alexnet-dist: a GPU's memory is full: ")
    assert read_run(config.folder)["reason"] in last
    assert not read_run(config.folder)["known"], "another start may find more memory"


def test_a_run_that_failed_can_be_started_again_in_this_process(
    tiny: Tiny, monkeypatch: Patch
) -> None:
    """A notebook keeps the traceback, and with it all that the run held, but for its folder."""
    config = tiny(ALONE, "train.epochs=0.1")
    monkeypatch.setattr(TorchEngine, "train_step", raises(torch.OutOfMemoryError("full")))
    with pytest.raises(MachineError) as kept:
        train(config)
    monkeypatch.undo()
    assert train(config).exit == 0
    assert kept.traceback


def test_what_nobody_foresaw_keeps_its_traceback(
    tiny: Tiny, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TorchEngine, "train_step", raises(ZeroDivisionError("ours")))
    assert main.main(["train", *as_overrides(tiny(ALONE))]) == 1
    assert "Traceback" in capfd.readouterr().err
    assert in_words(ModuleNotFoundError("ours", name="alexnet_dist.gone")) is None


def test_one_gpu_for_two_ranks_is_said_where_it_is_not_asked_for(
    tiny: Tiny, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = take_device(tiny("layout.device=auto"), environment.Place(0, 2, 0, 2))
    assert device.type == "cpu"
    assert "2 ranks but only 1 GPU: computing on the CPU; to use the GPU," in caplog.text


def test_options_and_keys_come_in_any_order() -> None:
    parse = main.build_parser().parse_args
    found = parse(["plan", "demo", "--gpus", "h100:8", "train.batch=1024", "--json", "seed=1"])
    assert (found.config, found.gpus) == (["demo", "train.batch=1024", "seed=1"], "h100:8")
    found = parse(["prepare", "folder", "--keep", "a", "--workers", "2", "~/b"])
    assert (found.path, found.out, found.keep) == (Path("a"), Path.home() / "b", True)
    assert parse(["evaluate", "--views", "10", "a", "--json", "b"]).path == ["a", "b"]


def test_it_says_its_version_and_what_is_shipped(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert capfd.readouterr().out == f"alexnet-dist {alexnet_dist.__version__}\n"
    assert main.main(["configs"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:2]] == ["base", "demo"]
    assert all(30 < len(line) <= 125 for line in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train", "demo", "--epochs=3"],
            "--epochs=3; config keys are written key=value, as in train.epochs=…",
        ),
        (["evaluate", "a", "--data=b"], "written key=value, as in data.path=…"),
        (["prepare", "/tmp", "b"], "'/tmp' is a path: name its kind before it"),
        (["prepare", "folder", "a", "b", "--part", "3"], "'3': must be I/N, as in 2/8"),
        (["bench", "step", "--repeats", "0"], "'0': must be a whole number, 1 or more"),
        (["plan", "demo", "--ranks", "-1"], "'-1': must be a whole number, 1 or more"),
        (["compare", "demo", "--steps", "2"], "'2': must be a whole number, 3 or more"),
        (["bench", "end-to-end", "--steps", "-5"], "'-5': must be a whole number, 0 or more"),
        (["prepare", "folder", "a", "b", "--workers", "-1"], "'-1': must be a whole number, 0 or"),
        (["plan", "demo", "--ranks", "4", "--curve", "a.png"], "not allowed with argument"),
        (["plan", "demo", "--curve", "a.pdf"], "'a.pdf': must be a picture to write, NAME.png"),
        (["report", "--out", "/nowhere/a.html"], "no folder /nowhere that you may write in"),
        (["evaluate", "runs/demo", "--predictions", "/tmp"], "'/tmp': it is a folder: name a file"),
        (["trian", "demo"], "'doctor'); did you mean train?"),
        (["prepare", "foldr", "a", "b"], "'fashion_mnist'); did you mean folder?"),
        (["export", "a", "b", "--format", "onx"], "did you mean onnx?"),
    ],
)
def test_options_that_are_not_there_are_explained(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(arguments)
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "demo", "--out", "a.png"], "--out: has no effect on a comparison of layouts"),
        (["bench", "step", "demo", "--kernels", "--best"], "--best: has no effect beside --ker"),
        (["bench", "step", "demo", "--kernels", "--batch", "8"], "--batch: has no effect beside"),
    ],
)
def test_an_option_without_effect_is_refused(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 2
    assert said in capfd.readouterr().err


def test_where_compare_draws_matters_only_if_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main.main(["compare", "demo", "data.path=nowhere"]) == 1
    assert "nowhere/dataset.json is missing" in capfd.readouterr().err


def test_mistakes_are_said_before_torch_is_loaded(packed: Path, tmp_path: Path) -> None:
    """In a fraction of the seconds that its import takes."""
    run = tmp_path / "runs" / "mine"
    data = f"data.path={packed}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(
        json.dumps({"data": {"path": str(packed)}, "model": {"classes": 9}})
    )
    cases = [
        (["train", "demo", data, "data.eval_split=vla"], 2, "has only the splits train, test"),
        (["train", "demo", data, "model.classes=9"], 2, "train a new network on it with model.cl"),
        (["train", "demo", "data.path=/nowhere"], 1, "/nowhere/dataset.json is missing"),
        (["train", "demo", data, "train.init_from=runs/no"], 1, "train.init_from='runs/no': runs"),
        (["train", "demo", "lr=1"], 2, "did you mean schedule.rate?"),
        (
            ["evaluate", "runs/no"],
            1,
            "runs/no is neither a run folder nor a checkpoint (looked in ",
        ),
        (["evaluate", str(run), "data.eval_split=vla"], 2, "has only the splits train, test"),
        (["evaluate", str(run), "data.eval_split=test"], 2, "model.classes=9"),
        (["evaluate", str(run), "lr=1"], 2, "did you mean schedule.rate?"),
        (["evaluate", str(run), "train.epochs=3"], 2, "train.epochs changes nothing in an evaluat"),
        (["evaluate", str(run), "evaluate={every_epochs: 2}"], 2, "every_epochs changes nothing"),
        (["figures", str(run), "seed=3", "--fig4"], 2, "figures seed=3: seed changes nothing"),
        (["figures", str(run), "data.canvas=40"], 2, "data.canvas=40: keys change --fig4 only"),
        (["figures", "runs/no"], 1, "neither a run folder"),
        (["evaluate", __file__], 1, f"make one first: `alexnet-dist import {__file__} runs/NAME"),
        (["train", "demo", data, f"train.init_from={__file__}"], 1, "`alexnet-dist import "),
        (["export", "runs/no", "a.pth", "--format", "torchvision"], 1, "neither a run folder"),
        (["inspect", "nowhere"], 1, "nowhere/dataset.json is missing"),
        (["inspect", 300 * "n"], 1, ": name a shorter path"),
        (["train", str(run)], 2, f"is a run folder; its config is {run}/config.json"),
        (["plan", "runs/no"], 2, "'runs/no' is neither a config file nor key=value"),
        (["plan", "demo", "--gpus", "h100:8", "lr=1"], 2, "did you mean schedule.rate?"),
        (["compare", "demo", data, "data.eval_split=vla"], 2, "has only the splits train, test"),
        (["bench", "step", "lr=1"], 2, "did you mean schedule.rate?"),
        (["doctor", "lr=1"], 2, "did you mean schedule.rate?"),
    ]
    program = (
        "import sys\nfrom alexnet_dist.cli.main import main\n"
        f"for words in {[words for words, _, _ in cases]!r}: print(main(words))\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True,
        cwd=tmp_path, timeout=60,
    )  # fmt: skip
    said = result.stderr.splitlines()
    for (words, _, part), line in zip(cases, said, strict=True):
        assert part in line, words
    assert result.stdout.split() == [*(str(code) for _, code, _ in cases), "False"]


def test_a_mistake_that_only_ranks_see_is_one_line(tiny: Tiny) -> None:
    config = tiny(ALONE, "layout.device=cuda", "layout.ranks=1")
    if torch.cuda.is_available():
        pytest.skip("here are GPUs")
    ended = in_a_fork(forks.run, ["compare", *as_overrides(config), "--layouts", "one"])
    assert ended.returncode == 2
    said = "the command line: layout.device=cuda: this host's ranks need 1 GPU, but it has 0"
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def _fails_on_rank_1(error: Exception) -> None:
    if isinstance(error, ConfigError) or os.environ["RANK"] == "1":
        raise error
    time.sleep(60)  # as a rank that waits for the other; it is ended with it


def _fail() -> None:
    forks.fork_ranks()
    with pytest.raises(ConfigError, match="every rank's"):
        spawn.call(_fails_on_rank_1, 2, ConfigError("every rank's"))
    with pytest.raises(RanksFailed, match="a rank failed, and reported why"):
        spawn.call(_fails_on_rank_1, 2, OSError(errno.ENOSPC, "No space left"))


def test_what_fails_on_a_rank_started_here_is_said() -> None:
    ended = in_a_fork(_fail)
    assert ended.returncode == 0, ended.stderr
    assert "every rank's" not in ended.stderr
    assert "[r1] [Errno 28] No space left: make room" in ended.stderr


def _interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def _interrupt() -> None:
    forks.fork_ranks()
    with pytest.raises(RanksFailed, match="killed by SIGINT"):
        spawn.call(_interrupted, 2)


def test_an_interrupted_rank_leaves_the_message_to_its_launcher() -> None:
    ended = in_a_fork(_interrupt)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def _told_to_stop() -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_signal_while_ranks_work_reaches_this_programs_own_handler() -> None:
    heard = []
    with handlers_restored():
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SignalException):
            spawn.call(_told_to_stop, 2)
        assert heard == [1]
        assert signal.getsignal(signal.SIGTERM) is ours
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt):
            spawn.call(_told_to_stop, 2)


def test_a_ctrl_c_while_modules_are_imported_is_silent() -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'alexnet_dist.errors': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "import alexnet_dist.cli.main\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("sys.version_info = (3, 10, 4, 'final', 0)", "it needs 3.11 or newer: make the environ"),
        ("sys.modules['yaml'] = None", "yaml is not installed in this Python: pip install pyyaml"),
        ("sys.platform = 'darwin'", "this is darwin, but it runs only on Linux"),
    ],
)
def test_a_python_that_cannot_run_it_is_told_so(before: str, said: str, tmp_path: Path) -> None:
    code = f"import runpy, sys\n{before}\nrunpy.run_module('alexnet_dist', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert said in result.stderr
    assert result.stderr.startswith("alexnet-dist: ")
    assert result.stderr.count("\n") == 1


def test_only_tf32_lets_a_gpu_round_factors(tiny: Tiny) -> None:
    for precision, allowed in (("bf16", False), ("tf32", True), ("fp32", False), ("fp64", False)):
        allow_tf32(precision)
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    torch.backends.cudnn.allow_tf32 = True
    topology.connect(tiny(ALONE, "train.precision=fp32"))
    assert not torch.backends.cudnn.allow_tf32


def test_memory_is_blamed_only_where_the_kernel_counts_a_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for counted, said in (
        (
            [0, 2],
            "killed by SIGKILL from outside the run: the kernel killed none for lack of memory",
        ),
        (
            [0, 3],
            "killed by SIGKILL, and the kernel has killed a process here for lack of memory",
        ),
        ([], "killed by SIGKILL"),
    ):
        monkeypatch.setattr(errors, "_KILLS_BEFORE", [0, 2] if counted else [])
        monkeypatch.setattr(errors, "_memory_kills", lambda counted=counted: counted)
        assert errors.killed_by(9) == said
    assert errors.killed_by(11) == "killed by SIGSEGV"
