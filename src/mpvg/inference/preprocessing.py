"""What is done to an image before a network, as data: the file that lies beside every exported network.

With it a script that has neither torch nor this package prepares images: it reads JSON, resizes with Pillow, and
computes `(pixels / 255 - mean) / std`.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torchvision import transforms

from mpvg.data import DataInfo, denormalize
from mpvg.data.images import Orientation
from mpvg.data.tensors import ResizeAndNormalize
from mpvg.data.transforms import ToRGB
from mpvg.data.types import Preprocess
from mpvg.files import read_regular
from mpvg.runs import Run
from mpvg.runs.reading import MAX_IMG_SIZE
from mpvg.tasks import Ranking, task_class
from mpvg.validation import parse_json, shown

FILE = "preprocess.json"
FORMAT = 1
"""Of the file; a reader refuses a newer one."""
_MAX_BYTES = 2**26  # a mean image at 1024 pixels has some 30 MB
MIN_STD = 1e-6
"""Of the pixels, by which they are divided."""
_NEEDED: dict[str, type] = {
    "kind": str,
    "file": str,
    "channels": int,
    "height": int,
    "width": int,
    "resize": str,
    "resize_to": int,
    "interpolation": str,
    "mean": list,
    "std": list,
    "class_names": list,
    "orientation": str,
    "task": str,
}


def preprocessing(run: Run) -> dict[str, Any]:
    """What the run's evaluation does to an image, with what the values that come out of the network mean.

    Returns:
        JSON-safe values:

        - `channels`, `height`, `width`: of the network's input, `(images, channels, height, width)`, float32; 3
          channels are RGB, 1 is gray.
        - `orientation`: "exif" turns an image upright as its EXIF data say; "stored" leaves it.
        - `resize`: "square" gives both sides `resize_to` pixels, "shorter side" the shorter one, by `interpolation`
          with antialiasing, as Pillow does it; `crop`: side of the square in the middle that is then cut out, or null.
        - `mean`, `std`: per channel, for values in [0, 1]; `mean_image`: subtracted before from the values in
          [0, 255], flattened `(channels, height, width)`, or null.
        - `class_names`: in the order of the network's outputs.
        - `task`, `model`, `method`, `source`, `versions`: where it comes from.

    Raises:
        ValueError: the task prepares images in a way that these values cannot say.
    """
    config, info = run.config, run.info
    return {
        "format": FORMAT,
        "task": config.task,
        "class_names": list(info.class_names),
        "channels": info.in_chans,
        "height": info.img_size,
        "width": info.img_size,
        "orientation": config.orientation,
        **_resizing(run),
        "mean": list(info.mean),
        "std": list(info.std),
        "mean_image": _mean_image(run),
        "model": config.model,
        "method": config.method,
        "source": {"run": run.path.resolve().name, "data": Path(info.name).name},
        "versions": {name: metadata.version(name) for name in ("mpvg", "torch", "timm")},
    }


def _resizing(run: Run) -> dict[str, Any]:
    """How an image gets its size, read from what does it."""
    found = run.preprocess()
    if isinstance(found, ResizeAndNormalize):
        return {"resize": "square", "resize_to": run.info.img_size, "interpolation": "bilinear", "crop": None}
    if isinstance(found, ToRGB) and isinstance(found.transform, transforms.Compose):
        resize, crop = found.transform.transforms[:2]
        if isinstance(resize, transforms.Resize) and isinstance(crop, transforms.CenterCrop):
            side = resize.size if isinstance(resize.size, int) else resize.size[0]
            how = resize.interpolation.value
            return {"resize": "shorter side", "resize_to": side, "interpolation": how, "crop": crop.size[0]}
    raise ValueError(
        f"the task {run.config.task!r} prepares images in a way that {FILE} cannot say; allowed: tasks that prepare "
        "them as classification does; load the run with mpvg.load instead"
    )


def _mean_image(run: Run) -> list[float] | None:
    """The mean image at the network's size."""
    info = run.info
    if info.mean_image is None:
        return None
    zeros = torch.zeros(1, info.in_chans, info.img_size, info.img_size)
    pixels = 255 * (denormalize(zeros, info) - torch.tensor(info.mean)[:, None, None])
    return [round(value, 4) for value in pixels.flatten().tolist()]


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """Reads the file beside an exported network.

    Raises:
        FileNotFoundError: there is none, so that nobody knows what the network takes.
        ValueError: it is not what an export writes.
    """
    file = folder / FILE
    try:
        values = parse_json(read_regular(file, _MAX_BYTES))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no {FILE}, which says how images are prepared and what the outputs mean; give a folder that "
            "`mpvg export` made, or a run"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not readable ({error}); export the run again") from error
    _check(values, file)
    return dict(values)


def _check(values: Any, file: Path) -> None:
    again = "export the run again"
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise ValueError(f"{file} has no format; {again}")
    if not 1 <= values["format"] <= FORMAT:
        raise ValueError(f"{file} has format {values['format']}, and this version of mpvg reads 1 to {FORMAT}; update")
    for name, kind in _NEEDED.items():
        if not isinstance(values.get(name), kind):
            kinds = {str: "a text", int: "a whole number", list: "a list"}
            raise ValueError(f"{file}: {name} is {shown(values.get(name))}; allowed: {kinds[kind]}; {again}")
    if "/" in values["file"] or values["file"].startswith("."):
        raise ValueError(f"{file}: file is {shown(values['file'])}; allowed: the name of a file beside it; {again}")
    if problem := _problem(values):
        raise ValueError(f"{file}: {problem}; {again}")


def _problem(values: Mapping[str, Any]) -> str | None:
    """What is wrong with values of the right types, in words."""
    channels, height, width = (values[name] for name in ("channels", "height", "width"))
    if min(channels, height, width) < 1 or not all(len(values[name]) == channels for name in ("mean", "std")):
        return "sizes, mean and std do not fit one another"
    for name, allowed in _allowed(values).items():
        if type(values.get(name)) not in (int, str) or values[name] not in allowed:
            return f"{name} is {shown(values.get(name))}; allowed: {_in_words(allowed)}"
    multiple = values.get("multiple_of")
    if multiple is not None and not _is_pair(multiple):
        return f"multiple_of is {shown(multiple)}; allowed: null, or two whole numbers >= 1"
    pixels = values.get("mean_image")
    if pixels is not None and (not isinstance(pixels, list) or len(pixels) != math.prod((channels, height, width))):
        return "mean_image has another size than the images"
    numbers = [*values["mean"], *values["std"], *(pixels or [])]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers) or min(values["std"]) <= 0:
        return "mean, std and mean_image must be finite numbers, and std more than 0"
    if not _names_classes(values["task"]):
        return f"task is {shown(values['task'])}; allowed: a task that names the class of an image"
    if min(values["std"]) < MIN_STD:
        return f"std is {shown(values['std'])}; allowed: numbers of at least {MIN_STD}"
    names = values["class_names"]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return "class_names must be texts, one or more, and none twice"
    return None


def _names_classes(task: str) -> bool:
    """Whether a task gives classes of an image; one that is not registered here may."""
    try:
        return issubclass(task_class(task), Ranking)
    except ValueError:
        return True


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and [type(one) is int and one >= 1 for one in value] == [True, True]


def _in_words(allowed: Sequence[Any]) -> str:
    return f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(allowed)


def _allowed(values: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """What single values may be."""
    sides = range(1, MAX_IMG_SIZE + 1)
    crop = {"crop": sides} if values["resize"] == "shorter side" else {}
    interpolations = [mode.value for mode in transforms.InterpolationMode]
    allowed = {"resize": ("square", "shorter side"), "interpolation": interpolations}
    orientations = get_args(Orientation)
    return {**allowed, "orientation": orientations, "height": sides, "width": sides, "resize_to": sides, **crop}


def preprocess_from(values: Mapping[str, Any]) -> Preprocess:
    """What the values do to an image, as a function: the same as the run's own.

    Args:
        values: as `preprocessing` gives them.
    """
    pixels = values.get("mean_image")
    info = DataInfo(
        name="export",
        class_names=tuple(values["class_names"]),
        in_chans=values["channels"],
        img_size=values["height"],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        train_size=0,
        val_size=0,
        mean_image=None if pixels is None else tuple(pixels),
    )
    if values["resize"] == "square":
        return ResizeAndNormalize(info)
    steps = [
        transforms.Resize(values["resize_to"], transforms.InterpolationMode(values["interpolation"])),
        transforms.CenterCrop(values["crop"]),
        transforms.ToTensor(),
        transforms.Normalize(info.mean, info.std),
    ]
    return ToRGB(transforms.Compose(steps))
