"""Every family, method and runtime: how far an exported network is from PyTorch.

    python benchmarks/export_matrix.py --json benchmarks/records/export_matrix.json

Networks of reduced size with scattered weights; two batch sizes; three image sizes where the size is free. Some two
seconds for each graph on an idle core.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import write_record
from torch import Tensor, nn

from mpvg.delivery import METHODS
from mpvg.inference.loading import load_export
from mpvg.inference.preprocessing import FILE, FORMAT
from mpvg.inference.programs import FILES, trace, write
from mpvg.inference.resample import any_size
from mpvg.models import create_model
from mpvg.models.fold import fold
from mpvg.runs.environment import environment

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_mini_patch2_8", {"depth": 3, "embed_dim": 24, "num_heads": 2}),
    "DeiT": ("deit_tiny_patch16_224", {"img_size": 48, "depth": 3, "embed_dim": 24, "num_heads": 2}),
    "Swin": ("swin_mini_patch2_28", {"depths": (1, 2), "embed_dim": 24, "num_heads": (2, 2)}),
    "CeiT": ("ceit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}),
    "T2T-ViT": ("t2t_vit_7", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}),
    "ViT-Lite": ("vit_lite_6_patch4_32", {"depth": 3, "embed_dim": 24, "num_heads": 2}),
    "timm": ("timm/vit_tiny_patch16_224", {"img_size": 48, "depth": 3, "embed_dim": 24, "num_heads": 2}),
}
LIMIT = 1e-4


def main() -> int:
    """Prints a line for each case and writes the record; exit code 1 where one differs by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file of the record")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for family in given.families:
        for method in given.methods:
            for row in cases(family, method):
                print(json.dumps(row), flush=True)
                rows.append(row)
    worst = max((row["difference"] for row in rows if "difference" in row), default=0.0)
    print(f"{len(rows)} cases, largest difference {worst:.1e}")
    if given.json:
        record = {"environment": environment(), "limit": LIMIT, "largest": worst, "cases": rows}
        write_record(given.json, record)
    return int(not worst <= LIMIT)


def cases(family: str, method: str) -> list[dict[str, Any]]:
    """The rows of one network: as trained, folded, and of any size, in each runtime."""
    name, sizes = FAMILIES[family]
    options: dict[str, Any] = {"readout": "method"} if name.startswith("timm/") else {}
    try:
        model: Any = create_model(name, method, num_classes=3, **sizes, **options)
    except ValueError as error:
        return [{"family": family, "method": method, "refused": str(error)}]
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if not part.startswith("patch_embed.attention"):  # the exponentials of T2T's performers would saturate
                parameter += 0.1 * torch.randn_like(parameter)
    model.eval()
    rows = []
    forms: dict[str, Callable[[nn.Module], nn.Module]] = {"as trained": lambda net: net, "folded": fold}
    for form, make in (forms | {"any size": any_size}).items():
        case = {"family": family, "method": method, "form": form}
        try:
            network = make(model)
        except ValueError as error:
            rows.append(case | {"refused": str(error)})
            continue
        rows += [case | row for row in measure(model, network, free=form == "any size")]
    return rows


def measure(model: Any, network: nn.Module, *, free: bool) -> list[dict[str, Any]]:
    """The difference of each runtime, at batch sizes 1 and 3; at three image sizes where the size is free."""
    rows, columns = model.patch_embed.patch_size
    patch = (rows, columns) if free else None
    height, width = model.patch_embed.img_size
    shapes = [(1, height, width), (3, height, width)]
    if patch is not None:
        shapes += [(2, height + patch[0], 2 * width), (2, 3 * height, 2 * patch[1])]
    batches = [torch.randn(count, model.in_chans, *size) for count, *size in shapes]
    with torch.no_grad():
        expected = [network(batch) for batch in batches]
    program = trace(network, torch.randn(2, model.in_chans, height, width), patch)
    found = []
    for kind, file in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(program, kind, Path(folder))
            describe(Path(folder), kind, file, batches[0], patch)
            exported = load_export(folder)
            pairs = zip(batches, expected, strict=True)
            worst = max(float((exported(batch) - wanted).abs().max()) for batch, wanted in pairs)
        found.append({"runtime": kind, "difference": worst, "shapes": shapes})
    return found


def describe(folder: Path, kind: str, file: str, batch: Tensor, patch: tuple[int, ...] | None) -> None:
    """Writes the preprocessing that the loader asks for; no image is prepared here."""
    channels, height, width = batch.shape[1:]
    values = {
        "format": FORMAT,
        "kind": kind,
        "file": file,
        "channels": channels,
        "height": height,
        "width": width,
        "resize": "square",
        "resize_to": height,
        "interpolation": "bilinear",
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "class_names": ["a", "b", "c"],
        "orientation": "exif",
        "task": "classification",
        "multiple_of": list(patch) if patch else None,
    }
    (folder / FILE).write_text(json.dumps(values))


if __name__ == "__main__":
    sys.exit(main())
