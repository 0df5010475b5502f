"""Plausible bugs, put into a copy of the package one at a time: each must make a test fail.

    make mutants                                  # all of them, a few minutes each core
    python tests/mutations.py --only "part of a name"

Prints a line per mutation, and exits with 1 if one survives. tests/test_mutations.py checks that all still apply.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One bug."""

    name: str
    file: str
    """Below src/mpvg."""
    old: str
    """Text that occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """Test files that must notice, fastest first."""


def load() -> list[Mutation]:
    """The mutations in mutations.json."""
    values = json.loads(Path(__file__).with_suffix(".json").read_text())
    return [Mutation(**value | {"tests": tuple(value["tests"])}) for value in values]


def survives(mutation: Mutation) -> bool:
    """Whether all of its tests pass with the bug in the package."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "docs", "results", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        file = copy / "src/mpvg" / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        for test in mutation.tests:
            ended = subprocess.run([*command, test], cwd=copy, env=environment, capture_output=True, check=False)
            if ended.returncode == 1:
                return False
            assert ended.returncode == 0, f"{mutation.name}: pytest {test} ended with {ended.returncode}"
    return True


def main() -> int:
    """Runs them, prints what became of each, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose names contain this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (default: one per core)")
    given = parser.parse_args()
    chosen = [mutation for mutation in load() if given.only in mutation.name]
    survivors = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for mutation, alive in zip(chosen, pool.map(survives, chosen), strict=True):
            survivors += alive
            print(f"{'SURVIVED' if alive else 'killed':9s} {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
