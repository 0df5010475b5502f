"""The fast pipeline: against PIL and timm value by value, its random numbers, bad files, and what it refuses."""

import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.config import AugmentConfig, RunConfig
from mpvg.data import Batches, Data, ImageBatch, Sample, Shard, make_preprocess, open_data
from mpvg.data import images as image_files
from mpvg.data.device_augment import DeviceAugment
from mpvg.data.fast_pipeline import BatchAugment, Crop
from mpvg.data.images import read_image, read_pixels

CPU = torch.device("cpu")
Opener = Callable[..., Data]
STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "erase": 0.5}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(params=["simplejpeg", "PIL"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both with simplejpeg and where its import fails."""
    if request.param == "PIL":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    image_files._simplejpeg.cache_clear()
    assert (image_files._simplejpeg() is None) == (request.param == "PIL")
    yield request.param
    image_files._simplejpeg.cache_clear()


@pytest.fixture
def open_fast(image_folder: Path, make_config: Callable[..., RunConfig]) -> Opener:
    def opener(*, device: torch.device = CPU, **options: object) -> Data:
        given = {"img_size": 16, "pipeline": "fast", **options}
        return open_data(make_config(image_folder, **given), Shard(device))

    return opener


def read(batches: Batches[Any], epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch, start))


def assert_same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    for (images, targets), (same, too) in zip(some, others, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, too)


def levels(images: Tensor) -> Tensor:
    """Normalized images (B, 3, S, S) back in [0, 255]."""
    return 255 * (images * STD[:, None, None] + MEAN[:, None, None])


def noise(mode: str = "RGB", width: int = 61, height: int = 47) -> Image.Image:
    """Smooth random colors, so that the chroma of neighbors matters."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "4:2:0.jpg": ("RGB", {"subsampling": "4:2:0"}),
    "4:4:4.jpg": ("RGB", {"subsampling": "4:4:4"}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "rgb.jpg": ("RGB", {"keep_rgb": True}),
    "gray.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "color.png": ("RGB", {}),
    "gray.png": ("L", {}),
    "alpha.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "bits.png": ("1", {}),
    "image.webp": ("RGB", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_decoded_to_pils_bits(tmp_path: Path, kind: str, decoder: str) -> None:
    mode, options = KINDS[kind]
    file = str(tmp_path / kind)
    noise(mode).save(file, **options)
    pixels = read_pixels(file)
    assert (pixels.shape, pixels.dtype) == ((3, 47, 61), torch.uint8)
    assert torch.equal(pixels, functional.pil_to_tensor(read_image(file)))
    with open(file, "rb") as opened:
        assert torch.equal(pixels, read_pixels(opened))
    assert torch.equal(pixels, read_pixels(io.BytesIO(Path(file).read_bytes())))


@pytest.mark.parametrize("oddity", ["bytes behind", "bytes inside", "turned", "png called jpg"])
def test_files_that_pil_reads_are_read(tmp_path: Path, oddity: str, decoder: str) -> None:
    written = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation, which neither pipeline heeds
    noise().save(written, "PNG" if "png" in oddity else "JPEG", **({"exif": exif} if oddity == "turned" else {}))
    data = written.getvalue()
    if oddity == "bytes behind":
        data += b"left over"
    if oddity == "bytes inside":  # between the segments, as in a few of ImageNet's files
        data = data[:20] + b"\0\0\0" + data[20:]
    file = tmp_path / "odd.jpg"
    file.write_bytes(data)
    assert torch.equal(read_pixels(str(file)), functional.pil_to_tensor(read_image(str(file))))
    assert torch.equal(read_pixels(str(file)), read_pixels(io.BytesIO(data)))


@pytest.mark.parametrize("size", [16, 64])  # from the crops, smaller and larger
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crop_and_flip_are_timms(size: int, interpolation: str) -> None:
    """The same places by the same random numbers; of the values, one in twenty at most is not PIL's.

    Those are one of 255 levels off, and of one magnified by bicubic interpolation, a few in a million, two.
    """
    image = noise()
    no_jitter: object = None
    timms = create_transform(
        size,
        is_training=True,
        separate=True,
        scale=(0.1, 0.9),
        hflip=0.5,
        interpolation=interpolation,
        color_jitter=no_jitter,
    )[0]
    ours = Crop(AugmentConfig(crop_scale=(0.1, 0.9), hflip=0.5, interpolation=interpolation), size)
    for seed in range(20):
        seen = []
        for transform in (timms, lambda image: ours(Sample(functional.pil_to_tensor(image), 0)).image):
            random.seed(seed)
            torch.manual_seed(seed)
            seen.append(transform(image))
        theirs = functional.pil_to_tensor(seen[0])
        assert seen[1].dtype == torch.uint8
        off = (seen[1].int() - theirs.int()).abs()
        assert off.max() <= (1 if interpolation == "bilinear" or size == 16 else 2)
        assert (off > 0).float().mean() < 0.05


@pytest.mark.parametrize("repeats", [1, 3])
def test_without_strong_augmentation_it_is_timms_pipeline_to_one_level(open_fast: Opener, repeats: int) -> None:
    """Decoding, crop, flip, normalization, order, targets and repeats, through both loaders."""
    options = {"hflip": 0.5, "repeats": repeats}
    ours, timms = (open_fast(pipeline=name, **options) for name in ("fast", "timm"))
    for epoch in (0, 2):
        for (images, targets), (theirs, their_targets) in zip(
            read(ours.train, epoch), read(timms.train, epoch), strict=True
        ):
            assert torch.equal(targets, their_targets)
            assert images.dtype == torch.float32
            assert (levels(images) - levels(theirs)).abs().max() < 1.001


def test_evaluation_is_the_reproduction_ones(open_fast: Opener) -> None:
    ours, timms = (open_fast(pipeline=name, **STRONG) for name in ("fast", "auto"))
    assert_same(read(ours.val), read(timms.val))
    assert torch.equal(make_preprocess(ours.info)(noise("L")), make_preprocess(timms.info)(noise("L")))


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_the_same_bits_twice_from_the_middle_and_with_workers(open_fast: Opener, repeats: int) -> None:
    whole = read(open_fast(repeats=repeats, **STRONG).train, 2)
    for workers in (0, 2):
        train = open_fast(workers=workers, repeats=repeats, **STRONG).train
        assert_same(read(train, 2, start=1), whole[1:])
        assert_same(read(train, 2), whole)
    assert not torch.equal(read(train, 3)[0][0], whole[0][0])
    assert not torch.equal(read(open_fast(repeats=repeats, seed=1, **STRONG).train, 2)[0][0], whole[0][0])


def test_the_processes_together_see_the_batch_of_one(image_folder: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(image_folder, img_size=16, pipeline="fast", **STRONG)
    parts = [read(open_data(config, Shard(CPU, rank, 2)).train) for rank in (0, 1)]
    together = [torch.cat([one, other]) for (one, _), (other, _) in zip(*parts, strict=True)]
    whole = [images for images, _ in read(open_data(config, Shard(CPU)).train)]
    assert all(torch.equal(some, same) for some, same in zip(together, whole, strict=True))


def test_copies_of_an_image_are_augmented_differently(image_folder: Path, open_fast: Opener) -> None:
    """Also by what the device draws: with whole square images and no flip, erasing is all that is left to chance."""
    for path in (image_folder / "train").rglob("*.*"):
        noise("RGB", 20, 20).save(path)
    images, targets = read(open_fast(repeats=2, erase=1.0, crop_scale=(1.0, 1.0)).train)[0]
    assert torch.equal(targets[::2], targets[1::2])
    assert all(not torch.equal(one, other) for one, other in zip(images[::2], images[1::2], strict=True))
    plain, _ = read(open_fast(repeats=2, crop_scale=(1.0, 1.0)).train)[0]
    assert torch.equal(plain[::2], plain[1::2])


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_device_augments_by_the_samples_own_numbers(open_fast: Opener, repeats: int) -> None:
    info = open_fast().info
    config = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erase=0.5)
    augment = DeviceAugment(config, info, 5, CPU)
    images = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8)  # the last part on a CPU is not whole
    chosen = torch.randperm(repeats * info.train_size)[:11]
    made = BatchAugment(augment, repeats)(3)(ImageBatch(images, chosen), chosen)
    assert torch.equal(made.targets, chosen)
    for image, number, ours in zip(images, chosen.tolist(), made.images, strict=True):
        copy, sample = divmod(number, info.train_size)
        draws = augment.draw(3 * repeats + copy)[:, sample : sample + 1]
        assert torch.equal(augment(image[None], draws)[0], ours)


@pytest.mark.parametrize("option", [{"hflip": 1.0}, {"erase": 1.0}, {"auto_augment": "rand-m9-inc1"}])
def test_each_option_has_its_effect(open_fast: Opener, option: dict[str, object]) -> None:
    plain = open_fast(crop_scale=(1.0, 1.0))
    assert not torch.equal(read(open_fast(crop_scale=(1.0, 1.0), **option).train)[0][0], read(plain.train)[0][0])


def test_a_flip_is_made_once(open_fast: Opener) -> None:
    """A device that flipped again would undo it."""
    plain, flipped = (read(open_fast(crop_scale=(1.0, 1.0), hflip=p).train) for p in (0.0, 1.0))
    assert_same([(images.flip(-1), targets) for images, targets in plain], flipped)


def test_crops_and_flips_are_distributed_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Areas uniform in 0.2 to 0.5, aspects log-uniform in 3/4 to 4/3 (both to the rounding of a side), 30 % flipped."""
    boxes = []

    def resized_crop(pixels: Tensor, *arguments: object, **options: object) -> Tensor:
        boxes.append(arguments[:4])
        return torch.arange(4, dtype=torch.uint8).expand(3, 4, 4)

    monkeypatch.setattr("mpvg.data.fast_pipeline.functional.resized_crop", resized_crop)
    crop = Crop(AugmentConfig(crop_scale=(0.2, 0.5), hflip=0.3), 4)
    random.seed(0)
    torch.manual_seed(0)
    count = 4000
    sample = Sample(torch.empty(3, 375, 500, dtype=torch.uint8), 0)
    flipped = sum(crop(sample).image[0, 0, 0].item() == 3 for _ in range(count))
    top, left, height, width = np.array(boxes).T
    area, aspect = height * width / (375 * 500), np.log(width / height) / np.log(4 / 3)
    assert abs(flipped / count - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    assert min(top) >= 0
    assert max(top + height) <= 375
    assert min(left) >= 0
    assert max(left + width) <= 500
    assert 0.195 < min(area) < 0.205
    assert 0.495 < max(area) < 0.505
    assert abs(np.mean(area) - 0.35) < 4 * 0.3 / (12 * count) ** 0.5
    assert abs(aspect).max() < 1.03
    assert abs(np.mean(aspect)) < 4 * 2 / (12 * count) ** 0.5


def test_random_state_of_the_process_is_neither_touched_nor_used(open_fast: Opener) -> None:
    data = open_fast(**STRONG)
    states = []
    for seed in (1, 99):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        expected = random.random(), np.random.rand(), torch.rand(())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states.append(read(data.train))
        assert (random.random(), np.random.rand(), torch.rand(())) == expected
    assert_same(*states)


def test_images_can_be_sent_to_a_spawned_worker(open_fast: Opener, request: pytest.FixtureRequest) -> None:
    expected = read(open_fast(**STRONG).train)
    sent = request.getfixturevalue("pickled")
    assert_same(read(open_fast(**STRONG).train), expected)
    assert len(sent) == 2


def test_without_simplejpeg_the_bits_are_the_same(open_fast: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    image_files._simplejpeg.cache_clear()
    assert image_files._simplejpeg() is not None
    expected = read(open_fast(**STRONG).train)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    image_files._simplejpeg.cache_clear()
    assert_same(read(open_fast(**STRONG).train), expected)
    image_files._simplejpeg.cache_clear()


def oversized_jpeg() -> bytes:
    """A JPEG that claims 60000x60000 pixels."""
    written = io.BytesIO()
    noise().save(written, "JPEG")
    data = bytearray(written.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = (60_000).to_bytes(2) * 2
    return bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("not an image"), "UnidentifiedImageError: cannot identify"),
    "empty": (lambda path: path.write_bytes(b""), "UnidentifiedImageError: cannot identify"),
    "marker": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"), "UnidentifiedImageError: cannot identify"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "OSError: .*truncated"),
    "bomb": (lambda path: path.write_bytes(oversized_jpeg()), "DecompressionBombError: .*3600000000 pixels"),
    "long": (
        lambda path: noise("RGB", 3100, 3).save(path),
        "ValueError: 3100x3 is too elongated.*up to 1000",
    ),
    "missing": (lambda path: path.unlink(), "FileNotFoundError: .*No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unreadable_image_is_named_as_in_the_other_pipeline(
    image_folder: Path, open_fast: Opener, damage: str, decoder: str
) -> None:
    path = image_folder / "train" / "a" / "1.JPG"
    datas = [open_fast(pipeline=name) for name in ("fast", "auto")]
    act, message = DAMAGE[damage]
    act(path)
    said = []
    for data in datas:
        with pytest.raises(ValueError, match=rf"^image {path} cannot be read \({message}.*skip_corrupt true") as error:
            read(data.train)
        said.append(str(error.value))
    assert said[0].split(" at 0x")[0] == said[1].split(" at 0x")[0]


def test_skipped_training_images_are_replaced_and_counted(image_folder: Path, open_fast: Opener) -> None:
    for n, path in enumerate(sorted((image_folder / "train" / "b").iterdir())):
        if n < 7:
            path.write_text("not an image")
    ours, timms = (open_fast(pipeline=name, workers=1, skip_corrupt=True) for name in ("fast", "auto"))
    for (images, targets), (theirs, their_targets) in zip(read(ours.train), read(timms.train), strict=True):
        assert torch.equal(targets, their_targets)
        assert (levels(images) - levels(theirs)).abs().max() < 1.001
    assert ours.train.skipped == timms.train.skipped == 7


def test_training_set_without_any_readable_image(image_folder: Path, open_fast: Opener) -> None:
    for path in (image_folder / "train").rglob("*.*"):
        path.write_text("not an image")
    with pytest.raises(ValueError, match=r"image .*train.* cannot be read"):
        read(open_fast(skip_corrupt=True).train)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5", "augmix-m3", "original"])
def test_what_cannot_be_done_on_batches_is_refused(open_fast: Opener, text: str) -> None:
    message = rf"augment\.auto_augment is '{text}'; allowed .*inc1.*any timm string with --augment\.pipeline auto"
    with pytest.raises(ValueError, match=message):
        open_fast(auto_augment=text)


def test_named_sets_are_refused(make_config: Callable[..., RunConfig]) -> None:
    message = r"augment\.pipeline is 'fast', which is for images from files, .*allowed for it: 'auto', 'timm'"
    with pytest.raises(ValueError, match=message):
        open_data(make_config("digits", pipeline="fast"), Shard(CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_batches_of_a_cpu(open_fast: Opener) -> None:
    """RandAugment apart, whose interpolation rounds to a level: there nearly all pixels are equal."""
    cuda = torch.device("cuda")
    for options, share in (({"hflip": 0.5, "erase": 0.5}, 1.0), (STRONG, 0.99)):
        for (images, _), (theirs, _) in zip(
            read(open_fast(**options).train), read(open_fast(device=cuda, **options).train), strict=True
        ):
            assert theirs.is_cuda
            assert ((images - theirs.cpu()).abs() < 1e-4).float().mean() >= share
