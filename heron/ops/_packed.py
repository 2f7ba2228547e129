"""Sequences packed along T: the one rule for where they begin, which several ops take."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops._graph import in_graph


def count(op: str, x: Tensor, cu_seqlens: Tensor) -> int:
    """How many sequences `cu_seqlens` packs into x (1, T, ...), T >= 1; some may be empty.

    Raises:
        KernelError: a shape, dtype or device that does not fit; on a CPU also numbers that do not go from 0 to T or
            that decrease. To look at them on a GPU would make the host wait for it.
    """
    wanted = f"{op}: cu_seqlens must be (n_seq + 1,), n_seq >= 1, int32 or int64, on {x.device}"
    if not isinstance(cu_seqlens, Tensor):
        raise KernelError(f"{wanted}; got {type(cu_seqlens).__name__}")
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not integers or cu_seqlens.device != x.device:
        raise KernelError(f"{wanted}; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise KernelError(f"{op}: cu_seqlens packs all sequences into one row, B = 1; got B = {x.shape[0]}")
    if x.device.type == "cpu" and not in_graph():
        lengths(op, x, cu_seqlens)
    return cu_seqlens.numel() - 1


def lengths(op: str, x: Tensor, cu_seqlens: Tensor) -> list[int]:
    """How many tokens each sequence has. KernelError for numbers that do not go from 0 to T or that decrease."""
    offsets, n_tokens = cu_seqlens.tolist(), x.shape[1]
    found = [end - begin for begin, end in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != n_tokens or min(found) < 0:
        raise KernelError(f"{op}: cu_seqlens must go from 0 to T = {n_tokens} and never decrease; got {offsets}")
    return found
