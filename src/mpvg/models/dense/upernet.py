"""UperNet: the class of each pixel, from the four maps of a dense network."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.delivery import DeliverySpec
from mpvg.models.adapting import LoadReport
from mpvg.models.dense.official import BACKBONE, Part
from mpvg.models.dense.quiet import quiet_import
from mpvg.models.dense.trunk import STRIDES, DenseBackbone, layer_groups

DROPOUT = 0.1
"""Of whole channels, before each classifier."""
AUXILIARY_MAP = 2
"""Number of the map, from 0, that the auxiliary head reads: that of stride 16."""
_NAMES = ((r"(^|\.)conv_seg\.", r"\1classifier."), (r"\.bn\.", r".batch_norm."))
OFFICIAL: tuple[Part, ...] = (
    replace(BACKBONE, place="backbone."),
    Part(prefix="decode_head.", place="decode_head.", names=_NAMES),
    Part(prefix="auxiliary_head.", place="auxiliary_head.", names=_NAMES),
)
"""Where the tensors of a checkpoint of czczup/ViT-Adapter's segmentation are, for `official.load_official`."""


class PixelLogits(NamedTuple):
    """Scores of the classes for each pixel of the images."""

    decode: Tensor
    """`(B, classes, H, W)`."""
    auxiliary: Tensor | None
    """The same from the auxiliary head; None in evaluation, which does without it."""


class UperNet(nn.Module):
    """A dense network with the heads of UperNet: pyramid pooling, a feature pyramid, and an auxiliary FCN.

    The original's SyncBN is BatchNorm here, which is the same in one process; `network.sync_bn` converts it.

    Args:
        backbone: gives the four maps.
        num_classes: number of classes.
        channels: of the decode head's maps.
        auxiliary_channels: of the auxiliary head's.
        classifier_std: standard deviation at which the weights of both classifiers start.
        frozen: whether the backbone is not trained: neither its parameters nor the running statistics of its BatchNorm,
            and it drops no path.

    Raises:
        ModuleNotFoundError: transformers, whose heads these are, is not installed.

    Source:
        Xiao et al., ECCV 2018; czczup/ViT-Adapter, `upernet_deit_adapter_tiny_512_160k_ade20k.py`, whose heads are
        mmsegmentation 0.20.2's UPerHead and FCNHead: dropout and initial values are theirs.
    """

    official = OFFICIAL
    """How complete checkpoints of the original repository name their tensors."""

    def __init__(
        self,
        backbone: DenseBackbone,
        num_classes: int,
        *,
        channels: int = 512,
        auxiliary_channels: int = 256,
        classifier_std: float = 0.01,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        with quiet_import():
            from transformers.models.upernet.configuration_upernet import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
        settings = UperNetConfig(hidden_size=channels, auxiliary_channels=auxiliary_channels, num_labels=num_classes)
        widths = [backbone.embed_dim] * len(STRIDES)
        self.frozen = frozen
        self.backbone = backbone.requires_grad_(not frozen)
        self.decode_head = _with_mmseg_values(UperNetHead(settings, in_channels=widths), classifier_std)
        auxiliary = UperNetFCNHead(settings, in_channels=widths, in_index=AUXILIARY_MAP)
        self.auxiliary_head = _with_mmseg_values(auxiliary, classifier_std)

    @property
    def remark(self) -> str:
        """How the network differs from what the method's name promises; empty if it does not."""
        return self.backbone.remark

    @property
    def spec(self) -> DeliverySpec:
        """The method as this network runs it."""
        return self.backbone.spec

    @property
    def load_report(self) -> LoadReport | None:
        """What the transformer took from a checkpoint; None: nothing was loaded."""
        return self.backbone.load_report

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `trunk.layer_groups`."""
        return layer_groups("backbone.vit.")

    def no_weight_decay(self) -> set[str]:
        """None but the parameters of one dimension: the original decays the PE and the embeddings of the levels too."""
        return set()

    def get_classifier(self) -> nn.Module:
        """The decode head, which `optim.body_lr` takes for the head."""
        return self.decode_head

    def train(self, mode: bool = True) -> "UperNet":
        """As torch's; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> PixelLogits:
        """Images `(B, C, H, W)`, sides multiples of 32, to scores of the same size.

        Raises:
            ValueError: it is trained on one image, or a side is not a multiple of 32.
        """
        if self.training and len(images) == 1 and not self._synchronized():
            raise ValueError(
                "UperNet is trained on one image at once, but its pooling makes one pixel of it, which BatchNorm "
                "cannot normalize; give a batch_size of at least 2 for each process and part of accumulate, or several "
                "processes on GPUs with network.sync_bn"
            )
        maps, size = self.backbone(images), images.shape[-2:]
        decoded = resized(self.decode_head(maps), size)
        return PixelLogits(decoded, resized(self.auxiliary_head(maps), size) if self.training else None)

    def _synchronized(self) -> bool:
        """Whether BatchNorm normalizes over the images of all processes."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        return several and isinstance(self.decode_head.bottleneck.batch_norm, nn.SyncBatchNorm)


def resized(logits: Tensor, size: Any) -> Tensor:
    """Scores of another height and width, bilinear, as mmsegmentation resizes them with align_corners=False."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


class _Classifier(nn.Conv2d):
    """A 1 x 1 convolution after a dropout of whole channels; its tensors have the names of a plain one's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, DROPOUT, self.training))


def _with_mmseg_values(head: Any, classifier_std: float) -> Any:
    """A head of transformers with the dropout and the initial values that mmsegmentation gives it, or another std."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):  # followed by BatchNorm, so without bias
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    plain = head.classifier
    head.classifier = _Classifier(plain.in_channels, plain.out_channels, kernel_size=1)
    nn.init.normal_(head.classifier.weight, std=classifier_std)
    nn.init.zeros_(head.classifier.bias)
    return head
