"""Images one by one, made into tensors by worker processes; random numbers by (seed, epoch, sample) only."""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mpvg.config import AugmentConfig, LoaderConfig, RunConfig
from mpvg.data.contract import BatchOrder, Data, DataInfo, derive_seed

# By content, not by name: PIL would hand a PostScript file that is called .jpg to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT = 1000

Transform = Callable[[Any], Tensor]
"""Makes what a source reads into a tensor (C, H, W), on the CPU."""
Finish = Callable[[Tensor, Tensor], Tensor]
"""Makes a batch (B, C, H, W) that has come to the device into the network's input, given its samples' numbers (B,)."""
Sample = tuple[Tensor | None, int, str]
"""Image (C, H, W) or None, its target, and what was wrong with an image that could not be read, or ''."""


class Source(Protocol):
    """Where the images of a split come from."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """What messages call an image."""

    def read(self, index: int) -> Any:
        """An image, in the form that its transform takes; raises whatever its decoder raises."""


@dataclass(frozen=True)
class Labelled:
    """A split: its images, and the target of each."""

    images: Source
    targets: "Sequence[int] | np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Training:
    """What becomes of a training image."""

    transform: Transform
    """In the worker."""
    finishing: Callable[[int], Finish] | None = None
    """Gives what is left for the device in an epoch; None: nothing is."""


def open_images(
    config: RunConfig,
    info: DataInfo,
    train: Labelled,
    val: Labelled,
    *,
    training: Training | None = None,
    device: torch.device,
    rank: int,
    world_size: int,
) -> Data:
    """Makes data of two splits of images; trains by timm's transforms unless told otherwise; rest as `open_data`."""
    preprocess = make_preprocess(info)
    order = partial(BatchOrder, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)

    seed, skip = config.seed, config.loader.skip_corrupt
    training = training or Training(_train_transform(config.augment, info))
    shuffled = order(size=len(train.images), shuffle=True, repeats=config.augment.repeats)
    in_order = order(size=len(val.images), shuffle=False)
    learnt = Samples(train, training.transform, seed, replace=skip)
    scored = Samples(val, preprocess, seed, replace=False)
    return Data(
        info,
        ImageBatches(learnt, shuffled, config.loader, device, training.finishing),
        ImageBatches(scored, in_order, config.loader, device),
        preprocess,
    )


def describe_images(config: RunConfig, class_names: Sequence[str], train: Labelled, val: Labelled) -> DataInfo:
    """The facts of colour images from files: ImageNet's statistics and 224 pixels unless the config says otherwise."""
    return DataInfo(
        name=config.data,
        class_names=tuple(class_names),
        in_chans=3,
        img_size=config.network.img_size or 224,
        mean=config.network.mean or IMAGENET_DEFAULT_MEAN,
        std=config.network.std or IMAGENET_DEFAULT_STD,
        crop_pct=config.network.crop_pct,
        pipeline=config.augment.pipeline,
        train_size=len(train.images),
        val_size=len(val.images),
    )


def in_class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in timm's order (2 before 10)."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def make_preprocess(info: DataInfo) -> "Preprocess":
    """What validation does to an image: resize (256 for 224 at a crop_pct of 0.875) and centre crop."""
    return Preprocess(
        create_transform(info.img_size, interpolation="bicubic", mean=info.mean, std=info.std, crop_pct=info.crop_pct)
    )


class ImageBatches:
    """Batches of image files, decoded by worker processes that live as long as this object."""

    def __init__(
        self,
        images: "Samples",
        order: BatchOrder,
        config: LoaderConfig,
        device: torch.device,
        finishing: Callable[[int], Finish] | None = None,
    ) -> None:
        self.skipped = 0
        self._order, self._skip_corrupt, self._device = order, config.skip_corrupt, device
        self._finishing = finishing
        self._passes = 0
        self._keys = _Keys(order)
        self._loader = DataLoader(
            images,
            batch_sampler=self._keys,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each pass would draw from the caller's global generator
        )

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`; a validation batch of which no image can be read is not yielded.

        Raises:
            ValueError: an image cannot be read.
            RuntimeError: another pass was begun before this one ended.
        """
        self._passes += 1
        this_pass = self._passes
        self._keys.epoch, self._keys.start = epoch, start
        finish = self._finishing(epoch) if self._finishing else None
        # A training batch is whole or raises, so its images are those of `chosen`, one for one.
        for (images, targets, failures), chosen in zip(self._loader, self._order.batches(epoch, start), strict=True):
            if self._passes != this_pass:
                raise RuntimeError("another pass over the same split was begun; the workers serve one at a time")
            all_unreadable = self._order.shuffle and len(targets) == 0
            if failures and (all_unreadable or not self._skip_corrupt):
                raise ValueError(failures[0])
            self.skipped += len(failures)
            if len(targets):
                images = images.to(self._device, non_blocking=True)
                if finish:
                    images = finish(images, chosen)
                yield images, targets.to(self._device, non_blocking=True)


class Samples(Dataset[Sample]):
    """Images, each read and transformed with random numbers that depend on (seed, epoch, sample) only.

    Args:
        split: images and targets.
        transform: makes what the split's source reads into a tensor (C, H, W).
        seed: the run's seed.
        replace: read the next sample in place of one that cannot be read.
    """

    def __init__(self, split: Labelled, transform: Transform, seed: int, replace: bool) -> None:
        self._images, self._targets = split.images, np.array(split.targets)
        self._transform, self._seed, self._replace = transform, seed, replace

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: int) -> Sample:
        """Reads the sample `key` % N; `key` // N counts epochs, and the repeats within them."""
        epoch, index = divmod(key, len(self))
        failure = ""
        for step in range(len(self) if self._replace else 1):
            place = (index + step) % len(self)
            try:
                image = self._images.read(place)
            except Exception as error:  # decoders of untrusted files raise whatever they stumble over
                failure = failure or (
                    f"image {self._images.name(place)} cannot be read ({type(error).__name__}: {error}); "
                    "replace it, or --loader.skip_corrupt true leaves such images out"
                )
                continue
            with _seeded(derive_seed("sample", self._seed, epoch, index)):
                return self._transform(image), int(self._targets[place]), failure
        return None, 0, failure


@dataclass(frozen=True)
class Arrays:
    """Images that lie in memory, uint8 `(N, 3, H, W)`."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Preprocess:
    """What validation does to an image, for an image of any size and mode."""

    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalised image (C, H, W)."""
        return self.transform(image.convert("RGB"))


class _Keys(Sampler[list[int]]):
    """Batches of (epoch, repeat and sample in one number), so that a worker learns all three."""

    def __init__(self, order: BatchOrder) -> None:
        self.epoch, self.start = 0, 0
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self._order.repeats * self._order.size
        for chosen in self._order.batches(self.epoch, self.start):
            yield (first + chosen).tolist()


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Failures travel as text: an exception raised in a worker would reach the user under the worker's traceback."""
    failures = [failure for _, _, failure in samples if failure]
    images = [image for image, _, _ in samples if image is not None]
    targets = torch.tensor([target for image, target, _ in samples if image is not None], dtype=torch.int64)
    return default_collate(images) if images else torch.empty(0), targets, failures


def read_image(file: str | BinaryIO) -> Image.Image:
    """Reads an image file whole, by name or opened, as RGB.

    Raises:
        OSError: it is missing, truncated or no image.
        ValueError: its sides are too unequal to be resized.
        Image.DecompressionBombWarning: it has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width}x{image.height} is too long to be resized by its shorter side")
            return image.convert("RGB")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use; without workers this is the main process, so they are put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _train_transform(config: AugmentConfig, info: DataInfo) -> Transform:
    no_jitter: Any = None  # timm's own value would switch it on wherever RandAugment is off
    try:
        transform: Transform = create_transform(
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
