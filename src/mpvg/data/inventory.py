"""Which samples a split has: their hash, and enough to name the first one that was changed."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

CONTENT = "content:"
"""What precedes a target that is a hash: of boxes, of a label map, ..."""
_MAX_LINE = 2**16


@dataclass(frozen=True)
class Inventory:
    """Target, size and name of each sample of a split, in order: a line each, compressed."""

    hash: str
    """Of the lines, 32 hexadecimal digits."""
    packed: bytes
    """The lines, `<target>\\t<size>\\t<name>`, gzipped; what is compared where hashes differ."""

    @classmethod
    def of(cls, targets: Iterable[object], sizes: Iterable[object], names: Iterable[str]) -> "Inventory":
        """The inventory of samples; for a sample in memory, the hash of its bytes stands for the size."""
        rows = zip(targets, sizes, names, strict=True)
        text = "".join(f"{target}\t{size}\t{_on_one_line(name)}\n" for target, size, name in rows)
        lines = text.encode("utf-8", "surrogateescape")
        return cls(hashlib.sha256(lines).hexdigest()[:32], gzip.compress(lines, 1, mtime=0))


def first_difference(packed: bytes, now: Inventory) -> str:
    """What the first sample that differs was and is, in words.

    Args:
        packed: the lines of the inventory that was kept; untrusted.
        now: what there is now.

    Raises:
        ValueError: they are damaged, or do not differ.
    """
    for number, (old, new) in enumerate(zip_longest(_lines(packed), _lines(now.packed))):
        if old != new:
            names = {_fields(line)[2] for line in _lines(now.packed)}
            return _difference(number, _fields(old), _fields(new), names)
    raise ValueError("it has the samples that there are")


def _lines(packed: bytes) -> Iterator[str]:
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            while line := file.readline(_MAX_LINE):
                yield line.decode("utf-8", "surrogateescape").removesuffix("\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"it is damaged: {error}") from error


def _difference(number: int, old: Sequence[str], new: Sequence[str], names: set[str]) -> str:
    (target, size, name), (new_target, new_size, new_name) = old, new
    if name == new_name:
        if target != new_target and target.startswith(CONTENT):
            return f"{name} has other annotations"
        if target != new_target:
            return f"{name} is of class {new_target} and was of class {target}"
        if size.lstrip("-").isdecimal() and len(size) < 16:
            return f"{name} has {new_size} bytes and had {size}"
        return f"{name} has other contents"
    if not name or name in names:
        return f"{new_name} is new or was elsewhere (it is sample {number})"
    return f"{name} is gone (it was sample {number}, " + (f"which is {new_name} now)" if new_name else "of fewer now)")


def _fields(line: str | None) -> tuple[str, str, str]:
    target, _, rest = (line or "").partition("\t")
    size, _, name = rest.partition("\t")
    return target, size, name


def _on_one_line(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n") if "\n" in name or "\\" in name else name
