"""ViT-Adapter: feature maps at four strides from a plain vision transformer with a delivered position embedding."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.models.dense.interaction import PRIOR_LEVELS, Interaction, init_weights
from mpvg.models.dense.trunk import PATCH, STAGES, STRIDES, DenseBackbone, Forward, as_map
from mpvg.models.vision_transformer import DeliveredVisionTransformer

EXTRA_EXTRACTORS = 2
"""Extractors after the last interaction, besides its own."""


class ViTAdapter(DenseBackbone):
    """ViT-Adapter around a transformer whose layers receive what a method delivers, in windowed layers too.

    The prior's maps and the tokens exchange what they know before and after each of four stages of layers. The
    original's SyncBN is BatchNorm here, which is the same in one process; for several on GPUs it has to be converted.

    Args:
        vit: the transformer, from `without_readout`.
        forward: "detection" attends within windows and adds the last tokens to every map; "segmentation" is global
            everywhere and adds the tokens after stage i to map i.
        window: side of a window in patches.
        global_layers: layers that attend to the whole image in either case.
        prior_width: channels of the spatial prior's first convolutions.
        heads: heads of the deformable attentions.
        points: points that each of them reads from each map.
        ffn_ratio: width of the extractors' MLPs, relative to the transformer's.
        drop_path_rate: of the extractors' MLPs, the same in all.

    Source:
        Chen et al., ICLR 2023; czczup/ViT-Adapter, `vit_adapter.py` and `adapter_modules.py`.
    """

    def __init__(
        self,
        vit: DeliveredVisionTransformer,
        *,
        forward: Forward,
        window: int | None = 14,
        global_layers: Sequence[int],
        prior_width: int = 64,
        heads: int = 6,
        points: int = 4,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(vit, forward=forward, window=window, global_layers=global_layers)
        dim = self.embed_dim
        self.level_embed = nn.Parameter(torch.randn(PRIOR_LEVELS, dim))
        self.spm = SpatialPrior(vit.in_chans, prior_width, dim)
        shared: dict[str, Any] = {"heads": heads, "points": points, "ffn_ratio": ffn_ratio, "drop_path": drop_path_rate}
        extra = [0] * (STAGES - 1) + [EXTRA_EXTRACTORS]
        self.interactions = nn.ModuleList([Interaction(dim, **shared, extra_extractors=count) for count in extra])
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in STRIDES)
        for part in (self.spm, self.interactions, self.up):
            part.apply(init_weights)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images `(B, C, H, W)`, sides multiples of 32, to four maps `(B, D, H / s, W / s)`, s = 4, 8, 16, 32."""
        c1, *rest = self.spm(image)
        tokens = [one.flatten(2).transpose(1, 2) for one in rest]
        prior = torch.cat([one + level for one, level in zip(tokens, self.level_embed, strict=True)], dim=1)
        x, per_layer, grid = self.embed(image)
        features = []
        interactions: Any = self.interactions
        for interaction, layers in zip(interactions, self.stages(), strict=True):
            x = interaction.injector(x, prior, grid)
            x = self.run(x, per_layer, layers, grid)
            prior = interaction.extract(prior, x, grid)
            features.append(as_map(x, grid))
        parts = prior.split([one.shape[1] for one in tokens], dim=1)
        c2, c3, c4 = (as_map(part, (one.shape[2], one.shape[3])) for part, one in zip(parts, rest, strict=True))
        maps = (self.up(c2) + c1, c2, c3, c4)
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        if not self.forward_spec.each_stage:
            features = features[-1:] * len(STRIDES)
        return tuple(
            norm(one + _scaled(feature, PATCH / stride))
            for norm, one, feature, stride in zip(norms, maps, features, STRIDES, strict=True)
        )


class SpatialPrior(nn.Module):
    """A small convolutional network that gives maps of D channels at strides 4, 8, 16 and 32."""

    def __init__(self, in_chans: int, width: int, dim: int) -> None:
        super().__init__()
        first = [_convolution(in_chans, width, stride=2), *(_convolution(width, width, stride=1) for _ in range(2))]
        self.stem = nn.Sequential(*(part for layer in first for part in layer), nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = _convolution(width, 2 * width, stride=2)
        self.conv3 = _convolution(2 * width, 4 * width, stride=2)
        self.conv4 = _convolution(4 * width, 4 * width, stride=2)
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(factor * width, dim, 1) for factor in (1, 2, 4, 4))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images `(B, C, H, W)` to `(B, D, H / s, W / s)` for s = 4, 8, 16, 32."""
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _convolution(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution without bias, BatchNorm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _scaled(feature: Tensor, factor: float) -> Tensor:
    """A map of another size, bilinear without antialiasing."""
    return feature if factor == 1 else F.interpolate(feature, scale_factor=factor, mode="bilinear", align_corners=False)
