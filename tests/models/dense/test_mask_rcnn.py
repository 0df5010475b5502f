"""Mask R-CNN: each place where it differs from torchvision, against a plain writing of what MMDetection does."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from mpvg.models.dense import create_adapter
from mpvg.models.dense.mask_rcnn import OFFICIAL, PAPER_ANCHORS, MaskRCNN
from mpvg.models.dense.official import load_complete, load_official
from mpvg.models.dense.proposals import ANCHOR_STRIDES, ExactAnchors, FloatHead, FlooredMatcher, ProposalNetwork, within
from mpvg.models.dense.regions import AlignedPool, RegionHeads, mask_targets, paste_mask

CANVAS_ANCHORS = (8, 16, 32, 64, 128)
SIDE = 64


@pytest.fixture
def detector() -> MaskRCNN:
    torch.manual_seed(0)
    body = create_adapter("vit_adapter_canvas", "mpvg", forward="detection")
    return MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=100)


def target(count: int = 3, side: int = SIDE, padded: tuple[int, int] = (SIDE, SIDE)) -> dict[str, Any]:
    """Rectangles of integer corners."""
    corners = torch.randint(0, side // 2, (count, 2))
    boxes = torch.cat([corners, corners + torch.randint(8, side // 2, (count, 2))], dim=1)
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(1, 4, (count,))
    return {"boxes": boxes.float(), "labels": labels, "masks": masks, "padded": padded}


def test_it_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        body = create_adapter("vit_adapter_tiny", "default", forward="detection")
        model = MaskRCNN(body, 80)
    row = body.embed_dim  # the official PE has a row for the class token, which these networks do not have
    assert sum(parameter.numel() for parameter in body.parameters()) + row == 7_966_640
    assert sum(parameter.numel() for parameter in model.parameters()) + row == 28_072_869


def test_anchors_are_not_rounded_and_have_exact_strides() -> None:
    grids = [(27, 40), (14, 20), (7, 10), (4, 5), (2, 3)]  # of 108 x 160 pixels, where torchvision takes 27 and 54
    images = ImageList(torch.zeros(2, 3, 108, 160), [(108, 160)] * 2)
    maps = [torch.zeros(2, 8, *grid, dtype=torch.bfloat16) for grid in grids]
    first, second = ExactAnchors(PAPER_ANCHORS)(images, maps)
    expected = []
    for size, stride, (rows, columns) in zip(PAPER_ANCHORS, ANCHOR_STRIDES, grids, strict=True):
        for y in range(rows):
            for x in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    width, height = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
                    expected.append([stride * x - width, stride * y - height, stride * x + width, stride * y + height])
    torch.testing.assert_close(first, torch.tensor(expected), rtol=0, atol=1e-4)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def plain_matches(quality: Tensor, high: float = 0.7, low: float = 0.3) -> list[int]:
    """MMDetection's MaxIoUAssigner with the lower threshold as the floor: an object's number, -1 none, -2 neither."""
    objects, anchors = quality.shape
    found = [-2] * anchors
    for anchor in range(anchors):
        best = max(range(objects), key=lambda one: (float(quality[one, anchor]), -one))
        if quality[best, anchor] < low:
            found[anchor] = -1
        elif quality[best, anchor] >= high:
            found[anchor] = best
    for one in range(objects):
        if quality[one].max() >= low:
            for anchor in range(anchors):
                if quality[one, anchor] == quality[one].max():
                    found[anchor] = one
    return found


@pytest.mark.parametrize("seed", range(8))
def test_an_object_gets_its_best_anchors_from_a_floor_on(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quality = (torch.rand(4, 30, generator=generator) * 10).round() / 10  # with ties
    quality[seed % 4] *= 0.3  # an object without a good anchor
    matcher = FlooredMatcher(0.7, 0.3, floor=0.3)
    assert matcher(quality.clone()).tolist() == plain_matches(quality)


@pytest.mark.parametrize("proposals", [0, 1, 40])
def test_proposals_are_matched_before_the_true_boxes_are_added(detector: MaskRCNN, proposals: int) -> None:
    torch.manual_seed(3)
    one = target(4, padded=(SIDE, SIDE))
    one["boxes"][3] = one["boxes"][2]  # two objects at one place: each is sampled for itself
    found = one["boxes"][torch.randint(0, 4, (proposals,))] + torch.randint(-6, 7, (proposals, 4))
    expected = plain_matches(box_iou(one["boxes"], found), 0.5, 0.5) if proposals else []
    (given,) = detector.roi_heads.add_gt_proposals([found], [one["boxes"]])
    (matched,), (labels,) = detector.roi_heads.assign_targets_to_proposals([given], [one["boxes"]], [one["labels"]])
    expected += range(4)
    assert [int(m) if label else -1 for m, label in zip(matched, labels, strict=True)] == expected
    assert labels[matched >= 0].tolist() == [int(one["labels"][m]) if m >= 0 else 0 for m in expected]


def test_an_object_gets_its_best_proposal_even_if_another_object_is_nearer(detector: MaskRCNN) -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 26]])
    proposal = torch.tensor([[0.0, 0, 20, 22]])  # IoU .91 with the first, .85 with the second
    (given,) = detector.roi_heads.add_gt_proposals([proposal], [boxes])
    (matched,), _ = detector.roi_heads.assign_targets_to_proposals([given], [boxes], [torch.tensor([1, 2])])
    assert matched.tolist() == [1, 0, 1]


def test_anchors_outside_of_an_images_own_padding_are_left_out() -> None:
    network = ProposalNetwork(8, CANVAS_ANCHORS, 50)
    images = ImageList(torch.zeros(2, 3, 64, 128), [(60, 120), (50, 60)])
    maps = [torch.zeros(2, 8, -(-64 // stride), -(-128 // stride)) for stride in ANCHOR_STRIDES]
    anchors = network.anchor_generator(images, maps)
    targets = [target(padded=(64, 128)), target(padded=(64, 64))]
    labels, boxes = network.assign_targets_to_anchors(anchors, targets)
    centers = (anchors[1][:, 0] + anchors[1][:, 2]) / 2
    outside = centers > 63.5
    assert 0 < int(outside.sum()) < len(outside)
    assert (labels[1][outside] == -1).all()
    assert torch.equal(within(anchors[1], (64, 64)), ~outside)
    for label, box, own, one in zip(labels, boxes, anchors, targets, strict=True):
        inside = within(own, one["padded"])
        expected = plain_matches(box_iou(one["boxes"], own[inside]))
        assert [min(match, 0) if match < 0 else 1 for match in expected] == [
            {1: 1, 0: -1, -1: -2}[int(value)] for value in label[inside]
        ]
        positive = torch.tensor(expected) >= 0
        assert torch.equal(box[inside][positive], one["boxes"][torch.tensor(expected)[positive]])


def test_the_losses_of_proposals_are_cross_entropy_and_l1_over_the_samples() -> None:
    network = ProposalNetwork(8, CANVAS_ANCHORS, 50)
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 0, -1])]
    scores, offsets, wanted = torch.randn(8, 1), torch.randn(8, 4), torch.randn(8, 4)
    objectness, box = network.compute_loss(scores, offsets, labels, list(wanted.split(4)))
    plain = [math.log1p(math.exp(-float(s))) if v == 1 else math.log1p(math.exp(float(s)))
             for s, v in zip(scores, torch.cat(labels), strict=True) if v >= 0]  # fmt: skip
    assert float(objectness) == pytest.approx(sum(plain) / 6, rel=1e-5)
    assert float(box) == pytest.approx(float((offsets - wanted).abs()[[0, 5]].sum()) / 6, rel=1e-5)


def test_heads_give_float32_in_any_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        scores, offsets = FloatHead(4, 3)([torch.randn(1, 4, 3, 3)])
    assert {one.dtype for one in (*scores, *offsets)} == {torch.float32}


@pytest.mark.parametrize(("box", "stride"), [((20.3, 33.1, 50.2, 60.9), 4), ((90.5, 70, 290.5, 230), 8)])
def test_regions_are_cut_out_at_their_exact_place(box: tuple[float, ...], stride: int) -> None:
    """On maps that hold the places of their own pixels, a cut is the places of its cells."""
    side = 320
    maps = {}
    for number, own in enumerate((4, 8, 16, 32)):
        centers = (torch.arange(side // own) + 0.5) * own
        grid = torch.stack(torch.meshgrid(centers, centers, indexing="ij"))[[1, 0]]
        maps[str(number)] = grid[None] if own == stride else torch.full_like(grid[None], torch.nan)
    cut = AlignedPool(7)(maps, [torch.tensor([box])], [(300, 310)])[0]
    left, top, right, bottom = box
    cells = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(cut[0], (left + cells * (right - left)).expand(7, -1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(cut[1], (top + cells * (bottom - top))[:, None].expand(-1, 7), rtol=1e-5, atol=1e-3)


def plain_paste(mask: Tensor, box: tuple[float, ...], height: int, width: int) -> Tensor:
    """The mask, zero around it, at the center of each pixel."""
    side = len(mask)
    image = torch.zeros(height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            value = 0.0
            for j in (math.floor(y), math.floor(y) + 1):
                for i in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < side and 0 <= j < side:
                        value += float(mask[j, i]) * (1 - abs(x - i)) * (1 - abs(y - j))
            image[row, column] = value >= 0.5
    return image


@pytest.mark.parametrize("box", [(3.3, 2.2, 17.8, 13.4), (-2.5, 4.0, 6.2, 30.0), (5.1, 5.2, 5.9, 5.8), (8, 8, 8, 9)])
def test_a_mask_is_pasted_at_float_boxes(box: tuple[float, ...]) -> None:
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(0))
    expected = plain_paste(mask, box, 16, 20) if box[2] > box[0] else torch.zeros(16, 20, dtype=torch.bool)
    assert torch.equal(paste_mask(mask, box, 16, 20), expected)


def test_targets_of_masks_are_zeros_and_ones_at_the_exact_place() -> None:
    masks = torch.zeros(2, 40, 40, dtype=torch.uint8)
    masks[1, 10:30, 5:25] = 1
    boxes = torch.tensor([[5.0, 10, 25, 30], [5, 10, 45, 50], [15, 10, 35, 30]])
    found = mask_targets(masks, boxes, torch.tensor([1, 1, 1]))
    assert found[0].eq(1).all()
    assert torch.equal(found[1][:14, :14], torch.ones(14, 14))
    assert found[1].sum() == 14 * 14
    assert torch.equal(found[2], torch.cat([torch.ones(28, 14), torch.zeros(28, 14)], dim=1))
    assert not mask_targets(masks, boxes, torch.tensor([0, 0, 0])).any()


def test_the_box_loss_is_l1_over_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = RegionHeads(3, channels=4, hidden=8, regions=64).train()
    monkeypatch.setattr(heads, "_masks", lambda features, boxes, sizes: torch.zeros(sum(map(len, boxes)), 4, 28, 28))
    scores, offsets = torch.randn(9, 4), torch.randn(9, 16)
    monkeypatch.setattr(heads, "_boxes", lambda features, boxes, sizes: (scores, offsets))
    one = target(3)
    proposals = torch.cat([one["boxes"] + 1, torch.tensor([[0.0, 0, 3, 3], [40, 0, 43, 3], [0, 40, 3, 43]])])
    chosen = heads.select_training_samples([proposals], [one])
    assert len(chosen[0][0]) == 9  # the three objects are added
    losses = heads._losses({}, [proposals], [(SIDE, SIDE)], [one])
    labels, wanted = chosen[2][0], chosen[3][0]
    expected = 0.0
    for row, label in enumerate(labels.tolist()):
        if label:
            expected += float((offsets[row, 4 * label : 4 * label + 4] - wanted[row]).abs().sum()) / 9
    assert float(losses["box"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["mask"]) == pytest.approx(math.log(2), rel=1e-5)


def test_new_heads_have_the_initial_weights_of_mmdetection() -> None:
    heads = RegionHeads(80, channels=256, hidden=1024, regions=512).requires_grad_(False)
    bound = math.sqrt(6 / (256 * 49 + 1024))
    assert 0.99 * bound < float(heads.box_head.fc6.weight.abs().max()) <= bound
    assert bound == pytest.approx(0.021, abs=5e-4)
    assert float(heads.box_predictor.cls_score.weight.std()) == pytest.approx(0.01, rel=0.02)
    assert float(heads.box_predictor.bbox_pred.weight.std()) == pytest.approx(0.001, rel=0.02)
    assert not any(value.any() for name, value in heads.named_parameters() if name.endswith("bias"))


def test_every_parameter_gets_a_gradient_after_a_step(detector: MaskRCNN) -> None:
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    images, sizes = torch.randn(2, 3, SIDE, SIDE), [(SIDE, SIDE)] * 2
    for _ in range(3):  # the injectors' gammas start at 0, and so do the weights of the offsets behind them
        optimizer.zero_grad()
        sum(detector(images, sizes, [target(), target()]).values()).backward()
        optimizer.step()
    dead = [name for name, one in detector.named_parameters() if one.grad is None or not one.grad.any()]
    assert dead == []


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
def test_scenes_without_objects_have_finite_losses(detector: MaskRCNN, counts: tuple[int, ...]) -> None:
    losses = detector(torch.randn(2, 3, SIDE, SIDE), [(SIDE, SIDE)] * 2, [target(count) for count in counts])
    assert set(losses) == {"objectness", "proposal", "class", "box", "mask"}
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in detector.parameters()]
    assert all(one is not None and one.isfinite().all() for one in gradients)
    assert all(loss.isfinite() for loss in losses.values())
    if not any(counts):
        assert not float(losses["box"].detach() + losses["mask"].detach() + losses["proposal"].detach())


def test_what_is_found_is_inside_the_image_without_its_padding(detector: MaskRCNN) -> None:
    (found,) = detector.requires_grad_(False).eval()(torch.randn(1, 3, SIDE, SIDE), [(50, 60)])
    assert len(found["boxes"]) == 100
    assert found["masks"].shape == (100, 28, 28)
    assert (found["boxes"] >= 0).all()
    assert float(found["boxes"][:, 2].max()) <= 60
    assert float(found["boxes"][:, 3].max()) <= 50
    assert (found["scores"].diff() <= 0).all()
    assert set(found["labels"].tolist()) <= {1, 2, 3}


def test_no_position_embedding_is_decayed(detector: MaskRCNN) -> None:
    assert detector.no_weight_decay() == {"backbone.body.vit.pos_embed", "backbone.body.level_embed"}
    assert isinstance(detector.transform, nn.Identity)


def test_a_wrong_number_of_anchor_sizes_is_refused() -> None:
    body = create_adapter("vit_pyramid_canvas", "gap", forward="detection")
    with pytest.raises(ValueError, match=r"anchor_sizes are \(8, 16\); allowed: one for each of the strides 4, 8, 16"):
        MaskRCNN(body, 3, anchor_sizes=(8, 16))


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As MMDetection would have written it: other names, the background last, and none where it is not predicted."""
    places = (
        (r"^backbone\.body\.vit\.(.*)\.ls([12])\.gamma$", r"backbone.\1.gamma\2"),
        (r"^backbone\.body\.(vit\.)?", "backbone."),
        (r"\.ffn\.dwconv\.", ".ffn.dwconv.dwconv."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"^roi_heads\.box_head\.fc([67])\.", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 6}."),
        (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
        (r"^roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
        (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
        (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
    )
    found = {}
    for name, value in state.items():
        if "cls_score" in name:
            value = torch.cat([value[1:], value[:1]])
        elif "box_predictor.bbox_pred" in name:
            value = value[4:]
        elif "mask_fcn_logits" in name:
            value = value[1:]
        elif name.endswith("vit.pos_embed"):
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        for pattern, replacement in places:
            name = re.sub(pattern, replacement, name)
        found[name] = value.contiguous()
    return found


def test_a_detector_of_the_original_repository_is_loaded_whole(tmp_path: Path) -> None:
    """It finds the same: nothing reads the rows of the background that the file does not have."""
    models = []
    for method in ("default", "mpvg"):
        torch.manual_seed(1)
        body = create_adapter("vit_adapter_canvas", method, forward="detection")
        models.append(MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=50))
    theirs, ours = models[0].eval(), models[1].eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    file = tmp_path / "detector.safetensors"
    written = official_names(theirs.state_dict())
    known = {"roi_head.bbox_head.fc_cls.weight", "neck.fpn_convs.3.conv.bias", "backbone.blocks.0.norm1.weight"}
    assert known <= written.keys()
    save_file(written, file)
    report = load_official(ours, file, OFFICIAL)
    assert not report.dropped
    assert set(report.new.values()) == {"LN' at 1 and 0"}
    body = create_adapter("vit_adapter_canvas", "default", forward="detection")
    same = MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=50).eval()
    load_complete(same, file)
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        (one,), (other,) = theirs(images, [(SIDE, SIDE)]), same(images, [(SIDE, SIDE)])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_of_other_classes_is_refused(detector: MaskRCNN, tmp_path: Path) -> None:
    body = create_adapter("vit_adapter_canvas", "default", forward="detection")
    larger = MaskRCNN(body, 4, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=50)
    file = tmp_path / "detector.safetensors"
    save_file(official_names(larger.state_dict()), file)
    with pytest.raises(ValueError, match=r"does not fit: roi_head\.bbox_head\.fc_cls\.bias is \(5,\)"):
        load_official(detector, file, OFFICIAL)
    save_file({name: value.contiguous() for name, value in larger.state_dict().items()}, file)
    with pytest.raises(ValueError, match=r"does not fit: roi_heads\.box_predictor\.bbox_pred\.bias is \(20,\), the"):
        load_complete(MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32), file)
    with pytest.raises(
        ValueError, match=r"does not fit: backbone\.body\.vit\.delivery\.layer_norms\.1\.bias is missing"
    ):
        load_complete(detector, file)
    body = create_adapter("vit_adapter_canvas", "mpvg", forward="detection")
    other = MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=50)
    save_file({name: value.contiguous() for name, value in other.state_dict().items()}, file)
    body = create_adapter("vit_adapter_canvas", "default", forward="detection")
    with pytest.raises(ValueError, match=r"layer_norms\.\S+ has no place in the network.*Give the --recipe, --method"):
        load_complete(MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32), file)
    largest = MaskRCNN(body, 80, anchor_sizes=CANVAS_ANCHORS, channels=16, hidden=32, regions=32, proposals=50)
    save_file(official_names(largest.state_dict()), file)  # it has more rows than ours have with the background
    with pytest.raises(ValueError, match=r"does not fit: roi_head\.bbox_head\.fc_cls\.bias is \(81,\)"):
        load_official(detector, file, OFFICIAL)


def test_layers_and_heads_have_rates_of_their_own(detector: MaskRCNN) -> None:
    groups = param_groups_layer_decay(detector, 0.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    inside = "backbone.body.vit."
    depth = 1 + max(int(name.split(".")[4]) for name in scales if name.startswith(f"{inside}blocks."))
    for name, scale in scales.items():
        layer = re.match(rf"{inside}(?:blocks|delivery\.layer_norms)\.(\d+)\.", name)
        stem = name.startswith((f"{inside}pos_embed", f"{inside}patch_embed"))
        assert scale == 0.5 ** (depth + 1 if stem else depth - int(layer[1]) if layer else 0), name
    heads = set(map(id, detector.get_classifier().parameters()))
    assert {names[one].split(".")[0] for one in heads} == {"roi_heads"}


def test_the_pyramid_begins_as_mmcv_s() -> None:
    """Xavier: the bound of 64 to 256 channels is sqrt(6 / 320)."""
    torch.manual_seed(0)
    body = create_adapter("vit_adapter_canvas", "default", forward="detection")
    fpn: Any = MaskRCNN(body, 3, anchor_sizes=CANVAS_ANCHORS, channels=256, hidden=8).backbone.fpn
    for block in fpn.inner_blocks:
        assert float(block[0].weight.detach().abs().max()) == pytest.approx((6 / 320) ** 0.5, rel=1e-2)
        assert not block[0].bias.detach().any()
