"""The parts of a run's configuration: network, augmentation, optimizer, loader."""

from dataclasses import dataclass, field
from typing import Literal

from mpvg.validation import check, check_choices

Pooling = Literal["method", "max", "attention", "mean_norm", "token_and_mean"]
"""What a ViT reads out; see `NetworkConfig.pooling`."""


PRETRAINED = "pretrained"
"""The `network.init` that stands for timm's own weights."""


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
    """Checkpoint to start from, of any method, image size and number of classes: a file, or a run's folder for its best
    weights; 'pretrained': timm's own weights."""
    readout: Literal["keep", "method"] = "keep"
    """For timm/<name>: keep the network's own read-out, or use the method's."""
    pooling: Pooling = "method"
    """ViT: what is read out. method: the mean or the class token, as the method says. In place of the mean: the max
    over patches, timm's attention pooling, or mean_norm, an LN after the mean too; in place of the class token:
    token_and_mean, the mean of the two."""
    registers: int = 0
    """ViT: tokens beside the patches that nothing reads out."""
    sync_bn: bool = False
    """Whether BatchNorm normalizes over the batch of all processes, on GPUs: not in the paper's CeiT, but in its runs
    of detection and segmentation."""
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
        check("network.registers", self.registers, 0 <= self.registers <= 1024, "a whole number in [0, 1024]")
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
    rates: dict[str, float] = field(default_factory=dict)
    """Regular expression (re.search) -> learning-rate factor of the parameters whose names match; the first counts."""
    frozen: tuple[str, ...] = ()
    """Regular expressions (re.search); parameters whose names match are not trained."""
    clip_grad: float | None = None
    """Maximum global gradient norm; None: no clipping."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, counted inside `epochs`."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, in place of `warmup_epochs`, whatever the number of epochs; None: off."""
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
    """Factor of each drop of schedules `step` and `multistep`, or the power of `poly`."""
    milestones: tuple[float, ...] = ()
    """Epochs of the drops of schedule `multistep`."""
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
        steps = self.warmup_steps
        check("optim.warmup_steps", steps, steps is None or steps >= 0, "a whole number >= 0")
        check("optim.momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        low, high = self.betas
        check("optim.betas", self.betas, 0 <= low < 1 and 0 <= high < 1, "two numbers in [0, 1)")
        check("optim.eps", self.eps, self.eps >= 0, "a number >= 0")
        for name in ("body_lr", "clip_grad", "decay_epochs"):
            value = getattr(self, name)
            check(f"optim.{name}", value, value is None or value > 0, "a number > 0")
        drops = all(epoch > 0 for epoch in self.milestones)
        check("optim.milestones", self.milestones, drops, "numbers > 0")
        for pattern, factor in self.rates.items():
            check(f"optim.rates[{pattern!r}]", factor, factor > 0, "a number > 0; to train nothing, use optim.frozen")
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
