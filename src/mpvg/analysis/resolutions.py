"""`mpvg resolutions`: a run's network at other image sizes, its position embedding (PE) resampled in several ways."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from mpvg import statistics
from mpvg.analysis.findings import Estimate
from mpvg.analysis.numbers import estimate_text
from mpvg.analysis.paired import MARGIN, PairedDifference, judge, paired_difference, with_width
from mpvg.analysis.question import text_list, text_table, write_question
from mpvg.data import ImageBatch
from mpvg.models.mixin import DeliveryMixin
from mpvg.models.network import delivered_network, patch_grid
from mpvg.models.registry import check_divisible
from mpvg.models.vision_transformer import DeliveredVisionTransformer
from mpvg.runs.environment import environment

MAX_SIDE = 4096
RESAMPLERS = {
    "bicubic": "bicubic",
    "antialias": "bicubic, antialiased, as timm does",
    "offset": "bicubic with DINOv2's offset: scale (grid + 0.1) / old grid",
}
"""The ways to resample a PE -> what each is."""
_OFFSET = 0.1  # facebookresearch/dinov2: interpolate_offset
Size = tuple[int, int]
"""Height and width of an image in pixels."""


@dataclass(frozen=True)
class AtSize:
    """A network at one image size with one way to resample its PE."""

    size: str
    resampler: str
    accuracy: Estimate
    """In [0, 1]."""
    nll: Estimate
    """In nats."""
    against: Estimate | None
    """Accuracy minus that of "antialias" on the same images; None: it is this one."""
    p: float | None = None
    """Two-sided, of no difference, by a paired t test; with Holm's correction for all comparisons."""
    word: str = "-"


@dataclass(frozen=True)
class Resolutions:
    """What `mpvg resolutions` found."""

    network: str
    weights: str
    data: str
    images: int
    rows: list[AtSize]
    refused: dict[str, str]
    """Size -> why the network cannot take it."""
    sentence: str
    """Which resampling to choose."""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {**asdict(self), "margin": MARGIN, "environment": environment()}


def parse_size(text: str) -> Size:
    """A size such as "224", or "320x224" for height x width.

    Raises:
        ValueError: it is no such size, or a side is 0 or larger than 4,096.
    """
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    sides = () if found is None else (int(found[1]), int(found[2] or found[1]))
    if len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"size {text!r} is not allowed; give 224, or 320x224 (height x width), each 1 to {MAX_SIDE:,}")
    return sides


def at_size(model: nn.Module, size: Size, resampler: str) -> nn.Module:
    """A copy of a network for another image size; the chain of LN' is computed from the resampled raw PE.

    Raises:
        ValueError: the network cannot take the size.
    """
    check_resampled(model)
    found: Any = copy.deepcopy(model)
    check_divisible(size, found.patch_size)
    own = patch_grid(model)

    def resample(pos: Tensor, grid: Size, old: Size | None = None) -> Tensor:
        return resample_pos(pos, grid, old or own, pos.shape[1] - own[0] * own[1], resampler)

    found._resample = resample
    try:
        found.set_input_size(size)
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(f"{type(model).__name__} does not take {_named(size)}: {error}") from error
    del found._resample
    with torch.no_grad():  # timm's method resamples in its own way
        found.pos_embed.copy_(resample(model.get_parameter("pos_embed"), patch_grid(found)))
    return found.eval()


def check_resampled(model: nn.Module) -> None:
    """Checks that a network is one whose PE can be resampled to another image size.

    Raises:
        ValueError: it is not, and why.
    """
    name = type(model).__name__
    if not isinstance(model, (DeliveredVisionTransformer, DeliveryMixin)):
        raise ValueError(f"{name} is for one image size; allowed: ViT, DeiT, ViT-Lite, or a mpvg.DeliveryMixin")
    if not isinstance(model.pos_embed, nn.Parameter):
        raise ValueError(f"the PE of {name} is computed for a size, and is not resampled")


def resample_pos(pos: Tensor, grid: Size, old: Size, prefix: int, resampler: str) -> Tensor:
    """A PE `(1, prefix + old rows * old columns, D)` on another grid of patches, by one of `RESAMPLERS`."""
    if tuple(grid) == tuple(old):
        return pos
    maps = pos[:, prefix:].unflatten(1, tuple(old)).permute(0, 3, 1, 2)
    if resampler == "offset":
        # With a scale factor that is a little too large, each point is read a little nearer to the origin.
        scale = [(new + _OFFSET) / was for new, was in zip(grid, old, strict=True)]
        made = F.interpolate(maps, scale_factor=scale, mode="bicubic")
        if made.shape[-2:] != tuple(grid):
            raise ValueError(f"the offset of 0.1 gives {tuple(made.shape[-2:])} in place of {tuple(grid)} patches")
    else:
        made = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=resampler == "antialias")
    return torch.cat([pos[:, :prefix], made.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@torch.inference_mode()
def measure(
    model: nn.Module, batches: Sequence[ImageBatch], sizes: Sequence[Size], *, network: str, weights: str, data: str
) -> Resolutions:
    """Evaluates a network at several image sizes, on the same images with each resampling.

    Images are resized from the network's own size (bicubic, antialiased), so that a larger image has no more detail.

    Args:
        model: of a run, in evaluation mode, on the device of the batches.
        batches: prepared images at the network's size.
        sizes: height and width.
        network: its name, for the report.
        weights: which they are, in words.
        data: name of the data.

    Raises:
        ValueError: the network can take none of the sizes, or there is no image.
    """
    if not batches:
        raise ValueError("no image could be read; give data with readable images")
    rows: list[tuple[AtSize, PairedDifference | None]] = []
    refused: dict[str, str] = {}
    own = to_2tuple(delivered_network(model).img_size)
    for size in dict.fromkeys(sizes):
        name = _named(size)
        try:
            networks = {one: at_size(model, size, one) for one in (("antialias",) if size == own else RESAMPLERS)}
        except ValueError as error:
            refused[name] = str(error)
            continue
        values = {one: scores(changed, batches, size) for one, changed in networks.items()}
        rows += _rows(name, values)
    if not rows:
        raise ValueError("; ".join(f"size {name}: {reason}" for name, reason in refused.items()))
    images = sum(len(targets) for _, targets in batches)
    judged = _with_words(rows, images)
    return Resolutions(network, weights, data, images, judged, refused, conclude(judged))


def scores(model: nn.Module, batches: Sequence[ImageBatch], size: Size) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly, and the NLL of its class, `(images,)`, float64.

    Raises:
        ValueError: an output is NaN or infinite.
    """
    pairs = list(_pass(model, batches, size))
    correct, nll = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
    if not nll.isfinite().all():
        raise ValueError(f"the outputs at {_named(size)} contain NaN or infinite values; use another checkpoint")
    return correct, nll


def _pass(model: nn.Module, batches: Sequence[ImageBatch], size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        logits = model(images).double()
        yield (logits.argmax(dim=1) == targets).double(), F.cross_entropy(logits, targets, reduction="none")


def _rows(size: str, values: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[AtSize, PairedDifference | None]]:
    """A row for each way, with its difference to "antialias"."""
    found = []
    base = values["antialias"][0]
    for name, (correct, nll) in values.items():
        share = float(correct.mean())
        accuracy = Estimate(share, statistics.proportion_interval(share, len(correct)))
        mean = Estimate(*statistics.mean_and_interval(nll.tolist()))
        pair = None if name == "antialias" else with_width(paired_difference((correct - base).tolist()), len(correct))
        found.append((AtSize(size, name, accuracy, mean, None if pair is None else pair.estimate), pair))
    return found


def _with_words(rows: Sequence[tuple[AtSize, PairedDifference | None]], images: int) -> list[AtSize]:
    """The rows with corrected p and their words."""
    judged = iter(judge([pair for _, pair in rows if pair is not None], images))
    found = []
    for row, pair in rows:
        if pair is not None:
            p, word = next(judged)
            row = replace(row, p=p, word=word)
        found.append(row)
    return found


def conclude(rows: Sequence[AtSize]) -> str:
    """Which resampling to choose, in one sentence."""
    words = {name: [row.word for row in rows if row.resampler == name] for name in ("bicubic", "offset")}
    if not any(words.values()):
        return "Only the network's own size was measured, at which nothing is resampled."
    higher = [name for name, found in words.items() if any(w == "higher" for w in found)]
    lower = [name for name, found in words.items() if any(w == "lower" for w in found)]
    better = [name for name in higher if name not in lower]
    if better:
        return f"Choose {' or '.join(better)}: higher than antialias at a size, and lower at none."
    if lower:
        return f"Choose antialias: {' and '.join(lower)} lower at a size, and nothing is higher at every size."
    if all(word.endswith("point") for found in words.values() for word in found):
        return "Choose antialias, timm's: the others are equivalent at every size."
    return "Choose antialias, timm's: nothing is shown to be higher; some comparisons are undecided."


def cells(row: AtSize) -> list[str]:
    """A row of the table: size, resampling, accuracy, NLL, difference to antialias, word."""
    difference = "-" if row.against is None else estimate_text(row.against, scale=100)
    accuracy, nll = estimate_text(row.accuracy, scale=100, signed=False), estimate_text(row.nll, signed=False)
    return [row.size, row.resampler, accuracy, nll, difference, row.word]


HEAD = ("size", "PE resampled by", "accuracy, %", "nll", "minus antialias, points", "than antialias")


def write_page(found: Resolutions, path: Path) -> None:
    """Writes the page that has everything in it."""
    body = text_table("Accuracy and NLL", HEAD, [cells(row) for row in found.rows])
    body += "<h2>How the position embedding is resampled</h2>"
    body += text_list([f"{name}: {text}" for name, text in RESAMPLERS.items()])
    if found.refused:
        body += "<h2>Sizes that the network cannot take</h2>"
        body += text_list([f"{name}: {reason}" for name, reason in found.refused.items()])
    write_question(
        path,
        title=f"{found.network} at other image sizes",
        summary=found.sentence,
        about=f"{found.images:,} images of {found.data}; weights: {found.weights}; 95 % intervals.",
        body=body,
    )


def _named(size: Size) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"
