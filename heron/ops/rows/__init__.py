"""Rows of tables that may lie off the device: copied by token id, multiplied with, and stepped by AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.ops import _choice
from heron.ops.rows import cpu, cuda
from heron.ops.rows.gate import LARGEST_WIDTH, Places, gate_rows
from heron.ops.rows.lookup import look_up, look_up_choice
from heron.ops.rows.reference import row_adamw_reference

__all__ = [
    "LARGEST_WIDTH",
    "Places",
    "copy_rows",
    "copy_rows_choice",
    "gate_rows",
    "look_up",
    "look_up_choice",
    "row_adamw_",
    "row_adamw_choice",
]
_FORMS = {"reference": row_adamw_reference, "cpu": cpu.row_adamw_cpu}

copy_rows = cuda.copy_rows


def row_adamw_choice(device: torch.device, dtype: torch.dtype = torch.float32) -> _choice.Choice:
    """What steps the rows of tables of `dtype` that train on `device`."""
    other = _choice.Choice("reference", "plain PyTorch, on the CPU")
    other = cpu.FORM.choice("C++, one pass over the rows", other, device, dtype)
    return cuda.FORM.choice(
        "all layers at once, tables on the device or read by it from the host", other, device, dtype
    )


def copy_rows_choice(device: torch.device) -> _choice.Choice:
    """What brings rows of tables in the host's memory to a model that runs on `device`."""
    other = _choice.Choice("host", "the host picks the rows and sends them")
    reason = "the device reads them over the bus, in pinned memory"
    return cuda.FORM.choice(reason, other, device, torch.float32)


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
        impl = row_adamw_choice(weight.device, weight.dtype).impl
    form = _choice.form_of("rows", impl, _FORMS)
    form(weight, exp_avg, exp_avg_sq, row_step, gradient, ids, lr, betas, eps)
