"""Small data sets in the layouts of COCO and ADE20K."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Json = dict[str, Any]
WIDTH, HEIGHT = 48, 40


def polygon(left: float, top: float, width: float, height: float) -> list[float]:
    """A rectangle's corners."""
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(id: int, image: int, category: int, box: tuple[float, float, float, float], **other: Any) -> Json:
    """A rectangle, as left, top, width, height, with its polygon."""
    usual = {"area": box[2] * box[3], "iscrowd": 0, "segmentation": [polygon(*box)]}
    return {"id": id, "image_id": image, "category_id": category, "bbox": list(box), **usual, **other}


def content(images: int = 3) -> Json:
    """An annotation file: image 10 * k has k objects; ids of categories have gaps."""
    return {
        "info": {"year": 2017, "contributor": "nobody"},
        "licenses": [],
        "images": [
            {"id": 10 * k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in range(1, images + 1)
        ],
        "annotations": [
            annotation(100 * k + n, 10 * k, (7, 2, 90)[n % 3], (2.5 + 3 * n, 4 + k, 20.25, 12))
            for k in range(1, images + 1)
            for n in range(k)
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}, {"id": 7, "name": "train"}],
    }


def write_coco(root: Path, train: Json | None = None, val: Json | None = None) -> Path:
    """Writes annotations, and the images that `content` has."""
    (root / "annotations").mkdir(parents=True)
    for name, values in (("train2017", train or content()), ("val2017", val or content(2))):
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(values))
        (root / name).mkdir()
        for number in (1, 2, 3):
            write_image(root / name / f"{number}.png", seed=number)
    return root


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> None:
    """Writes a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def changed(values: Json, list: str, number: int, **other: Any) -> Json:
    """The file with other values in a record."""
    values = copy.deepcopy(values)
    values[list][number] |= other
    return values


def write_ade20k(root: Path, classes: int = 4, sizes: tuple[tuple[int, int], ...] = ((40, 48), (64, 32))) -> Path:
    """Images (h, w) of each split and label maps with the labels 0 to `classes`."""
    for split, stem in (("training", "ADE_train"), ("validation", "ADE_val")):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number, (height, width) in enumerate(sizes):
            write_image(root / "images" / split / f"{stem}_{number}.jpg", width, height, number)
            rows, columns = np.indices((height, width))
            labels = ((rows // 8 + columns // 8 + number) % (classes + 1)).astype(np.uint8)
            Image.fromarray(labels).save(root / "annotations" / split / f"{stem}_{number}.png")
    return root
