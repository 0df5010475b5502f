"""The names of `canvas`: `coco/canvas` and `ade20k/canvas` are the same scenes, drawn once and read like any others.

    canvas, canvas-easy, canvas-hard                               digits of scikit-learn, on three levels
    canvas-garments, canvas-garments-easy, canvas-garments-hard    garments of Fashion-MNIST

2,000 scenes for training and 300 for validation, whose objects are made from disjoint source images: the training and
the validation images of `digits` and `fashion-mnist`. They are drawn into `canvas/` in `loader.root` or ~/.cache/mpvg.
A folder of one's own with such a name is given as ./canvas.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mpvg.config import RunConfig
from mpvg.data import named_sets
from mpvg.data.canvas_files import SCENES, made_once, write_scenes
from mpvg.data.canvas_scenes import LEVELS, Level
from mpvg.data.types import Split

NAME = "canvas"


def _names() -> dict[str, tuple[str, Level]]:
    found = {}
    for objects in named_sets.CANVAS_OBJECTS:
        for name, level in LEVELS.items():
            found["-".join(part for part in (NAME, objects, name) if part)] = objects, level
    return found


CANVASES: dict[str, tuple[str, Level]] = _names()
"""Name -> what the objects are (see `named_sets.CANVAS_OBJECTS`), and the level."""


def annotated_folder(config: RunConfig, format: str, img_size: int) -> tuple[Path, int]:
    """The folder that `<format>/<folder>` names, drawn first if it is a canvas; and its images' side.

    Args:
        config: of the run.
        format: name of the layout.
        img_size: side of the images that are not a canvas's.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: none is named.
    """
    _, _, given = config.data.partition("/")
    if given in CANVASES:
        return draw_canvas(given, config.loader.root), CANVASES[given][1].side
    what = f"{format}/<folder in its layout> or {', '.join(f'{format}/{name}' for name in CANVASES)}"
    if not given:
        raise ValueError(f"data {config.data!r} names no folder; give {what}")
    if not os.path.isdir(given):
        raise FileNotFoundError(f"data folder {given!r} does not exist; give {what}")
    return Path(given), img_size


def draw_canvas(name: str, root: str | None) -> Path:
    """The folder of a canvas, which is drawn at the first use.

    Args:
        name: one of `CANVASES`.
        root: folder of the cache and of the source images; None: the usual places.

    Raises:
        FileNotFoundError: the source images are missing.
        ModuleNotFoundError: a package that has the source images is not installed.
        OSError: the folder cannot be written.
    """
    objects, level = CANVASES[name]
    splits: tuple[Split, ...] = ("train", "val")

    def prepare() -> Callable[[Path], None]:
        class_names, sources = named_sets.canvas_sources(objects, root, splits)
        return partial(write_scenes, level=level, sources=sources, class_names=class_names, counts=SCENES)

    return made_once(named_sets.cache_folder(root), name, prepare)
