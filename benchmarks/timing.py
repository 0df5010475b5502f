"""What benchmarks share: clocks, ratios with an interval, blocks of rounds with their controls, and records."""

import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MAX_AA = 0.03
"""How far the interval of a control may reach from 1."""
MAX_RATE_CHANGE = 0.10
Run = Callable[[], object]


class Times(NamedTuple):
    """Seconds by two clocks."""

    cpu: float
    wall: float


class Ratio(NamedTuple):
    """A median with its 95 % interval."""

    low: float
    median: float
    high: float

    def is_one(self, within: float = MAX_AA) -> bool:
        """Whether the interval holds 1 and stays within 1 +- `within`."""
        return 1 - within <= self.low <= 1 <= self.high <= 1 + within

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.low:.4f} to {self.high:.4f})"


def now() -> Times:
    return Times(time.process_time(), time.perf_counter())


def since(begun: Times) -> Times:
    ended = now()
    return Times(ended.cpu - begun.cpu, ended.wall - begun.wall)


def seconds(run: Run, passes: int = 1) -> Times:
    """The time of one pass, without garbage collection."""
    gc.disable()
    begun = now()
    for _ in range(passes):
        run()
    taken = since(begun)
    gc.enable()
    return Times(taken.cpu / passes, taken.wall / passes)


def ratio(values: Sequence[float]) -> Ratio:
    """The median, and the narrowest order statistics that hold it between them with a probability of 95 % or more."""
    ordered, n, rank = sorted(values), len(values), 0
    while sum(math.comb(n, below) for below in range(rank + 2)) / 2**n <= 0.025:
        rank += 1
    return Ratio(ordered[rank], statistics.median(ordered), ordered[n - 1 - rank])


@dataclass
class Block:
    """Rounds in each of which every variant was timed once, in a shuffled order."""

    passes: dict[str, int]
    """In a sample of a variant."""
    fp32_gflops: list[float]
    """Rate of a matrix product before and after."""
    samples: dict[str, list[Times]]
    """Of a variant, in every round: seconds of one pass."""
    discarded_because: list[str] = field(default_factory=list)

    def paired(self, over: str, under: str, clock: str = "cpu") -> list[float]:
        """The ratio inside each round."""
        rounds = zip(self.samples[over], self.samples[under], strict=True)
        return [getattr(a, clock) / getattr(b, clock) for a, b in rounds]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self) | {"samples": {name: [t._asdict() for t in ts] for name, ts in self.samples.items()}}


def measure_block(
    runs: Mapping[str, Run], passes: dict[str, int], pairs: int, rng: random.Random, clock: str = "cpu"
) -> Block:
    """Times variants in so many rounds."""
    samples: dict[str, list[Times]] = {name: [] for name in runs}
    before = fp32_gflops(clock)
    for _ in range(pairs):
        for name in rng.sample(list(runs), len(runs)):
            samples[name].append(seconds(runs[name], passes[name]))
    return Block(passes, [before, fp32_gflops(clock)], samples)


def judge(block: Block, title: str, reference: str, *, off: float, wide: float = math.inf, clock: str = "cpu") -> Block:
    """Decides by the controls alone whether a block is kept, and says so.

    Args:
        block: has the reference twice, as `reference` and as "`reference` again".
        title: of the block.
        reference: the variant of the A/A control.
        off: how far the median of A/A may be from 1.
        wide: how far its interval may reach from 1.
        clock: which decides.
    """
    control = ratio(block.paired(f"{reference} again", reference, clock))
    before, after = block.fp32_gflops
    found = {
        "A/A excludes 1": not control.is_one(math.inf),
        "A/A is wide": not 1 - wide <= control.low <= control.high <= 1 + wide,
        "A/A is off": abs(control.median - 1) > off,
        "fp32 moved": abs(after / before - 1) > MAX_RATE_CHANGE,
    }
    block.discarded_because = [reason for reason, true in found.items() if true]
    verdict = f"DISCARDED: {', '.join(block.discarded_because)}" if block.discarded_because else "kept"
    print(f"{title}: A/A {control}, fp32 {before:.0f} to {after:.0f} GFLOP/s: {verdict}", flush=True)
    return block


def fp32_gflops(clock: str, side: int = 1024) -> float:
    """Rate of a fixed matrix product."""
    import torch

    matrix = torch.ones(side, side)
    times = [getattr(seconds(lambda: matrix @ matrix, passes=4), clock) for _ in range(15)]
    return 2 * side**3 / statistics.median(times[3:]) / 1e9


def write_record(path: Path | None, record: Any) -> None:
    """Writes a record; None: nobody asked for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
