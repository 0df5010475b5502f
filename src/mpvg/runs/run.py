"""A run folder and its reader, which turns it back into a model, its preprocessing and its data.

RUN/config.yaml        the resolved RunConfig, and the format of the folder
RUN/environment.json   versions, commit, hardware, threads, command, date
RUN/data.json          DataInfo: classes, image size, normalization
RUN/metrics.jsonl      one line per epoch
RUN/summary.json       one line once the run is complete: what a study collects
RUN/checkpoints/       see `checkpoints`
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mpvg.config import FORMAT, RunConfig, digest_format
from mpvg.data import Batches, DataInfo, Shard, describe, open_listing, open_split
from mpvg.data.types import Preprocess
from mpvg.models.checkpoints import load_weights
from mpvg.runs.checkpoints import Which, checkpoint_folder, verify
from mpvg.runs.environment import environment
from mpvg.runs.files import atomic_write, temp_path, write_json
from mpvg.runs.metrics import read_metrics
from mpvg.seeding import seed_everything
from mpvg.tasks import Task, create_task
from mpvg.validation import build


@dataclass(frozen=True)
class Run:
    """A run folder that holds a config: training, interrupted or complete."""

    path: Path
    config: RunConfig
    info: DataInfo

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
        folder = checkpoint_folder(self.path, which)
        file = folder / ("ema.safetensors" if ema else "model.safetensors")
        verify(folder, [file.name])
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}; averaged weights need --ema_decay at training")
        model = self.task().build_model(init=False)
        load_weights(model, file)
        return model.eval()

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

    def check_unchanged(self, digest: str) -> None:
        """Refuses a config that is not the one whose digest was saved, in the digest's own format.

        Raises:
            ValueError: naming both.
        """
        now = self.config.digest(digest_format(digest))
        if digest != now:
            raise ValueError(
                f"{self.path / 'config.yaml'} was changed since the run was saved (config {digest}, now {now}); "
                "undo the change to resume, or train a new run with another --out"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far, oldest first."""
        return read_metrics(self.path)

    def summary(self) -> dict[str, Any] | None:
        """The record of a complete run; None while there is none."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else None


def load(path: str | Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its config or data description is damaged.
    """
    path = Path(path)
    for name in ("config.yaml", "data.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no run: {name} is missing; give a folder that `mpvg train` made")
    config = read_config(path / "config.yaml")
    try:
        info: DataInfo = build(DataInfo, json.loads((path / "data.json").read_text()), "")
    except ValueError as error:
        raise ValueError(f"{path / 'data.json'} is damaged ({error}); restore it from a copy of the run") from error
    return Run(path, config, info)


def read_config(path: Path) -> RunConfig:
    """Reads a config that `create_run` wrote, in this format or an older one.

    Raises:
        ValueError: it is not valid YAML, is of a newer format, or has a key or value that a run cannot have.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not readable YAML ({reason}); restore it from a copy of the run") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no config; restore it from a copy of the run")
    format = values.pop("format", 1)
    if type(format) is not int or format < 1:
        raise ValueError(f"{path}: format is {format!r}; allowed: 1 to {FORMAT}; restore it from a copy of the run")
    if format > FORMAT:
        raise ValueError(f"{path} has format {format}, and this version of mpvg reads 1 to {FORMAT}; update mpvg")
    try:
        return RunConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def create_run(config: RunConfig, info: DataInfo) -> Run:
    """Makes the run folder. The config is written last: a folder with a config is complete.

    Raises:
        FileExistsError: the folder already holds something.
        OSError: it cannot be written, for example because the disk is full.
    """
    path = Path(config.out)
    ensure_new_run_dir(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "data.json", dataclasses.asdict(info))
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
    incomplete = {"data.json", "environment.json"}  # what `create_run` writes before the config
    incomplete |= {temp_path(Path(name)).name for name in (*incomplete, "config.yaml")}
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - incomplete):
        raise FileExistsError(f"{path} exists and is not empty, but holds no run; give another --out")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
