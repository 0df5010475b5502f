"""Images with label maps: the transforms of semantic segmentation, its batches, and the sliding window."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from mpvg.config import RunConfig
from mpvg.data.ade20k import IGNORED
from mpvg.data.device_augment import normalize
from mpvg.data.images import read_image
from mpvg.data.photometric import distort
from mpvg.data.scenes import DIVISOR, check_augment, keep_ratio, pad_images, resize, to_pixels
from mpvg.data.types import DataInfo, Pipeline, Sample, Split

_CROPS = 10


class LabelBatch(NamedTuple):
    """Images that are padded with zeros to one size, and the class of each pixel."""

    images: Tensor
    """`(B, 3, H, W)`, float32, normalized."""
    labels: list[Tensor]
    """Of each image `(h, w)`, uint8, 255: of no class. Training: of the padded image. Evaluation: at its own size."""
    sizes: list[tuple[int, int]]
    """Height and width of each image without padding."""
    scaled: Sequence[tuple[Tensor, ...]] = ()
    """Evaluation at several scales: each image at each of them, `(3, H, W)` without padding; empty: at one."""

    @property
    def size(self) -> int:
        return len(self.images)

    def split(self, size: int) -> Sequence["LabelBatch"]:
        """Consecutive parts of at most `size` images, padded as the whole batch is."""
        starts = range(0, self.size, size)
        parts = (slice(start, start + size) for start in starts)
        return [LabelBatch(self.images[part], self.labels[part], self.sizes[part], self.scaled[part]) for part in parts]

    def one_by_one(self) -> Sequence["LabelBatch"]:
        """Batches of one image each without padding: results then do not depend on the others."""
        parts = zip(self.split(1), self.sizes, strict=True)
        return [part._replace(images=part.images[..., :height, :width]) for part, (height, width) in parts]

    def to(self, device: torch.device) -> "LabelBatch":
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        scaled = [tuple(map(move, images)) for images in self.scaled]
        return LabelBatch(move(self.images), [move(labels) for labels in self.labels], self.sizes, scaled)


def collate_label_maps(samples: list[Sample]) -> LabelBatch:
    """Makes a batch of transformed samples."""
    images, labels = [sample.image for sample in samples], [sample.target for sample in samples]
    scaled = [one.images for one in images if isinstance(one, AtScales)]
    first = [one.first if isinstance(one, AtScales) else one for one in images]
    return LabelBatch(pad_images(first), labels, [(one.shape[-2], one.shape[-1]) for one in first], scaled)


class AtScales(NamedTuple):
    """An image that is evaluated at several scales."""

    first: Tensor
    """At scale 1, `(3, H, W)`."""
    images: tuple[Tensor, ...]
    """At each of the scales."""


@dataclass(frozen=True, kw_only=True)
class SegmentationSizes:
    """How images of segmentation are resized and cropped; the defaults are those of ViT-Adapter's UperNet, 160k."""

    short_side: int = 512
    """Of an image, in pixels, before the ratio of training."""
    long_side: int = 2048
    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the factor of both, from which training draws."""
    crop: int = 512
    """Side of a training image, which is padded where it is smaller."""
    max_share: float = 0.75
    """Of a crop's labelled pixels that may be of one class; after ten tries any crop is taken."""
    distorted: bool = True
    """Whether brightness, contrast, saturation and hue of training images are changed; see `photometric`."""
    scales: tuple[float, ...] = (1.0,)
    """Evaluation: factors of `short_side` and `long_side`; the probabilities at these sizes are averaged."""

    @classmethod
    def fixed(cls, side: int) -> "SegmentationSizes":
        """Every image gets this side; nothing is cropped or distorted."""
        return cls(short_side=side, long_side=side, ratio=(1.0, 1.0), crop=side, max_share=1.0, distorted=False)


def segmentation_pipeline(config: RunConfig, info: DataInfo, split: Split, sizes: SegmentationSizes) -> Pipeline:
    """The pipeline of a split for semantic segmentation.

    Args:
        config: `augment.hflip` is the probability of a flip.
        info: mean and standard deviation of the images.
        split: training is augmented.
        sizes: of the images.

    Raises:
        ValueError: an augmentation of image classification is asked for, or the crop is no multiple of 32.
    """
    check_augment(config.augment)
    if sizes.crop % DIVISOR:
        raise ValueError(f"the crop of segmentation is {sizes.crop}; allowed: multiples of {DIVISOR}")
    train = split == "train"
    return Pipeline(
        TrainLabelMap(sizes, config.augment.hflip, info) if train else TestLabelMap(sizes, info),
        collate_label_maps,
        decode=partial(read_image, orientation=config.orientation),
    )


@dataclass(frozen=True)
class TrainLabelMap:
    """Resize, crop, flip, distort and pad, in mmsegmentation's order."""

    sizes: SegmentationSizes
    flip: float
    """Probability."""
    info: DataInfo

    def __call__(self, sample: Sample) -> Sample:
        """Returns the normalized image (3, S, S) and its labels (S, S), uint8."""
        sizes, pixels = self.sizes, to_pixels(sample.image)
        labels = tv_tensors.Mask(torch.from_numpy(sample.target.labels))
        ratio = random.uniform(*sizes.ratio)
        short, long = int(sizes.short_side * ratio), int(sizes.long_side * ratio)
        size = keep_ratio((pixels.shape[-2], pixels.shape[-1]), short, long)
        pixels, labels = resize(pixels, size), resize(labels, size)
        crop = self._choose_crop(labels)
        pixels, labels = crop(pixels), crop(labels)
        if random.random() < self.flip:
            pixels, labels = functional.horizontal_flip(pixels), functional.horizontal_flip(labels)
        pixels = pixels.as_subclass(Tensor)
        image = normalize((distort(pixels) if sizes.distorted else pixels)[None], self.info)[0]
        rest = (0, sizes.crop - image.shape[-1], 0, sizes.crop - image.shape[-2])
        return Sample(F.pad(image, rest), F.pad(labels.as_subclass(Tensor), rest, value=IGNORED))

    def _choose_crop(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Draws crops until none of the classes fills too much of it."""
        height, width = (min(self.sizes.crop, side) for side in labels.shape)
        for _ in range(1 if self.sizes.max_share >= 1 else 1 + _CROPS):
            top, left = random.randint(0, labels.shape[0] - height), random.randint(0, labels.shape[1] - width)
            crop = partial(functional.crop, top=top, left=left, height=height, width=width)
            counts = torch.bincount(crop(labels).as_subclass(Tensor).flatten(), minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < self.sizes.max_share:
                break
        return crop


@dataclass(frozen=True)
class TestLabelMap:
    """Resize with the ratio kept, then to the next multiples of 32; the labels stay at the image's own size."""

    __test__ = False  # it is not a test
    sizes: SegmentationSizes
    info: DataInfo

    def __call__(self, sample: Sample) -> Sample:
        """Returns the normalized image (3, H, W), or where there are scales `AtScales`; its labels (h, w), uint8."""
        image, labels = self.image(sample.image), torch.from_numpy(sample.target.labels)
        if self.sizes.scales == (1.0,):
            return Sample(image, labels)
        scaled = (image if scale == 1 else self.image(sample.image, scale) for scale in self.sizes.scales)
        return Sample(AtScales(image, tuple(scaled)), labels)

    def image(self, image: Image.Image, ratio: float = 1.0) -> Tensor:
        """What evaluation does to an image of any mode: (3, H, W), normalized.

        Args:
            image: the image.
            ratio: factor of the size, for evaluation at several.
        """
        pixels = to_pixels(image)
        short, long = int(self.sizes.short_side * ratio), int(self.sizes.long_side * ratio)
        height, width = keep_ratio((pixels.shape[-2], pixels.shape[-1]), short, long)
        pixels = resize(pixels, (height, width))
        pixels = resize(pixels, (-(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR))
        return normalize(pixels.as_subclass(Tensor)[None], self.info)[0]


def windows(size: tuple[int, int], side: int, stride: int) -> list[tuple[int, int, int, int]]:
    """The windows that cover an image: left, top, right and bottom of each, row by row.

    The last of a row or column is moved back so that it ends where the image does, as in mmsegmentation.

    Args:
        size: height and width of the image, in pixels.
        side: of a window; windows are smaller only where the image is.
        stride: between windows, at most `side`.
    """
    ends = [max(length - side, 0) for length in size]
    tops, lefts = ([min(start, end) for start in range(0, end + stride, stride)] for end in ends)
    return [(left, top, min(left + side, size[1]), min(top + side, size[0])) for top in tops for left in lefts]


def slide(images: Tensor, predict: Callable[[Tensor], Tensor], side: int = 512, stride: int = 341) -> Tensor:
    """Predicts window by window and takes the mean where windows overlap.

    Args:
        images: (B, 3, H, W).
        predict: maps (B, 3, h, w) to (B, C, h, w).
        side: of a window, in pixels.
        stride: between windows.

    Returns:
        (B, C, H, W).
    """
    height, width = images.shape[-2:]
    sums, counts = None, images.new_zeros(height, width)
    for left, top, right, bottom in windows((height, width), side, stride):
        found = predict(images[..., top:bottom, left:right])
        if sums is None:
            sums = found.new_zeros(*found.shape[:2], height, width)
        sums[..., top:bottom, left:right] += found
        counts[top:bottom, left:right] += 1
    assert sums is not None
    return sums / counts
