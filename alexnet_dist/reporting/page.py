"""The HTML of the report: a page in one file, its tables and its pictures."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from alexnet_dist.data.header import PNG
from alexnet_dist.errors import printable
from alexnet_dist.files import read_bytes, written_aside

# By which an existing file is known to be a page of ours.
BEGINNING = "<!doctype html><meta charset=utf-8><title>Report</title>"
_STYLE = (
    "<style>body{font:15px sans-serif;max-width:90em;margin:2em auto}td,th{padding:.2em .8em;"
    "text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}</style>"
)


def write(path: Path, parts: Sequence[str]) -> None:
    """Write a page; replaces the file once the page is complete."""
    text = "\n".join((f"{BEGINNING}{_STYLE}", *parts))
    with written_aside(path) as aside:
        aside.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def image(path: Path) -> str:
    """Return a PNG file as an element of the page; any other file as a line that says so, since a
    link in a stranger's run folder may lead to what must not be published."""
    if (content := read_bytes(path)).startswith(PNG):
        return inline(content, path.stem)
    return f"<p>{escape(path.name)} is not a PNG</p>"


def inline(png: bytes, name: str) -> str:
    """Return a PNG as an element of the page, with its name as the alternative text."""
    encoded = base64.b64encode(png).decode()
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{encoded}"></p>'


def table(names: Sequence[str], rows: Iterable[Sequence[str]], raw: int = -1) -> str:
    """Return an HTML table; cells of the column `raw` are HTML already."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = (
            c if place == raw and tag == "td" else escape(printable(c))
            for place, c in enumerate(cells)
        )
        return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in inner) + "</tr>"

    return f"<table>{line(names, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
