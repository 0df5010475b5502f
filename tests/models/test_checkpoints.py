"""Weights from files: all of them or none, and no file is executed."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpvg.models import create_model
from mpvg.models.checkpoints import load_weights, read_tensors


def small(method: str = "mpvg", **kwargs: object) -> nn.Module:
    model = create_model("vit_mini_patch2_8", method, **{"depth": 2, "num_classes": 3, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("method", ["mpvg", "lape", "gap"])
def test_weights_survive_a_file(method: str, as_text: bool, tmp_path: Path) -> None:
    """Every tensor comes back bit for bit, through load_weights and through create_model."""
    path = tmp_path / "model.safetensors"
    saved = small(method)
    save_file(saved.state_dict(), path)
    given = str(path) if as_text else path

    loaded = small(method)
    assert not torch.equal(loaded.pos_embed, saved.pos_embed)
    load_weights(loaded, given)
    assert_unchanged(loaded, copied(saved))
    created = create_model("vit_mini_patch2_8", method, depth=2, num_classes=3, checkpoint_path=given)
    assert_unchanged(created, copied(saved))
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(created.eval()(image), saved.eval()(image))
    assert read_tensors(given).keys() == saved.state_dict().keys()


def without_a_key(tensors: dict[str, Tensor]) -> None:
    del tensors["delivery.last_norm.bias"]


def with_a_key_more(tensors: dict[str, Tensor]) -> None:
    tensors["cls_token"] = torch.zeros(1, 1, 64)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["pos_embed"] = torch.zeros(1, 17, 64)


def with_everything_wrong(tensors: dict[str, Tensor]) -> None:
    for change in (without_a_key, with_a_key_more, with_another_shape):
        change(tensors)
    for name in ("weight", "bias"):
        tensors[f"head.{name}"] = tensors[f"head.{name}"][:2].clone()
    tensors["extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_key, r"another model or method: delivery\.last_norm\.bias is missing\. Use the model"),
        (with_a_key_more, r": cls_token has no place in the model\. Use"),
        (with_another_shape, r": pos_embed is \(1, 17, 64\), the model's is \(1, 16, 64\)\. Use"),
        (with_everything_wrong, r"is missing; .*no place in the model; .*; and 2 more\. Use"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    """What does not fit is named, and no tensor of the model has changed, not even one that fits."""
    path = tmp_path / "model.safetensors"
    tensors = copied(small())
    change(tensors)
    save_file(tensors, path)
    model = small()
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("saved", "into"), [("mpvg", "pvg"), ("pvg", "mpvg"), ("lape", "default"), ("gap", "default")])
def test_weights_of_another_method_are_refused(saved: str, into: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small(saved).state_dict(), path)
    with pytest.raises(ValueError, match="is of another model or method"):
        create_model("vit_mini_patch2_8", into, depth=2, num_classes=3, checkpoint_path=path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    """From no byte at all to all but a few."""
    path = tmp_path / "model.safetensors"
    model = small()
    save_file(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    before = copied(model)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no \.safetensors file"):
        load_weights(model, path)
    assert_unchanged(model, before)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("writer", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_pickle_is_refused_without_being_executed(
    writer: Callable[[object, Path], object], name: str, tmp_path: Path
) -> None:
    """Whatever it is called, and also in the form that torch.save writes."""
    path, created = tmp_path / name, tmp_path / "created"
    writer({"pos_embed": Payload(created)}, path)
    with pytest.raises(ValueError, match=r"damaged or no \.safetensors file"):
        load_weights(small(), path)
    assert not created.exists()
    # The payload works: a reader that unpickles would have been caught.
    path = path.rename(tmp_path / "model.pickle")  # torch.load, too, goes by the name
    torch.load(path, weights_only=False) if writer is torch.save else pickle.loads(path.read_bytes())
    assert created.exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*; give a \.safetensors file"):
        load_weights(small(), tmp_path / name)


def test_a_file_of_half_precision_keeps_the_models_precision(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value.half() for key, value in small().state_dict().items()}, path)
    model = small()
    load_weights(model, path)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.pos_embed, load_file(path)["pos_embed"].float())
