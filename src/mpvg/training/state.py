"""The state of a run in progress, and how it is saved and restored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3
from torch import nn

from mpvg.files import remove_leftovers
from mpvg.runs import Run
from mpvg.runs.checkpoints import (
    Checkpoint,
    CorruptCheckpointError,
    LatestCheckpoint,
    has_best,
    has_checkpoint,
    latest_valid_checkpoint,
    read_checkpoint,
    remove_unused,
    rollback_to,
    save_checkpoint,
    warn,
)
from mpvg.runs.metrics import write_metrics
from mpvg.runs.pointers import read_pointer, step_number, write_pointer
from mpvg.runs.reading import RESTORE
from mpvg.training import optimizer as optimizers
from mpvg.training.gradients import NAMES
from mpvg.validation import build, shown

GIVE_UP = f"{RESTORE}, or train a new run with another --out"


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
    gradient_sums: tuple[float, ...] = ()
    """Steps of the epoch in progress with norms of `mpvg.training.gradients`, and the sums of the norms; empty: not
    asked for. Younger than format 2."""
    seconds: float = 0.0
    """Time spent in steps, waiting for data included."""
    images: int = 0
    """Images trained on."""
    skipped: int = 0
    """Unreadable images skipped, each counted once."""
    unreadable: tuple[int, ...] = ()
    """Their numbers in the training set; younger than format 2."""
    best: float | None = None
    """Best value of the task's metric so far; None: there is none yet."""

    def add_step(self, loss: float, norms: Sequence[float]) -> None:
        """Adds the loss of a step, and its norms where they are asked for."""
        self.loss_sum += loss
        if norms:
            sums = self.gradient_sums or (0.0,) * (1 + len(norms))
            self.gradient_sums = tuple(old + new for old, new in zip(sums, (1.0, *norms), strict=True))

    def end_epoch(self) -> None:
        """Begins the next epoch."""
        self.epoch, self.batch, self.loss_sum, self.gradient_sums = self.epoch + 1, 0, 0.0, ()


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

    def restore(self, run: Run, accelerator: Accelerator, batches: int) -> None:
        """Loads the newest valid checkpoint, or stays at the beginning where there is none yet.

        Args:
            run: the run.
            accelerator: of this process.
            batches: batches of an epoch.

        Raises:
            ValueError: no checkpoint is valid, or the newest valid one does not fit the config or the metrics.
        """
        path, main = run.path, accelerator.is_main_process
        if main:
            remove_leftovers(path)
            remove_leftovers(path / "checkpoints")
        if not has_checkpoint(path):
            if main:
                _begin_metrics(run)
            return
        # One process chooses for all: they must not load different ones.
        found = latest_valid_checkpoint(path, partial(self.check, run=run, batches=batches)) if main else None
        name = broadcast_object_list([found.name if found else None])[0]
        checkpoint = found.checkpoint if found else read_checkpoint(path, name)
        run.check_unchanged(checkpoint.state["digest"])
        try:
            self._load_state(checkpoint)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:  # of a state that does not fit
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path / 'checkpoints' / name} is damaged ({type(error).__name__}: {reason}); {GIVE_UP}"
            ) from error
        accelerator.wait_for_everyone()  # all have read what is now removed
        if found:
            self._clean_up(run, found)
        accelerator.wait_for_everyone()
        if not has_best(path):
            self.progress.best = None  # it was among those that are discarded

    def check(self, folder: str, checkpoint: Checkpoint, *, run: Run, batches: int) -> None:
        """Raises ValueError unless a checkpoint holds what `save` writes for this run, or another config."""
        tensors, state = checkpoint
        for name in ("model", "optimizer", *(["ema"] if self.ema is not None else [])):
            if name not in tensors:
                raise ValueError(f"it has no {name}.safetensors")
        if not isinstance(state.get("digest"), str):
            raise ValueError(f"digest is {shown(state.get('digest'))}; allowed: a text")
        if not run.is_of(state["digest"]):
            return  # which is not damage
        progress = _read_progress(state.get("position"))
        if progress.step != progress.epoch * batches + progress.batch or progress.batch >= batches:
            where = f"step {progress.step}, epoch {progress.epoch}, batch {progress.batch}"
            raise ValueError(f"its position is {where}, of {run.config.epochs} epochs of {batches} batches")
        if step_number(folder) not in (None, progress.step):
            raise ValueError(f"it is of step {progress.step}, in the folder {folder}")
        if progress.epoch > run.config.epochs:
            raise ValueError(f"its position is epoch {progress.epoch} of {run.config.epochs}")
        _check_optimizer(state.get("optimizer"), tensors["optimizer"], self.optimizer)

    def _load_state(self, checkpoint: Checkpoint) -> None:
        """Restores model, EMA, optimizer and progress."""
        tensors, state = checkpoint
        self.network.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        optimizers.unpack(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.progress = _read_progress(state["position"])

    def _clean_up(self, run: Run, found: LatestCheckpoint) -> None:
        """Removes from the run folder what is later than the checkpoint that was loaded."""
        progress, root = self.progress, run.path / "checkpoints"
        lines = [line for line in run.metrics() if line["step"] <= progress.step]
        if len(lines) != progress.epoch:
            raise ValueError(
                f"{run.path / 'metrics.jsonl'} has {len(lines)} epochs up to step {progress.step}, and "
                f"{root / found.name} was saved after {progress.epoch}; {GIVE_UP}"
            )
        write_metrics(run.path, lines)
        known = read_pointer(root, "last") is not None
        best_known = read_pointer(root, "best") is not None
        if found.problems:
            which = "the one before" if known else "the newest there is"
            warn(f"{found.problems[0]}; continuing from {found.name}, {which}")
            rollback_to(run.path, found.name)
        if lines and not has_best(run.path):
            self._find_best(run, was_known=best_known)
        remove_unused(run.path)  # a process may have died before it did

    def _find_best(self, run: Run, *, was_known: bool) -> None:
        """Points to the best checkpoint again, if it is still there."""
        root, name = run.path / "checkpoints", run.best_step()
        try:
            read_checkpoint(run.path, name or "best")
        except CorruptCheckpointError:
            if not was_known:
                warn(f"{root / 'best'} is missing, and {name} is not there; the next epoch will be the best one")
            return
        if name:
            write_pointer(root, "best", name)


def _begin_metrics(run: Run) -> None:
    """Empties the metrics of a run that has no checkpoint yet.

    Raises:
        ValueError: it must have had one, as an epoch is saved before the next one begins.
    """
    lines = len(run.metrics())
    if lines > 1:
        raise ValueError(
            f"{run.path / 'metrics.jsonl'} has {lines} epochs, but {run.path} has no checkpoint of them; {GIVE_UP}"
        )
    write_metrics(run.path, [])


def _read_progress(values: object) -> TrainProgress:
    """The progress in a state.json; format 1 wrote -1.0 where there was no best value yet.

    Raises:
        ValueError: a field is missing, unknown, or of another type, or is negative.
    """
    if not isinstance(values, dict):
        raise ValueError(f"position is {shown(values)}; allowed: its fields by name")
    best = values.get("best")
    if isinstance(best, float) and math.isnan(best):  # of averaged weights: as good as none
        values = values | {"best": None}
    progress: TrainProgress = build(TrainProgress, values, "position.")
    for name, value in asdict(progress).items():
        if name not in values and name not in ("unreadable", "gradient_sums"):  # which are younger
            raise ValueError(f"position.{name} is missing")
        if name not in ("best", "loss_sum") and min(value if isinstance(value, tuple) else (value,), default=0) < 0:
            raise ValueError(f"position.{name} is {shown(values[name])}; allowed: numbers >= 0")
    if len(progress.gradient_sums) not in (0, 1 + len(NAMES)) or progress.gradient_sums[:1] == (0.0,):
        raise ValueError(
            f"position.gradient_sums is {shown(values['gradient_sums'])}; allowed: a count >= 1 and 2 sums"
        )
    if progress.best == -1.0:
        progress.best = None
    return progress


def _check_optimizer(values: object, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless values and tensors are of the kind that `optimizers.pack` makes of this optimizer."""
    if not isinstance(values, dict) or values.keys() != {"state", "param_groups"}:
        raise ValueError("optimizer must hold the keys state, param_groups")
    state, groups = values["state"], values["param_groups"]
    if not isinstance(state, dict) or not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise ValueError(f"optimizer.param_groups must be {len(optimizer.param_groups)} groups")
    for saved, own in zip(groups, optimizer.param_groups, strict=True):
        _check_group(saved, {name: _kind(value) for name, value in own.items() if name != "params"})
    for name, value in state.items():
        if _kind(value) not in ("flag", "number"):
            raise ValueError(f"optimizer.state: {shown(name)} is {shown(value)}; allowed: a number")
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    allowed = {*map(str, range(count)), *(f"group{number}" for number in range(len(groups)))}
    for name in (*state, *tensors):
        part, dot, _ = name.partition(".")
        if not dot or part not in allowed:
            raise ValueError(f"optimizer: {shown(name)} is no value of its {count} parameters")


def _check_group(saved: object, kinds: Mapping[str, str]) -> None:
    """Raises ValueError unless a saved group has the options of the optimizer's, each of the same kind.

    Other releases of torch have other flags, and some optimizers count their steps in the group from the first one on.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"optimizer.param_groups has {shown(saved)}; allowed: the options of a group by name")
    for name, kind in kinds.items():
        if name not in saved and kind not in ("flag", "Tensor"):
            raise ValueError(f"a group of optimizer.param_groups has no {name}")
    for name, value in saved.items():
        kind = kinds.get(name, "number")
        if _kind(value) != kind:
            raise ValueError(f"optimizer.param_groups: {shown(name)} is {shown(value)}; allowed: a {kind}")


def _kind(value: object) -> str:
    """What kind of value an optimizer's option is; None stands for a flag that was not decided."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"list of {[_kind(part) for part in value]}"
    if value is None or isinstance(value, bool):
        return "flag"
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return "number" if number else type(value).__name__
