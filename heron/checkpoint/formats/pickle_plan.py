"""What a pickle of tensors would build, told without building it: nothing it names is looked up, called or allocated.

`torch.save` needs 26 of pickle's opcodes and a handful of names for a dict of tensors. Whatever else a file holds is
refused here, before PyTorch's own restricted unpickler sees it.
"""

from __future__ import annotations

import pickletools
from typing import Any, NamedTuple

import torch

LARGEST_PICKLE = 1 << 23  # bytes
MOST_OPCODES = 200_000
MOST_DIMENSIONS = 8
_LONGEST_TEXT = 1024

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
    """Bytes that a pickle refers to: their key in the file, and how many numbers of which type they are."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


class Tensor(NamedTuple):
    """A tensor that a pickle describes; `offset` and `stride` count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """Its first element in the storage, and the one after its last."""
        if 0 in self.shape:
            return self.offset, self.offset
        return self.offset, self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class _Global(str):
    """A module and a name in it, not looked up."""


class _Mark:
    """The place on the stack where the parts of a tuple, list or dict begin."""


_MARK = _Mark()


def read(data: bytes) -> tuple[object, int]:
    """The content of the pickle that `data` begins with, tensors as :class:`Tensor`, and the number of its bytes.

    Raises:
        ValueError: it holds what a dict of tensors has no use for, is damaged, or is beyond the limits of this module.
    """
    stack: list = []
    memo: dict[Any, object] = {}
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data[:LARGEST_PICKLE])):
        if count == MOST_OPCODES:
            raise ValueError(f"its pickle has more than {MOST_OPCODES:,} opcodes")
        try:
            if opcode.name == "STOP":
                (content,) = stack
                return content, position + 1  # pyright: ignore[reportOptionalOperand]
            _step(opcode.name, argument, stack, memo)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else "it does not fit what stands before it"
            raise ValueError(f"{reason} (opcode {opcode.name} at byte {position})") from None
    raise ValueError("its pickle has no end")


def _step(name: str, argument: object, stack: list, memo: dict[Any, object]) -> None:
    """Do what one opcode says with plain values."""
    if name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in _VALUES:
        if isinstance(argument, str) and len(argument) > _LONGEST_TEXT:
            raise ValueError(f"a text of {len(argument):,} characters")
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name == "MARK":
        stack.append(_MARK)
    elif name in _TUPLES:
        stack.append(tuple(_popped(stack, _TUPLES[name])))
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name in ("SETITEM", "SETITEMS"):
        items = _popped(stack, 2) if name == "SETITEM" else _since_mark(stack)
        _set_items(stack[-1], items)
    elif name in ("APPEND", "APPENDS"):
        items = _popped(stack, 1) if name == "APPEND" else _since_mark(stack)
        _wanted(stack[-1], list).extend(items)
    elif name == "GLOBAL":
        if argument not in (*_STORAGES, _DICT, _TENSOR, _PARAMETER):
            raise ValueError(f"it names {str(argument)[:80]!r}, which no dict of tensors needs: it could run code")
        stack.append(_Global(argument))
    elif name == "BINPERSID":
        stack.append(_storage(_wanted(stack.pop(), tuple)))
    elif name == "REDUCE":
        function, arguments = _popped(stack, 2)
        stack.append(_called(_wanted(function, _Global), _wanted(arguments, tuple)))
    elif name == "BUILD":  # a state_dict of PyTorch carries the versions of its modules
        state = _wanted(stack.pop(), dict)
        if not isinstance(stack[-1], dict) or state.keys() != {"_metadata"}:
            raise ValueError("it sets attributes")
    elif name != "PROTO":
        raise ValueError("it uses an opcode that no dict of tensors needs")
    elif argument != 2:
        raise ValueError(f"wanted pickle protocol 2, as torch.save writes it, got {argument}")


def _popped(stack: list, count: int) -> list:
    parts = stack[-count:]
    if len(parts) < count or any(part is _MARK for part in parts):
        raise IndexError
    del stack[-count:]
    return parts


def _since_mark(stack: list) -> list:
    parts = []
    while (part := stack.pop()) is not _MARK:
        parts.append(part)
    return parts[::-1]


def _wanted(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _set_items(target: Any, items: list) -> None:
    _wanted(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise ValueError(f"a {type(key).__name__} as a name")
        if key in target:
            raise ValueError(f"the name {str(key)[:80]!r} comes twice")
        target[key] = value


def _storage(parts: tuple) -> Storage:
    """The storage behind ``("storage", type, key, device, numel)``; old files add None: no view of another one."""
    word, kind, key, device, numel = parts[:5]
    if word != "storage" or parts[5:] not in ((), (None,)) or type(device) is not str:
        raise ValueError("it refers to something that is no storage of its own")
    if kind not in _STORAGES:
        raise TypeError
    return Storage(_wanted(key, str), _STORAGES[kind], _whole(numel))


def _called(function: _Global, arguments: tuple) -> object:
    """What a call of one of the few functions would give."""
    if function == _DICT and not arguments:
        return {}
    if function == _PARAMETER:
        tensor, requires_grad, hooks = arguments
        _check_flags(requires_grad, hooks)
        return _wanted(tensor, Tensor)
    if function != _TENSOR:
        raise ValueError(f"it calls {function} in a way that no dict of tensors needs")
    storage, offset, shape, stride, requires_grad, hooks = arguments
    _check_flags(requires_grad, hooks)
    if len(_wanted(shape, tuple)) != len(_wanted(stride, tuple)) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor with {len(shape)} sizes and {len(stride)} strides")
    shape, stride = tuple(map(_whole, shape)), tuple(map(_whole, stride))
    return Tensor(_wanted(storage, Storage), _whole(offset), shape, stride)


def _check_flags(requires_grad: object, hooks: object) -> None:
    if type(requires_grad) is not bool or _wanted(hooks, dict):
        raise ValueError("a tensor that brings hooks")


def _whole(number: object) -> int:
    if type(number) is not int or not 0 <= number < 1 << 48:
        raise ValueError(f"a size, stride or offset of {str(number)[:40]}")
    return number
