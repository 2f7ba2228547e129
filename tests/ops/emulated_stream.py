"""The kernel of token streams on a CPU, in the place of the one on a GPU."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from heron.ops import _build, _choice
from heron.ops.rosa import device_stream
from heron.ops.rosa.memory import CSRC, TREES

_EMULATOR = Path(__file__).parent / "emulator"


@functools.cache
def _library() -> ctypes.CDLL:
    depends = [CSRC / "memory.cu", TREES, _EMULATOR / "hardware.h", _EMULATOR / "warp.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("rosa_memory_emulated", [_EMULATOR / "rosa_memory.cpp"], flags, depends)
    pointer, small, large, whole = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
    library.rosa_read_one_emulated.restype = ctypes.c_char_p
    library.rosa_read_one_emulated.argtypes = [
        pointer, pointer, pointer, whole, whole, large, small, large, whole, pointer, small, pointer, pointer
    ]  # fmt: skip
    return library


def _read_one_(id, ids, nodes, roots, t, ring, window, max_match, end, read, found) -> None:
    assert ring or t < len(ids)
    mask = len(ids) - 1 if ring else 2**32 - 1
    arrays = (part.data_ptr() for part in (ids, nodes, roots))
    rules = mask, len(roots), window, max_match, end
    error = _library().rosa_read_one_emulated(
        *arrays, *rules, t, id.data_ptr(), len(found), read.data_ptr(), found.data_ptr()
    )
    assert error is None, error.decode()


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU be a device on which token streams are read; skip without a compiler."""
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(torch.ops.heron, "rosa_read_one_", _read_one_, raising=False)
    monkeypatch.setattr(device_stream.FORM, "require", lambda device: None)
    monkeypatch.setattr(device_stream.FORM, "choice", lambda *_: _choice.Choice("cuda", "emulated"))
