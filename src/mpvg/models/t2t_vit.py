"""T2T-ViT: three soft splits turn overlapping patches into tokens; the position embedding (PE) is a frozen sinusoid."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import LayerType, to_2tuple
from torch import Tensor, nn

from mpvg.delivery import Method
from mpvg.models.layouts import Layout
from mpvg.models.registry import check_divisible, register
from mpvg.models.vision_transformer import DeliveredVisionTransformer

PATCH = 16
"""Pixels from one token to the next: the product of the strides of the three soft splits, 4 x 2 x 2."""
TOKEN_DIM = 64
"""Width of the tokens between the soft splits."""


class T2TViT(DeliveredVisionTransformer):
    """T2T-ViT whose layers and Last LN receive what a method delivers.

    The PE has row 0 for the class token and rows 1 to N for the patches; without a class token, only rows 1 to N.

    Args:
        method: a method's name or a DeliverySpec.
        pos_std: refused, because the PE is not random.
        norm_layer: class of the LNs; its epsilon is 1e-5 in the repository.
        **kwargs: as for DeliveredVisionTransformer.

    Raises:
        ValueError: the network cannot run the method, or an argument asks for a part that it does not have.

    Source:
        yitu-opensource/T2T-ViT, `models/t2t_vit.py`.
    """

    family = "T2T-ViT"
    constants = ("pos_embed",)
    """Buffers that are parameters in the repository, and in the paper's counts."""
    layouts = (
        Layout(
            source="yitu-opensource/T2T-ViT",
            marker=r"^tokens_to_token\.",
            names=((r"^tokens_to_token\.", "patch_embed."),),
        ),
    )

    def __init__(
        self,
        method: Method = "mpvg",
        *,
        pos_std: float | None = None,
        norm_layer: LayerType = nn.LayerNorm,
        **kwargs: Any,
    ) -> None:
        if pos_std is not None:
            raise ValueError(
                f"pos_std={pos_std!r}: T2T-ViT's PE is a frozen sinusoid with a fixed scale; leave pos_std out"
            )
        for name in ("embed_layer", "embed_norm_layer", "dynamic_img_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name}={kwargs[name]!r}: T2T-ViT makes its tokens by soft splits; leave it out")
        if kwargs.get("reg_tokens") and not kwargs.get("no_embed_class"):
            raise ValueError(
                f"reg_tokens={kwargs['reg_tokens']!r}: the sinusoid has no row for a register; give no_embed_class=True"
            )
        super().__init__(method, norm_layer=norm_layer, embed_layer=TokensToToken, **kwargs)
        self._freeze_pos_embed()

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As DeliveredVisionTransformer."""
        super().set_input_size(img_size, patch_size)
        self._freeze_pos_embed()

    def no_weight_decay(self) -> set[str]:
        """timm's names without the PE, which is no parameter."""
        names: set[str] = super().no_weight_decay()
        return names - {"pos_embed"}

    def _freeze_pos_embed(self) -> None:
        """Makes the PE, which timm creates as a parameter, a buffer: it is a constant that nothing may train."""
        table = self.pos_embed.detach()
        del self.pos_embed
        self.register_buffer("pos_embed", table)

    @torch.no_grad()
    def _start_pos_embed(self) -> None:
        """Makes the PE a sinusoid, as the repository does; everything else starts as in a DeiT."""
        table = sinusoid(1 + self.patch_embed.num_patches, self.embed_dim)
        self.pos_embed.copy_(table[-self.pos_embed.shape[1] :])  # a patch keeps its row, with and without class row


def sinusoid(rows: int, dim: int) -> Tensor:
    """The table `(rows, dim)` in float64: alternating sin and cos of row / 10000^(2 floor(j / 2) / dim)."""
    # On the CPU, whatever the network's device is: not every device supports float64.
    row, j = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (rows, dim))
    angle = row[:, None] / 10000 ** (2 * (j // 2) / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos())


class TokensToToken(nn.Module):
    """Images to tokens: three soft splits with a performer after each of the first two, then a Linear.

    Replaces timm's PatchEmbed and has its attributes and arguments.

    Raises:
        ValueError: the patch size is not 16, or the size of an image is not `img_size`.
    """

    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_patches: int

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = PATCH,
        in_chans: int = 3,
        embed_dim: int = 256,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        output_fmt: str | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.patch_size = (PATCH, PATCH)
        self.strict_img_size = strict_img_size
        self.flatten = output_fmt is None  # timm passes None for tokens (B, N, D), "NHWC" for a map (B, H, W, D)
        self.set_input_size(img_size, patch_size)
        self.attention1 = TokenPerformer(in_chans * 7 * 7, TOKEN_DIM, **dd)
        self.attention2 = TokenPerformer(TOKEN_DIM * 3 * 3, TOKEN_DIM, **dd)
        self.project = nn.Linear(TOKEN_DIM * 3 * 3, embed_dim, bias=bias, **dd)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's method; no weight depends on the image size."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size={patch_size!r}: the soft splits of T2T-ViT make patches of {PATCH}; leave it out"
            )
        if img_size is not None:
            check_divisible(img_size, PATCH)
            self.img_size = to_2tuple(img_size)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        return PATCH if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens that an image of this size gives."""
        return img_size[0] // PATCH, img_size[1] // PATCH

    def forward(self, image: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, H/16 * W/16, D)`, or to `(B, H/16, W/16, D)`."""
        height, width = image.shape[-2:]
        _check_image_size(image, self.img_size if self.strict_img_size else None)
        x = self.attention1(_soft_split(image, window=7, stride=4, padding=2))  # (B, H/4 * W/4, 64)
        x = x.transpose(1, 2).unflatten(2, (height // 4, width // 4))
        x = self.attention2(_soft_split(x, window=3, stride=2, padding=1))  # (B, H/8 * W/8, 64)
        x = x.transpose(1, 2).unflatten(2, (height // 8, width // 8))
        x = self.project(_soft_split(x, window=3, stride=2, padding=1))  # (B, H/16 * W/16, D)
        return x if self.flatten else x.unflatten(1, (height // PATCH, width // PATCH))


class TokenPerformer(nn.Module):
    """A transformer layer with one head that approximates softmax attention by positive random features.

    With phi(x)_i = exp(w_i x - |x|^2 / 2) / sqrt(m), tokens t and s and m features:

        y_t = sum_s <phi(q_t), phi(k_s)> v_s / (sum_s <phi(q_t), phi(k_s)> + 1e-8)

    Input and output have different widths, so v is the residual. The dropout rates are fixed, as in the repository.

    Source:
        yitu-opensource/T2T-ViT, `models/token_performer.py`; the features: Choromanski et al., arXiv 2009.14794.
    """

    constants = ("w",)
    """Buffers that are parameters in the repository, and in the paper's counts."""
    w: Tensor
    """Directions of the features, `(m, out_dim)`: random, and never trained."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * out_dim, **dd)  # the order in the checkpoints
        self.register_buffer("w", torch.empty(out_dim // 2, out_dim, **dd))
        self.proj = nn.Linear(out_dim, out_dim, **dd)
        self.dp = nn.Dropout(0.1)
        self.norm2 = nn.LayerNorm(out_dim, **dd)
        self.mlp = nn.Sequential(
            nn.Linear(out_dim, out_dim, **dd), nn.GELU(), nn.Linear(out_dim, out_dim, **dd), nn.Dropout(0.1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the directions of the features: orthogonal rows with norm sqrt(m)."""
        drawn = nn.init.orthogonal_(torch.empty_like(self.w, dtype=torch.float32))
        with torch.no_grad():
            self.w.copy_(drawn * math.sqrt(len(drawn)))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, dim)` to tokens `(B, N, out_dim)`."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.dp(self.proj(self._attend(k, q, v)))
        return x + self.mlp(self.norm2(x))

    def _attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        return _attend_by_features(k, q, v, self.w)


@torch.fx.wrap  # the choice of dtype and device is not for torch.fx to trace
def _attend_by_features(k: Tensor, q: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The attention of TokenPerformer: keys, queries, values `(B, N, D)` and directions `(m, D)` to `(B, N, D)`."""
    # phi reaches exp(|w|^2 / 2) = exp(16), which overflows in half precision.
    dtype = torch.promote_types(v.dtype, torch.float32)
    device = v.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        phi_k, phi_q = _features(k.to(dtype), w), _features(q.to(dtype), w)
        sums = phi_q @ phi_k.sum(dim=1).unsqueeze(2)  # (B, N, 1)
        y = phi_q @ (phi_k.transpose(1, 2) @ v.to(dtype)) / (sums + 1e-8)
    return y.to(v.dtype)


def _features(x: Tensor, w: Tensor) -> Tensor:
    exponent = x @ w.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
    return exponent.exp() / math.sqrt(len(w))


@torch.fx.wrap  # a size is a number only where an image is
def _check_image_size(image: Tensor, allowed: tuple[int, int] | None) -> None:
    """Refuses an image of another size than the network's, or whose sides are not multiples of a patch's."""
    height, width = image.shape[-2:]
    if allowed is not None and (height, width) != allowed:
        raise ValueError(
            f"images are {height} x {width}, but the network takes {allowed[0]} x {allowed[1]}; "
            "call set_input_size, or build it with dynamic_img_size=True"
        )
    check_divisible((height, width), PATCH)


def _soft_split(x: Tensor, *, window: int, stride: int, padding: int) -> Tensor:
    """Maps `(B, C, H, W)` to overlapping patches `(B, H/stride * W/stride, C * window * window)`, zero-padded."""
    return F.unfold(x, window, stride=stride, padding=padding).transpose(1, 2)


_T2T_256: dict[str, Any] = {"img_size": 224, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2, "qkv_bias": False}

_SIZES: dict[str, dict[str, Any]] = {
    "t2t_vit_7": _T2T_256 | {"depth": 7},
    "t2t_vit_10": _T2T_256 | {"depth": 10},
    "t2t_vit_12": _T2T_256 | {"depth": 12},
    "t2t_vit_14": _T2T_256 | {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3},
}

register(T2TViT, _SIZES, crop_pct=0.9, first_conv=())
