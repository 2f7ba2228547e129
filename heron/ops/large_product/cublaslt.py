"""cuBLASLt by its C interface: the algorithms that it has for a product of matrices, each to be run by its number.

It is the library that PyTorch has loaded. Nothing is built, and no header is needed.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError

# Of cublasLt.h, library_types.h and cublas_api.h
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_*
_SUMS_IN_FP32 = 68  # CUBLAS_COMPUTE_32F
_TURN_FIRST, _TURN_SECOND = 3, 4  # CUBLASLT_MATMUL_DESC_TRANSA, _TRANSB
_MOST_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
_MOST_ALGORITHMS = 32  # it tells of 8
_WORKSPACE_BYTES = 32 << 20  # what PyTorch gives it on Hopper


class _Algorithm(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class Matrix(NamedTuple):
    """A matrix as it lies in memory: `turned` is one of columns side by side. `stride` is in elements."""

    rows: int
    columns: int
    stride: int
    turned: bool
    dtype: torch.dtype


def described(x: Tensor) -> Matrix | None:
    """How `x` lies in memory; None where that is not what cuBLASLt's fastest algorithms take."""
    (rows, columns), (down, across) = x.shape, x.stride()
    turned = across != 1
    stride = across if turned else down
    fits = (down if turned else across) == 1 and stride >= (rows if turned else columns)
    aligned = x.data_ptr() % 256 == 0 and stride * x.element_size() % 16 == 0
    return Matrix(rows, columns, stride, turned, x.dtype) if fits and aligned and x.dtype in _TYPES else None


class Algorithms:
    """What cuBLASLt has for ``out = a b + beta out``, the likely fastest first.

    Args:
        a, b: of one dtype.
        out: row by row; beta is 1 if `adds`, else 0.

    Raises:
        KernelError: cuBLASLt refuses such a product, or it can't be found.
    """

    def __init__(self, a: Matrix, b: Matrix, out: Matrix, adds: bool):
        self._library, self._handle = _library(), _handle(torch.cuda.current_device())
        self._factors = c_float(1.0), c_float(1.0 if adds else 0.0)
        # It counts columns first: out^T = b^T a^T.
        self._product = self._made("cublasLtMatmulDescCreate", c_int(_SUMS_IN_FP32), c_int(_TYPES[torch.float32]))
        for side, matrix in ((_TURN_FIRST, b), (_TURN_SECOND, a)):
            self._set("cublasLtMatmulDescSetAttribute", self._product, side, c_int32(matrix.turned))
        self._b, self._a, self._out = (self._layout(matrix) for matrix in (b, a, out))
        wish = self._made("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", wish, _MOST_WORKSPACE, c_uint64(_WORKSPACE_BYTES))
        found, count = (_Algorithm * _MOST_ALGORITHMS)(), c_int()
        layouts = self._b, self._a, self._out, self._out
        self._call("cublasLtMatmulAlgoGetHeuristic", self._handle, self._product, *layouts, wish,
                   c_int(_MOST_ALGORITHMS), found, byref(count))  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", wish)
        self._found = [algorithm for algorithm in found[: count.value] if algorithm.status == 0]

    def __len__(self) -> int:
        return len(self._found)

    def run(self, number: int, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Compute by one of them, on the current stream."""
        algorithm, size = self._found[number], self._found[number].workspace_bytes
        workspace = out.new_empty(size, dtype=torch.uint8) if size else None
        one, beta = self._factors
        first, second, result = (c_void_p(x.data_ptr()) for x in (b, a, out))
        self._call("cublasLtMatmul", self._handle, self._product, byref(one), first, self._b, second, self._a,
                   byref(beta), result, self._out, result, self._out, byref(algorithm.algorithm),
                   c_void_p(None if workspace is None else workspace.data_ptr()), c_size_t(size),
                   c_void_p(torch.cuda.current_stream().cuda_stream))  # fmt: skip

    def _layout(self, matrix: Matrix) -> c_void_p:
        sizes = (matrix.rows, matrix.columns) if matrix.turned else (matrix.columns, matrix.rows)
        numbers = c_int(_TYPES[matrix.dtype]), *map(c_uint64, sizes), c_int64(matrix.stride)
        return self._made("cublasLtMatrixLayoutCreate", *numbers)

    def _made(self, function: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        self._call(function, byref(made), *arguments)
        return made

    def _set(self, function: str, of: c_void_p, name: int, value: Any) -> None:
        self._call(function, of, c_int(name), byref(value), c_size_t(ctypes.sizeof(value)))

    def _call(self, function: str, *arguments: Any) -> None:
        _call(self._library, function, *arguments)


def version() -> int:
    """Of the library; KernelError where it can't be found."""
    function = _library().cublasLtGetVersion
    function.restype = c_size_t
    return function()


def _call(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    if status := getattr(library, function)(*arguments):
        raise KernelError(f"large_product: {function} failed with status {status}")


@functools.cache
def _library() -> ctypes.CDLL:
    name = f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}"
    torch.cuda.current_blas_handle()  # PyTorch loads it at its first product
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise KernelError(f"large_product: {name} can't be loaded: {error}") from None


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call(_library(), "cublasLtCreate", byref(handle))
    return handle
