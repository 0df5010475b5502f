"""What a task is: the model, loss, metrics and predictions of one kind of problem, behind one interface.

The training loop, `mpvg evaluate`, `mpvg predict` and `mpvg runs` use tasks through this interface only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.data import Batches, DataInfo
from mpvg.data.types import Batch, DevicePipeline, Pipeline, Preprocess, Split

B = TypeVar("B", bound=Batch)
EMA = "ema_"
"""Precedes the names of metrics of the averaged weights, in metrics.jsonl and summary.json."""


def sum_device(device: torch.device) -> torch.device:
    """Where sums over a device's values are kept in float64: there, or on the CPU where it has none (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a task measures on a validation set, and how it is shown."""

    title: str
    """What tables and progress lines call it."""
    higher_is_better: bool
    percent: bool = False
    """Whether a value in [0, 1] is shown as a percentage."""

    def format(self, value: float) -> str:
        """The value as text."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4f}"


NO_IMAGE = "no image could be evaluated; give a validation set with readable images"


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a validation set."""

    metrics: dict[str, float]
    """By the names in `Task.metrics`."""
    images: int
    """Number of images, over all processes."""


class Prediction(Protocol):
    """What a model says about one image."""

    def lines(self) -> list[str]:
        """As text for a terminal."""


@runtime_checkable
class Placed(Prediction, Protocol):
    """A prediction about places in an image, which is given in pixels of what `Task.predict` was given."""

    def resized(self, height: int, width: int) -> "Placed":
        """The same in pixels of the image at another size, such as its own."""

    def file(self, image: str) -> tuple[str, bytes]:
        """What programs read: the ending of a file and its content, in which the image may be named."""

    def draw(self, image: Image.Image) -> Image.Image:
        """The image, of the prediction's size, with what was found in it."""


@runtime_checkable
class Tabular(Prediction, Protocol):
    """A prediction that is also rows of a table, for programs."""

    columns: ClassVar[tuple[str, ...]]
    """Names of what a row holds."""

    def rows(self) -> list[dict[str, Any]]:
        """What was found, one after another, as numbers and text; none where nothing was found."""


@runtime_checkable
class Ranking(Protocol):
    """What a task has beside `Task` if a prediction is some of its classes, the most probable first.

    Such predictions need the logits alone, so those of an exported network are enough.
    """

    def rank(self, logits: Tensor, top: int) -> list[Prediction]:
        """The `top` most probable classes of each image, from logits `(B, classes)`."""


class Task(Protocol[B]):
    """One kind of problem; built for each run as `Task(config, info, options)`.

    `config` is the run's, `info` describes its data, `options` is the dataclass that `tasks.register` was given, filled
    from `task_options`.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    """What `evaluate` measures, by name, in the order in which it is shown."""
    summarized: ClassVar[tuple[str, ...]]
    """Names of the metrics that summary.json holds."""
    best: ClassVar[str]
    """Name of the metric that chooses the best checkpoint."""

    def __init__(self, config: RunConfig, info: DataInfo, options: Any) -> None: ...

    @staticmethod
    def make_pipeline(
        config: RunConfig, info: DataInfo, split: Split, device: torch.device
    ) -> Pipeline | DevicePipeline:
        """How the samples of a split become batches."""

    def build_model(self, *, init: bool) -> nn.Module:
        """The network; `init`: with the weights that training starts from."""

    def prepare(self, batch: B) -> B:
        """Changes a training batch on the device before the step, by mixup for example."""

    def losses(self, model: nn.Module, batch: B) -> dict[str, Tensor]:
        """The terms of the loss by name, each a mean over the images of the batch; their sum is minimised.

        Gradient accumulation weighs the parts of a batch by their images. Where a loss is not a mean over images, but
        for example over pixels that are not ignored, accumulation is approximate, and the task must say so.
        """

    def evaluate(self, model: nn.Module, batches: Batches[B], accelerator: Accelerator | None = None) -> Evaluation:
        """Scores a model on every image once, over all processes.

        The model is given without DistributedDataParallel, which would exchange buffers at a forward pass: processes
        have different numbers of them, and one may have no image at all.
        """

    def preprocess(self) -> Preprocess:
        """What evaluation does to an image; needs no data set."""

    def predict(self, model: nn.Module, images: Tensor) -> list[Prediction]:
        """What the model says about preprocessed images `(B, C, H, W)`."""


def describe_metrics(task: Task[Any] | type[Task[Any]], values: Mapping[str, Any]) -> list[str]:
    """Metrics for people, in the task's order; those that `values` lacks are left out.

    Beside the metric that chooses the best checkpoint its best value and that of the averaged weights are shown, where
    `values` has them.
    """
    parts = []
    for name, metric in task.metrics.items():
        if name not in values:
            continue
        text = f"{metric.title} {metric.format(values[name])}"
        beside = {"best": f"best_{name}", "ema": f"{EMA}{name}"} if name == task.best else {}
        shown = [f"{label} {metric.format(values[key])}" for label, key in beside.items() if key in values]
        parts.append(f"{text} ({', '.join(shown)})" if shown else text)
    return parts
