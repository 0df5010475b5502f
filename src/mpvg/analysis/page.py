"""report.html: a single file that contains everything and loads nothing."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mpvg.analysis.drawing import norm_map, to_rgb
from mpvg.analysis.findings import Estimate, Findings, RunsByConfig, layer_names, without_nan
from mpvg.analysis.sentences import mean_over_seeds, r_at
from mpvg.runs.environment import commit, hardware

TEMPLATE = Path(__file__).with_name("page.html")


def render(
    groups: RunsByConfig,
    sentences: Mapping[str, Sequence[str]],
    problems: Mapping[str, str],
    pictures: Mapping[str, Path],
    *,
    title: str,
    front: str,
) -> str:
    """Fills the template.

    Args:
        groups: name of a config -> its runs.
        sentences: name of a config -> the findings in words.
        problems: run -> why it could not be analyzed.
        pictures: name of a figure -> its PNG file.
        title: title of the page.
        front: HTML between the title and the findings.
    """
    from plotly.offline import get_plotlyjs

    missing = {f"{one.name}: {text}" for members in groups.values() for one in members for text in one.trained.missing}
    members = [f"{one.name} on {one.run.config.data}" for several in groups.values() for one in several]
    made = f"{', '.join(members)}. Commit {commit()}, {hardware()}, torch {torch.__version__}"
    parts = {
        "title": escape(title),
        "front": front,
        "sentences": "".join(
            f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
            for name, texts in sentences.items()
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
    # In one pass, so that no placeholder is searched for in the parts that were filled in.
    return re.sub(r"<!--(\w+)-->", lambda placeholder: parts[placeholder[1]], TEMPLATE.read_text())


_INTERACTIVE = ("fig4", "fig6", "fig7")
_CAPTIONS = {
    "fig2": "Figs. 2 and 8: the mean token of each layer after its LN, and the PE that it is compared with, patches by "
    "channels. One scale per row.",
    "fig6-rows": "Fig. 6: cosine similarity of every token before and after the Last LN; mean over images. The class "
    "token, if there is one, comes first.",
    "pe-rank": "Effective rank of the PE of each layer: how many directions it uses.",
    "pe-frequency": "Share of the PE's power at one cycle per image: how smooth it is.",
    "importance": "Change of accuracy when the PE of one layer is removed, delivered to other patches, or replaced by "
    "that of the next layer.",
    "translation": "Share of images whose predicted class stays the same when the image is shifted by some pixels, "
    "over four directions.",
    "resolutions": "Accuracy at other image sizes: images are resized, the PE is resampled, other weights are kept.",
}


def _figure(name: str, path: Path) -> str:
    caption = _CAPTIONS[name if name in _CAPTIONS else name.split("-")[0]]
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return (
        f'<figure id="{escape(name)}"><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text} Also as {escape(path.stem)}.pdf.</figcaption></figure>"
    )


def _table(groups: RunsByConfig) -> str:
    names = layer_names(groups)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, members in groups.items():
        for kind, trained in (("", True), (", untrained", False)):
            known = len(members[0].trained.places)
            cells = "".join(
                f"<td>{_cell(mean_over_seeds(members, r_at(index), trained)) if index < known else '-'}</td>"
                for index in range(len(names))
            )
            rows.append(f"<tr><td>{escape(name + kind)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>r</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: Estimate) -> str:
    if value.interval is None:
        return f"{value.value:+.2f}"
    return f"{value.value:+.2f}<br><small>{value.interval.low:+.2f} to {value.interval.high:+.2f}</small>"


def _charts(groups: RunsByConfig) -> dict[str, Any]:
    """Data and layout of the interactive charts, as plotly.js expects them."""
    from mpvg.figures import COLORS

    lines, last = [], []
    for number, (name, members) in enumerate(groups.items()):
        color = COLORS[number % len(COLORS)]
        names = [layer.name for layer in members[0].trained.places]
        for trained, dash, label in ((True, "solid", name), (False, "dash", f"{name}, untrained")):
            values = [mean_over_seeds(members, r_at(index), trained) for index in range(len(names))]
            above = [0.0 if v.interval is None else v.interval.high - v.value for v in values]
            below = [0.0 if v.interval is None else v.value - v.interval.low for v in values]
            lines.append(
                {
                    "x": names,
                    "y": [v.value for v in values],
                    "name": label,
                    "mode": "lines+markers",
                    "line": {"color": color, "dash": dash},
                    "error_y": {"type": "data", "array": above, "arrayminus": below, "thickness": 1, "color": color},
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
                    "line": {"color": color, "dash": dash, "width": 1},
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


def _norms(groups: RunsByConfig) -> dict[str, Any]:
    """The images of Fig. 7 and the norms of their tokens, of the first run of every config."""
    shown = [(name, members[0]) for name, members in groups.items() if members[0].result.samples]
    images: dict[str, list[str]] = {}
    maps_by_run = []
    for name, one in shown:
        key = f"{one.run.config.data} {one.run.info.img_size}"
        samples = one.result.samples
        images.setdefault(key, [_png(to_rgb(sample, one.run.info)) for sample in samples])
        maps = [{"before": _rounded(sample.before), "after": _rounded(sample.after)} for sample in samples]
        maps_by_run.append({"name": name, "images": key, "maps": maps, "auc": _auc(one.trained)})
    return {"images": images, "runs": maps_by_run}


def _auc(findings: Findings) -> str:
    before, after = findings.last.auc_before, findings.last.auc_behind
    if before is None or after is None:
        return "no object masks are known for this data"
    return f"AUC of the norms on the object: {before.value:.3f} before, {after.value:.3f} after (0.5: not separated)"


def _rounded(norms: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in norm_map(norms).tolist()]


def _png(pixels: NDArray[Any]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype("uint8")).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _json(value: Any) -> str:
    """JSON for a script element; `<` is escaped, so that no name in it can end the script."""
    return json.dumps(without_nan(value), allow_nan=False).replace("<", "\\u003c")
