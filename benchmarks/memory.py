"""How many images fit on one GPU of 24 GB at once, and which --accumulate does each run of the paper need there?

    python benchmarks/memory.py --json benchmarks/records/memory.json      # about 1 minute, no GPU

THIS IS AN ESTIMATE: nothing here was measured on a GPU. Forward and loss run on torch's fake tensors, which have shapes
and storages but no values, and the bytes of the distinct storages that autograd keeps for the backward pass are added
up, at two batch sizes: so much an image, and so much whatever their number. What is counted:

    an image    activations kept for backward, masks of dropout and drop path, statistics of LN, attention, BatchNorm
    fixed       weights and buffers, gradients, the optimizer's state, averaged weights, the bf16 copies of weights that
                autocast keeps, and images and targets of the whole batch, through which `--accumulate` goes in parts

What is not counted, and what `--reserve` is held back for: gradients of activations on their way, workspaces of cuBLAS
and cuDNN, fragmentation, the CUDA context, the buckets of several processes.

Kernels and casts are those that the CPU chooses. A GPU's autocast has LN and softmax in fp32 as well; and Swin's
attention weights are counted, since the CPU has no fused attention with a learned bias, where a GPU may have one.

The counting is checked in every run, one small network of each kind, in fp32 with drop path and real values: what is
counted on fake tensors, what is counted on real ones, and what torch's allocator holds on to after the forward pass.

Exit status: 0, or 1 if these three differ by more than 1 % anywhere.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from timing import write_record
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mpvg import create_model
from mpvg.config import RunConfig
from mpvg.recipes import RECIPES, paper, recipe
from mpvg.runs.environment import environment
from mpvg.tasks.classification import classification_loss
from mpvg.training.estimate import SIZES, kept_bytes, total_bytes
from mpvg.training.optimizer import build_optimizer

NAMES = [name for name, function in RECIPES.items() if function.__module__ == paper.__name__]
CLASSES = {"folder": 1000, "cifar100": 100}
CHECKED = ["deit_tiny", "swin_tiny", "ceit_tiny", "t2t_vit_7", "vit_lite_7_cifar100"]
MAX_DIFFERENCE = 0.01


@dataclass
class Row:
    """One recipe in one precision, in bytes."""

    recipe: str
    precision: str
    batch: int
    per_image: float
    fixed: dict[str, float]
    fits: int
    """Images whose activations fit at once; 0: not even the rest does."""
    accumulate: int
    """Parts of the batch, 0 where none fits."""
    total: float
    """What is counted with so many parts."""


def main() -> int:
    """Estimates, checks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=NAMES, metavar="RECIPE")
    parser.add_argument("--method", default="mpvg")
    parser.add_argument("--gpu", type=float, default=24e9, help="bytes of the GPU (default: 24e9)")
    parser.add_argument("--reserve", type=float, default=0.2, help="share of them that is held back (default: 0.2)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    checks = {name: check(replace(recipe(name), method=given.method)) for name in CHECKED}
    rows: list[Row] = []
    for name in given.recipes:
        config = replace(recipe(name), method=given.method)
        network = network_of(config)
        fixed = fixed_bytes(network, config)
        for precision in ("bf16", "fp32"):
            kept = [kept_for_backward(network, config, size, precision) for size in SIZES]
            rows.append(fit(config, precision, kept, fixed, given.gpu * (1 - given.reserve)))
    print(f"ESTIMATE, not measured on a GPU: one GPU of {given.gpu / 1e9:g} GB, {given.reserve:.0%} of it held back")
    print_table(rows)
    for name, values in checks.items():
        shown = ", ".join(f"{what} {value:,}" for what, value in values.items())
        print(f"check, {name}, fp32, bytes kept for the backward pass: {shown}")
    if given.json:
        result = {
            "what": "an estimate, not measured on a GPU",
            "gpu": given.gpu,
            "reserve": given.reserve,
            "method": given.method,
            "rows": [asdict(row) for row in rows],
            "checks": checks,
            "environment": environment(),
        }
        write_record(given.json, result)
    return int(any(max(c.values()) > (1 + MAX_DIFFERENCE) * min(c.values()) for c in checks.values()))


def network_of(config: RunConfig) -> nn.Module:
    """The network that a recipe trains, on the CPU, with what is frozen frozen."""
    size = {"img_size": config.network.img_size} if config.network.img_size else {}
    options = {"num_classes": CLASSES[config.data], "drop_path_rate": config.network.drop_path}
    network = create_model(config.model, config.method, **options, **size)
    build_optimizer(network, config)  # freezes
    return network.train()


def batch_of(network: nn.Module, config: RunConfig, size: int) -> tuple[Tensor, Tensor]:
    """Images and targets as a step has them; with mixup, targets are probabilities."""
    channels, side, _ = network.pretrained_cfg["input_size"]
    side = config.network.img_size or side
    classes = CLASSES[config.data]
    targets = torch.rand(size, classes) if config.augment.mixes else torch.randint(classes, (size,))
    return torch.randn(size, channels, side, side), targets


def fixed_bytes(network: nn.Module, config: RunConfig) -> dict[str, float]:
    """What a run holds however many images it goes through at once."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = [*network.parameters(), *network.buffers()]
    averaged = ModelEmaV3(network).module.state_dict().values() if config.ema_decay else []
    optimizer = build_optimizer(network, config)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad()
    state = [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
    return {
        "weights": total_bytes(weights),
        "gradients": total_bytes(trained),
        "optimizer": total_bytes(state),
        "averaged weights": total_bytes(averaged),
        "images and targets": config.batch_size * total_bytes(batch_of(network, config, 1)),
    }


def kept_for_backward(
    network: nn.Module, config: RunConfig, size: int, precision: str = "fp32", *, fake: bool = True
) -> int:
    """Bytes that autograd keeps of a batch."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            classification_loss(model(batch[0]), batch[1], config.augment.smoothing)

    return kept_bytes(network, step, batch_of(network, config, size), fake=fake)


def fit(config: RunConfig, precision: str, kept: list[int], fixed: dict[str, float], room: float) -> Row:
    """How many images the room takes, and in how many parts the batch therefore comes."""
    per_image = (kept[1] - kept[0]) / (SIZES[1] - SIZES[0])
    fixed = fixed | {"kept, whatever the number of images": kept[0] - SIZES[0] * per_image}
    rest = sum(fixed.values())
    fits = min(max(int((room - rest) / per_image), 0), config.batch_size)
    parts = math.ceil(config.batch_size / fits) if fits else 0
    most = math.ceil(config.batch_size / parts) if parts else 0
    return Row(
        recipe=config.recipe,
        precision=precision,
        batch=config.batch_size,
        per_image=per_image,
        fixed=fixed,
        fits=fits,
        accumulate=parts,
        total=rest + most * per_image,
    )


def check(config: RunConfig, size: int = 2) -> dict[str, int]:
    """The same forward pass counted on fake tensors, on real ones, and by the allocator."""
    network = network_of(config)
    counted = {
        "fake": kept_for_backward(network, config, size),
        "real": kept_for_backward(network, config, size, fake=False),
    }
    images, targets = batch_of(network, config, size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        loss = classification_loss(network(images), targets, config.augment.smoothing)
    counted["allocator"] = sum(event.self_cpu_memory_usage for event in watched.key_averages()) - loss.nbytes
    return counted


def print_table(rows: list[Row]) -> None:
    """As Markdown, which docs/scale.md shows."""
    print("| recipe | precision | fixed, GB | MB an image | images at once | batch | `--accumulate` | counted, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        fits = f"{row.fits:,}" if row.fits < row.batch else f"all {row.fits:,}"
        print(
            f"| `{row.recipe}` | {row.precision} | {sum(row.fixed.values()) / 1e9:.2f} | {row.per_image / 1e6:.1f} "
            f"| {fits} | {row.batch:,} | {row.accumulate or 'none fits'} | {row.total / 1e9:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
