"""How many images a second does `mpvg predict` do, beside decoding and the forward pass measured apart?

    python benchmarks/predict.py --json benchmarks/records/predict.json        # 2,000 JPEGs, some minutes

The images are made here, in a temporary folder: 500x375 JPEGs of quality 90. The network is DeiT-Tiny at 224 pixels
with MPVG and random weights, in a run folder of its own. In every round are timed, on the same files in the file
system's cache:

    decode    read_image and the run's preprocessing, one image after another, in this thread
    forward   the same prepared images through the network, batch by batch
    predict   `mpvg predict FOLDER --jsonl FILE`, from the listing of the folder to the last line

Decoding and the forward pass share the cores with the reading threads of `predict`, so what it can win is the overlap.
The memory is the largest resident set of `mpvg predict` in a process of its own, for a tenth of the images and for all:
the second may exceed the first by 64 MiB.

Exit status: 0 if `predict` is at least 0.9 times as fast as decode and forward one after the other (the median of the
rounds) and the memory is flat, else 1.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import write_record

from mpvg.cli.main import main as mpvg
from mpvg.config import RunConfig
from mpvg.data import DataInfo
from mpvg.data.images import read_image
from mpvg.inference.backends import BATCH, RunBackend
from mpvg.runs import create_run, load
from mpvg.runs.checkpoints import Checkpoint, save_checkpoint
from mpvg.runs.environment import environment
from mpvg.tasks import create_task

LEAST, MAX_GROWTH = 0.9, 64 * 2**20


def make_images(folder: Path, count: int) -> None:
    """Smooth noise, so that the files are of a usual size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(picture) + rng.normal(0, 8, (375, 500, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)


def make_run(folder: Path, model: str) -> Path:
    """A run folder with random weights."""
    stats = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    names = tuple(str(number) for number in range(1000))
    info = DataInfo(name="none", class_names=names, in_chans=3, img_size=224, train_size=0, val_size=0, **stats)
    config = RunConfig(data="none", model=model, epochs=1, batch_size=32, lr=1e-3, recipe="none", out=str(folder))
    run = create_run(config, info)
    weights = create_task(config, info).build_model(init=True).state_dict()
    save_checkpoint(folder, 1, Checkpoint({"model": weights}, {"step": 1}), best=True)
    return run.path


def peak(arguments: list[str]) -> int:
    """The largest resident set, in bytes, of an `mpvg` command in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", "mpvg", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("mpvg predict failed")
    return usage.ru_maxrss * 1024


def apart(backend: RunBackend, files: list[Path]) -> tuple[float, float]:
    """Seconds of decoding and of the forward pass."""
    decode = forward = 0.0
    for start in range(0, len(files), BATCH):
        begin = time.perf_counter()
        prepared = [backend.preprocess(read_image(file, backend.orientation)) for file in files[start : start + BATCH]]
        between = time.perf_counter()
        backend.predict(torch.stack(prepared), None)
        decode, forward = decode + between - begin, forward + time.perf_counter() - between
    return decode, forward


def measure(count: int, rounds: int, model: str) -> dict[str, Any]:
    """All numbers of the record."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        make_images(folder, count)
        backend = make_backend(make_run(Path(root) / "run", model))
        files = sorted(folder.iterdir())
        few = [str(file) for file in files[: max(2 * BATCH, count // 10)]]
        command = ["predict", str(Path(root) / "run"), "--checkpoint", "last", "--jsonl"]
        first = peak([*command, str(Path(root) / "few.jsonl"), *few])
        every = peak([*command, str(Path(root) / "all.jsonl"), str(folder)])
        mpvg([*command, str(Path(root) / "warm.jsonl"), *few])
        found = []
        for number in range(rounds):
            decode, forward = apart(backend, files)
            begin = time.perf_counter()
            out = Path(root) / f"{number}.jsonl"
            if mpvg([*command, str(out), str(folder)]):
                raise SystemExit("mpvg predict failed")
            seconds = time.perf_counter() - begin
            if len(out.read_text(encoding="utf-8").splitlines()) != count:
                raise SystemExit("mpvg predict left images out")
            found.append({"decode": decode, "forward": forward, "predict": seconds})
        return {"rounds": found, "memory": {"tenth": first, "all": every}}


def make_backend(run: Path) -> RunBackend:
    """The run's network, as `mpvg predict --checkpoint last` opens it."""
    return RunBackend(load(run), "last", device="cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    measured = measure(given.images, given.rounds, given.model)
    rates = [(one["decode"] + one["forward"]) / one["predict"] for one in measured["rounds"]]
    growth = measured["memory"]["all"] - measured["memory"]["tenth"]
    for one, rate in zip(measured["rounds"], rates, strict=True):
        speeds = {name: given.images / seconds for name, seconds in one.items()}
        print("  ".join(f"{name} {speed:.1f}/s" for name, speed in speeds.items()), f" predict over apart {rate:.2f}")
    print(f"median {statistics.median(rates):.2f} (at least {LEAST}); memory grew by {growth / 2**20:.0f} MiB")
    if given.json:
        values = {"images": given.images, "model": given.model, "threads": torch.get_num_threads()}
        record = {**values, "load": os.getloadavg(), "ratios": rates, **measured, "environment": environment()}
        write_record(given.json, record)
    return 0 if statistics.median(rates) >= LEAST and growth <= MAX_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
