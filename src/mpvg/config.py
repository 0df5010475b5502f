"""What a run is asked to do: plain, frozen dataclasses that load no torch.

They are built by a recipe, a YAML file or the command line, written into the run folder, and read back from there.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What is changed of the named network; the rest is fixed by its name."""

    img_size: int | None = None
    """Side of the square input in pixels; None: the data set's own, or 224 for a folder."""
    pos_std: float | None = None
    """Standard deviation at which the position embedding starts; None: the network's own (0.02)."""
    drop_path: float = 0.0
    """Stochastic depth at the last layer, growing linearly from 0; in [0, 1)."""
    init: str | None = None
    """Checkpoint that the weights start from, of any method, image size and classes; 'pretrained': timm's own."""
    readout: Literal["keep", "method"] = "keep"
    """For timm/<name>: whether the network's own read-out stays, or becomes the method's."""
    sync_bn: bool = False
    """Whether BatchNorm (CeiT) sees the batch of all processes, on GPUs; the paper's does not."""
    start: Literal["fresh", "preserve"] = "fresh"
    """For timm/<name>: whether the delivery acts from the start, or begins from unchanged answers."""
    mean: tuple[float, ...] | None = None
    """Channel means of the images that the weights were trained on; None: the data's own, ImageNet's for a folder."""
    std: tuple[float, ...] | None = None
    """Standard deviations of the same images; None: as for `mean`."""
    crop_pct: float = 0.875
    """Evaluation on images from files: side of the centre crop, as a share of the resized image's shorter side."""

    def __post_init__(self) -> None:
        _check("network.img_size", self.img_size, self.img_size is None or self.img_size >= 1, "a whole number >= 1")
        _check("network.pos_std", self.pos_std, self.pos_std is None or self.pos_std >= 0, "a number >= 0")
        _check("network.drop_path", self.drop_path, 0 <= self.drop_path < 1, "a number in [0, 1)")
        _check("network.readout", self.readout, self.readout in ("keep", "method"), "'keep', 'method'")
        _check("network.start", self.start, self.start in ("fresh", "preserve"), "'fresh', 'preserve'")
        _check("network.crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "a number in (0, 1]")
        _check("network.std", self.std, all(value > 0 for value in self.std or ()), "numbers > 0")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to a training image, and to the targets with it."""

    crop_padding: int = 0
    """Tensor data: random crop after padding by so many pixels; 0: none."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Images from files: share of the image area that a random resized crop takes."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Images from files: how a crop is resized; "random" draws bilinear or bicubic for each image."""
    pipeline: Literal["auto", "timm", "fast"] = "auto"
    """Who augments; auto: timm's transforms for files, the device for named sets; timm: timm for named sets, too; fast:
    for images from files, crop and flip in the worker, the rest on the device."""
    repeats: int = 1
    """Repeated augmentation: times that a drawn image stands in an epoch, which is no longer for it; 1: off."""
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
    """Probability that a batch is mixed at all."""
    mix_switch: float = 0.5
    """Probability of CutMix instead of Mixup where both are on."""
    smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""

    def __post_init__(self) -> None:
        _check("augment.crop_padding", self.crop_padding, self.crop_padding >= 0, "a whole number >= 0")
        low, high = self.crop_scale
        _check("augment.crop_scale", self.crop_scale, 0 < low <= high <= 1, "two numbers with 0 < low <= high <= 1")
        _check("augment.repeats", self.repeats, self.repeats >= 1, "a whole number >= 1")
        for name in ("hflip", "erase", "mix_prob", "mix_switch"):
            _check(f"augment.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("mixup", "cutmix"):
            _check(f"augment.{name}", getattr(self, name), getattr(self, name) >= 0, "a number >= 0")
        _check("augment.smoothing", self.smoothing, 0 <= self.smoothing < 1, "a number in [0, 1)")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which needs an even batch size."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule; the peak learning rate is the run's `lr`."""

    name: str = "adamw"
    """An optimizer that timm knows by name."""
    weight_decay: float = 0.05
    """Weight decay; 1-D parameters and what the network exempts, such as its PE, are spared."""
    decay_all: bool = False
    """Whether no parameter is spared."""
    momentum: float = 0.9
    """Momentum of SGD and its like."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    layer_decay: float | None = None
    """Learning-rate factor per layer, from the head downwards, for fine-tuning; None: off."""
    body_lr: float | None = None
    """Factor on the learning rate of all but the head, for fine-tuning; None: 1."""
    frozen: tuple[str, ...] = ()
    """Patterns (re.search) of parameters that are not trained."""
    clip_grad: float | None = None
    """Largest global gradient norm; None: no clipping."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, counted inside `epochs`."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule."""
    schedule: str = "cosine"
    """A schedule that timm knows by name."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """How often the learning rate changes."""
    schedule_lag: int = 0
    """Units by which the rate comes late, as in scripts that set it behind the step or epoch that it is for."""
    decay_epochs: float | None = None
    """Epochs between the falls of schedule `step`, or the length of the decay at the end of `wsd` and `rsqrt`."""
    decay_rate: float = 0.1
    """Factor of each fall of schedule `step`, or the power of `poly`."""
    warmup_prefix: bool = False
    """Whether the schedule begins after the warm-up; otherwise its first part is replaced by it."""
    cooldown_epochs: int = 0
    """Last epochs, counted inside `epochs`, at the schedule's final rate."""

    def __post_init__(self) -> None:
        for name in ("weight_decay", "decay_rate", "warmup_epochs", "warmup_lr", "min_lr"):
            _check(f"optim.{name}", getattr(self, name), getattr(self, name) >= 0, "a number >= 0")
        for name in ("schedule_lag", "cooldown_epochs"):
            _check(f"optim.{name}", getattr(self, name), getattr(self, name) >= 0, "a whole number >= 0")
        _check("optim.momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        _check("optim.body_lr", self.body_lr, self.body_lr is None or self.body_lr > 0, "a number > 0")
        low, high = self.betas
        _check("optim.betas", self.betas, 0 <= low < 1 and 0 <= high < 1, "two numbers in [0, 1)")
        _check("optim.eps", self.eps, self.eps >= 0, "a number >= 0")
        _check("optim.clip_grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "a number > 0")
        _check(
            "optim.decay_epochs", self.decay_epochs, self.decay_epochs is None or self.decay_epochs > 0, "a number > 0"
        )
        decay = self.layer_decay
        _check("optim.layer_decay", decay, decay is None or 0 < decay <= 1, "a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where the data lie and how they are read."""

    root: str | None = None
    """Folder that holds the data set's files, or takes those of a Hugging Face one; None: the usual places."""
    workers: int = 2
    """Images from files: processes that decode and augment; 0: none beside the main one."""
    skip_corrupt: bool = False
    """Images from files: leave out images that cannot be read, and count them, instead of stopping."""

    def __post_init__(self) -> None:
        _check("loader.workers", self.workers, self.workers >= 0, "a whole number >= 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete training run."""

    data: str
    """A data set's name, or a folder with train/ and val/ and a folder a class in each, or with tar files of them;
    or hfds/<name or folder> of a Hugging Face data set."""
    model: str
    """A network's name."""
    method: dict[str, Any] | str = "mpvg"
    """A method's name, or the fields of a DeliverySpec."""
    epochs: int
    """Passes over the training set."""
    batch_size: int
    """Images a step, over all processes."""
    lr: float
    """Peak learning rate."""
    seed: int = 0
    """Seed of the initial weights, the order, the augmentation and the drop path."""
    out: str = ""
    """Run folder; empty: runs/<data>-<model>-<method>-seed<seed>."""
    recipe: str
    """The recipe that the values which are not given come from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision."""
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """Mode of torch.compile; reduce-overhead replays CUDA graphs, for small networks; None: not compiled."""
    channels_last: bool = False
    """Whether convolutions keep channels last in memory, as GPUs compute them faster in bf16: of use to CeiT."""
    threads: int | None = None
    """CPU threads of the arithmetic; None: all. The same number gives the same bits."""
    ema_decay: float | None = None
    """Decay of the averaged weights, evaluated beside the trained ones; None: off."""
    ema_selects: bool = False
    """Whether the best checkpoint is the one whose averaged weights score best."""
    accumulate: int = 1
    """Parts in which a process goes through its share of a batch, to save memory; the step is the same."""
    save_steps: int | None = None
    """Steps between checkpoints inside an epoch; None: at the end of each epoch only."""
    tracker: str | None = None
    """Where each epoch's metrics are sent as well: tensorboard, or another of accelerate's trackers by name."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        _check("lr", self.lr, self.lr > 0, "a number > 0")
        _check("seed", self.seed, 0 <= self.seed < 2**31, "a whole number in [0, 2^31)")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, "a whole number >= 1")
        modes = (None, "default", "reduce-overhead", "max-autotune")
        _check("compile", self.compile, self.compile in modes, f"{', '.join(map(str, modes))}")
        _check("save_steps", self.save_steps, self.save_steps is None or self.save_steps >= 1, "a whole number >= 1")
        _check("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "a number in (0, 1)")
        _check("accumulate", self.accumulate, self.accumulate >= 1, "a whole number >= 1")
        if self.ema_selects and self.ema_decay is None:
            raise ValueError("ema_selects is True, but nothing is averaged; set ema_decay")
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
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Builds the config that `to_dict` wrote.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        parts = {"network": NetworkConfig, "augment": AugmentConfig, "optim": OptimConfig, "loader": LoaderConfig}
        values = dict(values)
        for name, part in parts.items():
            if name in values:
                values[name] = _build(part, values[name], f"{name}.")
        config: RunConfig = _build(cls, values, "")
        return config

    def digest(self) -> str:
        """Twelve hex digits that name what is trained; where, from where and with which hardware do not count."""
        values = self.to_dict()
        for name in ("out", "loader", "save_steps", "device", "threads", "compile", "channels_last", "tracker"):
            del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def unknown(what: str, name: str, known: Iterable[str], near: int = 3) -> str:
    """Says that a name is unknown, which are near it (`near` of them at most), and which are known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=near, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}"


def _build(cls: Any, values: Any, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} must hold the keys {', '.join(fields)}, got {values!r}")
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown config key {prefix}{key}; allowed: {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    for key in required:
        if key not in values:
            raise ValueError(f"config key {prefix}{key} is missing")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _check(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
