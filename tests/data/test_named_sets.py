"""Readers of the named sets, on small files in the real layouts, whole and damaged."""

import gzip
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpvg.config import RunConfig
from mpvg.data import Shard, named_sets, open_data, open_listing
from mpvg.data.factory import SPLITS
from mpvg.data.named_sets import NAMED_SETS
from mpvg.data.types import Split

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def no_installed_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the machine's own data sets."""
    monkeypatch.setattr(named_sets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(named_sets, "DEBIAN", tmp_path / "debian")


def write_idx(path: Path, values: np.ndarray[Any, Any], magic: int | None = None) -> None:
    magic = 0x0800 + values.ndim if magic is None else magic
    body = struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


def write_fashion(folder: Path, suffix: str = ".gz") -> dict[str, np.ndarray[Any, Any]]:
    """Writes 30 training and 20 test images; returns the arrays by file name."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for stem, size in (("train", 30), ("t10k", 20)):
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = rng.integers(0, 10, size, dtype=np.uint8)
    for name, values in arrays.items():
        write_idx(folder / f"{name}{suffix}", values)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["root", "root/FashionMNIST/raw", "cache/fashion-mnist", "debian"])
def test_fashion_mnist_round_trip(tmp_path: Path, suffix: str, place: str) -> None:
    arrays = write_fashion(tmp_path / place, suffix)
    raw = NAMED_SETS["fashion-mnist"].read(str(tmp_path / "root"), SPLITS)
    for split, stem in ((raw.train, "train"), (raw.val, "t10k")):
        assert split.images.dtype == torch.uint8
        assert split.targets.dtype == torch.int64
        assert np.array_equal(split.images.numpy()[:, 0], arrays[f"{stem}-images-idx3-ubyte"])
        assert np.array_equal(split.targets.numpy(), arrays[f"{stem}-labels-idx1-ubyte"])
    assert len(raw.class_names) == 10
    assert raw.class_names[0] == "T-shirt/top"


def test_fashion_mnist_opens(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    write_fashion(tmp_path / "root")
    data = open_data(make_config("fashion-mnist", root=tmp_path / "root", img_size=14), Shard(torch.device("cpu")))
    images, _ = next(data.train.epoch())
    assert images.shape == (8, 1, 14, 14)
    assert (data.info.train_size, data.info.val_size) == (30, 20)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: write_idx(f / IMAGES, np.zeros((30, 28, 28), np.uint8), 0x0D03), r"0x00000d03, not 0x00000803"),
        (lambda f: write_idx(f / IMAGES, np.zeros((30, 28, 27), np.uint8)), r"claims the shape \(30, 28, 27\)"),
        (lambda f: write_idx(f / IMAGES, np.zeros((0, 28, 28), np.uint8)), r"claims the shape \(0, 28, 28\)"),
        (lambda f: (f / IMAGES).write_bytes(struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)), r"allowed: \('1 to 60000'"),
        (lambda f: truncate(f / IMAGES), r"train-images.* damaged: it must hold 23520 values"),
        (lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes() + b"x"), r"it must hold 23520 values"),
        (lambda f: (f / IMAGES).write_bytes(b"\0\0\10"), r"train-images.* is damaged \(unpack requires"),
        (lambda f: write_idx(f / LABELS, np.zeros(29, np.uint8)), r"train-labels.*: 30 images but 29 labels"),
        (lambda f: write_idx(f / LABELS, np.full(30, 10, np.uint8)), r"labels must be 0 to 9, got \[10\]"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_fashion(tmp_path, "")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        NAMED_SETS["fashion-mnist"].read(str(tmp_path), SPLITS)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"not gzip")])
def test_damaged_gzip_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_fashion(tmp_path, ".gz")
    damage(tmp_path / f"{IMAGES}.gz")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        NAMED_SETS["fashion-mnist"].read(str(tmp_path), SPLITS)


def test_corrupt_deflate_stream_is_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path, ".gz")
    path = tmp_path / f"{LABELS}.gz"
    path.write_bytes(path.read_bytes()[:12] + b"\xff" * 40)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        NAMED_SETS["fashion-mnist"].read(str(tmp_path), SPLITS)


def test_missing_fashion_mnist_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        NAMED_SETS["fashion-mnist"].read(str(tmp_path / "root"), SPLITS)
    message = str(caught.value)
    for part in (
        "data 'fashion-mnist'",
        f"{tmp_path / 'root'},",
        f"{tmp_path / 'root'}/FashionMNIST/raw",
        f"{tmp_path}/cache/fashion-mnist",
        f"{tmp_path}/debian",
        "apt-get install dataset-fashion-mnist",
        "torchvision.datasets.FashionMNIST('data', download=True)",
        "--loader.root",
    ):
        assert part in message


def test_incomplete_folder_is_not_taken(tmp_path: Path) -> None:
    write_fashion(tmp_path / "root")
    (tmp_path / "root" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\) was not found"):
        NAMED_SETS["fashion-mnist"].read(str(tmp_path / "root"), SPLITS)
    write_fashion(tmp_path / "debian")
    assert len(NAMED_SETS["fashion-mnist"].read(str(tmp_path / "root"), SPLITS).val.targets) == 20


@pytest.mark.parametrize("kind", ["fashion-mnist", "cifar10 binary", "cifar10 pickles"])
@pytest.mark.parametrize("corrupt", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_reads_nothing_of_the_other(
    split: Split, corrupt: bool, kind: str, tmp_path: Path, cifar_folder: Path, make_config: Callable[..., RunConfig]
) -> None:
    root = cifar_folder if "binary" in kind else tmp_path / "cifar-10-batches-py"
    if kind == "fashion-mnist":
        write_fashion(root := tmp_path / "fashion")
    elif "pickles" in kind:
        write_pickles(root)
    config = make_config(kind.split()[0], root=root)
    whole = open_listing(config)
    other_files = {"train": ("t10k-*", "test_batch*"), "val": ("train-*", "data_batch_*")}[split]
    others = [path for pattern in other_files for path in root.glob(pattern)]
    assert len(others) in ((2, 1) if split == "train" else (2, 5))
    for path in others:
        path.write_bytes(b"rubbish") if corrupt else path.unlink()
    alone = open_listing(config, (split,), whole.class_names)
    assert (alone.train is None, alone.val is None) == (split == "val", split == "train")
    assert (alone.class_names, alone.in_chans, alone.img_size) == (whole.class_names, whole.in_chans, whole.img_size)
    for ours, theirs in zip(vars(alone.source(split)).values(), vars(whole.source(split)).values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises((FileNotFoundError, ValueError), match=r"was not found in any of|get it again|is refused"):
        open_listing(config)


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_fashion(tmp_path / "sets")
    assert len(NAMED_SETS["fashion-mnist"].read("~/sets", SPLITS).train.targets) == 30


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_binary_round_trip(cifar_folder: Path, inside: bool) -> None:
    raw = NAMED_SETS["cifar10"].read(str(cifar_folder if inside else cifar_folder.parent), SPLITS)
    assert raw.train.images.shape == (50, 3, 32, 32)
    assert raw.val.images.shape == (13, 3, 32, 32)
    records = [(cifar_folder / f"data_batch_{n}.bin").read_bytes() for n in range(1, 6)]
    rows = np.frombuffer(b"".join(records), np.uint8).reshape(50, 3073)
    assert raw.train.targets.tolist() == rows[:, 0].tolist()
    assert raw.train.images[17, 1, 2, 3] == rows[17, 1 + 1024 + 2 * 32 + 3]
    assert raw.class_names[0] == "airplane"
    assert raw.class_names[9] == "truck"


def write_cifar100(folder: Path) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(0).integers(0, 256, (20, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = np.arange(20), 99 - np.arange(20)  # coarse, fine
    folder.mkdir()
    (folder / "train.bin").write_bytes(rows.tobytes())
    (folder / "test.bin").write_bytes(rows[:7].tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine_{n}" for n in range(100)))
    return rows


def test_cifar100_reads_the_fine_label(tmp_path: Path) -> None:
    rows = write_cifar100(tmp_path / "cifar-100-binary")
    raw = NAMED_SETS["cifar100"].read(str(tmp_path), SPLITS)
    assert raw.train.targets.tolist() == rows[:, 1].tolist()
    assert np.array_equal(raw.train.images.numpy().reshape(20, -1), rows[:, 2:])
    assert len(raw.val.targets) == 7
    assert raw.class_names[99] == "fine_99"


def test_damaged_cifar_is_refused(cifar_folder: Path) -> None:
    path = cifar_folder / "data_batch_2.bin"
    whole = path.read_bytes()
    for body, message in (
        (whole[:-1], r"data_batch_2.bin has 30729 bytes; .* multiple of 3073"),
        (b"", "data_batch_2.bin has 0 bytes"),
        (b"\x0a" + whole[1:], r"data_batch_2.bin: labels must be 0 to 9, got \[.*10\]"),
    ):
        path.write_bytes(body)
        with pytest.raises(ValueError, match=message):
            NAMED_SETS["cifar10"].read(str(cifar_folder), SPLITS)
    path.write_bytes(whole)
    (cifar_folder / "batches.meta.txt").write_text("airplane\nbird\n")
    with pytest.raises(ValueError, match=r"batches.meta.txt must hold the names of 10 classes"):
        NAMED_SETS["cifar10"].read(str(cifar_folder), SPLITS)


def test_missing_cifar_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        NAMED_SETS["cifar100"].read(str(tmp_path / "root"), SPLITS)
    message = str(caught.value)
    for part in (
        "data 'cifar100'",
        f"{tmp_path / 'root'}/cifar-100-binary, {tmp_path / 'root'}, {tmp_path / 'root'}/cifar-100-python",
        f"{tmp_path}/cache/cifar100",
        "torchvision.datasets.CIFAR100('data', download=True)",
        "--loader.root",
    ):
        assert part in message


def write_pickles(folder: Path) -> np.ndarray[Any, Any]:
    """Writes CIFAR-10's python version; returns all training pixels (50, 3072)."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    pixels = rng.integers(0, 256, (63, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for n, name in enumerate(names):
        data = pixels[10 * n : 10 * n + (13 if name == "test_batch" else 10)]
        batch = {"batch_label": name, "labels": [n % 10] * len(data), "data": data, "filenames": ["x"] * len(data)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"n{k}" for k in range(10)]}, protocol=2))
    return pixels[:50]


def test_cifar10_pickles_round_trip(tmp_path: Path) -> None:
    pixels = write_pickles(tmp_path / "cifar-10-batches-py")
    raw = NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)
    assert np.array_equal(raw.train.images.numpy().reshape(50, -1), pixels)
    assert raw.train.targets.tolist() == [n for n in range(5) for _ in range(10)]
    assert len(raw.val.targets) == 13
    assert raw.class_names[3] == "n3"


def test_pickle_of_python_2_and_old_numpy_is_read(tmp_path: Path) -> None:
    """The published files: protocol 2, byte strings, numpy.core.multiarray."""
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder)
    body = bytes(range(256)) * 12
    stream = (
        b"\x80\x02}(U\x04dataX\x00\x00\x00\x00"[:-5]
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T"
        + struct.pack("<I", len(body))
        + body
        + b"tbU\x06labels](K\x07eu."
    )
    (folder / "test_batch").write_bytes(stream)
    raw = NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)
    assert raw.val.targets.tolist() == [7]
    assert raw.val.images.flatten().tolist() == list(body)


def test_binary_version_is_preferred(cifar_folder: Path) -> None:
    write_pickles(cifar_folder.parent / "cifar-10-batches-py")
    assert NAMED_SETS["cifar10"].read(str(cifar_folder.parent), SPLITS).class_names[0] == "airplane"


class Touch:
    """Unpickled by an ordinary unpickler, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder)
    trap = tmp_path / "executed"
    hostile = pickle.dumps({"data": Touch(trap)})
    (folder / file).write_bytes(hostile)
    with pytest.raises(ValueError, match=rf"{file} is refused: it asks for posix.mkdir"):
        NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "numpy._core.multiarray\nfromfile", "os\nsystem"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder)
    (folder / "data_batch_1").write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(ValueError, match="data_batch_1 is refused: it asks for"):
        NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "must hold a dict, not a list"),
        ({"labels": [0]}, "must hold 'data', a uint8 array"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [0]}, "it asks for a data type other than uint8"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, "must hold 'data', a uint8 array"),
        ({"data": np.zeros(3072, np.uint8), "labels": [0]}, "must hold 'data', a uint8 array"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["0"]}, "must hold 'labels', a list of 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, "1 images but 2 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "data_batch_3 must hold 'labels', a list of 0 to 9"),
        (
            {"data": np.zeros((1, 3072), np.uint8), "labels": [2**70]},
            "data_batch_3 must hold 'labels', a list of 0 to 9",
        ),
    ],
)
def test_malformed_pickle_is_refused(tmp_path: Path, batch: Any, message: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(ValueError, match=message):
        NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)


def test_truncated_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder)
    truncate(folder / "data_batch_3")
    with pytest.raises(ValueError, match="data_batch_3 is refused"):
        NAMED_SETS["cifar10"].read(str(tmp_path), SPLITS)


def test_missing_sklearn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data 'digits' needs scikit-learn .*pip install scikit-learn"):
        NAMED_SETS["digits"].read(None, SPLITS)
