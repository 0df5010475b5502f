"""Mask R-CNN around a dense network: boxes, classes and masks of the objects in images.

The parts are torchvision's. Where they differ from MMDetection's, with which the published numbers of ViT-Adapter were
made, `proposals` and `regions` have subclasses of them; nothing resizes or normalizes inside the network.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mpvg.delivery import DeliverySpec
from mpvg.models.adapting import LoadReport
from mpvg.models.dense.official import BACKBONE, Change, Part
from mpvg.models.dense.proposals import ANCHOR_STRIDES, ProposalNetwork
from mpvg.models.dense.regions import RegionHeads
from mpvg.models.dense.trunk import STRIDES, DenseBackbone, layer_groups


def _background_first(given: Tensor, own: Tensor) -> Tensor:
    """MMDetection's class scores, in which the background comes last, in torchvision's order."""
    return given.roll(1, dims=0)


def _with_background(given: Tensor, own: Tensor) -> Tensor:
    """Rows of the classes, with rows of 0 for a background before them, which nothing reads."""
    if len(given) >= len(own):
        return given  # of more classes, which is refused where shapes are compared
    return torch.cat([given.new_zeros((len(own) - len(given), *given.shape[1:])), given])


OFFICIAL: tuple[Part, ...] = (
    replace(BACKBONE, place="backbone.body."),
    Part(
        prefix="neck.",
        place="backbone.fpn.",
        names=(
            (r"^lateral_convs\.(\d+)\.conv\.", r"inner_blocks.\1.0."),
            (r"^fpn_convs\.(\d+)\.conv\.", r"layer_blocks.\1.0."),
        ),
    ),
    Part(
        prefix="rpn_head.",
        place="rpn.head.",
        names=((r"^rpn_conv\.", "conv.0.0."), (r"^rpn_cls\.", "cls_logits."), (r"^rpn_reg\.", "bbox_pred.")),
    ),
    Part(
        prefix="roi_head.",
        place="roi_heads.",
        names=(
            (r"^bbox_head\.shared_fcs\.0\.", "box_head.fc6."),
            (r"^bbox_head\.shared_fcs\.1\.", "box_head.fc7."),
            (r"^bbox_head\.fc_cls\.", "box_predictor.cls_score."),
            (r"^bbox_head\.fc_reg\.", "box_predictor.bbox_pred."),
            (r"^mask_head\.convs\.(\d+)\.conv\.", r"mask_head.\1.0."),
            (r"^mask_head\.upsample\.", "mask_predictor.conv5_mask."),
            (r"^mask_head\.conv_logits\.", "mask_predictor.mask_fcn_logits."),
        ),
        changes=(
            Change(name=r"^box_predictor\.cls_score\.", apply=_background_first, reason="background first"),
            Change(
                name=r"^(box_predictor\.bbox_pred|mask_predictor\.mask_fcn_logits)\.",
                apply=_with_background,
                reason="rows of 0 for the background, which has none in the file and is not read",
            ),
        ),
    ),
)
"""Where the tensors of a checkpoint of czczup/ViT-Adapter's detection are, for `official.load_official`."""
PAPER_ANCHORS = (32.0, 64.0, 128.0, 256.0, 512.0)
"""Eight times the stride of each map."""


class Pyramid(nn.Module):
    """A dense network and a feature pyramid on its four maps, which adds a fifth at stride 64."""

    def __init__(self, body: DenseBackbone, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        widths = [body.embed_dim] * len(STRIDES)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())
        for layer in self.fpn.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)  # as mmcv; torchvision's is Kaiming

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

    official = OFFICIAL
    """How complete checkpoints of the original repository name their tensors."""

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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `trunk.layer_groups`."""
        return layer_groups("backbone.body.vit.")

    def get_classifier(self) -> nn.Module:
        """The box and mask heads, which `optim.body_lr` takes for the head."""
        heads: nn.Module = self.roi_heads
        return heads

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
