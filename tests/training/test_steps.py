"""What a step is made of: parts of a batch, frozen parameters, the weights that select the best checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpvg import runs
from mpvg.config import AugmentConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.training import loop, train

MakeConfig = Callable[..., RunConfig]


def weights(config: RunConfig, name: str = "model", which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / f"checkpoints/{which}/{name}.safetensors")


@pytest.mark.parametrize("parts", [2, 3, 8, 50])
def test_a_batch_in_parts_makes_the_same_step(tiny: MakeConfig, parts: int) -> None:
    """Mixup and clipping included, also where the parts are of unequal sizes: to rounding, without random layers."""
    whole = tiny("whole", epochs=2, network=NetworkConfig(img_size=8), ema_decay=None)
    train(whole, quiet=True)
    cut = replace(whole, out=f"{whole.out}-{parts}", accumulate=parts)
    train(cut, quiet=True)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[key], value, rtol=0, atol=2e-5)
    lines = [runs.load(config.out).metrics() for config in (whole, cut)]
    for one, other in zip(*lines, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_no_part_is_larger_than_its_share(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 8 in 3 parts is 3, 3 and 2 images: what memory must hold."""
    sizes: list[int] = []
    original = loop.classification_loss

    def recording(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(logits))
        return original(logits, *rest)

    monkeypatch.setattr(loop, "classification_loss", recording)
    train(tiny(epochs=1, accumulate=3), quiet=True)
    assert sizes == [3, 3, 2] * 6


def test_frozen_parameters_stay_and_the_rest_learns(tiny: MakeConfig) -> None:
    config = tiny(
        epochs=1, ema_decay=None, optim=OptimConfig(frozen=(r"^blocks\.0\.", r"^pos_embed$"), weight_decay=0.5)
    )
    train(config, quiet=True)
    run = runs.load(config.out)
    runs.seed_everything(config.seed)
    start, end = runs.build_model(run.config, run.info).state_dict(), weights(config)
    for key, value in start.items():
        frozen = key.startswith("blocks.0.") or key == "pos_embed"
        assert torch.equal(end[key], value) == frozen, key


@pytest.mark.parametrize("selects", [False, True])
def test_the_best_checkpoint_is_chosen_by_the_weights_that_count(
    tiny: MakeConfig, selects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained weights are best in epoch 1, their average in epoch 2."""
    accuracies = iter([0.9, 0.1, 0.2, 0.8, 0.3, 0.3])  # trained and averaged, epoch by epoch
    original = loop.evaluate

    def scored(*args: Any) -> Any:
        return replace(original(*args), accuracy=next(accuracies))

    monkeypatch.setattr(loop, "evaluate", scored)
    config = tiny(epochs=3, ema_selects=selects)
    summary = train(config, quiet=True)
    assert summary["best_epoch"] == (2 if selects else 1)
    assert summary["best_accuracy"] == (0.8 if selects else 0.9)
    assert (Path(config.out) / "checkpoints/best").readlink().name == f"step-{12 if selects else 6:08d}"


def test_a_network_with_frozen_and_with_batch_statistics_trains_and_comes_back(tiny: MakeConfig) -> None:
    """T2T-ViT's table is no parameter of the optimizer; CeiT's running statistics are in the checkpoint."""
    for model in ("t2t_vit_7", "ceit_tiny_patch16_224"):
        config = tiny(
            model,
            model=model,
            epochs=1,
            batch_size=50,
            network=NetworkConfig(img_size=32),
            augment=AugmentConfig(smoothing=0.1),
        )
        train(config, quiet=True)
        run = runs.load(config.out)
        saved: nn.Module = run.model()
        assert saved.state_dict().keys() == weights(config).keys()
    counts = [value for key, value in weights(config).items() if key.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {1}
