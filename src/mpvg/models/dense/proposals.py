"""The region proposal network of Mask R-CNN: torchvision's, with the anchors, matches and loss of MMDetection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

ANCHOR_STRIDES = (4, 8, 16, 32, 64)
"""Of the five maps, in pixels."""
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
"""Height divided by width."""
POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3


class ExactAnchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors whose corners are not rounded, at multiples of exact strides.

    torchvision rounds the corners and divides the image's side by the map's, which gives 53 and 61 pixels in place of
    64 where a map has an odd side.

    Args:
        sizes: square root of the area of the anchors of each map, in pixels.

    Source:
        MMDetection, `AnchorGenerator` with one scale.
    """

    def __init__(self, sizes: Sequence[float]) -> None:
        super().__init__(tuple((size,) for size in sizes), (ANCHOR_RATIOS,) * len(sizes))

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The anchors at the origin, `(A, 4)`."""
        heights = torch.tensor(aspect_ratios).sqrt()
        sides = torch.stack([1 / heights, heights], dim=1)[:, None] * torch.tensor(scales)[:, None]
        corner = sides.reshape(-1, 2) / 2
        return torch.cat([-corner, corner], dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all maps, `(A, 4)`, float32 in any precision of the maps, for each image."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in ANCHOR_STRIDES]
        anchors = torch.cat(self.grid_anchors([list(one.shape[-2:]) for one in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class FlooredMatcher(Matcher):  # type: ignore[misc]  # torchvision has no types
    """Gives each object its best anchors even below the threshold for matches, but only from a floor on.

    An anchor that is the best of an object is matched with that object; torchvision matches it with the anchor's own
    best object, and has no floor. Where an anchor is the best of several objects, the last one has it.

    Args:
        high: intersection over union (IoU) from which on an anchor matches an object.
        low: IoU below which it is background; it counts as neither between.
        floor: least IoU of an object's best anchor.

    Source:
        MMDetection, `MaxIoUAssigner` with `match_low_quality`.
    """

    def __init__(self, high: float, low: float, floor: float) -> None:
        super().__init__(high, low, allow_low_quality_matches=True)
        self.floor = floor

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Changes `matches` `(anchors,)`, given the IoU `(objects, anchors)`."""
        highest = match_quality_matrix.amax(dim=1, keepdim=True)
        best = (match_quality_matrix == highest) & (highest >= self.floor)
        numbers = torch.arange(1, len(best) + 1, device=best.device)
        last = (best * numbers[:, None]).amax(dim=0)
        matches[last > 0] = last[last > 0] - 1


class FloatHead(RPNHead):  # type: ignore[misc]  # torchvision has no types
    """Gives float32 in any precision of the maps: boxes have more digits than bfloat16."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and offsets of each map."""
        scores, offsets = super().forward(x)
        return [one.float() for one in scores], [one.float() for one in offsets]


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """Proposes boxes; trained with L1 and only on anchors within each image's own padding.

    A target has `boxes` and `padded`: height and width of the image with its own padding, but without that to the
    largest image of the batch.

    Args:
        channels: of the maps.
        anchor_sizes: see `ExactAnchors`.
        proposals: boxes that are left of an image after non-maximum suppression, into which as many of each map go,
            twice as many in training.

    Source:
        MMDetection, `RPNHead` and `AnchorHead.get_anchors`; the numbers of `mask_rcnn_r50_fpn.py`.
    """

    def __init__(self, channels: int, anchor_sizes: Sequence[float], proposals: int) -> None:
        super().__init__(
            ExactAnchors(anchor_sizes),
            FloatHead(channels, len(ANCHOR_RATIOS)),
            fg_iou_thresh=POSITIVE_IOU,
            bg_iou_thresh=NEGATIVE_IOU,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.proposal_matcher = FlooredMatcher(POSITIVE_IOU, NEGATIVE_IOU, floor=NEGATIVE_IOU)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, what its anchors are, `(A,)`: 1 an object, 0 background, -1 neither; and their boxes."""
        labels, boxes = [], []
        for own, target in zip(anchors, targets, strict=True):
            inside = within(own, target["padded"])
            (found,), (matched,) = super().assign_targets_to_anchors([own[inside]], [target])
            labels.append(own.new_full((len(own),), -1).masked_scatter(inside, found))
            boxes.append(own.masked_scatter(inside[:, None], matched))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Binary cross entropy of the sampled anchors, and L1 of the objects' offsets; both divided by the samples."""
        chosen = [torch.cat(part).bool() for part in self.fg_bg_sampler(labels)]
        positive, sampled = chosen[0], chosen[0] | chosen[1]
        offsets = torch.cat(list(regression_targets))[positive]
        box = F.l1_loss(pred_bbox_deltas[positive], offsets, reduction="sum") / sampled.sum()
        wanted = torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted), box


def within(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Which anchors `(A, 4)` have their centers within a height and width, `(A,)`."""
    height, width = size
    # Centers are multiples of 4 pixels but for their last bits.
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 + 0.5
    return (centers < torch.tensor([width, height], device=anchors.device)).all(dim=1)
