"""A run folder and its reader, which turns it back into a model, its preprocessing and its data.

RUN/config.yaml        the resolved RunConfig, and the format of the folder
RUN/environment.json   versions, commit, hardware, threads, command, date
RUN/data.json          DataInfo: classes, image size, normalization, hashes of the samples
RUN/listing-*.txt.gz   target, size and name of each sample of a split, to name the first that was changed
RUN/metrics.jsonl      one line per epoch
RUN/summary.json       one line once the run is complete: what a study collects
RUN/checkpoints/       see `checkpoints`
RUN/.lock              while the run is written, see `lock`
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mpvg.config import FORMAT, RunConfig, digest_format
from mpvg.data import Batches, DataInfo, Shard, describe, open_listing, open_split
from mpvg.data.inventory import Inventory, first_difference
from mpvg.data.types import Preprocess, Split
from mpvg.files import atomic_write, is_temporary, read_regular, remove_leftovers, write_json
from mpvg.models.checkpoints import load_weights
from mpvg.models.own import Factory, register_network
from mpvg.runs.checkpoints import Which, checkpoint_folder, has_best, verify, warn
from mpvg.runs.environment import environment
from mpvg.runs.lock import LOCK
from mpvg.runs.metrics import LINE, read_metrics
from mpvg.runs.pointers import own_name, step_name
from mpvg.runs.reading import read_config, read_info, read_summary
from mpvg.seeding import seed_everything
from mpvg.tasks import Task, best_line, create_task, selecting_metric, task_class
from mpvg.tasks.task import EMA
from mpvg.validation import printable, shorten

_LISTINGS: dict[Split, str] = {"train": "listing-train.txt.gz", "val": "listing-val.txt.gz"}
_MAX_LISTING = 2**29  # bytes; a million names take some ten million


def evaluation_device(config: RunConfig) -> torch.device:
    """A GPU where there is one and the config does not ask for the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")


@dataclass(frozen=True)
class Run:
    """A run folder that holds a config: training, interrupted or complete."""

    path: Path
    config: RunConfig
    info: DataInfo

    @property
    def device(self) -> torch.device:
        """Where the network is evaluated: a GPU where there is one and the run was not made for the CPU."""
        return evaluation_device(self.config)

    def task(self) -> Task[Any]:
        """The run's task.

        Raises:
            ValueError: it is not registered, or does not take the run's options.
        """
        return create_task(self.config, self.info)

    def model(self, which: Which = "last", *, ema: bool = False) -> nn.Module:
        """The trained network in evaluation mode, from the newest or the best checkpoint.

        Raises:
            FileNotFoundError: there is no such checkpoint, or no averaged weights in it.
            ValueError: the weights are damaged or do not fit the config; another checkpoint is not used unasked.
        """
        file = self.weights_file(which, ema=ema)
        model = self.task().build_model(init=False)
        load_weights(model, file)
        return model.eval()

    def weights_file(self, which: Which = "last", *, ema: bool = False) -> Path:
        """The file of a checkpoint's weights; arguments and errors as `model`."""
        folder = self._checkpoint_folder(which)
        file = folder / ("ema.safetensors" if ema else "model.safetensors")
        verify(folder, [file.name])
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}; averaged weights need --ema_decay at training")
        return file

    def _checkpoint_folder(self, which: Which) -> Path:
        """The folder of a checkpoint; where the pointer to the best one is lost the metrics say which it is."""
        if which == "best" and not has_best(self.path) and (name := self.best_step()):
            folder = self.path / "checkpoints" / name
            if folder.is_dir():
                warn(f"{folder.with_name(which)} is missing; taking {name}, the best by {self.path / 'metrics.jsonl'}")
                return folder
        return checkpoint_folder(self.path, which)

    def best_step(self) -> str | None:
        """The name of the folder that the best checkpoint has or had; None before an epoch ends."""
        best = best_line(self.config, self.metrics())
        return step_name(best["step"]) if best else None

    def recorded(self, which: Which) -> dict[str, Any] | None:
        """The line of metrics.jsonl that a checkpoint's weights had; None: they were saved within an epoch."""
        lost = which == "best" and not has_best(self.path)
        name = self.best_step() if lost else own_name(checkpoint_folder(self.path, which, quiet=True))
        return next((line for line in self.metrics() if step_name(line["step"]) == name), None)

    def initial_model(self) -> nn.Module:
        """The network before training, in evaluation mode: the control of every analysis.

        Raises:
            FileNotFoundError: training started from a checkpoint that is gone.
        """
        seed_everything(self.config.seed)
        return self.task().build_model(init=True).eval()

    def preprocess(self) -> Preprocess:
        """What evaluation does to an image; needs no data set."""
        return self.task().preprocess()

    def validation(
        self, device: torch.device, *, data: str | None = None, images: int | None = None, batch_size: int | None = None
    ) -> Batches[Any]:
        """The validation set; the training set is not read.

        Args:
            device: where batches are wanted.
            data: another data set or folder; None: the run's own.
            images: read only so many, spread evenly over the set; None: all.
            batch_size: images per batch; None: the run's.

        Raises:
            ValueError: the classes are not those that the run was trained on, or images are prepared in another way.
        """
        config = replace(self.config, data=data or self.config.data)
        listing = open_listing(config, ("val",), self.info.class_names)
        given = describe(config, listing)
        self._check_data(config.data, given)
        info = replace(self.info, name=given.name, val_size=given.val_size)
        plain = replace(config.augment, mixup=0.0, cutmix=0.0)  # mixing asks for an even batch size
        config = replace(config, batch_size=batch_size or config.batch_size, augment=plain)
        if data is None or data == self.config.data:
            self.check_samples(listing.inventories)
        pipeline = self.task().make_pipeline
        return open_split(listing, "val", Shard(device), config, info, make_pipeline=pipeline, images=images)

    def check_classes(self, info: DataInfo) -> None:
        """Refuses data with other classes than the run's, or with images that are prepared in another way.

        Raises:
            ValueError: naming both.
        """
        self._check_data(self.config.data, info)

    def _check_data(self, data: str, info: DataInfo) -> None:
        if info.class_names != self.info.class_names:
            raise ValueError(
                f"{data} has {info.num_classes} classes ({_some(info.class_names)}), but "
                f"{self.path} was trained on {self.info.num_classes} ({_some(self.info.class_names)}); "
                "give the folder it was trained on, or one with the same class folders"
            )
        given, own = (
            f"{i.in_chans} x {i.img_size} x {i.img_size}, mean {i.mean}, std {i.std}" for i in (info, self.info)
        )
        if given != own:
            raise ValueError(
                f"images of {data} are prepared as {given}, but {self.path} was trained on {own}; "
                "give data of the same kind"
            )

    def check_samples(self, inventories: Mapping[Split, Inventory]) -> None:
        """Refuses data whose samples are not those that the run was trained on; an older run does not say which.

        Raises:
            ValueError: naming the first sample that differs.
        """
        for split, now in inventories.items():
            trained = self.info.train_hash if split == "train" else self.info.val_hash
            if trained not in (None, now.hash):
                raise ValueError(
                    f"the {split} samples of {self.config.data} are not those that {self.path} was trained on: "
                    f"{self._first_difference(split, now)}; restore them, or train a new run with another --out"
                )

    def _first_difference(self, split: Split, now: Inventory) -> str:
        file = self.path / _LISTINGS[split]
        try:
            return first_difference(read_regular(file, _MAX_LISTING), now)
        except (OSError, ValueError) as error:
            return f"their hash is another, and {file} cannot say which ({error})"

    def is_of(self, digest: str) -> bool:
        """Whether a digest, in its own format, is that of the run's config."""
        return digest == self.config.digest(digest_format(digest))

    def check_unchanged(self, digest: str) -> None:
        """Refuses a config that is not the one whose digest was saved, in the digest's own format.

        Raises:
            ValueError: naming both.
        """
        if not self.is_of(digest):
            now = self.config.digest(digest_format(digest))
            raise ValueError(
                f"{self.path / 'config.yaml'} was changed since the run was saved (config {digest}, now {now}); "
                "undo the change to resume, or train a new run with another --out"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far, oldest first.

        Raises:
            ValueError: metrics.jsonl is damaged.
        """
        kind = task_class(self.config.task)
        return read_metrics(self.path, (*LINE, kind.best, selecting_metric(self.config), *self._summarized()))

    def summary(self) -> dict[str, Any] | None:
        """The record of a complete run; None while there is none.

        Raises:
            ValueError: summary.json is damaged.
        """
        names = (*self._summarized(), f"best_{task_class(self.config.task).best}")
        try:
            return read_summary(self.path / "summary.json", names)
        except FileNotFoundError:
            return None

    def _summarized(self) -> list[str]:
        """Names of the metrics that a run's summary and its last line have."""
        names = task_class(self.config.task).summarized
        return [*names, *(f"{EMA}{name}" for name in names if self.config.ema_decay)]


def load(path: str | Path, model: Factory | None = None) -> Run:
    """Reads a run folder.

    Args:
        path: the folder.
        model: the factory of the run's network, if that is of your own; see `mpvg.register_network`.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its config or data description is damaged, or a factory is given for a network of this package.
    """
    path = Path(path)
    for name in ("config.yaml", "data.json"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} holds no run: {name} is missing; give a folder that `mpvg train` made")
    run = Run(path, read_config(path / "config.yaml"), read_info(path / "data.json"))
    if model is not None:
        register_network(run.config.model, model)
    return run


def create_run(config: RunConfig, info: DataInfo, inventories: Mapping[Split, Inventory] | None = None) -> Run:
    """Makes the run folder. The config is written last: a folder with a config is complete.

    Raises:
        FileExistsError: the folder already holds something.
        OSError: it cannot be written, for example because the disk is full.
    """
    path = Path(config.out)
    ensure_new_run_dir(path)
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    write_json(path / "data.json", dataclasses.asdict(info))
    for split, inventory in (inventories or {}).items():
        atomic_write(path / _LISTINGS[split], inventory.packed)
    write_json(path / "environment.json", environment())
    values = {"format": FORMAT, **config.to_dict()}
    atomic_write(path / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    return Run(path, config, info)


def ensure_new_run_dir(path: Path) -> None:
    """Refuses a folder that holds a run or anything else; one that `create_run` did not complete is accepted.

    Raises:
        FileExistsError: with the possible next steps.
    """
    if (path / "config.yaml").is_file():
        raise FileExistsError(
            f"{path} already holds a run; continue it with `mpvg train --resume {path}`, or give another --out"
        )
    if path.exists() and (not path.is_dir() or not all(_is_of_a_beginning(entry.name) for entry in path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty, but holds no run; give another --out")


def _is_of_a_beginning(name: str) -> bool:
    """Whether a file is one that a run has before its config."""
    return name in ("data.json", "environment.json", LOCK, *_LISTINGS.values()) or is_temporary(name)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(shorten(printable(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")
