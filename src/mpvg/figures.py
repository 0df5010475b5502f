"""All drawing: curves, heatmaps, overlays, and what receives what."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.rcsetup import cycler

matplotlib.use("Agg")
# The same numbers give the same file: no date, no random identifiers, text as text.
matplotlib.rcParams.update({"svg.hashsalt": "mpvg", "svg.fonttype": "none", "font.size": 10, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})

# Colours that are told apart with any kind of colour vision: Okabe and Ito's, and maps without red beside green.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
matplotlib.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
SIGNED, UNSIGNED = "PuOr", "viridis"

from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name of a line -> its repetitions (seeds), each a series of values."""


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
        curves: the lines; repetitions of one line have the same length.
        title: above the axes.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        first: where the first value stands on the horizontal axis.
        ticks: names of places on the horizontal axis, where they are no numbers.
        controls: lines that are controls -> the line each is one of, drawn before it; dashed, in its colour.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    colours: dict[str, Any] = {}
    for name, repetitions in curves.items():
        columns = list(zip(*repetitions, strict=True))
        places = range(first, first + len(columns))
        means = [sum(c) / len(c) for c in columns]
        of = (controls or {}).get(name)
        style: dict[str, Any] = {"linestyle": "--", "color": colours[of]} if of else {}
        (line,) = axes.plot(places, means, label=name, marker="o" if ticks else None, **style)
        colours[name] = line.get_color()
        axes.fill_between(
            places, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
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
    """A column of Fig. 2."""

    name: str
    tokens: Any
    """Mean over images of the tokens behind the LN, `(N, C)`."""
    pe: Any
    """What they are compared with, `(N, C)`."""
    r: float
    delivered: bool


def heatmaps(panels: Sequence[Panel], title: str) -> Figure:
    """Draws tokens above the PE of every layer, patches by channels (Figs. 2 and 8); one scale a row of panels."""
    figure, axes = plt.subplots(
        2, len(panels), figsize=(1.25 * len(panels) + 1.2, 4.4), layout="constrained", squeeze=False
    )
    for row, (kind, values) in enumerate((("tokens", [p.tokens for p in panels]), ("PE", [p.pe for p in panels]))):
        limit = max(float(np.quantile(np.abs(np.asarray(value)), 0.995)) for value in values)
        for place, value in zip(axes[row], values, strict=True):
            image = place.imshow(value, aspect="auto", cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.grid(visible=False)
        axes[row, 0].set_ylabel(f"{kind}\npatches")
        figure.colorbar(image, ax=axes[row], pad=0.005, fraction=0.02)
    for place, panel in zip(axes[0], panels, strict=True):
        place.set_title(f"{panel.name}\nr {panel.r:+.2f}", fontsize=9)
    for place, panel in zip(axes[1], panels, strict=True):
        place.set_xlabel("channels" if panel.delivered else "channels\n(raw PE)", fontsize=8)
    figure.suptitle(title)
    return figure


def norm_maps(rows: Sequence[tuple[str, Any, Any]], title: str) -> Figure:
    """Draws an image and, over it, the norm of every token (Fig. 7); one scale for each kind of norm, over all rows.

    Args:
        rows: name, image `(H, W)` or `(H, W, 3)` in [0, 1], and maps by name, each `(h, w)`.
        title: above them.
    """
    kinds = list(rows[0][2])
    figure, axes = plt.subplots(
        len(rows),
        1 + len(kinds),
        figsize=(2.1 * (1 + len(kinds)), 2.1 * len(rows) + 0.5),
        layout="constrained",
        squeeze=False,
    )
    ranges = {k: (min(m[k].min() for _, _, m in rows), max(m[k].max() for _, _, m in rows)) for k in kinds}
    for number, (line, (name, image, maps)) in enumerate(zip(axes, rows, strict=True)):
        size = (0, np.asarray(image).shape[1], np.asarray(image).shape[0], 0)
        for place in line:
            place.imshow(image, cmap="gray", extent=size)
            place.set(xticks=[], yticks=[])
            place.grid(visible=False)
        line[0].set_ylabel(name, fontsize=8)
        for place, kind in zip(line[1:], kinds, strict=True):
            low, high = ranges[kind]
            drawn = place.imshow(maps[kind], cmap=UNSIGNED, vmin=low, vmax=high, alpha=0.7, extent=size)
            place.set_title(kind if number == 0 else "", fontsize=9)
            if number == len(rows) - 1:
                figure.colorbar(drawn, ax=place, orientation="horizontal", fraction=0.06)
    figure.suptitle(title)
    return figure


def side_by_side(panels: Mapping[str, Curves], x: str, y: str, *, ticks: Mapping[int, str] | None = None) -> Figure:
    """Draws several sets of lines beside each other, on one vertical scale; means over repetitions.

    Args:
        panels: title -> lines.
        x: label of the horizontal axes.
        y: label of the vertical axis.
        ticks: names of places on the horizontal axes, where they are no numbers.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(6.4, 3.6 * len(panels)), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for place, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, repetitions in curves.items():
            means = np.mean(np.asarray(repetitions, dtype=float), axis=0)
            place.plot(means, label=name, marker="o" if ticks else None, linewidth=1)
        place.set(title=title, xlabel=x)
        if ticks:
            place.set_xticks(list(ticks), list(ticks.values()))
    axes[0, 0].set_ylabel(y)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def delivery_diagram(rows: Sequence[tuple[str, str]], readout: str, title: str, path: Path) -> None:
    """Draws the network as a column of boxes, bottom up, and beside each what it receives (Fig. 3).

    Args:
        rows: place and what it receives, as `mpvg.delivery.describe` gives them.
        readout: how the tokens become one vector.
        title: above the column.
        path: file to write; its ending chooses the format.

    Raises:
        ValueError: the ending is none that can be written.
    """
    boxes = [*rows, (readout, "-"), ("head", "-")]
    figure, axes = plt.subplots(figsize=(5.2, 0.42 * len(boxes) + 0.6), layout="constrained")
    for height, (place, received) in enumerate(boxes):
        served = received != "-"
        colour = "#dbe9f6" if served else "#f2f2f2"
        axes.text(
            0, height, place, ha="center", va="center", bbox={"boxstyle": "round,pad=0.3", "fc": colour, "ec": "#888"}
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


def save(figure: Figure, *paths: Path) -> None:
    """Writes a figure to files, whose endings choose the format, and closes it; same figure, same bytes."""
    for path in paths:
        dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
        figure.savefig(path, dpi=150, metadata={dated: None} if dated else None)
    plt.close(figure)
