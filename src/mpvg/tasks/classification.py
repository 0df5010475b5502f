"""Image classification: one class per image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn

from mpvg.config import PRETRAINED, RunConfig
from mpvg.data import Batches, DataInfo, ImageBatch, image_pipeline, make_preprocess
from mpvg.data.types import DevicePipeline, Pipeline, Preprocess, Split
from mpvg.models import TIMM, create_model
from mpvg.models.network import check_logits
from mpvg.tasks.classification_review import ClassificationRecord
from mpvg.tasks.review import Review
from mpvg.tasks.task import NO_IMAGE, Evaluation, Metric, Prediction, sum_device


@dataclass(frozen=True)
class TopClasses:
    """The most probable classes of an image, most probable first."""

    columns: ClassVar[tuple[str, ...]] = ("class", "probability")
    classes: tuple[tuple[str, float], ...]
    """Name and probability of each."""

    def lines(self) -> list[str]:
        """One line per class."""
        return [f"{100 * probability:6.2f} %  {name}" for name, probability in self.classes]

    def rows(self) -> list[dict[str, Any]]:
        """One row per class."""
        return [{"class": name, "probability": probability} for name, probability in self.classes]


class ClassificationTask:
    """Cross entropy, with mixup and label smoothing; accuracy chooses the best checkpoint. See `Task`."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric(title="accuracy", higher_is_better=True, percent=True),
        "top5": Metric(title="top-5", higher_is_better=True, percent=True),
        "nll": Metric(title="nll", higher_is_better=False),
    }
    summarized: ClassVar[tuple[str, ...]] = ("accuracy", "nll")
    best: ClassVar[str] = "accuracy"

    def __init__(self, config: RunConfig, info: DataInfo, options: Any) -> None:
        if not info.class_names:
            raise ValueError(f"{info.name} has no classes, so there is nothing to classify; give data with class names")
        self._config, self._info = config, info
        self._mixup = _make_mixup(config, info.num_classes)

    @staticmethod
    def make_pipeline(
        config: RunConfig, info: DataInfo, split: Split, device: torch.device
    ) -> Pipeline | DevicePipeline:
        """The pipeline that `augment.pipeline` names."""
        return image_pipeline(config, info, split, device)

    def build_model(self, *, init: bool) -> nn.Module:
        """A network of this package or a converted timm network; see `Task`."""
        config, info, network = self._config, self._info, self._config.network
        options: dict[str, Any] = {}
        if network.pooling != "method":
            options["pooling"] = network.pooling
        if network.registers:
            options["reg_tokens"] = network.registers
        if config.model.startswith(TIMM):
            if options:
                raise ValueError(
                    f"network.pooling and network.registers are for networks of this package, and the model is "
                    f"{config.model}, which brings its own; leave them out, or give --network.readout method"
                )
            options = {"readout": network.readout, "start": network.start}
            if init and network.init == PRETRAINED:
                options["pretrained"] = True
        elif (network.readout, network.start, network.init == PRETRAINED) != ("keep", "fresh", False):
            raise ValueError(
                f"network.readout, network.start and network.init={PRETRAINED} are for timm/<name>, and the model is "
                f"{config.model}; leave them out"
            )
        return create_model(
            config.model,
            config.method,
            num_classes=info.num_classes,
            checkpoint_path=network.init if init and network.init != PRETRAINED else None,
            pos_std=network.pos_std,
            in_chans=info.in_chans,
            img_size=info.img_size,
            drop_path_rate=network.drop_path,
            **options,
        )

    def prepare(self, batch: ImageBatch) -> ImageBatch:
        """Mixup and CutMix, where they are on."""
        return batch if self._mixup is None else ImageBatch(*self._mixup(batch.images, batch.targets))

    def losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """The cross entropy; see `classification_loss`."""
        logits = model(batch.images)
        check_logits(logits, len(batch.images), self._info.num_classes)
        return {"loss": classification_loss(logits, batch.targets, self._config.augment.smoothing)}

    def evaluate(
        self, model: nn.Module, batches: Batches[ImageBatch], accelerator: Accelerator | None = None
    ) -> Evaluation:
        """See the function `evaluate`."""
        return evaluate(model, batches, accelerator)

    def review(self, model: nn.Module, batches: Batches[ImageBatch]) -> Review:
        """Classes, confusions, confident mistakes and calibration; see `Reviewing`.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        record = ClassificationRecord(self._info)
        return record.review(evaluate(model, batches, watch=record.watch))

    def preprocess(self) -> Preprocess:
        """What validation does to an image."""
        return make_preprocess(self._info)

    def predict(self, model: nn.Module, images: Tensor) -> list[Prediction]:
        """The five most probable classes of each image."""
        return list(predict(model, images, self._info.class_names))

    def rank(self, logits: Tensor, top: int) -> list[Prediction]:
        """The `top` most probable classes of each image; see `Ranking`."""
        return list(top_classes(logits, self._info.class_names, top))


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy.

    Args:
        logits: `(B, classes)`.
        targets: classes `(B,)`, or the probabilities `(B, classes)` that mixup made, smoothing included.
        smoothing: label smoothing of classes, in [0, 1).
    """
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches[ImageBatch],
    accelerator: Accelerator | None = None,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Scores a classifier on every image once, over all processes.

    Args:
        model: the classifier.
        batches: the images.
        accelerator: of the processes; None: there is one.
        watch: is given the images, logits and targets of each batch of this process.

    Returns:
        Accuracy and top-5 accuracy in [0, 1], and the mean negative log-likelihood of the true class in nats.

    Raises:
        ValueError: no image can be read.
    """
    model.eval()
    # Summed on the device, if it can: reading a number after each batch would delay the next one.
    place = sum_device(next(model.parameters(), torch.empty(0)).device)
    sums = torch.zeros(4, dtype=torch.float64, device=place)
    for images, targets in batches.epoch():
        logits = model(images)
        check_logits(logits, len(images))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        nll = F.cross_entropy(logits, targets, reduction="none").to(place).double().sum()
        one, five = (hit.sum().to(place).double() for hit in (hits[:, 0], hits.any(dim=1)))
        sums += torch.stack([one, five, nll, nll.new_full((), len(targets))])
        if watch is not None:
            watch(images, logits, targets)
    if accelerator is not None and accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    count = int(sums[3])
    if count == 0:
        raise ValueError(NO_IMAGE)
    accuracy, top5, nll = (sums[:3] / count).tolist()
    return Evaluation({"accuracy": accuracy, "top5": top5, "nll": nll}, count)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, class_names: tuple[str, ...], k: int = 5) -> list[TopClasses]:
    """The k most probable classes of each image.

    Args:
        model: a classifier.
        images: preprocessed images `(B, C, H, W)`.
        class_names: in the order of the logits.
        k: how many classes; fewer where there are fewer.
    """
    logits = model.eval()(images)
    check_logits(logits, len(images), len(class_names))
    return top_classes(logits, class_names, k)


def top_classes(logits: Tensor, class_names: tuple[str, ...], k: int) -> list[TopClasses]:
    """The k most probable classes of each image, from logits `(B, classes)`; other arguments as `predict`."""
    values, classes = logits.float().softmax(dim=1).topk(min(k, len(class_names)), dim=1)
    return [
        TopClasses(tuple((class_names[c], p) for c, p in zip(row, ps, strict=True)))
        for row, ps in zip(classes.tolist(), values.tolist(), strict=True)
    ]


def _make_mixup(config: RunConfig, num_classes: int) -> Mixup | None:
    augment = config.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
