"""What a segmentation network mistakes: classes one by one, and the images with the lowest mean IoU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpvg.data import DataInfo
from mpvg.overlays import draw_labels
from mpvg.tasks.classification_review import to_picture
from mpvg.tasks.review import Example, Review, Table, WorstExamples, defined, side_by_side
from mpvg.tasks.task import NO_IMAGE, Evaluation


def by_class(table: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of each class, `(classes,)`, from a confusion matrix; NaN: there is nothing to divide by."""
    right, true, taken = (part.double() for part in (table.diagonal(), table.sum(dim=1), table.sum(dim=0)))
    return right / (true + taken - right), right / true


class SegmentationRecord:
    """What is kept of each image while a segmentation network is evaluated.

    Args:
        info: of the run.
    """

    def __init__(self, info: DataInfo) -> None:
        self._info = info
        self._table = torch.zeros(2 * (info.num_classes,), dtype=torch.int64)
        self._images: list[dict[str, float | None]] = []
        self._worst = WorstExamples()

    def watch(self, images: Tensor, found: Tensor, labels: Tensor, table: Tensor) -> None:
        """Takes an image.

        Args:
            images: the image as the network gets it, `(1, 3, H, W)`.
            found: classes at the size of its labels.
            labels: true classes; 255: of none.
            table: the image's confusion matrix.
        """
        table = table.cpu()
        self._table += table
        iou, _ = by_class(table)
        score, labelled = float(iou.nanmean()), int(table.sum())
        share = float(table.diagonal().sum()) / labelled if labelled else float("nan")
        index = len(self._images)
        self._images.append({"miou": defined(score), "accuracy": defined(share)})
        if not np.isnan(score):
            drawn, lines = partial(self._drawn, images[0], found, labels), (f"mIoU {100 * score:.1f} %",)
            self._worst.add(index, (-score,), lambda: Example(index=index, picture=drawn(), lines=lines))

    def review(self, scores: Callable[[Tensor], dict[str, float]]) -> Review:
        """Everything about the images so far; `scores`: from a confusion matrix to the task's metrics.

        Raises:
            ValueError: no image can be read, or no pixel of them is of a class.
        """
        if not self._images:
            raise ValueError(NO_IMAGE)
        return Review(
            evaluation=Evaluation(scores(self._table), len(self._images)),
            tables=[self._classes()],
            examples_text="Left what is true, right what was found; the lowest mean IoU of the image's classes first.",
            examples=list(self._worst),
            predictions=self._images,
        )

    def _classes(self) -> Table:
        iou, accuracy = by_class(self._table)
        columns: tuple[Any, ...] = (iou.tolist(), accuracy.tolist(), self._table.sum(dim=1).tolist())
        return Table(
            name="classes",
            title="Class by class",
            text="IoU: pixels that are of a class and found, over those that are either. Accuracy: share of the pixels "
            "of a class that are found. A dash: there is nothing to divide by.",
            columns=("class", "IoU", "accuracy", "pixels"),
            rows=[
                (name, defined(one), defined(other), pixels)
                for name, one, other, pixels in zip(self._info.class_names, *columns, strict=True)
            ],
            shares=("IoU", "accuracy"),
        )

    def _drawn(self, image: Tensor, found: Tensor, labels: Tensor) -> Image.Image:
        picture = to_picture(image, self._info)
        maps = (one.to(torch.uint8).cpu().numpy() for one in (labels, found))
        return side_by_side(*(draw_labels(picture, one, self._info.class_names) for one in maps))
