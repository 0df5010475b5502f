"""UperNet: what transformers' heads lack beside mmsegmentation's, their sizes, and how they are trained."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from mpvg.models.dense import create_adapter
from mpvg.models.dense.official import load_official
from mpvg.models.dense.upernet import OFFICIAL, UperNet, resized
from reference import scattered

NARROW: dict[str, Any] = {"embed_dim": 16, "num_heads": 2}
CLASSES = 5


def small(method: Any = "mpvg", *, frozen: bool = False, drop_path_rate: float = 0.0) -> UperNet:
    backbone = create_adapter(
        "vit_adapter_canvas", method, forward="segmentation", drop_path_rate=drop_path_rate, **NARROW
    )
    return UperNet(backbone, CLASSES, channels=12, auxiliary_channels=8, frozen=frozen)


def at_paper_size(method: str) -> UperNet:
    with torch.device("meta"):
        return UperNet(create_adapter("vit_adapter_tiny", method, forward="segmentation"), 150)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_as_many_as_published() -> None:
    """36,062,428 with the class token's row of the PE, which the official network has and does not use."""
    default, mpvg = at_paper_size("default"), at_paper_size("mpvg")
    assert count(default) == 36_062_428 - 192
    assert (count(default.decode_head), count(default.auxiliary_head)) == (27_614_358, 481_430)
    assert count(mpvg) - count(default) == 11 * 2 * 192  # LN'


def test_initial_values_are_those_of_mmsegmentation() -> None:
    model = UperNet(create_adapter("vit_adapter_canvas", "default", forward="segmentation", **NARROW), 150)
    for head in (model.decode_head, model.auxiliary_head):
        classifier: Any = head.classifier
        assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not classifier.bias.any()
        convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m is not classifier]
        assert convolutions
        for one in convolutions:
            assert one.bias is None
            expected = math.sqrt(2 / (one.out_channels * one.kernel_size[0] ** 2))  # kaiming, fan out
            assert float(one.weight.detach().std()) == pytest.approx(expected, rel=0.06)
        for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm2d)):
            assert (norm.weight == 1).all()
            assert not norm.bias.any()
    names = model.state_dict()
    assert {"decode_head.classifier.weight", "auxiliary_head.classifier.weight"} <= names.keys()


def test_the_classifiers_std_can_be_set() -> None:
    backbone = create_adapter("vit_adapter_canvas", "default", forward="segmentation", **NARROW)
    model = UperNet(backbone, 150, channels=64, classifier_std=0.07)
    for head in (model.decode_head, model.auxiliary_head):
        assert float(head.classifier.weight.detach().std()) == pytest.approx(0.07, rel=0.05)


def test_dropout_takes_whole_channels_before_the_classifier_in_training_only() -> None:
    classifier: Any = UperNet(create_adapter("vit_adapter_canvas", forward="segmentation", **NARROW), 64, channels=64)
    classifier = classifier.decode_head.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(64)[..., None, None])
    ones = torch.ones(200, 64, 2, 3)
    assert torch.equal(classifier.eval()(ones), ones)
    found = classifier.train()(ones)
    assert (found == found[..., :1, :1]).all()
    assert found[..., 0, 0].unique().tolist() == [0, pytest.approx(1 / 0.9)]
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_scores_have_the_size_of_the_images() -> None:
    model, images = small(), torch.randn(2, 3, 64, 96)
    trained = model.train()(images)
    assert trained.decode.shape == trained.auxiliary.shape == (2, CLASSES, 64, 96)
    evaluated = model.eval()(images)
    assert evaluated.auxiliary is None
    assert evaluated.decode.shape == (2, CLASSES, 64, 96)


def test_scores_are_resized_between_the_centers_of_pixels() -> None:
    """align_corners=False: four pixels from two are at -1/4, 1/4, 3/4 and 5/4 of the way."""
    found = resized(torch.tensor([[[[0.0, 8.0]]]]), (1, 4))
    assert found.flatten().tolist() == [0, 2, 6, 8]


def step(model: UperNet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(CLASSES, (3, 64, 64), generator=torch.Generator().manual_seed(seed))
    found = model(images)
    optimizer.zero_grad()
    (F.cross_entropy(found.decode, labels) + 0.4 * F.cross_entropy(found.auxiliary, labels)).backward()
    optimizer.step()


@pytest.mark.parametrize("method", ["default", "lape", "mpvg"])
def test_every_parameter_gets_a_gradient_after_two_steps(method: str) -> None:
    """The injectors' gammas start at 0, and so do the weights of their offsets, which hide what is behind them."""
    model = small(method).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_image_is_refused_in_training_only() -> None:
    model, image = small(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=re.escape("trained on one image at once, but its pooling makes one pixel")):
        model.train()(image)
    assert model.eval()(image).decode.shape == (1, CLASSES, 64, 64)


def test_normalization_over_processes_reaches_what_the_heads_keep_in_lists() -> None:
    converted: Any = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    for block in converted.decode_head.psp_modules.blocks:
        assert isinstance(block.layers[1].batch_norm, nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="trained on one image at once"):  # there is one process
        converted.train()(torch.randn(1, 3, 64, 64))


def test_a_copy_is_independent() -> None:
    model, image = small().eval(), torch.randn(1, 3, 64, 64)
    copied, before = copy.deepcopy(model), model(image).decode
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(image).decode, before)
    assert not torch.equal(copied(image).decode, before)


def test_a_frozen_backbone_keeps_its_statistics_too() -> None:
    model = small(frozen=True, drop_path_rate=0.5).train()
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step(model, torch.optim.SGD(trained, lr=0.1), 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"decode_head", "auxiliary_head"}
    assert not model.backbone.training
    assert model.decode_head.training
    assert {p for p in model.backbone.parameters() if p.requires_grad} == set()


def test_a_layer_s_rate_falls_with_its_distance_from_the_heads() -> None:
    """Scale .95^(13 - id), with id 0 for PE and patch embedding, i + 1 for layer i, 1 for everything else."""
    model = at_paper_size("mpvg")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, 0.01, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.95, weight_decay_exclude_1d=True
    )
    scales = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    for name, (scale, decay) in scales.items():
        layer = re.match(r"backbone\.vit\.(?:blocks|delivery\.layer_norms)\.(\d+)\.", name)
        stem = name.startswith(("backbone.vit.pos_embed", "backbone.vit.patch_embed"))
        expected = 0.95**13 if stem else 0.95 ** (12 - int(layer[1])) if layer else 1.0
        assert scale == pytest.approx(expected), name
        assert decay == (0.0 if model.get_parameter(name).ndim == 1 else 0.01), name
    assert scales["backbone.vit.pos_embed"] == (pytest.approx(0.513, abs=1e-3), 0.01)
    assert scales["backbone.level_embed"] == (1.0, 0.01)


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As mmsegmentation would have written it."""
    found = {}
    for name, value in state.items():
        if name.startswith("backbone."):
            name = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", name.replace("backbone.vit.", "backbone."))
            name = name.replace(".ffn.dwconv.", ".ffn.dwconv.dwconv.")
        else:
            name = name.replace(".batch_norm.", ".bn.").replace(".classifier.", ".conv_seg.")
        if name == "backbone.pos_embed":
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        found[name] = value.contiguous()
    return found


def test_a_segmenter_of_the_original_repository_is_loaded_whole(tmp_path: Path) -> None:
    theirs, ours = scattered(small("default")).float(), small("mpvg")
    file = tmp_path / "segmenter.safetensors"
    save_file(official_names(theirs.state_dict()), file)
    report = load_official(ours, file, OFFICIAL)
    assert not report.dropped
    assert set(report.new.values()) == {"LN' at 1 and 0"}
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
