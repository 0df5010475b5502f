"""Semantic segmentation: the paper's run on ADE20K, and one of minutes on small scenes.

The method is not part of a recipe, and neither are the weights that the transformer starts from: `--network.init` takes
a run folder of a classifier with any method, or a file of weights.
"""

from typing import Any

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig, RunConfig

CANVAS_OPTIONS: dict[str, Any] = {
    # Scenes of one size, taken as they are: nothing is cropped or distorted, and no window slides.
    **{"short_side": 128, "long_side": 128, "ratio": [1.0, 1.0], "crop": 128, "max_share": 1.0, "distorted": False},
    "sliding": False,
    "channels": 64,
    "auxiliary_channels": 64,
    "classifier_std": 0.07,  # with 0.01, mmsegmentation's, no digit was recognized after 700 steps
}


def ade20k_vit_adapter_tiny() -> RunConfig:
    """ViT-Adapter-Ti with UperNet on ADE20K, 160,000 steps, a score every 16,000; Table 9 of the paper.

    mpvg train --recipe ade20k_vit_adapter_tiny --data ade20k/FOLDER --method mpvg --network.init DEIT_RUN --out RUN

    The paper gives a batch of 8. The repository (czczup/ViT-Adapter, upernet_deit_adapter_tiny_512_160k_ade20k.py) has
    16, with the same rate: `--batch_size 16`. It trains in fp16; here bf16, which needs no loss scaling. Its warm-up
    follows the falling rate of `poly`; here it rises to the peak rate, at most 1 % more. Not trained by this project.
    """
    return RunConfig(
        data="ade20k",
        model="vit_adapter_tiny",
        task="segmentation",
        epochs=10,
        steps_per_epoch=16_000,
        batch_size=8,
        lr=12e-5,
        recipe="ade20k_vit_adapter_tiny",
        precision="bf16",
        network=NetworkConfig(drop_path=0.1, sync_bn=True),
        augment=AugmentConfig(hflip=0.5),
        optim=OptimConfig(
            weight_decay=0.01,
            layer_decay=0.95,
            warmup_steps=1500,
            warmup_lr=12e-11,  # a millionth of the rate
            min_lr=0.0,
            schedule="poly",
            decay_rate=1.0,  # the power
        ),
    )


def canvas_segmentation() -> RunConfig:
    """Digits on textured ground, 128 x 128, in a small ViT-Adapter with UperNet; minutes on one core.

    mpvg train --recipe canvas_segmentation --method mpvg --out RUN
    """
    return RunConfig(
        data="canvas",
        model="vit_adapter_canvas",
        task="segmentation",
        task_options=CANVAS_OPTIONS,
        epochs=4,
        batch_size=4,
        lr=2e-3,
        recipe="canvas_segmentation",
        channels_last=True,
        optim=OptimConfig(weight_decay=0.05, warmup_steps=100, clip_grad=1.0, min_lr=0.0),
        loader=LoaderConfig(workers=0),
    )


def canvas_tiles() -> RunConfig:
    """10,000 single digits of the same kind, 64 x 64: pre-trains the transformer for scenes; minutes on one core.

    mpvg train --data canvas-tiles --method mpvg --out TILES
    mpvg train --recipe canvas_segmentation --method mpvg --network.init TILES --out RUN
    """
    return RunConfig(
        data="canvas-tiles",
        model="vit_canvas_patch16_64",
        epochs=20,
        batch_size=50,
        lr=2e-3,
        recipe="canvas-tiles",
        optim=OptimConfig(weight_decay=0.05, warmup_epochs=1),
    )
