"""The Python API: what `from alexnet_dist import …` offers, in any order of imports."""

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch
from conftest import as_overrides, in_a_fork
from torchvision.io import decode_image

from alexnet_dist import evaluate, load_checkpoint, load_config, train
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import CheckpointError, DatasetError, RanksFailed
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.parallel import spawn

DOCUMENT = Path(__file__).parent.parent / "docs" / "api.md"
IMPORTS = (
    "from alexnet_dist import train, evaluate",
    "import alexnet_dist.training.loop, alexnet_dist.evaluation.evaluate",
    "from alexnet_dist.training.loop import Outcome",
)
QUICK = ("layout.kind=one", "train.precision=fp32", "train.epochs=1")


def python(code: str) -> str:
    """What a new interpreter prints that runs this; warnings are errors."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_every_order_of_imports_gives_the_functions() -> None:
    check = (
        "import sys, alexnet_dist as a\n"
        "assert a.train is sys.modules['alexnet_dist.training.loop'].train\n"
        "assert a.evaluate is sys.modules['alexnet_dist.evaluation.evaluate'].evaluate\n"
    )
    # One interpreter: what was imported is forgotten before each order, torch is not.
    forget = "for name in [n for n in sys.modules if n.startswith('alexnet_dist')]:\n"
    forget += "    del sys.modules[name]\n"
    orders = ["\n".join(order) + "\n" for order in itertools.permutations(IMPORTS)]
    code = "import sys\n" + "".join(forget + order + check for order in orders)
    ended = in_a_fork(exec, code, {})
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_is_light() -> None:
    code = "import sys, alexnet_dist; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    assert python(code) == "[]\n"
    import alexnet_dist

    assert {*alexnet_dist.__all__} <= {*dir(alexnet_dist)}
    with pytest.raises(AttributeError, match="'alexnet_dist' has no attribute 'tran'"):
        _ = alexnet_dist.tran


def test_a_start_imports_neither_torchs_compiler_nor_torchvision(
    tiny: Callable[..., Config],
) -> None:
    """Each takes a second: neither one process's training needs them, nor an operator of ours."""
    config = as_overrides(tiny(*QUICK))
    code = (
        "import sys\nfrom alexnet_dist import load_config, train\n"
        f"assert train(load_config({config!r})).exit == 0\n"
        "import torch\nfrom alexnet_dist.network.kernels import custom_op\n"
        "def twice(x: torch.Tensor) -> torch.Tensor: return 2 * x\n"
        "assert custom_op('alexnet_dist::twice', ())(twice)(torch.ones(1)) == 2\n"
        "slow = 'torch._dynamo', 'torchvision', 'matplotlib', 'nvidia.dali', 'deepspeed'\n"
        "print([name for name in slow if name in sys.modules])"
    )
    assert python(code) == "[]\n"


def test_a_trained_network_answers_as_its_evaluation_did(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """Every image alone by `probabilities`, all by `evaluate`, all by the command's function."""
    config = tiny(*QUICK)
    heard = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    outcome = train(config)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == heard
    assert outcome.exit == 0

    trained = load_checkpoint(config.folder)
    assert not trained.model.training
    assert trained.checkpoint.step == outcome.step
    assert trained.classes[0] == "T-shirt/top"
    split = trained.dataset.splits["test"]
    images = [decode_image(torch.frombuffer(split.read(i), dtype=torch.uint8)) for i in range(23)]
    theirs = evaluate_checkpoints([config.folder]).probabilities
    alone = torch.stack([trained.probabilities(image) for image in images])
    torch.testing.assert_close(alone, theirs, atol=1e-6, rtol=0)

    score = evaluate(trained, views=1)
    assert score == outcome.score
    assert score.top1_interval[0] <= score.top1 <= score.top1_interval[1]
    ten = evaluate_checkpoints([config.folder], ["evaluate.views=10"]).score
    assert evaluate(config.folder).tags() == pytest.approx(ten.tags(), rel=1e-12)
    with torch.no_grad():
        trained.model.get_parameter("fc8.bias")[3] += 1e6
    assert evaluate(trained, views=1).correct1 == int((split.index["label"] == 3).sum())


def test_without_its_data_set_a_network_has_no_words(
    tiny: Callable[..., Config], packed: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(packed)
    config = tiny(*QUICK, f"data.path={moved}")
    train(config)
    moved.unlink()
    trained = load_checkpoint(config.folder)
    with pytest.raises(DatasetError, match=r"data\.path=.*load_checkpoint\(path, data=FOLDER\)"):
        trained.probabilities(torch.zeros(1, 28, 28, dtype=torch.uint8))
    assert evaluate(trained, packed, views=1) == evaluate(config.folder, packed, views=1)
    assert load_checkpoint(config.folder, packed).classes[-1] == "Ankle boot"
    with pytest.raises(CheckpointError, match="neither a run folder nor a checkpoint"):
        load_checkpoint(tmp_path)


def train_columns(config: Config) -> None:
    forks.fork_commands(2)
    outcome = train(config)
    assert (outcome.exit, outcome.step, outcome.is_rank_0) == (0, 8, True)
    assert outcome.score is not None
    assert outcome.score.samples == 23


def test_a_layout_of_several_ranks_is_started_here(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("layout.kind=columns", "train.epochs=1")
    ended = in_a_fork(train_columns, config)
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setattr(spawn, "start", lambda *_: 1)
    with pytest.raises(RanksFailed, match="a rank ended with exit code 1, and reported why"):
        train(config)


def test_the_documents_examples_run(packed: Path, tmp_path: Path) -> None:
    """In one interpreter, as they stand, on fewer images."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(blocks) == 7
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(packed)
    result = in_a_fork(exec, "\n".join(blocks), {}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"top-1 \d+\.\d %, between", result.stdout)
    assert "60965224\n" in result.stdout
    assert re.findall(r"step (\d): loss \d", result.stdout) == ["0", "1", "2"]
    assert re.search(r"\[\(\d+, \d+\.\d+\)", result.stdout)  # steps and shares right


def test_a_lone_source_needs_no_list() -> None:
    assert load_config("seed=3") == load_config(["seed=3"])
