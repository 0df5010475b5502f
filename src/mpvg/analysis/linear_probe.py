"""Linear probes of frozen features: multinomial logistic regression, and an attention pooling that comes before it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (1e-1, 1e-2, 1e-3)
"""Strengths of the L2 penalty that are tried on a held-out fifth of the training part."""
_HELD_OUT = 5
_EPOCHS, _STEPS, _BATCH, _RATE = 10, 300, 256, 1e-2  # of the attention query; at least so many epochs and steps


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features."""

    weight: Tensor
    """`(classes, D)`, float64."""
    bias: Tensor
    """`(classes,)`, float64."""

    def logits(self, features: Tensor) -> Tensor:
        """Features `(B, D)` to `(B, classes)`, float64."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class Score:
    """How well a probe does on images that it was not fitted on."""

    accuracy: float
    """In [0, 1]."""
    nll: float
    """Mean negative log-likelihood of the classes, in nats."""


def fit_probe(
    features: Tensor, targets: Tensor, classes: int, strength: float, start: LinearProbe | None = None
) -> LinearProbe:
    """Minimizes the mean cross entropy plus `strength / 2` times the squared norm of the weight, by L-BFGS.

    The bias is not penalized. The problem is convex, so that the start changes the time only.

    Args:
        features: `(B, D)`.
        targets: `(B,)`.
        classes: number of classes.
        strength: of the penalty, > 0.
        start: where to begin; None: at 0.
    """
    features = features.double()
    begin = start or LinearProbe(features.new_zeros(classes, features.shape[1]), features.new_zeros(classes))
    # The same problem in other variables, weight = free @ basis.T, in which it is well conditioned.
    values, vectors = torch.linalg.eigh(features.T.cov(correction=0).reshape(features.shape[1], -1))
    scale = (values.clamp(min=0) / classes + strength).rsqrt()
    basis, inverse = vectors * scale, vectors / scale
    center = features.mean(dim=0)
    turned = (features - center) @ basis
    with torch.inference_mode(False), torch.enable_grad():
        free = (begin.weight @ inverse).clone().requires_grad_()
        bias = (begin.bias + begin.weight @ center).clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free, bias], max_iter=100, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def loss() -> float:
            optimizer.zero_grad()
            penalty = (free * scale).square().sum()  # the vectors are orthonormal
            value = F.cross_entropy(turned @ free.T + bias, targets) + strength / 2 * penalty
            value.backward()
            return value.item()

        optimizer.step(loss)
    weight = free.detach() @ basis.T
    return LinearProbe(weight, bias.detach() - weight @ center)


def probe_fold(features: Tensor, targets: Tensor, classes: int, test: Tensor) -> Score:
    """Fits a probe on the images of one part and scores it on the others.

    Features are standardized by the training part; the penalty is the one that is best on a held-out fifth of it.

    Args:
        features: `(images, D)`.
        targets: `(images,)`.
        classes: number of classes.
        test: which images are tested, `(images,)`, boolean.
    """
    train = features[~test].double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    # A channel that is constant but for rounding would become noise.
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)
    train, known = (train - mean) / scale, targets[~test]
    tested = (features[test].double() - mean) / scale
    if len(train) < train.shape[1]:  # a penalized weight lies in the span of the images, which has fewer dimensions
        span = torch.linalg.qr(train.T).Q
        train, tested = train @ span, tested @ span
    strength = _best_strength(train, known, classes)
    return score(fit_probe(train, known, classes, strength), tested, targets[test])


def _best_strength(features: Tensor, targets: Tensor, classes: int) -> float:
    held = torch.arange(len(targets)) % _HELD_OUT == 0
    if len(targets) < _HELD_OUT:
        return STRENGTHS[0]
    found: dict[float, float] = {}
    probe = None
    for strength in STRENGTHS:
        probe = fit_probe(features[~held], targets[~held], classes, strength, probe)
        found[strength] = score(probe, features[held], targets[held]).nll
    return min(found, key=lambda strength: found[strength])


def score(probe: LinearProbe, features: Tensor, targets: Tensor) -> Score:
    """Accuracy and NLL of a probe."""
    logits = probe.logits(features)
    return Score(float((logits.argmax(dim=1) == targets).double().mean()), float(F.cross_entropy(logits, targets)))


def fit_query(tokens: Tensor, targets: Tensor, classes: int, train: Tensor, seed: int) -> Tensor:
    """Trains the query of an attention pooling, with a linear classifier after it that is thrown away.

    Args:
        tokens: `(images, N, D)`.
        targets: `(images,)`.
        classes: number of classes.
        train: numbers of the images to train on.
        seed: of the order of the images.

    Returns:
        The query, `(D,)`; at 0, where it starts, all tokens have the same weight.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        query = torch.zeros(tokens.shape[-1], requires_grad=True)
        weight = torch.zeros(classes, tokens.shape[-1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.AdamW([query, weight, bias], lr=_RATE, weight_decay=1e-3)
        for _ in range(max(_EPOCHS, -(-_STEPS * _BATCH // max(len(train), _BATCH)))):  # few images are one step
            for chosen in train[torch.randperm(len(train), generator=generator)].split(_BATCH):
                optimizer.zero_grad()
                logits = attend(tokens[chosen].float(), query) @ weight.T + bias
                F.cross_entropy(logits, targets[chosen]).backward()
                optimizer.step()
    return query.detach()


def attend(tokens: Tensor, query: Tensor) -> Tensor:
    """The mean of tokens `(B, N, D)`, weighted by the softmax of their products with a query `(D,)`: `(B, D)`."""
    weights = (tokens @ query / tokens.shape[-1] ** 0.5).softmax(dim=1)
    return torch.einsum("bn,bnd->bd", weights, tokens)


def attend_all(tokens: Tensor, query: Tensor) -> Tensor:
    """As `attend`, for float16 tokens of many images, part by part."""
    return torch.cat([attend(part.float(), query) for part in tokens.split(_BATCH)])


def split_folds(targets: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each image, `(images,)`: each class is spread evenly over the folds, at random.

    Raises:
        ValueError: there are fewer images than folds, or only one class.
    """
    if len(targets) < folds:
        raise ValueError(f"{len(targets)} images are fewer than the {folds} folds; give more images or fewer --folds")
    if len(targets.unique()) < 2:
        raise ValueError(f"all {len(targets)} images are of one class; give data with at least two")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = order[targets[order].argsort(stable=True)]
    found = torch.empty(len(targets), dtype=torch.int64)
    found[order] = torch.arange(len(targets)) % folds
    return found
