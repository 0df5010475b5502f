"""What the parts of the data layer hand to one another: samples, sources, batches, and the facts of a data set.

A format (`register_format`) lists a data set's files and gives a `Source` per split; a `Pipeline` turns the samples of
a source into batches; `open_split` joins the two, with one order, one way of seeding and one handling of failures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from mpvg.data.inventory import Inventory

Split = Literal["train", "val"]
Decoder = Callable[[Any], Any]
"""Reads an image file, given by name or opened at its beginning."""


@dataclass(frozen=True)
class Shard:
    """Which part of each batch a process reads, and the device it wants it on."""

    device: torch.device
    rank: int = 0
    """Number of this process, in [0, world_size)."""
    world_size: int = 1
    """Processes that share the data."""


class Sample(NamedTuple):
    """One image and its target: a class number, boxes, a label map, ..."""

    image: Any
    """As its source reads it: a PIL image, or uint8 `(C, H, W)`; after the transform what the batch is made of."""
    target: Any


class Source(Protocol):
    """The samples of one split."""

    def __len__(self) -> int:
        """Number of samples."""

    def name(self, index: int) -> str:
        """What messages call a sample."""

    def read(self, index: int) -> Sample:
        """Reads a sample; raises whatever its decoder raises."""


class Tensors(NamedTuple):
    """Images (N, C, H, W), uint8, and targets (N,), int64."""

    images: Tensor
    targets: Tensor


class Contents(NamedTuple):
    """The splits of a named set that were asked for, and the names of its classes."""

    class_names: tuple[str, ...]
    train: Tensors | None = None
    val: Tensors | None = None


class Batch(Protocol):
    """Samples of one step on one process."""

    @property
    def size(self) -> int:
        """Number of images."""

    def split(self, size: int) -> Sequence[Self]:
        """Consecutive parts of at most `size` images."""

    def to(self, device: torch.device) -> Self:
        """The batch on a device; the copy may still be in progress."""


B_co = TypeVar("B_co", bound=Batch, covariant=True)


class ImageBatch(NamedTuple):
    """Images and one number or vector for each."""

    images: Tensor
    """`(B, C, H, W)`, float32, normalized."""
    targets: Tensor
    """`(B,)`, int64, or whatever a task predicts, `(B, ...)`."""

    @property
    def size(self) -> int:
        return len(self.images)

    def split(self, size: int) -> Sequence["ImageBatch"]:
        parts = zip(self.images.split(size), self.targets.split(size), strict=True)
        return [ImageBatch(images, targets) for images, targets in parts]

    def to(self, device: torch.device) -> "ImageBatch":
        return ImageBatch(*(value.to(device, non_blocking=True) for value in self))


class Batches(Protocol[B_co]):
    """The batches of one split, read in passes."""

    unreadable: set[int]
    """Numbers of the samples that could not be read so far; a resumed run puts those in that it knows of."""

    @property
    def skipped(self) -> int:
        """How many these are: one that is met twice counts once."""

    def __len__(self) -> int:
        """Batches per epoch on this process."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[B_co]:
        """Reads one pass; a split serves one pass at a time.

        Args:
            epoch: number of the pass, from 0; with the run's seed it fixes order and augmentation.
            start: batches to skip at the beginning, in [0, len]; the others are the same bits as without it.

        Yields:
            Batches on the device.
        """


@runtime_checkable
class NamedSamples(Protocol):
    """What batches have beside `Batches` where their samples have names."""

    def name(self, number: int) -> str:
        """What messages call a sample of the split."""


Transform = Callable[[Sample], Sample]
"""Makes what a source reads into what a batch is made of, on the CPU."""
DeviceTransform = Callable[[Any, Tensor], Any]
"""Makes a batch on the device into the network's input, given the samples' numbers `(B,)`; returns a batch."""


@dataclass(frozen=True)
class Pipeline:
    """How the samples of a split become batches."""

    transform: Transform
    """Applied to each sample, in a worker, with random numbers from (seed, epoch, sample)."""
    collate: Callable[[list[Sample]], Any]
    """Makes a batch of transformed samples."""
    decode: Decoder | None = None
    """Reads image files instead of the source's own decoder; None: the source's own."""
    device_transform: Callable[[int], DeviceTransform] | None = None
    """Epoch -> what is left to do on the device; None: nothing."""
    group: Callable[[Source], Tensor] | None = None
    """Training: the two groups, True and False, of the samples `(N,)`, of which batches are made; None: one."""


@dataclass(frozen=True)
class DevicePipeline:
    """How batches are cut out of a set that is on the device as a whole."""

    transform: Callable[[int], DeviceTransform]
    """Epoch -> what makes uint8 images into the network's input."""


MakePipeline = Callable[[Any, "DataInfo", Split, torch.device], Pipeline | DevicePipeline]
"""Makes the pipeline of a split from a RunConfig, the data set's facts, the split and the device."""


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """JSON-safe description of a data set and of how its images are prepared."""

    name: str
    """The set's name or the folder, as given."""
    class_names: tuple[str, ...]
    """Names in the order of the targets."""
    in_chans: int
    """Channels of an image: 1 or 3."""
    img_size: int
    """Side in pixels of the square image that reaches the network."""
    mean: tuple[float, ...]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for values in [0, 1]."""
    train_size: int
    """Training images, over all processes."""
    val_size: int
    """Validation images, over all processes."""
    crop_pct: float = 0.875
    """Images from files, evaluation: side of the center crop divided by the shorter side of the resized image."""
    pipeline: str = "auto"
    """The run's `augment.pipeline`."""
    mean_image: tuple[float, ...] | None = None
    """Mean image of the training set that is subtracted from every image, `(C, S, S)` flattened, in [0, 255]."""
    train_hash: str | None = field(default=None, compare=False)
    """Hash of names, sizes and targets of the training samples; None: unknown, as in runs made before it existed."""
    val_hash: str | None = field(default=None, compare=False)
    """The same of the validation samples."""
    category_ids: tuple[int, ...] = ()
    """Ids of the classes in the data set's own files, in the order of the targets; empty: they have none."""

    def __post_init__(self) -> None:
        if self.category_ids and len(self.category_ids) != len(self.class_names):
            raise ValueError(f"category_ids are {len(self.category_ids)}; allowed: one for each class, or none")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != self.in_chans:
                raise ValueError(
                    f"network.{name} is {value}; allowed for {self.name}: {self.in_chans} number(s), one per channel"
                )
        if self.mean_image is not None:
            side = math.isqrt(len(self.mean_image) // self.in_chans)
            if not side or len(self.mean_image) != self.in_chans * side * side:
                raise ValueError(f"mean_image has {len(self.mean_image)} numbers; allowed: {self.in_chans} x S x S")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Data:
    """A data set that is ready to be read."""

    info: DataInfo
    train: Batches[Any]
    val: Batches[Any]
    inventories: Mapping[Split, Inventory] = field(default_factory=dict)
    """What the hashes in `info` are of, to name the first sample that differs."""


Preprocess = Callable[[Image.Image], Tensor]
"""Turns any image into the network's input `(C, H, W)`, float32 on the CPU, exactly as validation does."""
