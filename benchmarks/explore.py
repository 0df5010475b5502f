"""How long does the page of `mpvg explore` take to answer?

    python benchmarks/explore.py --json benchmarks/records/explore.json        # a minute

One DeiT-Tiny at 224 pixels with MPVG, 1,000 classes and random weights, on all cores of this machine. Timed are

    answer    one change of a factor: the forward pass, the norms, r of every layer, and the HTML of them
    browser   from a key on a slider in Chromium to the new answer on the page, the server in the same process

Exit status: 0 if the median of `browser` is below 300 ms, else 1.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import sync_playwright
from predict import make_images, make_run
from timing import write_record

from mpvg import runs
from mpvg.analysis.explore import Changes, ExploredRun
from mpvg.analysis.explore_page import layer_by_layer, what_is_said
from mpvg.cli import explorer
from mpvg.runs.environment import environment

LIMIT = 0.3
CHANGED = "before => (document.querySelectorAll('.explored table')[1]?.textContent ?? before) !== before"
"""The table of the layers, where a place that is switched off is compared with another PE; 1,000 probabilities of a
network that was never trained may be the same in two digits."""


def answers(explored: ExploredRun, image: Path, count: int) -> list[float]:
    """Seconds of each answer, without a browser."""
    selected = explored.read(image)
    plain, found = explored.predict(selected.input), []
    for number in range(count + 2):
        begun = time.perf_counter()
        now = explored.predict(selected.input, Changes(factors={"3": 0.5 + 0.01 * number}))
        what_is_said(explored, selected, now, plain)
        layer_by_layer(now, plain)
        found.append(time.perf_counter() - begun)
    return found[2:]


def in_browser(explored: ExploredRun, image: Path, count: int) -> list[float]:
    """Seconds from a key to what it changes."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    found = []
    with (
        explorer.own_environment(),
        explorer.launched(explorer.build([explored], ["DeiT-Tiny"])) as address,
        sync_playwright() as browsers,
    ):
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=file]").set_input_files(image)
        page.wait_for_selector(".explored table")
        page.get_by_label("range slider for Factor, layer 3").focus()
        for number in range(count + 2):
            before = page.locator(".explored table").nth(1).text_content()
            begun = time.perf_counter()
            page.keyboard.press("End" if number % 2 else "Home")
            page.wait_for_function(CHANGED, arg=before, polling=5)
            found.append(time.perf_counter() - begun)
        browser.close()
    return found[2:]


def measure(count: int) -> dict[str, Any]:
    """All numbers of the record."""
    with tempfile.TemporaryDirectory() as root:
        images = Path(root) / "images"
        images.mkdir()
        make_images(images, 1)
        explored = ExploredRun(runs.load(make_run(Path(root) / "run", "deit_tiny_patch16_224")))
        image = images / "0.jpg"
        return {"answer": answers(explored, image, count), "browser": in_browser(explored, image, count)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    measured = measure(given.answers)
    medians = {name: statistics.median(values) for name, values in measured.items()}
    for name, values in measured.items():
        print(f"{name}: median {1000 * medians[name]:.0f} ms, largest {1000 * max(values):.0f} ms of {len(values)}")
    if given.json:
        record = {"medians": medians, "limit": LIMIT, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        record |= {"seconds": measured, "environment": environment()}
        write_record(given.json, record)
    return 0 if medians["browser"] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
