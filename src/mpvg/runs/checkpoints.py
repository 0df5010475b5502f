"""Checkpoints of a run folder: complete or absent, with the hashes of their files, the newest few kept.

RUN/checkpoints/step-<n>/{model,ema,optimizer}.safetensors, state.json, checksums.json
RUN/checkpoints/last, best -> step-<n>
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from torch import Tensor

from mpvg.models.checkpoints import read_tensors
from mpvg.runs.files import atomic_symlink, write_synced

Which = Literal["last", "best"]
KEEP_LAST = 2
"""Number of newest checkpoints that are kept, besides the best one: the newest, and one to fall back to."""
CHECKSUMS = "checksums.json"


class CorruptCheckpointError(ValueError):
    """A checkpoint's files are not what was written."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem -> named tensors."""
    state: dict[str, Any]
    """JSON-safe values."""


class LatestCheckpoint(NamedTuple):
    """The newest valid checkpoint of a run."""

    name: str
    """Its name in the folder `checkpoints`; "last" where it is the newest of all."""
    checkpoint: Checkpoint
    problems: list[CorruptCheckpointError]
    """What is wrong with newer ones."""


def save_checkpoint(path: Path, step: int, checkpoint: Checkpoint, *, best: bool) -> None:
    """Writes a checkpoint, makes it the newest (and the best, if it is), and removes those that are no longer kept.

    Args:
        path: the run folder.
        step: optimizer steps done.
        checkpoint: what to write.
        best: whether it is also the best so far.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the previous checkpoint is unchanged.
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
        for name, content in _files(checkpoint):  # one at a time, to hold one file in memory
            # Of the bytes in memory: bytes that are read back would come from the cache.
            hashes[name] = hashlib.sha256(content).hexdigest()
            write_synced(writing / name, content)
            del content
        write_synced(writing / CHECKSUMS, json.dumps(hashes).encode())
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died before this was the newest
        writing.rename(folder)
        if best:  # before "last": once that is set, a resumed run does not save this step again
            atomic_symlink(root / "best", folder.name)
        atomic_symlink(root / "last", folder.name)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        previous = os.readlink(root / "last") if (root / "last").is_symlink() else "none"
        raise OSError(
            error.errno,
            f"cannot save step {step} in {root} ({error.strerror or error}); the previous checkpoint ({previous}) "
            f"is kept; make room, then continue with `mpvg train --resume {path}`",
        ) from error
    remove_unused(path)


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    yield "state.json", json.dumps(checkpoint.state).encode()
    for stem, named in checkpoint.tensors.items():
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}  # the format has no strides
        yield f"{stem}.safetensors", safetensors.torch.save(contiguous)


def remove_unused(path: Path) -> None:
    """Removes the checkpoints that are neither the best nor among the newest few, and those after the newest."""
    root = path / "checkpoints"
    used = {os.readlink(root / name) for name in ("last", "best") if (root / name).is_symlink()}
    used |= set(_newest_first(root)[:KEEP_LAST])
    for old in root.glob("step-*"):
        if old.name not in used:
            shutil.rmtree(old)


def _newest_first(root: Path) -> list[str]:
    """Names of the checkpoints, newest first; the first one may be missing."""
    newest = os.readlink(root / "last") if (root / "last").is_symlink() else "last"
    older = [folder.name for folder in root.glob("step-*") if _step(folder.name) < _step(newest)]
    return [newest, *sorted(older, key=_step, reverse=True)]


def _step(name: str) -> int:
    digits = name.removeprefix("step-")
    return (
        int(digits) if digits.isdecimal() else 10**9
    )  # a damaged link, or one that was copied as a folder, has no number


def has_checkpoint(path: Path, which: Which = "last") -> bool:
    """Whether a run folder, which need not exist, holds a checkpoint, valid or not."""
    return os.path.lexists(path / "checkpoints" / which)


def checkpoint_folder(path: Path, which: Which = "last") -> Path:
    """The folder of the newest or the best checkpoint.

    Raises:
        FileNotFoundError: the run has none yet.
    """
    if not has_checkpoint(path, which):
        raise FileNotFoundError(f"{path} has no {which!r} checkpoint; it stopped before the first was saved")
    return path / "checkpoints" / which


def latest_valid_checkpoint(path: Path) -> LatestCheckpoint:
    """Reads the newest checkpoint that is valid.

    Raises:
        CorruptCheckpointError: none is valid; it says what is wrong with the newest.
        FileNotFoundError: the run has none yet.
    """
    problems: list[CorruptCheckpointError] = []
    for name in ["last", *_newest_first(checkpoint_folder(path).parent)[1:]]:
        try:
            return LatestCheckpoint(name, read_checkpoint(path, name), problems)
        except CorruptCheckpointError as problem:
            problems.append(problem)
    others = f", and so {'is' if len(problems) == 2 else 'are'} {len(problems) - 1} older" if problems[1:] else ""
    raise CorruptCheckpointError(
        f"{problems[0]}{others}; restore it from a copy of the run, or train a new run with another --out"
    ) from problems[0]


def rollback_to(path: Path, name: str) -> None:
    """Makes an older checkpoint the newest; later ones are discarded, including the best one if it is later."""
    root = path / "checkpoints"
    atomic_symlink(root / "last", name)
    if (root / "best").is_symlink() and _step(os.readlink(root / "best")) > _step(name):
        (root / "best").unlink()


def read_checkpoint(path: Path, name: str = "last") -> Checkpoint:
    """Reads a checkpoint; each file is read and hashed once.

    Args:
        path: the run folder.
        name: which one, a name in its folder `checkpoints`.

    Raises:
        CorruptCheckpointError: a file of it is missing or is not what was written.
        FileNotFoundError: the run has none yet.
    """
    folder = checkpoint_folder(path).with_name(name)
    if not folder.is_dir():
        raise CorruptCheckpointError(f"{folder} is damaged (it is missing)")
    hashes = _read_checksums(folder)
    names = hashes or [file.name for file in (folder / "state.json", *sorted(folder.glob("*.safetensors")))]
    contents = {name: _read_file(folder / name, hashes) for name in names}
    try:
        state = json.loads(contents.pop("state.json"))
    except (KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{folder / 'state.json'} is damaged ({error})") from error
    try:
        tensors = {Path(name).stem: read_tensors(folder / name, contents.pop(name)) for name in sorted(contents)}
    except ValueError as error:
        raise CorruptCheckpointError(str(error).removesuffix("; use another checkpoint")) from error
    return Checkpoint(tensors, state)


def verify(folder: Path, names: Sequence[str]) -> None:
    """Checks files of a run's newest or best checkpoint against their hashes; one without hashes is old and passes.

    Raises:
        CorruptCheckpointError: one is missing or is not what was written; the message names an older checkpoint, which
            is not used unasked.
    """
    try:
        hashes = _read_checksums(folder)
        for name in names:
            if name in hashes:
                _read_file(folder / name, hashes)
    except CorruptCheckpointError as problem:
        ways = ["restore it from a copy of the run"]
        path, own = folder.parents[1], folder.resolve().name
        other = folder.with_name("last" if folder.name == "best" else "best")
        if other.is_dir() and other.resolve().name != own:
            ways.append(f"give --checkpoint {other.name}")
        older = next((name for name in _newest_first(folder.parent) if _step(name) < _step(own)), None)
        if older is not None and folder.name == "last":
            removed = f"remove {path / 'summary.json'}, and " if (path / "summary.json").exists() else ""
            ways.append(f"go back to {older}: {removed}`mpvg train --resume {path}` continues from there")
        raise CorruptCheckpointError(f"{problem}; {', or '.join(ways)}") from problem


def _read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256; empty for a checkpoint of a version that wrote none."""
    if not folder.is_dir():
        raise CorruptCheckpointError(f"{folder} is damaged (it is missing)")
    file = folder / CHECKSUMS
    if not file.exists():
        return {}
    try:
        hashes = json.loads(_read_file(file, {}))
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is damaged ({error})") from error
    if not isinstance(hashes, dict):
        raise CorruptCheckpointError(f"{file} is damaged (it holds no hashes)")
    return hashes


def _read_file(file: Path, hashes: Mapping[str, str]) -> bytes:
    """A file's bytes, checked against its hash, if there is one."""
    try:
        content = file.read_bytes()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):  # others, such as a missing permission, are not damage
            raise
        raise CorruptCheckpointError(f"{file} is damaged ({error.strerror})") from error
    if file.name in hashes and hashlib.sha256(content).hexdigest() != hashes[file.name]:
        raise CorruptCheckpointError(f"{file} is damaged (its SHA-256 is not the one in {CHECKSUMS})")
    return content
