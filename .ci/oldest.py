"""Runs a part of the tests with the oldest versions that pyproject.toml allows (`make oldest`).

make oldest                              # the tests below
.venv/bin/python .ci/oldest.py TEST...   # others
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_delivery.py", "tests/test_config.py", "tests/test_statistics.py", "tests/models/test_fold.py"]
TESTS += ["tests/test_cli.py", "tests/test_tutorials.py"]
TOOLS = ["pytest", "hypothesis", "packaging"]
"""Their own oldest versions do not matter."""


def oldest(requirement: str) -> str:
    """A requirement at its lower bound: `pillow>=11,<13` becomes `pillow==11`."""
    found = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no lower bound; write NAME>=VERSION")
    return f"{found[1]}=={found[2]}"


def pins(project: dict) -> list[str]:
    """The oldest versions of what `pip install mpvg[all]` asks for, of pyproject.toml's [project]."""
    extras = project["optional-dependencies"]
    (every,) = extras["all"]
    named = re.findall(r"\w+", every.partition("[")[2])
    return [oldest(line) for line in [*project["dependencies"], *(line for name in named for line in extras[name])]]


def main(tests: list[str]) -> int:
    """Installs and tests; returns pytest's exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/venv/bin/python"
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        print("== oldest:", *pins(project), flush=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *pins(project), *TOOLS], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", str(ROOT)], check=True)
        # An old matplotlib uses what a new pyparsing calls deprecated: pip takes the newest of what nobody pins.
        warned = ["-W", "default::DeprecationWarning"]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *warned, *(tests or TESTS)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
