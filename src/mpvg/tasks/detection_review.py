"""What a detector mistakes: classes one by one, precision over recall, and the images with most errors."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes

from mpvg.data import DataInfo
from mpvg.data.annotations import ImageAnnotations
from mpvg.tasks.classification_review import to_picture
from mpvg.tasks.coco_metrics import AveragePrecision
from mpvg.tasks.detections import SHOWN, Detections
from mpvg.tasks.review import Curves, Example, Review, Table, WorstExamples, defined, side_by_side
from mpvg.tasks.task import Evaluation

OVERLAP = 0.5
"""Intersection over union of boxes from which on an object counts as found in an image."""
LINES = 8
"""Classes that have a curve of their own in the picture, those with the lowest AP; the table has all."""


def count_errors(found: Detections, truth: ImageAnnotations) -> tuple[int, int, int]:
    """How many objects are found, missed, and found where none is, among those that are certain enough to be shown.

    Each object, the most certain first, takes the true one of its class with the largest overlap that is not taken.
    Groups of objects are left out.

    Args:
        found: in pixels of the image itself.
        truth: of the image.
    """
    single = ~truth.crowd
    boxes, labels = torch.from_numpy(truth.boxes[single]).float(), truth.labels[single].tolist()
    kept = found.scores >= SHOWN
    overlaps = box_iou(found.boxes[kept].cpu().float(), boxes)
    free, right = set(range(len(labels))), 0
    for label, row in zip(found.labels[kept].tolist(), overlaps, strict=True):
        fitting = [other for other in free if labels[other] == label and float(row[other]) >= OVERLAP]
        if fitting:
            free.remove(max(fitting, key=lambda other: float(row[other])))
            right += 1
    return right, len(free), int(kept.sum()) - right


class DetectionRecord:
    """What is kept of each image while a detector is evaluated.

    Args:
        info: of the run.
    """

    def __init__(self, info: DataInfo) -> None:
        self._info = info
        self._images: list[dict[str, Any]] = []
        self._worst = WorstExamples()

    def watch(self, image: Tensor, found: Detections, truth: ImageAnnotations) -> None:
        """Takes an image `(3, H, W)` without padding, and what is found in pixels of it."""
        in_own = found.resized(truth.height, truth.width)
        right, missed, false = count_errors(in_own, truth)
        index = len(self._images)
        self._images.append(
            {
                **{"image_id": truth.image_id, "right": right, "missed": missed, "false": false},
                "found": in_own.rows(),
            }
        )
        errors = missed + false
        share = errors / (2 * right + errors) if errors else 0.0  # 1 - F1
        lines = (f"{right} found, {missed} missed, {false} where none is",)
        if errors:
            drawn = partial(self._drawn, image, found, truth)
            self._worst.add(index, (share, errors), lambda: Example(index=index, picture=drawn(), lines=lines))

    def review(
        self,
        scores: AveragePrecision,
        truths: Sequence[Mapping[str, Any]],
        category_ids: Sequence[int],
    ) -> Review:
        """Everything about the images so far; the other arguments as `coco_metrics.average_precision`."""
        curves = _undefined(scores.precision["box"][0, :, :, 0, -1])
        return Review(
            evaluation=Evaluation(scores.metrics, len(truths)),
            tables=[self._classes(scores, truths, category_ids), self._points(curves, scores.recalls)],
            charts=[self._chart(curves, scores)],
            examples_text=f"Left the true boxes, right what was found with a score of at least {100 * SHOWN:.0f} %. An "
            f"object is found where a box of its class overlaps its own by {100 * OVERLAP:.0f} %. The images with the "
            "largest share of errors come first.",
            examples=list(self._worst),
            predictions=self._images,
        )

    def _classes(
        self, scores: AveragePrecision, truths: Sequence[Mapping[str, Any]], category_ids: Sequence[int]
    ) -> Table:
        box, mask = scores.precision["box"], scores.precision["mask"]
        objects = [one["category_id"] for truth in truths for one in truth["annotations"] if not one["iscrowd"]]
        rows = []
        for number, name in enumerate(self._info.class_names):
            parts = (box[:, :, number], box[0, :, number], box[5, :, number], mask[:, :, number])
            values = [defined(_average(part[..., 0, -1])) for part in parts]
            rows.append((name, *values, objects.count(category_ids[number])))
        columns = ("class", "box AP", "box AP50", "box AP75", "mask AP", "objects")
        return Table(
            name="classes",
            title="Class by class",
            text="COCO's average precision. A dash: the class has no object.",
            columns=columns,
            rows=rows,
            shares=columns[1:5],
        )

    def _chart(self, curves: "npt.NDArray[Any]", scores: AveragePrecision) -> Curves:
        precision = scores.precision["box"]
        averages = [_average(precision[:, :, number, 0, -1]) for number in range(len(self._info.class_names))]
        order = [number for number in np.argsort(averages) if not np.isnan(averages[number])][:LINES]
        lines = {"mean": curves.mean(axis=1, where=~np.isnan(curves)).tolist()}
        lines |= {self._info.class_names[number]: curves[:, number].tolist() for number in order}
        return Curves(
            name="precision-recall",
            title="Precision over recall, boxes",
            text=f"At an overlap of {100 * OVERLAP:.0f} %: the mean of the classes, and those with the lowest AP.",
            x="recall",
            y="precision",
            x_values=scores.recalls,
            lines=lines,
        )

    def _points(self, curves: "npt.NDArray[Any]", recalls: Sequence[float]) -> Table:
        return Table(
            name="precision-recall",
            title="Precision over recall, boxes",
            text=f"Precision of each class at an overlap of {100 * OVERLAP:.0f} %.",
            columns=("recall", *self._info.class_names),
            rows=[(float(recall), *map(defined, row)) for recall, row in zip(recalls, curves, strict=True)],
            shown=0,
        )

    def _drawn(self, image: Tensor, found: Detections, truth: ImageAnnotations) -> Image.Image:
        picture = to_picture(image, self._info)
        scale = [found.width / truth.width, found.height / truth.height] * 2
        boxes = torch.from_numpy(truth.boxes * scale)
        names = [self._info.class_names[label] for label in truth.labels.tolist()]
        pixels = functional.pil_to_tensor(picture)
        left = draw_bounding_boxes(pixels, boxes, names, "white") if names else pixels
        return side_by_side(functional.to_pil_image(left), found.draw(picture))


def _undefined(values: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
    """COCO's numbers with NaN in place of its -1, for what is undefined."""
    return np.where(values < 0, np.nan, values)


def _average(values: "npt.NDArray[Any]") -> float:
    known = values[values >= 0]
    return float(known.mean()) if known.size else float("nan")
