"""Tables as Markdown, LaTeX and HTML. Names in them may come from anyone's files, so that each form escapes its own."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {character: f"${character}$" for character in "<>|"}  # other signs in TeX's own fonts
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 10rem; }
img { width: 100%; min-width: 40rem; background: #fff; }
"""


@dataclass(frozen=True)
class Block:
    """One table with what belongs to it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def to_markdown(title: str, top: Iterable[str], blocks: Sequence[Block]) -> str:
    """The blocks as a Markdown page."""
    lines = [f"# {_markdown(title)}", "", *(line for text in top for line in (_markdown(text), ""))]
    for block in blocks:
        head, *rows = [[_markdown(cell).replace("|", "\\|") for cell in row] for row in (block.head, *block.rows)]
        lines += [f"## {_markdown(block.title)}", "", "| " + " | ".join(head) + " |"]
        lines += ["|" + "---|" + "---:|" * (len(block.head) - 1), *("| " + " | ".join(row) + " |" for row in rows)]
        lines += ["", *(f"- {_markdown(note)}" for note in block.notes), *([""] if block.notes else [])]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(text: str) -> str:
    """A text in one line in which no tag, link or picture begins."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", _one_line(text)).replace("[", "\\[")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def to_latex(top: Iterable[str], blocks: Iterable[Block]) -> str:
    """The blocks as LaTeX tables; they need the package booktabs."""
    return "\n".join([*(f"% {_one_line(text)}" for text in top), "", *map(_latex_table, blocks)])


def _latex_table(block: Block) -> str:
    columns = "l" + "r" * (len(block.head) - 1)
    rows = [" & ".join(map(_latex, row)) + r" \\" for row in block.rows]
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(block.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_latex, block.head)) + r" \\"]
    lines += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_latex(note)}" for note in block.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def to_html(title: str, top: Iterable[str], blocks: Sequence[Block], picture: bytes | None) -> str:
    """The blocks as a page that needs nothing else.

    Args:
        title: of the page.
        top: paragraphs above the tables.
        blocks: the tables.
        picture: an SVG image, which the page holds; as an image, it runs no script.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in top)]
    if picture is not None:
        source = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
        alt = "Every seed of every arm, with means and intervals; the numbers follow."
        parts.append(_scrolled(alt, f'<img src="{source}" alt="{alt}">'))
    for block in blocks:
        body = "".join(_html_row(cells, "td") for cells in block.rows)
        table = f"<caption>{escape(block.title)}</caption><thead>{_html_row(block.head, 'th')}</thead>"
        parts.append(_scrolled(block.title, f"<table>{table}<tbody>{body}</tbody></table>"))
        if block.notes:
            parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in block.notes) + "</ul>")
    content = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{content}\n</main></body></html>\n"
    )


def _scrolled(label: str, content: str) -> str:
    """What a narrow screen scrolls sideways, with the keyboard too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
