"""Files that appear completely or not at all: written under a temporary name, synced, and renamed."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Writes one JSON value atomically."""
    atomic_write(path, (json.dumps(values) + "\n").encode())


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    temporary = temp_path(path)
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def atomic_symlink(link: Path, target: str) -> None:
    """Makes a symbolic link, or points an existing one elsewhere, atomically."""
    temporary = temp_path(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def temp_path(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.writing")


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def cannot_write(path: Path, error: OSError) -> OSError:
    """The error with the file and the next step, which the system's own message lacks."""
    begun = (path.parent / "config.yaml").is_file()
    next_step = f"continue with `mpvg train --resume {path.parent}`" if begun else "give the same command again"
    return OSError(error.errno, f"cannot write {path} ({error.strerror or error}); make room, then {next_step}")
