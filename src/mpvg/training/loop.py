"""The training loop: epochs, steps, accumulation and signals.

All randomness of a step is a function of (seed, epoch, step): the data draw order and augmentation per epoch and
sample, and the generators of mixup, dropout and drop path are seeded before each step. Resumed runs have the same bits.
"""

import contextlib
import functools
import math
import operator
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.config.names import model_flag
from mpvg.data import Data, Shard, open_data
from mpvg.data.order import describe_left_out
from mpvg.files import write_json
from mpvg.runs import Run, create_run, ensure_new_run_dir, load
from mpvg.runs.checkpoints import has_checkpoint
from mpvg.runs.lock import run_lock
from mpvg.runs.memory import OutOfMemory, memory_errors, training_cure
from mpvg.runs.metrics import append_metrics
from mpvg.runs.pointers import read_pointer
from mpvg.seeding import seed_everything
from mpvg.tasks import Evaluation, create_task, describe_metrics, is_better, selecting_metric, task_class
from mpvg.tasks.task import EMA, sum_device
from mpvg.training import optimizer as optimizers
from mpvg.training import records
from mpvg.training.accelerator import AsyncCopy, broadcast_buffers, make_accelerator, prepare_model, start_tracker
from mpvg.training.estimate import describe_start
from mpvg.training.gradients import check_gradient_norms, gradient_norms
from mpvg.training.normalization import with_weights_normalization
from mpvg.training.progress import Reporter
from mpvg.training.starting import with_init_file
from mpvg.training.state import TrainProgress, TrainState
from mpvg.training.stopping import STOPPED_BY, GracefulShutdown, Interrupted


class NonFiniteLoss(ValueError):
    """The loss or a weight is NaN or infinite; the run stops, and the checkpoint before is kept."""


def train(config: RunConfig, *, quiet: bool = False, break_lock: bool = False) -> dict[str, Any]:
    """Trains a new run and returns its summary.

    Raises:
        FileExistsError: the run folder is not empty.
        Interrupted: a signal, or nobody reads the output any more; the step was finished and saved. It is a
            KeyboardInterrupt.
        NonFiniteLoss: the loss is NaN or infinite.
        OutOfMemory: memory is used up, or a loader worker was killed.
        OSError: a checkpoint cannot be written; the previous one is kept.
        ValueError: the config does not fit the data, the network or the hardware, or another process writes the run;
            `break_lock` takes the lock of a process of another host.
    """
    ensure_new_run_dir(Path(config.out))
    with memory_errors(training_cure(config)):
        trainer = Trainer.create(with_weights_normalization(with_init_file(config)), quiet=quiet)
    with trainer.lock(break_lock=break_lock):
        if trainer.accelerator.is_main_process:
            create_run(trainer.config, trainer.data.info, trainer.data.inventories)
        try:
            return trainer.run_to_end()
        except (Exception, SystemExit) as error:  # of memory, or of a network of the user's own
            if trainer.accelerator.is_main_process and not isinstance(error, (OSError, NonFiniteLoss)):
                _free(Path(config.out))
            raise


def resume(path: str | Path, *, quiet: bool = False, break_lock: bool = False) -> dict[str, Any]:
    """Continues an interrupted run from its newest checkpoint, to the same bits; a complete run is left as it is.

    Raises:
        As `train`, and FileNotFoundError where the folder holds no run.
    """
    run = load(path)
    summary = run.summary()
    if summary is not None:
        run.check_unchanged(summary["config_hash"])
        return summary
    with memory_errors(training_cure(run.config)):
        trainer = Trainer.create(replace(run.config, out=str(path)), quiet=quiet)
    run.check_classes(trainer.data.info)
    run.check_samples(trainer.data.inventories)
    with trainer.lock(break_lock=break_lock):
        trainer.state.restore(trainer.run, trainer.accelerator, len(trainer.data.train))
        return trainer.run_to_end()


class Trainer:
    """One run in one process; `train` and `resume` are the ways in."""

    def __init__(self, run: Run, data: Data, accelerator: Accelerator, *, quiet: bool) -> None:
        config = run.config
        self.run, self.config, self.data, self.accelerator = run, config, data, accelerator
        self.task = create_task(config, data.info)
        seed_everything(config.seed)
        model = self.task.build_model(init=not has_checkpoint(run.path))
        model = prepare_model(model, config, accelerator)
        optimizer = optimizers.build_optimizer(model, config)
        if config.log_gradients:
            check_gradient_norms(model)
        ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        self.schedule = optimizers.build_schedule(optimizer, config, len(data.train))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        network: nn.Module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.state = TrainState(network, optimizer, ema, TrainProgress())
        self.quiet = quiet or not accelerator.is_main_process
        self.shutdown, self.stopped_by = GracefulShutdown(quiet=self.quiet), 0

    @classmethod
    def create(cls, config: RunConfig, *, quiet: bool) -> "Trainer":
        """Builds everything that a config asks for; nothing is written yet."""
        accelerator = make_accelerator(config)
        threads = config.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        shard = Shard(accelerator.device, accelerator.process_index, accelerator.num_processes)
        data = open_data(config, shard, task_class(config.task).make_pipeline)
        _check_pairs(config, shard.world_size)
        run = Run(Path(config.out), replace(config, threads=threads), data.info)
        return cls(run, data, accelerator, quiet=quiet)

    def lock(self, *, break_lock: bool = False) -> contextlib.AbstractContextManager[None]:
        """The lock of the run folder, which the main process holds for all."""
        main = self.accelerator.is_main_process
        return run_lock(self.run.path, break_lock=break_lock) if main else contextlib.nullcontext()

    @property
    def progress(self) -> TrainProgress:
        """How far the run is."""
        return self.state.progress

    def run_to_end(self) -> dict[str, Any]:
        """Trains the remaining epochs and returns the summary."""
        try:
            with memory_errors(training_cure(self.config)):
                self._run_epochs()
        except OutOfMemory as error:
            raise self._out_of_memory(error) from error
        summary = records.summary(self.config, self.task, self.run.metrics(), self.state.network)
        if self.accelerator.is_main_process:
            write_json(self.run.path / "summary.json", summary)
        self.accelerator.end_training()
        return summary

    def _run_epochs(self) -> None:
        epochs, steps = self.config.epochs, len(self.data.train)
        start_tracker(self.accelerator, self.config)
        with self.shutdown, Reporter(epochs * steps, self.progress.step, quiet=self.quiet) as reporter:
            self.shutdown.watch(reporter.console)
            config = self.config
            reporter.say(describe_start(self))
            if left_out := describe_left_out(self.data.info.train_size, config.batch_size, config.augment.repeats):
                reporter.say(left_out)
            while self.progress.epoch < epochs:
                self.train_epoch(reporter)
                record = self._evaluate()
                reporter.epoch(record, epochs, describe_metrics(self.task, self._shown(record)))
                self.accelerator.log(record, step=self.progress.step)
                # A signal during the evaluation, which has no steps to stop at.
                self._record_step(AsyncCopy(self._reduce_loss_and_signals(self._zero())))
                if self.stopped_by and self.progress.epoch < epochs:
                    raise self._interrupted()

    def train_epoch(self, reporter: Reporter) -> None:
        """Runs the rest of the epoch in progress.

        The loss of step n is read after step n + 1 is launched, so the GPU never waits for the host.
        """
        progress, train = self.progress, self.data.train
        batches = len(train)
        self.model.train()
        train.unreadable.update(progress.unreadable)
        started, images_before = time.perf_counter(), progress.images
        pending: AsyncCopy | None = None
        for batch in train.epoch(progress.epoch, progress.batch):
            step = AsyncCopy(self.step(batch))
            if pending:
                self._record_step(pending)
            progress.images += batch.size * self.accelerator.num_processes
            progress.batch += 1
            progress.step += 1
            if train.skipped != progress.skipped:
                progress.unreadable, progress.skipped = tuple(sorted(train.unreadable)), train.skipped
            pending = step
            saves = self.stopped_by or (self.config.save_steps and progress.step % self.config.save_steps == 0)
            if saves or progress.batch == batches:
                self._record_step(pending)
                pending = None
            reporter.step(
                progress.epoch + 1,
                progress.step,
                progress.loss_sum / max(1, progress.batch - bool(pending)),
                (progress.images - images_before) / (time.perf_counter() - started),
            )
            if saves and progress.batch < batches:  # the epoch's end saves anyway
                progress.seconds += time.perf_counter() - started
                self._check_weights()
                self._save(best=False)
                if self.stopped_by:
                    raise self._interrupted()
                started, images_before = time.perf_counter(), progress.images
        progress.seconds += time.perf_counter() - started

    def step(self, batch: Any) -> Tensor:
        """One optimizer step; returns what `_reduce_loss_and_signals` makes of its loss."""
        progress, config = self.progress, self.config
        seed_everything(config.seed, progress.epoch, progress.batch, self.accelerator.process_index)
        self.schedule.set_rate(progress.epoch, progress.step)
        loss = self._backward(self.task.prepare(batch))
        norms = [*gradient_norms(self.state.network)] if config.log_gradients else []
        if config.optim.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.state.ema is not None:
            self.state.ema.update(self.state.network)
        return self._reduce_loss_and_signals(loss, norms)

    def _backward(self, batch: Any) -> Tensor:
        """Adds up the gradients of a batch, part by part; returns its loss."""
        total = self._zero()
        parts = batch.split(math.ceil(batch.size / self.config.accumulate))
        for number, part in enumerate(parts, 1):
            # Gradients are reduced over the processes once per step, with the last part.
            sync = self.accelerator.no_sync(self.model) if number < len(parts) else contextlib.nullcontext()
            with sync:
                with self.accelerator.autocast():
                    loss = functools.reduce(operator.add, self.task.losses(self.model, part).values())
                loss = loss * (part.size / batch.size)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _reduce_loss_and_signals(self, loss: Tensor, norms: Sequence[Tensor] = ()) -> Tensor:
        """How many processes were asked to stop by each of STOPPED_BY, the loss over all, and norms of gradients.

        A process that stopped alone would leave the others waiting for its gradients.
        """
        requested, loss = self.shutdown.requested, loss.detach().to(sum_device(loss.device)).double()
        # Filled in on the device: a copy from the host would be waited for.
        received = [loss.new_full((), requested == number) for number in STOPPED_BY]
        values = torch.stack([*received, loss, *(norm.to(loss) for norm in norms)])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
            values[len(received) :] /= self.accelerator.num_processes
        return values

    def _record_step(self, values: AsyncCopy) -> None:
        """Adds the last loss and records signals; raises NonFiniteLoss if the loss is NaN or infinite."""
        progress = self.progress
        received = values.wait()
        loss, *norms = received[len(STOPPED_BY) :]
        self.stopped_by = next((number for number, count in zip(STOPPED_BY, received, strict=False) if count), 0)
        if not math.isfinite(loss):
            position = f"step {progress.step} (epoch {progress.epoch + 1}, batch {progress.batch})"
            raise self._diverged(f"the loss is {loss} at {position}")
        progress.add_step(loss, norms)

    def _evaluate(self) -> dict[str, Any]:
        """Ends the epoch: evaluates the model, writes a line of metrics and a checkpoint."""
        progress, ema = self.progress, self.state.ema
        broadcast_buffers(self.accelerator, self.state.network, None if ema is None else ema.module)
        trained = self.task.evaluate(self.accelerator.unwrap_model(self.model), self.data.val, self.accelerator)
        self._check_metrics(trained)
        averaged = self.task.evaluate(ema.module, self.data.val, self.accelerator) if ema is not None else None
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        record = records.epoch_record(progress, lr, trained, averaged)
        value = record[selecting_metric(self.config)]
        best = is_better(self.task, value, progress.best)
        progress.best = value if best else progress.best
        progress.end_epoch()
        if self.accelerator.is_main_process:
            append_metrics(self.run.path, record)
        self._save(best=best)
        return record

    def _save(self, *, best: bool) -> None:
        if self.accelerator.is_main_process:
            self.state.save(self.run, best=best)

    def _interrupted(self) -> Interrupted:
        """The end of a run that a signal stopped, once its checkpoint is saved."""
        self.accelerator.wait_for_everyone()  # torchrun kills the others when one of them ends
        return Interrupted(
            f"{STOPPED_BY[signal.Signals(self.stopped_by)]}: stopped after step {self.progress.step}, which is saved; "
            f"continue with `mpvg train --resume {self.run.path}{model_flag(self.run.config.model)}`",
            128 + self.stopped_by,
        )

    def _out_of_memory(self, error: OutOfMemory) -> OutOfMemory:
        """The error with how to continue, where a checkpoint is there."""
        if not has_checkpoint(self.run.path):
            return error
        again = f"{self.run.path}{model_flag(self.run.config.model)}"
        where = "where more is free, or after loader.workers is changed in its config.yaml"
        return OutOfMemory(f"{error}; or continue with `mpvg train --resume {again}` {where}")

    def _diverged(self, what: str) -> NonFiniteLoss:
        last = self.run.path / "checkpoints" / "last"
        name = read_pointer(last.parent, "last")
        kept = f"{last} ({name}) is kept" if name else "no checkpoint had been saved yet"
        cure = "train a new run with a lower lr, a longer optim.warmup_epochs or optim.clip_grad 1.0"
        return NonFiniteLoss(f"{what}; {kept}; {cure}")

    def _check_weights(self) -> None:
        """Refuses to save weights that the last step, whose loss was still finite, has made NaN or infinite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.state.network.parameters()):
            raise self._diverged(f"the weights are no longer finite after step {self.progress.step}")

    def _check_metrics(self, found: Evaluation) -> None:
        for name, value in found.metrics.items():
            if not math.isfinite(value):
                title = self.task.metrics[name].title
                raise self._diverged(f"{title} on the validation set is {value} after step {self.progress.step}")

    def _shown(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the progress line shows of a line of metrics.jsonl."""
        shown = (*self.task.summarized, f"{EMA}{self.task.best}")
        return {name: record[name] for name in shown if name in record}

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.accelerator.device)


def _free(path: Path) -> None:
    """Leaves a run folder in which nothing was saved to a new run with the same --out."""
    if not any((path / name).exists() for name in ("checkpoints", "track")):
        (path / "config.yaml").unlink(missing_ok=True)


def _check_pairs(config: RunConfig, processes: int) -> None:
    """Mixup and CutMix pair the images of a process's share of a batch, before it is split into parts."""
    share = config.batch_size // processes
    if config.augment.mixes and share % 2:
        raise ValueError(
            f"batch_size {config.batch_size} gives each of {processes} processes {share} images, but mixup and cutmix "
            f"pair them; give a multiple of {2 * processes}, or set augment.mixup and augment.cutmix to 0"
        )
