"""The figures of a report as files: PNG to look at, PDF for a paper."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from mpvg.analysis.findings import Analysed, Groups, place_names
from mpvg.analysis.probe import LAST, Picked
from mpvg.data import DataInfo

SHOWN = 3
"""Images of Fig. 7 on paper; the page has all that were kept."""


def draw(groups: Groups, folder: Path) -> dict[str, Path]:
    """Draws all figures that the findings allow; name -> PNG, with a PDF beside each."""
    from mpvg import figures

    drawn = {"fig4": _correlations(groups), "fig6": _last_norm(groups)}
    for number, members in enumerate(groups.values()):
        slug = re.sub(r"[^\w.-]+", "-", members[0].name)
        drawn[f"fig2-{number}-{slug}"] = _heatmaps(members[0])
    if rows := _rows_kept(groups):
        drawn["fig6-rows"] = rows
    if norms := _norms(groups):
        drawn["fig7"] = norms
    drawn |= _pe(groups) | _beyond(groups)
    pictures = {}
    for name, figure in drawn.items():
        pictures[name] = folder / f"{name}.png"
        figures.save(figure, pictures[name], folder / f"{name}.pdf")
    return pictures


def picture(picked: Picked, info: DataInfo) -> Any:
    """A kept image as it looks, `(H, W, 3)` in [0, 1]."""
    mean, std = (np.asarray(values)[:, None, None] for values in (info.mean, info.std))
    pixels = np.clip(picked.image.numpy() * std + mean, 0, 1).transpose(1, 2, 0)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def norm_map(norms: Any) -> Any:
    """Norms of patches `(N,)` as a square map."""
    side = round(len(norms) ** 0.5)
    return np.asarray(norms).reshape(side, side)


def _correlations(groups: Groups) -> Any:
    from mpvg import figures

    curves: dict[str, list[list[float]]] = {}
    for name, members in groups.items():
        curves[name] = [[place.r.value for place in member.trained.places] for member in members]
    controls = {
        f"{name}, untrained": [[p.r.value for p in m.untrained.places] for m in groups[name]] for name in groups
    }
    ticks = dict(enumerate(place_names(groups)))
    title = "Correlation of tokens and position embedding (Fig. 4)"
    return figures.lines(
        curves | controls,
        title,
        "layer",
        "r(mean token, PE)",
        ticks=ticks,
        controls={f"{name}, untrained": name for name in groups},
    )


def _heatmaps(one: Analysed) -> Any:
    from mpvg import figures

    r = {place.name: place.r.value for place in one.trained.places}
    panels = [
        figures.Panel(
            name=place.name if place.name == LAST else f"layer {place.name}",
            tokens=(place.normed.sum(dim=0) / one.collected.counts.sum()).numpy(),
            pe=place.pe.numpy(),
            r=r[place.name],
            delivered=place.delivered,
        )
        for place in one.collected.places
        if place.pe is not None
    ]
    return figures.heatmaps(panels, f"Mean token behind the LN, and the PE: {one.name} (Figs. 2, 8)")


def _last_norm(groups: Groups) -> Any:
    from mpvg import figures

    panels = {}
    for name, members in groups.items():
        last = members[0].trained.last
        lines = {kind: [values] for kind, values in last.channels.items()}
        panels[f"{name}\nvar(beta) {last.beta_variance:.3g}"] = lines
    return figures.side_by_side(panels, "channel", "Last LN")


def _rows_kept(groups: Groups) -> Any:
    from mpvg import figures

    rows = {name: [m.trained.last.rows for m in members] for name, members in groups.items()}
    known = {name: [row for row in found if row is not None] for name, found in rows.items()}
    panels = {name: {"tokens": found} for name, found in known.items() if found}
    return figures.side_by_side(panels, "token", "cosine before and behind the Last LN") if panels else None


def _norms(groups: Groups) -> Any:
    from mpvg import figures

    rows = []
    for number in range(SHOWN):
        for name, members in groups.items():
            one = members[0]
            if number < len(one.collected.picked):
                kept = one.collected.picked[number]
                maps = {"before the Last LN": norm_map(kept.before), "behind it": norm_map(kept.behind)}
                rows.append((name, picture(kept, one.run.info), maps))
    return figures.norm_maps(rows, "Norms of the tokens (Fig. 7)") if rows else None


def _pe(groups: Groups) -> dict[str, Any]:
    from mpvg import figures

    ticks = dict(enumerate(place_names(groups)))
    rank = {n: [[p.pe_rank for p in m.trained.places] for m in members] for n, members in groups.items()}
    low = {n: [[p.pe_spectrum[0] for p in m.trained.places] for m in members] for n, members in groups.items()}
    return {
        "pe-rank": figures.lines(rank, "Effective rank of the PE", "layer", "effective rank", ticks=ticks),
        "pe-frequency": figures.lines(
            low, "Slowest part of the PE", "layer", "share of power at one cycle an image", ticks=ticks
        ),
    }


def _beyond(groups: Groups) -> dict[str, Any]:
    from mpvg import figures

    found = {name: [m.beyond for m in members if m.beyond is not None] for name, members in groups.items()}
    found = {name: members for name, members in found.items() if members}
    if not found:
        return {}
    drawn = {}
    panels: dict[str, Any] = {}
    longest: list[str] = []
    for name, members in found.items():
        places = [change.name for change in members[0].importance]
        longest = max(longest, places, key=len)
        if places:
            changes = ("removed", "shuffled", "swapped")
            panels[name] = {
                change: [[_or_nan(getattr(i, change)) - m.accuracy for i in m.importance] for m in members]
                for change in changes
            }
    if panels:
        ticks = dict(enumerate(longest))
        drawn["importance"] = figures.side_by_side(panels, "place", "change of accuracy", ticks=ticks)
    for key, title, x, y in (
        ("translation", "Answers kept under a shift", "pixels", "share of images"),
        ("resolutions", "Other image sizes", "side of the image, pixels", "accuracy"),
    ):
        values = {name: [getattr(m, key) for m in members] for name, members in found.items()}
        steps = sorted(next(iter(values.values()))[0])
        curves = {n: [[_or_nan(one.get(step)) for step in steps] for one in several] for n, several in values.items()}
        drawn[key] = figures.lines(curves, title, x, y, ticks={at: str(step) for at, step in enumerate(steps)})
    return drawn


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
