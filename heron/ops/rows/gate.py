"""x times each token's row, with both gradients (csrc/gate.cu on a GPU)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_WIDTH = 8192


class Places(NamedTuple):
    """Which row each of N tokens uses. One serves the tables of all layers: it takes a sort."""

    row: Tensor  # (N,) int64
    order: Tensor  # (N,) int64: the tokens, those of a row side by side and in their own order
    row_in_order: Tensor  # (N,) int64

    @classmethod
    def of(cls, row: Tensor) -> Places:
        """From the row of each token, int64 of any shape. A GPU is not waited for."""
        row = row.flatten()
        row_in_order, order = torch.sort(row, stable=True)
        return cls(row, order, row_in_order)


def gate_rows(x: Tensor, rows: Tensor, places: Places) -> Tensor:
    """``x[token] * rows[row of the token]``, multiplied in fp32. Equal inputs give equal bits, gradients too.

    Args:
        x: (..., width), N tokens in all, bf16 or fp32.
        rows: (n, width) fp32, or bf16 where they get no gradient, on the same device. On a GPU, where the kernels must
            have been built (:func:`heron.ops.rows.cuda.library`), width = 8, 16, ... 8192.
        places: of these tokens.

    Returns:
        As `x`.
    """
    return _GateRows.apply(x, rows, *places)


def gate_rows_reference(x: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """The definition: see :func:`gate_rows`; `row` (N,) is that of each token."""
    gates = rows[row].view(*x.shape[:-1], rows.shape[1])
    return (x.to(gates.dtype) * gates).to(x.dtype)


class _GateRows(torch.autograd.Function):
    """It keeps x and the rows, not what the rows are for each token; of rows that are frozen, not x either."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, row: Tensor, order: Tensor, row_in_order: Tensor) -> Tensor:
        x = x.contiguous()
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, rows, order, row_in_order)
        else:
            ctx.save_for_backward(rows, row)
        return torch.ops.heron.gate_rows(x, rows, row)

    @staticmethod
    def backward(ctx, d: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[1]:  # frozen rows
            return torch.ops.heron.gate_rows(d.contiguous(), *ctx.saved_tensors), None, None, None, None
        d_x, d_rows = torch.ops.heron.gate_rows_backward(d.contiguous(), *ctx.saved_tensors)
        return d_x, d_rows, None, None, None
