"""Data in COCO's layout: `coco/<folder>`, with annotations/instances_{train,val}*.json and a folder of images for each.

    coco/annotations/instances_train2017.json   coco/train2017/000000000009.jpg
    coco/annotations/instances_val2017.json     coco/val2017/...

There is one file of each split. What follows `instances_` in its name is the folder of its images, either in the data's
folder or in its `images`; where there is none, it is `images` itself. File names in the JSON are relative to it.

Left out, and said once: of training, what MMDetection leaves out too (crowds, objects whose box has a side below one
pixel or whose area is 0, images without objects or with a side below 32 pixels); of both splits, objects with an empty
box or one outside the image. Everything else that is wrong is named, counted and refused; `loader.skip_corrupt` leaves
it out instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpvg.config import RunConfig
from mpvg.data.annotations import Annotations, Columns, Ints, drawing
from mpvg.data.canvas import annotated_folder
from mpvg.data.coco_file import CocoFile, read_coco_file
from mpvg.data.contained import file_sizes
from mpvg.data.findings import Findings
from mpvg.data.folder import Paths
from mpvg.data.images import AnnotatedFiles
from mpvg.data.inventory import CONTENT, Inventory
from mpvg.data.listing import Classes, Listing, check_spelling
from mpvg.data.rle import check_counts, decode_counts
from mpvg.data.rules import Names
from mpvg.data.types import Split

NAME = "coco"
IMG_SIZE = 1024
"""The paper's crop, which a listing gives as the images' side."""
MAX_OBJECTS = 1000
"""In an image; so many masks of a training image take a gigabyte."""
NO_OBJECT = "no object is annotated in the validation images; give a validation set with objects"
_MIN_SIDE = 32
_Bools = npt.NDArray[np.bool_]


def open_coco(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists a data set in COCO's layout; a `Format`.

    Raises:
        FileNotFoundError: a folder or a file of annotations is missing.
        ModuleNotFoundError: polygons need an optional package.
        ValueError: a file is damaged, or what is annotated is not there.
    """
    root, img_size = annotated_folder(config, NAME, IMG_SIZE)
    found = {split: _read(root, split, strict=not config.loader.skip_corrupt) for split in splits}
    categories = {split: one.file.categories for split, one in found.items()}
    names = class_names or _class_names(next(iter(categories.values())))
    check_spelling(names)
    category_ids = _category_ids(categories, names, "the classes of the run" if class_names else "train")
    sources = {split: one.source(names, split) for split, one in found.items()}
    return Listing(
        class_names=names,
        category_ids=category_ids,
        train=sources.get("train"),
        val=sources.get("val"),
        img_size=img_size,
        inventories={split: _inventory(source, found[split]) for split, source in sources.items()},
    )


def _class_names(categories: Mapping[int, str]) -> Classes:
    """Names in the order of the ids, which may have gaps: the targets are 0, 1, 2, ..."""
    return tuple(name for _, name in sorted(categories.items()))


def _category_ids(categories: Mapping[Split, Mapping[int, str]], names: Classes, where: str) -> tuple[int, ...]:
    """The ids of the classes in the files, in the order of the targets; none where a file has not all of them.

    Args:
        categories: of each split, id -> name.
        names: of all classes.
        where: they are from, for errors.
    """
    ids: dict[str, int] = {}
    for split, one in categories.items():
        for number, name in one.items():
            if name not in names:
                cure = (
                    "add its training images, or remove it from val" if where == "train" else "remove it, or train anew"
                )
                raise ValueError(f"category {name!r} is in {split} but not in {where}; {cure}")
            if ids.setdefault(name, number) != number:
                raise ValueError(f"category {name!r} has the id {number} in {split} and {ids[name]} in train; use one")
    return tuple(ids[name] for name in names) if len(ids) == len(names) else ()


@dataclass(frozen=True, eq=False)
class _Found:
    """The annotations of a split and what of them counts."""

    file: CocoFile
    folder: Path
    """Of the images."""
    bytes: Ints
    """Of each image, (N,); -1: there is no such file."""
    good_images: _Bools
    good: _Bools
    """Of each annotation, (A,)."""
    image: Ints
    """Number of the image of each annotation, (A,)."""
    findings: Findings

    def source(self, names: Classes, split: Split) -> AnnotatedFiles:
        """The samples of the split."""
        file = self.file
        keep_images, keep = self.good_images, self.good
        if split == "train":
            keep_images, keep = self._trainable()
        self.findings.report()
        images = np.flatnonzero(keep_images)
        keep = keep & keep_images[self.image]
        if split == "val" and len(images) and not (keep & ~file.crowd).any():
            raise ValueError(NO_OBJECT)
        numbers = np.flatnonzero(keep)
        numbers = numbers[np.argsort(self.image[numbers], kind="stable")]
        new_number = np.cumsum(keep_images) - 1
        targets = Annotations(
            image_ids=file.image_ids[images],
            sizes=file.sizes[images],
            starts=np.searchsorted(new_number[self.image[numbers]], np.arange(len(images) + 1)),
            numbers=numbers,
            columns=_columns(file, names),
        )
        paths = Paths(str(self.folder), Names(file.file_names[index] for index in images.tolist()))
        return AnnotatedFiles(paths, targets)

    def _trainable(self) -> tuple[_Bools, _Bools]:
        """Images and annotations that MMDetection trains on, too."""
        file, drop = self.file, self.findings.leave_out
        good = drop("crowd annotation", "is not trained on", self.good, file.crowd)
        small = (file.boxes[:, 2:] < 1).any(axis=1) | (file.areas <= 0)
        good = drop("annotation", "has a side below 1 pixel or an area of 0", good, small)
        flat: _Bools = file.sizes.min(axis=1) < _MIN_SIDE
        images = drop("image", f"has a side below {_MIN_SIDE} pixels", self.good_images, flat)
        objects = np.bincount(self.image[good], minlength=len(images))
        return drop("image", "has no objects to train on", images, objects == 0), good


def _columns(file: CocoFile, names: Classes) -> Columns:
    ids = np.array(sorted(file.categories), np.int64)
    labels = np.array([names.index(file.categories[number]) for number in ids.tolist()], np.int64)
    boxes = file.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    return Columns(
        boxes=boxes,
        labels=labels[np.searchsorted(ids, file.classes).clip(max=len(ids) - 1)],
        areas=file.areas,
        crowd=file.crowd,
        first_polygons=file.first_polygons,
        polygon_starts=file.polygon_starts,
        coordinates=file.coordinates,
        text_starts=file.text_starts,
        text=file.text,
    )


def _read(root: Path, split: Split, *, strict: bool) -> _Found:
    path, folder = _find(root, split)
    file = read_coco_file(path)
    for what, records in (("image", file.image_ids), ("category", file.categories), ("annotation", file.ids)):
        if not len(records):
            raise ValueError(f"{path} has no {what}; give the annotations of images with objects")
    findings = Findings(str(path), strict=strict)
    order = np.argsort(file.image_ids, kind="stable")
    ids = file.image_ids[order]
    if len(twice := ids[1:][ids[1:] == ids[:-1]]):
        raise ValueError(f"{path}: {len(twice)} images have the id of another (the first: {twice[0]}); give each one")
    bytes = file_sizes(folder, root, file.file_names, str(path))
    good_images = findings.refuse("image", "has no file", np.ones(len(ids), bool), bytes < 0, file.file_names)
    place = np.searchsorted(ids, file.images).clip(max=len(ids) - 1)
    image = order[place]
    crowded = np.bincount(image[ids[place] == file.images], minlength=len(ids)) > MAX_OBJECTS
    many = f"has more than {MAX_OBJECTS:,} annotations"
    good_images = findings.refuse("image", many, good_images, crowded, file.file_names)
    good = np.ones(len(file.ids), bool)
    for what, bad in _problems(file, ids[place] == file.images, file.sizes[image]):
        good = findings.refuse("annotation", what, good, bad, file.ids)
    width, height = file.sizes[image].T
    left, top, right, bottom = *file.boxes[:, :2].T, *(file.boxes[:, :2] + file.boxes[:, 2:]).T
    empty = np.asarray((file.boxes[:, 2:] <= 0).any(axis=1))
    good = findings.leave_out("annotation", "has an empty box", good, empty)
    outside = (left >= width) | (top >= height) | (right <= 0) | (bottom <= 0)
    good = findings.leave_out("annotation", "has a box outside its image", good, outside)
    if len(file.coordinates):
        drawing()  # said now, not by a worker
    return _Found(file, folder, bytes, good_images, good, image, findings)


def _problems(file: CocoFile, known: _Bools, sizes: Ints) -> "list[tuple[str, _Bools]]":
    """What may be wrong with an annotation, and with which it is."""
    twice = np.ones(len(file.ids), bool)
    twice[np.unique(file.ids, return_index=True)[1]] = False
    polygons = np.diff(file.first_polygons)
    lengths = np.diff(file.polygon_starts)
    owner = np.repeat(np.arange(len(file.ids)), polygons)
    broken = np.bincount(owner[(lengths < 6) | (lengths % 2 == 1)], minlength=len(file.ids)) > 0
    has_text = np.diff(file.text_starts) > 0
    return [
        ("belongs to an image that is not in the file", ~known),
        ("has a category that is not in the file", ~np.isin(file.classes, list(file.categories))),
        ("has the id of another", twice),
        ("has a box or an area that is not finite", ~np.isfinite(file.boxes).all(axis=1) | ~np.isfinite(file.areas)),
        ("has no mask", (polygons == 0) & ~has_text),
        ("has a polygon of fewer than three points or of an odd number of coordinates", broken),
        ("has a polygon far outside its image", _far_outside(file, sizes)),
        ("has run lengths for another size than its image's", has_text & (file.text_sizes != sizes[:, ::-1]).any(1)),
        ("has damaged run lengths", _damaged(file, has_text, sizes)),
    ]


def _far_outside(file: CocoFile, sizes: Ints) -> _Bools:
    """Whether a coordinate is further outside than the image is long: the time to draw it has no other bound."""
    far = np.zeros(len(file.ids), bool)
    starts = file.polygon_starts[file.first_polygons]
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        low, high = (f.reduceat(file.coordinates, starts[filled]) for f in (np.minimum, np.maximum))
        side = sizes[filled].max(axis=1)
        far[filled] = ~((low >= -side) & (high <= 2 * side))  # also where it is not a number
    return far


def _damaged(file: CocoFile, has_text: _Bools, sizes: Ints) -> _Bools:
    damaged = np.zeros(len(file.ids), bool)
    for number in np.flatnonzero(has_text).tolist():
        try:
            counts = decode_counts(file.text[file.text_starts[number] : file.text_starts[number + 1]])
            check_counts(counts, int(file.text_sizes[number].prod()))
        except ValueError:
            damaged[number] = True
    return damaged


def _find(root: Path, split: Split) -> tuple[Path, Path]:
    """The annotations of a split, and the folder of its images."""
    folder, pattern = root / "annotations", f"instances_{split}*.json"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        problem = f"{folder} must have one file {pattern} and has {names}"
        if found:
            raise ValueError(f"{problem}; move the others elsewhere")
        raise FileNotFoundError(f"{problem}; give the folder of data in COCO's layout")
    name = found[0].stem.removeprefix("instances_")
    for place in (root / name, root / "images" / name, root / "images"):
        if place.is_dir():
            return found[0], place
    raise FileNotFoundError(f"{root} has no folder {name} and no images/{name} with the images of {found[0].name}")


def _inventory(source: AnnotatedFiles, found: _Found) -> Inventory:
    targets, files = source.targets, source.files
    assert isinstance(targets, Annotations)
    assert isinstance(files, Paths)
    names = [files.names[index] for index in range(len(source))]
    by_name = dict(zip(found.file.file_names, found.bytes.tolist(), strict=True))
    return Inventory.of((CONTENT + hash for hash in targets.hashes()), (by_name[name] for name in names), names)
