"""What depends on the machine: device, processes, precision, compilation and trackers."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, TorchDynamoPlugin, broadcast
from torch import Tensor, nn

from mpvg.config import RunConfig

BACKEND = "inductor"
"""torch.compile's."""
TRACKERS = tuple(str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL)
"""accelerate's trackers."""
ENVIRONMENT = ("ACCELERATE_", "DEEPSPEED_", "DYNAMO_", "FP8_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""How the names of accelerate's settings begin in the environment; torchrun's have other names."""


def make_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator that a config asks for, whatever settings of accelerate the environment has.

    Raises:
        ValueError: there is no such device, precision or tracker here.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU; give --device cpu")
    _check_tracker(config.tracker)
    _clear_environment()
    if not torch.distributed.is_initialized():  # or the first run of this process decides for all that follow
        AcceleratorState._reset_state(reset_partial_state=True)
    compiling = TorchDynamoPlugin(backend=BACKEND, mode=config.compile) if config.compile else None
    accelerator = Accelerator(
        # Without this accelerate does not join the processes where there is no GPU, and each would train on its own.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        dynamo_plugin=compiling,
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=config.out, logging_dir=str(Path(config.out) / "track")),
    )
    reason = bf16_refusal(accelerator.device) if config.precision == "bf16" else None
    if reason:
        raise ValueError(f"precision is 'bf16', but {reason}; give --precision fp32")
    if config.network.sync_bn and accelerator.device.type != "cuda":
        raise ValueError("network.sync_bn is True, but torch's SyncBatchNorm works on GPUs only; leave it out")
    return accelerator


@torch.no_grad()
def broadcast_buffers(accelerator: Accelerator, *networks: nn.Module | None) -> None:
    """Gives every process the running statistics of the first one, which are those that are saved.

    Each process follows the statistics of its own batches; those of averaged weights are never exchanged otherwise.
    """
    if accelerator.num_processes > 1:
        for network in networks:
            for buffer in () if network is None else network.buffers():
                buffer.copy_(broadcast(buffer))


def bf16_refusal(device: torch.device) -> str | None:
    """Why bf16 cannot be used on a device; None where it can."""
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported() else "this GPU does not support bf16"
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if Path("/proc/cpuinfo").exists() else ""
    )
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return "this CPU has neither avx512_bf16 nor amx_bf16, and emulates bf16 hundreds of times slower than fp32"


def prepare_model(model: nn.Module, config: RunConfig, accelerator: Accelerator) -> nn.Module:
    """Moves a network to its device, with the memory format and the BatchNorm that the config asks for."""
    if config.network.sync_bn and accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:  # a convolution follows its weights, so the images may stay as they are
        model = model.to(memory_format=torch.channels_last)
    model = model.to(accelerator.device)
    if accelerator.num_processes > 1:
        _align_gradients(model)
    return model


def _align_gradients(model: nn.Module) -> None:
    """Gives gradients the strides of their parameters, which DistributedDataParallel asks for, with the same values.

    Only those of a dimension of size 1 differ: everywhere else autograd sees to it.
    """

    def align(parameter: Tensor, gradient: Tensor) -> Tensor:
        if gradient.stride() == parameter.stride():
            return gradient
        return torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
        ).copy_(gradient)

    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(align, parameter))


def start_tracker(accelerator: Accelerator, config: RunConfig) -> None:
    """Starts the config's tracker, if there is one, and sends it the config."""
    if config.tracker is None:
        return
    settings: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = value if isinstance(value, dict) else {"": value}
        settings |= {f"{name}.{key}".rstrip("."): part for key, part in inner.items()}
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
    accelerator.init_trackers("mpvg", config=plain)


class AsyncCopy:
    """Asynchronous device-to-host copy of a few numbers: the device can start the next step before they are read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._done = torch.cuda.Event() if values.is_cuda else None
        if self._done:
            self._done.record()

    def wait(self) -> list[float]:
        """Waits for the copy and returns the numbers."""
        if self._done:
            self._done.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


def _clear_environment() -> None:
    """Takes accelerate's settings out of this process's environment, for good: it reads some of them at every step.

    They would win over the config, and neither the run folder nor the digest would tell.
    """
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT)]:
        del os.environ[name]


def _check_tracker(name: str | None) -> None:
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"tracker is {name!r}; allowed: {', '.join(TRACKERS)}")
    installed = sorted(str(tracker) for tracker in get_available_trackers())
    if name not in installed:
        raise ValueError(f"tracker is {name!r}, which is not installed; here are: {', '.join(installed)}")
