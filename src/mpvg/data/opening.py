"""The one entrance: a run's config in, its data out."""

import difflib
import os
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from mpvg.config import RunConfig
from mpvg.data import archives, folder, hub, images, tensors
from mpvg.data.contract import Data, DataInfo
from mpvg.data.sources import DATASETS


def open_data(config: RunConfig, *, device: torch.device, rank: int = 0, world_size: int = 1) -> Data:
    """Opens what `config.data` names.

    Args:
        config: `batch_size` counts the images of all processes; `seed` fixes order and augmentation.
        device: where the batches are wanted.
        rank: number of this process, in [0, world_size).
        world_size: processes that share the data.

    Raises:
        FileNotFoundError: the files of a named set, or the folder or a part of it, are missing; or the hub has no such
            set, or cannot be reached.
        ModuleNotFoundError: an optional package that the data need is not installed.
        ValueError: the name is unknown, the files are damaged, or the config does not fit the data.
    """
    if config.data in DATASETS:
        return tensors.open_tensors(config, device=device, rank=rank, world_size=world_size)
    if config.data.startswith(hub.PREFIX):
        return hub.open_hub(config, device=device, rank=rank, world_size=world_size)
    if os.path.isdir(config.data) or os.sep in config.data:
        opened = archives.open_archives if archives.archives(config.data, "train") else folder.open_folder
        return opened(config, device=device, rank=rank, world_size=world_size)
    near = difflib.get_close_matches(config.data, DATASETS, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"data {config.data!r} is neither a data set nor a folder; {hint}allowed: {', '.join(DATASETS)}, "
        f"{hub.PREFIX}<Hugging Face data set>, or the path of a folder with train/ and val/"
    )


def make_preprocess(info: DataInfo) -> Callable[[Image.Image], Tensor]:
    """An image to the network's input (C, H, W), as validation on the data set makes it; the data set is not read."""
    on_the_device = info.name in DATASETS and info.pipeline == "auto"
    return tensors.Preprocess(info) if on_the_device else images.make_preprocess(info)
