"""Drawing: the same numbers give the same file; the settings of the calling program are neither used nor changed."""

import inspect
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
