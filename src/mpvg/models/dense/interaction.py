"""Injectors and extractors: how the tokens of a vision transformer and the maps of a spatial prior see each other."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from mpvg.models.adapting import Grid
from mpvg.models.dense.quiet import quiet_import

EPS = 1e-6
"""Epsilon of every LN of the adapter."""
PRIOR_LEVELS = 3
"""Maps of the spatial prior that take part: at strides 8, 16 and 32."""


@functools.cache
def _sampling() -> nn.Module:
    """The module of transformers that samples and weights the values; it has no parameters.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    with quiet_import():
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    module: nn.Module = MultiScaleDeformableAttention()
    return module


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query reads a few points of maps near a point of its own.

    Args:
        dim: channels D of queries and values.
        heads: number of heads M.
        points: points K that each head reads from each map.
        levels: number of maps L.

    Source:
        Deformable DETR (Zhu et al., 2021), Eq. (3), as in czczup/ViT-Adapter, `ops/modules/ms_deform_attn.py`.
    """

    def __init__(self, dim: int, *, heads: int, points: int, levels: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels; give a number of deformable heads that does")
        self.heads, self.points, self.levels = heads, points, levels
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.sample = _sampling()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, its k-th point k cells away, with equal weights."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # (M, 1, K, 2)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
            for linear in (self.attention_weights, self.value_proj, self.output_proj):
                linear.bias.zero_()
            self.attention_weights.weight.zero_()
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, reference: Tensor, values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Runs the attention.

        Args:
            query: `(B, Q, D)`.
            reference: each query's own point, `(Q, 2)`: x and y, from 0 at the left and top to 1.
            values: the maps one after the other, `(B, sum of H_l * W_l, D)`.
            grids: rows and columns of each map.

        Returns:
            `(B, Q, D)`.
        """
        batch, count, _ = query.shape
        shape = (batch, count, self.heads, self.levels, self.points)
        value = self.value_proj(values).reshape(batch, values.shape[1], self.heads, -1)
        offsets = self.sampling_offsets(query).reshape(*shape, 2)
        weights = F.softmax(self.attention_weights(query).reshape(batch, count, self.heads, -1), dim=-1).reshape(shape)
        cells = torch.tensor(
            [(columns, rows) for rows, columns in grids], dtype=reference.dtype, device=reference.device
        )
        locations = reference[:, None, None, None] + offsets / cells[:, None]
        # Of its arguments, only these are used without a compiled kernel.
        found = self.sample(value, None, list(grids), None, locations, weights, 64)
        return self.output_proj(found)


def reference_points(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """The centers of all cells of maps, one map after the other, `(cells, 2)`: x and y, from 0 to 1."""
    points = []
    for rows, columns in grids:
        y = (torch.arange(rows, dtype=like.dtype, device=like.device) + 0.5) / rows
        x = (torch.arange(columns, dtype=like.dtype, device=like.device) + 0.5) / columns
        points.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(points)


def prior_grids(grid: Grid) -> list[Grid]:
    """Rows and columns of the prior's maps at strides 8, 16 and 32, from the grid of patches of 16 pixels."""
    rows, columns = grid
    return [(2 * rows, 2 * columns), (rows, columns), (rows // 2, columns // 2)]


class ConvFFN(nn.Module):
    """An MLP over the tokens of the prior's maps, with a depthwise convolution that all of them share."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens `(B, sum of H_l * W_l, D)` to tokens of the same shape."""
        parts = self.fc1(x).split([rows * columns for rows, columns in grids], dim=1)
        maps = [part.transpose(1, 2).reshape(len(x), -1, *grid) for part, grid in zip(parts, grids, strict=True)]
        mixed = torch.cat([self.dwconv(one).flatten(2) for one in maps], dim=2)
        return self.fc2(F.gelu(mixed.transpose(1, 2)))


class Injector(nn.Module):
    """Adds to the tokens what they read from the prior's maps; `gamma` starts at 0, so at first it adds nothing."""

    def __init__(self, dim: int, *, heads: int, points: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = DeformableAttention(dim, heads=heads, points=points, levels=PRIOR_LEVELS)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, prior: Tensor, grid: Grid) -> Tensor:
        """Tokens `(B, N, D)` and prior `(B, 21 / 4 * N, D)` to tokens; `grid` is that of the tokens."""
        reference = reference_points([grid], x)
        return x + self.gamma * self.attn(self.query_norm(x), reference, self.feat_norm(prior), prior_grids(grid))


class Extractor(nn.Module):
    """Adds to the prior's maps what they read from the tokens, and then what a ConvFFN makes of them."""

    def __init__(self, dim: int, *, heads: int, points: int, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = DeformableAttention(dim, heads=heads, points=points, levels=1)
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, prior: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Prior `(B, 21 / 4 * N, D)` and tokens `(B, N, D)` to the prior; `grid` is that of the tokens."""
        grids = prior_grids(grid)
        reference = reference_points(grids, prior)
        prior = prior + self.attn(self.query_norm(prior), reference, self.feat_norm(x), [grid])
        return prior + self.drop_path(self.ffn(self.ffn_norm(prior), grids))


class Interaction(nn.Module):
    """What happens around one stage of layers: an injector before it, and one or more extractors after it."""

    def __init__(
        self, dim: int, *, heads: int, points: int, ffn_ratio: float, drop_path: float, extra_extractors: int
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"heads": heads, "points": points}
        self.injector = Injector(dim, **shared)
        shared |= {"ffn_ratio": ffn_ratio, "drop_path": drop_path}
        self.extractor = Extractor(dim, **shared)
        self.extra_extractors = nn.ModuleList([Extractor(dim, **shared) for _ in range(extra_extractors)])

    def extract(self, prior: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Runs the extractors one after the other."""
        for extractor in (self.extractor, *self.extra_extractors):
            prior = extractor(prior, x, grid)
        return prior


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Initializes the modules of an adapter as czczup/ViT-Adapter does: for `module.apply`."""
    if isinstance(module, DeformableAttention):
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
