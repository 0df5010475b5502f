"""Do two processes of one thread each train 1.6 times as many images a second as one?

    python benchmarks/processes.py --json benchmarks/records/processes.json      # two quiet cores, about 15 minutes

Trains a small ViT with the augmentation of the recipe `fashion-mnist` on images that are made here, with the same batch
over all processes, as one process and as two under torchrun, by turns: 1, 2, 1, 2, ..., 1. A run's rate is taken from
its metrics: images and seconds in steps, waiting for data included, of all epochs but the first, which warms up. Each
run of two is compared with the run of one before it, and that one with the next run of one, which is the control: where
the control's 95 % interval excludes 1 or leaves 1 +- 3 %, the machine was not quiet, and the run is not to be used.

Exit status: 0 if the whole interval reaches the limit, 1 if the control fails, 2 if the limit does.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from timing import MAX_AA, ratio, write_record

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "tests" / "shared")]

from conftest import torchrun  # noqa: E402  as the tests of several processes start them
from mpvg.runs.environment import environment  # noqa: E402
from short_runs import write_cifar10  # noqa: E402

LIMIT = 1.6


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="runs of two processes; one more of one process")
    parser.add_argument("--model", default="vit_mini_patch4_32")
    parser.add_argument("--batch_size", type=int, default=128, help="over all processes")
    parser.add_argument("--steps", type=int, default=20, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="2 or more: the first is left out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    options = {"recipe": "fashion-mnist", "data": "cifar10", "model": given.model, "batch_size": given.batch_size}
    options |= {"epochs": given.epochs, "optim.warmup_epochs": 0, "threads": 1, "device": "cpu"}
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        images = write_cifar10(Path(folder) / "images", batch=math.ceil(given.steps * given.batch_size / 5), test=100)
        for number in range(2 * given.rounds + 1):
            processes = 1 + number % 2
            rates[processes].append(train(processes, options, images, Path(folder) / f"run-{number}"))
            print(f"{processes} process(es): {rates[processes][-1]:8.1f} images/s", flush=True)
    result = {
        "options": options,
        "images_per_second": {processes: statistics.median(values) for processes, values in rates.items()},
        "two / one": ratio([two / one for one, two in zip(rates[1], rates[2], strict=False)]),
        "control": ratio([after / before for before, after in pairwise(rates[1])]),
        "limit": LIMIT,
        "environment": environment(),
        "runs": rates,
    }
    write_record(given.json, result)
    return report(result)


def train(processes: int, options: dict[str, Any], images: Path, out: Path) -> float:
    """Trains a run to its end; returns its images a second after the first epoch."""
    launcher = torchrun(processes) if processes > 1 else [sys.executable, "-m", "mpvg"]
    given = options | {"loader.root": images, "out": out}
    command = [*launcher, "train", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=variables, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}: {ended.stderr}")
    first, *_, last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line["images_per_second"] * line["seconds"] for line in (first, last)]  # both since the beginning
    return (trained[1] - trained[0]) / (last["seconds"] - first["seconds"])


def report(result: dict[str, Any]) -> int:
    """Prints the table and returns the exit status."""
    for processes, rate in result["images_per_second"].items():
        print(f"  {processes} process(es) {rate:8.1f} images/s")
    for name in ("two / one", "control"):
        low, median, high = result[name]
        print(
            f"  {name:12s} {median:8.3f}  [{low:.3f}, {high:.3f}]" + (f"  limit {LIMIT}" if name != "control" else "")
        )
    if not result["control"].is_one():
        print(f"the control excludes 1 or leaves 1 +- {MAX_AA}: not to be used")
        return 1
    return 0 if result["two / one"][0] >= LIMIT else 2


if __name__ == "__main__":
    sys.exit(main())
