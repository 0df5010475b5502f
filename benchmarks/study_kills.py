"""Does a study that is killed at any moment, again and again, lose or double a run?

    python benchmarks/study_kills.py --kills 30 --json benchmarks/records/study_kills.json

SIGKILLs `mpvg study` and its workers at random moments of its whole life, start-up included, and gives the same command
again. After each kill the rows that were there are still there, unchanged. Once it is complete the next study is begun,
until so many kills are counted. Each study must have every run once, with the weights of a study that nothing happened
to. Exits with 1 if one has not.
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

from timing import write_record

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "tests" / "shared")]

from conftest import kill_below  # noqa: E402  what the tests of single kills use
from mpvg.runs.environment import environment  # noqa: E402
from mpvg.study.ledger import LEDGER, Row, read_ledger  # noqa: E402
from study_text import TEXT  # noqa: E402  the study of the tests: three arms, two seeds

WORKERS = 2
EPOCHS = 2


@dataclass
class Kills:
    """How often studies were killed, and what came of them."""

    kills: int = 0
    studies: int = 0
    runs: int = 0
    """In the ledgers of all studies together."""
    rows: list[int] = field(default_factory=list)
    """Rows in the ledger at each kill."""
    torn: int = 0
    """Kills that left a torn last line."""
    faults: list[str] = field(default_factory=list)
    """What was lost, doubled or different."""
    seconds: float = 0.0


def main() -> int:
    """Kills, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), given.kills, random.Random(given.seed))
    print(f"{found.kills} kills, {found.torn} torn lines, {found.studies} studies, {found.runs} runs")
    print(f"{len(found.faults)} faults in {found.seconds:.0f} s", *found.faults, sep="\n")
    if given.json:
        result = {
            "kills": asdict(found),
            "workers": WORKERS,
            "epochs": EPOCHS,
            "seed": given.seed,
            "environment": environment(),
        }
        write_record(given.json, result)
    return int(bool(found.faults))


def soak(folder: Path, kills: int, moments: random.Random) -> Kills:
    """Kills studies until `kills` are counted; the last one is brought to its end."""
    file, found, begun = folder / "mini.yaml", Kills(), time.monotonic()
    file.write_text(TEXT.replace("epochs: 1, batch_size: 700", f"epochs: {EPOCHS}, batch_size: 64"))
    start(file, folder / "whole", None)
    life, expected = time.monotonic() - begun, weights(read_ledger(folder / "whole" / LEDGER))
    while found.kills < kills:
        out = folder / f"study-{found.studies}"
        rows: list[Row] = []
        killed = True
        while killed:
            killed = start(file, out, moments.uniform(0, life) if found.kills < kills else None)
            ledger = out / LEDGER
            now = read_ledger(ledger)
            if now[: len(rows)] != rows:
                found.faults.append(f"{out.name}: a row was lost or changed after kill {found.kills}")
            rows = now
            if killed:
                found.kills += 1
                found.rows.append(len(rows))
                found.torn += ledger.exists() and not ledger.read_bytes().endswith(b"\n") and ledger.stat().st_size > 0
        found.studies += 1
        found.runs += len(rows)
        if weights(rows) != expected:
            found.faults.append(f"{out.name}: its runs or their weights are not those of a study without kills")
        print(f"{found.kills}/{kills} kills, {found.studies} studies", flush=True)
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def weights(rows: list[Row]) -> list[tuple[str, str, int, str | None]]:
    """Each run with the hash of its weights; a run that is there twice is refused when the ledger is read."""
    return sorted((*row.key, row.weights) for row in rows)


def start(file: Path, out: Path, seconds: float | None) -> bool:
    """Runs the study to its end, or kills it and its workers after so many seconds; returns whether it was killed."""
    command = [sys.executable, "-m", "mpvg", "study", str(file), "--out", str(out), "--workers", str(WORKERS)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            kill_below(process.pid)
            return True
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said}")
    return False


if __name__ == "__main__":
    sys.exit(main())
