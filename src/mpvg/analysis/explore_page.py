"""What an explored run says about one image, as HTML: probabilities, maps of norms, correlations layer by layer."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpvg.analysis.drawing import norm_map, to_rgb
from mpvg.analysis.explore import ExploredRun, Output, PlaceState, Selected
from mpvg.analysis.page import embedded_rgb
from mpvg.analysis.probe import LAST
from mpvg.pages import table
from mpvg.validation import printable

TOP = 5
"""Classes that are named."""
STYLE = """
.explored { --one: #0072b2; --two: #d55e00; color: var(--body-text-color); overflow-wrap: anywhere }
.dark .explored { --one: #3d9bdc; --two: #ff8a3d }
.explored .scroll { overflow-x: auto }
.explored table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; margin: 0 }
.explored caption { text-align: left; padding: .25rem 0 }
.explored th, .explored td { padding: .15rem .5rem; text-align: right; border: 0;
  border-bottom: 1px solid var(--border-color-primary) }
.explored th { font-weight: 600 }
.explored th:first-child { text-align: left; white-space: nowrap }
.explored .maps { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 }
.explored figure { margin: 0; width: 7.5rem }
.explored .small figure { width: 4rem }
.explored figure img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; margin: 0 }
.explored figcaption { font-size: .8rem; line-height: 1.3 }
.explored .problem { border-left: 4px solid var(--two); padding-left: .6rem }
.explored svg { max-width: 34rem; width: 100%; height: auto; display: block }
.explored svg text { fill: currentColor; font-size: 12px }
.explored svg .axis { stroke: currentColor; stroke-width: 1; opacity: .5 }
.explored svg polyline { fill: none; stroke-width: 2 }
.explored svg .constant { stroke: var(--one) }
.explored svg .positional { stroke: var(--two) }
.explored svg .before { stroke-dasharray: 5 4; stroke-width: 1.5 }
.explored svg circle { stroke-width: 2 }
.explored svg circle.constant { fill: var(--one) }
.explored svg circle.positional { fill: var(--two) }
.explored svg circle.raw { fill: var(--background-fill-primary) }
.min_value, .max_value { color: var(--body-text-color) !important }
"""
"""For a page whose colors are Gradio's variables."""


def problem(text: str) -> str:
    """HTML of why there is no output."""
    return f'<div class="explored"><p class="problem" role="alert">{escape(printable(text))}</p></div>'


def what_is_said(explored: ExploredRun, selected: Selected, now: Output, plain: Output) -> str:
    """HTML of the image, the most probable classes and the norms of the tokens.

    Args:
        explored: the run.
        selected: its image.
        now: the output after the changes.
        plain: that without any.
    """
    names, before = explored.run.info.class_names, plain.probabilities
    found, classes = now.probabilities.topk(min(TOP, len(names)))
    rows = [
        (escape(printable(names[number])), (f"{100 * value:.2f}", f"{100 * float(before[number]):.2f}"))
        for value, number in zip(found.tolist(), classes.tolist(), strict=True)
    ]
    target = f", of class {selected.target}" if selected.target is not None else ""
    caption = f"Image {selected.name}{target}: the most probable classes, %"
    maps = [_picture(to_rgb(now.image, explored.run.info), "the image", "as the network receives it")]
    last = next((place for place in now.places if place.name == LAST), None)
    if last is not None and now.norms_after is not None:
        maps += [
            _norms(last.norms, "before the Last LN"),
            _norms(now.norms_after, "after it, with its PE" if last.delivered else "after it"),
        ]
    layers = [_norms(place.norms, f"layer {place.name}") for place in now.places if place.name != LAST]
    return (
        f'<div class="explored">{table(printable(caption), ("class", "now", "unchanged"), rows)}'
        f'<div class="maps">{"".join(maps)}</div>'
        f"<p>Norms of the tokens that enter each layer, each map from its smallest to its largest</p>"
        f'<div class="maps small">{"".join(layers)}</div></div>'
    )


def layer_by_layer(now: Output, plain: Output) -> str:
    """HTML of r and its two parts at each place; arguments as `what_is_said`."""
    rows = [
        (
            place.name if place.name == LAST else f"layer {place.name}",
            (
                "its PE" if place.delivered else "raw PE",
                *(_number(value) for value in (place.r, place.r_constant, place.r_positional)),
            ),
        )
        for place in now.places
    ]
    head = ("place", "compared with", "r", "r_constant", "r_positional")
    caption = "Correlation of the tokens after each LN with the PE, of this one image"
    return f'<div class="explored">{_chart(now.places, plain.places)}{table(caption, head, rows)}</div>'


def _number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "undefined"


def _picture(pixels: NDArray[Any], name: str, more: str) -> str:
    source = embedded_rgb(pixels)
    return (
        f'<figure><img alt="{escape(f"{name}: {more}")}" src="{source}">'
        f"<figcaption>{escape(name)}<br>{escape(more)}</figcaption></figure>"
    )


def _norms(norms: Tensor, name: str) -> str:
    """A map of norms, colored from its smallest to its largest value."""
    from mpvg.figures import color_map

    low, high = float(norms.min()), float(norms.max())
    span = high - low if high > low else 1.0
    levels = np.rint(255 * (norm_map(norms) - low) / span).astype(int)
    return _picture(np.array(color_map(256), float)[levels] / 255, name, f"{low:.3g} to {high:.3g}")


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480, 200, 40, 24, 24
_LINES: dict[str, Callable[[PlaceState], float]] = {
    "constant": lambda place: place.r_constant,
    "positional": lambda place: place.r_positional,
}


def _chart(now: Sequence[PlaceState], plain: Sequence[PlaceState]) -> str:
    """r_constant and r_positional over the places, from -1 to 1; dashed: unchanged; open circles: the raw PE."""
    step = (_WIDTH - _LEFT - 20) / max(1, len(now) - 1)

    def x(number: int) -> float:
        return round(_LEFT + number * step, 1)

    def y(value: float) -> float:
        return round(_TOP + (1 - value) / 2 * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value)}" y2="{y(value)}"/>'
        f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        for value in (-1, 0, 1)
    ]
    parts += [
        f'<text x="{x(number)}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{'LN' if place.name == LAST else place.name}</text>"
        for number, place in enumerate(now)
    ]
    for number, (kind, value) in enumerate(_LINES.items()):
        left = _LEFT + 130 * number
        parts.append(f'<line class="{kind}" x1="{left}" x2="{left + 24}" y1="8" y2="8" stroke-width="2"/>')
        parts.append(f'<text x="{left + 30}" y="12">r_{kind}</text>')
        for places, before in ((plain, " before"), (now, "")):
            points = [(x(at), y(value(place))) for at, place in enumerate(places) if math.isfinite(value(place))]
            line = " ".join(f"{across},{down}" for across, down in points)
            parts.append(f'<polyline class="{kind}{before}" points="{line}"/>')
        parts += [
            f'<circle class="{kind}{"" if place.delivered else " raw"}" cx="{x(at)}" cy="{y(value(place))}" r="3.5"/>'
            for at, place in enumerate(now)
            if math.isfinite(value(place))
        ]
    parts.append(f'<text x="{_LEFT + 270}" y="12">dashed: unchanged</text>')
    label = "r_constant and r_positional of this one image, layer by layer; the table below has the numbers"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
