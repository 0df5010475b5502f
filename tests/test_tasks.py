"""Loss, scores and predictions, against plain loops."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mpvg.config import RunConfig
from mpvg.data import DataInfo, ImageBatch
from mpvg.tasks import create_task
from mpvg.tasks.classification import classification_loss, evaluate, predict


class Listed:
    """Batches in a list."""

    skipped = 0

    def __init__(self, *batches: ImageBatch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[ImageBatch]:
        yield from self.batches[start:]


class Doubled(nn.Module):
    """Logits are twice the images in evaluation mode, and useless in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        return images * (0 if self.training else 2)


def log_probability(logits: list[float], target: int) -> float:
    return logits[target] - math.log(sum(math.exp(value) for value in logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_of_classes_is_the_smoothed_cross_entropy(smoothing: float) -> None:
    logits, targets = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        wanted = [smoothing / 4 + (1 - smoothing) * (k == target) for k in range(4)]
        expected -= sum(share * log_probability(row, k) for k, share in enumerate(wanted)) / 5
    assert classification_loss(logits, targets, smoothing).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_loss_of_probabilities_is_the_cross_entropy_and_is_not_smoothed_again(smoothing: float) -> None:
    logits, targets = torch.randn(5, 4), torch.rand(5, 4).softmax(dim=1)
    expected = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        expected -= sum(share * log_probability(row, k) for k, share in enumerate(wanted)) / 5
    assert classification_loss(logits, targets, smoothing).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("sizes", [(1,), (4, 4), (5, 2), (1, 1, 1)])
def test_scores_count_each_image_once(classes: int, sizes: tuple[int, ...]) -> None:
    batches = [ImageBatch(torch.randn(size, classes), torch.randint(classes, (size,))) for size in sizes]
    right = among_five = count = 0
    nll = 0.0
    for images, targets in batches:
        for image, target in zip((2 * images).tolist(), targets.tolist(), strict=True):
            better = sum(value > image[target] for value in image)
            right += better == 0
            among_five += better < 5
            nll -= log_probability(image, target)
            count += 1
    scores = evaluate(Doubled().train(), Listed(*batches))
    assert scores.images == count == sum(sizes)
    assert scores.metrics["accuracy"] == right / count
    assert scores.metrics["top5"] == among_five / count
    assert scores.metrics["nll"] == pytest.approx(nll / count, rel=1e-6)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no image could be evaluated; give a validation set with readable images"):
        evaluate(Doubled(), Listed())


def test_a_prediction_names_the_most_probable_classes() -> None:
    images = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 2.0]])
    first, second = (found.classes for found in predict(Doubled().train(), images, ("a", "b", "c"), k=2))
    assert [name for name, _ in first] == ["b", "a"]
    assert [name for name, _ in second] == ["a", "c"]
    assert first[0][1] == pytest.approx(math.exp(log_probability([0, 2, -2], 1)), rel=1e-6)
    assert second[1][1] == pytest.approx(math.exp(log_probability([6, 0, 4], 2)), rel=1e-6)


def test_a_prediction_has_no_more_classes_than_there_are() -> None:
    (prediction,) = predict(Doubled(), torch.randn(1, 3), ("a", "b", "c"))
    found = list(prediction.classes)
    assert sorted(name for name, _ in found) == ["a", "b", "c"]
    assert sum(probability for _, probability in found) == pytest.approx(1)
    assert found == sorted(found, key=lambda pair: -pair[1])


def test_data_without_classes_cannot_be_classified() -> None:
    sizes = {"in_chans": 1, "img_size": 8, "mean": (0.5,), "std": (0.5,), "train_size": 4, "val_size": 4}
    info = DataInfo(name="boxes", class_names=(), **sizes)
    config = RunConfig(data="boxes", model="any", epochs=1, batch_size=2, lr=0.1, recipe="none")
    with pytest.raises(ValueError, match="boxes has no classes, so there is nothing to classify; give data with"):
        create_task(config, info)
