"""What is tried on files of weights from elsewhere: torch.save's, safetensors and NumPy archives."""

import io
import json
import logging
import pickle
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fuzz_values import NUMBERS, SCALARS, TEXTS, VALUES, Target, bounded, damaged, edited, nested, refuses_or_returns
from mpvg import create_model
from mpvg.models.checkpoints import load_checkpoint, load_weights, read_tensors

Odd = Callable[[Tensor], Any]
ODD: dict[str, Odd] = {
    "as it is": lambda t: t,
    "meta": lambda t: t.to("meta"),
    "bf16": lambda t: t.bfloat16(),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "int": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: torch.complex(t, t),
    "conjugate": lambda t: torch.complex(t, t).conj(),
    "negative": lambda t: torch.complex(t, t).conj().imag,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "quantized by channel": lambda t: torch.quantize_per_channel(
        t.reshape(-1, 1), torch.ones(t.numel()), torch.zeros(t.numel(), dtype=torch.long), 0, torch.qint8
    ),
    "expanded": lambda t: t.flatten()[:1].expand(t.shape),
    "expanded to a terabyte": lambda t: torch.zeros(1).expand(2**19, 2**19),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(len(t) if t.ndim else 1, -1).to_sparse_csr(),
    "sparse and large": lambda t: torch.sparse_coo_tensor(torch.tensor([[0]]), [1.0], (2**50,)),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]]),
    "jagged": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]], layout=torch.jagged),
    "parameter": nn.Parameter,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t[None],
    "shorter": lambda t: t[:-1] if t.ndim else t,
    "one more axis": lambda t: t[None],
    "flat": torch.flatten,
    "empty": lambda t: t.flatten()[:0],
    "a scalar": lambda t: torch.tensor(1.0),
    "nan": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "half of a view": lambda t: torch.cat([t.flatten(), t.flatten()])[: t.numel()].view(t.shape),
}
KEYS = [
    *("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "head.weight", "head.bias"),
    *("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "delivery.layer_norms.1.weight", "delivery.last_norm.bias"),
]
OTHERS = ["cls_token", "dist_token", "head_dist.weight", "mask_token", "fc_norm.weight", "blocks.2.norm1.weight"]
OTHERS += ["decoder_pos_embed", "optimizer", "epoch", "args", "relative_position_bias_table", "visual.proj", "x", ""]
ENTRIES = ["model", "state_dict", "state_dict_ema", "module", "net", "teacher", "a.b", "", "\0", "grid=1x1"]
PREFIXES = ["module.", "_orig_mod.", "backbone.", "a.b.c.", "model.", ""]
CHOICES = [
    "",
    "",
    "",
    "",
    "::model",
    "::teacher",
    "::grid=4x4",
    "::grid=2x8",
    "::grid=9x9",
    "::grid=0x1",
    "::",
    "::a.b::grid=1x1",
]


def as_odd(tensor: Any, what: str) -> Any:
    """The tensor as one of another kind, or as it is, where torch does not make one of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds that torch no longer likes
            return ODD[what](tensor)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return tensor


@cache
def network() -> tuple[nn.Module, dict[str, Tensor]]:
    """A network, and its weights before anything is loaded."""
    torch.manual_seed(0)
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3, embed_dim=8, depth=2, num_heads=2)
    return model, {key: value.clone() for key, value in model.state_dict().items()}


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """What training scripts save: weights, some of them odd, in entries beside other things."""
    state: dict[Any, Any] = dict(network()[1])
    for key in draw(st.lists(st.sampled_from([*KEYS, *OTHERS]), max_size=3, unique=True)):
        tensor = state.get(key, torch.ones(1, 1, 8))
        what = draw(st.sampled_from([*ODD, "removed", "renamed", "replaced"]))
        if what in ODD:
            state[key] = as_odd(tensor, what)
        elif what == "replaced":
            state[key] = draw(VALUES)
        elif (value := state.pop(key, None)) is not None and what == "renamed":
            state[draw(st.one_of(TEXTS, st.sampled_from(OTHERS), st.integers()))] = value
    if draw(st.integers(0, 3)) == 0:
        prefix = draw(st.sampled_from(PREFIXES))
        state = {f"{prefix}{key}": value for key, value in state.items()}
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 9]))):
        state = {draw(st.sampled_from(ENTRIES)): state}
        if draw(st.booleans()):
            state[draw(st.sampled_from([*ENTRIES, *OTHERS]))] = draw(
                st.sampled_from([next(iter(state.values())), 1, None, {}])
            )
    change = draw(st.sampled_from(["none"] * 6 + ["itself", "list", "ordered", "value"]))
    if change == "itself":
        state["itself"] = state
    if change == "value":
        return draw(VALUES)
    return [state] if change == "list" else OrderedDict(state) if change == "ordered" else state


def saved(content: Any, *, zipped: bool = True) -> bytes:
    """As torch.save writes it, or as it did before version 1.6; nothing, where it cannot be saved."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return b""
    return file.getvalue()


# ---- files of torch.save, written by hand


class _Storage(tuple[Any, ...]):
    """What a pickle refers to by number."""


class _Call:
    """A function that a pickle asks for, and its arguments."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, _Storage) else None


WORDS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 2**70]))
SIZES = st.one_of(st.lists(WORDS, max_size=4).map(tuple), st.just((2, 4)), st.just((1, 16, 8)), SCALARS)
STORAGES = st.builds(
    lambda kind, key, device, count: _Storage(("storage", kind, key, device, count)),
    st.sampled_from(
        [torch.FloatStorage, torch.LongStorage, torch.BFloat16Storage, torch.QInt8Storage, torch.ComplexFloatStorage]
    ),
    st.sampled_from(["0"] * 12 + ["1", "../0", ""]),
    st.sampled_from(["cpu", "cpu", "cuda:0", "meta", "mps", "x"]),
    st.one_of(st.just(16), WORDS),
)
SCHEMES = st.sampled_from([(torch.per_tensor_affine, 0.1, 0), (torch.per_tensor_affine, 0.0, 2**40), (1, 2, 3), ()])
_utils: Any = torch._utils


def calls() -> st.SearchStrategy[Any]:
    """Tensors as a pickle describes them, with sizes, strides and storages that may not fit."""
    dense = st.builds(
        lambda *arguments: _Call(_utils._rebuild_tensor_v2, (*arguments, False, OrderedDict())),
        *(STORAGES, st.one_of(st.just(0), WORDS), SIZES, SIZES),
    )
    return st.one_of(
        dense,
        dense,
        st.builds(lambda t: _Call(_utils._rebuild_parameter, (t, True, OrderedDict())), dense),
        st.builds(
            lambda *a: _Call(_utils._rebuild_qtensor, (*a, False, OrderedDict())),
            STORAGES,
            WORDS,
            SIZES,
            SIZES,
            SCHEMES,
        ),
        st.builds(
            lambda size, stride: _Call(_utils._rebuild_meta_tensor_no_storage, (torch.float32, size, stride, False)),
            *(SIZES, SIZES),
        ),
        st.builds(
            lambda i, v, size: _Call(_utils._rebuild_sparse_tensor, (torch.sparse_coo, (i, v, size, True))),
            dense,
            dense,
            SIZES,
        ),
        st.builds(lambda a, b, c, d: _Call(_utils._rebuild_nested_tensor, (a, b, c, d)), dense, dense, dense, dense),
        st.builds(
            lambda function, arguments: _Call(function, arguments),
            st.sampled_from([torch.Size, OrderedDict, eval]),
            st.tuples(SIZES),
        ),
        VALUES,
    )


@st.composite
def by_hand(draw: st.DrawFn) -> bytes:
    """A file whose pickle was not written by torch."""
    names = st.sampled_from([*KEYS, *OTHERS, "model"])
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(draw(st.dictionaries(names, calls(), max_size=3)))
    pickled = stream.getvalue()
    if draw(st.integers(0, 3)) == 0:
        pickled = draw(damaged(pickled))
    records = {
        "data.pkl": pickled,
        "byteorder": draw(st.sampled_from([b"little"] * 14 + [b"big", b"x"])),
        "data/0": bytes(64),
    }
    records |= {"version": b"3\n"}
    for name in draw(st.sets(st.sampled_from([*records]), max_size=1)) if draw(st.integers(0, 3)) == 0 else ():
        records[name] = draw(st.one_of(st.just(b""), st.binary(max_size=40)))
    return zipped(records, root="archive/", deflated=draw(st.integers(0, 9)) == 0)


def zipped(records: dict[str, bytes], root: str = "", *, deflated: bool = False) -> bytes:
    """An archive with sums that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"{root}{name}"), content)
    return file.getvalue()


@cache
def whole(kind: str) -> bytes:
    """A valid file of the network's weights."""
    state = network()[1]
    return safetensors.torch.save(state) if kind == "safetensors" else saved(state, zipped=kind == "zip")


@st.composite
def pickle_in_zip(draw: st.DrawFn) -> bytes:
    """A file of torch.save in which only the pickle is damaged."""
    with zipfile.ZipFile(io.BytesIO(whole("zip"))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    return zipped(records | {name: draw(damaged(records[name]))})


@st.composite
def with_header(draw: st.DrawFn) -> bytes:
    """A .safetensors file with another header."""
    valid = whole("safetensors")
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(header)))
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        kinds = st.sampled_from(["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "F32", "X"])
        values = {"dtype": kinds, "shape": SIZES, "data_offsets": st.lists(st.one_of(WORDS, NUMBERS), max_size=3)}
        header[key] = header[key] | {part: draw(st.one_of(values[part], SCALARS))}
    else:
        header = draw(edited(header))
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.just(len(text)), WORDS)) % 2**64
    return length.to_bytes(8, "little") + text + valid[8 + size :]


# ---- NumPy archives


def arrays() -> dict[str, Any]:
    """The network's sizes under the names of google-research/vision_transformer."""
    found: dict[str, Any] = {"cls": (1, 1, 8), "embedding/kernel": (2, 2, 1, 8), "embedding/bias": (8,)}
    found |= {"Transformer/posembed_input/pos_embedding": (1, 17, 8), "head/kernel": (8, 3), "head/bias": (3,)}
    found |= {f"Transformer/encoder_norm/{part}": (8,) for part in ("scale", "bias")}
    for layer in range(2):
        block = f"Transformer/encoderblock_{layer}/"
        found |= {f"{block}LayerNorm_{n}/{part}": (8,) for n in (0, 2) for part in ("scale", "bias")}
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            found |= {f"{attention}{part}/kernel": (8, 2, 4), f"{attention}{part}/bias": (2, 4)}
        found |= {f"{attention}out/kernel": (2, 4, 8), f"{attention}out/bias": (8,)}
        found |= {f"{block}MlpBlock_3/Dense_0/kernel": (8, 32), f"{block}MlpBlock_3/Dense_0/bias": (32,)}
        found |= {f"{block}MlpBlock_3/Dense_1/kernel": (32, 8), f"{block}MlpBlock_3/Dense_1/bias": (8,)}
    return {name: np.ones(shape, np.float32) for name, shape in found.items()}


def array_file(array: "np.ndarray[Any, Any]") -> bytes:
    """As in an archive."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


@cache
def valid_arrays() -> dict[str, bytes]:
    return {f"{name}.npy": array_file(array) for name, array in arrays().items()}


HEADERS = st.builds(
    lambda descr, order, shape: repr({"descr": descr, "fortran_order": order, "shape": shape}),
    st.sampled_from(["<f4", "<f8", "<f2", "<i8", "|O", "<c8", "|S9", "<U3", "|V4", [("a", "<f4")], "<M8[s]", "x", 1]),
    st.sampled_from([False, False, True, 1]),
    SIZES,
)


@st.composite
def numpy_archives(draw: st.DrawFn) -> bytes:
    """An archive of a ViT, in which some arrays have another header, other values or other bytes."""
    records = dict(valid_arrays())
    for name in draw(st.lists(st.sampled_from([*records, "x.npy", "embedding/kernel", "a/../b.npy"]), max_size=2)):
        change = draw(st.sampled_from(["header", "header", "damage", "remove", "array", "text"]))
        if change == "header":
            text = draw(st.one_of(HEADERS, HEADERS, TEXTS, st.just("(" * 300))).encode("utf-8", "replace")
            version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\x09"]))
            length = len(text).to_bytes(2 if version == b"\1\0" else 4, "little", signed=False)
            records[name] = b"\x93NUMPY" + version + length + text + bytes(32)
        elif change == "remove":
            records.pop(name, None)
        elif change == "array":
            odd = [
                np.zeros((0,)),
                np.array([None]),
                np.float32(1),
                np.full((8,), np.nan, np.float32),
                np.array(["a"]),
                np.ones((2, 8)),
            ]
            records[name] = array_file(np.asarray(draw(st.sampled_from(odd))))
        else:
            records[name] = draw(damaged(records.get(name, b"")) if change == "damage" else st.binary(max_size=40))
    prefix = draw(st.sampled_from(["", "", "", "params/", "opt/target/", "params/img/"]))
    content = zipped({f"{prefix}{name}": value for name, value in records.items()}, deflated=draw(st.booleans()))
    return draw(damaged(content)) if draw(st.integers(0, 5)) == 0 else content


# ---- what must hold


def read(suffix: str, example: tuple[bytes, str]) -> None:
    """Loads a file into a network: it has finite weights of its own shapes then, or those that it had."""
    content, choice = example
    model, before = network()
    with tempfile.TemporaryDirectory(prefix="mpvg-fuzz-") as folder, bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        path = Path(folder) / f"weights{suffix}"
        path.write_bytes(content)
        report = refuses_or_returns(partial(load_checkpoint, model, f"{path}{choice}"))
        after = model.state_dict()
        assert [(key, value.shape, value.dtype) for key, value in after.items()] == [
            (key, value.shape, value.dtype) for key, value in before.items()
        ]
        if report is None:
            assert all(torch.equal(value, before[key]) for key, value in after.items())
        else:
            assert all(value.isfinite().all() for value in after.values())
            assert str(report)
        refuses_or_returns(partial(load_weights, model, path))
        refuses_or_returns(partial(read_tensors, path))
        model.load_state_dict(before)
        logging.disable(logging.NOTSET)


def checkpoints() -> dict[str, Target]:
    """Files of weights from elsewhere."""
    odd = contents().map(saved)
    old = damaged(whole("old"))
    files = {
        ".pth": st.one_of(odd, odd, odd, by_hand(), by_hand(), pickle_in_zip(), damaged(whole("zip")), old),
        ".safetensors": st.one_of(with_header(), with_header(), damaged(whole("safetensors")), nested(100_000)),
        ".npz": numpy_archives(),
    }
    return {
        f"weights{suffix}": Target(st.tuples(examples, st.sampled_from(CHOICES)), partial(read, suffix))
        for suffix, examples in files.items()
    }
