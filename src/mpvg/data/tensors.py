"""Named data sets: the whole set is on the device, and batches are cut out of it."""

import math
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
from mpvg.data.named_sets import NAMED_SETS
from mpvg.data.order import BatchOrder
from mpvg.data.types import DataInfo, DevicePipeline, DeviceTransform, ImageBatch, Sample, Split, Tensors


def open_named(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Reads splits of a named data set; a `Format`.

    With `subtract_mean`, the mean image is that of the training set as `imbalance` leaves it, and the channels' means
    are 0.

    Raises:
        ValueError: network.mean is given beside `subtract_mean`.
    """
    named = NAMED_SETS[config.data]
    contents = named.read(config.loader.root, splits)
    sources = {split: TensorSource(*getattr(contents, split)) for split in splits}
    if "train" in sources and config.imbalance > 1:
        sources["train"] = make_imbalanced(sources["train"], len(contents.class_names), config.imbalance)
    some = sources[splits[0]].images
    mean, mean_image = named.mean, None
    if config.subtract_mean:
        if config.network.mean is not None:
            given = config.network.mean
            raise ValueError(f"network.mean is {given}, but subtract_mean leaves a mean of 0; leave network.mean out")
        mean = (0.0,) * some.shape[1]
        mean_image = _mean_image(sources["train"].images) if "train" in sources else None
    return Listing(
        class_names=contents.class_names,
        in_chans=some.shape[1],
        img_size=some.shape[-1],
        mean=mean,
        std=named.std,
        mean_image=mean_image,
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


def make_imbalanced(source: TensorSource, classes: int, imbalance: float) -> TensorSource:
    """The samples of a long-tailed set, in their order: of class c of C, n * imbalance ^ (-c / (C - 1)), rounded down.

    n is the size of the smallest class. Of each class the first samples are kept, at least one. Counts as in the
    long-tailed CIFAR of Cui et al., 2019 (arXiv 1901.05555).
    """
    smallest = int(source.targets.bincount(minlength=classes).min())
    shares = (imbalance ** (-number / (classes - 1)) for number in range(classes))
    limits = [max(1, int(smallest * share + 1e-9)) for share in shares]  # a power may be a little below a whole number
    seen = [0] * classes
    kept = []
    for index, target in enumerate(source.targets.tolist()):
        if seen[target] < limits[target]:
            seen[target] += 1
            kept.append(index)
    return source.select(kept)


def _mean_image(images: Tensor) -> tuple[float, ...]:
    """The mean of uint8 images `(N, C, S, S)`, flattened; four decimals, as a run keeps it in a JSON file."""
    sums = sum(part.sum(dim=0, dtype=torch.int64) for part in images.split(1000))
    assert isinstance(sums, Tensor)
    return tuple(round(value / len(images), 4) for value in sums.flatten().tolist())


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
    if info.mean_image is not None and config.augment.auto_augment:
        raise ValueError(
            f"augment.auto_augment is {config.augment.auto_augment!r}, whose ops are for pixels from 0 to 255, and "
            "subtract_mean makes them negative; leave one of the two out"
        )
    if split == "val":
        return DevicePipeline(lambda epoch: lambda batch, chosen: _normalized(batch, info))
    augment = DeviceAugment(config.augment, info, config.seed, device)

    def of_epoch(epoch: int) -> DeviceTransform:
        table = augment.draw(epoch).to(device)

        def transform(batch: ImageBatch, chosen: Tensor) -> ImageBatch:
            return batch._replace(images=augment(_sized(batch.images, info), table[:, chosen]))

        return transform

    return DevicePipeline(of_epoch)


class TensorBatches:
    """Batches of a split that is on the device."""

    skipped = 0

    def __init__(self, source: TensorSource, pipeline: DevicePipeline, order: BatchOrder, device: torch.device) -> None:
        self._images, self._targets = source.images.to(device), source.targets.to(device)
        self._pipeline, self._order, self.name = pipeline, order, source.name
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
        return normalize(_sized(pixels[None], self.info), self.info)[0]


def _normalized(batch: ImageBatch, info: DataInfo) -> ImageBatch:
    # Batch by batch: a whole set at 224 pixels would take fifty times the memory of one at 32.
    return batch._replace(images=normalize(_sized(batch.images, info), info))


def denormalize(images: Tensor, info: DataInfo) -> Tensor:
    """The pixels of prepared images `(B, C, S, S)`, in [0, 1]."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (info.mean, info.std))
    pixels = images * std + mean
    return pixels if info.mean_image is None else pixels + _mean_pixels(info, images.device) / 255


def _sized(images: Tensor, info: DataInfo) -> Tensor:
    """Images `(N, C, H, W)`, uint8, at the network's size; less the mean image, float32, where there is one.

    It is subtracted here, between resizing and augmentation, from training, validation and other images alike.
    """
    images = _resize(images, info.img_size)
    return images if info.mean_image is None else images - _mean_pixels(info, images.device)


def _mean_pixels(info: DataInfo, device: torch.device) -> Tensor:
    """The mean image at the network's size, `(C, S, S)`, in [0, 255]."""
    side = math.isqrt(len(info.mean_image or ()) // info.in_chans)
    image = torch.tensor(info.mean_image, device=device).view(1, info.in_chans, side, side)
    return _resize(image, info.img_size)[0]


def _resize(images: Tensor, side: int) -> Tensor:
    """Resizes (N, C, H, W) to a square."""
    if images.shape[-2:] == (side, side):
        return images
    return functional.resize(images, [side, side], antialias=True)
