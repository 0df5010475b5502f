"""How sensitive a network is to changes of its position embedding (PE) and to shifts and resizing of the image."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from mpvg.analysis.probe import LAST
from mpvg.data import ImageBatch
from mpvg.delivery import DeliveredPE
from mpvg.models.network import delivered_network
from mpvg.tasks.classification import evaluate

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Image sizes, relative to the network's own."""


KINDS = {
    "removed": "removed",
    "mean": "its mean over patches",
    "swapped": "the neighbor's",
    "shuffled": "its rows shuffled",
    "noise": "noise of its mean and std",
}
"""What a place receives instead of its PE: field of Importance -> in words."""


@dataclass(frozen=True)
class Change:
    """How the scores change, on the same images: the changed network minus the unchanged one."""

    accuracy: float
    """In [-1, 1]."""
    nll: float
    """Mean negative log-likelihood of the targets, in nats."""


@dataclass(frozen=True)
class Importance:
    """The changes when one place, a layer or the Last LN, receives something else than its PE; see `replacements`."""

    name: str
    """The layer's number, or "Last LN"."""
    neighbor: str | None
    """The place whose PE `swapped` delivers: the next one, or the previous one if the next has another shape or there
    is none; None: no neighbor has a PE of this shape."""
    removed: Change
    """Nothing, so that the layer also lacks the mean of its PE, which may be all that it uses of it."""
    mean: Change
    """The mean over patches of its PE, at every patch."""
    swapped: Change | None
    """The PE of the neighbor."""
    shuffled: Change
    """The rows of its PE at other patches, by a fixed permutation."""
    noise: Change
    """Fixed noise with the mean and the standard deviation over patches of its PE, in each channel."""


@dataclass(frozen=True)
class Sensitivity:
    """All measurements of this module, on the same images."""

    images: int
    """Number of images."""
    accuracy: float
    """Of the unchanged network."""
    nll: float
    """Mean negative log-likelihood of the targets under the unchanged network, in nats."""
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
        nll=unchanged.metrics["nll"],
        importance=importance(model, batches),
        translation=translation(model, batches),
        resolutions=resolutions(model, batches),
    )


def importance(model: nn.Module, batches: CachedBatches) -> list[Importance]:
    """Changes what one place receives, each place in turn; the other places and the chain stay as they are."""
    network = delivered_network(model)
    delivered = network.deliver(network.raw_pos_embed())
    names = place_names(delivered)
    pes = {place: pe for place in range(len(names)) if (pe := pe_at(delivered, place)) is not None}
    unchanged = evaluate(model, batches).metrics

    def change(place: int, pe: Tensor | None) -> Change:
        with change_delivery(model, lambda original: replace_pe(original, place, pe)):
            changed = evaluate(model, batches).metrics
        return Change(changed["accuracy"] - unchanged["accuracy"], changed["nll"] - unchanged["nll"])

    found = []
    for place, pe in pes.items():
        neighbor = _neighbor(pes, place)
        made = {name: change(place, value) for name, value in replacements(pe, network.num_prefix_tokens).items()}
        found.append(
            Importance(
                name=names[place],
                neighbor=None if neighbor is None else names[neighbor],
                removed=change(place, None),
                swapped=None if neighbor is None else change(place, pes[neighbor]),
                **made,
            )
        )
    return found


def replacements(pe: Tensor, prefix: int, seed: int = 0) -> dict[str, Tensor]:
    """What takes the place of a PE: `mean`, `shuffled` and `noise` of Importance.

    Args:
        pe: `(1, rows, C)`.
        prefix: number of rows before those of the patches; they stay as they are.
        seed: of the permutation and the noise, which are the same at every place of a shape.
    """
    kept, patches = pe[:, :prefix], pe[:, prefix:]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(patches.shape[1], generator=generator).to(pe.device)
    mean, std = patches.mean(dim=1, keepdim=True), patches.std(dim=1, correction=0, keepdim=True)
    noise = torch.randn(patches.shape, generator=generator).to(pe)
    noise = noise - noise.mean(dim=1, keepdim=True)
    noise = noise / noise.std(dim=1, correction=0, keepdim=True).clamp(min=1e-12)  # a single patch has no deviation
    made = {"mean": mean.expand_as(patches), "shuffled": patches[:, order], "noise": mean + std * noise}
    return {name: torch.cat([kept, value], dim=1) for name, value in made.items()}


@contextmanager
def change_delivery(
    model: nn.Module, change: Callable[[DeliveredPE], DeliveredPE], *, input_factor: float = 1.0
) -> Iterator[None]:
    """Applies a function to everything that a network delivers, inside a `with` block.

    Args:
        model: a network of this package.
        change: is given what layers and Last LN receive, and returns what they shall receive.
        input_factor: of the PE that is added to the tokens before layer 0; what is delivered is computed without it.
    """
    network: Any = model
    raw, original = network.raw_pos_embed, network.deliver
    network.raw_pos_embed = lambda grid=None: raw(grid) if input_factor == 1 else input_factor * raw(grid)
    network.deliver = lambda pos, grid=None: change(original(pos if input_factor == 1 else raw(grid), grid))
    try:
        yield
    finally:
        del network.deliver, network.raw_pos_embed  # attributes of the instance, which hid the methods of the class


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
                same += int((model(shifted(images, right, down)).argmax(dim=1) == classes).sum())
        kept[pixels] = same / (4 * count)
    return kept


def resolutions(model: nn.Module, batches: CachedBatches) -> dict[int, float | None]:
    """Accuracy at other image sizes: images are resized (bicubic), the PE is resampled, other weights stay the same."""
    own = batches.batches[0][0].shape[-1]
    unit = to_2tuple(delivered_network(model).patch_size)[0]
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


def place_names(delivered: DeliveredPE) -> list[str]:
    """The names of all layers, in order, and of the Last LN."""
    return [*map(str, range(len(delivered.per_layer))), LAST]


def _neighbor(pes: dict[int, Tensor], place: int) -> int | None:
    """The next place, or else the previous one, whose PE has the same shape."""
    places = list(pes)
    at = places.index(place)
    near = [*places[at + 1 : at + 2], *places[max(0, at - 1) : at]]
    return next((other for other in near if pes[other].shape == pes[place].shape), None)


def pe_at(delivered: DeliveredPE, layer: int) -> Tensor | None:
    """The PE of a layer; the number after the last layer stands for the Last LN."""
    return delivered.last if layer == len(delivered.per_layer) else delivered.per_layer[layer]


def replace_pe(delivered: DeliveredPE, layer: int, pe: Tensor | None) -> DeliveredPE:
    """The same with another PE of a layer, numbered as in `pe_at`; None: nothing."""
    if layer == len(delivered.per_layer):
        return delivered._replace(last=pe)
    per_layer = delivered.per_layer
    return delivered._replace(per_layer=(*per_layer[:layer], pe, *per_layer[layer + 1 :]))


def shifted(images: Tensor, right: int, down: int) -> Tensor:
    """Images `(B, C, H, W)` moved by some pixels; the rows and columns that become free repeat the border."""
    height, width = images.shape[-2:]
    pad = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    top, left = max(-down, 0), max(-right, 0)
    return F.pad(images, pad, mode="replicate")[..., top : top + height, left : left + width]


def _resized(images: Tensor, *, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
