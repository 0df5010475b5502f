"""All drawing: learning curves, correlations, and what receives what."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# The same numbers give the same file: no date, no random identifiers, text as text.
matplotlib.rcParams.update({"svg.hashsalt": "mpvg", "svg.fonttype": "none", "font.size": 10, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})

from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name of a line -> its repetitions (seeds), each a series of values."""


def lines(
    curves: Curves, title: str, x: str, y: str, *, first: int = 0, ticks: Mapping[int, str] | None = None
) -> Figure:
    """Draws the mean of each line over its repetitions, and their range as a band.

    Args:
        curves: the lines; repetitions of one line have the same length.
        title: above the axes.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        first: where the first value stands on the horizontal axis.
        ticks: names of places on the horizontal axis, where they are no numbers.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for name, repetitions in curves.items():
        columns = list(zip(*repetitions, strict=True))
        places = range(first, first + len(columns))
        (line,) = axes.plot(places, [sum(c) / len(c) for c in columns], label=name, marker="o" if ticks else None)
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
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
