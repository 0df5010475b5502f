"""The figures of a report, as PNG for the page and as PDF for a paper."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpvg.analysis.findings import AnalyzedRun, RunsByConfig, layer_names
from mpvg.analysis.probe import LAST
from mpvg.analysis.sensitivity import KINDS, Sensitivity
from mpvg.data import DataInfo, denormalize

IMAGES_IN_FIG7 = 3
"""Number of sample images in the file of Fig. 7; the page has all of them."""
R_SPAN = 0.4
"""Least height of an axis of correlations, so that differences of a few hundredths look small."""


def draw(groups: RunsByConfig, folder: Path) -> dict[str, Path]:
    """Draws all figures for which there are findings; returns name -> PNG file, with a PDF next to each."""
    from mpvg import figures

    drawn = {"fig4": _correlations(groups), "parts": _parts(groups), "fig6": _last_norm(groups)}
    for number, (name, members) in enumerate(groups.items()):
        slug = re.sub(r"[^\w.-]+", "-", members[0].name)
        drawn[f"fig2-{number}-{slug}"] = _heatmaps(name, members[0])
    if rows := _token_cosines(groups):
        drawn["fig6-rows"] = rows
    if norms := _norms(groups):
        drawn["fig7"] = norms
    drawn |= _pe(groups) | _sensitivity(groups)
    pictures = {}
    for name, figure in drawn.items():
        pictures[name] = folder / f"{name}.png"
        figures.save(figure, pictures[name], folder / f"{name}.pdf")
    return pictures


def to_rgb(image: Tensor, info: DataInfo) -> NDArray[Any]:
    """The pixels of an image `(C, H, W)` without the normalization, `(H, W, 3)` in [0, 1]."""
    pixels = denormalize(image, info).clamp(0, 1).permute(1, 2, 0).numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def norm_map(norms: ArrayLike) -> NDArray[Any]:
    """The norms of patches `(N,)` as a square map."""
    values = np.asarray(norms)
    side = round(len(values) ** 0.5)
    return values.reshape(side, side)


def _correlations(groups: RunsByConfig) -> Any:
    from mpvg import figures

    curves: dict[str, list[list[float]]] = {}
    for name, members in groups.items():
        curves[name] = [[layer.r.value for layer in member.trained.places] for member in members]
    controls = {
        f"{name}, untrained": [[p.r.value for p in m.untrained.places] for m in groups[name]] for name in groups
    }
    ticks = dict(enumerate(layer_names(groups)))
    title = "Correlation of tokens and position embedding"
    return figures.lines(
        curves | controls,
        title,
        "layer",
        "r(mean token, PE)",
        ticks=ticks,
        controls={f"{name}, untrained": name for name in groups},
        span=R_SPAN,
        include=(0,),
    )


def _parts(groups: RunsByConfig) -> Any:
    from mpvg import figures

    labels = {"r": "r", "r_constant": "r of the constant parts", "r_positional": "r of the positional parts"}
    panels = {
        name: {
            label: [[getattr(place, field).value for place in one.trained.places] for one in members]
            for field, label in labels.items()
        }
        for name, members in groups.items()
    }
    ticks = dict(enumerate(layer_names(groups)))
    return figures.side_by_side(panels, "layer", "r(mean token, PE)", ticks=ticks, span=R_SPAN, include=(0,))


def _heatmaps(name: str, one: AnalyzedRun) -> Any:
    from mpvg import figures

    r = {layer.name: layer.r.value for layer in one.trained.places}
    panels = [
        figures.Panel(
            name=stats.name if stats.name == LAST else f"layer {stats.name}",
            tokens=(stats.after.sum(dim=0) / one.result.counts.sum()).numpy(),
            pe=stats.pe.numpy(),
            r=r[stats.name],
            delivered=stats.delivered,
        )
        for stats in one.result.layers
        if stats.pe is not None
    ]
    return figures.heatmaps(panels, f"Mean token after the LN, and the PE: {name}, seed {one.run.config.seed}")


def _last_norm(groups: RunsByConfig) -> Any:
    from mpvg import figures

    panels = {}
    for name, members in groups.items():
        last = members[0].trained.last
        lines = {kind: [values] for kind, values in last.channels.items()}
        panels[f"{name}\nvar(beta) {last.beta_variance:.3g}"] = lines
    return figures.side_by_side(panels, "channel", "Last LN")


def _token_cosines(groups: RunsByConfig) -> Any:
    from mpvg import figures

    rows = {name: [m.trained.last.rows for m in members] for name, members in groups.items()}
    known = {name: [row for row in repetitions if row is not None] for name, repetitions in rows.items()}
    panels = {name: {"tokens": repetitions} for name, repetitions in known.items() if repetitions}
    if not panels:
        return None
    return figures.side_by_side(panels, "token", "cosine before and after the Last LN", span=0.2, include=(1,))


def _norms(groups: RunsByConfig) -> Any:
    from mpvg import figures

    rows = []
    for number in range(IMAGES_IN_FIG7):
        for name, members in groups.items():
            one = members[0]
            if number < len(one.result.samples):
                sample = one.result.samples[number]
                maps = {"before the Last LN": norm_map(sample.before), "after it": norm_map(sample.after)}
                rows.append((name, to_rgb(sample.image, one.run.info), maps))
    return figures.norm_maps(rows, "Norms of the tokens") if rows else None


def _pe(groups: RunsByConfig) -> dict[str, Any]:
    from mpvg import figures

    ticks = dict(enumerate(layer_names(groups)))
    rank = {n: [[p.pe_rank for p in m.trained.places] for m in members] for n, members in groups.items()}
    lowest = {n: [[p.pe_spectrum[0] for p in m.trained.places] for m in members] for n, members in groups.items()}
    return {
        "pe-rank": figures.lines(
            rank, "Effective rank of the PE", "layer", "effective rank", ticks=ticks, include=(0,)
        ),
        "pe-frequency": figures.lines(
            lowest,
            "Lowest frequency of the PE",
            "layer",
            "share of power at one cycle per image",
            ticks=ticks,
            percent=True,
            include=(0,),
        ),
    }


def _sensitivity(groups: RunsByConfig) -> dict[str, Any]:
    from mpvg import figures

    measured = {name: [m.sensitivity for m in members if m.sensitivity is not None] for name, members in groups.items()}
    measured = {name: repetitions for name, repetitions in measured.items() if repetitions}
    if not measured:
        return {}
    drawn = {}
    if any(one.importance for several in measured.values() for one in several):
        drawn["importance"] = _importance(measured, layer_names(groups))
    for key, title, x, y in (
        ("translation", "Predictions unchanged by a shift", "pixels", "share of images"),
        ("resolutions", "Other image sizes", "side of the image, pixels", "accuracy"),
    ):
        values = {name: [getattr(m, key) for m in members] for name, members in measured.items()}
        steps = sorted(next(iter(values.values()))[0])
        curves = {n: [[_or_nan(one.get(step)) for step in steps] for one in several] for n, several in values.items()}
        ticks = {i: str(step) for i, step in enumerate(steps)}
        drawn[key] = figures.lines(curves, title, x, y, ticks=ticks, percent=True)
    return drawn


def _importance(measured: Mapping[str, Sequence[Sensitivity]], layers: Sequence[str]) -> Any:
    from mpvg import figures

    names = [
        name for name in layers if any(name == p.name for several in measured.values() for p in several[0].importance)
    ]

    def curve(one: Sensitivity, kind: str, score: str) -> list[float]:
        changes = {place.name: getattr(place, kind) for place in one.importance}
        scale = 100 if score == "accuracy" else 1
        return [_or_nan(None if changes.get(n) is None else scale * getattr(changes[n], score)) for n in names]

    def panels(score: str) -> dict[str, Any]:
        return {
            name: {words: [curve(one, kind, score) for one in several] for kind, words in KINDS.items()}
            for name, several in measured.items()
            if several[0].importance
        }

    return figures.side_by_side(
        panels("accuracy"),
        "layer",
        "change of accuracy, percentage points",
        ticks=dict(enumerate(names)),
        span=5,
        include=(0,),
        below=("change of NLL, nats", panels("nll")),
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
