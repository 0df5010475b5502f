"""ViT and DeiT: DeliveredVisionTransformer without changes."""

from mpvg.models.registry import register
from mpvg.models.vision_transformer import DeliveredVisionTransformer

_SIZES: dict[str, dict[str, int]] = {
    "deit_tiny_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "deit_small_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit_base_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    # Our own sizes for small images; the narrow ones have the 12 layers that the last_index of Table 5 requires.
    "vit_mini_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch7_28": {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 4},
    "vit_mini_patch4_28": {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_mini_patch8_32": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch14_56": {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_narrow_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 12, "num_heads": 3},
    "vit_narrow_patch4_28": {"img_size": 28, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3},
    "vit_narrow_patch8_32": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3},
    "vit_narrow_patch14_56": {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 12, "num_heads": 3},
    "vit_canvas_patch16_64": {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4},
}

register(DeliveredVisionTransformer, _SIZES)
