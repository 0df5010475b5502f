"""A feature pyramid from the last map of a plain vision transformer: the baseline without an adapter."""

from collections.abc import Sequence

from torch import Tensor, nn

from mpvg.models.dense.trunk import STRIDES, DenseBackbone, Forward, as_map
from mpvg.models.vision_transformer import DeliveredVisionTransformer


class ViTPyramid(DenseBackbone):
    """A plain vision transformer whose last map is convolved to strides 4, 8, 16 and 32.

    Each map ends with a 1 x 1 convolution to the transformer's width and BatchNorm, as ViT-Adapter's do, so that the
    same necks and heads follow; the original has LN and 256 channels there.

    Args:
        vit: the transformer, from `without_readout`.
        forward: "detection" attends within windows, "segmentation" is global everywhere.
        window: side of a window in patches.
        global_layers: layers that attend to the whole image in either case.

    Source:
        The simple feature pyramid of ViTDet (Li et al., ECCV 2022, section 3).
    """

    def __init__(
        self,
        vit: DeliveredVisionTransformer,
        *,
        forward: Forward,
        window: int | None = 14,
        global_layers: Sequence[int],
    ) -> None:
        super().__init__(vit, forward=forward, window=window, global_layers=global_layers)
        dim = self.embed_dim
        half, quarter = dim // 2, dim // 4
        scales: tuple[tuple[list[nn.Module], int], ...] = (
            ([_double(dim, half), nn.BatchNorm2d(half), nn.GELU(), _double(half, quarter)], quarter),
            ([_double(dim, half)], half),
            ([], dim),
            ([nn.MaxPool2d(2)], dim),
        )
        self.maps = nn.ModuleList(
            [
                nn.Sequential(*parts, nn.Conv2d(width, dim, 1, bias=False), nn.BatchNorm2d(dim))
                for parts, width in scales
            ]
        )
        assert len(self.maps) == len(STRIDES)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images `(B, C, H, W)`, sides multiples of 32, to four maps `(B, D, H / s, W / s)`, s = 4, 8, 16, 32."""
        x, per_layer, grid = self.embed(image)
        last = as_map(self.run(x, per_layer, range(len(self.vit.blocks)), grid), grid)
        return tuple(one(last) for one in self.maps)


def _double(inputs: int, outputs: int) -> nn.Module:
    """Doubles the sides of a map."""
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
