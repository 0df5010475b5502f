"""How much memory do annotations take that are as many as COCO's, while they are read and in each worker?

    python benchmarks/coco_annotations.py --json benchmarks/records/coco_annotations.json   # one core, 4 minutes

Makes a data set in COCO's layout with a file like instances_train2017.json: 118,287 images, 860,001 annotations with
polygons of as many points, of which 1 % are crowds with run lengths, 450 MB; the images are empty files. A process of
its own lists it as a run does, and then two forked workers each read the targets of all images. Measured are the peak
of the listing above what the imports take, and what a worker has for itself, which is copied and not shared. Beside it
the same for pycocotools' dictionaries.

Exit status: 0 if the limits hold, 2 if they do not.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import write_record

from mpvg.config import RunConfig
from mpvg.data import open_listing
from mpvg.data.rle import encode_mask
from mpvg.runs.environment import environment

IMAGES, ANNOTATIONS = 118_287, 860_001
MAX_PEAK, MAX_WORKER = 1000.0, 100.0
"""Megabytes."""
_POINTS = 17  # of a polygon, on average: what makes the file as large as COCO's


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--folder", type=Path, help="where the data are made; the system's folder for temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a reader and a data set
    given = parser.parse_args()
    if given.one:
        print(json.dumps(READERS[given.one[0]](given.one[1])))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        file = make_data(Path(folder), given.images)
        megabytes = file.stat().st_size / 2**20
        print(f"{given.images:,} images, {megabytes:.0f} MB of JSON")
        results = []
        for reader in READERS:
            command = [sys.executable, __file__, "--one", reader, folder]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            results.append({"reader": reader, **found})
            line = "{reader:11s} {seconds:6.1f} s, peak {peak:6.0f} MB, kept {kept:5.0f} MB, worker {worker:6.0f} MB"
            print(line.format(**results[-1]), flush=True)
    ours = results[0]
    result = {
        "results": results,
        "images": given.images,
        "annotations": count(given.images),
        "json_megabytes": megabytes,
    }
    result |= {"limits": {"peak": MAX_PEAK, "worker": MAX_WORKER}, "environment": environment()}
    write_record(given.json, result)
    return 0 if ours["peak"] <= MAX_PEAK and ours["worker"] <= MAX_WORKER else 2


def count(images: int) -> int:
    """Annotations of so many images."""
    return images * ANNOTATIONS // IMAGES


def make_data(root: Path, images: int) -> Path:
    """A data set in COCO's layout; returns its file of annotations."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    path = root / "annotations" / "instances_train2017.json"
    crowd = np.zeros((480, 640), bool)
    crowd[::24, 100:400] = crowd[50:300, ::30] = True
    run_lengths = {"counts": encode_mask(crowd).decode(), "size": [480, 640]}
    license = "http://images.example.org/photographs/by/number"
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for number in range(images):
            name = f"{number:012d}.jpg"
            (root / "train2017" / name).touch()
            record = {"license": 1, "file_name": name, "coco_url": f"{license}/{name}", "height": 480, "width": 640}
            record |= {"date_captured": "2013-11-14 16:28:13", "flickr_url": f"{license}/{name}", "id": number}
            file.write((", " if number else "") + json.dumps(record))
        file.write('], "annotations": [')
        owners = np.sort(rng.integers(0, images, count(images)))
        for number, owner in enumerate(owners.tolist()):
            left, top, width, height = rng.integers(1, 200, 4).tolist()
            points = rng.random((int(rng.integers(3, 2 * _POINTS - 3)), 2)) * [width, height] + [left, top]
            outline: Any = run_lengths if number % 100 == 0 else [points.round(2).ravel().tolist()]
            record = {"segmentation": outline, "area": float(width * height), "iscrowd": int(number % 100 == 0)}
            record |= {"image_id": owner, "bbox": [left, top, width, height], "category_id": number % 80 + 1}
            file.write((", " if number else "") + json.dumps(record | {"id": number + 1}))
        categories = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def measure(read: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """Seconds, peak and what is kept of a reading, and the memory of its own of a forked worker; megabytes."""
    before, used = peak(), own("Rss")
    begun = time.perf_counter()
    read_all = read()
    seconds, highest, kept = time.perf_counter() - begun, peak() - before, own("Rss") - used
    reading, writing = os.pipe()
    children = []
    for _ in range(2):  # two, so that memory that both read is seen to be shared
        child = os.fork()
        if child == 0:
            start = own("Private_Dirty")
            read_all()
            os.write(writing, f"{own('Private_Dirty') - start:.1f}\n".encode())
            time.sleep(5)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    workers = [float(line) for line in os.read(reading, 1000).split()]
    return {"seconds": seconds, "peak": highest, "kept": kept, "worker": max(workers)}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own(kind: str) -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1]) / 1024


def read_arrays(folder: str) -> dict[str, float]:
    """As a run reads them."""
    config = RunConfig(data=f"coco/{folder}", model="none", epochs=1, batch_size=1, lr=1.0, recipe="none")

    def read() -> Callable[[], Any]:
        targets: Any = open_listing(config, ("train",)).source("train").targets  # type: ignore[attr-defined]
        return lambda: [float(target.boxes.sum()) + sum(map(len, target.outlines)) for target in targets]

    return measure(read)


def read_dictionaries(folder: str) -> dict[str, float]:
    """As pycocotools does."""
    import contextlib
    import io

    from pycocotools.coco import COCO

    def read() -> Callable[[], Any]:
        with contextlib.redirect_stdout(io.StringIO()):
            found = COCO(f"{folder}/annotations/instances_train2017.json")
        return lambda: [found.loadAnns(found.getAnnIds([image])) for image in found.getImgIds()]

    return measure(read)


READERS = {"mpvg": read_arrays, "pycocotools": read_dictionaries}

if __name__ == "__main__":
    sys.exit(main())
