"""The update is written first, and the large product is added to it in place, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heron.ops import _graph


def low_rank_linear_in_place(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """See :func:`heron.ops.low_rank_linear`."""
    y, _ = _low_rank(x.reshape(-1, x.shape[-1]), weight, down, up, scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def _run(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y (n, out), and x down^T (n, rank), of x (n, in)."""
    inner = x @ down.t()
    return (inner @ up.t()).addmm_(x, weight.t(), beta=scale), inner


def _shapes(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, d_y: Tensor, d_inner: Tensor | None) -> tuple[Tensor | None, ...]:
    d_x, d_down, d_up = _backward(d_y.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[0])
    return d_x if ctx.needs_input_grad[0] else None, None, d_down, d_up, None


def _run_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, inner: Tensor, scale: float, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty, unless it is wanted), down and up."""
    d_inner = d_y @ up
    d_up, d_down = d_y.t() @ inner, d_inner.t() @ x
    if scale != 1.0:
        d_up, d_down = d_up * scale, d_down * scale
    d_x = (d_inner @ down).addmm_(d_y, weight, beta=scale) if wants_x else x.new_empty(0)
    return d_x, d_down, d_up


def _shapes_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, inner: Tensor, scale: float, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if wants_x else (0,)), torch.empty_like(down), torch.empty_like(up)


_backward = _graph.Operator("low_rank_linear_backward", _run_backward, _shapes_backward)
_low_rank = _graph.Operator("low_rank_linear", _run, _shapes, _keep, _gradients)
