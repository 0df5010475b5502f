"""Configs: round trips, the digest, what is refused."""

import dataclasses
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.delivery import METHODS
from mpvg.recipes import RECIPES

BASE = RunConfig(data="digits", model="m", epochs=3, batch_size=8, lr=1e-3, recipe="digits", ema_decay=0.5)

shares = st.floats(0, 1)
positive = st.floats(1e-12, 1e6)
pairs = st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1))
text = st.text("abcé:#'\" -0{[\n", max_size=8)
SPECIAL = {
    "method": st.sampled_from(sorted(METHODS)) | st.sampled_from(list(METHODS.values())).map(lambda s: s.to_dict()),
    "batch_size": st.integers(1, 500).map(lambda half: 2 * half),
    "seed": st.integers(0, 2**31 - 1),
    "epochs": st.integers(2, 500),
    "ema_decay": st.floats(0.01, 0.99),  # None goes without ema_selects only
    "crop_scale": pairs,
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    "smoothing": st.floats(0, 0.99),
    "drop_path": st.floats(0, 0.99),
    "layer_decay": st.none() | st.floats(0.01, 1),
    "warmup_epochs": st.floats(0, 1),
    "cooldown_epochs": st.just(0) | st.just(1),
    "momentum": st.floats(0, 0.99),
    "val_share": st.floats(0, 0.99),
    "crop_pct": st.floats(0.1, 1),
    "imbalance": st.floats(1, 1e6),
    "rates": st.dictionaries(text, positive, max_size=2),
}
BY_TYPE = {
    int: st.integers(1, 500),
    float: shares.filter(lambda value: value > 1e-9),
    str: text,
    bool: st.booleans(),
    int | None: st.none() | st.integers(1, 500),
    float | None: st.none() | positive,
    str | None: st.none() | text,
    dict[str, Any]: st.dictionaries(text, st.integers() | text, max_size=2),
    tuple[float, ...] | None: st.none() | st.lists(positive, min_size=1, max_size=3).map(tuple),
    tuple[float, ...]: st.lists(positive, max_size=3).map(tuple),
    tuple[str, ...]: st.lists(text, max_size=2).map(tuple),
}


def strategy_of(kind: Any) -> st.SearchStrategy[Any]:
    if type(None) in get_args(kind) and kind not in BY_TYPE:
        return st.none() | st.one_of(*(strategy_of(part) for part in get_args(kind) if part is not type(None)))
    return st.sampled_from(get_args(kind)) if get_origin(kind) is Literal else BY_TYPE[kind]


def parts_of(cls: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        f.name: SPECIAL[f.name] if f.name in SPECIAL else strategy_of(f.type)
        for f in dataclasses.fields(cls)
        if f.name not in PARTS
    }


PARTS = {"network": NetworkConfig, "augment": AugmentConfig, "optim": OptimConfig, "loader": LoaderConfig}
FIELDS = {(None, name): strategy for name, strategy in parts_of(RunConfig).items()}
FIELDS |= {(part, name): strategy for part, cls in PARTS.items() for name, strategy in parts_of(cls).items()}
configs = st.builds(
    RunConfig,
    **parts_of(RunConfig),
    **{part: st.builds(cls, **parts_of(cls)) for part, cls in PARTS.items()},
)
every_field = pytest.mark.parametrize(("part", "name"), FIELDS, ids=lambda value: value or "run")


def changed(config: RunConfig, part: str | None, name: str, value: Any) -> RunConfig:
    if part is None:
        return replace(config, **{name: value})
    return replace(config, **{part: replace(getattr(config, part), **{name: value})})


@given(configs)
def test_a_config_survives_yaml(config: RunConfig) -> None:
    written = yaml.safe_dump(config.to_dict(), sort_keys=False)
    read = RunConfig.from_dict(yaml.safe_load(written))
    assert read == config
    assert read.digest() == config.digest()
    assert yaml.safe_dump(read.to_dict(), sort_keys=False) == written


@every_field
@settings(max_examples=20)
@given(st.data())
def test_the_digest_changes_with_what_is_trained_and_with_nothing_else(
    part: str | None, name: str, data: st.DataObject
) -> None:
    old = BASE if part is None else getattr(BASE, part)
    value = data.draw(FIELDS[part, name].filter(lambda value: value != getattr(old, name)))
    other = changed(BASE, part, name, value)
    where = part == "loader" or (
        part is None
        and name in ("out", "save_steps", "device", "threads", "compile", "channels_last", "tracker", "log_gradients")
    )
    assert (other.digest() == BASE.digest()) == where


def test_the_digest_is_the_same_on_every_machine_and_in_every_release() -> None:
    """Summaries of years are collected by it: a change of this value belongs under "numbers changed"."""
    assert BASE.digest() == "2-c91c007afb77"
    assert BASE.digest(1) == "48394792a756"  # as computed by commit bab8b35
    assert BASE.digest() == RunConfig.from_dict(BASE.to_dict()).digest()


@pytest.mark.parametrize(
    ("part", "name", "value", "allowed"),
    [
        (None, "epochs", 0, "a whole number >= 1"),
        (None, "batch_size", -8, "a whole number >= 1"),
        (None, "lr", 0.0, "a number > 0"),
        (None, "lr", float("nan"), "a number > 0"),
        (None, "seed", -1, r"a whole number in \[0, 2\^31\)"),
        (None, "seed", 2**31, r"a whole number in \[0, 2\^31\)"),
        *((None, "threads", value, "a whole number >= 1, <= 4096") for value in (0, -1, 4097, 100_000)),
        (None, "save_steps", 0, "a whole number >= 1"),
        (None, "ema_decay", 1.0, r"a number in \(0, 1\)"),
        ("network", "img_size", 0, "a whole number >= 1"),
        ("network", "pos_std", -0.1, "a number >= 0"),
        ("network", "drop_path", 1.0, r"a number in \[0, 1\)"),
        ("network", "readout", "mean", "'keep', 'method'"),
        ("network", "start", "warm", "'fresh', 'preserve'"),
        ("network", "std", (0.2, 0.0), "numbers > 0"),
        ("augment", "crop_padding", -1, "a whole number >= 0"),
        ("augment", "crop_scale", (0.5, 0.4), "two numbers with 0 < low <= high <= 1"),
        ("augment", "crop_scale", (0.0, 0.4), "two numbers with 0 < low <= high <= 1"),
        ("augment", "hflip", 1.1, r"a number in \[0, 1\]"),
        ("augment", "erase", -0.1, r"a number in \[0, 1\]"),
        ("augment", "mix_prob", 2, r"a number in \[0, 1\]"),
        ("augment", "mix_switch", -1, r"a number in \[0, 1\]"),
        ("augment", "mixup", -0.1, "a number >= 0"),
        ("augment", "cutmix", -0.1, "a number >= 0"),
        ("augment", "smoothing", 1.0, r"a number in \[0, 1\)"),
        ("optim", "weight_decay", -1, "a number >= 0"),
        ("optim", "betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("optim", "eps", -1e-8, "a number >= 0"),
        ("optim", "clip_grad", 0.0, "a number > 0"),
        ("optim", "layer_decay", 0.0, r"a number in \(0, 1\]"),
        ("optim", "layer_decay", 1.5, r"a number in \(0, 1\]"),
        ("optim", "warmup_epochs", -1, "a number >= 0"),
        ("optim", "warmup_lr", -1, "a number >= 0"),
        ("optim", "min_lr", -1, "a number >= 0"),
        ("loader", "workers", -1, "a whole number >= 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(part: str | None, name: str, value: Any, allowed: str) -> None:
    full = name if part is None else rf"{part}\.{name}"
    with pytest.raises(ValueError, match=rf"^{full} is .*; allowed: {allowed}$"):
        changed(BASE, part, name, value)


@pytest.mark.parametrize(
    ("augment", "refused"),
    [
        (AugmentConfig(mixup=0.8), True),
        (AugmentConfig(cutmix=1.0), True),
        (AugmentConfig(cutmix=1.0, mix_prob=0.0), False),
        (AugmentConfig(), False),
    ],
)
def test_an_odd_batch_cannot_be_mixed(augment: AugmentConfig, refused: bool) -> None:
    assert augment.mixes == refused
    if refused:
        with pytest.raises(
            ValueError, match="batch_size 7 is odd, but mixup and cutmix pair .* give an even batch_size"
        ):
            replace(BASE, batch_size=7, augment=augment)
    else:
        assert replace(BASE, batch_size=7, augment=augment).batch_size == 7


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    for optim in (OptimConfig(warmup_epochs=4), OptimConfig(warmup_epochs=2, cooldown_epochs=2)):
        with pytest.raises(ValueError, match=r"cooldown_epochs are 4 together, more than epochs 3; give at most that"):
            replace(BASE, optim=optim)


def test_selecting_by_an_average_that_is_not_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema_selects is True, but no weights are averaged; set ema_decay"):
        replace(BASE, ema_decay=None, ema_selects=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown config key 'epoch'; did you mean epochs. Known: data, model"),
        ({"optim": {"lr": 3}}, r"unknown config key 'optim\.lr'.* Known: optim\.name, optim\.weight_decay"),
        ({"optim": 3}, r"optim must hold the keys name, .*, got 3"),
    ],
)
def test_a_dictionary_that_is_no_config_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(BASE.to_dict() | values)


def test_a_missing_key_is_named() -> None:
    values = BASE.to_dict()
    del values["lr"]
    with pytest.raises(ValueError, match="config key lr is missing"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_itself_and_survives_yaml(name: str) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    assert config.data in (name, "folder", "cifar100", "coco/coco", "ade20k", "canvas")
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert RECIPES[name].__doc__
