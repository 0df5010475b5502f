"""From a run's config to batches: the formats, and the steps that all of them share."""

import difflib
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mpvg.config import RunConfig
from mpvg.data import ade20k, coco, hub, tensors
from mpvg.data.canvas import CANVASES
from mpvg.data.fixed_steps import FixedSteps
from mpvg.data.images import ImageFiles
from mpvg.data.layout import open_files
from mpvg.data.listing import NO_SHARE, Classes, Format, Listing
from mpvg.data.loader import LoadedBatches, Subset
from mpvg.data.named_sets import DATASETS
from mpvg.data.order import BatchOrder
from mpvg.data.transforms import image_pipeline
from mpvg.data.types import Batches, Data, DataInfo, DevicePipeline, MakePipeline, Pipeline, Shard, Source, Split

SPLITS: tuple[Split, ...] = ("train", "val")
_FORMATS: dict[str, Format] = {hub.NAME: hub.open_hub, coco.NAME: coco.open_coco, ade20k.NAME: ade20k.open_ade20k}
_SPLITTABLE: tuple[Format, ...] = (open_files, hub.open_hub)
_FORMATS.update(dict.fromkeys(DATASETS, tensors.open_named))
_SCENES: dict[str, Format] = {"detection": coco.open_coco, "segmentation": ade20k.open_ade20k}
"""Task -> the layout in which it reads a canvas that is given by its name alone."""


def open_canvas(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists a canvas, `--data canvas`, in the layout that the run's task reads; a `Format`."""
    if config.task not in _SCENES:
        raise ValueError(
            f"data {config.data!r} has scenes, and the task is {config.task!r}; allowed: {', '.join(_SCENES)}, as in "
            "--recipe canvas_segmentation; for classification there is canvas-tiles"
        )
    open_layout = _SCENES[config.task]
    layout = coco.NAME if open_layout is coco.open_coco else ade20k.NAME
    return open_layout(replace(config, data=f"{layout}/{config.data}"), splits, class_names)


_FORMATS.update(dict.fromkeys(CANVASES, open_canvas))


def register_format(name: str, open: Format) -> None:
    """Adds a data format: `--data NAME` or `--data NAME/anything` is then listed by `open`.

    Args:
        name: of the format, without a slash.
        open: see `Format`.

    Raises:
        ValueError: the name is taken or is not a valid one.
    """
    if name in _FORMATS or name in ("", os.curdir, os.pardir) or os.sep in name:
        raise ValueError(f"data format {name!r}: give a name without a slash that is not one of {', '.join(_FORMATS)}")
    _FORMATS[name] = open


def open_listing(config: RunConfig, splits: Sequence[Split] = SPLITS, class_names: Classes | None = None) -> Listing:
    """Lists the files of `config.data`.

    Args:
        config: of the run.
        splits: which splits to list; no file of another one is read.
        class_names: the classes, if they are known already.

    Raises:
        FileNotFoundError: the files of a named set, or the folder or a part of it, are missing; or the hub has no such
            data set or cannot be reached.
        ModuleNotFoundError: an optional package that the data need is not installed.
        ValueError: the name is unknown, or the files are damaged.
    """
    format = _format(config.data)
    if config.val_share and "train" in splits and format not in _SPLITTABLE:
        raise ValueError(f"val_share is {config.val_share}, but data {config.data!r} {NO_SHARE}")
    if "train" in splits and format is not tensors.open_named:
        for name, off in (("imbalance", 1.0), ("subtract_mean", False)):
            if (value := getattr(config, name)) != off:
                sets = ", ".join(DATASETS)
                raise ValueError(f"{name} is {value}, but data {config.data!r} is no named set; allowed for: {sets}")
    with _no_garbage_collection():
        return format(config, splits, class_names)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A million small objects, none of them garbage, would be searched again and again: 40 % of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _format(data: str) -> Format:
    name = data.split("/", 1)[0]
    if name in _FORMATS and (name == data or name not in DATASETS):
        return _FORMATS[name]
    if os.path.isdir(data) or os.sep in data:
        return open_files
    near = difflib.get_close_matches(data, _FORMATS, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    layouts = (hub.NAME, coco.NAME, ade20k.NAME)
    names = ", ".join(name for name in _FORMATS if name not in layouts)
    raise ValueError(
        f"data {data!r} is neither a data set nor a folder; {hint}allowed: {names}, "
        f"{coco.NAME}/<folder or canvas>, {ade20k.NAME}/<folder or canvas>, "
        f"{hub.NAME}/<Hugging Face data set>, or the path of a folder with train/ and val/"
    )


def describe(config: RunConfig, listing: Listing) -> DataInfo:
    """The facts of a data set as a run uses it: the config's values, or else the listing's."""
    network = config.network
    return DataInfo(
        name=config.data,
        class_names=listing.class_names,
        category_ids=listing.category_ids,
        in_chans=listing.in_chans,
        img_size=network.img_size or listing.img_size,
        mean=network.mean or listing.mean,
        std=network.std or listing.std,
        crop_pct=network.crop_pct,
        pipeline=config.augment.pipeline,
        mean_image=listing.mean_image,
        train_size=len(listing.train) if listing.train is not None else 0,
        val_size=len(listing.val) if listing.val is not None else 0,
        train_hash=listing.inventories["train"].hash if "train" in listing.inventories else None,
        val_hash=listing.inventories["val"].hash if "val" in listing.inventories else None,
    )


def open_split(
    listing: Listing,
    split: Split,
    shard: Shard,
    config: RunConfig,
    info: DataInfo,
    *,
    make_pipeline: MakePipeline = image_pipeline,
    images: int | None = None,
) -> Batches[Any]:
    """Makes the batches of a split: the same order, seeding, workers and failures for every format and task.

    Args:
        listing: of the data set.
        split: training is shuffled and drops the last incomplete batch; validation is neither.
        shard: this process's part.
        config: `batch_size` counts the images of all processes; `seed` fixes order and augmentation.
        info: the facts of the data set.
        make_pipeline: what becomes of a sample; image classification unless a task says otherwise.
        images: read only so many samples, spread evenly over the split; None: all.

    Raises:
        ValueError: the config does not fit the data.
    """
    pipeline = make_pipeline(config, info, split, shard.device)
    source = listing.source(split)
    if isinstance(pipeline, Pipeline) and pipeline.decode is not None:
        if isinstance(source, ImageFiles):
            source = replace(source, decode=pipeline.decode)
        elif config.augment.pipeline == "fast":
            raise ValueError(f"augment.pipeline is 'fast', which reads image files, and {info.name} has none")
    groups = pipeline.group(source) if isinstance(pipeline, Pipeline) and pipeline.group is not None else None
    if images is not None:
        source = _spread(source, images)
    order = BatchOrder(
        size=len(source),
        batch_size=config.batch_size,
        shuffle=split == "train",
        seed=config.seed,
        rank=shard.rank,
        world_size=shard.world_size,
        repeats=config.augment.repeats if split == "train" else 1,
        groups=groups if split == "train" and images is None else None,
    )
    if isinstance(pipeline, DevicePipeline):
        assert isinstance(source, tensors.TensorSource), "a DevicePipeline is for sets that are tensors"
        return tensors.TensorBatches(source, pipeline, order, shard.device)
    return LoadedBatches(source, pipeline, order, config.loader, seed=config.seed, device=shard.device)


def _spread(source: Source, images: int) -> Source:
    """At most so many samples, spread evenly: validation sets are in the order of their classes."""
    count = min(images, len(source))
    chosen = [number * len(source) // count for number in range(count)]
    return source.select(chosen) if isinstance(source, tensors.TensorSource) else Subset(source, chosen)


def open_data(config: RunConfig, shard: Shard, make_pipeline: MakePipeline = image_pipeline) -> Data:
    """Lists a data set and opens both of its splits; arguments and errors as `open_listing` and `open_split`."""
    listing = open_listing(config)
    info = describe(config, listing)
    opened = partial(open_split, listing, config=config, info=info, shard=shard, make_pipeline=make_pipeline)
    train = opened("train")
    if config.steps_per_epoch is not None:
        train = FixedSteps(train, config.steps_per_epoch)
    return Data(info, train=train, val=opened("val"), inventories=listing.inventories)
