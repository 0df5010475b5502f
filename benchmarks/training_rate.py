"""Does the training loop keep up with its own step?

    python benchmarks/training_rate.py --json benchmarks/records/training_rate.json
    python benchmarks/training_rate.py --recipe deit_tiny --json benchmarks/records/training_rate-deit_tiny.json

Trains a small ViT on fashion-mnist (or DeiT-Ti on photographs of 500 x 375 made here, with DeiT's augmentation, in
batches of 8, the loader's worker on another core) through mpvg's loop, with augmentation, waiting for data, averaged
weights, progress and learning rate included, and beside it runs the bare step on one resident batch: forward,
backward, optimizer. The two take turns in one process, a stretch of steps each, so that a change of the machine's speed
meets both. Printed are images a second of each, and the median over the pairs of loop / bare with a 95 % interval, by
wall and by CPU time. The bare step compared with itself is the control: where its interval excludes 1 or leaves
1 +- 3 %, the run is not to be used.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from input import make_folder
from timing import Times, now, ratio, since, write_record

from mpvg.config import RunConfig
from mpvg.recipes import recipe
from mpvg.runs.environment import environment
from mpvg.training.loop import Trainer
from mpvg.training.progress import Reporter

LIMITS = {"fashion-mnist": 0.95, "deit_tiny": 0.97}
"""Least loop / bare of each recipe that can be measured here."""
BATCH = 8
PHOTOGRAPHS = 512


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion-mnist", choices=LIMITS)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4, help="steps in a stretch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(given.recipe, Path(folder), given.threads)
        trainer = Trainer.create(config, quiet=True)
        turns = TakeTurns(bare_stretch(trainer, given.steps), given.steps, given.pairs)
        with contextlib.suppress(Enough):
            trainer.train_epoch(turns)
        if len(turns.rounds) < given.pairs:
            parser.error(f"an epoch has {len(trainer.data.train)} steps; give fewer --pairs or --steps")
    images = given.steps * config.batch_size
    result = {
        "model": config.model,
        "augmentation": config.to_dict()["augment"],
        "images_per_second": {n: images / statistics.median(r[n].wall for r in turns.rounds) for n in ("loop", "bare")},
        "loop / bare, wall": ratio([r["bare"].wall / r["loop"].wall for r in turns.rounds]),
        "loop / bare, CPU": ratio([r["bare"].cpu / r["loop"].cpu for r in turns.rounds]),
        "control, wall": ratio([r["bare"].wall / r["control"].wall for r in turns.rounds]),
        "control, CPU": ratio([r["bare"].cpu / r["control"].cpu for r in turns.rounds]),
        "limit": LIMITS[given.recipe],
        "environment": environment(),
        "rounds": turns.rounds,
    }
    print(
        f"{config.model}, recipe {given.recipe}, batch {config.batch_size}, {given.threads} thread(s), "
        f"{given.pairs} pairs"
    )
    for name, rate in result["images_per_second"].items():
        print(f"  {name:18s} {rate:8.0f} images/s")
    for name in ("loop / bare, wall", "loop / bare, CPU", "control, wall", "control, CPU"):
        low, median, high = result[name]
        print(
            f"  {name:18s} {median:8.3f}  [{low:.3f}, {high:.3f}]"
            + (f"  limit {result['limit']}" if "loop" in name else "")
        )
    write_record(given.json, result)


def config_for(name: str, folder: Path, threads: int) -> RunConfig:
    """The recipe as it can be run here: DeiT's on photographs made in `folder`, in small batches and fp32."""
    config = replace(recipe(name), threads=threads, device="cpu", out=str(folder / "run"))
    if config.data != "folder":
        return config
    make_folder(folder / "photographs", PHOTOGRAPHS)
    data = str(folder / "photographs")
    return replace(config, data=data, batch_size=BATCH, precision="fp32", loader=replace(config.loader, workers=1))


class Enough(Exception):
    """All pairs are measured."""


class TakeTurns(Reporter):
    """Called by the loop after each step: lets the bare step take its turn after every few of them."""

    def __init__(self, bare: Callable[[], Times], steps: int, pairs: int) -> None:
        super().__init__(total=steps * (pairs + 2), quiet=True)
        self.bare, self.steps, self.pairs = bare, steps, pairs
        self.rounds: list[dict[str, Times]] = []
        self.left = now()

    def step(self, epoch: int, step: int, loss: float, rate: float) -> None:
        super().step(epoch, step, loss, rate)
        if step % self.steps:
            return
        loop = since(self.left)
        self.rounds.append({"loop": loop, "bare": self.bare(), "control": self.bare()})
        if len(self.rounds) == self.pairs + 2:
            del self.rounds[:2]  # warm-up
            raise Enough
        self.left = now()


def bare_stretch(trainer: Trainer, steps: int) -> Callable[[], Times]:
    """Forward, backward and optimizer on one resident batch."""
    images, targets = next(iter(trainer.data.train.epoch()))
    model, optimizer = trainer.state.network, trainer.optimizer.optimizer

    def stretch() -> Times:
        begun = now()
        for _ in range(steps):
            F.cross_entropy(model(images), targets, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
        return since(begun)

    return stretch


if __name__ == "__main__":
    main()
