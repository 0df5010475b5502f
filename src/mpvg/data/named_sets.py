"""Readers of the named data sets; their files are untrusted: nothing in them is executed, all values are checked."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mpvg.data.canvas_files import TILES, made_once, read_tiles, write_tiles
from mpvg.data.canvas_scenes import Sources
from mpvg.data.cells import Cells
from mpvg.data.inert_pickle import InertArray, load_inert
from mpvg.data.rules import open_bounded, read_bounded
from mpvg.data.types import Contents, Split, Tensors

CACHE = Path("~/.cache/mpvg")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

Bytes = npt.NDArray[np.uint8]
FileNames = tuple[str, ...]


@dataclass(frozen=True)
class NamedSet:
    """The reader of a named set, and its mean and standard deviation for values in [0, 1]."""

    read: Callable[[str | None, Sequence[Split]], Contents]
    """Reads some splits from a folder, or from the usual places."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    place_is_class: bool = False
    """Whether augmentation that moves what is in an image would change its class."""


def read_digits(root: str | None, splits: Sequence[Split]) -> Contents:
    """Reads scikit-learn's 1797 handwritten digits, 8x8, values 0..16 stretched to 0..255.

    The set comes without a split. Ours: `train_test_split` with 360 test images, the same share of each digit in both
    parts, random_state 0. It must never change, or results before and after could not be compared.

    Args:
        root: not used; the images are part of scikit-learn.
        splits: which splits to return.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data 'digits' needs scikit-learn ({error}); pip install scikit-learn") from error

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    train_x, val_x, train_y, val_y = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    names = tuple(str(name) for name in digits.target_names)
    parts: dict[Split, Tensors] = {
        "train": _split(train_x, train_y, 10, "digits"),
        "val": _split(val_x, val_y, 10, "digits"),
    }
    return Contents(names, **{split: parts[split] for split in splits})


def read_fashion_mnist(root: str | None, splits: Sequence[Split]) -> Contents:
    """Reads Fashion-MNIST (28x28 gray, 60,000 + 10,000) from IDX files, two for each split, gzipped or not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    places = [CACHE / "fashion-mnist", DEBIAN]
    if root is not None:
        places = [Path(root), Path(root, "FashionMNIST", "raw"), *places]
    stems = {"train": "train", "val": "t10k"}
    pairs = {split: (f"{stems[split]}-images-idx3-ubyte", f"{stems[split]}-labels-idx1-ubyte") for split in splits}
    how = f"apt-get install dataset-fashion-mnist, or {_download('FashionMNIST')}"
    files = tuple(file for pair in pairs.values() for file in pair)
    folder, _ = _find("fashion-mnist", [(place, files) for place in places], how)
    parts = {
        split: _split(
            _read_idx(folder / images, (28, 28))[:, None], _read_idx(folder / labels, ()), 10, folder / labels
        )
        for split, (images, labels) in pairs.items()
    }
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return Contents(names, **parts)


@dataclass(frozen=True)
class Cifar:
    """Names of the files and fields of a CIFAR set; called, it reads them (32x32 RGB, 50,000 + 10,000).

    The binary version is preferred; the python version is read by an unpickler that builds numbers, text, lists and
    arrays of bytes, and nothing else.
    """

    name: str
    binary_folder: str
    binary_meta: str
    pickle_folder: str
    pickle_meta: str
    names_key: str
    label_key: str
    batches: tuple[str, ...]
    """Files of the training set, and at the end the one of the test set."""
    label_bytes: int
    """Labels before the pixels of a binary record, of which the last one counts."""
    num_classes: int

    def __call__(self, root: str | None, splits: Sequence[Split]) -> Contents:
        """Reads some splits of the set.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or its pickle asks for anything but arrays.
        """
        wanted: dict[Split, FileNames] = {"train": self.batches[:-1], "val": self.batches[-1:]}
        stems = [stem for split in splits for stem in wanted[split]]
        binary, pickles = (*(f"{stem}.bin" for stem in stems), self.binary_meta), (*stems, self.pickle_meta)
        candidates = []
        for place in ([] if root is None else [Path(root)]) + [CACHE / self.name]:
            candidates += [(place / self.binary_folder, binary), (place, binary)]
            candidates += [(place / self.pickle_folder, pickles), (place, pickles)]
        how = f"{_download(self.name.upper())}, or unpack the binary version ({self.binary_folder}) there"
        folder, (*_, meta) = _find(self.name, candidates, how)
        is_binary = meta == self.binary_meta
        read, ending = (self._read_binary, ".bin") if is_binary else (self._read_pickle, "")
        parts = {}
        for split in splits:
            found = [read(folder / f"{stem}{ending}") for stem in wanted[split]]
            parts[split] = Tensors(torch.cat([p.images for p in found]), torch.cat([p.targets for p in found]))
        return Contents(self._class_names(folder / meta), **parts)

    def _read_binary(self, path: Path) -> Tensors:
        body = np.frombuffer(_read_whole(path), np.uint8)
        record = self.label_bytes + 3072
        if len(body) == 0 or len(body) % record:
            raise ValueError(f"{path} has {len(body)} bytes; a whole file has a multiple of {record}; get it again")
        rows = body.reshape(-1, record)
        images = rows[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        return _split(images, rows[:, self.label_bytes - 1], self.num_classes, path)

    def _read_pickle(self, path: Path) -> Tensors:
        values = _load_pickle(path)
        data, labels = values.get("data"), values.get(self.label_key)
        data = data.to_numpy() if isinstance(data, InertArray) else None
        if data is None or data.shape[1:] != (3072,):
            raise ValueError(f"{path} must hold 'data', a uint8 array (N, 3072); get it again")
        if not isinstance(labels, list) or not all(label in range(self.num_classes) for label in labels):
            raise ValueError(
                f"{path} must hold {self.label_key!r}, a list of 0 to {self.num_classes - 1}; get it again"
            )
        return _split(data.reshape(-1, 3, 32, 32), labels, self.num_classes, path)

    def _class_names(self, path: Path) -> tuple[str, ...]:
        if path.name == self.binary_meta:
            names: Any = _read_whole(path).decode("utf-8", "replace").split()
        else:
            names = _load_pickle(path).get(self.names_key)
        if (
            not isinstance(names, list)
            or len(names) != self.num_classes
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"{path} must hold the names of {self.num_classes} classes; get it again")
        return tuple(names)


_CIFAR10 = Cifar(
    name="cifar10",
    binary_folder="cifar-10-batches-bin",
    binary_meta="batches.meta.txt",
    pickle_folder="cifar-10-batches-py",
    pickle_meta="batches.meta",
    names_key="label_names",
    label_key="labels",
    batches=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    label_bytes=1,
    num_classes=10,
)
_CIFAR100 = Cifar(
    name="cifar100",
    binary_folder="cifar-100-binary",
    binary_meta="fine_label_names.txt",
    pickle_folder="cifar-100-python",
    pickle_meta="meta",
    names_key="fine_label_names",
    label_key="fine_labels",
    batches=("train", "test"),
    label_bytes=2,
    num_classes=100,
)

# Empty: of the names without a word for them.
CANVAS_OBJECTS: dict[str, tuple[Callable[[str | None, Sequence[Split]], Contents], bool]] = {
    "": (read_digits, False),
    "garments": (read_fashion_mnist, True),
}
"""What objects of `canvas` are -> the reader of their images, and whether all that is not 0 is inside an object."""


def cache_folder(root: str | None) -> Path:
    """Where files are kept that are made once."""
    return Path(os.path.expanduser(CACHE if root is None else root))


def canvas_sources(
    objects: str, root: str | None, splits: Sequence[Split]
) -> tuple[tuple[str, ...], dict[Split, Sources]]:
    """Class names, and the images that objects of `canvas` are made from: those of each split are its own."""
    read, solid = CANVAS_OBJECTS[objects]
    contents = read(root, splits)
    parts = {split: getattr(contents, split) for split in splits}
    found = {s: Sources(part.images[:, 0].numpy(), part.targets.numpy(), solid) for s, part in parts.items()}
    return contents.class_names, found


@dataclass(frozen=True)
class CanvasTiles:
    """Single objects of `canvas`, 64x64 in three equal colors, for the pre-training of classifiers.

    Those for training are made from the source images of the training scenes only.
    """

    objects: str
    """See `CANVAS_OBJECTS`."""

    def __call__(self, root: str | None, splits: Sequence[Split]) -> Contents:
        """Reads some splits of the set, which is drawn at the first use; errors as those of the source images."""

        def prepare() -> Callable[[Path], None]:
            _, sources = canvas_sources(self.objects, root, ("train", "val"))
            return partial(write_tiles, sources=sources, counts=TILES)

        folder = made_once(cache_folder(root), f"canvas-tiles-{self.objects}".removesuffix("-"), prepare)
        names = CANVAS_OBJECTS[self.objects][0](root, ("val",)).class_names
        parts = {}
        for split in splits:
            images, labels = read_tiles(folder, split)
            gray = _split(images[:, None], labels, len(names), folder)
            parts[split] = gray._replace(images=gray.images.expand(-1, 3, -1, -1))
        return Contents(names, **parts)


NAMED_SETS = {
    "digits": NamedSet(read_digits, (0.3054,), (0.3760,)),
    "fashion-mnist": NamedSet(read_fashion_mnist, (0.2860,), (0.3530,)),
    "cifar10": NamedSet(_CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": NamedSet(_CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # Normalized as the scenes are, for which these networks are trained.
    "canvas-tiles": NamedSet(CanvasTiles(""), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "canvas-tiles-garments": NamedSet(CanvasTiles("garments"), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "cells": NamedSet(Cells(read_digits, wanted=0), (0.3052,), (0.3766,), place_is_class=True),
    "cells-garments": NamedSet(
        Cells(read_fashion_mnist, wanted=8, shrink=2), (0.2833,), (0.3292,), place_is_class=True
    ),
}
DATASETS = tuple(NAMED_SETS)
"""Names of the embedded sets, and of those that are made from them."""


def _download(dataset: str) -> str:
    code = f"import torchvision; torchvision.datasets.{dataset}('data', download=True)"
    return f'python -c "{code}" and then --loader.root data'


def _find(name: str, candidates: Sequence[tuple[Path, FileNames]], how: str) -> tuple[Path, FileNames]:
    """The first folder that has all of the files, plain or gzipped."""
    # os.path's leaves ~ as it is where there is no home; pathlib's raises.
    candidates = [(Path(os.path.expanduser(folder)), files) for folder, files in candidates]
    for folder, files in candidates:
        if all((folder / file).is_file() or (folder / f"{file}.gz").is_file() for file in files):
            return folder, files
    places = ", ".join(dict.fromkeys(str(folder) for folder, _ in candidates))
    needed = ", ".join(candidates[0][1])
    raise FileNotFoundError(f"data {name!r} ({needed}) was not found in any of {places}; to get it: {how}")


def _split(images: Bytes, targets: "npt.NDArray[Any] | list[int]", classes: int, where: object) -> Tensors:
    labels = torch.tensor(targets, dtype=torch.int64)
    if len(labels) != len(images):
        raise ValueError(f"{where}: {len(images)} images but {len(labels)} labels; get it again")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{where}: labels must be 0 to {classes - 1}, got {labels.unique().tolist()}; get it again")
    return Tensors(torch.tensor(images), labels)


def _read_idx(path: Path, item: tuple[int, ...]) -> Bytes:
    """Reads an IDX file of bytes: a magic number 0x0000080n, n sizes, the values; all sizes big-endian.

    Args:
        path: the plain file; where it does not exist, the same with .gz.
        item: shape that one item must have.

    Returns:
        Array (N, *item), N up to 60,000: a header that claims more is refused, so that it cannot fill the memory.
    """
    zipped = path.with_name(f"{path.name}.gz")
    dims = 1 + len(item)
    try:
        with path.open("rb") if path.is_file() else gzip.open(zipped) as file:
            magic, *shape = struct.unpack(f">{1 + dims}I", file.read(4 * (1 + dims)))
            if magic != 0x0800 + dims:
                raise ValueError(f"{path} starts with {magic:#010x}, not {0x0800 + dims:#010x}; get the right file")
            if tuple(shape[1:]) != item or not 0 < shape[0] <= 60_000:
                raise ValueError(f"{path} claims the shape {tuple(shape)}; allowed: {('1 to 60000', *item)}")
            body = file.read(math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if len(body) != math.prod(shape):
        raise ValueError(f"{path} is damaged: it must hold {math.prod(shape)} values after its header; get it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read_whole(path: Path) -> bytes:
    with open_bounded(path) as file:
        return read_bounded(file, path)


def _load_pickle(path: Path) -> dict[str, Any]:
    body = _read_whole(path)
    try:
        values = load_inert(body)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is refused: {reason}; get it again, or use the binary version") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is refused: it must hold a dict, not a {type(values).__name__}; get it again")
    return values
