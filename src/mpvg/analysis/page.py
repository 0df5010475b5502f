"""report.html: one file with everything in it, which fetches nothing."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from mpvg import runs
from mpvg.analysis.drawing import norm_map, picture
from mpvg.analysis.findings import Findings, Groups, Value, place_names, without_nan
from mpvg.analysis.sentences import over, r_at

TEMPLATE = Path(__file__).with_name("page.html")


def render(
    groups: Groups,
    said: Mapping[str, Sequence[str]],
    problems: Mapping[str, str],
    pictures: Mapping[str, Path],
    *,
    title: str,
    front: str,
) -> str:
    """Fills the page.

    Args:
        groups: the runs, by what they share but for the seed.
        said: group -> its findings in words.
        problems: run -> why it could not be analysed.
        pictures: figures by name.
        title: of the page.
        front: HTML above everything else.
    """
    from plotly.offline import get_plotlyjs

    missing = {f"{one.name}: {text}" for members in groups.values() for one in members for text in one.trained.missing}
    members = [f"{one.name} on {one.run.config.data}" for several in groups.values() for one in several]
    made = f"{', '.join(members)}. Commit {runs.commit()}, {runs.hardware()}, torch {torch.__version__}"
    parts = {
        "title": escape(title),
        "front": front,
        "said": "".join(
            f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
            for name, texts in said.items()
        ),
        "problems": "".join(
            f"<p class=problem>{escape(text)}</p>"
            for text in [*(f"{run}: {why}" for run, why in problems.items()), *sorted(missing)]
        ),
        "table": _table(groups),
        "figures": "".join(_figure(name, path) for name, path in pictures.items() if name not in _INTERACTIVE),
        "charts": _json(_charts(groups)),
        "norms": _json(_norms(groups)),
        "plotly": get_plotlyjs(),
        "made": escape(made),
    }
    # In one pass, so that nothing is looked for in what was filled in.
    return re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], TEMPLATE.read_text())


_INTERACTIVE = ("fig4", "fig6", "fig7")
_CAPTIONS = {
    "fig2": "Figs. 2 and 8: the mean token of each layer behind its LN, and the PE it is compared with, patches by "
    "channels. One scale a row.",
    "fig6-rows": "Fig. 6: cosine similarity of every token before and behind the Last LN, the class token first where "
    "there is one; mean over images.",
    "pe-rank": "Effective rank of the PE at each place: how many directions it uses.",
    "pe-frequency": "Share of the PE's power at one cycle over the image: how smooth it is.",
    "importance": "Change of accuracy once the PE of one place is removed, delivered to other patches, or swapped with "
    "the next place's.",
    "translation": "Share of images that keep their class under a shift by so many pixels, over four directions.",
    "resolutions": "Accuracy at other image sizes, images resized and the PE resampled, weights as they are.",
}


def _figure(name: str, path: Path) -> str:
    caption = _CAPTIONS[name if name in _CAPTIONS else name.split("-")[0]]
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return (
        f'<figure id="{escape(name)}"><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text} Also as {escape(path.stem)}.pdf.</figcaption></figure>"
    )


def _table(groups: Groups) -> str:
    names = place_names(groups)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, members in groups.items():
        for kind, trained in (("", True), (", untrained", False)):
            known = len(members[0].trained.places)
            cells = "".join(
                f"<td>{_cell(over(members, r_at(at), trained)) if at < known else '-'}</td>" for at in range(len(names))
            )
            rows.append(f"<tr><td>{escape(name + kind)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>r</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: Value) -> str:
    if value.interval is None:
        return f"{value.value:+.2f}"
    return f"{value.value:+.2f}<br><small>{value.interval.low:+.2f} to {value.interval.high:+.2f}</small>"


def _charts(groups: Groups) -> dict[str, Any]:
    """Data and layout of the charts with values under the pointer, as plotly.js takes them."""
    from mpvg.figures import COLOURS

    lines, last = [], []
    for number, (name, members) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place.name for place in members[0].trained.places]
        for trained, dash, label in ((True, "solid", name), (False, "dash", f"{name}, untrained")):
            values = [over(members, r_at(at), trained) for at in range(len(places))]
            bars = [0.0 if v.interval is None else v.interval.high - v.value for v in values]
            below = [0.0 if v.interval is None else v.value - v.interval.low for v in values]
            lines.append(
                {
                    "x": places,
                    "y": [v.value for v in values],
                    "name": label,
                    "mode": "lines+markers",
                    "line": {"color": colour, "dash": dash},
                    "error_y": {"type": "data", "array": bars, "arrayminus": below, "thickness": 1, "color": colour},
                }
            )
        curves = members[0].trained.last.channels
        for (kind, channel_values), dash in zip(curves.items(), ("dot", "solid", "dash"), strict=False):
            label = f"{kind}, {name}"
            last.append(
                {
                    "y": channel_values,
                    "name": label,
                    "mode": "lines",
                    "line": {"color": colour, "dash": dash, "width": 1},
                }
            )
    return {
        "correlation": {"data": lines, "layout": _layout("layer", "r(mean token, PE)", category=True)},
        "last": {"data": last, "layout": _layout("channel", "Last LN")},
    }


def _layout(x: str, y: str, *, category: bool = False) -> dict[str, Any]:
    axis = {"title": {"text": x}} | ({"type": "category"} if category else {})
    return {
        "xaxis": axis,
        "yaxis": {"title": {"text": y}, "zeroline": True},
        "legend": {"orientation": "h", "y": -0.25},
        "margin": {"t": 10, "r": 10},
        "height": 460,
    }


def _norms(groups: Groups) -> dict[str, Any]:
    """The images of Fig. 7 and the norms of their tokens, of the first run of each group that has some."""
    shown = [(name, members[0]) for name, members in groups.items() if members[0].collected.picked]
    images: dict[str, list[str]] = {}
    found = []
    for name, one in shown:
        key = f"{one.run.config.data} {one.run.info.img_size}"
        kept = one.collected.picked
        images.setdefault(key, [_png(picture(p, one.run.info)) for p in kept])
        maps = [{"before": _rounded(p.before), "behind": _rounded(p.behind)} for p in kept]
        auc = _auc(one.trained)
        found.append({"name": name, "images": key, "maps": maps, "auc": auc})
    return {"images": images, "runs": found}


def _auc(findings: Findings) -> str:
    before, behind = findings.last.auc_before, findings.last.auc_behind
    if before is None or behind is None:
        return "where the object is is not known for this data"
    return f"norms find the object with AUC {before.value:.3f} before and {behind.value:.3f} behind (0.5: not at all)"


def _rounded(norms: Any) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in norm_map(norms).tolist()]


def _png(pixels: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype("uint8")).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _json(value: Any) -> str:
    """JSON that may stand inside a script: no name in it can end the script."""
    return json.dumps(without_nan(value), allow_nan=False).replace("<", "\\u003c")
