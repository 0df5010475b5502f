"""What a run takes, said before it begins: memory, time and disk. docs/scale.md says what is counted as memory."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from mpvg.training.normalization import describe_normalization

if TYPE_CHECKING:
    from mpvg.training.loop import Trainer

SIZES = (8, 16)
"""Batch sizes whose difference gives the bytes of an image; a smaller batch is counted as a whole."""
MEASURED_STEPS = 5
KEPT_CHECKPOINTS = 3
"""Checkpoints that a run folder has while the third is written."""


def describe_start(trainer: "Trainer") -> str:
    """The run in one line: what is trained on what, where and for how long."""
    config, info, step = trainer.config, trainer.data.info, trainer.progress.step
    parameters = sum(parameter.numel() for parameter in trainer.state.network.parameters())
    processes = trainer.accelerator.num_processes
    device = f"{processes} x {trainer.accelerator.device.type}" if processes > 1 else trainer.accelerator.device.type
    parts = [
        f"training {config.model} with {config.method} on {config.data} in {config.out}: {info.train_size:,} images",
        f"{info.num_classes} classes, {parameters:,} parameters",
        f"{config.epochs} x {len(trainer.data.train)} steps on {device}, recipe {config.recipe}",
        *taken_weights(trainer),
        *describe_normalization(config),
        *([f"from step {step}"] if step else []),
    ]
    return ", ".join(parts)


def taken_weights(trainer: "Trainer") -> list[str]:
    """What the network took from other weights, where it starts from some, in one phrase."""
    report: Any = getattr(trainer.state.network, "load_report", None)
    if trainer.config.network.init is None or trainer.progress.step:
        return []
    if report is None:
        return [f"weights from {trainer.config.network.init}"]
    counts = [f"{len(getattr(report, what))} {what}" for what in ("taken", "resampled", "dropped", "new")]
    return [f"weights from {trainer.config.network.init} ({', '.join(c for c in counts if not c.startswith('0 '))})"]


def describe_cost(trainer: "Trainer", *, measure: bool) -> list[str]:
    """What the run will take, in lines; `measure` trains a few steps, which nobody keeps."""
    config, processes = trainer.config, trainer.accelerator.num_processes
    share = config.batch_size // processes
    part = -(-share // config.accumulate)
    fixed, per_image = step_bytes(trainer, share)
    shares = f"{share} images a step for each of {processes} processes" if processes > 1 else f"{share} images a step"
    if config.accumulate > 1:
        shares += f", {part} at once"
    saved = checkpoint_bytes(trainer)
    lines = [
        shares,
        f"memory: about {_size(fixed + part * per_image)} a process: {_size(fixed)}, and {_size(per_image)} for each "
        "image at once; an estimate, without workspaces: keep 20 % free",
        f"disk: {_size(KEPT_CHECKPOINTS * saved)} at most, {_size(saved)} a checkpoint",
    ]
    if not measure:
        return [*lines, "time: not known; --measure trains a few steps to see"]
    hours, rate = training_hours(trainer)
    return [*lines, f"time: about {hours:.2g} hours at {rate:.0f} images/s, without evaluation"]


def training_hours(trainer: "Trainer") -> tuple[float, float]:
    """The hours that a run takes without evaluation, and its images per second, measured over a few steps."""
    rate = images_per_second(trainer)
    return trainer.config.epochs * len(trainer.data.train) * trainer.config.batch_size / rate / 3600, rate


def step_bytes(trainer: "Trainer", images: int) -> tuple[float, float]:
    """The bytes that a process holds however many images go through at once, and those of each such image.

    Args:
        trainer: of the run.
        images: of a process in a step, which are all there.
    """
    network, batch = trainer.state.network, example_batch(trainer)
    sizes = SIZES if batch.size >= SIZES[1] else (0, batch.size)
    kept = [kept_for_backward(trainer, batch.split(size)[0]) if size else 0 for size in sizes]
    per_image = (kept[1] - kept[0]) / (sizes[1] - sizes[0])
    trained = total_bytes(parameter for parameter in network.parameters() if parameter.requires_grad)
    weights = total_bytes([*network.parameters(), *network.buffers()])
    averaged = weights if trainer.state.ema else 0
    inputs = images * total_bytes(tensors_of(batch)) / batch.size
    fixed = weights + trained + optimizer_bytes(trainer) + averaged + inputs + kept[0] - sizes[0] * per_image
    return fixed, per_image


def optimizer_bytes(trainer: "Trainer") -> int:
    """Bytes of the optimizer's state, as AdamW has it: two numbers for each that is trained; SGD has one."""
    trained = total_bytes(p for group in trainer.state.optimizer.param_groups for p in group["params"])
    return trained * (1 if "momentum" in trainer.state.optimizer.param_groups[0] else 2)


def checkpoint_bytes(trainer: "Trainer") -> int:
    """Bytes of a checkpoint: weights, averaged weights and the optimizer's state."""
    weights = total_bytes(trainer.state.network.state_dict().values())
    return weights * (2 if trainer.state.ema else 1) + optimizer_bytes(trainer)


def kept_for_backward(trainer: "Trainer", batch: Any) -> int:
    """Bytes that autograd keeps of a batch.

    They are counted on tensors that have shapes but no values or, where the shapes depend on the values, in a step that
    leaves the network as it is.
    """

    def step(model: nn.Module, batch: Any) -> None:
        with trainer.accelerator.autocast():
            trainer.task.losses(model, batch)

    try:
        return kept_bytes(trainer.state.network, step, batch)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return kept_bytes(trainer.state.network, step, batch, fake=False)


def kept_bytes(network: nn.Module, step: Callable[[nn.Module, Any], object], batch: Any, *, fake: bool = True) -> int:
    """Bytes of the storages that autograd keeps in a forward pass, beside weights, buffers and batch.

    Args:
        network: which stays as it is.
        step: takes a network and a batch to a loss.
        batch: tensors, in any structure.
        fake: whether the pass is on tensors without values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def there(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor) if fake else tensor if tensor.requires_grad else tensor.clone()

    with mode if fake else nullcontext():
        values = {name: there(value) for name, value in (*network.named_parameters(), *network.named_buffers())}
        batch = tree_map_only(Tensor, there, batch)
        own = {tensor.untyped_storage()._cdata for tensor in (*values.values(), *tensors_of(batch))}
        kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that none makes room for another

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        class Replaced(nn.Module):
            """The network with these values."""

            def forward(self, *arguments: Any) -> Any:
                return functional_call(network, values, arguments)

        was_training = network.training
        network.train()
        try:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                step(Replaced(), batch)
        finally:
            network.train(was_training)
    return sum(storage.nbytes() for storage in kept.values())


def example_batch(trainer: "Trainer") -> Any:
    """The first batch of a process, as a step has it."""
    batches = trainer.data.train.epoch(0)
    try:
        return trainer.task.prepare(next(iter(batches)))
    finally:
        batches.close()  # type: ignore[attr-defined]  # generators have it, and its workers wait for it


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch of any task."""
    return [part for part in tree_leaves(batch) if isinstance(part, Tensor)]


def images_per_second(trainer: "Trainer") -> float:
    """Trains a few steps and measures them, without the first; the weights change and are not kept."""
    trainer.model.train()
    started = images = 0.0
    for number, batch in enumerate(trainer.data.train.epoch(0)):
        trainer.step(batch).tolist()  # waits for the device
        if number:
            images += batch.size * trainer.accelerator.num_processes
        else:
            started = time.perf_counter()
        if number == MEASURED_STEPS or number + 1 == len(trainer.data.train):
            break
    return images / (time.perf_counter() - started) if images else float("nan")


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
