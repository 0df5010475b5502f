"""Named data sets: the whole set is on the device, and batches are cut out of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.config import RunConfig
from mpvg.data.device_augment import DeviceAugment, normalize
from mpvg.data.images import to_8bit
from mpvg.data.inventory import Inventory
from mpvg.data.listing import Classes, Listing
from mpvg.data.named_sets import NAMED_SETS, Tensors
from mpvg.data.order import BatchOrder
from mpvg.data.types import DataInfo, DevicePipeline, DeviceTransform, ImageBatch, Sample, Split


def open_named(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Reads splits of a named data set; a `Format`."""
    named = NAMED_SETS[config.data]
    contents = named.read(config.loader.root, splits)
    sources = {split: TensorSource(*getattr(contents, split)) for split in splits}
    some = sources[splits[0]].images
    return Listing(
        class_names=contents.class_names,
        in_chans=some.shape[1],
        img_size=some.shape[-1],
        mean=named.mean,
        std=named.std,
        train=sources.get("train"),
        val=sources.get("val"),
        inventories={split: source.inventory() for split, source in sources.items()},
    )


@dataclass(frozen=True)
class TensorSource:
    """Samples that are in memory, as a `Source`."""

    images: Tensor
    """`(N, C, H, W)`, uint8."""
    targets: Tensor
    """`(N,)`, int64."""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int) -> Sample:
        return Sample(functional.to_pil_image(self.images[index]), int(self.targets[index]))

    def inventory(self) -> Inventory:
        """Which samples these are, by hashes of their bytes."""
        hashes = (blake2b(image.tobytes(), digest_size=8).hexdigest() for image in self.images.numpy())
        return Inventory.of(self.targets.tolist(), hashes, map(self.name, range(len(self))))

    def select(self, indices: Sequence[int]) -> "TensorSource":
        """The samples of some numbers, in that order."""
        return TensorSource(*(Tensors(self.images[list(indices)], self.targets[list(indices)])))


def device_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> DevicePipeline:
    """The pipeline of a split on the device.

    Raises:
        ValueError: the config asks for an augmentation that does not run there.
    """
    if config.augment.repeats > 1:
        raise ValueError(
            f"augment.repeats is {config.augment.repeats}, but augmentation on the device draws once for each image; "
            "give --augment.pipeline timm, or leave it out"
        )
    if split == "val":
        return DevicePipeline(lambda epoch: lambda batch, chosen: _normalized(batch, info))
    augment = DeviceAugment(config.augment, info, config.seed, device)

    def of_epoch(epoch: int) -> DeviceTransform:
        table = augment.draw(epoch).to(device)

        def transform(batch: ImageBatch, chosen: Tensor) -> ImageBatch:
            images = _resize(batch.images, info.img_size)
            return batch._replace(images=augment(images, table[:, chosen]))

        return transform

    return DevicePipeline(of_epoch)


class TensorBatches:
    """Batches of a split that is on the device."""

    skipped = 0

    def __init__(self, source: TensorSource, pipeline: DevicePipeline, order: BatchOrder, device: torch.device) -> None:
        self._images, self._targets = source.images.to(device), source.targets.to(device)
        self._pipeline, self._order = pipeline, order
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """See `Batches.epoch`."""
        transform = self._pipeline.transform(epoch)
        for chosen in self._order.batches(epoch, start):
            chosen = chosen.to(self._targets.device)
            yield transform(ImageBatch(self._images[chosen], self._targets[chosen]), chosen)


@dataclass(frozen=True)
class ResizeAndNormalize:
    """What validation does to an image, for an image of any size and mode."""

    info: DataInfo

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalized image (C, H, W)."""
        pixels = functional.pil_to_tensor(to_8bit(image).convert("L" if self.info.in_chans == 1 else "RGB"))
        return normalize(_resize(pixels[None], self.info.img_size), self.info)[0]


def _normalized(batch: ImageBatch, info: DataInfo) -> ImageBatch:
    # Batch by batch: a whole set at 224 pixels would take fifty times the memory of one at 32.
    return batch._replace(images=normalize(_resize(batch.images, info.img_size), info))


def _resize(images: Tensor, side: int) -> Tensor:
    """Resizes (N, C, H, W) to a square."""
    if images.shape[-2:] == (side, side):
        return images
    return functional.resize(images, [side, side], antialias=True)
