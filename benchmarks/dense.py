"""What do detection at 1024 pixels and segmentation at 512 take an image, and what does the method add?

    python benchmarks/dense.py --json benchmarks/records/dense.json      # one core, about 15 minutes

ViT-Adapter-Ti with Mask R-CNN and with UperNet at the paper's sizes and random weights, one image of noise a forward
pass. MPVG is compared with Default by turns in one process, as the median of the pairs with a 95 % interval; Default
with itself is the control, and a result whose control is off by more than 3 % is to be discarded. Memory is the peak of
a process of its own above what it had before the pass. On a GPU: the same, in bf16, and compiled where it can be.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import now, ratio, since, write_record

from mpvg.models.dense import create_adapter
from mpvg.models.dense.mask_rcnn import MaskRCNN
from mpvg.models.dense.upernet import UperNet
from mpvg.runs.environment import environment

SIZES = {"detection": 1024, "segmentation": 512}
CLASSES = {"detection": 80, "segmentation": 150}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="the backbones")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for task, side in SIZES.items():
        times = compare(task, device, given.pairs, compiled=given.compile)
        results[task] = {"side": side, **times, "peak MB of a pass": peak(task, device)}
        for name, value in results[task].items():
            print(f"{task:14s} {name:28s} {value}")
    if given.json:
        result = {"device": str(device), "compiled": given.compile, "results": results, "environment": environment()}
        write_record(given.json, result)


def network(task: str, method: str, device: torch.device, *, compiled: bool = False) -> Callable[[torch.Tensor], Any]:
    """A forward pass of one image."""
    torch.manual_seed(0)
    body = create_adapter("vit_adapter_tiny", method, forward=task)  # type: ignore[arg-type]
    model: Any = MaskRCNN(body, CLASSES[task]) if task == "detection" else UperNet(body, CLASSES[task])
    model = model.eval().to(device)
    if compiled:
        body.compile()
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def run(images: torch.Tensor) -> Any:
        with torch.inference_mode(), precision:
            found = model(images, [tuple(images.shape[-2:])]) if task == "detection" else model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def compare(task: str, device: torch.device, pairs: int, *, compiled: bool) -> dict[str, Any]:
    """Seconds an image, and the ratios of pairs."""
    side = SIZES[task]
    images = torch.randn(1, 3, side, side, device=device)
    runs = {
        name: network(task, name.split()[0], device, compiled=compiled) for name in ("default", "default again", "mpvg")
    }
    clock = "wall" if device.type == "cuda" else "cpu"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(pairs + 1):
        for name in runs if number % 2 else reversed(runs):
            begun = now()
            runs[name](images)
            if number:  # the first pass warms up
                seconds[name].append(getattr(since(begun), clock))
    plain = seconds["default"]
    return {
        "seconds an image": sorted(plain)[len(plain) // 2],
        "mpvg / default": ratio([a / b for a, b in zip(seconds["mpvg"], plain, strict=True)]),
        "control": ratio([a / b for a, b in zip(seconds["default again"], plain, strict=True)]),
    }


def peak(task: str, device: torch.device) -> float:
    """Megabytes that a pass takes at its peak, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak, args=(task, device.type, queue))
    process.start()
    process.join()
    return float(queue.get())


def _peak(task: str, device: str, queue: Any) -> None:
    torch.set_num_threads(1)
    run = network(task, "mpvg", torch.device(device))
    images = torch.randn(1, 3, SIZES[task], SIZES[task], device=device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(images)
        queue.put((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _status("VmRSS")
    run(images)
    queue.put((_status("VmHWM") - before) / 1e3)


def _status(name: str) -> float:
    """A value of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    main()
