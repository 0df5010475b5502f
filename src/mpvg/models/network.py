"""The type of a network that receives a delivered position embedding (PE), for code that works with every family."""

from collections.abc import Iterator, Sized
from typing import Any, Protocol, cast

from timm.layers import to_2tuple
from torch import Tensor, nn

from mpvg.delivery import DeliveredPE, DeliverySpec
from mpvg.models.probing import Probe

POS_STD = 0.02
"""Initial standard deviation of an absolute PE, and of DeiT's class token (facebookresearch/deit, timm 0.3.2;
microsoft/Swin-Transformer)."""


class OutputError(ValueError):
    """A network gives something else than it must."""


def check_logits(logits: Any, images: int, classes: int | None = None) -> None:
    """Refuses what a classifier gives if it is not `(images, classes)`; None: any number of classes.

    Raises:
        OutputError: with what it gives.
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or len(shape) != 2 or shape != (images, classes or shape[1]):
        found = type(logits).__name__ if shape is None else shape
        raise OutputError(f"{images} images give {found}; allowed: logits ({images}, {classes or 'classes'})")


def last_is_folded(network: "DeliveredNetwork") -> bool:
    """Whether the PE of the Last LN is part of its bias; in a network of one's own `delivery` may be a plain list."""
    return bool(getattr(network.delivery, "last_mean_folded", False))


class Delivery(Protocol):
    """`model.delivery`: a PositionDelivery, one per stage (Swin), or the constants of a folded network."""

    @property
    def last_mean_folded(self) -> bool:
        """Whether the Last LN's beta already contains the mean of what the Last LN receives."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As nn.Module."""


class DeliveredNetwork(Protocol):
    """What a network of this package has in addition to an nn.Module; see `delivered_network`."""

    remark: str
    """How the network differs from what the method's name promises; empty if it does not."""
    probe: Probe | None
    """Called with the tokens and the delivered PE of each layer and of the Last LN."""

    @property
    def spec(self) -> DeliverySpec:
        """The method as this network runs it."""

    @property
    def delivery(self) -> Delivery:
        """The module that computes, or holds, what is delivered."""

    @property
    def img_size(self) -> int | tuple[int, int]:
        """Height and width of an image in pixels; one number for a square."""

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """Height and width of a patch in pixels."""

    @property
    def blocks(self) -> Sized:
        """The layers, over all stages."""

    @property
    def norm(self) -> nn.LayerNorm:
        """The Last LN; a converted network whose LN comes after the mean has an nn.Identity here."""

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling: "token" or "avg", or another one in a converted network."""

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: class token and registers."""

    @property
    def in_chans(self) -> int:
        """Channels of an image."""

    def raw_pos_embed(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The raw PE, `(1, rows, D)`, resampled to a grid of patches if one is given."""

    def deliver(self, pos: Tensor, grid: tuple[int, int] | None = None) -> DeliveredPE:
        """Computes what every layer and the Last LN receive; `pos` is `raw_pos_embed(grid)`."""

    def pool(self, tokens: Tensor, /) -> Tensor:
        """The network's pooling, `(B, N, D)` to `(B, D)`."""

    def set_input_size(self, img_size: Any = None) -> None:
        """Resamples the raw PE to another image size."""

    def get_classifier(self) -> nn.Module:
        """The head's last layer."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to biases and norms."""


class TimmSizes:
    """The sizes of DeliveredNetwork for a network whose `patch_embed` is timm's, or like it."""

    patch_embed: Any

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        height, width = self.patch_embed.img_size
        return height, width

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        height, width = self.patch_embed.patch_size
        return height, width


def patch_grid(network: Any) -> tuple[int, int]:
    """Rows and columns of patches at the network's image size; the network may be timm's."""
    sized = network if hasattr(network, "img_size") else network.patch_embed
    sizes = zip(to_2tuple(sized.img_size), to_2tuple(sized.patch_size), strict=True)
    rows, columns = (side // patch for side, patch in sizes)
    return rows, columns


def delivered_network(model: nn.Module) -> DeliveredNetwork:
    """Returns the same model with the type DeliveredNetwork.

    Raises:
        ValueError: it is not a network of this package.
    """
    missing = [name for name in ("delivery", "deliver", "raw_pos_embed") if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} does not receive a delivered PE (it has no {missing[0]}); "
            "use mpvg.create_model or mpvg.convert"
        )
    return cast(DeliveredNetwork, model)


def count_parameters(module: nn.Module) -> int:
    """The number of parameters as papers count them: including frozen ones, and constants that were parameters there.

    T2T-ViT's sinusoid and random features are constants here, so that nothing can train them.
    """
    constants = [getattr(part, name) for part in module.modules() for name in getattr(part, "constants", ())]
    return sum(tensor.numel() for tensor in (*module.parameters(), *constants))
