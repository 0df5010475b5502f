"""Mask R-CNN around a dense network: boxes, classes and masks of the objects in images.

The parts are torchvision's. Where they differ from MMDetection's, with which the published numbers of ViT-Adapter were
made, `proposals` and `regions` have subclasses of them; nothing resizes or normalizes inside the network.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mpvg.delivery import DeliverySpec
from mpvg.models.adapting import LoadReport
from mpvg.models.dense.proposals import ANCHOR_STRIDES, ProposalNetwork
from mpvg.models.dense.regions import RegionHeads
from mpvg.models.dense.trunk import STRIDES, DenseBackbone

PAPER_ANCHORS = (32.0, 64.0, 128.0, 256.0, 512.0)
"""Eight times the stride of each map."""


class Pyramid(nn.Module):
    """A dense network and a feature pyramid on its four maps, which adds a fifth at stride 64."""

    def __init__(self, body: DenseBackbone, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        widths = [body.embed_dim] * len(STRIDES)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, C, H, W)` to maps `(B, channels, H / s, W / s)`, s = 4, 8, 16, 32, 64, by name."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(n), one) for n, one in enumerate(self.body(images))))
        return maps


class MaskRCNN(GeneralizedRCNN):  # type: ignore[misc]  # torchvision has no types
    """Mask R-CNN of the paper's Table 3: FPN, region proposals, box head and mask head around a dense network.

    Args:
        body: the network that gives the maps.
        num_classes: without the background.
        anchor_sizes: square root of the area of the anchors at each stride of `ANCHOR_STRIDES`, in pixels.
        channels: of the pyramid, the proposal network and the mask head.
        hidden: width of the box head.
        regions: proposals of an image that are sampled for training.
        proposals: of an image.

    Raises:
        ValueError: there are not five sizes of anchors.

    Source:
        He et al., ICCV 2017; MMDetection, `mask_rcnn_r50_fpn.py`, as czczup/ViT-Adapter uses it.
    """

    def __init__(
        self,
        body: DenseBackbone,
        num_classes: int,
        *,
        anchor_sizes: Sequence[float] = PAPER_ANCHORS,
        channels: int = 256,
        hidden: int = 1024,
        regions: int = 512,
        proposals: int = 1000,
    ) -> None:
        if len(anchor_sizes) != len(ANCHOR_STRIDES):
            strides = ", ".join(map(str, ANCHOR_STRIDES))
            raise ValueError(f"anchor_sizes are {tuple(anchor_sizes)}; allowed: one for each of the strides {strides}")
        super().__init__(
            Pyramid(body, channels),
            ProposalNetwork(channels, anchor_sizes, proposals),
            RegionHeads(num_classes, channels=channels, hidden=hidden, regions=regions),
            nn.Identity(),  # the data's transforms resize and normalize
        )

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, and what is found otherwise.

        Args:
            images: normalized and padded, `(B, 3, H, W)`, sides multiples of 32.
            sizes: height and width of each image without padding.
            targets: training: `boxes` `(N, 4)` in pixels, `labels` `(N,)` from 1 on, `masks` `(N, h, w)`, and `padded`:
                height and width of the image with its own padding alone.

        Returns:
            Training: `objectness`, `proposal`, `class`, `box` and `mask`, each a mean over the samples of all images.
            Otherwise for each image `boxes` `(N, 4)` in pixels, `scores` `(N,)`, `labels` `(N,)` from 1 on, and the
            probabilities of the pixels within each box, `masks` `(N, 28, 28)`; the best first.
        """
        features = self.backbone(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        found, more = self.roi_heads(features, proposals, sizes, targets)
        if not self.training:
            return list(found)
        return {"objectness": losses["loss_objectness"], "proposal": losses["loss_rpn_box_reg"], **more}

    def no_weight_decay(self) -> set[str]:
        """The raw PE and the embedding of the levels; biases and norms have none either."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if "pos_embed" in name or "level_embed" in name}

    @property
    def body(self) -> DenseBackbone:
        """The network that gives the maps."""
        body: DenseBackbone = self.backbone.body
        return body

    @property
    def remark(self) -> str:
        """How the network differs from what the method's name promises; empty if it does not."""
        return self.body.remark

    @property
    def spec(self) -> DeliverySpec:
        """The method as this network runs it."""
        return self.body.spec

    @property
    def load_report(self) -> LoadReport | None:
        """What the transformer took from a checkpoint; None: nothing was loaded."""
        return self.body.load_report
