"""Compares a method of your own with one of the paper's, over seeds, with intervals and tests.

python compare_methods.py FOLDER
"""

import sys
from pathlib import Path

from mpvg.study.folder import make_folder
from mpvg.study.plan import parse_study
from mpvg.study.results import collect
from mpvg.study.runner import work
from mpvg.study.tables import as_text, write_tables

# The question, the smallest differences that matter and the comparison are fixed before the first run.
STUDY = """
study: flat
question: Does PVG need its chain, or does the same PE for every layer do?
reference: pvg
margins: {nll: 0.03, accuracy: 0.01}
arms:
  pvg: {label: PVG, set: {method: pvg}}
  flat: {label: "PVG, flat", set: {method: {first_layer: 1, hierarchical: false}}}  # the fields of a DeliverySpec
contrasts:
  pvg_over_flat: {weights: {pvg: 1, flat: -1}, claim: The chain makes PVG better.}
scales:
  tiny:
    digits: {label: digits, recipe: digits, set: {epochs: EPOCHS, threads: 1, device: cpu}, seeds: SEEDS}
"""


def main(out: Path, epochs: int = 10, seeds: int = 5) -> list[str]:
    """Returns the table and the verdicts, line by line."""
    text = STUDY.replace("EPOCHS", str(epochs)).replace("SEEDS", str(seeds))
    study = parse_study(text.encode(), "compare_methods.py")
    folder = make_folder(out, study, "tiny")
    work(folder.path)  # here, one run after another; mpvg.study.runner.run_study takes several processes
    lines = as_text(collect(study, "tiny", folder.rows()))
    print("\n".join(lines))
    print("written:", *write_tables(folder.path))
    return lines


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
