"""Is there a file that is neither read nor refused in one line? The targets of tests/test_fuzz.py, with many examples.

    nice -n 19 python benchmarks/fuzz.py --examples 10000 --json benchmarks/records/fuzz.json      # an hour or more

Targets that the file already has from the same command are not tried again, so an interrupted soak continues.
Exit status: 0 if every example of every target is handled, 1 otherwise; what is not handled is printed.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from fuzz_strategies import TARGETS, Target  # noqa: E402  as the tests use them
from mpvg.files import write_json  # noqa: E402
from mpvg.runs.environment import environment  # noqa: E402

MAX_LINE = 3000
"""Characters of a line of a traceback that are kept; an example may have many more."""


def main() -> int:
    """Tries, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="of each target")
    parser.add_argument("--only", default="", help="targets whose names contain this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    targets = finished(given.json, given.examples, given.seed)
    for name in (name for name in TARGETS if given.only in name and name not in targets):
        targets[name] = attempt(TARGETS[name], given.examples, given.seed)
        print(f"{name:45s} {targets[name]['examples']:6d} examples, {targets[name]['seconds']:7.1f} s", flush=True)
        print(targets[name]["problem"] or "", end="", flush=True)
        if given.json:
            result = {"asked for": given.examples, "seed": given.seed, "targets": targets, "environment": environment()}
            write_json(given.json, result)
    return any(found["problem"] for found in targets.values())


def finished(file: Path | None, examples: int, number: int) -> dict[str, Any]:
    """The targets that the same command has already tried without finding a problem, from its file."""
    if file is None or not file.exists():
        return {}
    before = json.loads(file.read_text())
    if (before["asked for"], before["seed"]) != (examples, number):
        return {}
    return {name: found for name, found in before["targets"].items() if not found["problem"]}


def attempt(target: Target, examples: int, number: int) -> dict[str, Any]:
    """Tries a target; the problem is the traceback of the smallest example that is not handled."""
    tried = 0

    def check(example: object) -> None:
        nonlocal tried
        tried += 1
        target.check(example)

    started, problem = time.process_time(), ""
    options = settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    run: Callable[[], None] = seed(number)(options(given(target.examples)(check)))
    try:
        run()
    except Exception:
        problem = "".join(f"{line[:MAX_LINE]}\n" for line in traceback.format_exc().splitlines())
    return {"examples": tried, "seconds": time.process_time() - started, "problem": problem}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
