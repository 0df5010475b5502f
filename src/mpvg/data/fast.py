"""The fast pipeline for image files: workers decode, crop and flip in uint8, and the device augments whole batches."""

import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, BinaryIO

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data.augment import Augment
from mpvg.data.contract import DataInfo
from mpvg.data.images import MAX_ASPECT, Finish, Training, read_image

_JPEG = b"\xff\xd8\xff"
_COLOURS = ("YCbCr", "Gray", "RGB")
_RATIO = (3 / 4, 4 / 3)
_MODES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
# On a CPU, what some forty operations make of a large batch leaves the caches, and its memory is fetched anew from the
# system each time; 128 images, taken a few at a time, take a third of the time.
_CPU_BATCH = 4


def fast_training(config: RunConfig, info: DataInfo, device: torch.device) -> Training:
    """What the fast pipeline does to training images.

    Raises:
        ValueError: augment.auto_augment is no RandAugment that can be carried out on whole batches.
    """
    rest = replace(config.augment, crop_padding=0, hflip=0.0)  # the worker has cropped and flipped
    try:
        augment = Augment(rest, info, config.seed, device)
    except ValueError as error:
        raise ValueError(f"{error}; or any string of timm's with --augment.pipeline auto") from error
    return Training(Crop(config.augment, info.img_size), Finishing(augment, config.augment.repeats))


def read_pixels(file: str | BinaryIO) -> Tensor:
    """Reads an image file whole, by name or opened at its beginning, as RGB (3, H, W), uint8.

    The values, refusals and errors are those of `read_image`.
    """
    pixels = _decode_jpeg(file)
    return functional.pil_to_tensor(read_image(file)) if pixels is None else pixels


@dataclass(frozen=True)
class Crop:
    """timm's random resized crop and flip on a tensor: the same places, by the same random numbers."""

    config: AugmentConfig
    img_size: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """Cuts, resizes and mirrors (3, H, W), uint8, to (3, S, S)."""
        crop = RandomResizedCropAndInterpolation.get_params(pixels, self.config.crop_scale, _RATIO)
        chosen = self.config.interpolation
        mode = random.choice(_MODES) if chosen == "random" else InterpolationMode(chosen)
        small: Tensor = functional.resized_crop(pixels, *crop, [self.img_size] * 2, interpolation=mode, antialias=True)
        if self.config.hflip and torch.rand(1) < self.config.hflip:
            small = small.flip(-1)
        return small


@dataclass(frozen=True)
class Finishing:
    """RandAugment, normalisation and random erasing of whole batches, by numbers drawn at the start of an epoch."""

    augment: Augment
    repeats: int

    def __call__(self, epoch: int) -> Finish:
        """Draws the numbers of an epoch; those of each repeat are another epoch's, as the workers' are."""
        passes = range(epoch * self.repeats, (epoch + 1) * self.repeats)
        # It stays on the CPU: 77 MB for ImageNet, and a batch needs a few kB of it.
        table = torch.cat([self.augment.draw(number) for number in passes], dim=1)

        def finish(images: Tensor, chosen: Tensor) -> Tensor:
            draws = table[:, chosen].to(images.device)
            if images.device.type != "cpu":
                return self.augment(images, draws)
            result = torch.empty(images.shape)
            parts = (result.split(_CPU_BATCH), images.split(_CPU_BATCH), draws.split(_CPU_BATCH, dim=1))
            for place, some, theirs in zip(*parts, strict=True):
                place.copy_(self.augment(some, theirs))
            return result

        return finish


@cache  # a failing import would search the whole path again for each image
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(file: str | BinaryIO) -> Tensor | None:
    """Decodes a JPEG in colour or grey with simplejpeg; None: it is not installed, or PIL is to judge the file."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    with open(file, "rb") if isinstance(file, str) else nullcontext(file) as opened:
        # PIL reads the other kinds itself, so that of them no more than the beginning is read twice.
        if opened.read(len(_JPEG)) != _JPEG:
            return None
        opened.seek(0)  # not `_JPEG + read()`, which would copy what is read
        data = opened.read()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        small = height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        if not small or max(height, width) > MAX_ASPECT * min(height, width) or colours not in _COLOURS:
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError:  # it refuses harmless oddities as well, such as bytes between the segments
        return None
