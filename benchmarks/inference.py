"""What does a prediction cost, in which runtime, and is MPVG free there?

    python benchmarks/inference.py free      # folded MPVG / GAP of DeiT-Ti in each runtime, batch 1; 180 pairs, a limit
    python benchmarks/inference.py runtimes  # each runtime / PyTorch, folded MPVG of DeiT-Ti; 180 pairs, limits
    python benchmarks/inference.py batch-1   # networks x methods x runtimes, beside timm and transformers
    python benchmarks/inference.py batch-32  # the same with 32 images at once: an hour
    python benchmarks/inference.py sizes     # DeiT-Ti at 224 to 1024 pixels
    python benchmarks/inference_tables.py    # rewrite the tables of docs/inference.md and README.md

Everything runs on one thread. In every round each variant runs once, in a shuffled order, and ratios are formed inside
the round: the table has their median and its 95 % interval by order statistics. The reference of each group stands in
it twice (A/A). A group is measured again with new networks, up to three times, and otherwise marked as discarded, if
the 95 % interval of A/A excludes 1, its median is off by more than 1 % (2 % with ten pairs), or the rate of a fixed
matrix product moved by more than 10 %. CPU time decides; wall time is in the records,
`benchmarks/records/inference-PART.json`.
Exit status: 0, or 2 if a limit fails.
"""

import argparse
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timing import Block, Run, judge, measure_block, ratio, seconds, write_record
from torch import nn

from mpvg import create_model, fold
from mpvg.inference.programs import FILES, INPUT, PRECISION, trace, write
from mpvg.inference.quantization import int8_instruction
from mpvg.runs.environment import environment

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
NETWORKS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
METHODS = ("default", "gap", "mpvg", "folded mpvg")
RUNTIMES = ("eager", "compiled", "aotinductor", "onnx", "openvino", "int8")
ATTEMPTS = 3
MANY, FEW = 180, 10
"""Rounds where there is a limit, and elsewhere."""
SAMPLE_S = 0.03
"""A sample repeats a pass until it takes this long: short ones, because the speed of a shared machine drifts."""


@dataclass(frozen=True)
class Limit:
    """What the interval of a ratio must stay below, or above."""

    over: str
    under: str
    at_most: float = math.inf
    at_least: float = 0.0


def build(name: str, variant: str, size: int | None = None) -> nn.Module:
    """A network in evaluation mode; every method from the same random weights as far as they are the same."""
    torch.manual_seed(0)
    more = {} if size is None else {"img_size": size}
    if variant == "timm":
        return timm.create_model(name, **more).eval()
    if variant == "transformers":
        from transformers import ViTConfig, ViTForImageClassification

        width = {"deit_tiny_patch16_224": 192, "deit_small_patch16_224": 384}[name]
        config = ViTConfig(
            hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_labels=1000
        )
        return ViTForImageClassification(config).eval()
    model = create_model(name, variant.removeprefix("folded "), **more).eval()
    return fold(model) if variant.startswith("folded") else model


def prepare(model: nn.Module, runtime: str, images: torch.Tensor) -> Run:
    """What runs one batch in a runtime, on one thread."""
    if runtime == "eager":
        return inference(model, images)
    if runtime == "compiled":
        return inference(torch.compile(model), images)
    if runtime == "aotinductor":
        with torch.no_grad():
            program = torch.export.export(model, (images,))
            return inference(
                torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program)), images
            )
    kind = "onnx" if runtime == "int8" else runtime
    with tempfile.TemporaryDirectory() as folder:
        write(trace(model, torch.randn(2, *images.shape[1:])), kind, Path(folder), int8=runtime == "int8")
        return session(kind, Path(folder) / FILES[kind], images.numpy())


def inference(model: Any, images: torch.Tensor) -> Run:
    """A pass without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def session(kind: str, file: Path, images: Any) -> Run:
    """A pass in ONNX Runtime or OpenVINO."""
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        loaded = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        return lambda: loaded.run(None, {INPUT: images})
    import openvino

    settings = PRECISION | {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([images])


def measure(name: str, reference: str, make: Callable[[], dict[str, Run]], pairs: int, rng: random.Random) -> Block:
    """Rounds of all variants, until the control holds or the attempts are used up.

    Each attempt makes the networks anew: where their weights lie in memory changes the time by some thousandths.
    """
    for _ in range(ATTEMPTS):
        runs, passes = make(), {}
        for key, run in runs.items():
            _, warm = run(), min(seconds(run).wall for _ in range(3))
            passes[key] = math.ceil(SAMPLE_S / warm)
        block = judge(measure_block(runs, passes, pairs, rng), name, reference, off=0.01 if pairs == MANY else 0.02)
        if not block.discarded_because:
            break
    return block


def rows_of(
    name: str, block: Block, flops: dict[str, float], pairs: list[tuple[str, str]], limits: list[Limit]
) -> list[dict[str, Any]]:
    """The ratios of a group of variants, with what becomes of their limits."""
    rows = []
    for over, under in pairs:
        cpu, wall = (ratio(block.paired(over, under, clock)) for clock in ("cpu", "wall"))
        time = statistics.median(sample.cpu for sample in block.samples[over])
        row: dict[str, Any] = {"group": name, "variant": over, "reference": under}
        row |= {"cpu": cpu._asdict(), "wall": wall._asdict(), "ms": 1e3 * time, "pairs": len(block.samples[over])}
        row["discarded"] = block.discarded_because
        if over in flops:
            row["share_of_matrix_rate"] = flops[over] / time / 1e9 / statistics.mean(block.fp32_gflops)
        for limit in limits:
            if (limit.over, limit.under) == (over, under):
                holds = cpu.high <= limit.at_most and 1 / cpu.median >= limit.at_least
                row |= {"at_most": limit.at_most} if limit.at_most < math.inf else {"at_least": limit.at_least}
                row["verdict"] = "unmeasured" if block.discarded_because else "pass" if holds else "FAIL"
        rows.append(row)
    return rows


def flops_of(name: str, batch: int) -> float:
    """Floating-point operations of a batch; a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode

    model, counter = build(name, "gap"), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    return float(counter.get_total_flops()) * batch


def free(rng: random.Random) -> list[dict[str, Any]]:
    """Folded MPVG / GAP in each runtime."""
    rows, images = [], torch.randn(1, 3, 224, 224)
    for runtime in ("eager", "compiled", "onnx", "openvino", "int8"):

        def make(runtime: str = runtime) -> dict[str, Run]:
            models = {"gap": "gap", "gap again": "gap", "folded mpvg": "folded mpvg"}
            return {key: prepare(build("deit_tiny_patch16_224", kind), runtime, images) for key, kind in models.items()}

        pairs = [("folded mpvg", "gap"), ("gap again", "gap")]
        limits = [Limit("folded mpvg", "gap", at_most=1.02)] if runtime != "int8" else []
        rows += rows_of(runtime, measure(runtime, "gap", make, MANY, rng), {}, pairs, limits)
    return rows


def runtimes(rng: random.Random) -> list[dict[str, Any]]:
    """Each runtime / PyTorch eager."""
    images, name = torch.randn(1, 3, 224, 224), "folded mpvg, batch 1"

    def make() -> dict[str, Run]:
        model, again = (build("deit_tiny_patch16_224", "folded mpvg") for _ in range(2))
        runs = {runtime: prepare(model, runtime, images) for runtime in RUNTIMES}
        return runs | {"eager again": prepare(again, "eager", images)}

    block = measure(name, "eager", make, MANY, rng)
    pairs = [(key, "eager") for key in block.samples if key != "eager"]
    limits = [Limit("onnx", "eager", at_least=1.15), Limit("openvino", "eager", at_least=1.2)]
    if int8_instruction() is not None:
        limits.append(Limit("int8", "eager", at_least=2.1))
    else:
        pairs.append(("int8", "onnx"))
        limits.append(Limit("int8", "onnx", at_least=1.25))
    flops = dict.fromkeys([key for key in block.samples if key != "int8"], flops_of("deit_tiny_patch16_224", 1))
    return rows_of(name, block, flops, pairs, limits)


def networks(names: Sequence[str], batch: int, rng: random.Random) -> list[dict[str, Any]]:
    """Networks x methods x runtimes against GAP in PyTorch; compiled ones for folded MPVG alone."""
    rows = []
    for name in names:
        block = measure(name, "gap, eager", partial(make_network, name, batch), FEW, rng)
        flops = dict.fromkeys([key for key in block.samples if "int8" not in key], flops_of(name, batch))
        rows += rows_of(name, block, flops, [(key, "gap, eager") for key in block.samples], [])
    return rows


def make_network(name: str, batch: int) -> dict[str, Run]:
    """The variants of a network."""
    images, runs = torch.randn(batch, 3, 224, 224), {}
    for method in METHODS:
        for runtime in RUNTIMES:
            if runtime not in ("compiled", "aotinductor") or method == "folded mpvg":
                runs[f"{method}, {runtime}"] = prepare(build(name, method), runtime, images)
    runs["gap, eager again"] = prepare(build(name, "gap"), "eager", images)
    for other in ("timm", "transformers")[: 2 if name.startswith("deit") else 1]:
        runs[f"{other}, eager"] = prepare(build(name, other), "eager", images)
    return runs


def sizes(rng: random.Random) -> list[dict[str, Any]]:
    """DeiT-Ti at growing image sizes: what is folded stays folded, and attention grows with the square."""
    rows = []
    for size in (224, 384, 512, 768, 1024):
        block = measure(f"{size} pixels", "gap, eager", partial(make_size, size), FEW, rng)
        rows += rows_of(f"{size} pixels", block, {}, [(key, "gap, eager") for key in block.samples], [])
    return rows


def make_size(size: int) -> dict[str, Run]:
    """The variants of DeiT-Ti at an image size."""
    images, runs = torch.randn(1, 3, size, size), {}
    for method in ("gap", "gap again", "mpvg", "folded mpvg"):
        model = build("deit_tiny_patch16_224", method.removesuffix(" again"), size)
        runs[f"{method.removesuffix(' again')}, eager{' again' * method.endswith('again')}"] = prepare(
            model, "eager", images
        )
    for runtime in ("onnx", "openvino"):
        model = build("deit_tiny_patch16_224", "folded mpvg", size)
        runs[f"folded mpvg, {runtime}"] = prepare(model, runtime, images)
    return runs


PARTS = ("free", "runtimes", "batch-1", "batch-32", "sizes")


def run_part(part: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one record."""
    rng = random.Random(0)
    if part.startswith("batch"):
        return networks(names, int(part.removeprefix("batch-")), rng)
    return {"free": free, "runtimes": runtimes, "sizes": sizes}[part](rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what is measured")
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=NETWORKS, help="of batch-1 and batch-32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    np.random.seed(0)
    failed = False
    for part in given.parts:
        results = run_part(part, given.model)
        eager = next((row["ms"] / row["cpu"]["median"] for row in results if row["variant"] == "eager again"), None)
        record = {
            "environment": environment() | {"threads": 1, "load_at_start": os.getloadavg()},
            "int8_instruction": int8_instruction(),
            "eager_ms": eager,
            "results": results,
        }
        write_record(RECORDS / f"inference-{part}.json", record)
        for row in results:
            low, median, high = (row["cpu"][key] for key in ("low", "median", "high"))
            ratio = f"{row['variant']} / {row['reference']}: {median:.3f} ({low:.3f} to {high:.3f})"
            print(f"{row['group']}: {ratio}, {row['ms']:.2f} ms {row.get('verdict', '')}")
        failed |= any(row.get("verdict") == "FAIL" for row in results)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
