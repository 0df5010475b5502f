"""All drawing with matplotlib: curves, heatmaps, overlays on images, and the diagram of what each layer receives.

Every function draws or saves with this module's own settings. The matplotlib settings and the backend of the program
that calls it are neither used nor changed, and pyplot is not involved.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

# Colors that can be told apart with any kind of color vision (Okabe and Ito), and color maps without red and green.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
SIGNED, UNSIGNED = "PuOr", "viridis"

_SETTINGS: dict[Any, Any] = {
    # matplotlib's own defaults, whatever its user has set; the backend stays, because changing it could open windows.
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")},
    # The same numbers give the same file: no random identifiers, and text stays text.
    "svg.hashsalt": "mpvg",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
}

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name of a line -> its repetitions (seeds), each a series of values."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _with_settings(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Lets a function draw or save with `_SETTINGS`; the caller's settings are restored afterwards."""

    @wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return wrapper


@_with_settings
def lines(
    curves: Curves,
    title: str,
    x: str,
    y: str,
    *,
    first: int = 0,
    ticks: Mapping[int, str] | None = None,
    controls: Mapping[str, str] | None = None,
) -> Figure:
    """Draws the mean of each line over its repetitions, and their range as a band.

    Args:
        curves: the lines; all repetitions of one line have the same length.
        title: title of the figure.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        first: position of the first value on the horizontal axis.
        ticks: position on the horizontal axis -> its label; None: the positions are numbers.
        controls: control line -> the line that it belongs to, which comes before it in `curves`; the control is dashed
            and has the color of that line.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    colors: dict[str, Any] = {}
    for name, repetitions in curves.items():
        columns = list(zip(*repetitions, strict=True))
        positions = range(first, first + len(columns))
        means = [sum(c) / len(c) for c in columns]
        controlled = (controls or {}).get(name)
        style: dict[str, Any] = {"linestyle": "--", "color": colors[controlled]} if controlled else {}
        (line,) = axes.plot(positions, means, label=name, marker="o" if ticks else None, **style)
        colors[name] = line.get_color()
        axes.fill_between(
            positions, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
        )
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


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


@_with_settings
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
    figure.suptitle(title)
    return figure


@_with_settings
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
    figure.suptitle(title)
    return figure


@_with_settings
def side_by_side(panels: Mapping[str, Curves], x: str, y: str, *, ticks: Mapping[int, str] | None = None) -> Figure:
    """Draws several sets of lines side by side, with a common vertical axis; each line is a mean over its repetitions.

    Args:
        panels: title -> lines.
        x: label of the horizontal axes.
        y: label of the vertical axis.
        ticks: position on the horizontal axes -> its label; None: the positions are numbers.
    """
    figure = Figure(figsize=(max(6.4, 3.6 * len(panels)), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, repetitions in curves.items():
            means = np.mean(np.asarray(repetitions, dtype=float), axis=0)
            axis.plot(means, label=name, marker="o" if ticks else None, linewidth=1)
        axis.set(title=title, xlabel=x)
        if ticks:
            axis.set_xticks(list(ticks), list(ticks.values()))
    axes[0, 0].set_ylabel(y)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


@_with_settings
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


@_with_settings
def save(figure: Figure, *paths: Path) -> None:
    """Writes a figure to files, whose suffixes determine the format; the same numbers always give the same bytes."""
    for path in paths:
        date_field = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
        figure.savefig(path, dpi=150, metadata={date_field: None} if date_field else None)
