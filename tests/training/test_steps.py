"""What a step is made of: parts of a batch, frozen parameters, the weights that select the best checkpoint."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from mpvg import runs, tasks
from mpvg.config import AugmentConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.data import ImageBatch
from mpvg.runs.listing import find_runs
from mpvg.seeding import seed_everything
from mpvg.tasks import Evaluation
from mpvg.tasks.classification import ClassificationTask
from mpvg.training import resume, train
from short_runs import weights

MakeConfig = Callable[..., RunConfig]
BeforeStep = Callable[[Callable[[int, ImageBatch], Any]], None]
TrainUntil = Callable[[RunConfig, int], None]


def test_a_batch_in_parts_makes_the_same_step(tiny: MakeConfig) -> None:
    """Mixup and clipping included, also where the parts are of unequal sizes: to rounding, without random layers."""
    whole = tiny("whole", batch_size=16, network=NetworkConfig(img_size=8), ema_decay=None)
    train(whole, quiet=True)
    for parts in (2, 3, 50):
        cut = replace(whole, out=f"{whole.out}-{parts}", accumulate=parts)
        train(cut, quiet=True)
        for key, value in weights(whole.out).items():
            torch.testing.assert_close(weights(cut.out)[key], value, rtol=0, atol=2e-5)
        lines = [runs.load(config.out).metrics() for config in (whole, cut)]
        for one, other in zip(*lines, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_no_part_is_larger_than_its_share(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 16 in 3 parts is 6, 6 and 4 images: what memory must hold."""
    sizes: list[int] = []
    original = ClassificationTask.losses

    def recording(task: ClassificationTask, model: nn.Module, batch: ImageBatch) -> dict[str, torch.Tensor]:
        sizes.append(batch.size)
        return original(task, model, batch)

    monkeypatch.setattr(ClassificationTask, "losses", recording)
    train(tiny(epochs=1, batch_size=16, accumulate=3), quiet=True)
    assert sizes == [6, 6, 4] * 3


def test_frozen_parameters_stay_and_the_rest_learns(tiny: MakeConfig) -> None:
    config = tiny(
        epochs=1, ema_decay=None, optim=OptimConfig(frozen=(r"^blocks\.0\.", r"^pos_embed$"), weight_decay=0.5)
    )
    train(config, quiet=True)
    run = runs.load(config.out)
    seed_everything(config.seed)
    start, end = run.task().build_model(init=False).state_dict(), weights(config.out)
    for key, value in start.items():
        frozen = key.startswith("blocks.0.") or key == "pos_embed"
        assert torch.equal(end[key], value) == frozen, key


@pytest.mark.parametrize("selects", [False, True])
def test_the_best_checkpoint_is_chosen_by_the_weights_that_count(
    tiny: MakeConfig, selects: bool, set_accuracies: Callable[[list[float]], None]
) -> None:
    """The trained weights are best in epoch 1, their average in epoch 2."""
    set_accuracies([0.9, 0.1, 0.2, 0.8, 0.3, 0.3])  # trained and averaged, epoch by epoch
    config = tiny(epochs=3, batch_size=50, ema_selects=selects)
    summary = train(config, quiet=True)
    assert summary["best_epoch"] == (2 if selects else 1)
    assert summary["best_accuracy"] == (0.8 if selects else 0.9)
    assert (Path(config.out) / "checkpoints/best").readlink().name == f"step-{2 if selects else 1:08d}"


class Likelihood(ClassificationTask):
    """Classification whose best checkpoint has the lowest negative log-likelihood."""

    best: ClassVar[str] = "nll"
    summarized: ClassVar[tuple[str, ...]] = ("nll",)
    found: ClassVar[list[float]] = []
    """What the next evaluations find."""

    def evaluate(self, *arguments: Any) -> Evaluation:
        return Evaluation({"accuracy": 0.5, "top5": 0.5, "nll": self.found.pop(0)}, 13)


@pytest.mark.parametrize(
    ("selects", "found", "best"),
    [
        (False, [3.0, 9.0, 1.0, 9.0, 1.0, 9.0, 2.0, 0.0], 2),  # trained and averaged, epoch by epoch
        (True, [0.0, 3.0, 9.0, 4.0, 9.0, 3.0, 9.0, 2.5], 4),
        (True, [0.0, 3.0, 9.0, 4.0, 9.0, 3.0, 9.0, 5.0], 1),
        (True, [0.0, math.nan, 9.0, 4.0, 9.0, 3.0, 9.0, 3.5], 3),
    ],
    ids=["trained", "averaged", "the first of equals", "not the first, which is no number"],
)
def test_a_task_may_want_the_lowest_value(
    tiny: MakeConfig,
    train_until: TrainUntil,
    monkeypatch: pytest.MonkeyPatch,
    selects: bool,
    found: list[float],
    best: int,
) -> None:
    """Also where the run dies in between."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))  # the task is gone after the test
    tasks.register("likelihood", Likelihood)
    monkeypatch.setattr(Likelihood, "found", found.copy())
    config = tiny(task="likelihood", epochs=4, batch_size=50, ema_selects=selects)
    train_until(config, 3)
    summary = resume(config.out, quiet=True)
    value = found[2 * best - 2 + selects]
    assert (summary["best_metric"], summary["higher_is_better"]) == ("nll", False)
    assert (summary["best_nll"], summary["best_epoch"]) == (value, best)
    assert (summary["nll"], summary["ema_nll"]) == (found[6], found[7])
    assert "best_accuracy" not in summary
    link = Path(config.out) / "checkpoints/best"
    assert link.readlink().name == f"step-{best:08d}"
    (listed,) = find_runs(Path(config.out))
    assert listed.row()[3] == f"nll {value:.4f}"


def test_every_step_draws_numbers_of_its_own_and_a_resumed_run_the_same(
    tiny: MakeConfig, before_step: BeforeStep, train_until: TrainUntil
) -> None:
    """torch's, NumPy's and Python's, in two epochs of four steps."""

    def draw(step: int, batch: ImageBatch) -> None:
        drawn[step] = (float(torch.rand(())), float(np.random.rand()), random.random())

    drawn: dict[int, tuple[float, ...]] = {}
    whole, stopped = (tiny(name, save_steps=3) for name in ("whole", "stopped"))
    before_step(draw)
    train(whole, quiet=True)
    expected = drawn.copy()
    assert list(expected) == list(range(1, 9))
    assert all(len(set(numbers)) == 8 for numbers in zip(*expected.values(), strict=True))
    train_until(stopped, 8)
    drawn.clear()
    before_step(draw)
    resume(stopped.out, quiet=True)
    assert drawn == {step: expected[step] for step in (7, 8)}


def test_a_network_with_frozen_and_with_batch_statistics_trains_and_comes_back(tiny: MakeConfig) -> None:
    """T2T-ViT's table is no parameter of the optimizer; CeiT's running statistics are in the checkpoint."""
    for model in ("t2t_vit_7", "ceit_tiny_patch16_224"):
        config = tiny(
            model,
            model=model,
            epochs=1,
            batch_size=50,
            network=NetworkConfig(img_size=32),
            augment=AugmentConfig(smoothing=0.1),
        )
        train(config, quiet=True)
        run = runs.load(config.out)
        saved: nn.Module = run.model()
        assert saved.state_dict().keys() == weights(config.out).keys()
    counts = [value for key, value in weights(config.out).items() if key.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {1}
