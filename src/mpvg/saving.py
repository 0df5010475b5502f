"""How a run gets onto the disk: every file whole or not at all, checkpoints with their hashes, the newest few kept."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from mpvg.models.checkpoints import read_tensors

Which = Literal["last", "best"]
KEPT = 2
"""Newest checkpoints that are kept, besides the best one: the newest, and one to fall back to."""
CHECKSUMS = "checksums.json"


class Damaged(ValueError):
    """A checkpoint's files are not what was written."""


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Adds one line to the run's metrics.

    Raises:
        OSError: it cannot be written, for a full disk say.
    """
    file = path / "metrics.jsonl"
    try:
        with file.open("a") as lines:
            lines.write(json.dumps(values) + "\n")
            lines.flush()
            os.fsync(lines.fileno())  # it must not be lost where the checkpoint that follows it is kept
    except OSError as error:
        raise _cannot_write(file, error) from error


def cut_metrics(path: Path, step: int) -> None:
    """Drops the lines after a step, which a resumed run writes again, and a line that was cut off.

    Raises:
        ValueError: a line is no JSON.
    """
    kept = [values for values in read_metrics(path) if values["step"] <= step]
    write_whole(path / "metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs in a run's metrics, oldest first, without a line that was cut off.

    Raises:
        ValueError: a line is no JSON.
    """
    file = path / "metrics.jsonl"
    found = []
    for number, line in enumerate(_whole_lines(file), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged (line {number}: {error}); restore it from a copy of the run"
            ) from error
    return found


def save_checkpoint(
    path: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, best: bool
) -> None:
    """Writes a checkpoint, makes it the newest (and the best, if it is), and removes those that are no longer kept.

    Args:
        path: the run folder.
        step: optimizer steps done.
        tensors: file stem -> named tensors.
        state: JSON-safe values.
        best: whether it is the best so far, too.

    Raises:
        OSError: it cannot be written, for a full disk say; the previous checkpoint is untouched.
    """
    root = path / "checkpoints"
    folder, writing = root / f"step-{step:08d}", root / ".writing"
    assert not (root / "last").is_symlink() or os.readlink(root / "last") != folder.name, (
        "the newest is never rewritten"
    )
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        hashes = {}
        for name, content in _files(tensors, state):  # one at a time: each is as large as what it holds
            # Of what was meant to be written: read back, it would come from the cache.
            hashes[name] = hashlib.sha256(content).hexdigest()
            _write_synced(writing / name, content)
            del content
        _write_synced(writing / CHECKSUMS, json.dumps(hashes).encode())
        shutil.rmtree(folder, ignore_errors=True)  # left behind by a process that died before it was the newest
        writing.rename(folder)
        if best:  # before it is the newest: once it is, a resumed run does not come here again
            _point(root / "best", folder.name)
        _point(root / "last", folder.name)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        previous = os.readlink(root / "last") if (root / "last").is_symlink() else "none"
        raise OSError(
            error.errno,
            f"cannot save step {step} in {root} ({error.strerror or error}); the previous checkpoint ({previous}) "
            f"is kept; make room, then continue with `mpvg train --resume {path}`",
        ) from error
    remove_unused(path)


def _files(tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    yield "state.json", json.dumps(state).encode()
    for stem, named in tensors.items():
        whole = {name: tensor.contiguous() for name, tensor in named.items()}  # the format has no strides
        yield f"{stem}.safetensors", safetensors.torch.save(whole)


def remove_unused(path: Path) -> None:
    """Removes the checkpoints that are neither the best nor among the newest few, and those after the newest."""
    root = path / "checkpoints"
    used = {os.readlink(root / name) for name in ("last", "best") if (root / name).is_symlink()}
    used |= set(_down_from_newest(root)[:KEPT])
    for old in root.glob("step-*"):
        if old.name not in used:
            shutil.rmtree(old)


def _down_from_newest(root: Path) -> list[str]:
    """Names of the checkpoints, the newest first, whether it is there or not."""
    newest = os.readlink(root / "last") if (root / "last").is_symlink() else "last"
    older = [folder.name for folder in root.glob("step-*") if _step(folder.name) < _step(newest)]
    return [newest, *sorted(older, key=_step, reverse=True)]


def _step(name: str) -> int:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 10**9  # a link that was damaged, or copied as a folder, has no number


def has_checkpoint(path: Path, which: Which = "last") -> bool:
    """Whether a run folder, which need not exist, holds a checkpoint, whole or not."""
    return os.path.lexists(path / "checkpoints" / which)


def checkpoint_folder(path: Path, which: Which = "last") -> Path:
    """The folder of the newest or the best checkpoint.

    Raises:
        FileNotFoundError: the run has none yet.
    """
    if not has_checkpoint(path, which):
        raise FileNotFoundError(f"{path} has no {which!r} checkpoint; it stopped before the first was saved")
    return path / "checkpoints" / which


def newest_whole(path: Path) -> tuple[str, list[Damaged]]:
    """The name of the newest checkpoint that is whole, "last" if it is that, and what is wrong with newer ones.

    Raises:
        Damaged: none is whole; it says what is wrong with the newest.
        FileNotFoundError: the run has none yet.
    """
    problems: list[Damaged] = []
    for name in ["last", *_down_from_newest(checkpoint_folder(path).parent)[1:]]:
        try:
            load_checkpoint(path, name)
        except Damaged as problem:
            problems.append(problem)
        else:
            return name, problems
    others = f", and so {'is' if len(problems) == 2 else 'are'} {len(problems) - 1} older" if problems[1:] else ""
    raise Damaged(
        f"{problems[0]}{others}; restore it from a copy of the run, or train a new run with another --out"
    ) from problems[0]


def go_back_to(path: Path, name: str) -> None:
    """Makes an older checkpoint the newest; later ones are given up, the best one too if it is among them."""
    root = path / "checkpoints"
    _point(root / "last", name)
    if (root / "best").is_symlink() and _step(os.readlink(root / "best")) > _step(name):
        (root / "best").unlink()


def load_checkpoint(path: Path, name: str = "last") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint: file stem -> named tensors, and the state.

    Args:
        path: the run folder.
        name: which one, a name in its folder `checkpoints`.

    Raises:
        Damaged: a file of it is missing or is not what was written.
        FileNotFoundError: the run has none yet.
    """
    folder = checkpoint_folder(path).with_name(name)
    _verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(f"{folder / 'state.json'} is damaged ({error})") from error
    try:
        # Copies: the file's own memory would keep its room on the disk taken for as long as the run goes on.
        tensors = {
            file.stem: {name: tensor.clone() for name, tensor in read_tensors(file).items()}
            for file in sorted(folder.glob("*.safetensors"))
        }
    except ValueError as error:
        raise Damaged(str(error).removesuffix("; use another checkpoint")) from error
    return tensors, state


def verify(folder: Path, names: Sequence[str]) -> None:
    """Checks files of a run's newest or best checkpoint against their hashes; an old one has none, and passes.

    Raises:
        Damaged: one is missing or is not what was written; it names an older checkpoint, which is not taken unasked.
    """
    try:
        _verify(folder, names)
    except Damaged as problem:
        ways = ["restore it from a copy of the run"]
        path, own = folder.parents[1], folder.resolve().name
        other = folder.with_name("last" if folder.name == "best" else "best")
        if other.is_dir() and other.resolve().name != own:
            ways.append(f"give --checkpoint {other.name}")
        older = next((name for name in _down_from_newest(folder.parent) if _step(name) < _step(own)), None)
        if older is not None and folder.name == "last":
            removed = f"remove {path / 'summary.json'}, and " if (path / "summary.json").exists() else ""
            ways.append(f"go back to {older}: {removed}`mpvg train --resume {path}` trains on from there")
        raise Damaged(f"{problem}; {', or '.join(ways)}") from problem


def _verify(folder: Path, names: Sequence[str] | None = None) -> None:
    """Checks all files, or some, against the hashes in a checkpoint's folder, if it has them."""
    if not folder.is_dir():
        raise Damaged(f"{folder} is damaged (it is missing)")
    file = folder / CHECKSUMS
    try:
        if not file.exists():  # saved by a version that wrote none
            return
        hashes: dict[str, str] = json.loads(file.read_text())
        for name, expected in hashes.items():
            if names is None or name in names:
                file = folder / name
                with file.open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                        raise Damaged(f"{file} is damaged (its SHA-256 is not the one in {CHECKSUMS})")
    except Damaged:
        raise
    except (AttributeError, ValueError) as error:
        raise Damaged(f"{file} is damaged ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):  # the others, a permission say, are no damage
            raise
        raise Damaged(f"{file} is damaged ({error.strerror})") from error


def write_json(path: Path, values: Any) -> None:
    """Writes one JSON value, whole or not at all."""
    write_whole(path, (json.dumps(values) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        OSError: it cannot be written, for a full disk say.
    """
    writing = hidden(path)
    try:
        _write_synced(writing, content)
        writing.replace(path)
    except OSError as error:
        writing.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def hidden(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.writing")


def _cannot_write(path: Path, error: OSError) -> OSError:
    """The error with the file and the next step, both of which the system's own lacks."""
    begun = (path.parent / "config.yaml").is_file()
    onward = f"continue with `mpvg train --resume {path.parent}`" if begun else "give the same command again"
    return OSError(error.errno, f"cannot write {path} ({error.strerror or error}); make room, then {onward}")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _point(link: Path, target: str) -> None:
    writing = hidden(link)
    writing.unlink(missing_ok=True)
    writing.symlink_to(target)
    writing.replace(link)


def _whole_lines(file: Path) -> Iterator[str]:
    if file.is_file():
        text = file.read_text()
        yield from text[: text.rfind("\n") + 1].splitlines()
