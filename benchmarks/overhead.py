"""What does delivering a position embedding cost in time, and is a folded network free?

    python benchmarks/overhead.py --json benchmarks/records/overhead.json      # one thread, about 25 minutes

Compared: default, GAP, MPVG, folded MPVG, and timm's own network of the same name where timm has one; at inference with
batch 1 and 32, and in a training step with batch 16 (forward, cross entropy, backward, fused AdamW). In every round
each of them runs once, in a shuffled order, and ratios are formed inside the round; a block is `--pairs` rounds on
freshly built networks. CPU time decides on one thread, wall time on several, where waiting threads burn CPU time.

Two controls stand beside every block. A/A: a GAP network built twice from the same weights must come out equal. fp32:
the rate of a fixed matrix product before and after. A block is discarded, counted and repeated, up to twice `--blocks`
in all, if the 95 % interval of A/A excludes 1 or leaves 1 +- 2 % (what the tightest limit allows), if its median is off
by more than half of that, or if the rate moved by more than 10 %. No ratio in question has a say in that.

How to read the table: the median of the paired ratios over all kept blocks; its 95 % interval by order statistics; the
least and the greatest median of a single block, which show what an accident of memory placement is worth; the limit on
the interval's upper end, and what is aimed at. `unmeasured`: fewer than 30 pairs were kept, or it was not one thread.
Exit status: 0 if every limit holds, 1 if one is unmeasured, 2 if one fails.
"""

import argparse
import gc
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mpvg import create_model, fold
from mpvg.runs.environment import environment as run_environment

NETWORKS = [
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "ceit_tiny_patch16_224",
    "t2t_vit_7",
    "vit_lite_7_patch4_32",
]
CASES = {"inference-1": 1, "inference-32": 32, "training-16": 16}  # batch sizes
VARIANTS: dict[str, Callable[[str], nn.Module]] = {
    "default": lambda name: create_model(name, "default"),
    "gap": lambda name: create_model(name, "gap"),
    "gap again": lambda name: create_model(name, "gap"),
    "mpvg": lambda name: create_model(name, "mpvg"),
    "folded mpvg": lambda name: fold(create_model(name, "mpvg")),
    "timm": lambda name: timm.create_model(name),
}


@dataclass(frozen=True)
class Ratio:
    over: str
    under: str
    aim: float = 1.0
    limit: float = math.inf
    cases: tuple[str, ...] = ()  # that the limit is for


RATIOS = [
    Ratio("folded mpvg", "gap", aim=1.01, limit=1.02, cases=("inference-1",)),
    Ratio("mpvg", "gap", aim=1.02, limit=1.05, cases=("training-16",)),
    Ratio("default", "timm", aim=1.00, limit=1.03, cases=tuple(CASES)),
    Ratio("gap", "default"),
    CONTROL := Ratio("gap again", "gap"),
]
MIN_SAMPLE_S = 0.1  # a sample repeats its step until it takes this long
MAX_AA, MAX_RATE_CHANGE, MIN_PAIRS, ATTEMPTS_PER_BLOCK = 0.02, 0.10, 30, 2
CLOCKS = ("cpu", "wall")


@dataclass
class Block:
    network: str
    case: str
    passes: int  # in a sample
    fp32_gflops: list[float]  # before, after
    samples: dict[str, list[dict[str, float]]]  # of a variant, in every round: seconds per pass by each clock
    discarded_because: list[str] = field(default_factory=list)

    def paired(self, ratio: Ratio, clock: str) -> list[float]:
        rounds = zip(self.samples[ratio.over], self.samples[ratio.under], strict=True)
        return [over[clock] / under[clock] for over, under in rounds]


def build(network: str, training: bool, rng: random.Random) -> dict[str, nn.Module]:
    """Builds in a shuffled order, so that no variant has a place in memory of its own."""
    unfit = {"folded mpvg": training, "timm": not timm.is_model(network)}
    names = [name for name in VARIANTS if not unfit.get(name)]
    models = {name: VARIANTS[name](network).train(training) for name in rng.sample(names, len(names))}
    models[CONTROL.over].load_state_dict(models[CONTROL.under].state_dict())
    return models


def step(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """An inference pass, or a training step if there is an optimizer."""
    with torch.inference_mode(optimizer is None):
        logits = model(images)
    if optimizer is not None:
        nn.functional.cross_entropy(logits, torch.arange(len(images))).backward()
        optimizer.step()
        optimizer.zero_grad()


def seconds(run: Callable[[], object], passes: int = 1) -> dict[str, float]:
    """The time of one pass, without garbage collection."""
    gc.disable()
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    for _ in range(passes):
        run()
    cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
    gc.enable()
    return {"cpu": cpu / passes / 1e9, "wall": wall / passes / 1e9}


def fp32_gflops(clock: str, side: int = 1024) -> float:
    matrix = torch.ones(side, side)
    times = [seconds(lambda: matrix @ matrix, passes=4)[clock] for _ in range(15)]
    return 2 * side**3 / statistics.median(times[3:]) / 1e9


def measure(network: str, case: str, args: argparse.Namespace, rng: random.Random) -> Block:
    models = build(network, training := case.startswith("training"), rng)
    images = torch.randn(CASES[case], *(timm.get_pretrained_cfg_value(f"mpvg_{network}", "input_size") or ()))
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    steps = {key: partial(step, m, images, adamw(m.parameters()) if training else None) for key, m in models.items()}
    _, warm = [min(seconds(run)["wall"] for run in steps.values()) for _ in range(2)]
    passes = math.ceil(MIN_SAMPLE_S / warm)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    before = fp32_gflops(args.clock)
    for _ in range(args.pairs):
        for name in rng.sample(list(steps), len(steps)):
            samples[name].append(seconds(steps[name], passes))
    return judge(Block(network, case, passes, [before, fp32_gflops(args.clock)], samples), args.clock)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The median, and the narrowest order statistics that hold it between them with at least this probability."""
    ordered, n, rank = sorted(values), len(values), 0
    while sum(math.comb(n, below) for below in range(rank + 2)) / 2**n <= (1 - level) / 2:
        rank += 1
    return statistics.median(ordered), ordered[rank], ordered[n - 1 - rank]


def judge(block: Block, clock: str) -> Block:
    """Decides by the controls alone whether a block is kept, and says so."""
    median, low, high = median_interval(block.paired(CONTROL, clock))
    before, after = block.fp32_gflops
    found = {"A/A excludes 1": not low <= 1 <= high, "A/A is wide": max(1 - low, high - 1) > MAX_AA}
    found |= {"A/A is off": abs(median - 1) > MAX_AA / 2, "fp32 moved": abs(after / before - 1) > MAX_RATE_CHANGE}
    block.discarded_because = [reason for reason, true in found.items() if true]
    controls = f"A/A {median:.4f} ({low:.4f} to {high:.4f}), fp32 {before:.0f} to {after:.0f} GFLOP/s"
    verdict = "DISCARDED: " + ", ".join(block.discarded_because) if block.discarded_because else "kept"
    print(f"{block.network} {block.case}: {controls}: {verdict}", flush=True)
    return block


def summarize(ratio: Ratio, last: Block, kept: Sequence[Block], args: argparse.Namespace) -> dict[str, Any]:
    """One row: a ratio over the kept blocks of a case, and what becomes of its limit."""
    row: dict[str, Any] = {"network": last.network, "case": last.case, "ratio": f"{ratio.over} / {ratio.under}"}
    for clock in CLOCKS if kept else ():
        blocks = [block.paired(ratio, clock) for block in kept]
        median, low, high = median_interval([value for values in blocks for value in values])
        row[clock] = {"median": median, "low": low, "high": high, "blocks": [statistics.median(b) for b in blocks]}
    row |= {"pairs": sum(len(block.samples[ratio.over]) for block in kept), "verdict": "-"}
    if last.case in ratio.cases:
        row |= {"aim": ratio.aim, "limit": ratio.limit}
        usable = row["pairs"] >= MIN_PAIRS and args.threads == 1
        row["verdict"] = "unmeasured" if not usable else "pass" if row[args.clock]["high"] <= row["limit"] else "FAIL"
    return row


def print_table(rows: Sequence[dict[str, Any]], clock: str) -> None:
    other = CLOCKS[1 - CLOCKS.index(clock)]
    lines = [("network", "case", "ratio", clock, "95 % interval", "single blocks", other, "aim", "limit", "verdict")]
    for row in rows:
        shown = ["-"] * 4
        if clock in row:
            median, low, high, each = row[clock].values()
            shown = [f"{median:.4f}", f"{low:.4f} to {high:.4f}", f"{min(each):.4f} to {max(each):.4f}"]
            shown += [f"{row[other]['median']:.4f}"]
        limits = [f"{row[key]:.2f}" if key in row else "-" for key in ("aim", "limit")]
        lines.append((row["network"], row["case"], row["ratio"], *shown, *limits, row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def environment(args: argparse.Namespace) -> dict[str, Any]:
    pinned = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return run_environment() | {"pinned_to": pinned, "load_at_start": os.getloadavg(), "arguments": vars(args)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=NETWORKS, help="names, as mpvg.models.model_names() has them")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="threads, pinned to as many cores")
    parser.add_argument("--pairs", type=int, default=30, help="rounds in a block")
    parser.add_argument("--blocks", type=int, default=3, help="blocks to keep for every case")
    parser.add_argument("--seed", type=int, default=0, help="for the order in a round, weights and images")
    parser.add_argument("--json", type=Path, help="write every value to this file")
    args = parser.parse_args()
    args.clock = "cpu" if args.threads == 1 else "wall"
    return args


def main() -> int:
    args, rows, blocks = parse(), [], []
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    rng, _, environ = random.Random(args.seed), torch.manual_seed(args.seed), environment(args)
    for network in args.model:
        for case in args.cases:
            kept: list[Block] = []
            for _ in range(ATTEMPTS_PER_BLOCK * args.blocks):
                blocks.append(measure(network, case, args, rng))
                kept += [] if blocks[-1].discarded_because else blocks[-1:]
                if len(kept) == args.blocks:
                    break
            present = [r for r in RATIOS if {r.over, r.under} <= blocks[-1].samples.keys()]
            rows += [summarize(ratio, blocks[-1], kept, args) for ratio in present]
    print_table(rows, args.clock)
    discarded = sum(bool(block.discarded_because) for block in blocks)
    print(f"{discarded} of {len(blocks)} blocks discarded; {args.threads} thread(s), {environ['hardware']}")
    if args.json:
        record = {"environment": environ, "results": rows, "discarded": discarded, "blocks": [*map(asdict, blocks)]}
        args.json.write_text(json.dumps(record, default=str) + "\n")
    return max({"FAIL": 2, "unmeasured": 1}.get(row["verdict"], 0) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
