"""Folders of small images, and their tar files."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def png(value: int = 0) -> bytes:
    """An image of one color, which tells it from others."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 255 - value, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, names: dict[str, list[str]]) -> Path:
    """Files below root/<split>, each image of its own color."""
    number = 0
    for split, files in names.items():
        for name in files:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number := number + 1))
    return root


def pack(root: Path, packed: Path, prefix: str = "./", splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Each split as a tar file, with `{}` in the prefix for the split's name."""
    packed.mkdir(exist_ok=True)
    for split in splits:
        with tarfile.open(packed / f"{split}.tar", "w") as archive:
            for path in sorted((root / split).rglob("*")):
                archive.add(path, prefix.format(split) + str(path.relative_to(root / split)), recursive=False)
    return packed
