"""Options of the machine change no result but by rounding: compiled, channels last, watched by a tracker."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mpvg import create_model, runs
from mpvg.config import NetworkConfig, RunConfig
from mpvg.training import resume, train
from mpvg.training.accelerator import TRACKERS, AsyncCopy, make_accelerator, prepare_model
from short_runs import weights

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]


def same_to_rounding(config: RunConfig, other: RunConfig) -> None:
    one, two = weights(config.out), weights(other.out)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def scalars(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of what event files hold, in the order they were written."""
    from tensorboard.compat.proto.event_pb2 import Event

    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length, its checksum, the record, its checksum
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield event.step, value.tag, value.simple_value
                elif value.HasField("tensor") and value.tensor.float_val:
                    yield event.step, value.tag, value.tensor.float_val[0]


def test_tensorboard_shows_the_metrics_of_every_epoch(tiny: MakeConfig, train_until: TrainUntil) -> None:
    """Also of a run that was interrupted: what is sent twice is the same twice."""
    config = tiny(tracker="tensorboard", batch_size=24)
    train_until(config, 4)
    resume(config.out, quiet=True)
    lines = runs.load(config.out).metrics()
    shown: dict[tuple[int, str], float] = {}
    for at, name, value in scalars(Path(config.out) / "track"):
        assert shown.setdefault((at, name), value) == value
    assert len(lines) == 2
    for line in lines:
        for name, value in line.items():
            assert shown[line["step"], name] == pytest.approx(value, rel=1e-6)


def test_a_tracker_changes_no_bit_and_no_run_without_one_has_its_files(tiny: MakeConfig) -> None:
    plain, watched = (
        tiny(name, epochs=1, batch_size=50, tracker=to) for name, to in (("plain", None), ("watched", "tensorboard"))
    )
    train(plain, quiet=True)
    train(watched, quiet=True)
    assert plain.digest() == watched.digest()
    assert all(torch.equal(value, weights(watched.out)[name]) for name, value in weights(plain.out).items())
    assert not (Path(plain.out) / "track").exists()


def test_trackers_are_accelerates(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"tensorboard", "wandb", "mlflow", "trackio"} <= set(TRACKERS)
    with pytest.raises(ValueError, match=r"tracker is 'tensorbord'; allowed: .*tensorboard"):
        train(tiny(tracker="tensorbord"), quiet=True)
    monkeypatch.setattr("mpvg.training.accelerator.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="tracker is 'wandb', which is not installed; here are: tensorboard"):
        train(tiny(tracker="wandb"), quiet=True)


def test_compiled_and_not_compiled_train_the_same(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same names, so that either goes on from the other's checkpoint; traced, without the code generator."""
    monkeypatch.setattr("mpvg.training.accelerator.BACKEND", "eager")
    plain = tiny("plain", epochs=1, batch_size=24, network=NetworkConfig(img_size=8), ema_decay=None)
    compiled = replace(plain, out=f"{plain.out}-compiled", compile="default")
    train(plain, quiet=True)
    train(compiled, quiet=True)
    assert compiled.digest() == plain.digest()
    same_to_rounding(plain, compiled)


def test_channels_last_trains_the_same(tiny: MakeConfig, train_until: TrainUntil) -> None:
    """Also over a checkpoint, which keeps no strides."""
    plain = tiny("plain", epochs=1, network=NetworkConfig(img_size=8))
    last = replace(plain, out=f"{plain.out}-last", channels_last=True, save_steps=2)
    train(plain, quiet=True)
    train_until(last, 4)
    resume(last.out, quiet=True)
    same_to_rounding(plain, last)


def test_channels_last_reaches_the_convolutions(tiny: MakeConfig) -> None:
    model = create_model("ceit_tiny_patch16_224", num_classes=10)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    placed = prepare_model(model, tiny(channels_last=True), accelerator)
    kernels = [m.weight for m in placed.modules() if isinstance(m, nn.Conv2d) and min(m.kernel_size) > 1]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_sync_bn_replaces_every_batch_norm_under_its_name(tiny: MakeConfig) -> None:
    """Where there are several processes; alone a process has the whole batch."""
    config = tiny(network=NetworkConfig(sync_bn=True))
    for count, kind in ((1, nn.BatchNorm2d), (2, nn.SyncBatchNorm)):
        model = create_model("ceit_tiny_patch16_224", num_classes=10)
        names = list(model.state_dict())
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=count)
        placed = prepare_model(model, config, accelerator)
        assert list(placed.state_dict()) == names
        norms = [m for m in placed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(type(norm) is kind for norm in norms)


def test_sync_bn_is_refused_where_torch_has_none(tiny: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"network\.sync_bn is True, but .* GPUs only; leave it out"):
        train(tiny(network=NetworkConfig(sync_bn=True)), quiet=True)


def test_copied_numbers_arrive() -> None:
    assert AsyncCopy(torch.tensor([1.5, 2.0], dtype=torch.float64)).wait() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("device", "there", "cpu"), [("auto", False, True), ("auto", True, False), ("cpu", True, True)]
)
def test_without_a_gpu_accelerate_is_told_so(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, device: Any, there: bool, cpu: bool
) -> None:
    """Or it would see no other process under torchrun, and each would train alone in the same folder."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    stand_in = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("mpvg.training.accelerator.Accelerator", lambda **given: (told.update(given), stand_in)[1])
    make_accelerator(tiny(device=device))
    assert told["cpu"] is cpu
