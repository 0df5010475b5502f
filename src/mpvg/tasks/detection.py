"""Detection: the objects in an image, each with its class, box and mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.data import Batches, DataInfo
from mpvg.data.scenes import DetectionSizes, SceneBatch, TestScene, detection_pipeline, pad_images
from mpvg.data.types import Pipeline, Preprocess, Split
from mpvg.models.dense.mask_rcnn import PAPER_ANCHORS, MaskRCNN
from mpvg.tasks.backbone import DenseOptions, check_dense_network, dense_backbone, longer_than_long
from mpvg.tasks.coco_metrics import AveragePrecision, average_precision, check_objects, evaluator, truth_record
from mpvg.tasks.detection_review import DetectionRecord
from mpvg.tasks.detections import Detections
from mpvg.tasks.review import Review
from mpvg.tasks.task import Evaluation, Metric, Prediction
from mpvg.validation import build, check


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(DenseOptions, DetectionSizes):
    """The sizes of images and of Mask R-CNN; the defaults are the paper's.

    Where the transformer's weights come from is `network.init`, as for every task: a file, or a run's folder.
    """

    anchor_sizes: tuple[float, ...] = PAPER_ANCHORS
    """Square root of the area of the anchors at strides 4, 8, 16, 32 and 64, in pixels."""
    channels: int = 256
    """Of the feature pyramid, the proposal network and the mask head."""
    hidden: int = 1024
    """Width of the box head."""
    regions: int = 512
    """Proposals of an image that are sampled for training."""
    proposals: int = 1000
    """Of an image."""
    evaluation: ClassVar[tuple[str, ...]] = ("test_side", "long_side", "proposals")
    """Options that a trained network can be evaluated with at other values."""

    @property
    def unused(self) -> dict[str, str]:
        """Option -> why an evaluation does not use it."""
        return longer_than_long(self, "test_side")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("long_side", "max_side", "test_side", "channels", "hidden", "regions", "proposals"):
            check(f"task_options.{name}", getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        sides = (*self.short_sides, *self.first_sides, *self.crop_sides)
        check("task_options.short_sides", self.short_sides, bool(self.short_sides), "at least one side")
        check("the sides in task_options", sides, min(sides) >= 1, "whole numbers >= 1")
        crop = self.crop_sides
        check("task_options.crop_sides", crop, tuple(sorted(crop)) == tuple(crop), "the smallest side first")
        anchors = self.anchor_sizes
        good = len(anchors) == len(PAPER_ANCHORS) and min(anchors) > 0
        check("task_options.anchor_sizes", anchors, good, "five numbers > 0, one for each stride")


class DetectionTask:
    """Mask R-CNN around a dense network; the AP of boxes chooses the best checkpoint. See `Task`.

    The losses are means over the sampled anchors and proposals of all images, as MMDetection's are. With
    `accumulate` > 1, a batch in which images have different numbers of them is therefore weighed a little differently.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {
        f"{kind}_{name}": Metric(title=f"{kind} {title}", higher_is_better=True, percent=True)
        for kind in ("box", "mask")
        for name, title in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))
    }
    summarized: ClassVar[tuple[str, ...]] = ("box_ap", "mask_ap")
    best: ClassVar[str] = "box_ap"

    def __init__(self, config: RunConfig, info: DataInfo, options: DetectionOptions) -> None:
        if not info.class_names:
            raise ValueError(f"{info.name} has no classes, so there is nothing to detect; give data in COCO's layout")
        check_dense_network(config, "which is for image classification")
        self._config, self._info, self._options = config, info, options
        self._category_ids = info.category_ids or tuple(range(1, info.num_classes + 1))

    @staticmethod
    def make_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
        """Images and objects as in ViT-Adapter's Mask R-CNN, at the sizes of `task_options`."""
        evaluator()  # said now, not after an epoch
        options: DetectionOptions = build(DetectionOptions, config.task_options, "task_options.")
        return detection_pipeline(config, info, split, options)

    def build_model(self, *, init: bool) -> nn.Module:
        """Mask R-CNN around a network of `mpvg.models.dense.ADAPTERS`; see `Task`."""
        options = self._options
        return MaskRCNN(
            dense_backbone(self._config, self._info, "detection", options.vit, init=init),
            self._info.num_classes,
            anchor_sizes=options.anchor_sizes,
            channels=options.channels,
            hidden=options.hidden,
            regions=options.regions,
            proposals=options.proposals,
        )

    def prepare(self, batch: SceneBatch) -> SceneBatch:
        """Nothing is left to do."""
        return batch

    def losses(self, model: nn.Module, batch: SceneBatch) -> dict[str, Tensor]:
        """The five losses of Mask R-CNN, each with weight 1."""
        targets = [
            {"boxes": target.boxes, "labels": target.labels + 1, "masks": target.masks, "padded": padded}
            for target, padded in zip(batch.targets, batch.padded_sizes, strict=True)
        ]
        losses: dict[str, Tensor] = model(batch.images, batch.sizes, targets)
        return losses

    def evaluate(
        self, model: nn.Module, batches: Batches[SceneBatch], accelerator: Accelerator | None = None
    ) -> Evaluation:
        """COCO's AP of boxes and masks over every image once, over all processes; images go through one by one.

        Raises:
            ModuleNotFoundError: faster-coco-eval is not installed.
            ValueError: no image can be read, or no object is annotated.
        """
        model.eval()
        truths, results = self._collect(model, batches)
        if accelerator is not None and accelerator.num_processes > 1:
            truths, results = gather_object(truths), gather_object(results)
        check_objects(truths)  # by every process: the others would wait for a first one that stops
        metrics = [self._scores(truths, results).metrics if _is_first(accelerator) else {}]
        if accelerator is not None:
            broadcast_object_list(metrics)
        return Evaluation(metrics[0], len(truths))

    def _scores(self, truths: list[dict[str, Any]], results: list[dict[str, Any]]) -> AveragePrecision:
        return average_precision(truths, results, self._category_ids)

    def _collect(
        self, model: nn.Module, batches: Batches[SceneBatch], record: DetectionRecord | None = None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The annotated images, and what a model finds in them as COCO's results; a record is given each of them."""
        truths: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for batch in batches.epoch():
            for one in batch.one_by_one():
                truth, (height, width) = one.targets[0].truth, one.sizes[0]
                assert truth is not None
                found = self._detect(model, one.images, (height, width))
                truths.append(truth_record(truth, self._category_ids))
                results += found.resized(truth.height, truth.width).to_coco(truth.image_id)
                if record is not None:
                    record.watch(one.images[0, :, :height, :width], found, truth)
        return truths, results

    def review(self, model: nn.Module, batches: Batches[SceneBatch]) -> Review:
        """Classes, precision over recall and the worst images; see `Reviewing`."""
        record = DetectionRecord(self._info)
        truths, results = self._collect(model.eval(), batches, record)
        check_objects(truths)
        return record.review(self._scores(truths, results), truths, self._category_ids)

    def preprocess(self) -> Preprocess:
        """What evaluation does to an image, but for the padding: (3, H, W)."""
        return TestScene(self._options, self._info).image

    def predict(self, model: nn.Module, images: Tensor) -> list[Prediction]:
        """The objects in each image, in its pixels; `Detections.resized` gives them in those of another size."""
        model.eval()
        size = (images.shape[-2], images.shape[-1])
        return [self._detect(model, pad_images([image]), size) for image in images]

    @torch.inference_mode()
    def _detect(self, model: nn.Module, images: Tensor, size: tuple[int, int]) -> Detections:
        """What a model finds in one padded image `(1, 3, H, W)`, in pixels of the image without its padding."""
        (found,) = model(images, [size])
        return Detections(
            height=size[0],
            width=size[1],
            boxes=found["boxes"],
            scores=found["scores"],
            labels=found["labels"] - 1,
            probabilities=found["masks"],
            class_names=self._info.class_names,
            category_ids=self._category_ids,
        )


def _is_first(accelerator: Accelerator | None) -> bool:
    return accelerator is None or accelerator.is_main_process
