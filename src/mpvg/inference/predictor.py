"""Predictions of images, from files, PIL images and arrays: the one way in which a trained network is asked."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpvg.data.images import as_read, read_image
from mpvg.data.loader import count_cores
from mpvg.inference.backends import Backend, RunBackend, open_backend
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.tasks import Placed, Prediction
from mpvg.validation import check

Picture = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]
"""An image file, a PIL image, or uint8 `(H, W, 3)` in RGB or `(H, W)` in gray."""
_MAX_READERS = 8
_ARRAYS = "uint8 arrays (H, W, 3) in RGB, (H, W) in gray, (N, H, W, 3), or a list of such"


@dataclass(frozen=True)
class Outcome:
    """What became of one image."""

    number: int
    """Its place in what was given."""
    prediction: Prediction | None = None
    """None: it cannot be read."""
    picture: Image.Image | None = None
    """As it was read, RGB; None: it was not asked for, or cannot be read."""
    error: Exception | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class _Prepared:
    input: Tensor
    height: int
    width: int
    picture: Image.Image | None


class Predictor:
    """Says what is in images; the predictions are the task's own, such as `TopClasses`.

    Args:
        source: a run folder, a run, or a `Backend`.
        checkpoint: which of a run's weights: "last", or "best" on its validation set.
        ema: whether the averaged weights are used.
        device: where the network runs; None: a GPU where there is one and the run was not made for the CPU.
        batch_size: images that go through the network at once; None: 32 where classes are ranked, else 1.
        top: classes that are named of each image; None: the task's number.

    Raises:
        FileNotFoundError: there is no run, or no such weights.
        ValueError: weights are damaged or are given alone, or an argument is out of range.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Run | Backend,
        *,
        checkpoint: Which = "best",
        ema: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        top: int | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("top", top)):
            check(name, value, value is None or value >= 1, "a whole number >= 1")
        self.backend: Backend
        if isinstance(source, Run):
            self.backend = RunBackend(source, checkpoint, ema=ema, device=device)
        elif isinstance(source, str | os.PathLike):
            self.backend = open_backend(Path(source), checkpoint, ema=ema, device=device)
        else:
            self.backend = source
        self.batch_size = batch_size or self.backend.batch_size
        self.top = top

    def predict(self, images: Picture | Iterable[Picture]) -> list[Prediction]:
        """What is in one image or in several.

        Args:
            images: a `Picture`, several of them, or an array `(N, H, W, 3)`, uint8.

        Returns:
            A prediction for each, in their order; those of places are in pixels of the image itself.

        Raises:
            ValueError: an image cannot be read, or an array is of a kind whose values have no known meaning.
        """
        found = []
        for outcome in self.stream(images):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.prediction is not None
            found.append(outcome.prediction)
        return found

    def stream(self, images: Picture | Iterable[Picture], *, keep: bool = False) -> Generator[Outcome, None, None]:
        """The same for any number of images, one after another, in memory that does not grow with their number.

        Images are read ahead in threads, so that decoding overlaps the network's work.

        Args:
            images: read as they are needed.
            keep: whether outcomes have the pictures, which may be large.

        Yields:
            An outcome for each, in their order; one that cannot be read does not end the stream.
        """
        readers = min(_MAX_READERS, count_cores())
        with ThreadPoolExecutor(readers, "mpvg-reader") as pool:
            waiting: deque[Future[_Prepared]] = deque()
            source, number = iter(_each(images)), 0
            try:
                while True:
                    # Another batch is read while the first one goes through the network.
                    missing = 2 * self.batch_size + readers - len(waiting)
                    waiting.extend(pool.submit(self._prepare, image, keep) for image in islice(source, missing))
                    if not waiting:
                        return
                    results = [_result(waiting.popleft()) for _ in range(min(self.batch_size, len(waiting)))]
                    yield from self._answer(number, results)
                    number += len(results)
            finally:
                for future in waiting:
                    future.cancel()

    def _prepare(self, image: Picture, keep: bool) -> _Prepared:
        """Reads an image and makes it the network's input; runs in a thread."""
        orientation = self.backend.orientation
        name = f"image {os.fspath(image)}" if isinstance(image, str | os.PathLike) else "the image"
        picture = to_picture(image) if isinstance(image, np.ndarray) else image
        try:
            if isinstance(picture, Image.Image):
                picture = as_read(picture, orientation)
            else:
                picture = read_image(picture, orientation)
            prepared = self.backend.preprocess(picture)
        except MemoryError:
            raise
        except Exception as error:  # decoders of untrusted files raise all kinds of errors
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name} cannot be read ({reason}); give an image file, such as a PNG") from error
        return _Prepared(prepared, picture.height, picture.width, picture if keep else None)

    def _answer(self, first: int, batch: Sequence[_Prepared | Exception]) -> Iterator[Outcome]:
        """The outcomes of a batch, of which those of one size go through the network together."""
        found: deque[Prediction] = deque()
        good = [one for one in batch if isinstance(one, _Prepared)]
        for _, alike in groupby(good, lambda one: one.input.shape):
            found.extend(self.backend.predict(torch.stack([one.input for one in alike]), self.top))
        for number, one in enumerate(batch, first):
            if not isinstance(one, _Prepared):
                yield Outcome(number, error=one)
                continue
            prediction = found.popleft()
            if isinstance(prediction, Placed):
                prediction = prediction.resized(one.height, one.width)
            yield Outcome(number, prediction, one.picture)


def _result(future: "Future[_Prepared]") -> "_Prepared | Exception":
    try:
        return future.result()
    except ValueError as error:
        return error


def _each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """The images one by one."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, Tensor) or not isinstance(images, Iterable):
        raise _unknown(images)
    return map(_known, images)


def _known(image: object) -> Picture:
    """The same, refused where it is nothing that is read."""
    if not isinstance(image, str | os.PathLike | Image.Image | np.ndarray):
        raise _unknown(image)
    return image


def _unknown(image: object) -> ValueError:
    cure = "; a tensor (C, H, W) becomes one by .permute(1, 2, 0).numpy()" if isinstance(image, Tensor) else ""
    return ValueError(
        f"images is or holds a {type(image).__name__}; allowed: paths of image files, PIL images, {_ARRAYS}{cure}"
    )


def to_picture(array: "np.ndarray[Any, Any]") -> Image.Image:
    """An array as a PIL image.

    Args:
        array: uint8, `(H, W, 3)` in RGB or `(H, W)` in gray.

    Raises:
        ValueError: it is of another type or shape, whose values have no known meaning.
    """
    if array.dtype != np.uint8:
        reason = "which has no known range: 0 to 1, 0 to 255, or normalized" if array.dtype.kind == "f" else ""
        raise ValueError(
            f"an array is of type {array.dtype}{', ' + reason if reason else ''}; allowed: {_ARRAYS}; "
            "give the pixels as the file has them"
        )
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
        if not array.size:
            raise ValueError(f"an array has the shape {array.shape}; give at least one pixel")
        return Image.fromarray(np.ascontiguousarray(array))
    cures = {1: "array[..., 0] is gray", 4: "array[..., :3] leaves transparency out"}
    cure = cures.get(array.shape[-1]) if array.ndim == 3 else None
    if array.ndim == 3 and cure is None:
        cure = "channels come last: array.transpose(1, 2, 0)" if array.shape[0] in (1, 3) else "or a list of gray ones"
    raise ValueError(f"an array has the shape {array.shape}; allowed: {_ARRAYS}" + (f"; {cure}" if cure else ""))
