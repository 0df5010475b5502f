"""What does looking inside a network cost, and does its memory stay flat?

    python benchmarks/analysis.py --json benchmarks/records/analysis.json

Three questions, for a DeiT-Ti with 1,000 classes and random weights on images made here:

- time of a pass with the probe over a plain evaluation of the same batches, by turns in one process, as the median of
  the pairs with a 95 % interval; the evaluation compared with itself is the control;
- bytes of all tensors that the probe holds after 100 and after 10,000 images, counted, and the process's peak memory
  after each (with a small network for the second, which would otherwise take an hour);
- seconds and bytes of `mpvg analyze` with two DeiT-Ti runs over 1,000 images, on all cores.
"""

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from input import make_folder
from timing import now, ratio, since, write_record
from torch import Tensor

from mpvg import create_model, runs
from mpvg.analysis import probe, report
from mpvg.analysis.sensitivity import CachedBatches
from mpvg.config import LoaderConfig
from mpvg.data import DataInfo, ImageBatch, Shard, open_data
from mpvg.recipes import recipe
from mpvg.runs.checkpoints import Checkpoint, save_checkpoint
from mpvg.runs.environment import environment
from mpvg.tasks.classification import evaluate

LIMITS = {"probe / evaluation": 1.3, "report, seconds": 180, "report, MB": 15}
MODEL = "deit_tiny_patch16_224"
SMALL = "vit_mini_patch2_8"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--images", type=int, default=1000, help="of the report")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = cost(given.pairs) | memory() | whole_report(given.images)
    result |= {"limits": LIMITS, "environment": environment()}
    for name, value in result.items():
        if name not in ("limits", "environment"):
            limit = f"  limit {LIMITS[name]}" if name in LIMITS else ""
            print(f"{name:32s} {value}{limit}")
    write_record(given.json, result)


def info(side: int, channels: int) -> DataInfo:
    classes = tuple(str(number) for number in range(1000))
    statistics = (0.5,) * channels
    return DataInfo(
        name="noise", class_names=classes, in_chans=channels, img_size=side, mean=statistics, std=statistics,
        train_size=1, val_size=1,
    )  # fmt: skip


def cost(pairs: int) -> dict[str, Any]:
    """The probe's pass over the evaluation's."""
    torch.set_num_threads(1)
    model = create_model(MODEL, "mpvg").eval()
    cached = CachedBatches([ImageBatch(torch.randn(32, 3, 224, 224), torch.randint(1000, (32,)))])
    facts = info(224, 3)

    def evaluated() -> float:
        begun = now()
        evaluate(model, cached)
        return since(begun).cpu

    def probed() -> float:
        begun = now()
        probe.collect(model, cached.epoch(), facts)
        return since(begun).cpu

    rounds = [(evaluated(), probed(), evaluated()) for _ in range(pairs + 1)][1:]
    return {
        "probe / evaluation": ratio([p / e for e, p, _ in rounds]),
        "control": ratio([second / first for first, _, second in rounds]),
    }


def memory() -> dict[str, Any]:
    """What the probe holds after few and after many images."""
    model = create_model(SMALL, "mpvg", in_chans=1).eval()
    found: dict[str, Any] = {}
    for count in (100, 10_000):
        collected = probe.collect(model, some(count), info(8, 1))
        found[f"bytes held after {count:,}"] = sum(tensor.nbytes for tensor in tensors(collected))
        found[f"peak, MB, after {count:,}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        del collected
        gc.collect()
    return found


def some(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for begun in range(0, count, 50):
        size = min(50, count - begun)
        yield torch.randn(size, 1, 8, 8), torch.zeros(size, dtype=torch.int64)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an object, its fields, and lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "__dict__"):
        yield from tensors(list(vars(value).values()))


def whole_report(images: int) -> dict[str, Any]:
    """`mpvg analyze` of two runs that were never trained, on photographs."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder / "data", 8, images)
        paths = [folder / method for method in ("pvg", "mpvg")]
        for path in paths:
            plain = replace(recipe("folder"), loader=LoaderConfig(workers=1), batch_size=8, device="cpu")
            config = replace(plain, data=str(folder / "data"), method=path.name, out=str(path))
            run = runs.create_run(config, open_data(config, Shard(torch.device("cpu"))).info)
            weights = run.initial_model().state_dict()
            save_checkpoint(path, 1, Checkpoint({"model": weights}, {}), best=True)
        begun = time.perf_counter()
        made = report.analyze(paths, folder / "report", report.Options(images=images))
        seconds = time.perf_counter() - begun
        return {"report, seconds": round(seconds, 1), "report, MB": round(made.page.stat().st_size / 1e6, 1)}


if __name__ == "__main__":
    main()
