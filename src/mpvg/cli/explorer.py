"""The page of `mpvg explore`: Gradio components around `mpvg.analysis.explore`, served to this machine."""

import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from types import FrameType
from typing import Any, NoReturn

from mpvg.analysis.explore import INPUT, Changes, ExploredRun, Output, Selected
from mpvg.analysis.explore_page import STYLE, layer_by_layer, problem, what_is_said
from mpvg.inference.programs import from_extra
from mpvg.validation import printable

HOST = "127.0.0.1"
MAX_FILE = 64 * 2**20
"""Bytes of an image that is uploaded."""
_HIDDEN = re.compile(r"GRADIO_.*|SPACES?_.*|SYSTEM|(HTTPS?|ALL)_PROXY", re.IGNORECASE)
"""Variables that change what Gradio does, some when it is imported, some when it is launched; and proxies, which would
get the requests by which it asks its own server whether it runs."""
_MAX_FACTOR = 2
_NOTHING = "The method of this run delivers no PE to layers or to the Last LN, so there is nothing to switch off there."


@dataclass
class _Column:
    """A run, and the last image that it showed without changes."""

    explored: ExploredRun
    name: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    """A network has one probe, so it runs for one request at a time."""
    key: Any = None
    selected: Selected | None = None
    plain: Output | None = None

    def update(self, number: float | None, file: str | None, changes: Changes) -> tuple[str, str]:
        """HTML of what the run says, and of its layers."""
        try:
            with self.lock:
                selected, plain = self._select(number, file)
                now = plain if changes == Changes() else self.explored.predict(selected.input, changes)
            return what_is_said(self.explored, selected, now, plain), layer_by_layer(now, plain)
        except (ValueError, OSError) as error:
            return problem(str(error)), ""

    def _select(self, number: float | None, file: str | None) -> tuple[Selected, Output]:
        key = file or number
        if key is None or key != self.key or self.selected is None or self.plain is None:
            self.key = None
            self.selected = self._read(number, file)
            self.plain = self.explored.predict(self.selected.input)
            self.key = key
        return self.selected, self.plain

    def _read(self, number: float | None, file: str | None) -> Selected:
        if file:
            return self.explored.read(file)
        if number is None or number != int(number):
            raise ValueError(f"the number of the image is {number}; give a whole number")
        return self.explored.validation_image(int(number))


def build(explored: Sequence[ExploredRun], names: Sequence[str]) -> Any:
    """The page as Gradio's Blocks; Gradio must be imported within `own_environment`.

    Args:
        explored: the runs, which are shown side by side.
        names: what they are called.
    """
    import gradio as gr

    smallest = min(one.images for one in explored)
    half = min(one.run.info.img_size for one in explored) // 2
    with gr.Blocks(title="mpvg explore", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.HTML(f'<div class="explored"><h1>What the position embedding does to one image</h1>{_notes(explored)}</div>')
        with gr.Row():
            label = f"Validation image, 0 to {smallest - 1}" if smallest else "Validation image: upload one instead"
            number = gr.Number(0, label=label, precision=0, interactive=smallest > 0, min_width=160)
            right = gr.Slider(-half, half, 0, step=1, label="Move right, pixels", min_width=160)
            down = gr.Slider(-half, half, 0, step=1, label="Move down, pixels", min_width=160)
        with gr.Accordion("Another image from a file", open=smallest == 0):
            upload = gr.File(
                label="Image file; remove it to return to the validation set", file_count="single", height=120
            )
        shared = [number, upload, right, down]
        with gr.Row():
            for one, name in zip(explored, names, strict=True):
                with gr.Column(min_width=320):
                    _column(_Column(one, name), shared, page)
    return page


def _notes(explored: Sequence[ExploredRun]) -> str:
    notes = ["The PE is the position embedding. Where an image moves, its border is repeated."]
    if len({one.run.info.val_hash for one in explored}) > 1:
        notes.append("The runs have different validation sets: each shows the image of this number of its own.")
    return "".join(f"<p>{note}</p>" for note in notes)


def _column(column: _Column, shared: Sequence[Any], page: Any) -> None:
    """The controls and the outputs of one run."""
    import gradio as gr

    places = list(column.explored.shapes)
    delivered = [place for place in places if place != INPUT]
    gr.HTML(f'<div class="explored"><h2>{escape(printable(column.name))}</h2></div>')
    said = gr.HTML()
    with gr.Accordion(f"What the layers of {printable(column.name)} receive", open=True):
        if not delivered:
            gr.HTML(f'<div class="explored"><p>{_NOTHING}</p></div>')
        on = gr.CheckboxGroup([_label(p) for p in places], value=[_label(p) for p in places], label="Receives its PE")
        with gr.Row():
            pairs = [("none", ""), *((_label(place), place) for place in delivered)]
            one, other = (
                gr.Dropdown(pairs, value="", label=label, visible=len(delivered) > 1, min_width=120)
                for label in ("Exchange the PE of", "with that of")
            )
        with gr.Row():
            factors = [
                gr.Slider(0, _MAX_FACTOR, 1, step=0.05, label=f"Factor, {_label(place)}", min_width=160)
                for place in places
            ]
        reset = gr.Button("Reset")
    inside = gr.HTML()
    controls = [on, one, other, *factors]

    def changes(right: float, down: float, on: list[str], one: str, other: str, *factors: float) -> Changes:
        kept = {place: factor if _label(place) in on else 0.0 for place, factor in zip(places, factors, strict=True)}
        changed = {place: factor for place, factor in kept.items() if factor != 1}
        exchanged = (one, other) if one and other and one != other else None
        return Changes(right=int(right), down=int(down), factors=changed, exchanged=exchanged)

    def update(number: float | None, file: str | None, *values: Any) -> tuple[str, str]:
        return column.update(number, file, changes(*values))

    gr.on(
        [page.load, *(control.change for control in (*shared, *controls))],
        update,
        [*shared, *controls],
        [said, inside],
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
        api_visibility="private",
    )
    start = [control.value for control in controls]
    reset.click(lambda: start, None, controls, show_progress="hidden", queue=False, api_visibility="private")


def _label(place: str) -> str:
    return f"layer {place}" if place.isdecimal() else place


@contextmanager
def own_environment() -> Iterator[None]:
    """Lets Gradio see no variable of the user's, and gives it a folder for uploads that is removed at the end.

    Raises:
        ValueError: Gradio or matplotlib is not installed.
    """
    before = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory(prefix="mpvg-explore-") as folder:
            for name in filter(_HIDDEN.fullmatch, before):
                del os.environ[name]
            off = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
            os.environ.update({"GRADIO_TEMP_DIR": folder, **off})
            with from_extra("app"):
                import gradio as gradio
                import matplotlib as matplotlib
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def launched(page: Any, port: int | None = None) -> Iterator[str]:
    """Serves a page to this machine alone, within `own_environment`.

    Args:
        page: what `build` made.
        port: None: the first free one from 7860 on.

    Yields:
        The page's address.
    """
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        strict_cors=True,
        allowed_paths=[],
        root_path="",
        max_file_size=MAX_FILE,
        footer_links=[],
        inbrowser=False,
        inline=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=gr.themes.Base(font=fonts, font_mono=["monospace"]),
        css=STYLE,
    )
    try:
        yield str(page.local_url)
    finally:
        # A browser that still shows the page would be waited for; what is cut off then complains.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.force_exit = True
        page.close(verbose=False)


def check_port(port: int) -> None:
    """Refuses a port that no server can have, before networks are loaded.

    Raises:
        ValueError: it is taken, not allowed or out of range.
    """
    cure = "give another --port, or leave it out for a free one"
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} does not exist; allowed: 1 to 65535")
    with socket.socket() as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}); {cure}") from error


def wait() -> None:
    """Returns at Ctrl-C; SIGTERM ends the process, too, after everything is cleaned up."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
