"""Is the pass of `mpvg readout` over images as fast as plain inference?

    python benchmarks/readout.py --json benchmarks/records/readout.json      # one thread, some minutes

DeiT-Tiny of timm at 224 pixels with random weights, images of noise in batches of 32. In every round are timed,
in a shuffled order: the network alone, the network alone again (the control), and `extract` with all read-outs,
with the tokens for the attention probe. Fitting the probes is not in it. Ratios are formed inside the
round, of CPU times, and have the median with a 95 % interval.

Exit status: 0 if `extract` has at least 0.9 times the images a second of the network alone, else 1.
"""

import argparse
import random
from pathlib import Path

import timm
import torch
from timing import now, ratio, since, write_record

from mpvg.analysis.readouts import choose, extract
from mpvg.models.tokens import TokenReader
from mpvg.runs.environment import environment

LEAST = 0.9
BATCH = 32


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2 * BATCH, help="in a pass, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    batches = [(torch.randn(BATCH, 3, 224, 224), torch.arange(BATCH)) for _ in range(given.images // BATCH)]
    names, _ = choose(TokenReader(model), None)

    @torch.inference_mode()
    def plain() -> None:
        for images, _ in batches:
            model(images)

    ways = {"network": plain, "network again": plain}
    ways["extract"] = lambda: extract(model, batches, names, images=given.images)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for run in ways.values():
        run()
    for _ in range(given.rounds):
        for name in order.sample(list(ways), len(ways)):
            begun = now()
            ways[name]()
            seconds[name].append(since(begun).cpu)
    found = {}
    for name in ("network again", "extract"):
        pairs = zip(seconds["network"], seconds[name], strict=True)
        low, median, high = ratio([alone / other for alone, other in pairs])
        found[name] = {"low": low, "median": median, "high": high}
        print(f"{name}: {median:.3f} ({low:.3f} to {high:.3f}) times the images a second of the network alone")
    if given.json:
        result = {
            "speed": found,
            "readouts": names,
            "images": given.images,
            "rounds": given.rounds,
            "least": LEAST,
            "environment": environment() | {"threads": 1},
        }
        write_record(given.json, result)
    return int(found["extract"]["median"] < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
