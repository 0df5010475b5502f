"""Position embeddings delivered to every layer of a vision transformer, for global average pooling (MPVG).

The public names load on first use: `import mpvg` alone loads no torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpvg.delivery import METHODS, DeliverySpec, PositionDelivery
    from mpvg.inference import Predictor
    from mpvg.models import DeliveryMixin, create_model, register_network
    from mpvg.models.convert import convert
    from mpvg.models.fold import fold
    from mpvg.runs import load

    __version__: str

__all__ = [
    "METHODS",
    "DeliveryMixin",
    "DeliverySpec",
    "PositionDelivery",
    "Predictor",
    "convert",
    "create_model",
    "fold",
    "load",
    "register_network",
]

_HOME = {
    "METHODS": "mpvg.delivery",
    "DeliveryMixin": "mpvg.models",
    "DeliverySpec": "mpvg.delivery",
    "PositionDelivery": "mpvg.delivery",
    "Predictor": "mpvg.inference",
    "convert": "mpvg.models.convert",
    "create_model": "mpvg.models",
    "fold": "mpvg.models.fold",
    "load": "mpvg.runs",
    "register_network": "mpvg.models",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        value = metadata.version("mpvg")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'mpvg' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
