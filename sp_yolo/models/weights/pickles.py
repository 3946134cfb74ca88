"""Reading pickles without running them: an interpreter of the opcodes that checkpoints need, and of nothing else.

Python's unpickler imports whatever a file names and calls it. This one cannot import at all: a global is in the short
list below, and then stands for a function written here; or it names a class of a model's code, and becomes an inert
StandIn; or the file is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Packages whose classes are replaced by stand-ins: the original's own code (also as its PyPI package) and torch layers.
STAND_IN_PACKAGES = ("models.", "utils.", "yolov7.", "torch.nn.modules.")
STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class PickleRefused(Exception):
    """The pickle wants something that no checkpoint needs, or is damaged; the message says what."""


@dataclass(eq=False)
class StandIn:
    """An object of a class that was not imported: ``kind`` is its dotted path, ``state`` its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Callable:
    """What a REDUCE or NEWOBJ may call."""

    call: Callable[..., Any]


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    *unused: Any,  # requires_grad, hooks, metadata
) -> Tensor:
    numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
    if not isinstance(storage, Tensor) or storage.ndim != 1 or len(size) != len(stride) or len(size) > 64:
        raise PickleRefused("a tensor is built from something that is not a storage")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise PickleRefused("a tensor has an impossible offset, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of 0 would let one stored number claim any size, and fill the memory at the first conversion.
    if math.prod(size) and (last >= len(storage) or math.prod(size) > len(storage)):
        raise PickleRefused(f"a tensor of size {list(size)} claims more than its storage of {len(storage)} numbers")
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_parameter(data: Any, *unused: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleRefused("a parameter is built from something that is not a tensor")
    return data


def _ordered_dict(pairs: Sequence[Any] = ()) -> OrderedDict[Any, Any]:
    if type(pairs) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
        raise PickleRefused("an OrderedDict is built from something that is not a list of pairs")
    return OrderedDict((_key(key), value) for key, value in pairs)


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise PickleRefused("a set is built from something that is not a list")
    return {_key(item) for item in items}


def _key(value: Any) -> Any:
    # Of nested tuples a small file can hold one that takes years to hash.
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise PickleRefused(f"a dict or set has a {type(value).__name__} as key")
    return value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleRefused("only latin1 text is turned into bytes")
    return text.encode("latin1")


def _dtype(code: Any, *unused: Any) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[<|=]?(f[248]|[iu][1248]|b1)", code):
        raise PickleRefused("a numpy dtype is not a plain number")
    return np.dtype(code)


def _array(*unused: Any) -> np.ndarray:
    return np.empty(0, np.int8)  # takes its content when BUILD brings it


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise PickleRefused("a numpy scalar does not match its dtype")
    return np.frombuffer(data, dtype)[0].item()


def _fill_array(array: np.ndarray, state: Any) -> None:
    if not isinstance(state, tuple) or len(state) != 5:
        raise PickleRefused("a numpy array has no usable state")
    _, shape, dtype, fortran, data = state
    whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or not isinstance(dtype, np.dtype) or type(data) is not bytes or type(fortran) is not bool:
        raise PickleRefused("a numpy array has no usable state")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise PickleRefused(f"a numpy array of shape {list(shape)} does not match its {len(data)} bytes")
    array.__setstate__((1, shape, dtype, fortran, data))  # type: ignore[arg-type]


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable(_ordered_dict),
    ("builtins", "set"): _Callable(_set),
    ("__builtin__", "set"): _Callable(_set),
    ("_codecs", "encode"): _Callable(_encode),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Callable(_rebuild_parameter),
    ("torch", "Size"): _Callable(lambda size: size),  # a tuple does as well
    ("torch", "device"): _Callable(lambda kind, *index: kind),  # everything is read to the CPU
    ("numpy", "dtype"): _Callable(_dtype),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _GLOBALS[_module, "_reconstruct"] = _Callable(_array)
    _GLOBALS[_module, "scalar"] = _Callable(_scalar)
for _name, _kind in STORAGE_TYPES.items():
    _GLOBALS["torch", _name] = _GLOBALS["torch.storage", _name] = StorageType(_kind)
for _kind in set(STORAGE_TYPES.values()):
    _GLOBALS["torch", str(_kind).removeprefix("torch.")] = _kind


def _find_global(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise PickleRefused("a global is named by something that is not text")
    if (module, name) in _GLOBALS:
        return _GLOBALS[module, name]
    path = f"{module}.{name}"
    if path.startswith(STAND_IN_PACKAGES) and name.isidentifier():
        return _Callable(lambda *unused: StandIn(path))
    raise PickleRefused(f"it asks for {path}, which a checkpoint has no use for")


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The pickle stack machine. ``load_storage(persistent id)`` gives the 1-D tensor of a storage."""

    def __init__(self, load_storage: Callable[[Any], Tensor]) -> None:
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _TUPLES:
                self.stack[-_TUPLES[name] :] = [tuple(self.stack[-_TUPLES[name] :])]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(_find_global(*argument.split(" ", 1)))
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_op_{name.lower()}", None)
                if step is None:
                    raise PickleRefused(f"it uses the pickle instruction {name}, which a checkpoint has no use for")
                step()
        raise PickleRefused("it ends too early")

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _op_mark(self) -> None:
        self.marks.append(len(self.stack))

    def _op_tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def _op_list(self) -> None:
        self.stack.append(self._marked())

    def _op_dict(self) -> None:
        items = self._marked()
        self.stack.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _op_append(self) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def _op_appends(self) -> None:
        items = self._marked()
        self._top(list).extend(items)

    def _op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_key(key)] = value

    def _op_setitems(self) -> None:
        items = self._marked()
        self._top(dict).update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def _op_additems(self) -> None:
        items = self._marked()
        self._top(set).update(_key(item) for item in items)

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise PickleRefused(f"it treats a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_find_global(module, name))

    def _op_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise PickleRefused("it calls something that is not a function")
        self.stack.append(function.call(*arguments))

    _op_newobj = _op_reduce

    def _op_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state if isinstance(state, dict) else {}
        elif isinstance(target, np.ndarray):
            _fill_array(target, state)
        elif isinstance(target, np.dtype):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise PickleRefused("a numpy dtype is not little-endian")
        elif not isinstance(target, OrderedDict):  # a state_dict's _metadata: of no use here
            raise PickleRefused(f"it sets attributes of a {type(target).__name__}")

    def _op_binpersid(self) -> None:
        self.stack.append(self.load_storage(self.stack.pop()))


def read_pickle(data: bytes, load_storage: Callable[[Any], Tensor]) -> Any:
    """The content of one pickle: numbers, text, containers, tensors, numpy arrays and StandIn objects.

    Raises:
        PickleRefused: it is damaged, or wants anything else. Nothing of it was imported or called.
    """
    try:
        return _Machine(load_storage).run(data)
    except PickleRefused:
        raise
    # Whatever else goes wrong in a file built to go wrong is damage, and must not become a traceback.
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PickleRefused(f"it is damaged: {reason}") from None
