"""Drawing: the same numbers give the same file; the settings of the calling program are neither used nor changed."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mpvg import figures


def settings() -> dict[str, object]:
    """All of matplotlib's settings, read without asking for the backend, which would choose one."""
    return {name: matplotlib.rcParams._get(name) for name in matplotlib.rcParams}


def draw_all(folder: Path) -> dict[str, bytes]:
    """Every kind of figure, in the formats that are used; name of the file -> its bytes."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    image, maps = np.ones((4, 4, 3)), {"before": np.eye(2), "after": np.ones((2, 2)) - np.eye(2)}
    curves = {"a": [[1.0, 2.0, 4.0], [2.0, 3.0, 3.0]], "a, untrained": [[0.0, 1.0, 0.0]]}
    panels = [figures.Panel(str(n), noise[0, n], noise[1, n], 0.5, n > 0) for n in range(3)]
    drawn = {
        "lines": figures.lines(curves, "title", "x", "y", controls={"a, untrained": "a"}),
        "ticks": figures.lines(curves, "title", "x", "y", ticks={0: "0", 1: "1", 2: "Last LN"}),
        "heatmaps": figures.heatmaps(panels, "title"),
        "norm_maps": figures.norm_maps([("a", image, maps), ("b", image, maps)], "title"),
        "side_by_side": figures.side_by_side({"left": curves, "right": curves}, "x", "y"),
    }
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.svg")
    figures.save(drawn["lines"], folder / "lines.png", folder / "lines.pdf")
    for suffix in ("png", "svg"):
        figures.delivery_diagram([("layer 0", "-"), ("layer 1", "pos_1")], "mean", "title", folder / f"net.{suffix}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_settings_of_the_caller_are_neither_used_nor_changed(tmp_path: Path) -> None:
    expected = draw_all(tmp_path / "default")
    assert len(expected) == 9
    own = {
        "font.size": 23.0,
        "axes.grid": False,
        "savefig.facecolor": "black",
        "svg.hashsalt": "own",
        "lines.marker": "x",
    }
    own |= {"figure.dpi": 37.0, "savefig.bbox": "tight", "xtick.labelsize": 3.0, "image.origin": "lower"}
    with matplotlib.rc_context(own):
        before = settings()
        found = draw_all(tmp_path / "own")
        assert settings() == before
    assert [name for name in expected if found[name] != expected[name]] == []


LONG = "deit_tiny_patch16_224 mpvg, lr 0.001, weight_decay 0.05, 300 epochs"
NAMES = {
    "two": ["gap", "mpvg"],
    "many": [f"run {number}" for number in range(12)],
    "long": [f"{LONG}, seed {number}" for number in range(5)],
    "very long": ["x" * 150, "/a/folder" * 15, f"{LONG} and so on, " * 2],
    "unlike words": ["_hidden", "$x_1", "a $y$ b", "\\frac{", "two\nlines", "100 %", "é, ü"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", ["lines", "side_by_side"])
def test_nothing_of_a_figure_is_cut_off(names: list[str], kind: str, tmp_path: Path) -> None:
    """All that is drawn is within the figure, every name is in the legend in full, and the curves keep their room."""
    curves = {name: [[0.5, 0.6, 0.7]] for name in names}
    if kind == "lines":
        figure = figures.lines(curves, names[-1], "epoch", "accuracy", percent=True)
    else:
        figure = figures.side_by_side({names[-1]: curves, "b": curves}, "x", names[0][:60])
    figures.save(figure, tmp_path / "figure.png")  # lays it out
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width
    assert 0 <= drawn.y0 < drawn.y1 <= height
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [re.sub(r"\s", "", text) for text in shown] == [re.sub(r"\s", "", name) for name in names]
    assert all(axes.bbox.height / figure.dpi > 1.4 for axes in figure.axes)


def test_the_legend_has_the_lines_of_all_panels() -> None:
    """MPVG has a line that GAP has not; a name has one color."""
    first = {"gamma": [[1.0, 1.0]], "beta": [[0.0, 0.0]]}
    figure = figures.side_by_side({"gap": first, "mpvg": {"shift": [[0.5, 0.4]], **first}}, "channel", "Last LN")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gamma", "beta", "shift"]
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert all(colors[1][name] == color for name, color in colors[0].items())
    assert len(set(colors[1].values())) == 3


@pytest.mark.parametrize("color", figures.COLORS)
def test_colors_can_be_seen(color: str) -> None:
    assert contrast(color, "#ffffff") >= 3


@pytest.mark.parametrize("color", figures.DARK_COLORS)
def test_dark_colors_can_be_seen(color: str) -> None:
    assert contrast(color, "#14171a") >= 3


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_lines_can_be_told_apart_beyond_the_number_of_colors() -> None:
    figure = figures.lines({str(number): [[1.0, 2.0]] for number in range(20)}, "title", "x", "y")
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 20


@pytest.mark.parametrize("values", [[0.9001, 0.9002, 0.9], [0.5, 0.5], [0.0, 0.0], [1.0], [float("nan"), 0.3]])
def test_small_differences_do_not_fill_an_axis(values: list[float]) -> None:
    low, high = figures.lines({"a": [values]}, "title", "epoch", "accuracy", percent=True).axes[0].get_ylim()
    assert high - low >= 0.05
    known = [value for value in values if value == value]
    assert low < min(known) <= max(known) < high


@pytest.mark.parametrize("scale", [1e-6, 1.0, -3.0, 1e6])
def test_an_axis_is_at_least_a_tenth_of_what_it_shows(scale: float) -> None:
    low, high = figures.value_range([scale, scale * 1.001])
    assert high - low >= 0.1 * abs(scale)
    low, high = figures.value_range([scale, scale * 5], include=(0,))
    assert min(scale * 5, 0) - abs(scale) < low < min(scale * 5, 0)
    assert max(scale * 5, 0) < high < max(scale * 5, 0) + abs(scale)
    assert figures.value_range([0.1, 0.2], span=2.0)[1] - figures.value_range([0.1, 0.2], span=2.0)[0] >= 2.0


def test_shares_are_shown_in_percent(tmp_path: Path) -> None:
    figure = figures.lines({"a": [[0.25, 0.75]]}, "title", "epoch", "accuracy", percent=True)
    figures.save(figure, tmp_path / "a.svg")
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(ticks) > 3
    assert all(tick.endswith(" %") for tick in ticks)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.25, 0.75]


def test_a_single_epoch_can_be_seen() -> None:
    (line,) = figures.lines({"a": [[0.5]]}, "title", "epoch", "accuracy").axes[0].lines
    assert line.get_marker() not in (None, "None")


def test_settings_are_restored_after_an_error() -> None:
    before = settings()
    with pytest.raises(ValueError, match="zip"):
        figures.lines({"a": [[1.0, 2.0], [1.0]]}, "title", "x", "y")
    assert settings() == before


@pytest.mark.parametrize("backend", ["svg", None])
def test_importing_and_drawing_leave_matplotlib_as_it_was(tmp_path: Path, backend: str | None) -> None:
    """None: no backend has been chosen yet, and drawing chooses none; neither is pyplot imported, which would."""
    code = f"""
import sys
from pathlib import Path
import matplotlib
if {backend!r}:
    matplotlib.use({backend!r})
matplotlib.rcParams["font.size"] = 17.0
{inspect.getsource(settings)}
before = settings()
from mpvg import figures
assert settings() == before
figures.save(figures.lines({{"a": [[1.0, 2.0]]}}, "title", "x", "y"), Path(sys.argv[1]))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    file = tmp_path / "lines.png"
    subprocess.run([sys.executable, "-W", "error", "-c", code, file], check=True)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        drawn = figures.lines({"x": [[1, 2, 3], [2, 3, 5]], "y": [[0, 1, 0]]}, "title", "epoch", "accuracy", first=1)
        figures.save(drawn, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{word}<" in text for word in ("title", "epoch", "accuracy", "x", "y"))


def test_repetitions_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        figures.lines({"x": [[1, 2, 3], [2, 3]]}, "title", "epoch", "accuracy")


def test_a_line_shows_the_mean_and_the_range() -> None:
    drawn = figures.lines({"x": [[1, 2], [3, 6]]}, "t", "x", "y", first=1)
    axes = drawn.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [2, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(1, 1), (2, 2), (2, 6), (1, 3)}
