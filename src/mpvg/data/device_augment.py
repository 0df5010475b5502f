"""Augmentation of whole batches on the device, a pure function of the images and a table of uniform numbers.

Every random decision reads one row of the table, which has one column per sample and is drawn once per epoch. So what
happens to a sample depends on (seed, epoch, sample) only, not on its batch, its process or where the epoch started.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig
from mpvg.data.types import DataInfo
from mpvg.seeding import derive_seed

_FIXED_ROWS = 9
_ROWS_PER_OP = 3
_BANK = 2**20


class RandAugment(NamedTuple):
    """The parts of timm's string 'rand-m9-n2-mstd0.5-inc1'."""

    magnitude: int = 10
    """Mean strength of an op, 0 to 10."""
    ops: int = 2
    """Ops drawn for an image; each is then applied with probability 0.5."""
    std: float = 0.0
    """Standard deviation of the strength, which is clamped to [0, 10]."""

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Reads timm's string.

        Raises:
            ValueError: it is not a RandAugment string, or asks for something that does not run on whole batches.
        """
        first, *parts = text.split("-")
        found = [re.fullmatch(r"(m|n|inc)(\d+)|(mstd)(\d+(?:\.\d+)?)", part) for part in parts]
        values = {match[1] or match[3]: match[2] or match[4] for match in found if match}
        known = first == "rand" and all(found) and len(values) == len(parts)
        if not known or values.get("inc") != "1" or float(values.get("mstd", 0)) > 100:
            raise ValueError(
                f"augment.auto_augment is {text!r}; allowed for this data: 'rand-m9-n2-mstd0.5-inc1' with any whole "
                "m and n, any mstd up to 100, and inc1, of which m, n and mstd may be left out"
            )
        return cls(int(values.get("m", 10)), int(values.get("n", 2)), float(values.get("mstd", 0)))

    def decide(self, which: Tensor, strength: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns uniform numbers, each (B,), into op, level and sign as `apply_ops` takes them."""
        op = _pick(which, 2 * len(OPS))  # the upper half of the numbers is no op, hence the probability 0.5
        level = (self.magnitude + self.std * torch.special.ndtri(strength)).clamp(0, 10) / 10
        return op, level, torch.where(direction < 0.5, -1.0, 1.0)


class DeviceAugment:
    """Random crop, flip, RandAugment, normalization and random erasing, in timm's order."""

    def __init__(self, config: AugmentConfig, info: DataInfo, seed: int, device: torch.device) -> None:
        self._config, self._info, self._seed = config, info, seed
        self._rand = RandAugment.parse(config.auto_augment) if config.auto_augment else None
        self._fill = torch.tensor([float(round(255 * value)) for value in info.mean], device=device)
        noise = torch.Generator().manual_seed(derive_seed("noise", seed))
        self._bank = torch.randn(_BANK + info.in_chans * info.img_size**2, generator=noise).to(device)

    def draw(self, epoch: int) -> Tensor:
        """The table (K, N) of an epoch, uniform in (0, 1), on the CPU, so that every device gets the same."""
        rows = _FIXED_ROWS + _ROWS_PER_OP * (self._rand.ops if self._rand else 0)
        generator = torch.Generator().manual_seed(derive_seed("augment", self._seed, epoch))
        table = torch.rand(rows, self._info.train_size, generator=generator)
        # The ends are excluded, because 0 is infinite as a normal number, and 0.99999994 * n may be rounded up to n.
        return table.clamp_(1e-6, 1 - 1e-6)

    def __call__(self, images: Tensor, table: Tensor) -> Tensor:
        """Augments and normalizes.

        Args:
            images: (B, C, S, S), uint8.
            table: the samples' columns (K, B) of the table, on the same device.

        Returns:
            (B, C, S, S), float32.
        """
        config = self._config
        crop_y, crop_x, flip, *erasing = table[:_FIXED_ROWS]
        if config.crop_padding or config.hflip:
            images = crop_and_flip(images, config.crop_padding, crop_y, crop_x, flip < config.hflip)
        pixels = images.float()
        if self._rand:
            for draws in table[_FIXED_ROWS:].split(_ROWS_PER_OP):
                pixels = apply_ops(pixels, *self._rand.decide(*draws), self._fill)
        pixels = normalize(pixels, self._info)
        if config.erase:
            pixels = erase(pixels, config.erase, erasing, self._bank)
        return pixels


def normalize(images: Tensor, info: DataInfo) -> Tensor:
    """Maps values in [0, 255], (B, C, H, W), to float32 with the set's mean and standard deviation taken out."""
    normal: Tensor = functional.normalize(images.float() / 255, list(info.mean), list(info.std), inplace=True)
    return normal


def crop_and_flip(images: Tensor, padding: int, crop_y: Tensor, crop_x: Tensor, flip: Tensor) -> Tensor:
    """Pads with zeros, cuts the old size at a random place, and mirrors where asked.

    Args:
        images: (B, C, S, S).
        padding: pixels added on each side.
        crop_y: uniform numbers (B,) that place the cut.
        crop_x: the same for the other axis.
        flip: (B,), bool.
    """
    batch, chans, side, _ = images.shape
    wide = side + 2 * padding
    steps = torch.arange(side, device=images.device)
    rows = _pick(crop_y, 2 * padding + 1)[:, None] + steps  # (B, S)
    columns = _pick(crop_x, 2 * padding + 1)[:, None] + torch.where(flip[:, None], side - 1 - steps, steps)
    places = (rows[:, :, None] * wide + columns[:, None, :]).view(batch, 1, -1).expand(-1, chans, -1)
    return pad(images, [padding] * 4).flatten(2).gather(2, places).view_as(images)


def erase(images: Tensor, probability: float, draws: list[Tensor], bank: Tensor) -> Tensor:
    """Replaces a random rectangle by standard normal noise: 2 to 33 % of the area, aspect 0.3 to 3.33.

    A side that would fill the image is cut one pixel short, where timm draws again: about 1 % of the rectangles.

    Args:
        images: normalized (B, C, S, S).
        probability: share of the images that get a rectangle.
        draws: six times uniform numbers (B,): whether, area, aspect, top, left, place in the bank.
        bank: fixed normal noise, from which each image takes a stretch.
    """
    chosen = (draws[0] < probability).nonzero().flatten()
    if not len(chosen):
        return images
    side = images.shape[-1]
    area, aspect, top, left, place = (draw[chosen] for draw in draws[1:])
    area = (0.02 + area * (1 / 3 - 0.02)) * side * side
    aspect = torch.exp((2 * aspect - 1) * math.log(10 / 3))
    steps = torch.arange(side, device=images.device)
    inside = []
    for length, start in (((area * aspect).sqrt(), top), ((area / aspect).sqrt(), left)):
        length = length.round().long().clamp(max=side - 1)
        first = _pick(start, side - length + 1)
        inside.append((steps >= first[:, None]) & (steps < (first + length)[:, None]))  # (B, S)
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    stretch = images[0].numel()
    noise = bank.unfold(0, stretch, 1)[_pick(place, bank.numel() - stretch)].view(len(chosen), *images.shape[1:])
    erased = images.clone()
    erased[chosen] = torch.where(mask, noise, images[chosen])
    return erased


def apply_ops(images: Tensor, op: Tensor, level: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    """Applies one op of RandAugment to each image, as timm does with PIL.

    Args:
        images: (B, C, S, S), whole numbers in [0, 255] as float32.
        op: its number (B,) in `OPS`; larger: none.
        level: strength (B,) in [0, 1].
        sign: direction (B,), -1 or 1, of the ops that have one.
        fill: color (C,) of what a geometric op uncovers.
    """
    result = images.clone()
    factor = (1 + 0.9 * sign * level).clamp(min=0.1)
    for number, change in enumerate(PHOTOMETRIC.values()):
        chosen = (op == number).nonzero().flatten()
        if len(chosen):
            result[chosen] = change(images[chosen], level[chosen, None, None, None], factor[chosen, None, None, None])
    chosen = ((op >= len(PHOTOMETRIC)) & (op < len(OPS))).nonzero().flatten()
    if len(chosen):
        result[chosen] = _warp(images[chosen], op[chosen] - len(PHOTOMETRIC), (level * sign)[chosen], fill)
    return result


def _warp(images: Tensor, number: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Bilinear, as PIL does it: places outside of the image get the fill, and its outermost half pixel is repeated."""
    angle, shear_x, shear_y, move_x, move_y = (torch.where(number == n, amount, 0.0) for n in range(len(GEOMETRIC)))
    angle, shear_x, shear_y = torch.deg2rad(30 * angle), 0.3 * shear_x, 0.3 * shear_y
    # grid_sample's axes run from -1 to 1 around the center, so the largest move is 2 * 0.45; PIL shears about the upper
    # left corner, hence the third number. No matrix product: its last bit may depend on the size of the batch.
    row = ((2 * torch.arange(images.shape[-1], device=images.device) + 1) / images.shape[-1] - 1).expand(1, 1, -1)
    x = _plane(row, angle.cos(), shear_x - angle.sin(), shear_x + 0.9 * move_x)
    y = _plane(row, shear_y + angle.sin(), angle.cos(), shear_y + 0.9 * move_y)
    grid = torch.stack([x, y], dim=-1)  # (n, S, S, 2)
    warped = grid_sample(images, grid, padding_mode="border", align_corners=False).round()
    inside = ((grid >= -1) & (grid < 1)).all(dim=-1)[:, None]
    return torch.where(inside, warped, fill[:, None, None])


def _plane(row: Tensor, slope_x: Tensor, slope_y: Tensor, offset: Tensor) -> Tensor:
    """The values (n, S, S) of n planes over a square with the same places (1, 1, S) on both axes."""
    return slope_x[:, None, None] * row + slope_y[:, None, None] * row.mT + offset[:, None, None]


def _pick(uniform: Tensor, count: int | Tensor) -> Tensor:
    """Whole numbers in [0, count)."""
    return (uniform * count).long()


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    gray: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return gray.round()


def _smooth(images: Tensor) -> Tensor:
    """PIL's SMOOTH filter, which leaves the outermost pixels as they are."""
    # Sums of whole numbers, so that the order does not matter; a third of the time of a convolution on a CPU.
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    inner = images[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round()
    return smooth


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (other + factor * (images - other)).clamp(0, 255).floor()


PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda x, level, factor: functional.autocontrast(x.byte()).float(),
    "Equalize": lambda x, level, factor: functional.equalize(x.byte()).float(),
    "Invert": lambda x, level, factor: 255 - x,
    # From 4 bits that stay down to none, and then the image is black; by 2^(8 - bits), exact in float32.
    "PosterizeIncreasing": lambda x, level, factor: x - x % 2 ** (4 + (4 * level).floor()),
    "SolarizeIncreasing": lambda x, level, factor: torch.where(x < 256 - (256 * level).floor(), x, 255 - x),
    "SolarizeAdd": lambda x, level, factor: torch.where(x < 128, x + (110 * level).floor(), x),
    "ColorIncreasing": lambda x, level, factor: _blend(_gray(x), x, factor),
    "ContrastIncreasing": lambda x, level, factor: _blend(
        (_gray(x).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor(), x, factor
    ),
    "BrightnessIncreasing": lambda x, level, factor: _blend(torch.zeros_like(x), x, factor),
    "SharpnessIncreasing": lambda x, level, factor: _blend(_smooth(x), x, factor),
}
"""Ops on (n, C, S, S), given their level in [0, 1] and their blending factor in [0.1, 1.9], both (n, 1, 1, 1)."""
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPS = (*PHOTOMETRIC, *GEOMETRIC)
