"""An exported network is the network: the same logits, and no operation that it does not need."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnxruntime
import openvino
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mpvg.inference.programs import PRECISION, to_onnx, trace
from mpvg.inference.resample import any_size, resample
from mpvg.models.fold import fold
from small_networks import FAMILIES, build, images

every_family = pytest.mark.parametrize("family", FAMILIES)


class Together(nn.Module):
    """Several networks in one graph, an output each: the exporter takes seconds for each graph."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(images) for network in self.networks)


def session(proto: Any) -> Any:
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_operations(proto: Any, output: int) -> Counter[str]:
    """The operations from which an output of a graph is computed."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    return _counted(
        [proto.graph.output[output].name], lambda name: makers.get(name), lambda node: node.input, "op_type"
    )


def exported_operations(program: Any, output: int) -> Counter[str]:
    """The same of torch's graph."""
    (result,) = (node for node in program.graph.nodes if node.op == "output")
    start = [result.args[0][output]]
    return _counted(
        start, lambda node: node if node.op == "call_function" else None, lambda node: node.all_input_nodes, "target"
    )


def _counted(waiting: list[Any], maker: Any, inputs: Any, kind: str) -> Counter[str]:
    seen: set[int] = set()
    found: Counter[str] = Counter()
    for value in waiting:  # it grows while it is read
        node = maker(value)
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            found[str(getattr(node, kind))] += 1
            waiting += list(inputs(node))
    return found


@every_family
def test_every_method_gives_the_same_logits_and_a_folded_mpvg_adds_what_it_serves(family: str) -> None:
    """Of each family default, GAP, MPVG and MPVG folded, in torch.export and ONNX Runtime, at two batch sizes."""
    mpvg = build(family)
    networks = [build(family, "default"), build(family, "gap"), mpvg, fold(mpvg)]
    together = Together(networks)
    program = trace(together, images(mpvg, 2))
    proto = to_onnx(program)
    onnx, module = session(proto), program.module()
    for count in (1, 3):
        batch = images(mpvg, count)
        with torch.no_grad():
            expected = [network(batch) for network in networks]
            exported = module(batch)
        for results in (exported, map(torch.from_numpy, onnx.run(None, {"images": batch.numpy()}))):
            for actual, wanted in zip(results, expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)

    served = sum(pe is not None for pe in networks[3].delivery().per_layer)
    assert served >= 1
    for operations, addition in (
        ([onnx_operations(proto, output) for output in (1, 3)], "Add"),
        ([exported_operations(program, output) for output in (1, 3)], "aten.add.Tensor"),
    ):
        gap, folded = operations
        assert folded - gap == {addition: served}
        assert gap - folded == {}


def test_the_exporters_graph_names_no_file_of_this_machine_and_its_sizes() -> None:
    proto = to_onnx(trace(build("ViT-Lite"), torch.randn(2, 3, 8, 8)))
    assert b".py" not in proto.SerializeToString()
    (given,), (result,) = session(proto).get_inputs(), session(proto).get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 8, 8])
    assert (result.name, result.shape) == ("logits", ["batch", 3])


# ---- any size


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 4), (4, 4)), ((4, 4), (3, 7)), ((14, 14), (24, 9)), ((14, 14), (2, 3)), ((7, 5), (70, 51)), ((2, 9), (9, 2))],
)
def test_two_matrix_products_resample_as_timm_does(old: Any, new: Any, prefix: int) -> None:
    pos = 0.1 * torch.randn(1, prefix + old[0] * old[1], 8)  # at a standard deviation of 1 aten itself is 4e-6 off
    expected = resample_abs_pos_embed(pos, list(new), list(old), num_prefix_tokens=prefix)
    torch.testing.assert_close(resample(pos, new, old, prefix), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "method"), [("ViT", "mpvg"), ("timm", "lape")])
def test_a_graph_takes_images_of_any_size(family: str, method: str) -> None:
    """Also others than square, in two runtimes, with a class token and without; no interpolation is left in it."""
    model = build(family, method)
    reference = build(family, method, dynamic_img_size=True)
    reference.load_state_dict(model.state_dict())
    rows, columns = model.patch_embed.patch_size
    network = any_size(model)
    program = trace(network, torch.randn(2, 3, 3 * rows, 5 * columns), (rows, columns))
    proto = to_onnx(program)
    assert not {"Resize", "Upsample"} & {node.op_type for node in proto.graph.node}
    assert not any("upsample" in str(node.target) for node in program.graph.nodes)
    onnx, module = session(proto), program.module()
    # OpenVINO computes another function on torch's antialiased interpolation, so it is asked, too.
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", PRECISION)
    assert onnx.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for count, height, width in ((1, 2, 2), (3, 4, 7), (2, 11, 3), (1, 4, 4)):
        batch = torch.randn(count, 3, height * rows, width * columns)
        with torch.no_grad():
            expected = reference(batch)
            results = [network(batch), module(batch)]
        results += [torch.from_numpy(onnx.run(None, {"images": batch.numpy()})[0])]
        results += [torch.from_numpy(compiled([batch.numpy()])[0].copy())]
        for actual in results:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Swin", "for one image size only: its windows and their masks are made for it; leave --dynamic_size out"),
        ("CeiT", "for one image size only: .*LeFF convolves over a grid of fixed size"),
        ("T2T-ViT", "for one image size only: the graph that torch.export makes of its soft splits"),
    ],
)
def test_a_network_of_one_size_says_why(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        any_size(build(family))


def test_a_network_of_another_kind_is_not_told_of_windows() -> None:
    with pytest.raises(
        ValueError, match="only: only ViT, DeiT, ViT-Lite and converted timm networks resample their PE"
    ):
        any_size(torch.nn.Linear(2, 2))
