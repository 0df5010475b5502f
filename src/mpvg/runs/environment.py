"""What the numbers of a run may depend on: versions, commit, hardware, threads."""

import contextlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on."""
    packages = ("mpvg", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of the source in use, with "-dirty" where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may be inside another checkout
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return None


def made_with() -> str:
    """Commit (or, of an installed package, its version), hardware and torch in one line, for the end of a page."""
    found = commit()
    source = f"mpvg {metadata.version('mpvg')}" if found is None else f"Commit {found}"
    return f"{source}, {hardware()}, torch {torch.__version__}"


def hardware() -> str:
    """One line: processor, cores, memory, GPUs."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB", *gpus])
