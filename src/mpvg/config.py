"""The configuration of a run: plain, frozen dataclasses that load no torch.

A recipe, a YAML file or the command line builds them; the run folder keeps a copy. It has a format. A digest names what
a run trains and carries the format it was computed in:

    format 1   twelve hex digits over all fields of that format
    format 2   "2-" and twelve hex digits over the fields that differ from `digest_defaults()`

So a field that is added with a default changes no digest, provided that `ADDED_FIELDS` has it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from mpvg.validation import build, check, check_choices

FORMAT = 2
"""Format of the run folders that are written now."""
ADDED_FIELDS: dict[str, Any] = dict(task="classification", task_options={}, val_share=0.0, orientation="stored")
"""Fields younger than format 1 -> the value that reproduces runs made before: files without the field are read with it,
and the digest leaves a field out where it has this value."""
UNCOUNTED = ("out", "loader", "save_steps", "device", "threads", "compile", "channels_last", "tracker")
"""Fields that the digest leaves out: where a run is kept, where its data are and on which hardware it runs."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Arguments of the network; everything else is fixed by its name."""

    img_size: int | None = None
    """Side of the square input in pixels; None: the data set's own, or 224 for a folder."""
    pos_std: float | None = None
    """Standard deviation at which the position embedding starts; None: the network's own (0.02)."""
    drop_path: float = 0.0
    """Stochastic depth at the last layer, growing linearly from 0; in [0, 1)."""
    init: str | None = None
    """Checkpoint to start from, of any method, image size and number of classes; 'pretrained': timm's own weights."""
    readout: Literal["keep", "method"] = "keep"
    """For timm/<name>: keep the network's own read-out, or use the method's."""
    sync_bn: bool = False
    """Whether BatchNorm (CeiT) normalizes over the batch of all processes, on GPUs; the paper does not."""
    start: Literal["fresh", "preserve"] = "fresh"
    """For timm/<name>: deliver from the first step, or start from the unchanged outputs of the original network."""
    mean: tuple[float, ...] | None = None
    """Channel means for the normalization; None: those of the data set, ImageNet's for a folder."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of the same images; None: as for `mean`."""
    crop_pct: float = 0.875
    """Images from files, evaluation: side of the center crop divided by the shorter side of the resized image."""

    def __post_init__(self) -> None:
        check("network.img_size", self.img_size, self.img_size is None or self.img_size >= 1, "a whole number >= 1")
        check("network.pos_std", self.pos_std, self.pos_std is None or self.pos_std >= 0, "a number >= 0")
        check("network.drop_path", self.drop_path, 0 <= self.drop_path < 1, "a number in [0, 1)")
        check_choices(self, "network.")
        check("network.crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "a number in (0, 1]")
        check("network.std", self.std, all(value > 0 for value in self.std or ()), "numbers > 0")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images and their targets."""

    crop_padding: int = 0
    """Named sets: padding, in pixels, before a random crop; 0: no crop."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Images from files: range of the random resized crop's area, as a share of the image area."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Images from files: interpolation of the crop; "random" draws bilinear or bicubic for each image."""
    pipeline: Literal["auto", "timm", "fast"] = "auto"
    """Transforms. auto: timm's for images from files, on the device for named sets; timm: timm's for named sets too;
    fast: images from files are cropped and flipped in the workers, the rest runs on the device."""
    repeats: int = 1
    """Repeated augmentation: copies of each drawn image per epoch; the epoch length is unchanged; 1: off."""
    hflip: float = 0.0
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """timm's RandAugment string, such as 'rand-m9-mstd0.5-inc1'; None: off."""
    erase: float = 0.0
    """Probability of random erasing (2-33 % of the area, normal noise per pixel)."""
    mixup: float = 0.0
    """Mixup alpha; 0: off."""
    cutmix: float = 0.0
    """CutMix alpha; 0: off."""
    mix_prob: float = 1.0
    """Probability that Mixup or CutMix is applied to a batch."""
    mix_switch: float = 0.5
    """Probability of CutMix instead of Mixup when both are on."""
    smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""

    def __post_init__(self) -> None:
        check_choices(self, "augment.")
        check("augment.crop_padding", self.crop_padding, self.crop_padding >= 0, "a whole number >= 0")
        low, high = self.crop_scale
        check("augment.crop_scale", self.crop_scale, 0 < low <= high <= 1, "two numbers with 0 < low <= high <= 1")
        check("augment.repeats", self.repeats, self.repeats >= 1, "a whole number >= 1")
        for name in ("hflip", "erase", "mix_prob", "mix_switch"):
            check(f"augment.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("mixup", "cutmix"):
            check(f"augment.{name}", getattr(self, name), getattr(self, name) >= 0, "a number >= 0")
        check("augment.smoothing", self.smoothing, 0 <= self.smoothing < 1, "a number in [0, 1)")

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on, which needs an even batch size."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule; the peak learning rate is the run's `lr`."""

    name: str = "adamw"
    """Name of a timm optimizer."""
    weight_decay: float = 0.05
    """Weight decay; not applied to 1-D parameters and to those that the network exempts, such as its PE."""
    decay_all: bool = False
    """Whether weight decay applies to all parameters."""
    momentum: float = 0.9
    """Momentum of SGD and similar optimizers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    layer_decay: float | None = None
    """Learning-rate factor per layer, from the head down, for fine-tuning; None: off."""
    body_lr: float | None = None
    """Learning-rate factor of all parameters but the head's, for fine-tuning; None: 1."""
    frozen: tuple[str, ...] = ()
    """Regular expressions (re.search); parameters whose names match are not trained."""
    clip_grad: float | None = None
    """Maximum global gradient norm; None: no clipping."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, counted inside `epochs`."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule."""
    schedule: str = "cosine"
    """Name of a timm schedule."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes every step or every epoch."""
    schedule_lag: int = 0
    """Delay of the schedule in units, for parity with scripts that step it after the step or epoch."""
    decay_epochs: float | None = None
    """Epochs between the drops of schedule `step`, or the length of the decay at the end of `wsd` and `rsqrt`."""
    decay_rate: float = 0.1
    """Factor of each drop of schedule `step`, or the power of `poly`."""
    warmup_prefix: bool = False
    """Whether the schedule starts after the warm-up; otherwise the warm-up replaces its first part."""
    cooldown_epochs: int = 0
    """Number of last epochs, counted inside `epochs`, at the schedule's final rate."""

    def __post_init__(self) -> None:
        check_choices(self, "optim.")
        for name in ("weight_decay", "decay_rate", "warmup_epochs", "warmup_lr", "min_lr"):
            check(f"optim.{name}", getattr(self, name), getattr(self, name) >= 0, "a number >= 0")
        for name in ("schedule_lag", "cooldown_epochs"):
            check(f"optim.{name}", getattr(self, name), getattr(self, name) >= 0, "a whole number >= 0")
        check("optim.momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        low, high = self.betas
        check("optim.betas", self.betas, 0 <= low < 1 and 0 <= high < 1, "two numbers in [0, 1)")
        check("optim.eps", self.eps, self.eps >= 0, "a number >= 0")
        for name in ("body_lr", "clip_grad", "decay_epochs"):
            value = getattr(self, name)
            check(f"optim.{name}", value, value is None or value > 0, "a number > 0")
        decay = self.layer_decay
        check("optim.layer_decay", decay, decay is None or 0 < decay <= 1, "a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where the data are and how they are read."""

    root: str | None = None
    """Folder of a named set's files, or the cache of a Hugging Face data set; None: the usual places."""
    workers: int = 2
    """Images from files: worker processes that decode and augment; 0: the main process does it."""
    skip_corrupt: bool = False
    """Images from files: skip and count images that cannot be read, instead of stopping."""

    def __post_init__(self) -> None:
        check("loader.workers", self.workers, self.workers >= 0, "a whole number >= 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete training run."""

    data: str
    """A named set; or a folder with train/ and val/, each with one folder per class or with tar files; or
    hfds/<name or folder> of a Hugging Face data set; or a format that was registered."""
    model: str
    """A network's name."""
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
    epochs: int
    """Passes over the training set."""
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
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")
        for name in ("epochs", "batch_size", "accumulate"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        check("lr", self.lr, self.lr > 0, "a number > 0")
        check("seed", self.seed, 0 <= self.seed < 2**31, "a whole number in [0, 2^31)")
        check("val_share", self.val_share, 0 <= self.val_share < 1, "a number in [0, 1)")
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
            return _hash(_nested({name: value for name, value in counted.items() if name not in ADDED_FIELDS}))
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


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, inner = name.rpartition(".")
        (values.setdefault(part, {}) if part else values)[inner] = value
    return values


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
