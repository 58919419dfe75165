"""The documentation is true: links, files, keys and commands exist, and the examples run."""

import argparse
import contextlib
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, in_a_fork
from made import image_folder

from alexnet_dist import load_checkpoint
from alexnet_dist.cli.main import build_parser, main
from alexnet_dist.config.load import RETIRED, load_config
from alexnet_dist.config.schema import keys
from alexnet_dist.parallel.layouts import check

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)


def blocks(path: Path, language: str) -> list[str]:
    """A document's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every command line in a document, without comments and redirection."""
    for block in blocks(path, "bash"):
        text = ""
        for line in block.replace("\\\n", " ").splitlines():
            text += line + "\n"
            with contextlib.suppress(ValueError):  # a quotation that goes on
                words, text = shlex.split(text, comments=True), ""
                yield [w.removeprefix(".venv/bin/") for w in words if not w.startswith(">")]
        assert not text, f"{path}: {text}"


def of_program(words: list[str]) -> list[str] | None:
    """The arguments of alexnet-dist in a command line, however it is started."""
    for at, word in enumerate(words):
        if word == "alexnet-dist" or (word == "alexnet_dist" and words[at - 1] == "-m"):
            return words[at + 1 :]
    return None


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


def check_sources(sources: list[str]) -> None:
    """Config sources load; a YAML file that the reader would write himself is passed over."""
    shipped = [s for s in sources if "=" in s or not s.endswith(".yaml") or (ROOT / s).exists()]
    load_config(shipped)


def check_placement(words: list[str], sources: list[str]) -> None:
    """The layout takes as many ranks as the script, or the template of a cluster, starts."""
    if "--local" in words:
        return
    if "sbatch" in words:
        if "slurm/train.sbatch" not in words:
            return
        script = (ROOT / "slurm/train.sbatch").read_text()
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\d+)", script, re.M))
        asked |= dict(re.findall(r"--([a-z-]+)=(\d+)", " ".join(words)))
        ranks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    else:
        site = yaml.safe_load((ROOT / "configs/cluster/template.yaml").read_text())
        asked = dict(re.findall(r"cluster\.([a-z_]+)=(\d+)", " ".join(words)))
        ranks = int(asked.get("nodes", site["nodes"])) * site["tasks_per_node"]
    check(load_config(sources), ranks)


@each_document
def test_what_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"link to {link}"
        assert not anchor or anchor in anchors(target), f"link to {link}"
    for file in re.findall(
        r"\b(?:configs|docs|tests|alexnet_dist|launch|slurm)/[\w./-]+\.\w+\b", text
    ):
        new = re.search(rf"^\+\+\+ b/{re.escape(file)}$", text, re.M)  # by a patch that is shown
        assert new or (ROOT / file).exists(), f"file {file}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"make {target}"
    known = {dotted for dotted, _, _ in keys()} | {*RETIRED}
    sections = {dotted.partition(".")[0] for dotted in known if "." in dotted}
    for key in re.findall(r"`([a-z]+(?:\.(?!py`)[a-z_0-9]+)+)(?:=[^`]*)?`", text):
        section = key.partition(".")[0]
        found = key in known or any(k.startswith(key + ".") for k in known)
        assert section not in sections or found or key == "model.gain", f"key {key}"
    for name in re.findall(r"`((?:paper|results)/[\w-]+)`", text):
        assert (ROOT / f"configs/{name}.yaml").exists(), f"config {name}"


@each_document
def test_every_command_parses(path: Path) -> None:
    """Options, configs and keys exist; nothing is run."""
    for words in commands(path):
        arguments = of_program(words)
        if arguments is not None:
            try:
                options = build_parser().parse_args(arguments)
            except SystemExit:
                pytest.fail(f"not a command: {shlex.join(words)}")
            sources = [*getattr(options, "config", []), *getattr(options, "overrides", [])]
            if arguments[0] != "compare" or not all(s.startswith("runs/") for s in sources):
                check_sources(sources)
        elif "launch.submit" in words or "launch.ensemble" in words or "sbatch" in words[:1]:
            for program in {"launch.submit", "launch.ensemble"} & {*words}:
                import_module(program).parser().parse_args(words[words.index(program) + 1 :])
            own = [
                w for w in words if w.startswith(("paper/", "demo", "layout", "name=", "train."))
            ]
            assert own or "--wrap" in words, words
            check_sources(own)
            if own:
                check_placement(words, own)
        elif words[:1] == ["make"]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert words[1] in targets, words
    usage = build_parser().format_help()
    for command in re.findall(r"alexnet-dist ([a-z]+)\b", path.read_text()):
        assert re.search(rf"^ +{command} ", usage, re.M), f"alexnet-dist {command}"


def every_help(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The help of a parser, and of each of its commands."""
    yield parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from every_help(sub)


def test_examples_in_the_help_parse() -> None:
    checked = 0
    for text in every_help(build_parser()):
        for line in re.findall(r"^  (alexnet-dist .*)", text.partition("examples:")[2], re.M):
            words = shlex.split(line, comments=True)[1:]
            if words != ["COMMAND", "--help"]:
                options = build_parser().parse_args(words)
                sources = [*getattr(options, "config", []), *getattr(options, "overrides", [])]
                check_sources([s for s in sources if words[0] != "compare" or "runs/" not in s])
                checked += 1
    assert checked > 20


def test_moved_names_are_where_the_changelog_says() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    homes = re.findall(r"^\| `alexnet_dist\..* \| `([\w.]+)` \|$", text, re.M)
    assert len(homes) > 50
    for home in homes:
        assert pkgutil.resolve_name(home) is not None, home


def test_every_key_is_in_the_reference_as_it_is() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "document_config.py"))
    told = made["PATH"].read_text()
    assert told == made["reference"](), "docs/configuration.md is out of date: make docs"


def run_all(commands: list[list[str]]) -> None:
    """Run `alexnet-dist` with each of these arguments."""
    for arguments in commands:
        assert main(arguments) == 0, arguments


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the documents suppose it: `my-images` of three classes, and a table of them."""
    images = image_folder(tmp_path / "my-images", 12, 4)
    rows = [f"{file.relative_to(images)},{file.parent.name}" for file in images.rglob("*.JPEG")]
    (images / "labels.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_your_own_images_to_the_end(place: Path) -> None:
    """Every command of that page in its order, training a tiny network."""
    typed = []
    for words in commands(ROOT / "docs/own-data.md"):
        arguments = of_program(words)
        assert arguments is not None, words
        if arguments[0] == "train":
            own = [a for a in TINY if not a.startswith(("model.classes", "data.eval_split"))]
            arguments += [*own, "layout.kind=one", "train.epochs=1"]
        typed.append(arguments)
    assert [words[0] for words in typed] == [
        "prepare", "inspect", "train", "evaluate", "figures", "report", "export"
    ]  # fmt: skip
    ended = in_a_fork(run_all, typed)
    assert ended.returncode == 0, ended.stderr
    for made in ("data/mine/contact-sheet.png", "runs/own/figures/kernels.png"):
        assert (place / made).stat().st_size > 1000
    (example,) = blocks(ROOT / "docs/checkpoints.md", "python")
    (saved,) = Path("runs/own/checkpoints").iterdir()
    found: dict[str, Any] = {}
    exec(example.replace("runs/demo/checkpoints/step-00001406", str(saved)), found)
    assert found["kernels"].shape == (8, 3, 11, 11)
    windows = 60 * torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found["logits"](windows), load_checkpoint(saved).model(windows))
    (mine,) = blocks(ROOT / "docs/own-data.md", "yaml")
    (place / "mine.yaml").write_text(mine)
    followed = load_config(["demo", place / "mine.yaml"])
    assert (followed.model.classes, followed.data.eval_split) == (3, "val")


def test_the_source_that_is_shown_packs(place: Path) -> None:
    (example,) = blocks(ROOT / "docs/extending.md", "python")
    ended = in_a_fork(exec, example, {"__name__": "__main__"})
    assert ended.stdout == "data/table: packed 43 train, 5 val images of 3 classes\n", ended.stderr


def test_the_layer_and_the_layout_that_are_shown_hold(packed: Path, tmp_path: Path) -> None:
    """Applied to a copy of the package, and held against the grouped network on one process."""
    for folder in ("alexnet_dist", "configs"):
        subprocess.run(["cp", "-rp", ROOT / folder, tmp_path], check=True)
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    patches = blocks(ROOT / "docs/extending.md", "diff")
    assert len(patches) == 2
    for patch in patches:
        apply = ["git", "apply", "-C1", "-"]
        subprocess.run(apply, input=patch, cwd=tmp_path, env=outside, text=True, check=True)
    planned = ["plan", *TINY, "layout.kind=hooks", "--ranks", "2", "--json"]
    compared = ["compare", *TINY, f"data.path={packed}", "model.gain=[conv1,conv3]"]
    compared += ["--layouts", "columns:2,hooks:2", "--steps", "3"]
    # In one Python that imports the copy; ranks are forks of it.
    program = "import forks, warm; from alexnet_dist.cli.main import main\n"
    program += f"forks.fork_ranks(); main({planned}); print(flush=True); forks.run({compared})"
    own = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}/tests:{ROOT}/docs"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=own, check=False,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    plan, _, table = result.stdout.partition("\n\n")
    assert "bytes" in json.loads(plan)["layouts"]["hooks"]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == ["one", "columns", "hooks"]
    assert all(float(row[3]) > 0 and row[5] == "yes" for row in rows[1:])


def test_the_design_places_every_module() -> None:
    packages = (ROOT / "docs/design.md").read_text().partition("## Packages")[2].partition("## ")[0]
    for path in (ROOT / "alexnet_dist").rglob("[a-z]*.py"):
        assert re.search(rf"\b{path.stem}\b", packages), f"docs/design.md, Packages: {path.stem}"


def test_every_module_has_a_docstring() -> None:
    for path in sorted((ROOT / "alexnet_dist").rglob("*.py")):
        assert path.read_text().startswith('"""'), path


@pytest.mark.parametrize(
    ("gpus", "bf16", "more"),
    [
        (0, False, []), (1, True, ["layout.kind=one"]), (2, True, []),
        (1, False, ["layout.kind=one", "train.precision=fp16"]),
        (2, False, ["train.precision=fp16"]),
    ],
)  # fmt: skip
def test_the_demo_uses_the_gpus(tmp_path: Path, gpus: int, bf16: bool, more: list[str]) -> None:
    """By the command that make would run, with a torch that has no more than these answers."""
    has = f"device_count, is_bf16_supported = lambda: {gpus}, lambda emulated: {bf16}"
    (tmp_path / "torch.py").write_text(f"class cuda:\n    {has}\n")
    command = ["make", "--no-print-directory", "-n", "demo", f"BIN={Path(sys.executable).parent}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "MAKEFLAGS": ""}
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert shown.stdout.splitlines()[-1].split()[1:] == ["train", "configs/demo.yaml", *more]
