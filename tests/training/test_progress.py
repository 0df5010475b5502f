"""What is printed while a run trains."""

import pytest

from mpvg.tasks import describe_metrics
from mpvg.tasks.classification import ClassificationTask
from mpvg.training.progress import Reporter

VALUES = {
    "epoch": 2,
    "step": 20,
    "train_loss": 1.5,
    "images_per_second": 321.4,
    "skipped": 0,
}
SCORES = {"accuracy": 0.25, "nll": 2.0}
METRICS = describe_metrics(ClassificationTask, SCORES)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the reporter sees, as its one item."""
    now = [1000.0]
    monkeypatch.setattr("mpvg.training.progress.time.monotonic", lambda: now[0])
    return now


def test_an_epoch_is_one_line_with_the_time_that_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(40, 10) as reporter:
        clock[0] += 100  # ten steps, and twenty are left
        reporter.epoch(VALUES, 4, METRICS)
        reporter.epoch(VALUES | {"skipped": 3}, 4, describe_metrics(ClassificationTask, SCORES | {"ema_accuracy": 0.5}))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "epoch 2/4  loss 1.500  accuracy 25.00 %  nll 2.0000  321 images/s  3:20 left"
    assert "accuracy 25.00 % (ema 50.00 %)  nll 2.0000" in second
    assert second.endswith("3:20 left  3 unreadable images skipped")


def test_steps_are_told_every_half_minute_where_there_is_no_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(1000, 100) as reporter:
        for step in range(101, 161):
            clock[0] += 1
            reporter.step(1, step, 0.5, 99.6)
    assert capsys.readouterr().out == "epoch 1  step 131/1000  loss 0.500  100 images/s  14:29 left\n"


def test_a_quiet_reporter_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(40, quiet=True) as reporter:
        clock[0] += 100
        reporter.step(1, 10, 0.5, 99.6)
        reporter.epoch(VALUES, 4, METRICS)
    assert capsys.readouterr().out == ""


def test_hours_are_told_as_hours(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(40) as reporter:
        clock[0] += 3725
        reporter.epoch(VALUES, 4, METRICS)
    assert "  1:02:05 left" in capsys.readouterr().out
