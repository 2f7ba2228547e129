"""ROSA on CUDA (csrc/rosa.cu): all diagonals of a stream at once in registers, built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.rosa.inputs import MOST_SYMBOLS, check_range

LONGEST_STREAM = 65535  # a length and a distance share 32 bits
SOURCE = Path(__file__).parent / "csrc" / "rosa.cu"


def rosa_cuda(q: Tensor, k: Tensor, max_match: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.rosa`. q, k: (S, T) integers on a CUDA device; returns src and length, (S, T) int64.

    Raises:
        KernelError: int64 symbols out of range, or as :meth:`FORM.require`.
    """
    FORM.require(q.device, q.shape[1])
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


def why_not(device: torch.device, n_tokens: int) -> str | None:
    """Why the kernel does not take streams of `n_tokens`, as a clause; None where it does."""
    if n_tokens > LONGEST_STREAM:
        return f"it takes streams of at most {LONGEST_STREAM} symbols, not {n_tokens}"
    return None


FORM = _choice.NativeForm("rosa", "cuda", "ROSA", why_not, library)
