"""ViT-Lite: a small transformer for small images, whose layers normalize the residual stream."""

from typing import Any

from timm.layers import LayerType
from torch import Tensor, nn

from mpvg.delivery import Method
from mpvg.models.layouts import Layout
from mpvg.models.registry import register
from mpvg.models.vision_transformer import AttentionLike, DeliveredBlock, DeliveredVisionTransformer


class ViTLiteBlock(DeliveredBlock):
    """A layer with an LN before the attention and one on the residual stream after it, and none before the MLP."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        pe: Tensor | None = None,
        attention: AttentionLike | None = None,
    ) -> Tensor:
        """Runs attention and MLP on tokens `(B, N, D)`; `pe`, `(1, N, D)`, is added to the attention input only."""
        x = self.norm2(self.attend(x, attn_mask, is_causal, pe, attention))
        return x + self.drop_path2(self.ls2(self.mlp(x)))


class ViTLite(DeliveredVisionTransformer):
    """ViT-Lite whose layers and Last LN receive what a method delivers.

    Args:
        method: a method's name or a DeliverySpec.
        attn_drop_rate: dropout of the attention weights; 0.1 is the repository's default.
        norm_layer: class of the LNs; its epsilon is 1e-5 in the repository.
        **kwargs: as for DeliveredVisionTransformer.

    Source:
        SHI-Labs/Compact-Transformers, `src/vit.py` and `src/utils/transformers.py`.
    """

    family = "ViT-Lite"
    block = ViTLiteBlock
    default_pos_std = 0.2
    layouts = (
        Layout(
            source="SHI-Labs/Compact-Transformers",
            marker=r"^classifier\.(class_emb|positional_emb|blocks\.\d+\.pre_norm\.)",
            names=(
                (r"^tokenizer\.conv_layers\.0\.0\.", "patch_embed.proj."),
                (r"^classifier\.class_emb$", "cls_token"),
                (r"^classifier\.positional_emb$", "pos_embed"),
                (r"^classifier\.fc\.", "head."),
                (r"^(classifier\.blocks\.\d+)\.norm1\.", r"\1.norm2."),
                (r"^(classifier\.blocks\.\d+)\.pre_norm\.", r"\1.norm1."),
                (r"^(classifier\.blocks\.\d+)\.self_attn\.", r"\1.attn."),
                (r"^(classifier\.blocks\.\d+)\.linear([12])\.", r"\1.mlp.fc\2."),
                (r"^classifier\.", ""),
            ),
        ),
    )

    def __init__(
        self,
        method: Method = "mpvg",
        *,
        attn_drop_rate: float = 0.1,
        norm_layer: LayerType = nn.LayerNorm,
        **kwargs: Any,
    ) -> None:
        super().__init__(method, attn_drop_rate=attn_drop_rate, norm_layer=norm_layer, **kwargs)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initializes as the repository does: class token at zero, patch kernel by Kaiming initialization."""
        super().init_weights(mode, needs_reset=needs_reset)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    def no_weight_decay(self) -> set[str]:
        """No names: unlike DeiT, the repository applies weight decay to the PE and the class token, too."""
        return set()


_SHARED: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_heads": 4, "mlp_ratio": 2, "qkv_bias": False}

_SIZES: dict[str, dict[str, Any]] = {
    "vit_lite_6_patch4_32": _SHARED | {"embed_dim": 256, "depth": 6},
    "vit_lite_7_patch4_32": _SHARED | {"embed_dim": 256, "depth": 7},
}

_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

register(ViTLite, _SIZES, crop_pct=1.0, mean=_CIFAR100_MEAN, std=_CIFAR100_STD)
