"""Rows of a table by token id, whose gradients a kernel sums (csrc/gate.cu)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops import _choice, _graph
from heron.ops.rows import cuda
from heron.ops.rows.gate import LARGEST_WIDTH, Places

_DTYPES = (torch.float32, torch.bfloat16)


def look_up_choice(device: torch.device) -> _choice.Choice:
    """What sums the gradients of looked-up rows on `device`."""
    other = _choice.Choice("reference", "plain PyTorch")
    return cuda.FORM.choice("tokens in the order of their rows", other, device, torch.float32)


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """``table[ids]``, with a gradient of the table that is summed in one order, on a GPU by a kernel.

    Args:
        ids: (...) int64 in [0, V), on the device of `table`, not checked on a GPU.
        table: (V, width).

    Returns:
        (..., width).
    """
    taken = table.dtype in _DTYPES and table.shape[1] % 8 == 0 and table.shape[1] <= LARGEST_WIDTH
    learns = torch.is_grad_enabled() and table.requires_grad and ids.numel() > 0
    if not (taken and learns) or _graph.in_graph() or look_up_choice(table.device).impl != "cuda":
        return F.embedding(ids, table)
    return _LookUp.apply(ids, table)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> Tensor:
        ctx.n_rows = table.shape[0]
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, d: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _, order, row_in_order = Places.of(*ctx.saved_tensors)
        d = d.reshape(-1, d.shape[-1]).contiguous()
        return None, torch.ops.heron.look_up_backward(d, order, row_in_order, ctx.n_rows)
