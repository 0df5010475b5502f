"""The tokens of a vision transformer before and after its Last LN, for this package's networks and for timm's."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from mpvg.models.mixin import DeliveryMixin
from mpvg.models.network import OutputError


class Tokens(NamedTuple):
    """The tokens of a batch, prefix tokens first; patches of a map in rows."""

    before: Tensor
    """Before the Last LN, `(B, N, D)`."""
    after: Tensor
    """After it, with what a method delivers to it, `(B, N, D)`; `before` if the network has none."""


class TokenReader:
    """Runs a network up to its head.

    timm's networks with `fc_norm` normalize the mean of the tokens; here that LN is applied to each token.

    Args:
        model: a network with blocks, whose features are tokens.

    Raises:
        ValueError: it is no such network.
    """

    def __init__(self, model: nn.Module) -> None:
        found: Any = model
        self.model, self.name = found, type(model).__name__
        if not isinstance(getattr(model, "norm", None), nn.Module) or not hasattr(model, "forward_features"):
            raise ValueError(
                f"{self.name} has no tokens with a Last LN (norm); allowed: vision transformers, such as ViT, DeiT, "
                "Eva, ViT with relative positions, Swin"
            )
        self.prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self.class_token = getattr(model, "cls_token", None) is not None
        registers = getattr(model, "reg_token", None)
        self.registers = 0 if registers is None else int(registers.shape[1])
        if isinstance(model, DeliveryMixin):  # which may name its tokens as it likes
            self.class_token = self.class_token or model.spec.pool == "token"
            self.registers = self.prefix - self.class_token
        after_pooling = getattr(model, "fc_norm", None)
        self.is_late = isinstance(found.norm, nn.Identity)
        """Whether the network's own Last LN comes after the pooling."""
        last: nn.Module | None = after_pooling if self.is_late else found.norm
        self.last_norm = None if last is None or isinstance(last, nn.Identity) else last

    def __call__(self, images: Tensor) -> Tokens:
        """Images `(B, C, H, W)` to tokens.

        Raises:
            ValueError: the network's features are not tokens.
        """
        caught: list[Tensor] = []
        hook = self.model.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            features = self.model.forward_features(images)
        finally:
            hook.remove()
        if not caught or not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise OutputError(f"{self.name} normalizes no tokens with its Last LN: it has no patches to read out")
        width = getattr(self.model, "num_features", features.shape[-1])
        if features.shape != caught[-1].shape or features.shape[-1] != width:
            raise OutputError(f"the features of {self.name}, {tuple(features.shape)}, are not tokens (B, ..., D)")
        before, after = caught[-1].flatten(1, -2), features.flatten(1, -2)
        return Tokens(before, self.last_norm(after) if self.is_late and self.last_norm is not None else after)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a network, over all stages.

    Raises:
        ValueError: it has none.
    """
    network: Any = model
    stages = getattr(model, "layers", None)
    found = getattr(model, "blocks", None)
    if found is None and stages is not None:
        found = [block for stage in stages for block in getattr(stage, "blocks", ())]
    if not found:
        raise ValueError(f"{type(network).__name__} has no blocks; give a vision transformer")
    return list(found)
