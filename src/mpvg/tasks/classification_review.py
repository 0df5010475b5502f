"""What a classifier mistakes: classes one by one, the pairs it confuses, its most certain errors, its calibration."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.data import DataInfo, denormalize
from mpvg.tasks.review import Chart, Example, Matrix, Reliability, Review, Table, WorstExamples, defined
from mpvg.tasks.task import Evaluation

BINS = 15
"""Bins of the calibration error, as in Guo et al., 2017."""
PAIRS = 20
"""Confused pairs of classes that a page shows."""
Numbers = npt.NDArray[Any]


def metrics_package() -> Any:
    """scikit-learn's metrics.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from sklearn import metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the scores of single classes need scikit-learn ({error}); pip install 'mpvg[report]'"
        ) from error
    return metrics


class ClassificationRecord:
    """What is kept of each image while a classifier is evaluated, and of the worst the image itself.

    Args:
        info: of the run.
    """

    def __init__(self, info: DataInfo) -> None:
        metrics_package()  # said now, not after the pass
        self._info = info
        self._parts: list[Numbers] = []
        self._count = 0
        self._worst = WorstExamples()

    def watch(self, images: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Takes a batch: images `(B, C, H, W)` as the network gets them, logits `(B, classes)`, classes `(B,)`."""
        probabilities = logits.softmax(dim=1)
        found = probabilities.max(dim=1)
        of_target = probabilities.gather(1, targets[:, None])[:, 0]
        columns = (targets, found.indices, found.values, of_target)
        part = np.stack([column.double().cpu().numpy() for column in columns], axis=1)
        self._parts.append(part)
        for row in np.flatnonzero(part[:, 0] != part[:, 1]):
            index = self._count + int(row)
            make = partial(self._example, index, images[row], part[row])
            self._worst.add(index, (float(part[row, 2]),), make)
        self._count += len(part)

    def review(self, evaluation: Evaluation) -> Review:
        """Everything about the images so far."""
        values = np.concatenate(self._parts)
        targets, taken = (values[:, column].astype(np.int64) for column in (0, 1))
        certainty, of_target = values[:, 2], values[:, 3]
        names = self._info.class_names
        counts = metrics_package().confusion_matrix(targets, taken, labels=range(len(names)))
        reliability = calibration_chart(certainty, targets == taken)
        charts: list[Chart] = [reliability, _matrix(counts, names)]
        return Review(
            evaluation=evaluation,
            facts={"ece": calibration_error(reliability)},
            tables=[_by_class(targets, taken, names), _pairs(counts, names), _matrix_table(counts, names)],
            charts=charts,
            examples_title="The most confident mistakes",
            examples_text="As the network gets them, the most probable wrong class first.",
            examples=list(self._worst),
            predictions=[
                {"target": names[t], "prediction": names[p], "probability": c, "target_probability": o}
                for t, p, c, o in zip(
                    targets.tolist(), taken.tolist(), certainty.tolist(), of_target.tolist(), strict=True
                )
            ],
        )

    def _example(self, index: int, image: Tensor, values: Numbers) -> Example:
        target, taken, certainty, of_target = values.tolist()
        names = self._info.class_names
        lines = (
            f"target {names[int(target)]}, {100 * of_target:.1f} %",
            f"prediction {names[int(taken)]}, {100 * certainty:.1f} %",
        )
        return Example(index=index, picture=to_picture(image, self._info), lines=lines)


def to_picture(image: Tensor, info: DataInfo) -> Image.Image:
    """A prepared image `(C, H, W)` as it looks."""
    pixels = denormalize(image[None].float().cpu(), info)[0].clamp(0, 1)
    picture: Image.Image = functional.to_pil_image(pixels).convert("RGB")
    return picture


def calibration_chart(certainty: Numbers, right: Numbers, bins: int = BINS) -> Reliability:
    """Bins of equal width of the predicted class's probability.

    Args:
        certainty: probability of the predicted class, `(N,)`, in [0, 1].
        right: whether it is the target, `(N,)`.
        bins: number of bins; each has its upper end, and the first one 0.

    Source:
        Guo et al., 2017 (arXiv 1706.04599), Section 2.
    """
    number = np.clip(np.ceil(certainty * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(number, minlength=bins)
    sums = (np.bincount(number, weights=values, minlength=bins) for values in (certainty, right.astype(float)))
    means = [np.divide(total, counts, out=np.full(bins, np.nan), where=counts > 0) for total in sums]
    return Reliability(
        name="reliability",
        title="Calibration",
        text="How often predictions of a probability are right: on the diagonal, of those that are 80 % certain, 80 % "
        "are. Below it the network is too certain, above it not certain enough. The lower panel has the number of "
        "images. ECE in the table above is the mean distance of the points from the diagonal, by their images.",
        counts=counts.tolist(),
        confidence=means[0].tolist(),
        accuracy=means[1].tolist(),
    )


def calibration_error(chart: Reliability) -> float:
    """The expected calibration error (ECE) in [0, 1]: the mean distance of bins from the diagonal, by their images."""
    counts = np.array(chart.counts)
    gaps = np.abs(np.array(chart.accuracy) - np.array(chart.confidence))
    return float(np.nansum(counts * gaps) / counts.sum())


def _by_class(targets: Numbers, taken: Numbers, names: Sequence[str]) -> Table:
    columns = ("class", "precision", "recall", "F1", "support")
    numbers = metrics_package().precision_recall_fscore_support(
        targets, taken, labels=range(len(names)), zero_division=np.nan
    )
    rows = [(name, *map(defined, scores), int(count)) for name, *scores, count in zip(names, *numbers, strict=True)]
    return Table(
        name="classes",
        title="Class by class",
        text="Precision: share of the predictions of a class that are right. Recall: share of its images that are "
        "found. F1: their harmonic mean. Support: its images. A dash: there is nothing to divide by.",
        columns=columns,
        rows=rows,
        shares=columns[1:4],
    )


def _pairs(counts: Numbers, names: Sequence[str]) -> Table:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")
    pairs = [divmod(int(place), len(names)) for place in order[: np.count_nonzero(wrong)]]
    return Table(
        name="confused",
        title="The classes that are confused most",
        text="Share: of the images of the target.",
        columns=("target", "prediction", "images", "share"),
        rows=[(names[t], names[p], int(wrong[t, p]), float(wrong[t, p] / counts[t].sum())) for t, p in pairs],
        shares=("share",),
        shown=PAIRS,
    )


def _matrix(counts: Numbers, names: tuple[str, ...]) -> Matrix:
    return Matrix(
        name="confusion",
        title="Confusion matrix",
        text="Rows are targets and columns predictions; the color is the share of the target's images.",
        counts=counts,
        class_names=names,
    )


def _matrix_table(counts: Numbers, names: Sequence[str]) -> Table:
    return Table(
        name="confusion",
        title="Confusion matrix, in images",
        text="Rows are targets and columns predictions.",
        columns=("target", *names),
        rows=[(name, *row) for name, row in zip(names, counts.tolist(), strict=True)],
        shown=None if len(names) <= PAIRS else 0,
    )
