"""What a question about a trained network needs: a timm network, or a run, and its data."""

from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from mpvg.config import RunConfig
from mpvg.data import Batches, DataInfo, ImageBatch, Listing, Shard
from mpvg.data.factory import describe, open_listing, open_split
from mpvg.data.types import Split
from mpvg.models import TIMM, load_checkpoint, pretrained_mean_std
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which, describe_weights
from mpvg.runs.run import evaluation_device
from mpvg.seeding import seed_everything
from mpvg.tasks import Ranking
from mpvg.validation import shown, unknown_name

BATCH = 32


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, and the images of one split."""

    model: nn.Module
    name: str
    """Of the network or run."""
    weights: str
    """Which weights these are, in words."""
    has_head: bool
    """Whether the network names the classes of the data."""
    config: RunConfig
    info: DataInfo
    listing: Listing
    split: Split
    """Which images are read; they are prepared as for evaluation."""
    device: torch.device

    def batches(self, images: int | None = None) -> Batches[ImageBatch]:
        """The images, at most so many, spread evenly."""
        listing = replace(self.listing, val=self.listing.source(self.split))
        return open_split(listing, "val", Shard(self.device), self.config, self.info, images=images)

    @property
    def size(self) -> int:
        """Number of images of the split."""
        return len(self.listing.source(self.split))


def open_timm(
    name: str, checkpoint: str | None, base: RunConfig, split: Split, *, random: bool, head: bool = True
) -> Trained:
    """A timm network with the weights in a file; nothing is downloaded.

    Images are prepared as timm's data config of the network says: size, mean, standard deviation, share of the crop.

    Args:
        name: timm/<name>.
        checkpoint: a file, as `load_checkpoint` takes it.
        base: names the data.
        split: which images are read.
        random: whether the network has random weights instead, drawn from the seed of `base`.
        head: whether the network has a head for the classes of the data.

    Raises:
        FileNotFoundError: there is no such file, or the data lack the split.
        ValueError: the name is unknown, there are neither weights nor `random`, or they do not fit.
    """
    _check_weights(name, checkpoint, random)
    listing = _listing(base, split)
    seed_everything(base.seed)
    model: Any = _build(name, len(listing.class_names) if head else 0, listing.in_chans)
    cfg = model.pretrained_cfg
    found = pretrained_mean_std(name, listing.in_chans)
    network = replace(
        base.network,
        img_size=int(cfg["input_size"][-1]),
        mean=None if found is None else found[0],
        std=None if found is None else found[1],
        crop_pct=float(cfg.get("crop_pct") or base.network.crop_pct),
    )
    config = _plain(replace(base, model=name, network=network))
    has_head = False
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint)
        has_head = head and not any(key.startswith(str(cfg.get("classifier") or "head")) for key in report.new)
    return _trained(model, config, listing, split, name=name, weights=_said(checkpoint), has_head=has_head)


def open_run(run: Run, which: Which, data: str | None, *, ema: bool = False) -> Trained:
    """A run's network, and images that it was not trained on.

    Args:
        run: of image classification.
        which: which of its weights.
        data: a data set or folder, whose training images are read; None: the validation images of the run's own.
        ema: whether the averaged weights.

    Raises:
        FileNotFoundError: weights or data are missing.
        ValueError: the run is of another task, or the images have another number of channels.
    """
    check_classification(run)
    model = run.model(which, ema=ema)
    split: Split = "val" if data is None or data == run.config.data else "train"
    info = run.info
    network = replace(run.config.network, img_size=info.img_size, mean=info.mean, std=info.std)
    config = _plain(replace(run.config, data=data or run.config.data, network=network))
    listing = _listing(config, split)
    if listing.in_chans != info.in_chans:
        raise ValueError(
            f"images of {config.data} have {listing.in_chans} channels, and {run.path} was trained on {info.in_chans}; "
            "give data of the same kind"
        )
    weights = describe_weights(which, ema=ema)
    return _trained(model, config, listing, split, name=str(run.path), weights=weights, has_head=split == "val")


def check_classification(run: Run) -> None:
    """Refuses runs that do not name the class of an image.

    Raises:
        ValueError: naming the task.
    """
    if not isinstance(run.task(), Ranking):
        raise ValueError(f"{run.path} is a run of {run.config.task}; give a run of classification")


def _check_weights(name: str, checkpoint: str | None, random: bool) -> None:
    if not name.startswith(TIMM):
        raise ValueError(f"--model {shown(name)}: allowed: {TIMM}<name>, such as {TIMM}vit_tiny_patch16_224, or a run")
    known = name.removeprefix(TIMM)
    if ":" in known or not timm.is_model(known.split(".")[0]):
        near = timm.list_models(f"*{known.split('_')[0][:12].strip('[]*?')}*")[:20]
        raise ValueError(unknown_name("timm model", known, near or ["vit_tiny_patch16_224", "(timm.list_models())"]))
    if checkpoint is None and not random:
        raise ValueError(
            f"{name} has random weights without --checkpoint, and its numbers would say nothing; give --checkpoint "
            "FILE, or --random if random weights are what you want to see"
        )
    if checkpoint is not None and random:
        raise ValueError(f"--random and --checkpoint {checkpoint} exclude each other; leave one out")


def _build(name: str, classes: int, in_chans: int) -> nn.Module:
    try:
        return timm.create_model(name.removeprefix(TIMM), num_classes=classes, in_chans=in_chans).eval()
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(f"timm's {name.removeprefix(TIMM)} cannot be built: {error}; see its page in timm") from error


def _said(checkpoint: str | None) -> str:
    return "random" if checkpoint is None else f"of {checkpoint}"


def _plain(config: RunConfig) -> RunConfig:
    """Without what concerns training only."""
    augment = replace(config.augment, mixup=0.0, cutmix=0.0)
    return replace(
        config, batch_size=BATCH, augment=augment, loader=replace(config.loader, skip_corrupt=True), val_share=0.0
    )


def _listing(config: RunConfig, split: Split) -> Listing:
    listing = open_listing(config, [split])
    if not listing.class_names:
        raise ValueError(f"{config.data} has no classes; give data with one class for each image")
    if len(listing.class_names) < 2:
        raise ValueError(f"{config.data} has only the class {shown(listing.class_names[0])}; at least two are needed")
    return listing


def _trained(model: nn.Module, config: RunConfig, listing: Listing, split: Split, **said: Any) -> Trained:
    device = evaluation_device(config)
    info = describe(config, listing)
    return Trained(
        model=model.to(device).eval(), config=config, info=info, listing=listing, split=split, device=device, **said
    )
