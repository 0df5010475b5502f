"""The page for one question about a network: a sentence, tables, and what they were made with."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mpvg.files import atomic_text
from mpvg.pages import fill, table
from mpvg.runs.environment import made_with

TEMPLATE = Path(__file__).with_name("question.html")


def write_question(path: Path, *, title: str, about: str, body: str, summary: str = "") -> None:
    """Writes the page, which has everything in it.

    Args:
        path: HTML file.
        title: as text.
        about: images and weights, as text.
        body: tables and lists, as HTML.
        summary: in one sentence, as text; empty: the tables alone.
    """
    parts = {
        "title": escape(title),
        "lead": f"<p>{escape(summary)}</p>" if summary else "",
        "about": escape(about),
        "body": body,
        "made": escape(made_with()),
    }
    atomic_text(path, fill(TEMPLATE, parts))


def text_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table of texts."""
    return table(caption, head, [(escape(first), [escape(cell) for cell in others]) for first, *others in rows])


def text_list(lines: Sequence[str]) -> str:
    """HTML of a list of texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
