"""Pickles of arrays of bytes, read without numpy's own unpickling.

numpy trusts a pickle: a dtype with a state of its own makes it read objects at addresses that the file chose. Here,
names in a pickle stand for placeholders that take a shape and bytes; everything else is refused.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS"
)
_UINT8_STATE = (3, "|", None, None, None, -1, -1, 0)


def load_inert(body: bytes) -> Any:
    """What a pickle holds: numbers, text, tuples, lists, dicts with text as keys, and arrays as `InertArray`.

    Raises:
        Exception: of any kind, for a damaged pickle and for one that asks for anything else.
    """
    return _InertUnpickler(io.BytesIO(body), encoding="latin1").load()


class InertArray:
    """What stands for an array of uint8."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = (0,)
        self._content: bytes | str = b""

    def fill(self, shape: object, dtype: object, order: object, content: object) -> None:
        """Takes the state of an array.

        Raises:
            UnpicklingError: it is not that of an array of uint8 in C order.
        """
        if isinstance(content, _Latin1):
            content = content.text
        if not isinstance(dtype, _DType) or order not in (False, "C") or not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("it has an array that is not of uint8, in C order, from bytes")
        if not isinstance(shape, tuple) or not 1 <= len(shape) <= 4 or not all(type(side) is int for side in shape):
            raise pickle.UnpicklingError("it has an array whose shape is not of one to four whole numbers")
        if min(shape) < 0 or math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"it has an array of {len(content)} bytes, which do not fill its shape")
        self._shape, self._content = shape, content

    def to_numpy(self) -> npt.NDArray[np.uint8]:
        """The array; it cannot be written to."""
        content = self._content
        # Text is what bytes of python 2 are read as. It is encoded here, once, whatever the pickle repeats.
        body = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(body, np.uint8).reshape(self._shape)


class _DType:
    """What stands for the data type uint8."""


class _Latin1:
    """What stands for bytes that protocol 2 writes as text."""

    def __init__(self, text: object, encoding: object) -> None:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it encodes what is not text, or not as latin1")
        self.text = text


def _dtype(name: object, align: object = False, copy: object = True) -> _DType:
    if name not in ("u1", "|u1", "uint8"):
        raise pickle.UnpicklingError("it asks for a data type other than uint8")
    return _DType()


def _reconstruct(kind: object, shape: object, code: object) -> InertArray:
    return InertArray()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> InertArray:
    array = InertArray()
    array.fill(shape, dtype, order, content)
    return array


class _Name:
    """What stands for a name that a pickle asks for; nothing can be set on it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call


_NAMES = {("numpy", "ndarray"): _Name(), ("numpy", "dtype"): _Name(_dtype), ("_codecs", "encode"): _Name(_Latin1)}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Name(_reconstruct)
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Name(_from_buffer)


class _Opcodes(dict[int, Callable[[Any], None]]):
    """Opcode -> what it does; the others are refused."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"it has the opcode {code:#04x}, and only arrays and lists are allowed")


# The one in Python: the one in C makes room for as many objects as the file claims. Keys are text, because the hash of
# a deeply nested tuple overflows the stack.
class _InertUnpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Opcodes(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()}
    )

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays and lists are allowed")
        return _NAMES[module, name]

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))  # a bytearray would be made before it is known how much the file holds

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function.call is None:
            raise pickle.UnpicklingError("it calls what cannot be called")
        self.stack.append(function.call(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, InertArray) and isinstance(state, tuple) and len(state) == 5:
            target.fill(*state[1:])
        elif not isinstance(target, _DType) or state != _UINT8_STATE:
            raise pickle.UnpicklingError("it sets a state that is not that of an array of uint8")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set_items(items)

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in items[::2]):
            raise pickle.UnpicklingError("it has a dict whose keys are not text")
        target.update(zip(items[::2], items[1::2], strict=True))


_InertUnpickler.dispatch.update(
    {
        pickle.BYTEARRAY8[0]: _InertUnpickler.load_bytearray8,
        pickle.REDUCE[0]: _InertUnpickler.load_reduce,
        pickle.BUILD[0]: _InertUnpickler.load_build,
        pickle.DICT[0]: _InertUnpickler.load_dict,
        pickle.SETITEM[0]: _InertUnpickler.load_setitem,
        pickle.SETITEMS[0]: _InertUnpickler.load_setitems,
    }
)
