"""Image classification: loss, metric and prediction."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mpvg.data import Batches


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a classifier does on a data set; shares are in [0, 1]."""

    accuracy: float
    """Share of images whose most probable class is right."""
    top5: float
    """Share of images whose right class is among the five most probable."""
    nll: float
    """Mean negative log-likelihood of the right class, in nats."""
    count: int
    """Images."""


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy.

    Args:
        logits: `(B, classes)`.
        targets: classes `(B,)`, or the probabilities `(B, classes)` that mixup made, smoothing included.
        smoothing: label smoothing of plain classes, in [0, 1).
    """
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator | None = None) -> Scores:
    """Scores a model on every image once, over all processes."""
    model.eval()
    # On the device: each look at a number there would hold the next batch up.
    sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters(), torch.empty(0)).device)
    for images, targets in batches.epoch():
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        nll = F.cross_entropy(logits, targets, reduction="none").double().sum()
        one, five = hits[:, 0].sum().double(), hits.any(dim=1).sum().double()
        sums += torch.stack([one, five, nll, nll.new_full((), len(targets))])
    if accelerator is not None and accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    count = int(sums[3])
    if count == 0:
        raise ValueError("no image could be evaluated; give a validation set with readable images")
    accuracy, in_five, loss = (sums[:3] / count).tolist()
    return Scores(accuracy=accuracy, top5=in_five, nll=loss, count=count)


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, class_names: tuple[str, ...], k: int = 5
) -> list[list[tuple[str, float]]]:
    """The k most probable classes of each image, most probable first, with their probabilities.

    Args:
        images: preprocessed images `(B, C, H, W)`.
    """
    probabilities = model.eval()(images).float().softmax(dim=1)
    values, classes = probabilities.topk(min(k, len(class_names)), dim=1)
    return [
        [(class_names[c], p) for c, p in zip(row, ps, strict=True)]
        for row, ps in zip(classes.tolist(), values.tolist(), strict=True)
    ]
