"""report.html: a single file that contains everything and loads nothing."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from mpvg.analysis.comparison import MIN_SEEDS, compare
from mpvg.analysis.drawing import IMAGES_IN_FIG7, R_SPAN, norm_map, to_rgb
from mpvg.analysis.findings import Findings, RunsByConfig, without_nan
from mpvg.analysis.sentences import mean_over_seeds, value_at
from mpvg.analysis.tables import comparison_table, correlation_table, parts_table, replacement_table
from mpvg.pages import embedded, figure, fill
from mpvg.runs.environment import made_with

TEMPLATE = Path(__file__).with_name("page.html")


def render(
    groups: RunsByConfig,
    sentences: Mapping[str, Sequence[str]],
    problems: Mapping[str, str],
    pictures: Mapping[str, Path],
    *,
    title: str,
    weights: str,
    front: str,
) -> str:
    """Fills the template.

    Args:
        groups: name of a config -> its runs.
        sentences: name of a config -> the findings in words.
        problems: run -> why it could not be analyzed.
        pictures: name of a figure -> its PNG file.
        title: title of the page.
        weights: which weights were analyzed, in words.
        front: HTML between the table of the runs and the findings.
    """
    from plotly.offline import get_plotlyjs

    missing = {f"{one.name}: {text}" for members in groups.values() for one in members for text in one.trained.missing}
    members = [f"{one.name} on {one.run.config.data}" for several in groups.values() for one in several]
    made = f"{', '.join(members)}; weights: {weights}. {made_with()}"
    compared = compare(groups)
    others = {name: path for name, path in pictures.items() if name not in (*_INTERACTIVE, *_PLACED)}
    parts = {
        "title": escape(title),
        "comparison": comparison_table(compared),
        "min-seeds": str(MIN_SEEDS),
        "front": front,
        "sentences": "".join(
            f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
            for name, texts in sentences.items()
        ),
        "problems": _problems(f"{run}: {why}" for run, why in problems.items()),
        "missing": _problems(sorted(missing)),
        "table": correlation_table(groups),
        "parts-table": parts_table(groups),
        "replacements": _replacements(groups, pictures),
        "figures": "".join(_figure(name, path) for name, path in others.items()),
        "charts": _json(_charts(groups)),
        "norms": _json(_norms(groups)),
        "plotly": get_plotlyjs(),
        "made": escape(made),
    }
    parts |= {name: _figure(name, pictures[name], "static") if name in pictures else "" for name in _INTERACTIVE}
    parts["parts"] = _figure("parts", pictures["parts"]) if "parts" in pictures else ""
    return fill(TEMPLATE, parts)


_INTERACTIVE = ("fig4", "fig6", "fig7")
"""Figures that are interactive on the screen; their files are shown in print, and without JavaScript."""
_PLACED = ("parts", "importance")
"""Other figures that have their place in the page; the rest is shown at its end."""
_CAPTIONS = {
    "fig2": "The mean token of each layer after its LN, and the PE that it is compared with, patches by channels. One "
    "scale per row. As in Figs. 2 and 8 of the paper.",
    "fig4": "r of each layer and the Last LN: mean over seeds and their range; dashed: before training. As in "
    "Fig. 4 of the paper.",
    "parts": "r of each layer and the Last LN, and r of its two parts; mean over seeds.",
    "fig6": "Weight (gamma) and bias (beta) of the Last LN, per channel. As in Fig. 6 of the paper.",
    "fig6-rows": "Cosine similarity of every token before and after the Last LN; mean over images. The class token, if "
    "there is one, comes first. As in Fig. 6 of the paper.",
    "fig7": f"Norms of the tokens of the first {IMAGES_IN_FIG7} images, before and after the Last LN. As in Fig. 7 of "
    "the paper.",
    "pe-rank": "Effective rank of the PE of each layer: how many directions it uses.",
    "pe-frequency": "Share of the PE's power at one cycle per image: how smooth it is.",
    "importance": "Change of accuracy and of NLL when one layer, or the Last LN, receives something else than its PE; "
    "mean over seeds.",
    "translation": "Share of images whose predicted class stays the same when the image is shifted by some pixels, "
    "over four directions.",
    "resolutions": "Accuracy at other image sizes: images are resized, the PE is resampled, other weights are kept.",
}


_REPLACEMENTS = """<h2>What changes if one layer receives another PE</h2>
<p>Change of accuracy, in points, and of NLL, in nats, on the same images, if one layer or the Last LN receives
something else than its PE: nothing (removed); the mean over patches of its PE, at every patch; the PE of its neighbor,
the next place or, if that has another shape, the previous one; the rows of its PE at other patches; noise with the
mean and the standard deviation of its PE in each channel. Permutation and noise are fixed. Class token and registers
keep their rows.</p>
<p>Removal alone cannot tell what a PE does as a position code from what it does as a bias: it takes away both. The
other four leave the bias, or about the same, in place.</p>
"""


def _replacements(groups: RunsByConfig, pictures: Mapping[str, Path]) -> str:
    table = replacement_table(groups)
    picture = _figure("importance", pictures["importance"]) if "importance" in pictures else ""
    return f"{_REPLACEMENTS}{picture}{table}" if table else ""


def _problems(texts: Iterable[str]) -> str:
    return "".join(f'<p class="problem">{escape(text)}</p>' for text in texts)


def _figure(name: str, path: Path, kind: str = "") -> str:
    caption = _CAPTIONS[name if name in _CAPTIONS else name.split("-")[0]]
    return figure(path, caption, f"{caption} Also as {path.stem}.pdf.", id=name, kind=kind)


_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
"""plotly's names of figures.MARKERS."""


def _charts(groups: RunsByConfig) -> dict[str, Any]:
    """Data and layout of the interactive charts, as plotly.js expects them; "color" is an index of the palette."""
    from mpvg.figures import COLORS, DARK_COLORS, value_range

    lines: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for number, (config, members) in enumerate(groups.items()):
        name = escape(config)  # plotly takes names for HTML
        places = [escape(layer.name) for layer in members[0].trained.places]
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        symbols = [symbol if layer.delivered else f"{symbol}-open" for layer in members[0].trained.places]
        for trained, dash, label in ((True, "solid", name), (False, "dash", f"{name}, untrained")):
            values = [mean_over_seeds(members, value_at(index), trained) for index in range(len(places))]
            above = [0.0 if v.interval is None else v.interval.high - v.value for v in values]
            below = [0.0 if v.interval is None else v.value - v.interval.low for v in values]
            lines.append(
                {
                    "x": places,
                    "y": [v.value for v in values],
                    "name": label,
                    "color": number,
                    "mode": "lines+markers",
                    "line": {"dash": dash},
                    "marker": {"symbol": symbols, "size": 8},
                    "error_y": {"type": "data", "array": above, "arrayminus": below, "thickness": 1},
                }
            )
        curves = members[0].trained.last.channels
        for (kind, channel_values), dash in zip(curves.items(), ("dot", "solid", "dash"), strict=False):
            line = {"dash": dash, "width": 1.5}
            last.append(
                {"y": channel_values, "name": f"{kind}, {name}", "color": number, "mode": "lines", "line": line}
            )
    ends = [
        v + sign * error
        for line in lines
        for sign, key in ((1, "array"), (-1, "arrayminus"))
        for v, error in zip(line["y"], line["error_y"][key], strict=True)
    ]
    r_range, last_range = value_range(ends, R_SPAN, (0,)), value_range([v for line in last for v in line["y"]])
    label = "Correlation r of tokens and position embedding, layer by layer"
    return {
        "palettes": {"light": COLORS, "dark": DARK_COLORS},
        "correlation": {
            "traces": lines,
            "label": label,
            "layout": _layout("layer", "r(mean token, PE)", r_range, category=True),
        },
        "last": {
            "traces": last,
            "label": "Weight and bias of the Last LN, by channel",
            "layout": _layout("channel", "Last LN", last_range),
        },
    }


def _layout(x: str, y: str, y_range: tuple[float, float], *, category: bool = False) -> dict[str, Any]:
    axis = {"title": {"text": x}} | ({"type": "category"} if category else {})
    return {
        "xaxis": axis,
        "yaxis": {"title": {"text": y}, "zeroline": True, "range": y_range},
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top"},
        "margin": {"t": 10, "r": 10, "l": 10, "b": 10},
        "height": 460,
    }


def _norms(groups: RunsByConfig) -> dict[str, Any]:
    """The images of Fig. 7 and the norms of their tokens, of the first run of every config."""
    from mpvg.figures import color_map

    shown = [(name, members[0]) for name, members in groups.items() if members[0].result.samples]
    images: dict[str, list[str]] = {}
    maps_by_run = []
    for name, one in shown:
        key = f"{one.run.config.data} {one.run.info.img_size}"
        samples = one.result.samples
        images.setdefault(key, [embedded_rgb(to_rgb(sample.image, one.run.info)) for sample in samples])
        maps = [{"before": _rounded(sample.before), "after": _rounded(sample.after)} for sample in samples]
        maps_by_run.append({"name": name, "images": key, "maps": maps, "auc": _auc(one.trained)})
    return {"images": images, "runs": maps_by_run, "colors": color_map(steps=9)}


def _auc(findings: Findings) -> str:
    before, after = findings.last.auc_before, findings.last.auc_behind
    if before is None or after is None:
        return "no object masks are known for this data"
    return f"AUC of the norms on the object: {before.value:.3f} before, {after.value:.3f} after (0.5: not separated)"


def _rounded(norms: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in norm_map(norms).tolist()]


def embedded_rgb(pixels: NDArray[Any]) -> str:
    """Pixels `(H, W, 3)` in [0, 1] as the address of a PNG that contains it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype("uint8")).save(file, "PNG")
    return embedded(file.getvalue())


def _json(value: Any) -> str:
    """JSON for a script element; `<` is escaped, so that no name in it can end the script."""
    return json.dumps(without_nan(value), allow_nan=False).replace("<", "\\u003c")
