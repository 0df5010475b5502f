"""Named data sets: the whole set lies on the device, and batches are cut out of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.config import RunConfig
from mpvg.data.augment import Augment, normalise
from mpvg.data.contract import BatchOrder, Data, DataInfo
from mpvg.data.images import Arrays, Labelled, open_images
from mpvg.data.sources import SOURCES, Split


def open_tensors(config: RunConfig, *, device: torch.device, rank: int, world_size: int) -> Data:
    """Reads a named data set whole; arguments and errors as `open_data`."""
    source = SOURCES[config.data]
    raw = source.read(config.loader.root)
    info = DataInfo(
        name=config.data,
        class_names=raw.class_names,
        in_chans=raw.train.images.shape[1],
        img_size=config.network.img_size or raw.train.images.shape[-1],
        mean=config.network.mean or source.mean,
        std=config.network.std or source.std,
        crop_pct=config.network.crop_pct,
        pipeline=config.augment.pipeline,
        train_size=len(raw.train.targets),
        val_size=len(raw.val.targets),
    )
    if config.augment.pipeline == "fast":
        raise ValueError(
            f"augment.pipeline is 'fast', which is for images from files, and {info.name} lies on the device already; "
            "allowed for it: 'auto', 'timm'"
        )
    if config.augment.pipeline == "timm":
        if info.in_chans != 3:
            raise ValueError(
                f"augment.pipeline is 'timm', whose transforms are for colour; {info.name} is grey: leave it out"
            )
        splits = [Labelled(Arrays(split.images), split.targets.tolist()) for split in (raw.train, raw.val)]
        return open_images(config, info, *splits, device=device, rank=rank, world_size=world_size)
    if config.augment.repeats > 1:
        raise ValueError(
            f"augment.repeats is {config.augment.repeats}, but augmentation on the device draws once for each image; "
            "give --augment.pipeline timm, or leave it out"
        )
    augment = Augment(config.augment, info, config.seed, device)
    order = partial(BatchOrder, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)

    def batches(split: Split, augment: Augment | None) -> TensorBatches:
        split = Split(split.images.to(device), split.targets.to(device))
        return TensorBatches(split, order(size=len(split.targets), shuffle=augment is not None), augment, info)

    return Data(info, batches(raw.train, augment), batches(raw.val, None), Preprocess(info))


class TensorBatches:
    """Batches of a split that lies on the device."""

    skipped = 0

    def __init__(self, split: Split, order: BatchOrder, augment: Augment | None, info: DataInfo) -> None:
        self._split, self._order, self._augment, self._info = split, order, augment, info

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`."""
        images, targets = self._split
        table = self._augment.draw(epoch).to(targets.device) if self._augment else None
        for chosen in self._order.batches(epoch, start):
            chosen = chosen.to(targets.device)
            # Batch by batch: a whole set at 224 pixels would take fifty times the room of one at 32.
            batch = _resize(images[chosen], self._info.img_size)
            if self._augment and table is not None:
                yield self._augment(batch, table[:, chosen]), targets[chosen]
            else:
                yield normalise(batch, self._info), targets[chosen]


@dataclass(frozen=True)
class Preprocess:
    """What validation does to an image, for an image of any size and mode."""

    info: DataInfo

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalised image (C, H, W)."""
        pixels = functional.pil_to_tensor(image.convert("L" if self.info.in_chans == 1 else "RGB"))
        return normalise(_resize(pixels[None], self.info.img_size), self.info)[0]


def _resize(images: Tensor, side: int) -> Tensor:
    """Resizes (N, C, H, W) to a square."""
    if images.shape[-2:] == (side, side):
        return images
    return functional.resize(images, [side, side], antialias=True)
