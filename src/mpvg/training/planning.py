"""`mpvg train --dry_run`: what a run would do and take."""

from pathlib import Path

from mpvg.config import RunConfig
from mpvg.runs import ensure_new_run_dir
from mpvg.training.estimate import describe_cost, describe_start, training_hours
from mpvg.training.loop import Trainer
from mpvg.training.normalization import with_weights_normalization
from mpvg.training.starting import with_init_file


def plan(config: RunConfig, *, measure: bool = False) -> list[str]:
    """What `train` would do and take, in lines; no file is written.

    Args:
        config: of the run.
        measure: whether to train a few steps to estimate the time.

    Raises:
        As `train`.
    """
    ensure_new_run_dir(Path(config.out))
    trainer = Trainer.create(with_weights_normalization(with_init_file(config)), quiet=True)
    return [describe_start(trainer), *describe_cost(trainer, measure=measure)]


def measure_hours(config: RunConfig) -> float:
    """The hours that `train` would take here without evaluation, after training a few steps that are not kept.

    Raises:
        As `train`.
    """
    return training_hours(Trainer.create(with_init_file(config), quiet=True))[0]
