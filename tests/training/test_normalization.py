"""Mean and standard deviation come from the weights of timm's networks, unless they are given."""

from dataclasses import replace

import pytest

from mpvg.config import RunConfig
from mpvg.recipes import recipe
from mpvg.training.normalization import describe_normalization, with_weights_normalization

HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406)


def config(model: str, *, data: str = "folder", init: str | None = "pretrained", **network: object) -> RunConfig:
    base = recipe("finetune")
    return replace(base, data=data, model=model, network=replace(base.network, init=init, **network))


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", HALF),
        ("timm/vit_base_patch16_siglip_224.webli", HALF),
        ("timm/vit_tiny_patch16_224", HALF),  # timm's default weights are AugReg's
        ("timm/deit_tiny_patch16_224.fb_in1k", IMAGENET),
    ],
)
def test_a_new_run_takes_those_of_the_weights(model: str, mean: tuple[float, ...]) -> None:
    for init in ("pretrained", "weights.safetensors"):
        taken = with_weights_normalization(config(model, init=init))
        assert taken.network.mean == mean
        assert taken.network.std is not None
        assert describe_normalization(taken)[0].startswith(f"images normalized with mean {mean[0]:g}, ")


def test_gray_images_take_the_mean_over_the_channels() -> None:
    taken = with_weights_normalization(config("timm/deit_tiny_patch16_224.fb_in1k", data="fashion-mnist"))
    assert taken.network.mean is not None
    assert list(taken.network.mean) == pytest.approx([sum(IMAGENET) / 3])


@pytest.mark.parametrize(
    "given",
    [
        config("timm/vit_tiny_patch16_224", init=None),
        config("timm/vit_tiny_patch16_224", mean=IMAGENET),
        config("timm/vit_tiny_patch16_224", std=IMAGENET),
        config("deit_tiny_patch16_224"),
        config("timm/no_such_network"),
    ],
    ids=["no weights", "mean given", "std given", "own network", "unknown network"],
)
def test_what_is_given_or_has_no_weights_stays(given: RunConfig) -> None:
    assert with_weights_normalization(given) == given
    if given.network.mean is None and given.network.std is None:
        assert describe_normalization(given) == []
