"""Rows of tables that may lie off the device: copied by token id, multiplied with, and stepped by AdamW."""

from __future__ import annotations

from torch import Tensor

from heron.errors import KernelError
from heron.ops import _select
from heron.ops.rows import cpu, cuda
from heron.ops.rows.gate import LARGEST_WIDTH, Places, gate_rows
from heron.ops.rows.reference import row_adamw_reference

__all__ = ["LARGEST_WIDTH", "Places", "copy_rows", "gate_rows", "row_adamw_"]

copy_rows = cuda.copy_rows


def row_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    gradient: Tensor,
    ids: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    impl: str = "auto",
) -> None:
    """One step of AdamW for some rows of a table on the CPU, in place. With t the steps that this very row has had::

        t <- t + 1,   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        row <- row - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Tables of a CUDA device, or read by it, are stepped all at once: :func:`heron.ops.rows.cuda.row_adamw_`.

    Args:
        weight: (V, width).
        exp_avg, exp_avg_sq: m and v, (V, width), of one dtype; computed in that of `weight`, rounded when put away.
        row_step: t, (V,) int32.
        gradient: g, (n, width) in the dtype of `weight`.
        ids: (n,) int64, all different, of the n rows.
        impl: "reference", "cpu" or "auto".

    Raises:
        KernelError: `impl` is unknown or can't run here.
    """
    if impl == "auto":
        impl = _select.row_adamw(weight.device, weight.dtype).impl
    if impl not in ("reference", "cpu"):
        raise KernelError(f'rows: impl must be "reference", "cpu" or "auto", got {impl!r}')
    form = cpu.row_adamw_cpu if impl == "cpu" else row_adamw_reference
    form(weight, exp_avg, exp_avg_sq, row_step, gradient, ids, lr, betas, eps)
