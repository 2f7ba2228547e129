"""ROSA on CUDA (csrc/rosa.cu): all diagonals of a stream at once in registers, built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.rosa.inputs import MOST_SYMBOLS, check_range

LONGEST_STREAM = 65535  # a length and a distance share 32 bits
SOURCE = Path(__file__).parent / "csrc" / "rosa.cu"


def rosa_cuda(q: Tensor, k: Tensor, max_match: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.rosa`. q, k: (S, T) integers on a CUDA device; returns src and length, (S, T) int64.

    Raises:
        KernelError: int64 symbols out of range, tensors of another device, a stream of more than 65535 symbols, or as
            :func:`library`.
    """
    if q.device.type != "cuda":
        raise KernelError(f'rosa: impl "cuda" needs tensors on a CUDA device, got {q.device}; use impl="auto"')
    if q.shape[1] > LONGEST_STREAM:
        raise KernelError(f'rosa: impl "cuda" takes streams of at most {LONGEST_STREAM} symbols, got {q.shape[1]}')
    library(torch.cuda.get_device_capability(q.device))
    if q.numel() == 0:
        return torch.empty_like(q, dtype=torch.int64), torch.empty_like(q, dtype=torch.int64)
    for name, symbols in (("q", q), ("k", k)):
        if symbols.dtype == torch.int64:  # the one dtype that does not fit; this waits for the device
            check_range(name, symbols, MOST_SYMBOLS)
    q, k = (symbols.to(torch.int32).contiguous() for symbols in (q, k))
    return torch.ops.heron.rosa_match(q, k, LONGEST_STREAM if max_match is None else min(max_match, LONGEST_STREAM))


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability.

    Raises:
        KernelError: it can't be built here, or the device is older than 8.0.
    """
    _build.load_kernels_for(capability, "rosa", "rosa", [SOURCE])
