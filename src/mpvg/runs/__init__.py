"""Run folders: what a run leaves on the disk, and how it is read back."""

from mpvg.runs.run import Run as Run
from mpvg.runs.run import create_run as create_run
from mpvg.runs.run import ensure_new_run_dir as ensure_new_run_dir
from mpvg.runs.run import load as load
