"""The picture of a study: every seed of every arm, the mean and its interval."""

from typing import Any

from matplotlib.figure import Figure

from mpvg.figures import COLORS, with_settings
from mpvg.study.results import SettingResult, StudyResults
from mpvg.tasks import Metric

_ROW, _COLUMN = 0.34, 4.2  # inches


@with_settings
def draw_bars(results: StudyResults) -> Figure:
    """One row of panels for each setting, one panel for each metric, one line for each arm."""
    settings, metrics = results.settings, results.metrics
    heights = [_ROW * len(setting.arms) + 0.9 for setting in settings]
    figure = Figure(figsize=(3.2 + _COLUMN * len(metrics), sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(
        len(settings), len(metrics), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for row, setting in zip(panels, settings, strict=True):
        for axes, (name, metric) in zip(row, metrics.items(), strict=True):
            _draw_panel(axes, setting, name, metric)
    figure.suptitle(f"{results.study.name}, {results.scale}: {results.study.question}")
    return figure


def _draw_panel(axes: Any, setting: SettingResult, name: str, metric: Metric) -> None:
    scale = 100 if metric.percent else 1
    for line, arm in enumerate(setting.arms):
        values = [scale * value for value in arm.values[name]]
        if not values:
            continue
        mean, interval = arm.mean(name)
        axes.plot(values, [line + 0.18] * len(values), linestyle="none", marker="|", color=COLORS[7], markersize=7)
        if interval is not None:
            axes.plot([scale * interval.low, scale * interval.high], [line, line], color=COLORS[0], linestyle="-")
        axes.plot([scale * mean], [line], marker="o", color=COLORS[0])
    axes.set_yticks(range(len(setting.arms)), [arm.label for arm in setting.arms])
    axes.set_ylim(len(setting.arms) - 0.5, -0.5)
    axes.set_xlabel(f"{metric.title}, %" if metric.percent else metric.title)
    axes.set_title(setting.label)
