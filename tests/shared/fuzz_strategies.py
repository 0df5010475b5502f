"""What is tried on everything that reads files of others: valid files with edits, other values, and bytes.

A `Target` is a strategy for examples and what is done with one; another kind of file gets a module like fuzz_runs.py
and its entries here. tests/test_fuzz.py tries a few examples of each target, and benchmarks/fuzz.py as many as are
asked for.
"""

from fuzz_flags import command_line
from fuzz_runs import run_folder
from fuzz_tars import tar_files
from fuzz_values import Target as Target
from fuzz_weights import checkpoints

TARGETS: dict[str, Target] = run_folder() | command_line() | tar_files() | checkpoints()
