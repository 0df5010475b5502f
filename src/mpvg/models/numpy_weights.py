"""Reads the NumPy archives (.npz) of google-research's ViT, AugReg and SigLIP with timm's own reader."""

import copy
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
"""What the names may begin with."""
_MOST = 20
"""How many times its size an archive may unpack to: weights do not compress, so a larger one is an attack."""


def read_numpy(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Reads an archive into tensors at the sizes of the file, under timm's names.

    timm's reader fills a network. It is given a copy of `model` that has the grid, the classes, the channels and the
    class token of the file, so that nothing is resampled or left out by it.

    Raises:
        ValueError: the file is damaged, or of another architecture.
    """
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise ValueError(f"{path} is a NumPy archive of a ViT, and {type(model).__name__} is not one; use a .pth file")
    try:
        shapes = _shapes(path)
        prefix = next(prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in shapes)
        source = _at_sizes_of(model, {key.removeprefix(prefix): shape for key, shape in shapes.items()})
        source.load_pretrained(str(path))
    except StopIteration:
        raise ValueError(f"{path} is a NumPy archive without embedding/kernel; use one of google-research's") from None
    except Exception as error:  # the readers of zipfile, NumPy and timm raise errors of many types on foreign arrays
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} does not fit, or is damaged: {reason}. Use a checkpoint of this architecture") from (
            error
        )
    tensors = source.state_dict()
    if any("pre_logits/" in key for key in shapes):
        tensors["pre_logits.fc.weight"] = torch.empty(0)
    if any("MAPHead_0/" in key for key in shapes) and "attn_pool.latent" not in tensors:
        tensors["attn_pool.latent"] = torch.empty(0)
    return tensors


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays, from their headers: a value is read only after its size is known to be plausible."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _MOST * path.stat().st_size:
            raise ValueError("it unpacks to many times its size")
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shapes[member.filename.removesuffix(".npy")] = read(file)[0]
    return shapes


def _at_sizes_of(model: VisionTransformer, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A copy of the network with the sizes that the file has."""
    source: Any = copy.deepcopy(model).float()
    own = source.patch_embed.proj
    *kernel, chans, dim = shapes["embedding/kernel"]
    if dim != source.embed_dim or tuple(kernel) != own.kernel_size:
        raise ValueError(
            f"it has {dim} channels and patches of {kernel}, the model {source.embed_dim} and {list(own.kernel_size)}"
        )
    numbered = {found[0] for key in shapes if (found := re.search(r"encoderblock_\d+/", key))}
    stacked = shapes.get("Transformer/encoderblock/LayerNorm_0/scale")
    depth = stacked[0] if stacked else len(numbered)
    if depth != len(source.blocks):
        raise ValueError(f"it has {depth} layers, the model {len(source.blocks)}")
    source.patch_embed.proj = nn.Conv2d(chans, dim, own.kernel_size, stride=own.stride)
    source.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if "cls" in shapes else None
    pos = shapes.get("pos_embedding") or shapes["Transformer/posembed_input/pos_embedding"]
    source.pos_embed = nn.Parameter(torch.zeros(pos))
    source.norm, source.fc_norm = nn.LayerNorm(dim), nn.Identity()
    classes = shapes.get("head/bias", (0,))[-1]
    source.head = nn.Linear(dim, classes) if classes else nn.Identity()
    if hasattr(source, "delivery"):
        del source.delivery
    return source
