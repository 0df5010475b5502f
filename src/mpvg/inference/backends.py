"""What computes a predictor's answers: a run's network; the place where other kinds are added."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from mpvg import runs
from mpvg.data.images import Orientation
from mpvg.data.types import Preprocess
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.tasks import Prediction, Ranking, Task

TOP = 5
"""Classes of an image that are named where nothing else is asked for."""
BATCH = 32
"""Images at once, for a task that ranks classes. Others take one at a time: their predictions are large."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".pkl")


@runtime_checkable
class Backend(Protocol):
    """Something trained that answers about prepared images."""

    orientation: Orientation
    """Whether pictures are turned as their EXIF data say, as in training."""
    batch_size: int
    """Images that are given at once, if nothing else is asked for."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """An 8-bit RGB picture as the network's input `(C, H, W)`, float32; called in several threads."""

    def predict(self, images: Tensor, top: int | None) -> list[Prediction]:
        """What is in prepared images `(B, C, H, W)` of one size, on the CPU.

        Raises:
            ValueError: `top` is given, and the predictions are no ranking of classes.
        """


class RunBackend:
    """A run's network in PyTorch.

    Args:
        run: the run.
        checkpoint: which of its weights.
        ema: whether the averaged ones.
        device: where the network runs; None: a GPU where there is one and the run was not made for the CPU.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: they are damaged, or do not fit.
    """

    def __init__(
        self, run: Run, checkpoint: Which = "best", *, ema: bool = False, device: torch.device | str | None = None
    ) -> None:
        on_gpu = torch.cuda.is_available() and run.config.device != "cpu"
        self.device = torch.device(device if device is not None else "cuda" if on_gpu else "cpu")
        self.run, self.task = run, run.task()
        self.orientation: Orientation = run.config.orientation
        self.batch_size = BATCH if isinstance(self.task, Ranking) else 1
        self._model: nn.Module = run.model(checkpoint, ema=ema).to(self.device)
        self._preprocess = self.task.preprocess()

    def preprocess(self, image: Image.Image) -> Tensor:
        """See `Backend.preprocess`."""
        return self._preprocess(image)

    @torch.inference_mode()
    def predict(self, images: Tensor, top: int | None) -> list[Prediction]:
        """See `Backend.predict`."""
        images = images.to(self.device)
        if top is None:
            return self.task.predict(self._model, images)
        return _ranking(self.task, self.run.config.task).rank(self._model(images), top)


@dataclass
class LogitsBackend:
    """A network outside of PyTorch, of a task that ranks classes: a function from a batch to logits."""

    logits: Callable[[Tensor], Tensor]
    """From prepared images `(B, C, H, W)`, float32 on the CPU, to `(B, classes)`."""
    task: Task[Any]
    """Of the run that the network is from."""
    name: str
    """The task's name, for messages."""
    orientation: Orientation = "exif"
    batch_size: int = BATCH

    @cached_property
    def _prepare(self) -> Preprocess:
        return self.task.preprocess()

    def preprocess(self, image: Image.Image) -> Tensor:
        """See `Backend.preprocess`."""
        return self._prepare(image)

    def predict(self, images: Tensor, top: int | None) -> list[Prediction]:
        """See `Backend.predict`."""
        return _ranking(self.task, self.name).rank(self.logits(images), TOP if top is None else top)


def _ranking(task: Task[Any], name: str) -> Ranking:
    if not isinstance(task, Ranking):
        raise ValueError(f"top is for runs that name the classes of an image, and the task is {name!r}; leave it out")
    return task


Opener = Callable[[Path], Backend | None]
"""Opens what a path names as a backend; None: it is nothing of this kind."""
OPENERS: list[Opener] = []
"""Asked in this order about a path that is no run folder: here exports and hub folders are added."""


def open_backend(
    source: str | Path, checkpoint: Which = "best", *, ema: bool = False, device: torch.device | str | None = None
) -> Backend:
    """Opens a run folder, or what one of `OPENERS` knows; arguments as `RunBackend`.

    Raises:
        FileNotFoundError: there is nothing there, or no run.
        ValueError: it is a file of weights alone, or it is damaged.
    """
    path = Path(source)
    if not (path / "config.yaml").is_file():
        for opener in OPENERS:
            if (found := opener(path)) is not None:
                return found
        if path.is_file():
            kind = "weights alone" if path.suffix.lower() in _WEIGHTS else "no run folder"
            raise ValueError(
                f"{path} is {kind}: it does not say which network, classes and image size it is for; give the run "
                "folder that `mpvg train` made"
            )
    return RunBackend(runs.load(path), checkpoint, ema=ema, device=device)
