"""Images with boxes and masks: the transforms of detection, which move pixels and annotations together, and batches."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode, functional

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data.annotations import ImageAnnotations
from mpvg.data.device_augment import normalize
from mpvg.data.images import read_image, to_8bit
from mpvg.data.types import DataInfo, Pipeline, Sample, Source, Split

DIVISOR = 32
"""Sides of the padded images are multiples of it."""


class SceneTarget(NamedTuple):
    """The objects in one image as the network's loss wants them, and as the metrics do."""

    boxes: Tensor
    """Left, top, right, bottom in pixels of the transformed image, `(N, 4)`, float32."""
    labels: Tensor
    """Classes `(N,)`, int64, from 0 on."""
    masks: Tensor | None
    """Training: `(N, H, W)`, uint8, 0 or 1, of the image without its padding."""
    truth: ImageAnnotations | None
    """Evaluation: what is annotated, at the image's own size, with crowds."""


class SceneBatch(NamedTuple):
    """Images that are padded with zeros to one size, and the objects in each."""

    images: Tensor
    """`(B, 3, H, W)`, float32, normalized; H and W are multiples of `DIVISOR`."""
    targets: list[SceneTarget]
    sizes: list[tuple[int, int]]
    """Height and width of each image without padding."""

    @property
    def size(self) -> int:
        return len(self.images)

    @property
    def padded_sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image padded to multiples of `DIVISOR`, but not to its batch."""
        return [padded_size(size) for size in self.sizes]

    def split(self, size: int) -> Sequence["SceneBatch"]:
        """Consecutive parts of at most `size` images, padded as the whole batch is."""
        return [self._part(start, start + size) for start in range(0, self.size, size)]

    def one_by_one(self) -> Sequence["SceneBatch"]:
        """Batches of one image each without the padding to the largest: results then do not depend on the others."""
        parts = zip(self.split(1), self.padded_sizes, strict=True)
        return [part._replace(images=part.images[..., :height, :width]) for part, (height, width) in parts]

    def to(self, device: torch.device) -> "SceneBatch":
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        targets = [
            target._replace(
                boxes=move(target.boxes),
                labels=move(target.labels),
                masks=None if target.masks is None else move(target.masks),
            )
            for target in self.targets
        ]
        return SceneBatch(move(self.images), targets, self.sizes)

    def _part(self, start: int, end: int) -> "SceneBatch":
        return SceneBatch(self.images[start:end], self.targets[start:end], self.sizes[start:end])


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width as the next multiples of `DIVISOR`."""
    height, width = (-(-side // DIVISOR) * DIVISOR for side in size)
    return height, width


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """Pads images (C, h, w) with zeros, below and on the right, to multiples of `DIVISOR` and to the largest."""
    sizes = [padded_size((image.shape[-2], image.shape[-1])) for image in images]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    return torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])


def collate_scenes(samples: list[Sample]) -> SceneBatch:
    """Makes a batch of transformed samples."""
    sizes = [(sample.image.shape[-2], sample.image.shape[-1]) for sample in samples]
    return SceneBatch(pad_images([sample.image for sample in samples]), [sample.target for sample in samples], sizes)


@dataclass(frozen=True, kw_only=True)
class DetectionSizes:
    """Sizes in pixels of the images of detection; the defaults are those of ViT-Adapter's Mask R-CNN, 3x+MS."""

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Of a training image, one of which is drawn."""
    long_side: int = 1333
    """Of any image, at most, but for crops."""
    first_sides: tuple[int, ...] = (400, 500, 600)
    """Every second training image first gets one of these short sides and a crop; empty: none does."""
    crop_sides: tuple[int, int] = (384, 600)
    """Range of the sides of that crop."""
    max_side: int = 1024
    """Of the crop of a training image at the end, at most."""
    test_side: int = 800
    """Short side in evaluation."""

    @classmethod
    def fixed(cls, side: int) -> "DetectionSizes":
        """Every image gets this side; nothing is cropped."""
        return cls(short_sides=(side,), long_side=side, first_sides=(), max_side=side, test_side=side)


def detection_pipeline(config: RunConfig, info: DataInfo, split: Split, sizes: DetectionSizes) -> Pipeline:
    """The pipeline of a split for the detection of objects.

    Args:
        config: `augment.hflip` is the probability of a flip.
        info: mean and standard deviation of the images.
        split: training is augmented, and batches are of one orientation.
        sizes: of the images.

    Raises:
        ValueError: an augmentation of image classification is asked for.
    """
    check_augment(config.augment)
    train = split == "train"
    return Pipeline(
        TrainScene(sizes, config.augment.hflip, info) if train else TestScene(sizes, info),
        collate_scenes,
        decode=partial(read_image, orientation=config.orientation),
        group=orientations if train else None,
    )


def check_augment(config: AugmentConfig) -> None:
    """Raises ValueError where an augmentation is asked for that would leave boxes or label maps where they were."""
    usual = AugmentConfig(hflip=config.hflip)
    for name in vars(usual):
        if (value := getattr(config, name)) != getattr(usual, name):
            raise ValueError(
                f"augment.{name} is {value!r}, which is for image classification; leave it out: of `augment`, hflip "
                "alone is for images whose places are annotated"
            )


def orientations(source: Source) -> Tensor:
    """Whether each image is wider than high (N,), bool: a batch of both is mostly padding."""
    targets: Any = getattr(source, "targets", None)
    return torch.from_numpy(targets.sizes[:, 0] > targets.sizes[:, 1])


class Scene(NamedTuple):
    """An image and the places of the objects in it, which the same functions of torchvision move."""

    image: tv_tensors.Image
    """(3, H, W), float32, in [0, 255]."""
    boxes: tv_tensors.BoundingBoxes
    """(N, 4), float32."""
    masks: tv_tensors.Mask
    """(N, H, W), uint8."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[-2], self.image.shape[-1]

    def map(self, move: Callable[[Any], Any]) -> "Scene":
        """Moves all of it."""
        return Scene(*map(move, self))

    def resized(self, short: int, long: int) -> "Scene":
        """The scene at the size of `keep_ratio`: as `resize` does."""
        size = keep_ratio(self.size, short, long)
        return self if size == self.size else self.map(partial(resize, size=size))

    def cropped(self, height: int, width: int) -> "Scene":
        """A crop of at most this size at a random place; boxes are cut, not computed anew from the masks."""
        own_height, own_width = self.size
        height, width = min(height, own_height), min(width, own_width)
        top, left = random.randint(0, own_height - height), random.randint(0, own_width - width)
        return self.map(partial(functional.crop, top=top, left=left, height=height, width=width))


def keep_ratio(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """The largest height and width of the same ratio with at most this short and this long side, as mmcv rounds it."""
    scale = min(long / max(size), short / min(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def to_scene(sample: Sample) -> Scene:
    """A sample of an annotated image, with its masks."""
    truth: ImageAnnotations = sample.target
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(truth.boxes).float(), format="XYXY", canvas_size=(truth.height, truth.width)
    )
    masks = tv_tensors.Mask(torch.from_numpy(truth.masks()))
    return Scene(to_pixels(sample.image), functional.clamp_bounding_boxes(boxes), masks)


def to_pixels(image: Image.Image) -> tv_tensors.Image:
    """An image (3, H, W), float32, in [0, 255]."""
    return tv_tensors.Image(functional.pil_to_tensor(to_8bit(image).convert("RGB")).float())


@dataclass(frozen=True)
class TrainScene:
    """Flip, resize, with or without a crop before it, and crop; as ViT-Adapter's `AutoAugment` policies do."""

    sizes: DetectionSizes
    flip: float
    """Probability."""
    info: DataInfo

    def __call__(self, sample: Sample) -> Sample:
        """Returns the normalized image (3, H, W) and a `SceneTarget`."""
        sizes, scene = self.sizes, to_scene(sample)
        labels = torch.from_numpy(sample.target.labels)
        if random.random() < self.flip:
            scene = scene.map(functional.horizontal_flip)
        if sizes.first_sides and random.random() < 0.5:
            scene = scene.resized(random.choice(sizes.first_sides), sizes.long_side)
            low, high = sizes.crop_sides
            height, width = (random.randint(min(side, low), min(side, high)) for side in scene.size)
            scene, labels = without_empty(scene.cropped(height, width), labels)
        scene = scene.resized(random.choice(sizes.short_sides), sizes.long_side)
        scene, labels = without_empty(scene.cropped(sizes.max_side, sizes.max_side), labels)
        boxes, masks = (part.as_subclass(Tensor) for part in (scene.boxes, scene.masks))
        return Sample(_normalized(scene.image, self.info), SceneTarget(boxes, labels, masks, None))


def without_empty(scene: Scene, labels: Tensor) -> tuple[Scene, Tensor]:
    """The scene without the objects of which a crop has left nothing; it may have none left."""
    kept = (scene.boxes[:, 2:] > scene.boxes[:, :2]).all(dim=1).as_subclass(Tensor)
    boxes, masks = (tv_tensors.wrap(part[kept], like=part) for part in (scene.boxes, scene.masks))
    return Scene(scene.image, boxes, masks), labels[kept]


@dataclass(frozen=True)
class TestScene:
    """Resize, with the objects as they are annotated."""

    __test__ = False  # it is not a test
    sizes: DetectionSizes
    info: DataInfo

    def __call__(self, sample: Sample) -> Sample:
        """Returns the normalized image (3, H, W) and a `SceneTarget`."""
        truth: ImageAnnotations = sample.target
        image = self.image(sample.image)
        scale = torch.tensor([image.shape[-1] / truth.width, image.shape[-2] / truth.height]).repeat(2)
        boxes = torch.from_numpy(truth.boxes).float() * scale
        return Sample(image, SceneTarget(boxes, torch.from_numpy(truth.labels), None, truth))

    def image(self, image: Image.Image) -> Tensor:
        """What evaluation does to an image of any mode: (3, H, W), normalized, not padded."""
        pixels = to_pixels(image)
        size = keep_ratio((pixels.shape[-2], pixels.shape[-1]), self.sizes.test_side, self.sizes.long_side)
        return _normalized(resize(pixels, size), self.info)


def resize(part: Any, size: tuple[int, int]) -> Any:
    """An image, boxes or masks at another height and width: bilinear and not antialiased, as in mmcv; masks nearest."""
    return functional.resize(part, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)


def _normalized(pixels: Tensor, info: DataInfo) -> Tensor:
    return normalize(pixels.as_subclass(Tensor)[None], info)[0]
