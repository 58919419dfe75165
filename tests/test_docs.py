"""What the documents name exists: links, files, commands, targets, keys."""

import re
from pathlib import Path

import pytest
from conftest import alexnet_dist

from alexnet_dist.config import keys

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_what_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), f"link to {link}"
    for file in re.findall(r"\b(?:configs|docs|tests|alexnet_dist)/[\w./-]+\.\w+\b", text):
        assert (ROOT / file).exists(), f"file {file}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"make {target}"
    known = {dotted for dotted, _, _ in keys()}
    sections = {dotted.partition(".")[0] for dotted in known if "." in dotted}
    for key in re.findall(r"\b([a-z]+(?:\.[a-z_0-9]+)+)=", text):
        assert key in known or key.partition(".")[0] not in sections, f"key {key}"


def test_documented_commands_exist() -> None:
    usage = alexnet_dist("--help").stdout
    for path in DOCUMENTS:
        for command in re.findall(r"alexnet-dist ([a-z]+)\b", path.read_text()):
            assert re.search(rf"^ +{command} ", usage, re.M), f"{path.name}: {command}"


def test_every_module_has_a_docstring() -> None:
    for path in sorted((ROOT / "alexnet_dist").rglob("*.py")):
        assert path.read_text().startswith('"""'), path
