"""How sensitive a network is to changes of its position embedding (PE) and to shifts and resizing of the image."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.analysis.probe import LAST
from mpvg.data import ImageBatch
from mpvg.delivery import DeliveredPE
from mpvg.models.network import delivered_network
from mpvg.tasks.classification import evaluate

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Image sizes, relative to the network's own."""


@dataclass(frozen=True)
class Importance:
    """Accuracy on the same images when the PE of one layer, or of the Last LN, is changed."""

    name: str
    """The layer's number, or "Last LN"."""
    removed: float
    """No PE is delivered to this layer."""
    shuffled: float
    """The rows of its PE are delivered to other patches, by a fixed permutation."""
    swapped: float | None
    """It receives the PE of the next layer instead, and the last one that of the first; None: the shapes differ."""


@dataclass(frozen=True)
class Sensitivity:
    """All measurements of this module, on the same images."""

    images: int
    """Number of images."""
    accuracy: float
    """Of the unchanged network."""
    importance: list[Importance]
    """One entry per layer that receives a PE, in order, then the Last LN if it does."""
    translation: dict[int, float]
    """Shift in pixels -> share of images whose predicted class stays the same, over four directions."""
    resolutions: dict[int, float | None]
    """Side of the image in pixels -> accuracy with a resampled PE; None: the network does not support this size."""


class CachedBatches:
    """A few batches in memory, which can be read many times."""

    def __init__(self, batches: Sequence[ImageBatch]) -> None:
        self.batches, self.unreadable, self.skipped = list(batches), set[int](), 0

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[ImageBatch]:
        """See `Batches.epoch`."""
        yield from self.batches[start:]

    def map(self, change: Callable[[Tensor], Tensor]) -> "CachedBatches":
        """The same batches, with a function applied to the images."""
        return CachedBatches([ImageBatch(change(images), targets) for images, targets in self.batches])


@torch.inference_mode()
def measure_sensitivity(model: nn.Module, batches: CachedBatches) -> Sensitivity:
    """Makes all measurements of this module."""
    unchanged = evaluate(model, batches)
    return Sensitivity(
        images=unchanged.images,
        accuracy=unchanged.metrics["accuracy"],
        importance=importance(model, batches),
        translation=translation(model, batches),
        resolutions=resolutions(model, batches),
    )


def importance(model: nn.Module, batches: CachedBatches, seed: int = 0) -> list[Importance]:
    """Accuracy with the delivered PE of one layer removed, shuffled, or replaced by that of the next layer."""
    network = delivered_network(model)
    delivered = network.deliver(network.raw_pos_embed())
    layers = [layer for layer in range(len(delivered.per_layer) + 1) if _get(delivered, layer) is not None]

    def accuracy(layer: int, pe: Tensor | None) -> float:
        with change_delivery(model, lambda original: _replace(original, layer, pe)):
            return evaluate(model, batches).metrics["accuracy"]

    found = []
    for layer, following in zip(layers, [*layers[1:], *layers[:1]], strict=True):
        pe, other = _get(delivered, layer), _get(delivered, following)
        assert pe is not None
        order = torch.randperm(pe.shape[1], generator=torch.Generator().manual_seed(seed)).to(pe.device)
        fits = other is not None and other is not pe and other.shape == pe.shape
        found.append(
            Importance(
                name=str(layer) if layer < len(delivered.per_layer) else LAST,
                removed=accuracy(layer, None),
                shuffled=accuracy(layer, pe[:, order]),
                swapped=accuracy(layer, other) if fits else None,
            )
        )
    return found


@contextmanager
def change_delivery(model: nn.Module, change: Callable[[DeliveredPE], DeliveredPE]) -> Iterator[None]:
    """Applies a function to everything that a network delivers, inside a `with` block."""
    network: Any = model
    original = network.deliver
    network.deliver = lambda pos, grid=None: change(original(pos, grid))
    try:
        yield
    finally:
        del network.deliver  # the attribute of the instance, which hid the method of the class


def translation(model: nn.Module, batches: CachedBatches) -> dict[int, float]:
    """Share of images whose predicted class stays the same when the image is shifted and its border repeated.

    Global average pooling ignores the order of the patches, so that shifts matter little; a PE works against this.
    """
    side = batches.batches[0][0].shape[-1]
    shifts = sorted({1, *(side // divisor for divisor in (32, 16, 8, 4) if side // divisor > 1)})
    before = [model.eval()(images).argmax(dim=1) for images, _ in batches.epoch()]
    count = sum(len(classes) for classes in before)
    kept = {}
    for pixels in shifts:
        same = 0
        for right, down in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
            for (images, _), classes in zip(batches.epoch(), before, strict=True):
                same += int((model(_shifted(images, right, down)).argmax(dim=1) == classes).sum())
        kept[pixels] = same / (4 * count)
    return kept


def resolutions(model: nn.Module, batches: CachedBatches) -> dict[int, float | None]:
    """Accuracy at other image sizes: images are resized (bicubic), the PE is resampled, other weights stay the same."""
    own = batches.batches[0][0].shape[-1]
    unit = delivered_network(model).patch_embed.patch_size[0]
    found: dict[int, float | None] = {}
    for side in sorted({max(unit, round(own * size / unit) * unit) for size in SIZES}):
        try:
            resized = copy.deepcopy(model)
            if side != own:
                delivered_network(resized).set_input_size(img_size=side)
            found[side] = evaluate(resized, batches.map(partial(_resized, side=side))).metrics["accuracy"]
        except (AssertionError, ValueError):  # the size is not a multiple of the windows or strides
            found[side] = None
    return found


def _get(delivered: DeliveredPE, layer: int) -> Tensor | None:
    """The PE of a layer; the number after the last layer stands for the Last LN."""
    return delivered.last if layer == len(delivered.per_layer) else delivered.per_layer[layer]


def _replace(delivered: DeliveredPE, layer: int, pe: Tensor | None) -> DeliveredPE:
    if layer == len(delivered.per_layer):
        return delivered._replace(last=pe)
    per_layer = delivered.per_layer
    return delivered._replace(per_layer=(*per_layer[:layer], pe, *per_layer[layer + 1 :]))


def _shifted(images: Tensor, right: int, down: int) -> Tensor:
    height, width = images.shape[-2:]
    pad = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    top, left = max(-down, 0), max(-right, 0)
    return F.pad(images, pad, mode="replicate")[..., top : top + height, left : left + width]


def _resized(images: Tensor, *, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
