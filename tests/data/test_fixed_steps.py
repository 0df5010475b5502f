"""Epochs of a given number of steps read what epochs of whole passes read."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mpvg.config import RunConfig
from mpvg.data import Shard, open_data
from mpvg.data.fixed_steps import FixedSteps
from mpvg.data.tensors import TensorBatches

CPU = Shard(torch.device("cpu"))


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 12])
def test_step_n_reads_the_same_batch(make_config: Callable[..., RunConfig], steps: int) -> None:
    config = make_config("digits", batch_size=280)  # 5 batches of 1,437 images
    passes = open_data(config, CPU).train
    expected = [batch.images for number in range(4) for batch in passes.epoch(number)]
    train = open_data(replace(config, steps_per_epoch=steps), CPU).train
    assert isinstance(train, FixedSteps)
    assert len(train) == steps
    found = [batch.images for epoch in range(20 // steps) for batch in train.epoch(epoch)]
    assert len(found) == 20 // steps * steps
    assert all(map(torch.equal, found, expected))
    rest = [batch.images for batch in train.epoch(1, start=steps - 1)] if steps <= 10 else []
    assert all(map(torch.equal, rest, expected[2 * steps - 1 : 2 * steps]))
    assert len(list(train.epoch(0, start=steps))) == 0


def test_validation_stays_whole_and_what_is_skipped_is_shared(make_config: Callable[..., RunConfig]) -> None:
    data = open_data(replace(make_config("digits"), steps_per_epoch=2), CPU)
    assert isinstance(data.val, TensorBatches)
    assert sum(batch.size for batch in data.val.epoch()) == data.info.val_size
    inner = data.train._batches  # type: ignore[attr-defined]
    assert data.train.unreadable is inner.unreadable
    assert data.train.skipped == inner.skipped == 0
