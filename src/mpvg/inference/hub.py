"""Hub folders: weights, config and model card, as timm and transformers read them, and as this package reads them.

DIR/model.safetensors   the weights
DIR/config.json         timm's config: the network's name, its arguments, and how images are prepared
DIR/README.md           the model card
DIR/preprocess.json     the preprocessing, as beside every export
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

import mpvg.models as models  # registers the networks with timm
from mpvg.files import read_regular, write_json, write_new
from mpvg.models.checkpoints import load_weights
from mpvg.models.convert import CONVERTED
from mpvg.validation import named, parse_json, shown, unknown_name

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_MAX_BYTES = 2**24
MAX_DEPTH, MAX_NUMBER = 512, 2**20
"""Of layers, and of any other argument of a network: a config from anywhere must not keep a machine busy."""
_CODE = (".py", ".pyc", ".pyx", ".so", ".pth", ".pt", ".pkl", ".pickle", ".bin", ".sh", ".ipynb", ".ckpt")
"""Ends of names of files that are code, or pickles, which may run some."""
_MODULE_KEYS = ("auto_map", "module", "modules", "_target_", "custom_load", "trust_remote_code", "custom_pipelines")
"""Keys by which other loaders are told which code to run."""
_OF_FACTORY = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "scriptable",
    "exportable",
    "no_jit",
)
"""Arguments of timm.create_model that are no network's: some fetch or unpickle."""


def write_hub_folder(model: nn.Module, folder: Path, preprocessing: dict[str, Any], card: str) -> None:
    """Writes a hub folder.

    Args:
        model: a network of this package, converted ones included.
        folder: an existing folder.
        preprocessing: as of `mpvg.inference.preprocessing.preprocessing`.
        card: the text of the model card.

    Raises:
        ValueError: the network was not made by name, so that nobody could build it again.
    """
    network: Any = model
    if not (getattr(network, "pretrained_cfg", None) or {}).get("architecture"):
        raise ValueError(f"{type(model).__name__} was not made by mpvg.create_model, so its config is not known")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_new(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))  # transformers refuses it without
    square = preprocessing["resize"] == "square"
    crop = 1.0 if square else preprocessing["crop"] / preprocessing["resize_to"]
    save_config_for_hf(
        model,
        str(folder / CONFIG),
        model_config={"label_names": preprocessing["class_names"]},
        data_config={
            "input_size": [preprocessing[name] for name in ("channels", "height", "width")],
            "interpolation": preprocessing["interpolation"],
            "mean": preprocessing["mean"],
            "std": preprocessing["std"],
            "crop_pct": round(crop, 6),
            "crop_mode": "squash" if square else "center",
        },
    )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # transformers gives timm.create_model this number as well, from the config itself, as timm's own loader does.
    config.get("model_args", {}).pop("num_classes", None)
    write_json(folder / CONFIG, config)
    (folder / CARD).write_text(card, encoding="utf-8")


def read_hub_folder(folder: str | Path) -> nn.Module:
    """The network of a hub folder, in evaluation mode; nothing in the folder is run.

    Raises:
        FileNotFoundError: config or weights are missing.
        ValueError: the folder holds code or its config names some, or they are not of a network of this package.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no hub folder: {name} is missing; `mpvg export` makes one")
    refuse_code(folder)
    try:
        config = parse_json(read_regular(folder / CONFIG, _MAX_BYTES))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not readable ({error}); give another folder") from error
    name, arguments = _checked(config, folder / CONFIG)
    try:
        model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # whatever a network says of its arguments
        raise ValueError(f"{folder / CONFIG}: {name} cannot be built ({shown(str(error))})") from error
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def refuse_code(folder: Path) -> None:
    """Refuses a folder in which a file is code or a pickle.

    Raises:
        ValueError: naming it.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _CODE:
            raise ValueError(
                f"{folder} holds code or a pickle, {named(str(path.relative_to(folder)))}, and nothing that comes with "
                "weights is run; remove it, or give a folder without"
            )


def _checked(config: Any, file: Path) -> tuple[str, dict[str, Any]]:
    """The network's name with timm and its arguments, from a config that may come from anywhere."""
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no keys; give another folder")
    for key, value in _items(config):
        if key in _MODULE_KEYS and value:  # timm writes "custom_load": false
            raise ValueError(f"{file} names a module by its key {key!r}, and no code that comes with weights is run")
    name, arguments, classes = config.get("architecture"), config.get("model_args") or {}, config.get("num_classes")
    known = [f"mpvg_{known}" for known in (*models.model_names(), CONVERTED)]
    if name not in known:
        raise ValueError(f"{file}: {unknown_name('architecture', str(name), known)}")
    for key, value, kind in (("model_args", arguments, dict), ("num_classes", classes, int)):
        if not isinstance(value, kind):
            raise ValueError(f"{file}: {key} is {shown(value)}; allowed: {kind.__name__}; give another folder")
    _check_arguments(arguments, file)
    return name, arguments | {"num_classes": classes}


def _check_arguments(arguments: dict[str, Any], file: Path) -> None:
    for key in arguments:
        if key in _OF_FACTORY:
            raise ValueError(f"{file}: model_args has {key!r}, which is no argument of a network; give another folder")
    for key, number in _items(arguments):
        most = MAX_DEPTH if key.startswith("depth") else MAX_NUMBER
        if isinstance(number, int | float) and not -most <= number <= most:
            raise ValueError(f"{file}: model_args has {key} {number}; allowed: at most {most:,}; give another folder")
    for _, text in _items(arguments):
        if isinstance(text, str) and re.search(r"[:/\\]|\w\.[A-Za-z_]", text):
            raise ValueError(f"{file}: model_args has {shown(text)}, which names a module or a file; allowed: names")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values at any depth, each with its key; those in a list have the list's."""
    yield key, value
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = [(key, part) for part in value] if isinstance(value, list) else []
    for name, part in pairs:
        yield from _items(part, name)
