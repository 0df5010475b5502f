"""What computes a predictor's outputs: a run's network, or an exported one."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from mpvg import runs
from mpvg.data.images import Orientation
from mpvg.inference.hub import CONFIG
from mpvg.inference.loading import Exported, load_export
from mpvg.inference.preprocessing import FILE, preprocess_from, read_preprocessing
from mpvg.inference.programs import FILES
from mpvg.models.network import check_logits
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.tasks import Prediction, Ranking, Task
from mpvg.tasks.classification import top_classes

TOP = 5
"""Classes of an image that are named where nothing else is asked for."""
BATCH = 32
"""Images at once, for a task that ranks classes. Others take one at a time: their predictions are large."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".pkl")


@runtime_checkable
class Backend(Protocol):
    """Something trained that gives predictions for prepared images."""

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
        self.device = run.device if device is None else torch.device(device)
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
        ranking, logits = _ranking(self.task, self.run.config.task), self._model(images)
        check_logits(logits, len(images), len(self.run.info.class_names))
        return ranking.rank(logits, top)


class ExportBackend:
    """What `mpvg export` wrote, in its own runtime: the classes of an image.

    Args:
        exported: the network and what is done to an image before it.
    """

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        values = exported.preprocessing
        self.orientation: Orientation = "stored" if values["orientation"] == "stored" else "exif"
        self.batch_size = BATCH
        self._preprocess = preprocess_from(values)
        self._class_names = tuple(map(str, values["class_names"]))

    def origin(self) -> str:
        """Which weights of which run were exported, as text; empty: it is not known."""
        source = self.exported.preprocessing.get("source")
        run, which = (source.get(name) if isinstance(source, dict) else None for name in ("run", "checkpoint"))
        return f"weights: {which} of the run {run}" if isinstance(run, str) and isinstance(which, str) else ""

    def preprocess(self, image: Image.Image) -> Tensor:
        """See `Backend.preprocess`."""
        return self._preprocess(image)

    def predict(self, images: Tensor, top: int | None) -> list[Prediction]:
        """See `Backend.predict`."""
        logits = self.exported(images)
        check_logits(logits, len(images), len(self._class_names))
        return list(top_classes(logits, self._class_names, TOP if top is None else top))


def _ranking(task: Task[Any], name: str) -> Ranking:
    if not isinstance(task, Ranking):
        raise ValueError(f"top is for runs that name the classes of an image, and the task is {name!r}; leave it out")
    return task


def open_backend(
    source: str | Path, checkpoint: Which = "best", *, ema: bool = False, device: torch.device | str | None = None
) -> Backend:
    """Opens a run folder, or what `mpvg export` wrote; arguments as `RunBackend`.

    Raises:
        FileNotFoundError: there is nothing there, or no run.
        ValueError: it is a file of weights alone, or it is damaged.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        return RunBackend(runs.load(path), checkpoint, ema=ema, device=device)
    folder = path if path.is_dir() else path.parent
    if path.exists() and (folder / FILE).is_file():
        return ExportBackend(load_export(path))
    if path.is_dir() and any((path / name).exists() for name in (*FILES.values(), CONFIG)):
        read_preprocessing(folder)  # says what is missing
    if path.is_file():
        kind = "weights alone" if path.suffix.lower() in _WEIGHTS else "no run folder"
        raise ValueError(
            f"{path} is {kind}: it does not say which network, classes and image size it is for; give the run "
            "folder that `mpvg train` made, or a folder that `mpvg export` made"
        )
    return RunBackend(runs.load(path), checkpoint, ema=ema, device=device)
