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
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timing import Block, judge, measure_block, ratio, seconds
from torch import nn

from mpvg import create_model, fold
from mpvg.files import write_json
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
class Compared:
    over: str
    under: str
    aim: float = 1.0
    limit: float = math.inf
    cases: tuple[str, ...] = ()  # that the limit is for


RATIOS = [
    Compared("folded mpvg", "gap", aim=1.01, limit=1.02, cases=("inference-1",)),
    Compared("mpvg", "gap", aim=1.02, limit=1.05, cases=("training-16",)),
    Compared("default", "timm", aim=1.00, limit=1.03, cases=tuple(CASES)),
    Compared("gap", "default"),
    CONTROL := Compared("gap again", "gap"),
]
MIN_SAMPLE_S = 0.1  # a sample repeats its step until it takes this long
MAX_AA, MIN_PAIRS, ATTEMPTS_PER_BLOCK = 0.02, 30, 2
CLOCKS = ("cpu", "wall")


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


def measure(network: str, case: str, args: argparse.Namespace, rng: random.Random) -> Block:
    models = build(network, training := case.startswith("training"), rng)
    images = torch.randn(CASES[case], *(timm.get_pretrained_cfg_value(f"mpvg_{network}", "input_size") or ()))
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    steps = {key: partial(step, m, images, adamw(m.parameters()) if training else None) for key, m in models.items()}
    _, warm = [min(seconds(run).wall for run in steps.values()) for _ in range(2)]
    passes = dict.fromkeys(steps, math.ceil(MIN_SAMPLE_S / warm))
    block = measure_block(steps, passes, args.pairs, rng, args.clock)
    return judge(block, f"{network} {case}", CONTROL.under, off=MAX_AA / 2, wide=MAX_AA, clock=args.clock)


def summarize(
    compared: Compared, network: str, case: str, kept: Sequence[Block], args: argparse.Namespace
) -> dict[str, Any]:
    """One row: a ratio over the kept blocks of a case, and what becomes of its limit."""
    row: dict[str, Any] = {"network": network, "case": case, "ratio": f"{compared.over} / {compared.under}"}
    for clock in CLOCKS if kept else ():
        blocks = [block.paired(compared.over, compared.under, clock) for block in kept]
        found = ratio([value for values in blocks for value in values])
        row[clock] = {**found._asdict(), "blocks": [statistics.median(b) for b in blocks]}
    row |= {"pairs": sum(len(block.samples[compared.over]) for block in kept), "verdict": "-"}
    if case in compared.cases:
        row |= {"aim": compared.aim, "limit": compared.limit}
        usable = row["pairs"] >= MIN_PAIRS and args.threads == 1
        row["verdict"] = "unmeasured" if not usable else "pass" if row[args.clock]["high"] <= row["limit"] else "FAIL"
    return row


def print_table(rows: Sequence[dict[str, Any]], clock: str) -> None:
    other = CLOCKS[1 - CLOCKS.index(clock)]
    lines = [("network", "case", "ratio", clock, "95 % interval", "single blocks", other, "aim", "limit", "verdict")]
    for row in rows:
        shown = ["-"] * 4
        if clock in row:
            low, median, high, each = (row[clock][key] for key in ("low", "median", "high", "blocks"))
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
    parser.add_argument("--json", help="write every value to this file")
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
                block = measure(network, case, args, rng)
                blocks.append({"network": network, "case": case, **block.to_dict()})
                kept += [] if block.discarded_because else [block]
                if len(kept) == args.blocks:
                    break
            present = [r for r in RATIOS if {r.over, r.under} <= block.samples.keys()]
            rows += [summarize(compared, network, case, kept, args) for compared in present]
    print_table(rows, args.clock)
    discarded = sum(bool(block["discarded_because"]) for block in blocks)
    print(f"{discarded} of {len(blocks)} blocks discarded; {args.threads} thread(s), {environ['hardware']}")
    if args.json:
        write_json(Path(args.json), {"environment": environ, "results": rows, "discarded": discarded, "blocks": blocks})
    return max({"FAIL": 2, "unmeasured": 1}.get(row["verdict"], 0) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
