"""The heads of Mask R-CNN: torchvision's, with the sampling, losses, masks and initial weights of MMDetection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from mpvg.models.dense.proposals import FlooredMatcher
from mpvg.models.dense.trunk import STRIDES

MASK_SIDE = 28
"""Of the mask that is predicted within a box."""
THRESHOLD = 0.5
"""Probability from which on a pixel is inside."""
_NAMES = ("0", "1", "2", "3")


class AlignedPool(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """RoIAlign on four maps, with half a pixel's shift (`aligned`), as many samples as there are pixels, exact strides.

    Args:
        side: of what is cut out of a map.

    Source:
        MMDetection, `SingleRoIExtractor` with `RoIAlign(sampling_ratio=0)`.
    """

    def __init__(self, side: int) -> None:
        super().__init__(list(_NAMES), side, sampling_ratio=0)
        self.mapper = LevelMapper(2, 5)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Maps `(B, C, H / s, W / s)` and boxes `(N, 4)` of each image to `(sum of N, C, side, side)`, float32."""
        maps, size = [x[name] for name in _NAMES], self.output_size
        places = torch.cat([F.pad(one, (1, 0), value=number) for number, one in enumerate(boxes)])
        levels = self.mapper(boxes)
        found = maps[0].new_zeros((len(places), maps[0].shape[1], *size), dtype=torch.float32)
        for level, (one, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            chosen = torch.where(levels == level)[0]
            cut = roi_align(one.float(), places[chosen], size, 1 / stride, self.sampling_ratio, aligned=True)
            found = found.index_copy(0, chosen, cut)
        return found


class RegionMatcher(FlooredMatcher):
    """Matches proposals that are followed by the true boxes, as torchvision adds them: each true box with itself.

    Each object also has its best proposal, however much better the true box is: MMDetection adds the true boxes after
    it has matched the proposals.

    Source:
        MMDetection, `RandomSampler.sample`.
    """

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Changes `matches` `(proposals + objects,)`, given the IoU `(objects, proposals + objects)`."""
        objects = len(match_quality_matrix)
        if len(matches) > objects:
            parts = matches[:-objects], all_matches[:-objects], match_quality_matrix[:, :-objects]
            super().set_low_quality_matches_(*parts)
        matches[-objects:] = torch.arange(objects, device=matches.device)


class RegionHeads(RoIHeads):  # type: ignore[misc]  # torchvision has no types
    """Classes, boxes and masks of proposals.

    The targets of masks are cut out with RoIAlign, aligned, and are 0 or 1; torchvision's are shifted by half a pixel.
    With true boxes and masks, its way gives a mask AP of .7 on small objects, and this one 1.

    Args:
        num_classes: without the background, which is class 0 here.
        channels: of the maps and of the mask head.
        hidden: width of the box head.
        regions: proposals of an image that are sampled for training.

    Source:
        MMDetection, `StandardRoIHead`, `Shared2FCBBoxHead`, `FCNMaskHead` and `BitmapMasks.crop_and_resize`.
    """

    def __init__(self, num_classes: int, *, channels: int, hidden: int, regions: int) -> None:
        super().__init__(
            AlignedPool(7),
            TwoMLPHead(channels * 7**2, hidden),
            FastRCNNPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions,
            positive_fraction=0.25,
            bbox_reg_weights=None,  # 10, 10, 5, 5: the inverse of MMDetection's standard deviations
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=AlignedPool(MASK_SIDE // 2),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        )
        self.proposal_matcher = RegionMatcher(0.5, 0.5, floor=0.5)
        init_heads(self)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """In training the losses, else what is found in each image; see `MaskRCNN`."""
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        scores, offsets = self._boxes(features, proposals, image_shapes)
        found = zip(*self.postprocess_detections(scores, offsets, proposals, image_shapes), strict=True)
        results = [dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in found]
        masks = self._masks(features, [one["boxes"] for one in results], image_shapes)
        for one, own in zip(results, maskrcnn_inference(masks, [one["labels"] for one in results]), strict=True):
            one["masks"] = own[:, 0]
        return results, {}

    def _boxes(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Any) -> tuple[Tensor, Tensor]:
        scores, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, sizes)))
        return scores.float(), offsets.float()

    def _masks(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Any) -> Tensor:
        masks: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))
        return masks.float()

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Any, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        scores, found = self._boxes(features, proposals, sizes)
        wanted = torch.cat(labels)
        positive = torch.where(wanted > 0)[0]
        own = found.view(len(found), -1, 4)[positive, wanted[positive]]
        box = F.l1_loss(own, torch.cat(list(offsets))[positive], reduction="sum") / len(wanted)
        chosen = [torch.where(label > 0)[0] for label in labels]
        boxes = [one[index] for one, index in zip(proposals, chosen, strict=True)]
        objects = [one[index] for one, index in zip(matched, chosen, strict=True)]
        masks = self._masks(features, boxes, sizes)[torch.arange(len(positive)), wanted[positive]]
        pairs = zip(targets, boxes, objects, strict=True)
        insides = torch.cat([mask_targets(target["masks"], own, index) for target, own, index in pairs])
        # The mean of nothing is NaN; the sum of nothing keeps the gradients of all weights at zero.
        mask = F.binary_cross_entropy_with_logits(masks, insides, reduction="sum") / max(insides.numel(), 1)
        return {"class": F.cross_entropy(scores, wanted), "box": box, "mask": mask}


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int = MASK_SIDE) -> Tensor:
    """What a mask head should predict within boxes, `(N, side, side)`, 0 or 1.

    Args:
        masks: of the objects of an image, `(M, H, W)`.
        boxes: within that image, in pixels, `(N, 4)`.
        objects: which of them each box is for, `(N,)`.
        side: of the prediction.
    """
    places = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    inside = roi_align(masks[:, None].to(boxes), places, (side, side), 1.0, 0, aligned=True)[:, 0]
    return (inside >= THRESHOLD).to(boxes)


def paste_mask(mask: Tensor, box: Sequence[float], height: int, width: int) -> Tensor:
    """Which pixels of an image are inside a mask that was predicted within a box, `(height, width)`, bool.

    The mask is read, bilinearly, at the centers of the pixels; the box is not rounded.

    Args:
        mask: probabilities, `(S, S)`.
        box: left, top, right and bottom in pixels of the image.
        height: of the image.
        width: of the image.

    Source:
        MMDetection, `_do_paste_mask`.
    """
    image = torch.zeros(height, width, dtype=torch.bool, device=mask.device)
    (left, right, xs), (top, bottom, ys) = _centers(box[0], box[2], width, mask), _centers(box[1], box[3], height, mask)
    if right > left and bottom > top:
        grid = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], dim=-1)
        inside = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] >= THRESHOLD
        image[top:bottom, left:right] = inside
    return image


def _centers(low: float, high: float, side: int, like: Tensor) -> tuple[int, int, Tensor]:
    """The pixels along one side of a box, and where in it, from -1 to 1, their centers are."""
    first, last = max(int(low), 0), min(int(high) + 1, side)
    centers = torch.arange(first, last, dtype=torch.float32, device=like.device) + 0.5
    return first, last, (centers - low) / max(high - low, 1e-6) * 2 - 1


def init_heads(heads: RegionHeads) -> None:
    """Gives new heads the initial weights of MMDetection; torchvision leaves those of the linear layers to torch."""
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
    linear = [layer for layer in (*heads.box_head.modules(), *heads.box_predictor.modules())]
    for layer in (*linear, *heads.mask_predictor.modules()):
        if isinstance(getattr(layer, "bias", None), Tensor):
            nn.init.zeros_(layer.bias)
