"""Are a million files listed in 20 seconds?

    python benchmarks/listing.py --files 100000 1000000 --json benchmarks/records/listing.json   # two cores, 5 minutes

Makes a training set of so many empty image files in 1000 class folders, and a tar file of the same names, in a
temporary folder, and times what a run does with each before it reads an image: list, hash, compress. The files' entries
are in the file system's cache, as they were just made. Each form is timed in `--rounds` processes of their own, and the
limit is on the median wall time of the largest set, so the machine must be quiet: CPU time, which is printed beside it,
says whether it was.

Exit status: 0 if the limit holds, 2 if it does not.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import write_record

from mpvg.config import RunConfig
from mpvg.data import open_listing
from mpvg.runs.environment import environment

LIMIT = 20.0
CLASSES = 1000


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made; the system's folder for temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a data set, which this process lists
    given = parser.parse_args()
    if given.one:
        print(json.dumps(list_once(given.one)))
        return 0
    results = []
    for count in given.files:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            make_data(Path(folder), count)
            for form in ("folder", "tar"):
                results.append({"form": form, "files": count, **measure(Path(folder) / form, given.rounds)})
                line = "{form:8s} {files:9,d} files {seconds:7.2f} s {cpu_seconds:7.2f} s of CPU {megabytes:6.0f} MB"
                print(line.format(**results[-1]), flush=True)
    result = {"results": results, "limit": LIMIT, "classes": CLASSES, "environment": environment()}
    write_record(given.json, result)
    slowest = max(r["seconds"] for r in results if r["files"] == max(given.files))
    print(f"{slowest:.1f} s, limit {LIMIT:.0f} s")
    return 0 if slowest <= LIMIT else 2


def make_data(root: Path, count: int) -> None:
    """The forms folder/train/<class>/<number>.jpg and tar/train.tar, and val with two of the classes."""
    for name in ("train", "val"):
        number = count if name == "train" else 2
        folders = [root / "folder" / name / f"class{c:04d}" for c in range(min(CLASSES, number))]
        for folder in folders:
            folder.mkdir(parents=True)
        (root / "tar").mkdir(exist_ok=True)
        with tarfile.open(root / "tar" / f"{name}.tar", "w") as archive:
            for n in range(number):
                folder = folders[n % len(folders)]
                (folder / f"image_{n:07d}.jpg").touch()
                archive.members.clear()  # it would keep a million of them
                archive.addfile(tarfile.TarInfo(f"./{folder.name}/image_{n:07d}.jpg"))


def measure(data: Path, rounds: int) -> dict[str, Any]:
    """Medians over processes that list the set, each once."""
    command = [sys.executable, __file__, "--one", str(data)]
    each = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    return {key: statistics.median(one[key] for one in each) for key in each[0]} | {"each": each}


def list_once(data: str) -> dict[str, float]:
    """Seconds and memory of a listing of both splits."""
    config = RunConfig(data=data, model="none", epochs=1, batch_size=1, lr=1.0, recipe="none")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, used = time.perf_counter(), time.process_time()
    open_listing(config)
    taken, cpu = time.perf_counter() - begun, time.process_time() - used
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": taken, "cpu_seconds": cpu, "megabytes": memory}


if __name__ == "__main__":
    sys.exit(main())
