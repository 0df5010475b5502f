"""Read-outs beside the method's own: what comes between the Last LN, with what it receives, and the head."""

from typing import Any, get_args

from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpvg.config.parts import Pooling

_INSTEAD_OF: dict[str, str] = {"max": "avg", "attention": "avg", "mean_norm": "avg", "token_and_mean": "token"}
"""Pooling -> what of the method it replaces. After `mean_norm`, the Last LN, to which the PE is delivered, stays."""


class TokenAndMean(nn.Module):
    """Tokens `(B, N, D)` to the mean of the class token, which comes first, and of the patches' mean, `(B, D)`."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return 0.5 * (tokens[:, 0] + tokens[:, self.prefix :].mean(dim=1))


def set_pooling(model: nn.Module, pooling: Pooling) -> None:
    """Gives a new network another read-out; its other weights are kept.

    Raises:
        ValueError: there is no such pooling, the network has a read-out of its own, or the method reads out something
            else than what the pooling replaces.
    """
    network: Any = model
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; allowed: {', '.join(get_args(Pooling))}")
    if pooling == "method":
        return
    if not _pools_as_timm(model):
        raise ValueError(f"pooling={pooling!r} is for ViTs; {type(model).__name__} has a read-out of its own")
    if network.spec.pool != _INSTEAD_OF[pooling]:
        allowed = [name for name, pool in _INSTEAD_OF.items() if pool == network.spec.pool]
        raise ValueError(
            f"pooling={pooling!r} is for a method that reads out {_INSTEAD_OF[pooling]!r}, and this one reads out "
            f"{network.spec.pool!r}; allowed with it: method, {', '.join(allowed)}"
        )
    block = network.blocks[0]
    if pooling == "max":
        network.global_pool = "max"
    elif pooling == "attention":
        network.global_pool = "map"
        network.attn_pool = AttentionPoolLatent(
            network.embed_dim, num_heads=block.attn.num_heads, mlp_ratio=4.0, norm_layer=type(network.norm)
        )
    elif pooling == "mean_norm":
        network.fc_norm = type(network.norm)(network.embed_dim, eps=network.norm.eps)
    else:
        network.attn_pool, network.pool_include_prefix = TokenAndMean(network.num_prefix_tokens), True


def _pools_as_timm(model: nn.Module) -> bool:
    kind = type(model)
    names = ("pool", "forward_head")
    return isinstance(model, VisionTransformer) and all(
        getattr(kind, name) is getattr(VisionTransformer, name) for name in names
    )
