"""Runs that start from weights: of a timm network, of another method's run, and after an interruption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mpvg import create_model, runs
from mpvg.config import NetworkConfig, RunConfig
from mpvg.training import resume, train

MakeConfig = Callable[..., RunConfig]
TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: a file of timm's network, of 3 classes, at 32 x 32."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(TINY, img_size=32, num_classes=3).state_dict(), path)
    return path


def test_a_run_starts_from_another_methods_run_and_reports_it(
    tiny: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first = tiny("gap", epochs=1, method="gap", batch_size=50)
    train(first, quiet=True)
    weights = Path(first.out) / "checkpoints/last/model.safetensors"
    second = tiny("mpvg", epochs=1, lr=1e-12, batch_size=50, network=NetworkConfig(init=str(weights), img_size=8))
    second = replace(second, optim=replace(second.optim, warmup_epochs=0.0, warmup_lr=0.0, weight_decay=0.0))
    train(second, quiet=True)
    given, after = load_file(weights), runs.load(second.out).model().state_dict()
    for key, value in given.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)
    assert "LN' at 1 and 0" in caplog.text


def test_a_converted_network_is_fine_tuned_and_its_run_can_be_read(tiny: MakeConfig, timm_weights: Path) -> None:
    """Preserved at the start, at another image size and other classes; rebuilt from the run folder alone."""
    network = NetworkConfig(init=str(timm_weights), img_size=48, start="preserve", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = tiny("tuned", model=f"timm/{TINY}", epochs=1, batch_size=50, network=network, ema_decay=None)
    train(config, quiet=True)
    run = runs.load(config.out)
    assert (run.info.mean, run.info.std) == ((0.5,) * 3, (0.5,) * 3)
    model: Any = run.model()
    start = model.delivery.reference_pos
    assert start.shape == model.pos_embed.shape == (1, 10, 192)
    assert not torch.equal(start, model.pos_embed)
    original = timm.create_model(TINY, img_size=32, num_classes=3)
    original.load_state_dict(load_file(timm_weights))
    original.set_input_size(48)
    assert torch.equal(start, original.pos_embed)
    image = torch.randn(1, 3, 48, 48)
    again = create_model(
        f"timm/{TINY}",
        start="preserve",
        num_classes=10,
        img_size=48,
        checkpoint_path=run.path / "checkpoints/last/model.safetensors",
    )
    torch.testing.assert_close(again.eval()(image), model(image))


def test_a_resumed_run_needs_the_file_until_its_first_checkpoint_only(
    tiny: MakeConfig, tmp_path: Path, train_until: Callable[[RunConfig, int], None]
) -> None:
    """Before it the run begins anew, from the same weights; after it the checkpoint has them."""
    train(tiny("source", epochs=1, batch_size=50), quiet=True)
    file = (Path(tiny("source").out) / "checkpoints/last/model.safetensors").rename(tmp_path / "init.safetensors")
    config = tiny("whole", epochs=2, batch_size=50, network=NetworkConfig(init=str(file), img_size=8))
    train(config, quiet=True)
    expected = load_file(Path(config.out) / "checkpoints/last/model.safetensors")

    stopped = replace(config, out=f"{config.out}-stopped")
    train_until(stopped, 1)
    train_until(stopped, 2)
    file.unlink()
    resume(stopped.out, quiet=True)
    actual = load_file(Path(stopped.out) / "checkpoints/last/model.safetensors")
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": NetworkConfig(init="nowhere.pth")}, r"no checkpoint at nowhere\.pth"),
        ({"network": NetworkConfig(init="pretrained")}, r"are for timm/<name>, and the model is vit_mini_patch2_8"),
        ({"network": NetworkConfig(start="preserve")}, r"network\.readout, network\.start .* are for timm/<name>"),
        ({"network": NetworkConfig(readout="method")}, r"leave them out"),
        ({"network": NetworkConfig(mean=(0.5,))}, r"network\.mean is \(0\.5,\); allowed for cifar10: 3 number"),
        ({"network": NetworkConfig(init="w.pth", pos_std=1.0)}, r"pos_std=1\.0 rescales .*w\.pth has a trained one"),
        ({"model": "timm/resnet18"}, r"timm's resnet18 cannot be built: .*img_size"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_a_folder_is_made(
    change: dict[str, Any], message: str, tiny: MakeConfig
) -> None:
    config = replace(tiny("refused", epochs=1), **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, quiet=True)
    assert not Path(config.out).exists()
