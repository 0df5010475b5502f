"""What counts as a class, a sample or nothing: the same for a folder, for its tar file, and said where it matters."""

import io
import os
import re
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from image_trees import make_folder, pack, png
from mpvg.config import RunConfig
from mpvg.data import Data, Shard, open_data, open_listing
from mpvg.data.images import read_image
from mpvg.data.listing import Listing, in_class_order
from mpvg.data.order import BatchOrder, describe_left_out
from mpvg.data.rules import IMAGE_ENDINGS, natural_key

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


def contents(listing: Listing) -> dict[str, Any]:
    """Classes, hashes, and pixel and target of each sample in order."""
    found: dict[str, Any] = {"classes": listing.class_names}
    for split in ("train", "val"):
        source = listing.source(split)
        samples = [source.read(index) for index in range(len(source))]
        found[split] = [(sample.image.getpixel((0, 0))[0], int(sample.target)) for sample in samples]
        found[f"{split} hash"] = listing.inventories[split].hash
    return found


def opened(make_config: MakeConfig, root: Path, **options: Any) -> Data:
    return open_data(make_config(root, img_size=8, batch_size=2, **options), Shard(CPU))


NAMES = {
    "flat": ["cat/0.png", "cat/1.png", "dog/0.png"],
    "one level": ["cat/images/0.png", "cat/images/1.png", "dog/images/0.png"],
    "some deeper": ["cat/day/0.png", "cat/1.png", "cat/day-2/0.png", "cat/day/night/2.png", "dog/2024/raw/0.png"],
    "a class of the split's name": ["train/0.png", "train/1.png", "val/0.png", "val/day/0.png", "dog/0.png"],
    "numbers": ["2/0.png", "10/1.png", "10/0.png", "1/0.png"],
}


@pytest.mark.parametrize("prefix", ["", "./", "{}/", "./{}/", "/", ".//./"])
@pytest.mark.parametrize("names", NAMES)
def test_a_tar_file_is_the_folder_at_any_depth(
    names: str, prefix: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES[names], "val": NAMES[names][:4]})
    packed = pack(root, tmp_path / "packed", prefix)
    folder, tar = (contents(open_listing(make_config(path))) for path in (root, packed))
    assert folder == tar
    assert folder["classes"] == tuple(in_class_order({name.split("/")[0] for name in NAMES[names]}))
    assert len(folder["train"]) == len(NAMES[names])


def test_prefixes_may_be_mixed_in_one_tar_file(tmp_path: Path, make_config: MakeConfig) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for number, name in enumerate([f"{split}/cat/0.png", "./cat/1.png", "cat/2024/raw/0.png", "dog/0.png"]):
                add(archive, name, png(number))
    found = contents(open_listing(make_config(tmp_path)))
    assert found["classes"] == ("cat", "dog")
    assert found["train"] == [(0, 0), (1, 0), (2, 0), (3, 1)]


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = len(content), kind, to
    archive.addfile(entry, io.BytesIO(content))


HIDDEN = [
    "cat/.ipynb_checkpoints/x.png",
    "__MACOSX/cat/x.png",
    "cat/__MACOSX/x.png",
    "@eaDir/x.png",
    "cat/@eaDir/0.png/x.png",
    "cat/._x.jpg",
    "dog/.x.png",
    ".hidden/x.png",
    ".DS_Store",
    "cat/.thumbs/deep/er/x.png",
]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_parts_at_any_depth_are_left_out(
    packed: bool, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    names = NAMES["some deeper"]
    root = make_folder(tmp_path / ".cache" / "data", {"train": names + HIDDEN, "val": names + HIDDEN})
    found = contents(open_listing(make_config(pack(root, tmp_path / "packed") if packed else root)))
    assert found["classes"] == ("cat", "dog")
    assert (len(found["train"]), len(found["val"])) == (5, 5)
    assert not caplog.messages


def test_every_ending_of_the_list_is_read_and_in_any_case(tmp_path: Path, make_config: MakeConfig) -> None:
    formats = {".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".pbm": "PPM", ".pgm": "PPM"}
    names = [f"cat/a{end}" for end in IMAGE_ENDINGS] + [f"dog/a{end.upper()}" for end in IMAGE_ENDINGS]
    root = make_folder(tmp_path / "data", {"train": names, "val": names})
    for path in root.rglob("a.*"):
        end = path.suffix.lower()
        Image.new("RGB", (6, 6)).save(path, formats.get(end, Image.registered_extensions().get(end)))
        read_image(str(path))
    for path in (root, pack(root, tmp_path / "packed")):
        assert len(open_listing(make_config(path)).source("train")) == 2 * len(IMAGE_ENDINGS) == 26


@pytest.mark.parametrize("packed", [False, True])
def test_other_endings_are_said_once_with_their_number(
    packed: bool, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    others = ["cat/a.avif", "cat/b.AVIF", "dog/c.heic", "dog/README", "cat/day/Thumbs.db", "notes.txt", "cat/.x.json"]
    root = make_folder(tmp_path / "data", {"train": NAMES["flat"] + others, "val": [*NAMES["flat"], "cat/x.jp2"]})
    config = make_config(pack(root, tmp_path / "packed") if packed else root)
    for _ in range(2):
        assert len(open_listing(config).source("train")) == 3
    assert [message.split(";")[0] for message in caplog.messages] == [
        "6 files of train have other endings: no ending, .avif, .db, .heic, .txt",
        "1 file of val has another ending: .jp2",
    ]
    assert ".jpg, .jpeg" in caplog.messages[0]


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../val", "../dog", "day"])
def test_each_real_folder_is_listed_once(
    target: str, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"train": ["cat/day/0.png", "cat/1.png", "dog/0.png"], "val": NAMES["flat"]}
    root = make_folder(tmp_path / "data", names)
    (root / "train/cat/loop").symlink_to(target)
    listing = open_listing(make_config(root))
    from_val = 3 if target == "../../val" else 0
    assert len(listing.source("train")) == 3 + from_val
    assert [listing.source("train").read(2 + from_val).target] == [1]
    assert bool(caplog.messages) == (not from_val)
    if caplog.messages:
        assert "a link of train to folders that are listed already: cat/loop; left out" in caplog.messages[0]


def test_a_class_folder_may_be_a_link(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["some deeper"], "val": NAMES["flat"]})
    expected = contents(open_listing(make_config(root)))
    shutil.move(root / "train/cat", tmp_path / "elsewhere")
    (root / "train/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root / "train")
    assert contents(open_listing(make_config(root))) == expected


def test_hard_links_in_a_tar_are_their_targets_bytes(tmp_path: Path, make_config: MakeConfig) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            add(archive, "./cat/0.png", png(1))
            add(archive, "./cat/1.png", kind=tarfile.LNKTYPE, to="./cat/0.png")
            add(archive, "dog/0.png", kind=tarfile.LNKTYPE, to="cat/1.png")
            add(archive, ".blobs/abc", png(9))
            add(archive, "dog/1.png", kind=tarfile.LNKTYPE, to=".blobs/abc")
            add(archive, "cat/0.png", png(5))  # as with `tar -r`: what linked to the first one keeps its bytes
    found = contents(open_listing(make_config(tmp_path)))
    assert found["train"] == found["val"] == [(5, 0), (1, 0), (1, 1), (9, 1)]


MEMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "symlink": ({"kind": tarfile.SYMTYPE, "to": "0.png"}, r"x\.png in .* is a symbolic link to 0\.png.*--dereference"),
    "no target": ({"kind": tarfile.LNKTYPE, "to": "cat/7.png"}, r"x\.png in .* is a hard link to cat/7\.png, which"),
    "fifo": ({"kind": tarfile.FIFOTYPE}, r"x\.png in .*train\.tar is a pipe or a device, not a file"),
    "device": ({"kind": tarfile.CHRTYPE}, r"x\.png in .*train\.tar is a pipe or a device, not a file"),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_that_is_no_file_is_refused_by_name(member: str, tmp_path: Path, make_config: MakeConfig) -> None:
    root = pack(make_folder(tmp_path / "data", {s: NAMES["flat"] for s in ("train", "val")}), tmp_path / "packed")
    options, message = MEMBERS[member]
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, ".cat/x.png", **options)  # hidden
    assert len(open_listing(make_config(root)).source("train")) == 3
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, "./cat/x.png", **options)
    with pytest.raises(ValueError, match=message):
        open_listing(make_config(root))
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, "cat/x.png", png(3))  # of equal names the last counts
    if member != "no target":
        assert len(open_listing(make_config(root)).source("train")) == 4


def test_a_symbolic_link_to_a_class_in_a_tar_is_refused_too(tmp_path: Path, make_config: MakeConfig) -> None:
    root = pack(make_folder(tmp_path / "data", {s: NAMES["flat"] for s in ("train", "val")}), tmp_path / "packed")
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, "bird", kind=tarfile.SYMTYPE, to="/elsewhere/bird")
    with pytest.raises(ValueError, match=r"bird in .*train\.tar is a symbolic link to /elsewhere/bird"):
        open_listing(make_config(root))


@pytest.mark.parametrize("name", ["../cat/0.png", "cat/../../x.png"])
def test_a_member_outside_is_refused(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, name, png())
    with pytest.raises(ValueError, match=r"leads out of its folder; make the tar file again with `tar -C FOLDER`"):
        open_listing(make_config(tmp_path), ("train",))


@pytest.mark.parametrize("place", ["train", "val"])
@pytest.mark.parametrize("name", ["{}-backup.tar", "{}.tar", "{}/old.tar"])
def test_both_forms_of_a_split_are_refused_naming_both(
    name: str, place: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["flat"], "val": NAMES["flat"]})
    backup = root / name.format(place)
    shutil.copy(pack(root, tmp_path / "packed") / f"{place}.tar", backup)
    with pytest.raises(ValueError, match=rf"has {place} twice, as the folder .*{place} and as the tar file {backup};"):
        open_listing(make_config(root))


@pytest.mark.parametrize("place", ["train", "val"])
def test_one_split_may_be_a_tar_file_and_the_other_a_folder(
    place: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["some deeper"], "val": NAMES["flat"]})
    expected = contents(open_listing(make_config(root)))
    pack(root, root, splits=(place,))
    shutil.rmtree(root / place)
    assert contents(open_listing(make_config(root))) == expected
    (root / place).mkdir()  # what is left when its files were moved
    assert contents(open_listing(make_config(root))) == expected


@pytest.mark.parametrize("names", [["cat/0.png"], ["images/cat/0.png", "images/dog/1.png"]])
@pytest.mark.parametrize("packed", [False, True])
def test_a_single_class_is_refused_with_the_likely_mistake(
    packed: bool, names: list[str], tmp_path: Path, make_config: MakeConfig
) -> None:
    root = make_folder(tmp_path / "data", {"train": names, "val": names})
    cure = "its folders cat, dog lie one level too deep" if len(names) > 1 else "one level too high or too deep"
    message = rf"has one class only, '{names[0].split('/')[0]}', and a classifier needs two; .*{cure}"
    with pytest.raises(ValueError, match=message):
        open_listing(make_config(pack(root, tmp_path / "packed", "{}/") if packed else root))


def test_an_image_in_no_class_folder_is_refused_in_both_forms(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": [*NAMES["flat"], "loose.png"], "val": NAMES["flat"]})
    with pytest.raises(ValueError, match=r"image '.*train/loose\.png' is in no class folder; put it into one, or rem"):
        open_listing(make_config(root))
    with pytest.raises(ValueError, match=r"train/loose\.png in .*train\.tar has no class"):
        open_listing(make_config(pack(root, tmp_path / "packed", "{}/")))


def test_a_class_without_images_is_refused_in_both_forms(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": [*NAMES["flat"], "cow/a.avif"], "val": NAMES["flat"]})
    with pytest.raises(ValueError, match=r"class folder '.*train/cow' has no images \(\.jpg"):
        open_listing(make_config(root))
    with pytest.raises(ValueError, match=r"class folder 'cow' in the tar files of train in .* has no images"):
        open_listing(make_config(pack(root, tmp_path / "packed")))


@pytest.mark.parametrize("name", ["10²", "²", "a¼", "٣", "x" * 5 + "9" * 5000, "Ⅷ"])
def test_every_name_can_be_sorted(name: str) -> None:
    order = in_class_order([name, "2", "10", "a"])
    assert sorted(order) == sorted([name, "2", "10", "a"])
    assert order.index("2") < order.index("10")
    assert natural_key("n2") < natural_key("N10")


def test_a_class_named_with_a_superscript(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {s: ["10²/0.png", "9/0.png"] for s in ("train", "val")})
    for path in (root, pack(root, tmp_path / "packed")):
        assert open_listing(make_config(path)).class_names == ("9", "10²")


@pytest.mark.parametrize("known", [None, ("cafe\u0301", "tea")])
@pytest.mark.parametrize("packed", [False, True])
def test_two_spellings_of_one_name_are_told_apart(
    packed: bool, known: tuple[str, ...] | None, tmp_path: Path, make_config: MakeConfig
) -> None:
    names = {"train": ["café/0.png", "tea/0.png"], "val": ["cafe\u0301/0.png", "tea/0.png"]}
    if known is not None:
        names["val"] = names["train"]
    root = make_folder(tmp_path / "data", names)
    config = make_config(pack(root, tmp_path / "packed") if packed else root)
    with pytest.raises(ValueError, match=r"spelled differently in Unicode: 'caf\\xe9' .*'cafe\\u0301'.*rename one"):
        open_listing(config, ("train", "val") if known is None else ("val",), known)


def webdataset(root: Path, names: bytes | None) -> RunConfig:
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for number in range(2):
                add(archive, f"x{number}.png", png(number))
                add(archive, f"x{number}.cls", str(number).encode())
    if names is not None:
        (root / "classes.txt").write_bytes(names)
    return RunConfig(data=str(root), model="any", epochs=1, batch_size=2, lr=1.0, recipe="none")


@pytest.mark.parametrize("names", ["\ufeffcat\nchâteau\n", "cat\r\nchâteau", "\n cat\n\nchâteau \n"])
def test_names_of_classes_are_read_from_utf_8_with_or_without_a_mark(names: str, tmp_path: Path) -> None:
    assert open_listing(webdataset(tmp_path, names.encode())).class_names == ("cat", "château")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_names_of_classes_in_another_encoding_are_refused_with_the_file(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}/classes\.txt is not UTF-8 .*save it in that encoding"):
        open_listing(webdataset(tmp_path, "chat\nchâteau\n".encode(encoding)))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, listening, device])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_file_is_refused_before_it_is_opened(
    make: Callable[[Path], None], tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["flat"], "val": NAMES["flat"]})
    monkeypatch.chdir(root)
    listing = open_listing(make_config(root))
    make(root / "train/cat/x.png")
    with pytest.raises(ValueError, match=r"train/cat/x\.png is a .*, not a regular file"):
        open_listing(make_config(root))
    (root / "train/cat/0.png").unlink()  # it may also come later
    (root / "train/cat/x.png").rename(root / "train/cat/0.png")
    with pytest.raises(ValueError, match=r"train/cat/0\.png is a .*, not a regular file"):
        listing.source("train").read(0)
    packed = pack(root, tmp_path / "packed", splits=("val",))
    make(packed / "train.tar")
    with pytest.raises(ValueError, match=r"train\.tar is a .*, not a regular file"):
        open_listing(make_config(packed))


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": [*NAMES["flat"], "cat/x.png/y.png"], "val": NAMES["flat"]})
    for path in (root, pack(root, tmp_path / "packed")):
        assert len(open_listing(make_config(path)).source("train")) == 4
    (tmp_path / "packed/train.tar").unlink()
    (tmp_path / "packed/train.tar").mkdir()
    with pytest.raises(ValueError, match=r"train\.tar is a folder, not a regular file"):
        open_listing(make_config(tmp_path / "packed"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_file_is_not_read_into_memory(packed: bool, tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["flat"], "val": NAMES["flat"]})
    if packed:
        root = pack(root, tmp_path / "packed")
        with tarfile.open(root / "train.tar", "w") as archive:
            add(archive, "dog/0.png", png())
            entry = tarfile.TarInfo("cat/0.png")
            entry.size = 2**30
            end = archive.offset
        with open(root / "train.tar", "r+b") as file:
            file.seek(end)
            file.write(entry.tobuf())
            file.truncate(end + 512 + 2**30 + 1024)
    else:
        os.truncate(root / "train/cat/0.png", 2**30)
    listing = open_listing(make_config(root))
    with pytest.raises(ValueError, match=r"has 1,073,741,824 bytes; allowed: at most 536,870,912"):
        listing.source("train").read(0)


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path, make_config: MakeConfig) -> None:
    root = make_folder(tmp_path / "data", {"train": NAMES["flat"], "val": NAMES["flat"]})
    for name in ("nowhere", "x.png"):
        (root / "val/cat/x.png").unlink(missing_ok=True)
        (root / "val/cat/x.png").symlink_to(name)
        with pytest.raises(ValueError, match=r"image .*val/cat/x\.png cannot be read \(.*--loader\.skip_corrupt"):
            list(opened(make_config, root).val.epoch())
        assert len(list(opened(make_config, root, skip_corrupt=True).val.epoch())) == 2


@pytest.mark.parametrize(
    ("size", "batch", "message"),
    [
        (160, 128, "32 of 160 images are left out of each epoch, .*; a batch_size of 80 leaves out 0"),
        (100, 64, "36 of 100 images .*a batch_size of 50 leaves out 0"),
        (1437, 64, "29 of 1437 images .*; a batch_size of"),
        (7, 4, "3 of 7 images .*; a batch_size of 2 leaves out 1"),
        (128, 64, None),
    ],
)
def test_images_that_an_epoch_leaves_out_are_counted_with_a_cure(size: int, batch: int, message: str | None) -> None:
    said = describe_left_out(size, batch)
    order = BatchOrder(size=size, batch_size=batch, shuffle=True, seed=0, rank=0, world_size=1)
    read = torch.cat(list(order.batches(0, 0))).unique().numel()
    if message is None:
        assert said is None
        assert read == size
    else:
        assert said is not None
        assert re.match(message, said)
        assert said.startswith(f"{size - read} of ")


def test_repeated_augmentation_says_how_many_images_it_draws() -> None:
    order = BatchOrder(size=30, batch_size=8, shuffle=True, seed=0, rank=0, world_size=1, repeats=3)
    read = (torch.cat(list(order.batches(0, 0))) % 30).unique().numel()
    assert str(describe_left_out(30, 8, 3)).startswith(f"{30 - read} of 30 images are left out of each epoch, others")
