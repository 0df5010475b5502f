"""The state of a run in progress, and how it is saved and restored."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3
from torch import nn

from mpvg.runs import Run
from mpvg.runs.checkpoints import (
    Checkpoint,
    LatestCheckpoint,
    has_checkpoint,
    latest_valid_checkpoint,
    read_checkpoint,
    remove_unused,
    rollback_to,
    save_checkpoint,
)
from mpvg.runs.metrics import truncate_metrics
from mpvg.training import optimizer as optimizers


@dataclass
class TrainProgress:
    """How far a run is; stored in a checkpoint's state.json under "position"."""

    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches done of the epoch in progress."""
    step: int = 0
    """Optimizer steps done."""
    loss_sum: float = 0.0
    """Sum of the losses of the epoch in progress, over whole batches."""
    seconds: float = 0.0
    """Time spent in steps, waiting for data included."""
    images: int = 0
    """Images trained on."""
    skipped: int = 0
    """Unreadable images skipped."""
    best: float | None = None
    """Best value of the task's metric so far; None: there is none yet."""


@dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    network: nn.Module
    """Without the wrappers of DistributedDataParallel and torch.compile."""
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    progress: TrainProgress

    def save(self, run: Run, *, best: bool) -> None:
        """Writes a checkpoint."""
        moments, values = optimizers.pack(self.optimizer)
        tensors = {"model": self.network.state_dict(), "optimizer": moments}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        state = {"position": asdict(self.progress), "optimizer": values, "digest": run.config.digest()}
        save_checkpoint(run.path, self.progress.step, Checkpoint(tensors, state), best=best)

    def restore(self, run: Run, accelerator: Accelerator) -> None:
        """Loads the newest valid checkpoint, or stays at the beginning where there is none yet.

        Raises:
            ValueError: no checkpoint is valid, or the newest valid one does not fit the config.
        """
        path, main = run.path, accelerator.is_main_process
        if not has_checkpoint(path):
            if main:
                truncate_metrics(path, 0)
            return
        # One process chooses for all: they must not load different ones.
        found = latest_valid_checkpoint(path) if main else None
        name = broadcast_object_list([found.name if found else None])[0]
        checkpoint = found.checkpoint if found else read_checkpoint(path, name)
        try:
            self._load_state(run, checkpoint)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # raised for a state that does not fit
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path / 'checkpoints' / name} is damaged ({type(error).__name__}: {reason}); "
                "restore it from a copy of the run, or train a new run with another --out"
            ) from error
        accelerator.wait_for_everyone()  # all have read what is now removed
        if found:
            self._clean_up(run, found)
        accelerator.wait_for_everyone()
        if not has_checkpoint(path, "best"):
            self.progress.best = None  # it was among those that are discarded

    def _load_state(self, run: Run, checkpoint: Checkpoint) -> None:
        """Restores model, EMA, optimizer and progress."""
        tensors, state = checkpoint
        run.check_unchanged(state["digest"])
        self.network.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        optimizers.unpack(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.progress = _read_progress(state["position"])

    def _clean_up(self, run: Run, found: LatestCheckpoint) -> None:
        """Removes from the run folder what is later than the checkpoint that was loaded."""
        truncate_metrics(run.path, self.progress.step)
        if found.problems:
            print(f"mpvg: warning: {found.problems[0]}; continuing from {found.name}, the one before", file=sys.stderr)
            rollback_to(run.path, found.name)
        remove_unused(run.path)  # a process may have died before it did


def _read_progress(values: dict[str, Any]) -> TrainProgress:
    """The progress in a state.json; format 1 wrote -1.0 where there was no best value yet."""
    progress = TrainProgress(**values)
    if progress.best == -1.0:
        progress.best = None
    return progress
