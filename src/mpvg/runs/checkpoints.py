"""Checkpoints of a run folder: complete or absent, with the hashes of their files, the newest few kept.

RUN/checkpoints/step-<n>/{model,ema,optimizer}.safetensors, state.json, checksums.json
RUN/checkpoints/last, best -> step-<n>, see `pointers`

What is read here may come from anywhere: a checkpoint is what its hashes say, all of it, or it is damaged.
"""

import contextlib
import errno
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors.torch
import torch
from torch import Tensor

from mpvg.files import CHECKSUMS, STATE, memory_bytes, read_regular, remove, write_new
from mpvg.models.checkpoints import read_tensors
from mpvg.runs.pointers import (
    pointed_folder,
    read_pointer,
    step_name,
    step_names,
    step_number,
    write_pointer,
)
from mpvg.runs.reading import MAX_JSON_BYTES, RESTORE
from mpvg.validation import parse_json, printable, shown

Which = Literal["last", "best"]
SELECTED: dict[Which, str] = {"last": "", "best": " (selected on its validation set)"}
"""What is to be said of the weights, by which."""
KEEP_LAST = 2
"""Number of newest checkpoints that are kept, besides the best one: the newest, and one to fall back to."""
_NAME = re.compile(r"state\.json|[a-z_]+\.safetensors", re.ASCII)
_NONE_SAVED = "it stopped before the first was saved, or was copied without it"
_DAMAGE = (errno.ENOENT, errno.EIO, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG)
"""Errors of reading that mean damage; others, such as a missing permission, do not."""


def describe_weights(which: Which, *, ema: bool) -> str:
    """Which weights of a run, in words."""
    return f"{'averaged, ' if ema else ''}{which}{SELECTED[which]}"


class CorruptCheckpointError(ValueError):
    """A checkpoint's files are not what was written."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem -> named tensors."""
    state: dict[str, Any]
    """JSON-safe values."""


Check = Callable[[str, Checkpoint], None]


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
    folder, writing = root / step_name(step), root / ".writing"
    assert read_pointer(root, "last") != folder.name, "the newest is never rewritten"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove(writing)
        writing.mkdir()  # fails where anything has the name
        hashes = {}
        for name, content in _files(checkpoint):  # one at a time, to hold one file in memory
            # Of the bytes in memory: bytes that are read back would come from the cache.
            hashes[name] = hashlib.sha256(content).hexdigest()
            write_new(writing / name, content)
            del content
        write_new(writing / CHECKSUMS, json.dumps(hashes).encode())
        remove(folder)  # of a process that died before this was the newest
        writing.rename(folder)
        if best:  # before "last": once that is set, a resumed run does not save this step again
            write_pointer(root, "best", folder.name)
        write_pointer(root, "last", folder.name)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(writing)
        raise OSError(
            error.errno,
            f"cannot save step {step} in {root} ({error.strerror or error}); the previous checkpoint "
            f"({read_pointer(root, 'last') or 'none'}) "
            f"is kept; make room, then continue with `mpvg train --resume {path}`",
        ) from error
    remove_unused(path)


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    yield STATE, json.dumps(checkpoint.state).encode()
    for stem, named in checkpoint.tensors.items():
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}  # the format has no strides
        yield f"{stem}.safetensors", safetensors.torch.save(contiguous)


def remove_unused(path: Path) -> None:
    """Removes the checkpoints that are neither the best nor among the newest few, and those after the newest."""
    root = path / "checkpoints"
    used = {read_pointer(root, "last"), read_pointer(root, "best"), *_newest_first(root)[:KEEP_LAST]}
    for name in step_names(root):
        if name not in used:
            remove(root / name)


def _newest_first(root: Path) -> list[str]:
    """Names of the checkpoints, newest first; the first one may be missing."""
    newest = read_pointer(root, "last")
    number = step_number(newest) if newest else None
    older = [name for name in step_names(root) if number is None or (step_number(name) or 0) < number]
    return [newest or "last", *older]


def has_checkpoint(path: Path) -> bool:
    """Whether a run folder, which need not exist, holds a checkpoint, valid or not."""
    root = path / "checkpoints"
    return read_pointer(root, "last") is not None or bool(step_names(root))


def has_best(path: Path) -> bool:
    """Whether a run folder holds the best checkpoint and says which it is."""
    folder = pointed_folder(path / "checkpoints", "best")
    return folder is not None and folder.is_dir()


def checkpoint_folder(path: Path, which: Which = "last", *, quiet: bool = False) -> Path:
    """The folder of the newest or the best checkpoint; a warning says so where it is known by its number only.

    Raises:
        FileNotFoundError: the run has none yet, or it is not known which one is the best.
    """
    root = path / "checkpoints"
    folder = pointed_folder(root, which)
    if folder is not None:
        return folder
    saved = step_names(root)
    if not saved:
        raise FileNotFoundError(f"{path} has no {which!r} checkpoint; {_NONE_SAVED}")
    if which == "last":
        if not quiet:
            warn(f"{root / which} is missing; taking {saved[0]}, the newest there is")
        return root / saved[0]
    raise FileNotFoundError(
        f"{root / which} is missing, and {path / 'metrics.jsonl'} names none of {', '.join(saved)} as the best; "
        "restore it from a copy of the run, or give --checkpoint last"
    )


def warn(text: str) -> None:
    """Prints a warning."""
    print(f"mpvg: warning: {printable(text)}", file=sys.stderr)


def latest_valid_checkpoint(path: Path, check: Check | None = None) -> LatestCheckpoint:
    """Reads the newest checkpoint that is valid.

    Args:
        path: the run folder.
        check: raises ValueError for a checkpoint whose content is not what the run saves; it counts as damaged. It is
            given the name of the folder, too.

    Raises:
        CorruptCheckpointError: none is valid; it says what is wrong with the newest.
        FileNotFoundError: the run has none yet.
    """
    root = path / "checkpoints"
    _ensure_any(path)
    problems: list[CorruptCheckpointError] = []
    for name in ["last", *_newest_first(root)[1:]]:
        try:
            checkpoint = read_checkpoint(path, name)
            if check is not None:
                _apply(check, checkpoint, root / name)
            return LatestCheckpoint(name, checkpoint, problems)
        except CorruptCheckpointError as problem:
            problems.append(problem)
    others = f", and so {'is' if len(problems) == 2 else 'are'} {len(problems) - 1} older" if problems[1:] else ""
    raise CorruptCheckpointError(
        f"{problems[0]}{others}; restore it from a copy of the run, or train a new run with another --out"
    ) from problems[0]


def _ensure_any(path: Path) -> None:
    if not has_checkpoint(path):
        raise FileNotFoundError(f"{path} has no checkpoint; {_NONE_SAVED}")


def _apply(check: Check, checkpoint: Checkpoint, folder: Path) -> None:
    try:
        check(read_pointer(folder.parent, folder.name) or folder.name, checkpoint)
    except ValueError as error:
        raise CorruptCheckpointError(f"{folder} is damaged ({error})") from error


def rollback_to(path: Path, name: str) -> None:
    """Makes an older checkpoint the newest; later ones are discarded, including the best one if it is later."""
    root = path / "checkpoints"
    write_pointer(root, "last", name)
    best = read_pointer(root, "best")
    if best is not None and (step_number(best) or 0) > (step_number(name) or 0):
        remove(root / "best")


def read_checkpoint(path: Path, name: str = "last") -> Checkpoint:
    """Reads a checkpoint; each file is read and hashed once.

    Args:
        path: the run folder.
        name: which one, a name in its folder `checkpoints`.

    Raises:
        CorruptCheckpointError: a file of it is missing or is not what was written.
        FileNotFoundError: the run has none yet.
    """
    _ensure_any(path)
    root = path / "checkpoints"
    folder = pointed_folder(root, name) if name in get_args(Which) else root / name
    if folder is None or not folder.is_dir():
        raise CorruptCheckpointError(f"{root / name} is damaged (it is missing)")
    hashes = _read_checksums(folder)
    contents = {name: _read_file(folder / name, hashes) for name in hashes}
    try:
        state = parse_json(contents.pop(STATE), finite=False)
    except ValueError as error:
        raise CorruptCheckpointError(f"{folder / STATE} is damaged ({error})") from error
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{folder / STATE} is damaged (it holds no keys)")
    tensors = {Path(name).stem: _read_tensors(folder / name, contents.pop(name)) for name in sorted(contents)}
    return Checkpoint(tensors, state)


def _read_tensors(file: Path, content: bytes) -> Mapping[str, Tensor]:
    try:
        tensors = read_tensors(file, content)
    except (ValueError, RuntimeError) as error:  # RuntimeError: of a type of numbers that torch cannot compute with
        raise CorruptCheckpointError(str(error).removesuffix("; use another checkpoint")) from error
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise CorruptCheckpointError(f"{file} is damaged ({name} is no dense tensor with values of its own)")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and has a number in memory for each of its elements."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def verify(folder: Path, names: Sequence[str]) -> None:
    """Checks files of a run's newest or best checkpoint against their hashes.

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
        raise CorruptCheckpointError(f"{problem}; {', or '.join(_ways_on(folder))}") from problem


def _ways_on(folder: Path) -> list[str]:
    """What to do about a damaged checkpoint."""
    path, root = folder.parents[1], folder.parent
    names = {which: read_pointer(root, which) for which in get_args(Which)}
    own = names.get(folder.name) or folder.name
    ways = [RESTORE]
    other = "last" if own == names["best"] != names["last"] else "best"
    if names[other] not in (None, own) and (root / str(names[other])).is_dir():
        ways.append(f"give --checkpoint {other}")
    older = next((name for name in step_names(root) if (step_number(name) or 0) < (step_number(own) or 0)), None)
    if older is not None and other == "best":
        removed = f"remove {path / 'summary.json'}, and " if (path / "summary.json").exists() else ""
        ways.append(f"go back to {older}: {removed}`mpvg train --resume {path}` continues from there")
    return ways


def _read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of exactly the files of the folder; hidden ones are those of file managers."""
    if not folder.is_dir():
        raise CorruptCheckpointError(f"{folder} is damaged (it is missing)")
    file = folder / CHECKSUMS
    try:
        hashes = parse_json(_read_file(file, {}))
    except CorruptCheckpointError:
        raise
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is damaged ({error})") from error
    if not isinstance(hashes, dict) or STATE not in hashes:
        raise CorruptCheckpointError(f"{file} is damaged (it does not hold the hashes of {STATE} and the weights)")
    for name, value in hashes.items():
        if not _NAME.fullmatch(name) or not isinstance(value, str):
            raise CorruptCheckpointError(f"{file} is damaged ({shown(name)} is no file of one, or has no hash)")
    for entry in sorted(folder.iterdir()):
        if entry.name not in hashes and entry.name != CHECKSUMS and not entry.name.startswith("."):
            raise CorruptCheckpointError(f"{entry} is damaged (it is not one of the files in {CHECKSUMS}: remove it)")
    return hashes


def _read_file(file: Path, hashes: Mapping[str, str]) -> bytes:
    """A file's bytes, checked against its hash, if there is one."""
    limit = MAX_JSON_BYTES if file.suffix == ".json" else memory_bytes()
    try:
        content = read_regular(file, limit)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CorruptCheckpointError(f"{file} is damaged ({error.strerror})") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is damaged ({error})") from error
    if file.name in hashes and hashlib.sha256(content).hexdigest() != hashes[file.name]:
        raise CorruptCheckpointError(f"{file} is damaged (its SHA-256 is not the one in {CHECKSUMS})")
    return content
