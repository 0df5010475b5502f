"""Complete configs to start from, one function each; every field can be overridden on the command line.

Each says what it is for and what it costs; the runs of the paper are in `paper.py`.
"""

from collections.abc import Callable
from dataclasses import replace

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.recipes import detection, paper, segmentation
from mpvg.validation import MAX_INT, unknown_name


def digits() -> RunConfig:
    """1,797 scans of 8x8, a few seconds on one core: shows that the machinery works, not who wins."""
    return RunConfig(
        data="digits",
        model="vit_mini_patch2_8",
        epochs=25,
        batch_size=64,
        lr=2e-3,
        recipe="digits",
        augment=AugmentConfig(smoothing=0.1),
        optim=OptimConfig(warmup_epochs=1, weight_decay=0.2),  # 1,437 images: 0.05 overfits in 100 epochs
    )


def fashion_mnist() -> RunConfig:
    """70,000 photographs of 28x28; minutes an epoch on two cores."""
    return RunConfig(
        data="fashion-mnist",
        model="vit_mini_patch4_28",
        epochs=10,
        batch_size=128,
        lr=1e-3,
        recipe="fashion-mnist",
        augment=AugmentConfig(crop_padding=2, hflip=0.5, erase=0.25, smoothing=0.1),
        optim=OptimConfig(warmup_epochs=0.5),
    )


def cifar10() -> RunConfig:
    """60,000 photographs of 32x32 with the augmentation of DeiT; meant for a GPU."""
    return RunConfig(
        data="cifar10",
        model="vit_mini_patch4_32",
        epochs=100,
        batch_size=128,
        lr=1e-3,
        recipe="cifar10",
        ema_decay=0.999,
        network=NetworkConfig(drop_path=0.1),
        augment=replace(paper.STRONG, crop_padding=4),
        optim=OptimConfig(warmup_epochs=10),
    )


def cifar100() -> RunConfig:
    """As cifar10, with 100 classes."""
    return replace(cifar10(), data="cifar100", recipe="cifar100")


def cells() -> RunConfig:
    """5,120 grids of 4x4 digits in which the place of the zero is the class; half a minute on one core.

    Without a position embedding no network of patches does better than 1 in 16.
    """
    return RunConfig(
        data="cells",
        model="vit_mini_patch8_32",
        epochs=10,
        batch_size=64,
        lr=2e-3,
        recipe="cells",
        optim=OptimConfig(warmup_epochs=1),
    )


def cells_garments() -> RunConfig:
    """As cells, with photographs of garments: the place of the bag is the class; needs fashion-mnist."""
    return replace(cells(), data="cells-garments", model="vit_mini_patch14_56", recipe="cells-garments")


def folder() -> RunConfig:
    """A folder with train/ and val/: DeiT-Ti at 224 from scratch with DeiT's augmentation; meant for a GPU."""
    return RunConfig(
        data="folder",
        model="deit_tiny_patch16_224",
        epochs=100,
        batch_size=128,
        lr=5e-4,
        recipe="folder",
        ema_decay=0.999,
        network=NetworkConfig(drop_path=0.1),
        augment=paper.STRONG,
        optim=OptimConfig(warmup_epochs=5),
        loader=LoaderConfig(workers=4),
    )


def finetune() -> RunConfig:
    """A folder with train/ and val/, from the weights in --network.init; minutes to hours on a GPU.

    Lower layers learn more slowly (layer decay), as is usual for ViTs, and the PE and each LN' with their layers.
    """
    return RunConfig(
        data="folder",
        model="deit_tiny_patch16_224",
        epochs=30,
        batch_size=128,
        lr=5e-4,
        recipe="finetune",
        network=NetworkConfig(drop_path=0.1),
        augment=replace(paper.STRONG, mixup=0.0, cutmix=0.0, crop_scale=(0.2, 1.0)),
        optim=OptimConfig(warmup_epochs=3, layer_decay=0.75, min_lr=1e-6),
        loader=LoaderConfig(workers=4),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cells": cells,
    "cells-garments": cells_garments,
    "folder": folder,
    "finetune": finetune,
    "deit_tiny": paper.deit_tiny,
    "deit_small": paper.deit_small,
    "deit_base": paper.deit_base,
    "swin_tiny": paper.swin_tiny,
    "ceit_tiny": paper.ceit_tiny,
    "t2t_vit_7": paper.t2t_vit_7,
    "vit_lite_7_cifar100": paper.vit_lite_7_cifar100,
    "t2t_vit_7_cifar100": paper.t2t_vit_7_cifar100,
    "coco_mask_rcnn_vit_adapter_tiny": detection.coco_mask_rcnn_vit_adapter_tiny,
    "canvas_detection": detection.canvas_detection,
    "ade20k_vit_adapter_tiny": segmentation.ade20k_vit_adapter_tiny,
    "canvas_segmentation": segmentation.canvas_segmentation,
    "canvas-tiles": segmentation.canvas_tiles,
}
"""The recipes by name; a data set's default recipe has its name, and a folder's is "folder"."""


def recipe(name: str | None = None, data: str | None = None) -> RunConfig:
    """The recipe of a name, on its own data unless others are given; or the default one of a data set or folder.

    Raises:
        ValueError: there is no such recipe.
    """
    if name is None:
        data = data or "digits"
        name = data if data in RECIPES and RECIPES[data]().data == data else "folder"
    if name not in RECIPES:
        raise ValueError(unknown_name("recipe", name, RECIPES, near=2))
    config = RECIPES[name]()
    return config if data is None else replace(config, data=data)


def scale_schedule(config: RunConfig, epochs: int) -> RunConfig:
    """The config over another number of epochs: warm-up and cool-down keep their share; the latter is rounded down."""
    if epochs == config.epochs or not 1 <= epochs < MAX_INT:  # the config itself refuses what is out of range
        return config
    share, optim = epochs / config.epochs, config.optim
    warmup, cooldown = optim.warmup_epochs * share, optim.cooldown_epochs * epochs // config.epochs
    drops = tuple(epoch * share for epoch in optim.milestones)
    optim = replace(optim, warmup_epochs=warmup, cooldown_epochs=cooldown, milestones=drops)
    return replace(config, epochs=epochs, optim=optim)
