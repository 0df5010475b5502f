"""What a run is on disk, and the one reader that turns it back into a model, its preprocessing and its data.

    RUN/config.yaml        the resolved RunConfig
    RUN/environment.json   versions, commit, hardware, threads, command, date
    RUN/data.json          DataInfo: classes, image size, normalisation
    RUN/metrics.jsonl      one line an epoch
    RUN/summary.json       one line once the run is complete: what a study collects
    RUN/checkpoints/step-<n>/{model,ema,optimizer}.safetensors, state.json, checksums.json
    RUN/checkpoints/last, best -> step-<n>

Every file appears whole or not at all: it is written under a temporary name and renamed; see `saving`.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.data import Data, DataInfo, make_preprocess, open_data
from mpvg.models import TIMM, create_model
from mpvg.models.checkpoints import load_weights
from mpvg.saving import Damaged as Damaged
from mpvg.saving import Which, hidden, read_metrics, write_whole
from mpvg.saving import append_metrics as append_metrics
from mpvg.saving import checkpoint_folder as checkpoint_folder
from mpvg.saving import cut_metrics as cut_metrics
from mpvg.saving import go_back_to as go_back_to
from mpvg.saving import has_checkpoint as has_checkpoint
from mpvg.saving import load_checkpoint as load_checkpoint
from mpvg.saving import newest_whole as newest_whole
from mpvg.saving import remove_unused as remove_unused
from mpvg.saving import save_checkpoint as save_checkpoint
from mpvg.saving import verify as verify
from mpvg.saving import write_json as write_json

PRETRAINED = "pretrained"
"""The `init` that stands for timm's own weights."""


@dataclass(frozen=True)
class Run:
    """A run folder that holds a config: training, interrupted or complete."""

    path: Path
    config: RunConfig
    info: DataInfo

    def model(self, which: Which = "last", *, ema: bool = False) -> nn.Module:
        """The trained network in evaluation mode, from the newest or the best checkpoint.

        Raises:
            FileNotFoundError: there is no such checkpoint, or no averaged weights in it.
            ValueError: the weights are damaged or do not fit the config; another checkpoint is not taken unasked.
        """
        folder = checkpoint_folder(self.path, which)
        file = folder / ("ema.safetensors" if ema else "model.safetensors")
        verify(folder, [file.name])
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}; averaged weights need --ema_decay at training")
        model = build_model(self.config, self.info)
        load_weights(model, file)
        return model.eval()

    def untrained(self) -> nn.Module:
        """The network that the training began with, in evaluation mode: the control of every analysis.

        Raises:
            FileNotFoundError: it began from a checkpoint that is gone.
        """
        seed_everything(self.config.seed)
        return build_model(self.config, self.info, init=True).eval()

    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """An image to the `(C, H, W)` tensor that evaluation gives the network; needs no data set."""
        return make_preprocess(self.info)

    def data(self, device: torch.device) -> Data:
        """The run's data set.

        Raises:
            ValueError: its classes are not those the run was trained on.
        """
        data = open_data(self.config, device=device)
        self.check_classes(data.info)
        return data

    def check_classes(self, info: DataInfo) -> None:
        """Refuses data with other classes than the run's, or with images that are prepared in another way.

        Raises:
            ValueError: naming both.
        """
        if info.class_names != self.info.class_names:
            raise ValueError(
                f"{self.config.data} has {info.num_classes} classes ({_some(info.class_names)}), but "
                f"{self.path} was trained on {self.info.num_classes} ({_some(self.info.class_names)}); "
                "give the folder it was trained on, or one with the same class folders"
            )
        given, own = (
            f"{i.in_chans} x {i.img_size} x {i.img_size}, mean {i.mean}, std {i.std}" for i in (info, self.info)
        )
        if given != own:
            raise ValueError(
                f"images of {self.config.data} are prepared as {given}, but {self.path} was trained on {own}; "
                "give data of the same kind"
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
        values: dict[str, Any] = json.loads((path / "data.json").read_text())
        lists_as_tuples: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        info = DataInfo(**lists_as_tuples)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'data.json'} is damaged ({error}); restore it from a copy of the run") from error
    return Run(path, config, info)


def read_config(path: Path) -> RunConfig:
    """Reads a config that `start` wrote.

    Raises:
        ValueError: it is no YAML, or has a key or value that a run cannot have.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable YAML ({reason}); restore it from a copy of the run") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no config; restore it from a copy of the run")
    try:
        return RunConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def build_model(config: RunConfig, info: DataInfo, *, init: bool = False) -> nn.Module:
    """The network that a config trains on the data that `info` describes; `init`: with the weights it starts from."""
    network = config.network
    options: dict[str, Any] = {}
    if config.model.startswith(TIMM):
        options = {"readout": network.readout, "start": network.start}
        if init and network.init == PRETRAINED:
            options["pretrained"] = True
    elif (network.readout, network.start, network.init == PRETRAINED) != ("keep", "fresh", False):
        raise ValueError(
            f"network.readout, network.start and network.init={PRETRAINED} are for timm/<name>, and the model is "
            f"{config.model}; leave them out"
        )
    return create_model(
        config.model,
        config.method,
        num_classes=info.num_classes,
        checkpoint_path=network.init if init and network.init != PRETRAINED else None,
        pos_std=network.pos_std,
        in_chans=info.in_chans,
        img_size=info.img_size,
        drop_path_rate=network.drop_path,
        **options,
    )


def seed_everything(*key: int) -> None:
    """Seeds every generator that a step draws from by a few whole numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))  # timm's Mixup draws from the legacy generator
    random.seed(int(words[2]))


def start(config: RunConfig, info: DataInfo) -> Run:
    """Makes the run folder. The config is its last file: a folder with a config is whole.

    Raises:
        FileExistsError: the folder already holds something.
        OSError: it cannot be written, for a full disk say.
    """
    path = Path(config.out)
    check_free(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "data.json", dataclasses.asdict(info))
    write_json(path / "environment.json", environment())
    write_whole(path / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    return Run(path, config, info)


def check_free(path: Path) -> None:
    """Refuses a run folder that is taken; one whose making was cut off is free.

    Raises:
        FileExistsError: naming the ways on.
    """
    if (path / "config.yaml").is_file():
        raise FileExistsError(
            f"{path} already holds a run; continue it with `mpvg train --resume {path}`, or give another --out"
        )
    beginning = {"data.json", "environment.json"}  # what `start` writes before the config
    beginning |= {hidden(Path(name)).name for name in (*beginning, "config.yaml")}
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - beginning):
        raise FileExistsError(f"{path} exists and is not empty, but holds no run; give another --out")


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on."""
    packages = ("mpvg", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of the source in use, with "-dirty" where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return None


def hardware() -> str:
    """One line: processor, cores, memory, GPUs."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB", *gpus])


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
