"""The charts of a review, drawn with matplotlib."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mpvg.figures import COLORS, MARKERS, UNSIGNED, with_settings
from mpvg.tasks.review import Chart, Curves, Matrix, Reliability

NAMED = 30
"""Classes up to which a confusion matrix has their names."""
_DIAGONAL = {"color": COLORS[7], "linestyle": "--", "linewidth": 1}


@with_settings
def draw(chart: Chart) -> Figure:
    """Draws a chart of `mpvg.tasks.review`.

    Raises:
        KeyError: it is of another kind.
    """
    return _DRAWN[type(chart)](chart)


def _draw_matrix(chart: Matrix) -> Figure:
    totals = chart.counts.sum(axis=1, keepdims=True)
    shares = np.divide(chart.counts, totals, out=np.zeros(chart.counts.shape), where=totals > 0)
    few = len(chart.class_names) <= NAMED
    side = 2.4 + (0.28 * len(chart.class_names) if few else 5.0)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap=UNSIGNED, vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    axes.set(xlabel="prediction", ylabel="target", title=chart.title)
    places = range(len(chart.class_names))
    if few:
        axes.set_xticks(places, chart.class_names, rotation=90)
        axes.set_yticks(places, chart.class_names)
    figure.colorbar(image, ax=axes, label="% of the target's images", fraction=0.046, pad=0.02)
    return figure


def _draw_reliability(chart: Reliability) -> Figure:
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    above.plot([0, 100], [0, 100], **_DIAGONAL)
    above.plot(100 * np.array(chart.confidence), 100 * np.array(chart.accuracy), marker="o", linestyle="-")
    above.set(ylabel="right, %", ylim=(-3, 103), title=chart.title)
    bins = len(chart.counts)
    below.bar((np.arange(bins) + 0.5) * 100 / bins, chart.counts, width=90 / bins, color=COLORS[0])
    below.set(xlabel="probability of the predicted class, %", ylabel="images", xlim=(-3, 103))
    return figure


def _draw_curves(chart: Curves) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(chart.lines.items()):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(chart.x_values, values, label=name, marker=marker, markevery=10, markersize=4)
    axes.set(xlabel=chart.x, ylabel=chart.y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=chart.title)
    figure.legend(loc="outside right upper")
    return figure


_DRAWN: dict[type[Chart], Callable[[Any], Figure]] = {
    Matrix: _draw_matrix,
    Reliability: _draw_reliability,
    Curves: _draw_curves,
}
