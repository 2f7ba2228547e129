"""AdamW by rows in C++ on the CPU (csrc/rows.cpp): one pass over the numbers, built at first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build, _choice

CSRC = Path(__file__).parent / "csrc"


def row_adamw_cpu(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    gradient: Tensor,
    ids: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """See :func:`heron.ops.rows.row_adamw_`: fp32 weights, fp32 or bf16 moments, ``torch.get_num_threads()`` threads.

    Raises:
        KernelError: tensors of another device, dtype or shape, ids outside the table, or as :func:`library`.
    """
    n, (V, width) = len(ids), weight.shape
    moments = torch.bfloat16 if exp_avg.dtype == torch.bfloat16 else torch.float32
    wanted = (
        ("weight", weight, torch.float32, (V, width)),
        ("exp_avg", exp_avg, moments, (V, width)),
        ("exp_avg_sq", exp_avg_sq, moments, (V, width)),
        ("row_step", row_step, torch.int32, (V,)),
        ("gradient", gradient, torch.float32, (n, width)),
        ("ids", ids, torch.int64, (n,)),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise KernelError(
                f'rows: impl "cpu" needs {name} contiguous, {dtype} {shape} on the CPU, '
                f'got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; use impl="reference"'
            )
    if n and not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise KernelError(f"rows: ids must be 0 to {V - 1}, got {int(ids.min())} to {int(ids.max())}")
    pointers = [tensor.data_ptr() for _, tensor, _, _ in wanted]
    in_half = moments == torch.bfloat16
    library().heron_row_adamw(*pointers, n, width, lr, *betas, eps, in_half, torch.get_num_threads())


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built when needed; KernelError where it can't be."""
    flags = ["-fno-math-errno", "-ffp-contract=off"]
    built = _build.load_c_library("rows", [CSRC / "rows.cpp"], flags, [CSRC / "rows.h"])
    pointer, small, large, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    built.heron_row_adamw.argtypes = [*[pointer] * 6, large, small, *[real] * 4, small, small]
    built.heron_row_adamw.restype = None
    return built


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library does not step tables of `dtype`, as a clause; None where it does."""
    return _choice.why_not_dtype(dtype, (torch.float32,))


FORM = _choice.NativeForm("rows", "cpu", "AdamW by rows", why_not, library)
