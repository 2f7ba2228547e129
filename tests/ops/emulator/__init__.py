"""The CUDA kernels of WKV7 on a CPU: the same sources, compiled for it, as ``heron::wkv7s_*`` on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build
from heron.ops.wkv7 import cuda

_HERE = Path(__file__).parent
_FLAGS = ("-O1", "-U_FORTIFY_SOURCE")  # the second: fibers jump between stacks, which the checked longjmp refuses
ONE_AT_A_TIME = threading.Lock()  # an emulated GPU runs one block
OLDER_GPU = ("-DHERON_BACKWARD_STAGES=1", "-DEMULATE_PIECES")  # little shared memory, and no copies of tiles
flags: tuple[str, ...] = ()  # of the kernels that the operators run


class Input(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


class Problem(ctypes.Structure):
    """``Wkv7sProblem`` of csrc/wkv7s.h."""

    _fields_ = [
        *((name, Input) for name in ("a", "r", "b", "k", "v", "w", "dy")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "state", "d_final", "y", "final_state", "saved")),
        *((name, ctypes.c_void_p) for name in ("dr", "dw", "dk", "dv", "da", "db", "d_state")),
        *((name, ctypes.c_void_p) for name in ("transfer", "local", "edges")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "size", "dtype", "sequences", "cu_seqlens_is_int64")),
        *((name, ctypes.c_int32) for name in ("tensor_cores", "segments", "segment_tokens", "mapped")),
    ]


@functools.cache
def load(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The emulated kernels; `flags` are further flags of the compiler."""
    depends = [*cuda.sources()[:1], *cuda.headers(), _HERE / "hardware.h"]
    library = _build.load_c_library("wkv7s_emulated", [_HERE / "wkv7s.cpp"], (*_FLAGS, *flags), depends)
    for name in ("wkv7s_forward", "wkv7s_backward", "wkv7s_step"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def problem(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, cu_seqlens: Tensor | None, **rest
) -> Problem:
    """A problem of these inputs; `rest` are its other fields, tensors or numbers."""
    batch, tokens, heads, size = r.shape
    segments = rest.get("segments", 1)
    fields = dict(
        {name: Input(x.data_ptr(), *x.stride()[:3]) for name, x in zip("rwkvab", (r, w, k, v, a, b), strict=True)},
        **dict(batch=batch, tokens=tokens, heads=heads, size=size, dtype=cuda.DTYPES.index(r.dtype)),
        cu_seqlens=cu_seqlens,
        cu_seqlens_is_int64=int(cu_seqlens is not None and cu_seqlens.dtype == torch.int64),
        sequences=batch * segments if cu_seqlens is None else cu_seqlens.numel() - 1,
    )
    fields |= {"segments": 1, "segment_tokens": tokens} | rest
    if fields.get("dy") is not None:
        fields["dy"] = Input(fields["dy"].data_ptr(), *fields["dy"].stride()[:3])
    made = Problem()
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.data_ptr() % 16 and name != "cu_seqlens":
            raise RuntimeError(f"{name} is not 16-byte aligned")  # which a CPU would forgive
        if value is not None:
            setattr(made, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return made


def _run(name: str, made: Problem) -> None:
    with ONE_AT_A_TIME:
        error = getattr(load(flags), name)(ctypes.byref(made), None)
    if error:
        raise RuntimeError(error.decode())


def _forward(*arguments: Tensor | int | None) -> None:
    *inputs, state, cu_seqlens, tensor_cores, segments, segment_tokens, mapped = arguments[:12]
    names = ("y", "final_state", "saved", "transfer", "local", "edges")
    buffers = dict(zip(names, arguments[12:], strict=True))
    plan = dict(tensor_cores=int(tensor_cores), segments=segments, segment_tokens=segment_tokens, mapped=int(mapped))
    _run("wkv7s_forward", problem(*inputs, cu_seqlens, state=state, **plan, **buffers))


def _backward(*arguments: Tensor | int | None) -> None:
    *inputs, dy, d_final, saved, transfer, cu_seqlens, tensor_cores, segments, segment_tokens, mapped = arguments[:15]
    names = ("dr", "dw", "dk", "dv", "da", "db", "d_state", "local", "edges")
    buffers = dict(zip(names, arguments[15:], strict=True), dy=dy, d_final=d_final, saved=saved, transfer=transfer)
    plan = dict(tensor_cores=int(tensor_cores), segments=segments, segment_tokens=segment_tokens, mapped=int(mapped))
    _run("wkv7s_backward", problem(*inputs, cu_seqlens, **plan, **buffers))


def _span(*arguments: Tensor | int) -> None:
    w, k, v, a, b, segments, segment_tokens, transfer, local = arguments
    plan = dict(tensor_cores=1, segments=segments, segment_tokens=segment_tokens)
    _run("wkv7s_forward", problem(k, w, k, v, a, b, None, transfer=transfer, local=local, **plan))


def _span_backward(*arguments: Tensor | int) -> None:
    r, w, a, b, dy, segments, segment_tokens, local = arguments
    plan = dict(tensor_cores=1, segments=segments, segment_tokens=segment_tokens)
    _run("wkv7s_backward", problem(r, w, b, b, a, b, None, dy=dy, local=local, **plan))


def _step(*arguments: Tensor | None) -> None:
    *inputs, state, cu_seqlens, y, final_state = arguments
    _run("wkv7s_step", problem(*inputs, cu_seqlens, state=state, y=y, final_state=final_state))


_library = torch.library.Library("heron", "FRAGMENT")
_KERNELS = dict(forward=_forward, backward=_backward, span=_span, span_backward=_span_backward, step=_step)
for _name, _kernel in _KERNELS.items():
    _library.impl(f"wkv7s_{_name}", _kernel, "CPU")
