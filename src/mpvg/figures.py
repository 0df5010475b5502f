"""All drawing with matplotlib, with settings of this module; those of the calling program and its backend are kept."""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.rcsetup import cycler
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from mpvg.files import atomic_write

# After Okabe and Ito, for any kind of color vision, each with a contrast of at least 3 (WCAG 2.1, 1.4.11).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a87800", "#3a93c8", "#000000", "#767676")
DARK_COLORS = ("#3d9bdc", "#ff8a3d", "#22b88c", "#e08fbd", "#e69f00", "#8fd0f5", "#f0f0f0", "#a0a0a0")
"""The same on a dark background."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNED, UNSIGNED = "PuOr", "viridis"

_SETTINGS: dict[Any, Any] = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")},
    "svg.hashsalt": "mpvg",  # the same numbers give the same file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    "axes.prop_cycle": cycler(linestyle=("-", ":", "-.")) * cycler(color=COLORS),  # dashed: a control
    "text.parse_math": False,  # names of runs may contain dollar signs
}

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name of a line -> its repetitions (seeds), each a series of values."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def with_settings(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Lets a function draw or save with `_SETTINGS`; the caller's settings are restored afterwards."""

    @wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return wrapper


@with_settings
def lines(
    curves: Curves,
    title: str,
    x: str,
    y: str,
    *,
    first: int = 0,
    ticks: Mapping[int, str] | None = None,
    controls: Mapping[str, str] | None = None,
    percent: bool = False,
    span: float | None = None,
    include: Sequence[float] = (),
) -> Figure:
    """Draws the mean of each line over its repetitions, and their range as a band.

    The legend has as many columns as fit into the figure, and long names are broken into several lines.

    Args:
        curves: the lines; all repetitions of one line have the same length.
        title: title of the figure.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        first: position of the first value on the horizontal axis.
        ticks: position on the horizontal axis -> its label; None: the positions are numbers.
        controls: control line -> the line that it belongs to, which comes before it in `curves`; the control is dashed
            and has the same color.
        percent: whether the values are in [0, 1] and shown as percentages.
        span: see `value_range`; None with `percent`: 5 %.
        include: see `value_range`.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    styles: dict[str, Any] = {}
    for name, repetitions in curves.items():
        columns = list(zip(*repetitions, strict=True))
        positions = range(first, first + len(columns))
        means = [sum(c) / len(c) for c in columns]
        controlled = (controls or {}).get(name)
        style: dict[str, Any] = {"marker": MARKERS[len(styles) % len(MARKERS)] if ticks or len(columns) == 1 else None}
        if controlled:
            style = {**styles[controlled], "linestyle": "--"}
        (line,) = axes.plot(positions, means, label=name, **style)
        styles[name] = style | {"color": line.get_color()}
        axes.fill_between(
            positions, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
        )
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _set_range(axes, [curves], percent, span, include)
    axes.set_title(_wrapped(title, figure.get_figwidth() - 1, float(axes.title.get_fontsize())))
    axes.set_xlabel(x)
    axes.set_ylabel(_wrapped(y, 2.8, float(axes.yaxis.label.get_fontsize())))
    _add_legend(figure)
    return figure


def value_range(
    values: Iterable[float], span: float | None = None, include: Sequence[float] = ()
) -> tuple[float, float]:
    """The range of an axis for some values, with a margin; so wide that small differences do not fill the axis.

    Args:
        values: what is shown; NaN and infinite values are ignored.
        span: least width of the range; None: a tenth of the largest absolute value.
        include: values that must be in the range, such as 0.
    """
    known = [value for value in (*values, *include) if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    least = span or 0.1 * max(abs(low), abs(high)) or 1.0
    missing = max(0.0, least - (high - low)) / 2
    margin = 0.05 * max(least, high - low)
    return low - missing - margin, high + missing + margin


def color_map(steps: int) -> list[list[int]]:
    """The color map of norms: colors from the smallest to the largest value, each as red, green and blue, 0 to 255."""
    colors: list[list[int]] = (matplotlib.colormaps[UNSIGNED](np.linspace(0, 1, steps), bytes=True)[:, :3]).tolist()
    return colors


def _set_range(axes: Any, shown: Iterable[Curves], percent: bool, span: float | None, include: Sequence[float]) -> None:
    values = (v for curves in shown for repetitions in curves.values() for series in repetitions for v in series)
    axes.set_ylim(*value_range(values, span or (0.05 if percent else None), include))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _add_legend(figure: Figure) -> None:
    """Adds the legend of all lines of a figure below it, as wide as fits; makes room for it and for long titles."""
    lines: dict[str, Any] = {}
    for line in (line for axes in figure.axes for line in axes.lines):
        lines.setdefault(str(line.get_label()), line)
    width = figure.get_figwidth() - 0.2
    names = [_wrapped(name, width - 0.6, 10) for name in lines]
    for columns in range(min(4, len(lines)), 0, -1):
        legend = figure.legend(
            list(lines.values()),
            [str(number) for number in range(len(lines))],  # names that begin with "_" would be left out
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=10,
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
        extent = legend.get_window_extent()
        if extent.width / figure.dpi <= width or columns == 1:
            break
        legend.remove()
    title_lines = max(axes.get_title().count("\n") for axes in figure.axes)
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi + 0.2 * title_lines)


def _wrapped(text: str, width: float, size: float) -> str:
    """Breaks a text into lines of at most a width in inches, at a font size in points."""
    fitting, font = [""], FontProperties(size=size)
    for word in re.findall(r"\n|[^\S\n]+|[^\s/_,-]+[/_,-]*|[/_,-]+", text):
        if word == "\n":
            fitting.append("")
        elif _text_width(fitting[-1] + word.rstrip(), font) <= width:
            fitting[-1] += word
        else:
            fitting.append("")
            for letter in word.lstrip():
                if _text_width(fitting[-1] + letter, font) > width:
                    fitting.append("")
                fitting[-1] += letter
    return "\n".join(line.rstrip() for line in fitting if line.strip())


def _text_width(text: str, font: FontProperties) -> float:
    """The width of a line of text in inches."""
    width: float = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] if text else 0.0
    return width / 72


class Panel(NamedTuple):
    """One layer, a column of Fig. 2."""

    name: str
    """Its label."""
    tokens: ArrayLike
    """Mean over images of the tokens after the LN, `(N, C)`."""
    pe: ArrayLike
    """The position embedding (PE) that they are compared with, `(N, C)`."""
    r: float
    """Pearson's correlation of the two."""
    delivered: bool
    """Whether this PE is delivered to the layer; otherwise it is the raw PE."""


@with_settings
def heatmaps(panels: Sequence[Panel], title: str) -> Figure:
    """Draws the tokens of every layer and its PE below them, patches by channels (Figs. 2 and 8); one scale per row."""
    figure = Figure(figsize=(1.25 * len(panels) + 1.2, 4.4), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for row, (kind, values) in enumerate((("tokens", [p.tokens for p in panels]), ("PE", [p.pe for p in panels]))):
        limit = max(float(np.quantile(np.abs(np.asarray(value)), 0.995)) for value in values)
        for axis, value in zip(axes[row], values, strict=True):
            image = axis.imshow(value, aspect="auto", cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        axes[row, 0].set_ylabel(f"{kind}\npatches")
        figure.colorbar(image, ax=axes[row], pad=0.005, fraction=0.02)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(f"{panel.name}\nr {panel.r:+.2f}", fontsize=9)
    for axis, panel in zip(axes[1], panels, strict=True):
        axis.set_xlabel("channels" if panel.delivered else "channels\n(raw PE)", fontsize=8)
    figure.suptitle(_wrapped(title, figure.get_figwidth() - 0.4, 12), fontsize=12)
    return figure


@with_settings
def norm_maps(rows: Sequence[tuple[str, ArrayLike, Mapping[str, NDArray[Any]]]], title: str) -> Figure:
    """Draws images, and the norm of every token over them (Fig. 7); all rows share one scale for each kind of norm.

    Args:
        rows: label, image `(H, W)` or `(H, W, 3)` in [0, 1], and kind of norm -> map `(h, w)`; the kinds are the same
            in all rows.
        title: title of the figure.
    """
    kinds = list(rows[0][2])
    figure = Figure(figsize=(2.1 * (1 + len(kinds)), 2.1 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(kinds), squeeze=False)
    ranges = {k: (min(m[k].min() for _, _, m in rows), max(m[k].max() for _, _, m in rows)) for k in kinds}
    for number, (row, (name, image, maps)) in enumerate(zip(axes, rows, strict=True)):
        size = (0, np.asarray(image).shape[1], np.asarray(image).shape[0], 0)
        for axis in row:
            axis.imshow(image, cmap="gray", extent=size)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        row[0].set_ylabel(name, fontsize=8)
        for axis, kind in zip(row[1:], kinds, strict=True):
            low, high = ranges[kind]
            drawn = axis.imshow(maps[kind], cmap=UNSIGNED, vmin=low, vmax=high, alpha=0.7, extent=size)
            axis.set_title(kind if number == 0 else "", fontsize=9)
            if number == len(rows) - 1:
                figure.colorbar(drawn, ax=axis, orientation="horizontal", fraction=0.06)
    figure.suptitle(_wrapped(title, figure.get_figwidth() - 0.4, 12), fontsize=12)
    return figure


@with_settings
def side_by_side(
    panels: Mapping[str, Curves],
    x: str,
    y: str,
    *,
    ticks: Mapping[int, str] | None = None,
    span: float | None = None,
    include: Sequence[float] = (),
) -> Figure:
    """Draws several sets of lines side by side, with a common vertical axis; each line is a mean over its repetitions.

    Args:
        panels: title -> lines; lines of the same name have the same color in all panels.
        x: label of the horizontal axes.
        y: label of the vertical axis.
        ticks: position on the horizontal axes -> its label; None: the positions are numbers.
        span: see `value_range`.
        include: see `value_range`.
    """
    figure = Figure(figsize=(max(6.4, 3.6 * len(panels)), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, repetitions in curves.items():
            means = np.mean(np.asarray(repetitions, dtype=float), axis=0)
            number = names.index(name)
            style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)] if ticks else None}
            axis.plot(means, label=name, linewidth=1, linestyle="-", **style)
        title = _wrapped(title, (figure.get_figwidth() - 1) / len(panels), float(axis.title.get_fontsize()))
        axis.set(title=title, xlabel=x)
        if ticks:
            axis.set_xticks(list(ticks), list(ticks.values()))
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _set_range(axes[0, 0], panels.values(), False, span, include)
    axes[0, 0].set_ylabel(_wrapped(y, 2.2, float(axes[0, 0].yaxis.label.get_fontsize())))
    _add_legend(figure)
    return figure


@with_settings
def delivery_diagram(rows: Sequence[tuple[str, str]], readout: str, title: str, path: Path) -> None:
    """Draws the network as a column of boxes, bottom up, and next to each box the PE that it receives (Fig. 3).

    Args:
        rows: part of the network and what it receives, as returned by `mpvg.delivery.describe`.
        readout: how the tokens are reduced to one vector.
        title: title of the figure.
        path: file to write; its suffix determines the format.

    Raises:
        ValueError: matplotlib cannot write this format.
    """
    boxes = [*rows, (readout, "-"), ("head", "-")]
    figure = Figure(figsize=(5.2, 0.42 * len(boxes) + 0.6), layout="constrained")
    axes = figure.subplots()
    for height, (part, received) in enumerate(boxes):
        served = received != "-"
        color = "#dbe9f6" if served else "#f2f2f2"
        axes.text(
            0, height, part, ha="center", va="center", bbox={"boxstyle": "round,pad=0.3", "fc": color, "ec": "#888"}
        )
        if served:
            arrow = {"arrowstyle": "->", "color": "#2166ac"}
            axes.annotate("", xy=(0.42, height), xytext=(0.8, height), arrowprops=arrow)
            axes.text(0.84, height, f"+ {received}", ha="left", va="center", color="#2166ac")
        if height:
            axes.annotate(
                "", xy=(0, height - 0.28), xytext=(0, height - 0.72), arrowprops={"arrowstyle": "->", "color": "#888"}
            )
    axes.set(xlim=(-0.7, 2.6), ylim=(-0.7, len(boxes) - 0.3), title=title)
    axes.axis("off")
    save(figure, path)


@with_settings
def save(figure: Figure, *paths: Path) -> None:
    """Writes a figure to files, whose suffixes determine the format; the same numbers always give the same bytes."""
    for path in paths:
        date_field = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
        content = io.BytesIO()
        kind = path.suffix.removeprefix(".") or None
        figure.savefig(content, format=kind, dpi=150, metadata={date_field: None} if date_field else None)
        atomic_write(path, content.getvalue())
