"""Image files, wherever they lie: the one way from their bytes to batches, through either pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from mpvg.config import RunConfig
from mpvg.data.contract import Data
from mpvg.data.fast import fast_training, read_pixels
from mpvg.data.images import Labelled, describe_images, open_images, read_image

Reader = Callable[[str | BinaryIO], Any]
"""Reads an image file, by name or opened, in the form that the split's transform takes."""


class Files(Protocol):
    """Where the image files of a split lie: in a folder, in tar files, in a table."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """What messages call an image."""

    def open(self, index: int) -> str | BinaryIO:
        """An image file, by name or opened at its beginning."""


@dataclass(frozen=True)
class LabelledFiles:
    """A split: its image files, and the target of each."""

    files: Files
    targets: "Sequence[int] | np.ndarray[Any, Any]"

    def read_by(self, reader: Reader) -> Labelled:
        """The split as images of the form that the reader gives."""
        return Labelled(Decoded(self.files, reader), self.targets)


@dataclass(frozen=True)
class Decoded:
    """Image files and what reads them, as a source of images."""

    files: Files
    reader: Reader

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def read(self, index: int) -> Any:
        return self.reader(self.files.open(index))


def open_files(
    config: RunConfig,
    class_names: Sequence[str],
    train: LabelledFiles,
    val: LabelledFiles,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
) -> Data:
    """Makes data of two splits of image files, by the pipeline that the config names; rest as `open_data`."""
    fast = config.augment.pipeline == "fast"
    splits = train.read_by(read_pixels if fast else read_image), val.read_by(read_image)
    info = describe_images(config, class_names, *splits)
    training = fast_training(config, info, device) if fast else None
    return open_images(config, info, *splits, training=training, device=device, rank=rank, world_size=world_size)
