"""A small vision transformer of your own, without timm, whose layers and Last LN receive what a method delivers.

mpvg check-network examples/own_network.py:small_vit
mpvg train --data digits --model examples/own_network.py:small_vit --method mpvg --out RUN
mpvg evaluate RUN --model examples/own_network.py:small_vit
"""

import torch
from torch import nn

from mpvg import DeliveryMixin, PositionDelivery
from mpvg.delivery import NetworkTraits, resolve


class Layer(nn.Module):
    """A pre-norm layer; what is delivered is added to its attention input."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, pe):
        """Tokens (B, N, D) and a PE (1, N, D), or None."""
        y = self.norm1(x) if pe is None else self.norm1(x) + pe
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class SmallViT(DeliveryMixin):
    """A vision transformer; the mixin adds pooling, head, probe and image sizes to `forward_features`."""

    def __init__(self, method, num_classes, img_size, in_chans, patch_size=2, dim=48, depth=4, heads=3):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        spec = resolve(method, NetworkTraits(name="SmallViT", depth=depth))
        self.embed = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.num_prefix_tokens = int(spec.pool == "token")
        rows = self.num_prefix_tokens + (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if self.num_prefix_tokens else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows, dim))
        self.delivery = PositionDelivery(spec, depth, dim, class_rows=self.num_prefix_tokens, rows=rows)
        self.blocks = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward_features(self, images):
        """Images (B, C, H, W) to the tokens after the Last LN, (B, N, D)."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.spec.input_pe:
            x = x + self.pos_embed
        delivered = self.deliver(self.pos_embed)  # once per forward pass: it does not depend on the images
        for layer, pe in zip(self.blocks, delivered.per_layer, strict=True):
            x = layer(x, pe)
        return self.norm(x) if delivered.last is None else self.norm(x) + delivered.last


def small_vit(method="mpvg", num_classes=10, img_size=8, in_chans=1, **kwargs):
    """The factory: what `--model examples/own_network.py:small_vit` calls."""
    return SmallViT(method, num_classes, img_size, in_chans, **kwargs)
