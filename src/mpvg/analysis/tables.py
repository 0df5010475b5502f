"""The tables of a report, as HTML."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape

from mpvg.analysis.comparison import Compared
from mpvg.analysis.findings import AnalyzedRun, Estimate, RunsByConfig, layer_names
from mpvg.analysis.numbers import estimate_parts
from mpvg.analysis.sensitivity import KINDS
from mpvg.analysis.sentences import change_over_seeds, mean_over_seeds, value_at
from mpvg.pages import table

PARTS = {
    "r_constant": "r_constant",
    "r_positional": "r_positional",
    "covariance_constant": "constant share of the covariance, %",
    "covariance_positional": "positional share of the covariance, %",
    "variance_constant": "constant share of the tokens' variance, %",
    "pe_variance_constant": "constant share of the PE's variance, %",
}
"""Field of LayerFindings -> its name in the table of the two parts."""


def comparison_table(compared: Mapping[str, Compared]) -> str:
    """HTML of the table of the runs: a row per config."""
    first = next(iter(compared))
    head = ["runs", "seeds", "images", "accuracy, %", "each seed, %", "NLL"]
    head += [f"accuracy minus {first}, points", f"NLL minus {first}"] if len(compared) > 1 else []
    rows = []
    for name, one in compared.items():
        images = " ".join(f"{count:,}" for count in dict.fromkeys(score.images for score in one.scores))
        each = " ".join(f"{100 * score.accuracy:.2f}" for score in one.scores)
        cells = [str(len(one.scores)), images, _cell(one.accuracy, scale=100, signed=False), each]
        cells.append(_cell(one.nll, signed=False))
        if len(compared) > 1:
            differences = (one.accuracy_difference, 100), (one.nll_difference, 1)
            cells += ["-" if value is None else _cell(value, scale=scale) for value, scale in differences]
        rows.append((escape(name), cells))
    return table("Accuracy and NLL", head, rows, wide=(3,))


def correlation_table(groups: RunsByConfig) -> str:
    """HTML of r of each layer: a row per config, and one for its untrained networks."""
    names = layer_names(groups)

    def cell(members: Sequence[AnalyzedRun], index: int, *, trained: bool) -> str:
        delivered = members[0].trained.places[index].delivered
        text = _cell(mean_over_seeds(members, value_at(index), trained))
        return text if delivered else f"{text}<br><small>raw PE</small>"

    rows = [
        (escape(name + kind), _by_layer(members, names, partial(cell, members, trained=trained)))
        for name, members in groups.items()
        for kind, trained in (("", True), (", untrained", False))
    ]
    return table("r of each layer", ["r", *names], rows)


def parts_table(groups: RunsByConfig) -> str:
    """HTML of r_constant and r_positional of each layer, before and after training, and of the trained one's shares."""
    names = layer_names(groups)
    rows = []
    for name, members in groups.items():
        for field, label in PARTS.items():
            for kind, trained in (("", True), (", untrained", False)):
                if trained or field.startswith("r_"):
                    cells = _by_layer(members, names, partial(_part_cell, members, field, trained=trained))
                    rows.append((f"{escape(name + kind)}: {label}", cells))
    return table("The two parts of r", ["", *names], rows)


def _part_cell(members: Sequence[AnalyzedRun], field: str, index: int, *, trained: bool) -> str:
    value = mean_over_seeds(members, value_at(index, field), trained)
    if field.startswith("r_"):
        return _cell(value)
    if field.startswith("covariance") and not mean_over_seeds(members, value_at(index), trained).sign:
        return "-"
    return _cell(value, scale=100, signed=False)


def replacement_table(groups: RunsByConfig) -> str:
    """HTML of the changes of accuracy and NLL if a layer receives another PE; "" if they were not measured."""
    measured = {name: [m.sensitivity.importance for m in members if m.sensitivity] for name, members in groups.items()}
    places = {name: [one.name for one in found[0]] for name, found in measured.items() if found and found[0]}
    names = [name for name in layer_names(groups) if any(name in some for some in places.values())]
    rows = []
    for name, own in places.items():
        for kind, words in KINDS.items():
            for score, label, scale in (("accuracy", "accuracy, points", 100), ("nll", "NLL", 1)):
                cells = {}
                for index, place in enumerate(own):
                    change = change_over_seeds(groups[name], index, kind, score)
                    cells[place] = "-" if change is None else _cell(change, scale=scale)
                    if kind == "swapped" and change is not None:
                        cells[place] += f"<br><small>PE of {measured[name][0][index].neighbor}</small>"
                rows.append((f"{escape(name)}: {words}, {label}", [cells.get(place, "-") for place in names]))
    return table("Changes if one layer receives another PE", ["", *names], rows) if names else ""


def _by_layer(members: Sequence[AnalyzedRun], names: Sequence[str], cell: Callable[[int], str]) -> list[str]:
    """The cell of every layer, given its index; "-" for a layer that the network does not have."""
    cells = {place.name: cell(index) for index, place in enumerate(members[0].trained.places)}
    return [cells.get(name, "-") for name in names]


def _cell(estimate: Estimate, *, scale: float = 1, signed: bool = True) -> str:
    value, interval = estimate_parts(estimate, scale=scale, signed=signed)
    return value if interval is None else f"{value}<br><small>{interval}</small>"
