"""The configuration of a run: plain, frozen dataclasses that load no torch.

A recipe, a YAML file or the command line builds them; the run folder keeps a copy. It has a format. A digest names what
a run trains and carries the format it was computed in:

    format 1   twelve hex digits over all fields of that format
    format 2   "2-" and twelve hex digits over the fields that differ from `digest_defaults()`

So a field that is added with a default changes no digest, provided that `ADDED_FIELDS` has it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from mpvg.config.names import check_architecture
from mpvg.config.parts import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig
from mpvg.validation import build, check, check_choices, shown

FORMAT = 2
"""Format of the run folders that are written now."""
ADDED_FIELDS: dict[str, Any] = {
    "task": "classification",
    "task_options": {},
    "val_share": 0.0,
    "orientation": "stored",
    "imbalance": 1.0,
    "subtract_mean": False,
    "optim.rates": {},
    "network.pooling": "method",
    "network.registers": 0,
    "log_gradients": False,
    "optim.milestones": [],
    "optim.warmup_steps": None,
    "steps_per_epoch": None,
}
"""Fields younger than format 1 -> the value that reproduces runs made before: files without the field are read with it,
and the digest leaves a field out where it has this value."""
UNCOUNTED = ("out", "loader", "save_steps", "device", "threads", "compile", "channels_last", "tracker", "log_gradients")
"""Fields that the digest leaves out: where a run is kept, where its data are and on which hardware it runs."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete training run."""

    data: str
    """A named set; or a folder with train/ and val/, each with one folder per class or with tar files; or
    hfds/<name or folder> of a Hugging Face data set; or a format that was registered."""
    model: str
    """A network's name; or code of your own, package.module:factory or path/file.py:factory, which must be typed."""
    method: dict[str, Any] | str = "mpvg"
    """A method's name, or the fields of a DeliverySpec."""
    task: str = "classification"
    """What is learned: a registered task."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, by name."""
    val_share: float = 0.0
    """Image files without a validation set: share of each class that is held out as one, by hashes of names; 0: off."""
    orientation: Literal["exif", "stored"] = "exif"
    """Images from files: exif turns them upright, as their EXIF data say; stored does not, as torchvision and timm."""
    imbalance: float = 1.0
    """Named sets: training images of the first class for one of the last, in a geometric series between; 1: all."""
    subtract_mean: bool = False
    """Named sets: whether the mean image of the training set is subtracted from every image."""
    epochs: int
    """Passes over the training set, or parts of `steps_per_epoch`; each ends with an evaluation."""
    steps_per_epoch: int | None = None
    """Steps of an epoch, where the length of a run is given in steps; None: those of a pass over the training set."""
    batch_size: int
    """Images per step, over all processes."""
    lr: float
    """Peak learning rate."""
    seed: int = 0
    """Seed of the initial weights, the order, the augmentation and the drop path."""
    out: str = ""
    """Run folder; empty: runs/<data>-<model>-<method>-seed<seed>."""
    recipe: str
    """Name of the recipe that gave the other values."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision."""
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """Mode of torch.compile; reduce-overhead replays CUDA graphs, for small networks; None: not compiled."""
    channels_last: bool = False
    """Whether convolutions use channels-last memory, which is faster on GPUs in bf16: useful for CeiT."""
    threads: int | None = None
    """CPU threads of torch; None: all. The same number gives the same bits."""
    ema_decay: float | None = None
    """Decay of the averaged weights, evaluated beside the trained ones; None: off."""
    ema_selects: bool = False
    """Whether the averaged weights choose the best checkpoint."""
    accumulate: int = 1
    """Gradient accumulation: parts into which each process splits its share of a batch; the step is the same."""
    save_steps: int | None = None
    """Steps between checkpoints inside an epoch; None: at the end of each epoch only."""
    tracker: str | None = None
    """Where each epoch's metrics are also sent: tensorboard, or another accelerate tracker by name."""
    log_gradients: bool = False
    """Whether metrics.jsonl also has the norms of dL/dbeta of the Last LN and of W^T dL/dh: `mpvg plot` draws them."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")
        for name in ("epochs", "batch_size", "accumulate"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        check_architecture("model", self.model)
        steps = self.steps_per_epoch
        check("steps_per_epoch", steps, steps is None or steps >= 1, "a whole number >= 1")
        check("lr", self.lr, self.lr > 0, "a number > 0")
        check("seed", self.seed, 0 <= self.seed < 2**31, "a whole number in [0, 2^31)")
        check("val_share", self.val_share, 0 <= self.val_share < 1, "a number in [0, 1)")
        check("imbalance", self.imbalance, 1 <= self.imbalance <= 1e6, "a number >= 1, <= 1,000,000")
        check("threads", self.threads, self.threads is None or 0 < self.threads <= 4096, "a whole number >= 1, <= 4096")
        check("save_steps", self.save_steps, self.save_steps is None or self.save_steps >= 1, "a whole number >= 1")
        check("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "a number in (0, 1)")
        if self.ema_selects and self.ema_decay is None:
            raise ValueError("ema_selects is True, but no weights are averaged; set ema_decay")
        if self.augment.mixes and self.batch_size % 2:
            raise ValueError(
                f"batch_size {self.batch_size} is odd, but mixup and cutmix pair the images of a batch; "
                "give an even batch_size, or set augment.mixup and augment.cutmix to 0"
            )
        ends = self.optim.warmup_epochs + self.optim.cooldown_epochs
        if ends > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs and optim.cooldown_epochs are {ends} together, more than epochs {self.epochs}; "
                "give at most that"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-safe values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Builds a config from what `to_dict` gave; a missing field of `ADDED_FIELDS` takes the value there.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
        for name, value in ADDED_FIELDS.items():
            part, _, inner = name.rpartition(".")
            parent = values.setdefault(part, {}) if part else values
            if isinstance(parent, dict):
                parent.setdefault(inner, value)
        for name, part in _parts().items():
            if name in values:
                values[name] = build(part, values[name], f"{name}.")
        config: RunConfig = build(cls, values, "")
        return config

    def digest(self, format: int = FORMAT) -> str:
        """Names what is trained; `UNCOUNTED` fields do not matter.

        Args:
            format: of the run folder, 1 or 2: see the head of this file.
        """
        flat = flatten(self.to_dict())
        counted = {name: value for name, value in flat.items() if name.split(".")[0] not in UNCOUNTED}
        if format == 1:
            return _hash(nested({name: value for name, value in counted.items() if name not in ADDED_FIELDS}))
        defaults = digest_defaults()
        return f"{format}-" + _hash({k: v for k, v in counted.items() if k not in defaults or v != defaults[k]})


def digest_format(digest: str) -> int:
    """The format that a digest was computed in."""
    number, dash, _ = digest.partition("-")
    return int(number) if dash and number.isdecimal() else 1


def digest_defaults() -> dict[str, Any]:
    """The values that format 2 leaves out of a digest, by dotted name; they never change within a format."""
    defaults: dict[str, Any] = {}
    for prefix, part in {"": RunConfig, **_parts()}.items():
        for f in dataclasses.fields(part):
            if f.default is not dataclasses.MISSING:
                defaults[f"{prefix}.{f.name}".lstrip(".")] = json.loads(json.dumps(f.default))
    return defaults | ADDED_FIELDS


@functools.cache
def _parts() -> dict[str, Any]:
    """Name -> class of the fields that are dataclasses themselves."""
    kinds = get_type_hints(RunConfig)
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names -> values; the fields of the parts only are taken apart."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if name in _parts() else {name: value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, inner = name.rpartition(".")
        parent = values.setdefault(part, {}) if part else values
        if not isinstance(parent, dict):
            raise ValueError(f"unknown config key {shown(name)}: {part} has no fields")
        parent[inner] = value
    return values


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
