"""Beyond the paper's figures: what a network loses when its position embedding (PE), its image or its size changes."""

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
from mpvg.delivery import DeliveredPE
from mpvg.tasks import evaluate

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Image sizes, as shares of the network's own."""


@dataclass(frozen=True)
class Importance:
    """Accuracy on the same images once the PE of one place is changed; None: it cannot be."""

    name: str
    """The layer's number, or "Last LN"."""
    removed: float
    """Nothing is delivered there."""
    shuffled: float
    """Its rows are delivered to other patches, by a fixed permutation."""
    swapped: float | None
    """The next place's PE is delivered there, the first one's to the last; None: no other has its shape."""


@dataclass(frozen=True)
class Beyond:
    """What changes do to the answers; all on the same images."""

    images: int
    accuracy: float
    """Of the unchanged network."""
    importance: list[Importance]
    translation: dict[int, float]
    """Pixels of a shift -> share of images that keep their class, over four directions."""
    resolutions: dict[int, float | None]
    """Side of the image in pixels -> accuracy, the PE resampled; None: the network does not take that size."""


class Held:
    """A few batches that are read again and again."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.skipped = list(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`."""
        yield from self.batches[start:]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Held":
        """The same batches with other images."""
        return Held([(change(images), targets) for images, targets in self.batches])


@torch.inference_mode()
def look_beyond(model: nn.Module, held: Held) -> Beyond:
    """Makes every measurement of this module on some batches."""
    own = evaluate(model, held)
    return Beyond(own.count, own.accuracy, importance(model, held), translation(model, held), resolutions(model, held))


def importance(model: nn.Module, held: Held, seed: int = 0) -> list[Importance]:
    """Accuracy with the delivered PE of one place removed, shuffled, or swapped with the next place's."""
    network: Any = model
    delivered: DeliveredPE = network.deliver(network.position())
    places = [place for place in range(len(delivered.per_layer) + 1) if _at(delivered, place) is not None]

    def scored(place: int, pe: Tensor | None) -> float:
        with delivering(model, lambda original: _with(original, place, pe)):
            return evaluate(model, held).accuracy

    found = []
    for at, place in enumerate(places):
        pe, other = _at(delivered, place), _at(delivered, places[(at + 1) % len(places)])
        assert pe is not None
        order = torch.randperm(pe.shape[1], generator=torch.Generator().manual_seed(seed)).to(pe.device)
        fits = other is not None and other is not pe and other.shape == pe.shape
        name = str(place) if place < len(delivered.per_layer) else LAST
        found.append(
            Importance(name, scored(place, None), scored(place, pe[:, order]), scored(place, other) if fits else None)
        )
    return found


@contextmanager
def delivering(model: nn.Module, change: Callable[[DeliveredPE], DeliveredPE]) -> Iterator[None]:
    """Lets a network deliver something else."""
    network: Any = model
    original = network.deliver
    network.deliver = lambda pos, grid=None: change(original(pos, grid))
    try:
        yield
    finally:
        del network.deliver  # the instance's; the class's is there again


def translation(model: nn.Module, held: Held) -> dict[int, float]:
    """Share of images whose most probable class stays when the image is shifted, its border repeated.

    Averaging over tokens is used because it keeps the answer under shifts; a PE works against that.
    """
    side = held.batches[0][0].shape[-1]
    shifts = sorted({1, *(side // part for part in (32, 16, 8, 4) if side // part > 1)})
    before = [model.eval()(images).argmax(dim=1) for images, _ in held.epoch()]
    count = sum(len(answers) for answers in before)
    kept = {}
    for pixels in shifts:
        same = 0
        for right, down in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
            for (images, _), answers in zip(held.epoch(), before, strict=True):
                same += int((model(_shifted(images, right, down)).argmax(dim=1) == answers).sum())
        kept[pixels] = same / (4 * count)
    return kept


def resolutions(model: nn.Module, held: Held) -> dict[int, float | None]:
    """Accuracy at other image sizes: images resized (bicubic), the PE resampled, weights as they are."""
    own = held.batches[0][0].shape[-1]
    network: Any = model
    unit = network.patch_embed.patch_size[0]
    found: dict[int, float | None] = {}
    for side in sorted({max(unit, round(own * size / unit) * unit) for size in SIZES}):
        try:
            resized = copy.deepcopy(network)
            if side != own:
                resized.set_input_size(img_size=side)
            found[side] = evaluate(resized, held.map(partial(_resized, side=side))).accuracy
        except (AssertionError, ValueError):  # sizes that windows or stages do not divide
            found[side] = None
    return found


def _at(delivered: DeliveredPE, place: int) -> Tensor | None:
    return delivered.last if place == len(delivered.per_layer) else delivered.per_layer[place]


def _with(delivered: DeliveredPE, place: int, pe: Tensor | None) -> DeliveredPE:
    if place == len(delivered.per_layer):
        return delivered._replace(last=pe)
    per_layer = delivered.per_layer
    return delivered._replace(per_layer=(*per_layer[:place], pe, *per_layer[place + 1 :]))


def _shifted(images: Tensor, right: int, down: int) -> Tensor:
    height, width = images.shape[-2:]
    pad = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    top, left = max(-down, 0), max(-right, 0)
    return F.pad(images, pad, mode="replicate")[..., top : top + height, left : left + width]


def _resized(images: Tensor, *, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
