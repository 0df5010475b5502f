"""The training loop.

All randomness of a step is a function of (seed, epoch, step): order and augmentation are drawn per epoch and sample by
the data, and mixup, dropout and drop path from generators that are seeded anew before each step. A run that is
interrupted anywhere therefore continues with the same bits, and no generator's state has to be saved.
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mpvg import runs
from mpvg.config import RunConfig
from mpvg.data import Data, open_data
from mpvg.runs import Run
from mpvg.tasks import Scores, classification_loss, evaluate
from mpvg.training import optimizer as optimizers
from mpvg.training.hardware import OnItsWay, make_accelerator, place, start_tracker
from mpvg.training.progress import Reporter
from mpvg.training.stopping import Interrupted, Stop


class NonFiniteLoss(ValueError):
    """The loss or a weight is NaN or infinite; the run stops, and keeps the checkpoint from before."""


@dataclass
class Position:
    """Where a run stands; all of it is in a checkpoint's state.json."""

    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches done of the epoch in progress."""
    step: int = 0
    """Optimizer steps done."""
    loss_sum: float = 0.0
    """Sum of the losses of the epoch in progress, of whole batches."""
    seconds: float = 0.0
    """Time spent in steps, waiting for data included."""
    images: int = 0
    """Images trained on."""
    skipped: int = 0
    """Unreadable images left out."""
    best: float = -1.0
    """Best accuracy so far."""


def train(config: RunConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Trains a new run and returns its summary.

    Raises:
        FileExistsError: the run folder is taken.
        Interrupted: SIGTERM or Ctrl-C came; the step was finished and saved. It is a KeyboardInterrupt.
        NonFiniteLoss: the loss is no longer a number.
        OSError: a checkpoint cannot be written; the previous one is kept.
        ValueError: the config asks for what the data, the network or the hardware cannot give.
    """
    runs.check_free(Path(config.out))
    trainer = Trainer.of(config, quiet=quiet)
    if trainer.accelerator.is_main_process:
        runs.start(trainer.config, trainer.data.info)
    return trainer.run_to_end()


def resume(path: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Continues an interrupted run from its newest checkpoint, to the same bits; a complete run is left as it is.

    Raises:
        As `train`, and FileNotFoundError where the folder holds no run.
    """
    run = runs.load(path)
    summary = run.summary()
    if summary is not None:
        _check_unchanged(run, summary["config_hash"])
        return summary
    trainer = Trainer.of(replace(run.config, out=str(path)), quiet=quiet)
    run.check_classes(trainer.data.info)
    trainer.restore()
    return trainer.run_to_end()


class Trainer:
    """One run in one process: what it is made of, and the loop; `train` and `resume` are the ways in."""

    def __init__(self, run: Run, data: Data, accelerator: Accelerator, *, quiet: bool) -> None:
        config = run.config
        self.run, self.config, self.data, self.accelerator = run, config, data, accelerator
        runs.seed_everything(config.seed)
        model = runs.build_model(config, data.info, init=not runs.has_checkpoint(run.path))
        model = place(model, config, accelerator)
        optimizer = optimizers.build_optimizer(model, config)
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        self.schedule = optimizers.build_schedule(optimizer, config, len(data.train))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.mixup = _mixup(config, data.info.num_classes)
        self.position = Position()
        self.quiet = quiet or not accelerator.is_main_process
        self.stop, self.stopped_by = Stop(quiet=self.quiet), 0

    @classmethod
    def of(cls, config: RunConfig, *, quiet: bool) -> "Trainer":
        """Makes everything a config asks for; nothing is written yet."""
        accelerator = make_accelerator(config)
        threads = config.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        data = open_data(config, device=accelerator.device, rank=rank, world_size=world_size)
        run = Run(Path(config.out), replace(config, threads=threads), data.info)
        return cls(run, data, accelerator, quiet=quiet)

    @property
    def network(self) -> nn.Module:
        """The model without the wrappers of several processes and of the compiler."""
        network: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return network

    def run_to_end(self) -> dict[str, Any]:
        """Trains what is left and returns the summary."""
        epochs, steps = self.config.epochs, len(self.data.train)
        start_tracker(self.accelerator, self.config)
        with self.stop, Reporter(epochs * steps, self.position.step, quiet=self.quiet) as reporter:
            config, went_on = self.config, f", from step {self.position.step}" if self.position.step else ""
            reporter.say(f"training {config.model} with {config.method} on {config.data} in {config.out}{went_on}")
            while self.position.epoch < epochs:
                self.train_epoch(reporter)
                values = self._evaluate()
                reporter.epoch(values, epochs)
                self.accelerator.log(values, step=self.position.step)
                # A signal during the evaluation, which has no steps to stop at.
                self._heed(OnItsWay(self._agreed(torch.zeros((), device=self.accelerator.device))))
                if self.stopped_by and self.position.epoch < epochs:
                    raise self._interrupted()
        summary = self._summary()
        if self.accelerator.is_main_process:
            runs.write_json(self.run.path / "summary.json", summary)
        self.accelerator.end_training()
        return summary

    def restore(self) -> None:
        """Takes up the newest checkpoint that is whole, or the beginning where there is none yet."""
        path, here = self.run.path, self.accelerator
        if not runs.has_checkpoint(path):
            if here.is_main_process:
                runs.cut_metrics(path, 0)
            return
        # One process chooses for all: they must not take up different ones.
        chosen: list[Any] = [runs.newest_whole(path) if here.is_main_process else None]
        name, problems = broadcast_object_list(chosen)[0]
        tensors, state = runs.load_checkpoint(path, name)
        try:
            self._take_up(tensors, state)
        except (KeyError, TypeError, RuntimeError) as error:  # all that torch and dict say of what does not fit
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path / 'checkpoints' / name} is damaged ({type(error).__name__}: {reason}); "
                "restore it from a copy of the run, or train a new run with another --out"
            ) from error
        here.wait_for_everyone()  # all have read what is now tidied up
        if here.is_main_process:
            runs.cut_metrics(path, self.position.step)
            if problems:
                print(f"mpvg: warning: {problems[0]}; going on from {name}, the one before", file=sys.stderr)
                runs.go_back_to(path, name)
            runs.remove_unused(path)  # a process may have died before it did
        here.wait_for_everyone()
        if not runs.has_checkpoint(path, "best"):
            self.position.best = -1.0  # it was among those that are given up

    def _take_up(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Puts a checkpoint's values where they came from."""
        _check_unchanged(self.run, state["digest"])
        self.network.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        optimizers.unpack(self.optimizer.optimizer, tensors["optimizer"], state["optimizer"])
        self.position = Position(**state["position"])

    def train_epoch(self, reporter: Reporter) -> None:
        """Runs the rest of the epoch in progress.

        What a step says of itself is heeded when the next one is on its way, so that a GPU never waits for being read.
        """
        here, batches = self.position, len(self.data.train)
        self.model.train()
        skipped_before = here.skipped - self.data.train.skipped
        begun, images_before = time.perf_counter(), here.images
        last: OnItsWay | None = None
        for images, targets in self.data.train.epoch(here.epoch, here.batch):
            step = OnItsWay(self._step(images, targets))
            if last:
                self._heed(last)
            here.images += len(images) * self.accelerator.num_processes
            here.batch += 1
            here.step += 1
            here.skipped = skipped_before + self.data.train.skipped
            last = step
            saves = self.stopped_by or (self.config.save_steps and here.step % self.config.save_steps == 0)
            if saves or here.batch == batches:
                self._heed(last)
                last = None
            reporter.step(
                here.epoch + 1,
                here.step,
                here.loss_sum / max(1, here.batch - bool(last)),
                (here.images - images_before) / (time.perf_counter() - begun),
            )
            if saves and here.batch < batches:  # the epoch's end saves anyway
                here.seconds += time.perf_counter() - begun
                self._check_weights()
                self._save(best=False)
                if self.stopped_by:
                    raise self._interrupted()
                begun, images_before = time.perf_counter(), here.images
        here.seconds += time.perf_counter() - begun

    def _agreed(self, loss: Tensor) -> Tensor:
        """The loss over all processes, and how many of them were asked to stop by Ctrl-C and by SIGTERM, `(3,)`.

        One that stopped alone would leave the others waiting for its gradients.
        """
        asked, loss = self.stop.asked, loss.detach().double()
        # Numbers that are filled in on the device: copied there, they would be waited for.
        mine = torch.stack([loss, *(loss.new_full((), asked == number) for number in (signal.SIGINT, signal.SIGTERM))])
        if self.accelerator.num_processes > 1:
            mine = self.accelerator.reduce(mine, "sum")
            mine[0] /= self.accelerator.num_processes
        return mine

    def _heed(self, said: OnItsWay) -> None:
        """Takes in what the newest step that is counted has said: adds up its loss, refuses one that is no number."""
        here = self.position
        loss, interrupts, terminations = said.arrived()
        self.stopped_by = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {here.step} (epoch {here.epoch + 1}, batch {here.batch})")
        here.loss_sum += loss

    def _interrupted(self) -> Interrupted:
        """The end of a run that a signal stopped, once all of it is saved."""
        self.accelerator.wait_for_everyone()  # torchrun kills the others when one of them ends
        what = "Ctrl-C" if self.stopped_by == signal.SIGINT else "SIGTERM"
        return Interrupted(
            f"{what}: stopped after step {self.position.step}, which is saved; "
            f"continue with `mpvg train --resume {self.run.path}`",
            128 + self.stopped_by,
        )

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step; returns what `_agreed` makes of its loss."""
        here, config = self.position, self.config
        runs.seed_everything(config.seed, here.epoch, here.batch, self.accelerator.process_index)
        self.schedule.set_rate(here.epoch, here.step)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        loss = self._backward(images, targets)
        if config.optim.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network)
        return self._agreed(loss)

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adds up the gradients of a batch, part by part; returns its loss."""
        total = torch.zeros((), device=images.device)
        size = math.ceil(len(images) / self.config.accumulate)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        for number, (part, wanted) in enumerate(parts, 1):
            # Gradients cross the processes once a step, with the last part.
            waiting = self.accelerator.no_sync(self.model) if number < len(parts) else contextlib.nullcontext()
            with waiting:
                with self.accelerator.autocast():
                    loss = classification_loss(self.model(part), wanted, self.config.augment.smoothing)
                loss = loss * (len(part) / len(images))
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _diverged(self, what: str) -> NonFiniteLoss:
        last = self.run.path / "checkpoints" / "last"
        kept = f"{last} ({last.readlink()}) is kept" if last.is_symlink() else "no checkpoint had been saved yet"
        cure = "train a new run with a lower lr, a longer optim.warmup_epochs or optim.clip_grad 1.0"
        return NonFiniteLoss(f"{what}; {kept}; {cure}")

    def _check_weights(self) -> None:
        """Refuses to save weights that the last step has ruined, whose loss was still a number."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.network.parameters()):
            raise self._diverged(f"the weights are no longer finite after step {self.position.step}")

    def _evaluate(self) -> dict[str, Any]:
        """Ends the epoch: scores the model, writes its line of metrics, and a checkpoint."""
        here = self.position
        scores = evaluate(self.model, self.data.val, self.accelerator)
        if not math.isfinite(scores.nll):
            raise self._diverged(f"the loss on the validation set is {scores.nll} after step {here.step}")
        values: dict[str, Any] = {
            "epoch": here.epoch + 1,
            "step": here.step,
            "train_loss": here.loss_sum / here.batch,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            **_named(scores),
        }
        if self.ema is not None:
            values |= _named(evaluate(self.ema.module, self.data.val, self.accelerator), "ema_")
        values |= {
            "images_per_second": here.images / here.seconds,
            "skipped": here.skipped,
            "seconds": round(here.seconds, 3),
        }
        accuracy = values["ema_accuracy" if self.config.ema_selects else "accuracy"]
        best = accuracy > here.best
        here.best = max(here.best, accuracy)
        here.epoch, here.batch, here.loss_sum = here.epoch + 1, 0, 0.0
        if self.accelerator.is_main_process:
            runs.append_metrics(self.run.path, values)
        self._save(best=best)
        return values

    def _save(self, *, best: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        moments, rest = optimizers.pack(self.optimizer.optimizer)
        tensors = {"model": self.network.state_dict(), "optimizer": moments}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        state = {"position": asdict(self.position), "optimizer": rest, "digest": self.config.digest()}
        runs.save_checkpoint(self.run.path, self.position.step, tensors, state, best=best)

    def _summary(self) -> dict[str, Any]:
        """The run in one line: what a study collects."""
        config, metrics = self.config, self.run.metrics()
        selects = "ema_accuracy" if config.ema_selects else "accuracy"
        last, best = metrics[-1], max(metrics, key=lambda line: line[selects])
        values: dict[str, Any] = {
            "config_hash": config.digest(),
            "recipe": config.recipe,
            "data": config.data,
            "model": config.model,
            "method": config.method,
            "pos_std": config.network.pos_std,
            "epochs": config.epochs,
            "seed": config.seed,
            "accuracy": last["accuracy"],
            "nll": last["nll"],
            "best_accuracy": best[selects],
            "best_epoch": best["epoch"],
        }
        if self.ema is not None:
            values |= {"ema_accuracy": last["ema_accuracy"], "ema_nll": last["ema_nll"]}
        return values | {
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "images_per_second": last["images_per_second"],
            "seconds": last["seconds"],
            "skipped": last["skipped"],
            "commit": runs.commit(),
            "hardware": runs.hardware(),
            "threads": config.threads,
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _check_unchanged(run: Run, digest: str) -> None:
    if digest != run.config.digest():
        raise ValueError(
            f"{run.path / 'config.yaml'} was changed since the run was saved (config {digest}, now "
            f"{run.config.digest()}); undo the change to resume, or train a new run with another --out"
        )


def _mixup(config: RunConfig, num_classes: int) -> Mixup | None:
    augment = config.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


def _named(scores: Scores, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in asdict(scores).items() if name != "count"}
