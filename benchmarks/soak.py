"""Does a run that is killed at any moment, again and again, end with the bits of one that was not?

    python benchmarks/soak.py --kills 50 --pair_kills 10 --json benchmarks/records/soak.json

SIGKILLs a training run on digits, with loader workers, at random moments of its whole life, start-up included, and
resumes it; once it is complete the next run is begun, until so many kills are counted. The same with two processes
under torchrun, all of whose processes are killed at once. Every run's weights, averaged weights, optimizer, metrics
and summary are compared with those of a run that nothing happened to. Exits with 1 if any differ.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timing import write_record

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "tests" / "shared")]

from conftest import kill_below, read_record, torchrun  # noqa: E402  what the tests of single kills use
from mpvg.runs.environment import environment  # noqa: E402

WORKERS = 2
OPTIONS = {
    "data": "digits",
    "model": "vit_mini_patch2_8",
    "epochs": 3,
    "batch_size": 128,
    "save_steps": 4,
    "ema_decay": 0.9,
    "network.drop_path": 0.2,
    "optim.warmup_epochs": 1,
    "threads": 1,
    "device": "cpu",
}


@dataclass
class Soak:
    """One number of processes: how often runs were killed, and what came of them."""

    processes: int
    kills: int = 0
    runs: int = 0
    different: list[list[str]] = field(default_factory=list)
    """What differs, of each run where something does."""
    steps: list[int] = field(default_factory=list)
    """Newest step that was saved, at each kill."""
    largest: int = 0
    """Most processes that a kill met, launcher and loader workers included."""
    seconds: float = 0.0


def main() -> int:
    """Soaks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of one process with its workers")
    parser.add_argument("--pair_kills", type=int, default=10, help="of two processes under torchrun")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "digits")
        for processes, kills in ((1, given.kills), (2, given.pair_kills)):
            if kills:
                found.append(soak(Path(folder), data, processes, kills, moments))
    print(
        f"{'processes':>9s} {'kills':>6s} {'runs':>5s} {'same bits':>10s} {'most killed at once':>20s} {'seconds':>8s}"
    )
    for row in found:
        same = f"{row.runs - len(row.different)}/{row.runs}"
        print(f"{row.processes:9d} {row.kills:6d} {row.runs:5d} {same:>10s} {row.largest:20d} {row.seconds:8.0f}")
    if given.json:
        result = {
            "soak": [asdict(row) for row in found],
            "options": OPTIONS | {"loader.workers": WORKERS},
            "seed": given.seed,
            "environment": environment(),
        }
        write_record(given.json, result)
    return int(any(row.different for row in found))


def write_images(root: Path) -> Path:
    """Digits as a folder of image files: a set that lies in memory has no loader workers."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, name) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = root / ("val" if number % 5 == 0 else "train") / str(name) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(file)
    return root


def soak(folder: Path, data: Path, processes: int, kills: int, moments: random.Random) -> Soak:
    """Kills runs until `kills` are counted; the last one is brought to its end."""
    given = OPTIONS | {"data": data, "recipe": "folder", "network.img_size": 8, "loader.workers": WORKERS}
    command = ["train", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
    row, begun = Soak(processes), time.monotonic()
    whole = folder / f"whole-{processes}"
    start(processes, [*command, "--out", str(whole)], None)
    life, expected = time.monotonic() - begun, read_record(whole)
    while row.kills < kills:
        out = folder / f"run-{processes}-{row.runs}"
        while not (out / "summary.json").exists():
            begun_before = (out / "config.yaml").exists()
            onwards = ["train", "--resume", str(out)] if begun_before else [*command, "--out", str(out)]
            killed = start(processes, onwards, moments.uniform(0, life) if row.kills < kills else None)
            if killed:
                row.kills, row.largest = row.kills + 1, max(row.largest, killed)
                link = out / "checkpoints/last"
                row.steps.append(int(os.readlink(link).removeprefix("step-")) if link.is_symlink() else 0)
        actual = read_record(out)
        row.runs += 1
        if different := [name for name in expected | actual if expected.get(name) != actual.get(name)]:
            row.different.append(different)
            print(f"{out.name} differs: {', '.join(different)}", file=sys.stderr)
        print(f"{processes} process(es): {row.kills}/{kills} kills, {row.runs} runs", flush=True)
    row.seconds = round(time.monotonic() - begun, 1)
    return row


def start(processes: int, arguments: list[str], seconds: float | None) -> int:
    """Runs `mpvg` to its end, or kills it and all below it after so many seconds; returns how many were killed."""
    launcher = torchrun(processes) if processes > 1 else [sys.executable, "-m", "mpvg"]
    variables: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launcher, *arguments], env=variables, **quiet) as process:
        try:
            said = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            return kill_below(process.pid)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
