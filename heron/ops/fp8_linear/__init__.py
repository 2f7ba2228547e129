"""A linear layer whose three products are of numbers in fp8. README.md says how their scales go through a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops.fp8_linear.reference import fp8_linear_reference
from heron.ops.fp8_linear.scaled import MULTIPLE, fp8_linear_scaled

__all__ = ["fp8_linear", "fp8_linear_reference", "why_not_fp8"]


def why_not_fp8(weight: Tensor) -> str | None:
    """Why :func:`fp8_linear` does not take a matrix (out, in), as a clause; None where it does."""
    n_out, n_in = weight.shape
    if n_out % MULTIPLE or n_in % MULTIPLE:
        return f"both sizes must be multiples of {MULTIPLE}, and it is {n_out} x {n_in}"
    return None


def fp8_linear(x: Tensor, weight: Tensor, y_in_bf16: bool = False) -> Tensor:
    """A linear layer without bias::

        y = x weight^T        x and weight rounded to 8 bits (e4m3), each row with a scale of its own

    Its gradients are those of plain products, d_x = d_y weight and d_weight = d_y^T x, with the same rounded x and
    weight, and with d_y rounded like them.

    Args:
        x: (..., in), bf16.
        weight: (out, in), bf16; both multiples of 16.
        y_in_bf16: whether y is the product of x and weight as they are, in bf16, and the gradients alone are in fp8.

    Returns:
        y (..., out), bf16. A row of x or weight that holds inf or NaN makes a row or column of y that is NaN,
        or inf with `y_in_bf16`.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit.
    """
    n_out, n_in = weight.shape
    if x.shape[-1] != n_in or x.dtype != torch.bfloat16 or weight.dtype != x.dtype or weight.device != x.device:
        raise KernelError(
            f"fp8_linear: wanted x (..., {n_in}) for a weight of {n_out} x {n_in}, both {torch.bfloat16} on one "
            f"device; got x {tuple(x.shape)} {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}"
        )
    if (against := why_not_fp8(weight)) is not None:
        raise KernelError(f"fp8_linear: {against}")
    return fp8_linear_scaled(x, weight, y_in_bf16)
