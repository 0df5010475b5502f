"""What a user names as images: files, folders and globs."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpvg.data.folder import images_below
from mpvg.data.rules import IMAGE_ENDINGS, is_image
from mpvg.validation import shown


@dataclass(frozen=True)
class ImageFile:
    """An image file that was named, by itself or by its folder."""

    path: str
    name: str
    """What is written about it is called so: its path below the folder that was named."""


def find_images(paths: Sequence[str]) -> list[ImageFile]:
    """The image files that paths name, in the order of the paths, and below a folder 2 before 10.

    A path that is there is taken as it is, whatever its ending; of a folder and a glob, the image files count.

    Args:
        paths: of files, of folders, which are searched at any depth, or globs such as "photos/**/*.jpg".

    Raises:
        ValueError: a folder has no image, or nothing matches a glob.
        OSError: a folder cannot be read.
    """
    return [image for path in paths for image in _find(path)]


def _find(path: str) -> list[ImageFile]:
    if os.path.isdir(path):
        found = list(_below(path))
        if not found:
            raise ValueError(
                f"folder {path} has no images; allowed endings: {', '.join(IMAGE_ENDINGS)}; give another folder"
            )
        return found
    if os.path.lexists(path) or not glob.has_magic(path):
        return [ImageFile(path, os.path.basename(path))]  # a missing one is said when it is read
    root = _fixed_part(path)
    found = []
    for match in sorted(glob.glob(path, recursive=True)):
        if not os.path.isdir(match):
            found += [ImageFile(match, os.path.relpath(match, root))] if is_image(match) else []
        elif "**" not in path:  # which matches the files in it, too
            found += [
                ImageFile(image.path, os.path.join(os.path.relpath(match, root), image.name)) for image in _below(match)
            ]
    if not found:
        raise ValueError(f"no image matches {shown(path)}; allowed endings: {', '.join(IMAGE_ENDINGS)}")
    return found


def _below(folder: str) -> Iterator[ImageFile]:
    for name in images_below(Path(folder)):
        yield ImageFile(os.path.join(folder, name), name)


def _fixed_part(pattern: str) -> str:
    """The folder of a glob down to its first part with a wildcard."""
    parts = pattern.split(os.sep)
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return os.sep.join(parts[:fixed]) or (os.sep if pattern.startswith(os.sep) else os.curdir)


def check_names(images: Sequence[ImageFile]) -> None:
    """Refuses images of which files of the same name would be written.

    Raises:
        ValueError: naming two of them.
    """
    seen: dict[str, str] = {}
    for image in images:
        if image.name in seen:
            raise ValueError(
                f"files about {seen[image.name]} and {image.path} would both be called {image.name}; give the folder "
                "that holds both, or predict them one after the other with another --out"
            )
        seen[image.name] = image.path
