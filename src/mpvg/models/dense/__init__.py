"""Networks that give feature maps at strides 4, 8, 16 and 32 to the heads of detection and segmentation."""

from mpvg.models.dense.factory import ADAPTERS, create_adapter
from mpvg.models.dense.trunk import DenseBackbone, Forward

__all__ = ["ADAPTERS", "DenseBackbone", "Forward", "create_adapter"]
