"""The norms of gradients in metrics.jsonl, against gradients of a plain step; exact after a resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpvg import create_model, runs
from mpvg.cli.main import main
from mpvg.config import OptimConfig, RunConfig
from mpvg.recipes import recipe
from mpvg.training import resume, train
from mpvg.training.gradients import check_gradient_norms, gradient_norms
from mpvg.training.loop import Trainer


def config(out: Path, **values: Any) -> RunConfig:
    base = replace(recipe("digits"), epochs=2, batch_size=256, device="cpu", threads=1, log_gradients=True)
    return replace(base, optim=OptimConfig(), out=str(out), **values)


def test_the_norms_are_those_of_the_gradients() -> None:
    """W^T dL/dh is computed from the logits' own gradient here, and differentiated by hand for the cross entropy."""
    torch.manual_seed(0)
    model: Any = create_model("vit_mini_patch2_8", "mpvg", num_classes=5, in_chans=1)
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6) % 5
    logits = model(images)
    F.cross_entropy(logits, targets, label_smoothing=0.1).backward()
    wanted = 0.9 * F.one_hot(targets, 5) + 0.1 / 5
    error = (logits.softmax(dim=1) - wanted).mean(dim=0)
    expected = (error @ model.head.weight).norm()
    torch.testing.assert_close(gradient_norms(model), torch.stack([expected, expected]).detach(), atol=1e-6, rtol=1e-4)


def test_a_line_has_their_means_over_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def recording(network: Any) -> torch.Tensor:
        seen.append(gradient_norms(network))
        return seen[-1]

    monkeypatch.setattr("mpvg.training.loop.gradient_norms", recording)
    train(config(tmp_path / "run", accumulate=2), quiet=True)
    lines = runs.load(tmp_path / "run").metrics()
    steps = len(seen) // 2
    for number, line in enumerate(lines):
        means = torch.stack(seen[number * steps : (number + 1) * steps]).double().mean(dim=0)
        assert [line["gradient_beta"], line["gradient_head"]] == pytest.approx(means.tolist(), rel=1e-6)


def test_they_change_nothing_else_and_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path / "whole"), quiet=True)
    train(config(tmp_path / "without", log_gradients=False), quiet=True)
    original, count = Trainer.step, 0

    def failing(self: Trainer, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError("the power fails")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(RuntimeError, match="power"):
            train(config(tmp_path / "cut", save_steps=2), quiet=True)
    resume(tmp_path / "cut", quiet=True)
    whole, without, cut = (runs.load(tmp_path / name) for name in ("whole", "without", "cut"))
    timed = {"images_per_second", "seconds"}
    for one, other in zip(whole.metrics(), cut.metrics(), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert whole.config.digest() == without.config.digest()
    for one, other in zip(whole.metrics(), without.metrics(), strict=True):
        assert {key for key in one if key not in other} == {"gradient_beta", "gradient_head"}
        assert one["nll"] == other["nll"]


def test_they_are_drawn(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), quiet=True)
    picture = tmp_path / "curve.svg"
    assert main(["plot", str(tmp_path / "run"), "--key", "gradient_head", "--out", str(picture)]) == 0
    assert "gradient_head" in picture.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"optim": OptimConfig(frozen=("^norm",))}, "Last LN"), ({"optim": OptimConfig(frozen=(r"^head\.",))}, "head")],
)
def test_a_network_without_them_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"log_gradients is True.*{words}"):
        train(replace(config(tmp_path / "run"), **change), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_headless_network_is_refused() -> None:
    with pytest.raises(ValueError, match="linear head"):
        check_gradient_norms(create_model("vit_mini_patch2_8", "mpvg", num_classes=0))


@pytest.mark.parametrize("sums", [[1.0], [0.0, 1.0, 1.0], [1.0, -1.0, 1.0], ["1", 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
def test_damaged_sums_in_a_checkpoint_are_passed_over(sums: list[Any], tmp_path: Path) -> None:
    from mpvg.training.state import TrainProgress, _read_progress

    values = json.loads(json.dumps(vars(TrainProgress()))) | {"gradient_sums": sums}
    with pytest.raises(ValueError, match="gradient_sums"):
        _read_progress(values)
