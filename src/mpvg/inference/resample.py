"""A network of any image size for export: its position embedding (PE) is resampled by two matrix products.

aten's antialiased bicubic interpolation exports, but OpenVINO computes another function on it, 6e-3 to 2e-2 off, and
says nothing. Matrix products are the same everywhere.
"""

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from mpvg.models.convert import network_name
from mpvg.models.swin import DeliveredSwinTransformer
from mpvg.models.t2t_vit import T2TViT
from mpvg.models.vision_transformer import DeliveredVisionTransformer

_A = -0.5  # of the cubic, as PIL has it and aten with antialias=True; without, aten takes -0.75


def any_size(model: nn.Module) -> nn.Module:
    """Returns a copy of a network that takes images of any size and resamples its PE by matrix products.

    The copy is not folded: LN' of a resampled PE is not a resampled LN', so the chain runs for each size.

    Raises:
        ValueError: the network has a fixed image size, with the reason.
    """
    found: Any = model
    if isinstance(model, DeliveredSwinTransformer):
        raise _fixed(model, "its windows and their masks are made for it")
    if not isinstance(model, DeliveredVisionTransformer):
        raise _fixed(model, "only ViT, DeiT, ViT-Lite and converted timm networks resample their PE in a graph")
    if isinstance(model, T2TViT):
        raise _fixed(model, "the graph that torch.export makes of its soft splits holds for one only")
    arguments = dict(getattr(found, "_model_args", {})) | {"dynamic_img_size": True}
    try:
        copy: Any = timm.create_model(found.pretrained_cfg["architecture"], **arguments)
    except ValueError as error:  # CeiT: LeFF convolves over a fixed grid
        raise _fixed(model, str(error)) from error
    copy.adapts_first_load = False
    copy.load_state_dict(found.state_dict())
    copy._resample = _Resample(copy)
    return cast(nn.Module, copy.eval().requires_grad_(False))


def _fixed(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{network_name(model)} can be exported for one image size only: {reason}; "
        "leave --dynamic_size out, and train at the size that is wanted"
    )


class _Resample:
    """What replaces a network's own resampling, `resample_abs_pos_embed`, with the same arguments and result."""

    def __init__(self, network: DeliveredVisionTransformer) -> None:
        self.old = network.patch_embed.grid_size
        self.prefix = 0 if network.no_embed_class else network.num_prefix_tokens

    def __call__(self, pos: Tensor, grid: tuple[int, int], old: tuple[int, int] | None = None) -> Tensor:
        return resample(pos, grid, old or self.old, self.prefix)


def resample(pos: Tensor, grid: tuple[int, int], old: tuple[int, int], prefix: int = 0) -> Tensor:
    """A PE on another grid of patches, by two matrix products.

    Args:
        pos: `(1, prefix + old rows * old columns, D)`.
        grid: rows and columns that are wanted; in an exported graph they are not known.
        old: rows and columns that there are.
        prefix: leading rows without a position, which stay.

    Returns:
        `(1, prefix + rows * columns, D)`.

    Source:
        timm's `resample_abs_pos_embed` with antialias, to 5e-6 of values with a standard deviation of 1: in float32
        its own centers of the points are rounded.
    """
    rows, columns = (cubic_weights(new, size, pos) for new, size in zip(grid, old, strict=True))
    maps = pos[:, prefix:].unflatten(1, old)  # (1, h, w, D)
    maps = torch.matmul(columns, maps)  # (1, h, W, D)
    maps = torch.matmul(rows, maps.flatten(2))  # (1, H, W * D)
    patches = maps.reshape(1, -1, pos.shape[-1])
    return torch.cat([pos[:, :prefix], patches], dim=1) if prefix else patches


def cubic_weights(new: int, old: int, like: Tensor) -> Tensor:
    """The matrix `(new, old)` of antialiased bicubic interpolation along one side.

    With fewer points than before, the cubic is as many times wider as the points are farther apart. Points beyond the
    border have no weight, and the others of a row are scaled to the sum 1.

    Args:
        new: number of points that are wanted.
        old: number of points that there are.
        like: a tensor of the wanted dtype and device.

    Source:
        aten's `_upsample_bicubic2d_aa`, as PIL's.
    """
    wanted = torch.arange(new, device=like.device, dtype=like.dtype)
    there = torch.arange(old, device=like.device, dtype=like.dtype)
    # The number of points as a tensor: in a graph it is part of what is computed. The order is aten's, so that the
    # last bits are, too: an error in a center counts more, the farther it is from 0.
    step = old / (wanted[-1:] + 1)  # (1,)
    centers = step * (wanted + 0.5)
    distance = ((there - centers[:, None] + 0.5) * (1 / step).clamp(max=1)).abs()
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    return weights / weights.sum(dim=1, keepdim=True)
