"""Semantic segmentation: one class for each pixel."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.data import Batches, DataInfo
from mpvg.data.ade20k import IGNORED
from mpvg.data.label_maps import LabelBatch, SegmentationSizes, TestLabelMap, segmentation_pipeline, slide
from mpvg.data.scenes import DIVISOR
from mpvg.data.types import Pipeline, Preprocess, Split
from mpvg.models.dense.upernet import UperNet, resized
from mpvg.overlays import colored_png, draw_labels
from mpvg.tasks.backbone import DenseOptions, check_dense_network, dense_backbone, longer_than_long
from mpvg.tasks.review import Review
from mpvg.tasks.segmentation_review import SegmentationRecord, by_class
from mpvg.tasks.task import NO_IMAGE, Evaluation, Metric, Prediction
from mpvg.validation import build, check

AUXILIARY_WEIGHT = 0.4
"""Of the auxiliary head's loss."""


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(DenseOptions, SegmentationSizes):
    """`task_options` of segmentation; the defaults are those of ViT-Adapter's UperNet on ADE20K.

    The weights from which the transformer starts are the run's `network.init`.
    """

    reduce_zero_label: bool = True
    """Whether label 0 of a file is no class, and label k is class k - 1."""
    channels: int = 512
    """Of the maps of the decode head."""
    auxiliary_channels: int = 256
    """Of the auxiliary head's."""
    classifier_std: float = 0.01
    """Standard deviation of the classifiers' first weights; from scratch, a small network learns sooner with more."""
    freeze_backbone: bool = False
    """Whether the heads alone are trained; the running statistics of the backbone's BatchNorm then stay, too."""
    sliding: bool = True
    """Evaluation: whether windows of the size of a crop slide over an image; otherwise it is taken as a whole."""
    stride: int = 341
    """Evaluation: pixels between windows."""
    flips: bool = False
    """Evaluation: whether each scale is also taken mirrored; digits change their meaning by it."""
    evaluation: ClassVar[tuple[str, ...]] = ("short_side", "long_side", "crop", "sliding", "stride", "scales", "flips")
    """Options that a trained network can be evaluated with at other values."""

    @property
    def unused(self) -> dict[str, str]:
        """Option -> why an evaluation does not use it."""
        reasons = {} if self.sliding else dict.fromkeys(("crop", "stride"), "windows do not slide; give sliding too")
        return reasons | longer_than_long(self, "short_side")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_side", "long_side", "channels", "auxiliary_channels", "stride"):
            value = getattr(self, name)
            check(f"task_options.{name}", value, value >= 1, "a whole number >= 1")
        allowed = f"a multiple of {DIVISOR}, at least that"
        check("task_options.crop", self.crop, self.crop > 0 and self.crop % DIVISOR == 0, allowed)
        check(
            "task_options.stride",
            self.stride,
            not self.sliding or self.stride <= self.crop,
            f"at most the crop, {self.crop}",
        )
        low, high = self.ratio
        check("task_options.ratio", self.ratio, 0 < low <= high <= 8, "two numbers with 0 < low <= high <= 8")
        check("task_options.max_share", self.max_share, 0 < self.max_share <= 1, "a number in (0, 1]")
        check("task_options.classifier_std", self.classifier_std, 0 < self.classifier_std <= 1, "a number in (0, 1]")
        good = bool(self.scales) and all(0.1 <= scale <= 8 for scale in self.scales)
        check("task_options.scales", self.scales, good, "one or more numbers in [0.1, 8]")


@dataclass(frozen=True, eq=False)
class PredictedLabels:
    """The class of each pixel of an image."""

    columns: ClassVar[tuple[str, ...]] = ("class", "share")
    probabilities: Tensor
    """Of the classes, `(classes, H, W)`."""
    class_names: tuple[str, ...]

    @cached_property
    def labels(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The most probable class of each pixel, `(H, W)`."""
        return self.probabilities.argmax(dim=0).to(torch.uint8).cpu().numpy()

    def resized(self, height: int, width: int) -> "PredictedLabels":
        """The same for the image at another size, with probabilities interpolated."""
        return replace(self, probabilities=resized(self.probabilities[None], (height, width))[0])

    def lines(self) -> list[str]:
        """One line per class that occurs: its share of the pixels, largest first."""
        return [f"{100 * row['share']:6.2f} %  {row['class']}" for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """One row per class that occurs, with its share of the pixels in [0, 1], largest first."""
        classes, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [{"class": self.class_names[classes[i]], "share": float(counts[i] / self.labels.size)} for i in order]

    def file(self, image: str) -> tuple[str, bytes]:
        """A PNG file with a palette, whose numbers are the classes."""
        content = io.BytesIO()
        colored_png(self.labels).save(content, "PNG")
        return ".labels.png", content.getvalue()

    def draw(self, image: Image.Image) -> Image.Image:
        """The image with the classes in colors, and their names below it."""
        return draw_labels(image, self.labels, self.class_names)


class SegmentationTask:
    """Cross entropy of pixels from two heads; the mean IoU chooses the best checkpoint. See `Task`.

    The loss is a mean over all pixels of a batch, as mmsegmentation 0.20.2 computes it: those that are of no class
    count as 0. The parts of gradient accumulation therefore add up to the batch's loss; but BatchNorm normalizes each
    part on its own, so that accumulation is approximate.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric(title="mIoU", higher_is_better=True, percent=True),
        "macc": Metric(title="mAcc", higher_is_better=True, percent=True),
        "aacc": Metric(title="aAcc", higher_is_better=True, percent=True),
    }
    summarized: ClassVar[tuple[str, ...]] = ("miou", "macc", "aacc")
    best: ClassVar[str] = "miou"

    def __init__(self, config: RunConfig, info: DataInfo, options: SegmentationOptions) -> None:
        if not info.class_names:
            raise ValueError(f"{info.name} has no classes, so no pixel has one; give data with class names")
        part = math.ceil(config.batch_size / config.accumulate)
        if min(part, config.batch_size % part or part) < 2:
            raise ValueError(
                f"batch_size {config.batch_size} with accumulate {config.accumulate} trains on one image at once, of "
                "which UperNet's pooling makes one pixel that BatchNorm cannot normalize; allowed: 2 or more at once"
            )
        self._config, self._info, self._options = config, info, options

    @staticmethod
    def make_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
        """Images with label maps, at the sizes of the options."""
        options: SegmentationOptions = build(SegmentationOptions, config.task_options, "task_options.")
        return segmentation_pipeline(config, info, split, options)

    def build_model(self, *, init: bool) -> nn.Module:
        """UperNet around the dense network that `model` names; see `Task`."""
        options = self._options
        check_dense_network(self._config, "which segmentation does not have")
        return UperNet(
            dense_backbone(self._config, self._info, "segmentation", options.vit, init=init),
            self._info.num_classes,
            channels=options.channels,
            auxiliary_channels=options.auxiliary_channels,
            classifier_std=options.classifier_std,
            frozen=options.freeze_backbone,
        )

    def prepare(self, batch: LabelBatch) -> LabelBatch:
        """The batch as it is."""
        return batch

    def losses(self, model: nn.Module, batch: LabelBatch) -> dict[str, Tensor]:
        """The cross entropies of the decode head and, weighed by 0.4, of the auxiliary head."""
        found, labels = model(batch.images), torch.stack(batch.labels)
        return {
            "decode": pixel_loss(found.decode, labels),
            "auxiliary": AUXILIARY_WEIGHT * pixel_loss(found.auxiliary, labels),
        }

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Batches[LabelBatch], accelerator: Accelerator | None = None
    ) -> Evaluation:
        """Scores a network on every image once, over all processes, each image by itself and at its own size.

        Returns:
            Mean IoU and mean accuracy of the classes, and the share of labelled pixels that are right, in [0, 1].

        Raises:
            ValueError: no image can be read, or no pixel of them is of a class.
        """
        table, images = self.confusion(model, batches)
        if accelerator is not None and accelerator.num_processes > 1:
            table, images = (accelerator.reduce(part, reduction="sum") for part in (table, images))
        if not int(images):
            raise ValueError(NO_IMAGE)
        return Evaluation(scores(table.cpu()), int(images))

    @torch.inference_mode()
    def confusion(self, model: nn.Module, batches: Batches[LabelBatch]) -> tuple[Tensor, Tensor]:
        """How many pixels of class i (row) are taken for class j (column), int64; and the number of images."""
        device = next(model.parameters()).device
        table = torch.zeros(2 * (self._info.num_classes,), dtype=torch.int64, device=device)
        images = torch.zeros((), dtype=torch.int64, device=device)
        for one, found in self._found(model, batches):
            table += confusion(found, one.labels[0], self._info.num_classes)
            images += 1
        return table, images

    def _found(self, model: nn.Module, batches: Batches[LabelBatch]) -> Iterator[tuple[LabelBatch, Tensor]]:
        """Each image as a batch, and the classes that are found in it `(H, W)`, at the size of its labels."""
        model.eval()
        for batch in batches.epoch():
            for one in batch.one_by_one():
                labels = one.labels[0]
                size = (labels.shape[0], labels.shape[1])
                scaled = [image[None] for images in one.scaled for image in images]
                yield one, probabilities(model, one.images, size, self._options, scaled).argmax(dim=1)[0]

    @torch.inference_mode()
    def review(self, model: nn.Module, batches: Batches[LabelBatch]) -> Review:
        """Classes and the worst images; see `Reviewing`."""
        record = SegmentationRecord(self._info)
        for one, found in self._found(model, batches):
            record.watch(one.images, found, one.labels[0], confusion(found, one.labels[0], self._info.num_classes))
        return record.review(scores)

    def preprocess(self) -> Preprocess:
        """What validation does to an image."""
        return TestLabelMap(self._options, self._info).image

    @torch.inference_mode()
    def predict(self, model: nn.Module, images: Tensor) -> list[Prediction]:
        """The class of each pixel of preprocessed images, at their size."""
        model.eval()
        size = (images.shape[-2], images.shape[-1])
        found = [probabilities(model, image[None], size, self._options)[0] for image in images]
        return [PredictedLabels(one, self._info.class_names) for one in found]


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of all pixels; those without a class count as 0.

    Args:
        logits: `(B, classes, H, W)`.
        labels: classes `(B, H, W)`; 255: of none.

    Source:
        mmsegmentation 0.20.2, `cross_entropy_loss.py`; a later release can leave these pixels out of the mean.
    """
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def probabilities(
    model: nn.Module,
    images: Tensor,
    size: tuple[int, int],
    options: SegmentationOptions,
    scaled: Sequence[Tensor] = (),
) -> Tensor:
    """The probabilities of the classes for each pixel, averaged over the scales and mirror images of the options.

    Args:
        model: gives `PixelLogits`.
        images: `(B, C, H, W)`, sides multiples of 32.
        size: height and width of what is returned.
        options: how images are taken.
        scaled: the images at each scale of the options, made from those of the files as mmsegmentation does; empty:
            they are made from `images`.

    Returns:
        `(B, classes, *size)`.
    """

    def score(part: Tensor) -> Tensor:
        found: Tensor = model(part).decode.float()
        return found

    take = partial(slide, predict=score, side=options.crop, stride=options.stride) if options.sliding else score
    found = []
    for one in scaled or [images if scale == 1 else _scaled(images, scale) for scale in options.scales]:
        for mirrored in (False, True) if options.flips else (False,):
            logits = resized(take(one.flip(-1) if mirrored else one), size)
            found.append((logits.flip(-1) if mirrored else logits).softmax(dim=1))
    return torch.stack(found).mean(dim=0) if len(found) > 1 else found[0]


def _scaled(images: Tensor, scale: float) -> Tensor:
    """Images at another scale, with sides rounded up to multiples of 32."""
    return resized(images, [max(1, math.ceil(side * scale / DIVISOR)) * DIVISOR for side in images.shape[-2:]])


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of class i (row) are taken for class j (column): (classes, classes), int64.

    Args:
        found: classes `(H, W)`.
        labels: true classes `(H, W)`; 255: of none, not counted.
        classes: number of classes.

    Raises:
        ValueError: a label is of none of the classes.
    """
    known = labels != IGNORED
    true = labels[known].long()
    if len(true) and int(true.max()) >= classes:
        raise ValueError(f"label {int(true.max())} is of none of the {classes} classes; allowed: less, or {IGNORED}")
    return torch.bincount(classes * true + found[known], minlength=classes**2).reshape(classes, classes)


def scores(table: Tensor) -> dict[str, float]:
    """The metrics of a confusion matrix, in [0, 1].

    A class without a labelled and without a predicted pixel has no IoU, and one without a labelled pixel no accuracy;
    the means leave them out, as mmsegmentation's do.

    Raises:
        ValueError: no pixel is labelled.
    """
    right, true = table.diagonal().double(), table.sum(dim=1).double()
    if not true.any():
        raise ValueError("no pixel of the validation set is of a class, so nothing can be scored; check its label maps")
    iou, accuracy = by_class(table)
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(right.sum() / true.sum()),
    }
