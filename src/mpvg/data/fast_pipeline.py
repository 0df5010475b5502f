"""The fast pipeline for image files: workers decode, crop and flip in uint8, and the device augments whole batches."""

import random
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data.device_augment import DeviceAugment
from mpvg.data.images import read_pixels
from mpvg.data.loader import collate_images
from mpvg.data.types import DataInfo, DeviceTransform, ImageBatch, Pipeline, Sample

_RATIO = (3 / 4, 4 / 3)
_MODES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
# On a CPU, the intermediate results of some forty operations on a large batch do not fit into the caches; 128 images,
# processed a few at a time, take a third of the time.
_CPU_BATCH = 4


def fast_pipeline(config: RunConfig, info: DataInfo, device: torch.device) -> Pipeline:
    """The fast pipeline of training images.

    Raises:
        ValueError: augment.auto_augment is not a RandAugment that runs on whole batches.
    """
    rest = replace(config.augment, crop_padding=0, hflip=0.0)  # the worker has cropped and flipped
    try:
        augment = DeviceAugment(rest, info, config.seed, device)
    except ValueError as error:
        raise ValueError(f"{error}; or any timm string with --augment.pipeline auto") from error
    crop, rest_on_device = Crop(config.augment, info.img_size), BatchAugment(augment, config.augment.repeats)
    decode = partial(read_pixels, orientation=config.orientation)
    return Pipeline(crop, collate_images, decode=decode, device_transform=rest_on_device)


@dataclass(frozen=True)
class Crop:
    """timm's random resized crop and flip on a tensor: the same crops, from the same random numbers."""

    config: AugmentConfig
    img_size: int

    def __call__(self, sample: Sample) -> Sample:
        """Crops, resizes and flips an image (3, H, W), uint8, to (3, S, S)."""
        pixels = sample.image
        crop = RandomResizedCropAndInterpolation.get_params(pixels, self.config.crop_scale, _RATIO)
        chosen = self.config.interpolation
        mode = random.choice(_MODES) if chosen == "random" else InterpolationMode(chosen)
        small: Tensor = functional.resized_crop(pixels, *crop, [self.img_size] * 2, interpolation=mode, antialias=True)
        if self.config.hflip and torch.rand(1) < self.config.hflip:
            small = small.flip(-1)
        return sample._replace(image=small)


@dataclass(frozen=True)
class BatchAugment:
    """RandAugment, normalization and random erasing of whole batches, by numbers drawn at the start of an epoch."""

    augment: DeviceAugment
    repeats: int

    def __call__(self, epoch: int) -> DeviceTransform:
        """Draws the numbers of an epoch; each repeat uses those of another epoch, as the workers do."""
        passes = range(epoch * self.repeats, (epoch + 1) * self.repeats)
        # It stays on the CPU: 77 MB for ImageNet, and a batch needs a few kB of it.
        table = torch.cat([self.augment.draw(number) for number in passes], dim=1)

        def transform(batch: ImageBatch, chosen: Tensor) -> ImageBatch:
            draws = table[:, chosen].to(batch.images.device)
            if batch.images.device.type != "cpu":
                return batch._replace(images=self.augment(batch.images, draws))
            result = torch.empty(batch.images.shape)
            parts = (result.split(_CPU_BATCH), batch.images.split(_CPU_BATCH), draws.split(_CPU_BATCH, dim=1))
            for target, images, columns in zip(*parts, strict=True):
                target.copy_(self.augment(images, columns))
            return batch._replace(images=result)

        return transform
