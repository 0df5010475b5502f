"""How many training images a second does one core prepare: timm's transforms, and the fast pipeline?

    taskset -c 0 python benchmarks/input.py --json benchmarks/records/input.json      # about 3 minutes

The images are made here, in a temporary folder: 500x375 JPEGs of quality 90 and about 75 KB, noise with the spectrum of
photographs (amplitude falling as 1 / frequency) onto which enlarged handwritten digits are pasted. They are read from
the file system's cache. Augmentation is DeiT's: random resized crop to 224, bicubic, flip, rand-m9-mstd0.5-inc1, random
erasing 0.25. Everything runs in this process on one thread; what is measured ends with the batch that a step receives.

    timm      --augment.pipeline auto: timm's transforms
    fast      --augment.pipeline fast: decode, crop and flip an image at a time; the rest on batches, on the same core
    worker    fast without what the device does when there is one: what a worker process costs
    (PIL)     the same without the optional simplejpeg

In every round each of them reads the same images once, in a shuffled order, and ratios are formed inside the round:
their median with a 95 % interval, in images a second over timm's, by CPU time, which shared cores disturb
least, and by wall time. timm's pipeline built twice is the control: where its interval excludes 1 or leaves 1 +- 3 %,
the run is not to be used. The stages are timed in the same rounds, each over the results of the one before.

Exit status: 0 if the limits hold for the whole interval, 1 if the control fails, 2 if a limit does.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timing import Times, now, ratio, since, write_record
from timm.data import create_transform

from mpvg.config import AugmentConfig, LoaderConfig, RunConfig
from mpvg.data import (
    Batches,
    DataInfo,
    ImageBatch,
    Pipeline,
    Sample,
    Shard,
    describe,
    image_pipeline,
    open_data,
    open_listing,
)
from mpvg.data import images as image_files
from mpvg.data.fast_pipeline import fast_pipeline
from mpvg.data.images import read_image, read_pixels
from mpvg.data.loader import collate_images
from mpvg.data.named_sets import NAMED_SETS
from mpvg.data.types import MakePipeline, Split
from mpvg.runs.environment import environment

LIMITS = {"fast / timm": 1.25, "worker / timm": 2.0}
AIMS = {"fast / timm": 1.5}
CPU = torch.device("cpu")


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=128, help="a multiple of 64, the batch size")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if image_files._simplejpeg() is None:
        sys.exit("simplejpeg is not installed, and the benchmark is about it; pip install simplejpeg")
    with tempfile.TemporaryDirectory() as folder:
        size = make_folder(Path(folder), given.images)
        print(f"{given.images} images of {size / 1000:.0f} KB; {given.rounds} rounds", flush=True)
        rounds = measure(pipelines(folder, given.images) | stages(folder), given.rounds)
    result = summarise(rounds, given.images) | {"limits": LIMITS, "aims": AIMS, "bytes_per_image": size}
    result |= {"environment": environment() | {"simplejpeg": image_files._simplejpeg().__version__}, "rounds": rounds}
    write_record(given.json, result)
    return report(result)


def make_folder(folder: Path, count: int, val: int = 1) -> float:
    """Writes train/ and val/ and returns the mean size of a training image in bytes."""
    rng = np.random.default_rng(0)
    digits = NAMED_SETS["digits"].read(None, ("train",)).train.images[:, 0].numpy()
    for split, number in (("train", count), ("val", val)):
        (folder / split / "a").mkdir(parents=True)
        for n in range(number):
            make_photograph(rng, digits).save(folder / split / "a" / f"{n}.jpg", quality=90)
    return statistics.mean(path.stat().st_size for path in (folder / "train").rglob("*.jpg"))


def make_photograph(rng: np.random.Generator, digits: Any, width: int = 500, height: int = 375) -> Image.Image:
    """Coloured 1 / f noise with four digits pasted into it."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falling = np.divide(1, frequency, out=np.zeros_like(frequency), where=frequency > 0) ** 1.28

    def noise() -> Any:
        field = np.fft.irfft2(falling * np.exp(2j * np.pi * rng.random(falling.shape)), s=(height, width))
        return field / field.std()

    light = noise()
    pixels = np.stack([128 + 45 * (light + 0.4 * noise()) for _ in range(3)], axis=-1)
    for _ in range(4):
        side = int(rng.integers(60, 180))
        top, left = rng.integers(0, height - side), rng.integers(0, width - side)
        digit = Image.fromarray(digits[rng.integers(len(digits))]).resize((side, side), Image.Resampling.BICUBIC)
        share = np.asarray(digit, float)[..., None] / 255
        part = pixels[top : top + side, left : left + side]
        part += share * (rng.integers(0, 256, 3) - part)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def config_for(folder: str, pipeline: Any) -> RunConfig:
    augment = AugmentConfig(pipeline=pipeline, hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)
    return RunConfig(
        data=folder,
        model="none",
        epochs=1,
        batch_size=64,
        lr=1.0,
        recipe="none",
        augment=augment,
        loader=LoaderConfig(workers=0),
    )


def worker_pipeline(config: RunConfig, info: DataInfo, split: Split, device: torch.device) -> Pipeline:
    """The pipeline without what is left for the device."""
    pipeline = image_pipeline(config, info, split, device)
    assert isinstance(pipeline, Pipeline)
    return replace(pipeline, device_transform=None)


def open_pipeline(folder: str, pipeline: str, make_pipeline: MakePipeline = image_pipeline) -> Batches[ImageBatch]:
    return open_data(config_for(folder, pipeline), Shard(CPU), make_pipeline).train


def pipelines(folder: str, images: int) -> dict[str, Callable[[int], Times]]:
    """Of each pipeline, what reads an epoch and times it."""

    def read(batches: Batches[ImageBatch], without: bool, epoch: int) -> Times:
        with mock.patch.object(image_files, "_simplejpeg", return_value=None) if without else mock.MagicMock():
            begun = now()
            seen = sum(len(targets) for _, targets in batches.epoch(epoch))
            taken = since(begun)
        assert seen == images
        return taken

    return {
        "timm": partial(read, open_pipeline(folder, "auto"), False),
        "timm again": partial(read, open_pipeline(folder, "auto"), False),
        "fast": partial(read, open_pipeline(folder, "fast"), False),
        "worker": partial(read, open_pipeline(folder, "fast", worker_pipeline), False),
        "fast (PIL)": partial(read, open_pipeline(folder, "fast"), True),
        "worker (PIL)": partial(read, open_pipeline(folder, "fast", worker_pipeline), True),
    }


def stages(folder: str) -> dict[str, Callable[[int], Times]]:
    """Of each stage of both pipelines, what carries it out on the training images and times it."""
    config = config_for(folder, "fast")
    augment, info = config.augment, describe(config, open_listing(config))
    no_jitter: Any = None
    crop, rand, rest = create_transform(
        224,
        is_training=True,
        separate=True,
        hflip=augment.hflip,
        interpolation=augment.interpolation,
        color_jitter=no_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erase,
        re_mode="pixel",
    )
    training = fast_pipeline(config, info, CPU)
    files = [str(path) for path in sorted(Path(folder, "train").rglob("*.jpg"))]
    pil, tensors = [read_image(file) for file in files], [Sample(read_pixels(file), 0) for file in files]
    small, crops = [crop(image) for image in pil], [training.transform(sample) for sample in tensors]

    def each(work: Callable[[Any], object], items: list[Any], epoch: int) -> Times:
        begun = now()
        for item in items:
            work(item)
        return since(begun)

    def in_batches(epoch: int) -> Times:
        assert training.device_transform
        on_device = training.device_transform(epoch)
        begun = now()
        for first in range(0, len(crops), 64):
            on_device(collate_images(crops[first : first + 64]), torch.arange(first, first + 64))
        return since(begun)

    return {
        "timm: read and decode": partial(each, read_image, files),
        "timm: crop, resize, flip": partial(each, crop, pil),
        "timm: augment, normalise": partial(each, lambda image: rest(rand(image)), small),
        "fast: read and decode": partial(each, read_pixels, files),
        "fast: crop, resize, flip": partial(each, training.transform, tensors),
        "fast: augment, normalise": in_batches,
    }


def measure(work: dict[str, Callable[[int], Times]], rounds: int) -> list[dict[str, Times]]:
    draw = random.Random(0)
    taken = []
    for epoch in range(rounds + 2):
        order = draw.sample(list(work), len(work))
        taken.append({name: work[name](epoch) for name in order})
    return taken[2:]  # warm-up


def summarise(rounds: list[dict[str, Times]], images: int) -> dict[str, Any]:
    """Rates and stages by CPU time; ratios of the rates by both clocks."""
    result: dict[str, Any] = {"images_per_second": {}, "ms_per_image": {}, "CPU": {}, "wall": {}}
    for name in rounds[0]:
        taken = statistics.median(r[name][0] for r in rounds)
        if ":" in name:
            result["ms_per_image"][name] = 1000 * taken / images
            continue
        result["images_per_second"][name] = images / taken
        for number, clock in enumerate(("CPU", "wall")):
            if name != "timm":
                result[clock][f"{name} / timm"] = ratio([r["timm"][number] / r[name][number] for r in rounds])
    result["images_per_second"] = dict(sorted(result["images_per_second"].items()))
    result["ms_per_image"] = dict(sorted(result["ms_per_image"].items(), reverse=True))
    return result


def report(result: dict[str, Any]) -> int:
    """Prints, and returns the exit status."""
    for name, rate in result["images_per_second"].items():
        print(f"  {name:26s} {rate:8.0f} images/s")
    for name, taken in result["ms_per_image"].items():
        print(f"  {name:26s} {taken:8.3f} ms an image")
    for name in sorted(result["CPU"]):
        (low, median, high), wall = result["CPU"][name], result["wall"][name]
        limit = f"  limit {LIMITS[name]}" if name in LIMITS else ""
        print(f"  {name:26s} {median:8.3f}  [{low:.3f}, {high:.3f}]{limit}  (wall {wall[1]:.3f})")
    if not result["CPU"]["timm again / timm"].is_one():
        print("the control failed; run it again on a quieter machine")
        return 1
    return 2 if any(result["CPU"][name][0] < limit for name, limit in LIMITS.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
