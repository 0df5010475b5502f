"""timm's transforms of single images, and the pipelines of image classification."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data import tensors
from mpvg.data.fast_pipeline import fast_pipeline
from mpvg.data.images import read_image, to_8bit
from mpvg.data.loader import collate_images
from mpvg.data.named_sets import DATASETS, NAMED_SETS
from mpvg.data.types import DataInfo, DevicePipeline, Pipeline, Preprocess, Sample, Split


def image_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline | DevicePipeline:
    """The pipeline of a split for image classification, as `augment.pipeline` says.

    Raises:
        ValueError: the data set cannot be read by the pipeline that is asked for.
    """
    chosen, named = config.augment.pipeline, info.name in DATASETS
    if chosen == "fast" and named:
        raise ValueError(
            f"augment.pipeline is 'fast', which is for images from files, and {info.name} is on the device already; "
            "allowed for it: 'auto', 'timm'"
        )
    on_device = named and chosen == "auto"
    if named and NAMED_SETS[info.name].place_is_class:
        _check_places(config.augment, info.name)
    if info.in_chans != 3 and not on_device:
        cure = "leave it out" if named else "its format needs a pipeline of its own, in a task (docs/own.md)"
        raise ValueError(
            f"augment.pipeline is {chosen!r}, whose transforms are for color images; {info.name} is gray: {cure}"
        )
    if info.mean_image is not None and not on_device:
        raise ValueError(
            f"the mean image is subtracted from the images of a named set on the device, and those of {info.name} go "
            f"through augment.pipeline {chosen!r}; give a named set and 'auto', or leave subtract_mean out"
        )
    if on_device:
        return tensors.device_pipeline(config, info, split, device)
    if split == "train" and chosen == "fast":
        return fast_pipeline(config, info, device)
    transform = make_preprocess(info) if split == "val" else train_transform(config.augment, info)
    decode = None if named else partial(read_image, orientation=config.orientation)
    return Pipeline(TransformImage(transform), collate_images, decode=decode)


def _check_places(augment: AugmentConfig, name: str) -> None:
    """Refuses augmentation that moves what is in an image, for a set in which the place is the class."""
    for field, off in (("crop_padding", 0), ("hflip", 0.0), ("auto_augment", None)):
        if (value := getattr(augment, field)) != off:
            raise ValueError(
                f"augment.{field} is {value!r}, which moves what is in an image, and in {name} the place is the class; "
                "leave it out"
            )


def make_preprocess(info: DataInfo) -> Preprocess:
    """What validation does to an image, from the facts of a data set alone."""
    if info.name in DATASETS and info.pipeline == "auto":
        return tensors.ResizeAndNormalize(info)
    # Resize (256 for 224 at a crop_pct of 0.875) and center crop.
    transform = create_transform(
        info.img_size, interpolation="bicubic", mean=info.mean, std=info.std, crop_pct=info.crop_pct
    )
    return ToRGB(transform)


@dataclass(frozen=True)
class TransformImage:
    """A transform of the image alone, applied to a sample."""

    transform: Callable[[Any], Tensor]

    def __call__(self, sample: Sample) -> Sample:
        return sample._replace(image=self.transform(sample.image))


@dataclass(frozen=True)
class ToRGB:
    """A transform of color images, for an image of any mode."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalized image (C, H, W)."""
        return self.transform(to_8bit(image).convert("RGB"))


def train_transform(config: AugmentConfig, info: DataInfo) -> Callable[[Image.Image], Tensor]:
    """timm's training transforms, as the config asks for them."""
    no_jitter: Any = None  # timm's own value would switch it on wherever RandAugment is off
    try:
        transform: Callable[[Image.Image], Tensor] = create_transform(
            info.img_size,
            is_training=True,
            mean=info.mean,
            std=info.std,
            scale=config.crop_scale,
            ratio=(3 / 4, 4 / 3),
            hflip=config.hflip,
            color_jitter=no_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            re_prob=config.erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"augment.auto_augment is {config.auto_augment!r}, which timm refuses ({error}); "
            "allowed: a string such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    return transform
