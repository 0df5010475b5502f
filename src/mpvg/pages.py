"""The parts of pages that contain everything and load nothing: a style, tables, pictures, and a template's filling."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")
"""The style of all pages: light and dark, from 400 pixels on, and in print."""
_MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}


def fill(template: Path, parts: Mapping[str, str]) -> str:
    """Puts parts in place of a template's `<!--name-->`, and the style in place of `<!--style-->`.

    Args:
        template: an HTML file.
        parts: name -> HTML.
    """
    known = {**parts, "style": STYLE.read_text(encoding="utf-8")}
    # In one pass, so that no placeholder is searched for in the parts that were filled in.
    return re.sub(r"<!--([\w-]+)-->", lambda placeholder: known[placeholder[1]], template.read_text(encoding="utf-8"))


def figure(path: Path, alternative: str, caption: str, *, id: str, kind: str = "") -> str:
    """HTML of a picture that is part of the page.

    Args:
        path: PNG or SVG file.
        alternative: what is read out instead of the picture.
        caption: text below the picture.
        id: id of the element.
        kind: class of the element; "static": it is shown only in print and without JavaScript.
    """
    source = embedded(path.read_bytes(), _MEDIA[path.suffix])
    return (
        f'<figure id="{escape(id)}" class="{kind}"><img alt="{escape(alternative)}" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def embedded(content: bytes, media: str = "image/png") -> str:
    """A file as an address that contains it."""
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def table(
    caption: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], wide: Sequence[int] = ()
) -> str:
    """A table in a box that scrolls, so that the page does not.

    Args:
        caption: what it shows, as text.
        head: headings of the columns, as text.
        rows: heading and cells of each row, as HTML.
        wide: cells that may be broken into several lines.
    """
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td{' class=list' if n in wide else ''}>{cell}</td>" for n, cell in enumerate(cells))
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )
