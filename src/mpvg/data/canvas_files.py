"""Writes `canvas` scenes in the layouts of COCO and of ADE20K at once, and tiles as arrays; each once, in a cache."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mpvg.data.canvas_scenes import TILE, Bytes, Level, Scene, Sources, draw_scene
from mpvg.data.rle import encode_mask
from mpvg.data.rules import say_once
from mpvg.data.types import Split
from mpvg.files import cannot_write, remove, temp_path
from mpvg.seeding import derive_seed

VERSION = 1
"""Of what is drawn: a change that gives other pixels raises it."""
SCENES: dict[Split, int] = {"train": 2000, "val": 300}
TILES: dict[Split, int] = {"train": 10_000, "val": 1000}
BACKGROUND = "background"
"""Name of the last class of label maps: a pixel of no object is known to be of none."""
_FOLDERS: dict[Split, str] = {"train": "training", "val": "validation"}


def made_once(cache: Path, name: str, prepare: Callable[[], Callable[[Path], None]]) -> Path:
    """A folder of the cache, which is made where it is not there yet: completely, or not at all.

    Args:
        cache: in which it is.
        name: of the folder.
        prepare: reads what is needed, and returns what fills a new folder.

    Raises:
        OSError: it cannot be written.
    """
    folder = cache / "canvas" / f"{name}-v{VERSION}"
    if folder.is_dir():
        return folder
    fill = prepare()
    say_once(f"{name} is drawn, once, into {folder}")
    temporary = temp_path(folder)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _rename(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)
    return folder


def _rename(temporary: Path, folder: Path) -> None:
    """Gives the folder its name, unless another process was faster."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def write_scenes(
    folder: Path,
    level: Level,
    sources: Mapping[Split, Sources],
    class_names: tuple[str, ...],
    counts: Mapping[Split, int],
) -> None:
    """Draws scenes and writes them, so that both `coco/<folder>` and `ade20k/<folder>` are the same pictures.

    Label maps have 1 to C for the classes and C + 1 for the background; 0, which is no class, does not occur.

    Args:
        folder: which is there.
        level: of the scenes.
        sources: of the objects of each split, of which none may be the same.
        class_names: of the objects, C.
        counts: of scenes of each split.
    """
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in (*class_names, BACKGROUND)), encoding="utf-8")
    for split, count in counts.items():
        scenes = [draw_scene(_generator(split, number), sources[split], level) for number in range(count)]
        for kind in ("images", "annotations"):
            (folder / kind / _FOLDERS[split]).mkdir(parents=True)
        for number, scene in enumerate(scenes):
            name = f"{_FOLDERS[split]}/{number:06d}.png"
            Image.fromarray(scene.image).save(folder / "images" / name, compress_level=1)
            Image.fromarray(_label_map(scene, len(class_names))).save(folder / "annotations" / name)
        content = json.dumps(_coco(scenes, class_names))
        (folder / "annotations" / f"instances_{_FOLDERS[split]}.json").write_text(content, encoding="utf-8")


def _generator(split: Split, number: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed("canvas", VERSION, split, number))


def _label_map(scene: Scene, classes: int) -> Bytes:
    return np.array([classes + 1, *(label + 1 for label in scene.labels)], np.uint8)[scene.objects]


def _coco(scenes: list[Scene], class_names: tuple[str, ...]) -> dict[str, Any]:
    """The scenes of a split as COCO's JSON, with masks as run lengths: digits and bags have holes."""
    images, annotations = [], list[dict[str, Any]]()
    for number, scene in enumerate(scenes):
        height, width = scene.objects.shape
        images.append({"id": number, "file_name": f"{number:06d}.png", "width": width, "height": height})
        for index, label in enumerate(scene.labels):
            mask = scene.objects == index + 1
            columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [int(value) for value in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": encode_mask(mask).decode()},
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_tiles(folder: Path, sources: Mapping[Split, Sources], counts: Mapping[Split, int]) -> None:
    """Draws single objects on 64 x 64 pixels: <split>.npy, (N, 64, 64), and <split>-labels.npy, (N,)."""
    for split, count in counts.items():
        tiles = [draw_scene(_generator(split, number), sources[split], TILE) for number in range(count)]
        np.save(folder / f"{split}.npy", np.stack([tile.image for tile in tiles]))
        np.save(folder / f"{split}-labels.npy", np.array([tile.labels[0] for tile in tiles], np.uint8))


def read_tiles(folder: Path, split: Split) -> "tuple[Bytes, npt.NDArray[np.int64]]":
    """Tiles (N, 64, 64) and their classes (N,).

    Raises:
        ValueError: a file is damaged or missing.
    """
    try:
        images = np.load(folder / f"{split}.npy", allow_pickle=False)
        labels = np.load(folder / f"{split}-labels.npy", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape != (len(labels), TILE.side, TILE.side) or labels.dtype != np.uint8:
            raise ValueError(f"they hold {images.dtype} {images.shape} and {labels.dtype} {labels.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the tiles of {split} in {folder} are damaged ({error}); remove the folder") from error
    return images, labels.astype(np.int64)
