"""The loss over chunks of rows: no more than one chunk of logits ever exists, in the forward or in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.ops import _graph
from heron.ops.large_product import add_large_product_, large_product
from heron.ops.linear_cross_entropy import cuda
from heron.ops.linear_cross_entropy.reference import Bonus, check_ids

_LOGITS_PER_CHUNK = 1 << 24
_LOGITS_PER_CHUNK_CUDA = 1 << 28


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float,
    chunk_rows: int | None = None,
    bonus: Bonus | None = None,
) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy` in chunks of rows. Inputs (rows, C), (V, C), (rows,), twice (rows, K).

    The gradients are computed in the forward, while a chunk's logits exist, and only scaled in the backward.
    `chunk_rows`: rows in a chunk; None: as many as keep a chunk near 2^24 logits.
    """
    if chunk_rows is None:
        chunk_rows = max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    return _in_chunks(hidden, weight, targets, l2wrap, chunk_rows, False, bonus)


def linear_cross_entropy_cuda(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, bonus: Bonus | None = None
) -> Tensor:
    """The same in chunks near 2^28 logits with a kernel for their rows, on a CUDA device.

    Raises:
        KernelError: not a CUDA device, one older than 8.0, products in fp64, or the kernel can't be built.
    """
    cuda.FORM.require(hidden.device, _product_dtype(hidden))
    chunk_rows = max(1, _LOGITS_PER_CHUNK_CUDA // weight.shape[0])
    return _in_chunks(hidden, weight, targets, l2wrap, chunk_rows, True, bonus)


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float,
    chunk_rows: int,
    kernel: bool,
    bonus: Bonus | None,
) -> Tensor:
    """The loss, in a graph as one operator of PyTorch; `kernel`: the one for CUDA does the rows."""
    arguments = hidden, weight, targets, l2wrap, chunk_rows, kernel, _product_dtype(hidden), torch.is_grad_enabled()
    if not _graph.in_graph():
        return _Chunked.apply(*arguments, *(bonus or (None, None)))
    total, count, *_ = _operator(*arguments, *(bonus or (None, None)))
    return total / count


def loss_rows(logits: Tensor, targets: Tensor, l2wrap: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of each row, and its gradient with that of L2Wrap, for ``c = l2wrap``.

    Args:
        logits: (rows, V); they may be overwritten.
        targets: (rows,) int64, -100 for a row that counts nothing.

    Returns:
        (rows,) in at least fp32, and (rows, V) in the dtype of `logits` (None unless `with_gradient`).
    """
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    counted = (targets != -100).unsqueeze(-1)
    target = targets.clamp(min=0).unsqueeze(-1)
    largest, where = logits.max(dim=-1, keepdim=True)
    at_target = logits.gather(-1, target)
    exp = logits.sub_(largest).exp_()
    normaliser = exp.sum(dim=-1, keepdim=True)
    losses = (largest + normaliser.log() - at_target).masked_fill(~counted, 0).squeeze(-1)
    if not with_gradient:
        return losses, None
    d_logits = exp.mul_(counted / normaliser)
    d_logits.scatter_add_(-1, target, -counted.to(d_logits.dtype))
    d_logits.scatter_add_(-1, where, l2wrap * largest * counted)
    return losses, d_logits.to(dtype)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, l2wrap, chunk_rows, kernel, product_dtype, grad_mode, ids, values):
        wanted = [grad_mode and ctx.needs_input_grad[i] for i in (0, 1, -1)]
        total, count, *grads = _summed(
            hidden, weight, targets, l2wrap, chunk_rows, kernel, product_dtype, wanted, ids, values
        )
        ctx.dtypes = hidden.dtype, product_dtype, None if values is None else values.dtype
        ctx.by_kernel = kernel
        ctx.save_for_backward(count, *grads)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):  # pyright: ignore[reportIncompatibleMethodOverride]
        count, *grads = ctx.saved_tensors
        return _scaled(grads, d_loss / count, ctx.dtypes, ctx.by_kernel)


def _scaled(
    grads: Sequence[Tensor | None], scale: Tensor, dtypes: Sequence[torch.dtype | None], by_kernel: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradients of `_summed` times `scale`, as those of the arguments of `_run`; None where the dtype is.

    `scale` holds 1 / count: it comes last, so that half precision won't underflow.
    """
    d_hidden, d_weight, d_values = (
        None if grad is None or dtype is None else _times(grad, scale, dtype, by_kernel)
        for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return d_hidden, d_weight, *(None,) * 7, d_values


def _times(grad: Tensor, scale: Tensor, dtype: torch.dtype, by_kernel: bool) -> Tensor:
    if by_kernel and dtype in cuda.DTYPES:
        return cuda.scaled_cuda(grad, scale, dtype)
    return (grad.to(scale.dtype) * scale).to(dtype)


def _summed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float,
    chunk_rows: int,
    kernel: bool,
    product_dtype: torch.dtype,
    wanted: Sequence[bool],
    ids: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """count * loss, the count (at least 1), and the former's gradients by hidden, weight and values where `wanted`."""
    rows_of: Callable[..., tuple[Tensor, Any]] = cuda.loss_rows_cuda if kernel else loss_rows
    dtype = torch.promote_types(product_dtype, torch.float32)
    d_hidden = torch.empty_like(hidden, dtype=product_dtype) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
    d_values = torch.empty_like(values, dtype=product_dtype) if values is not None and wanted[2] else None
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(product_dtype)
        if values is not None:
            values = values.to(product_dtype)
        total = hidden.new_zeros((), dtype=dtype)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            x = hidden[rows].to(product_dtype)
            logits = (large_product if kernel else torch.mm)(x, weight.mT)
            if ids is not None and values is not None:
                _add_at(logits, ids[rows], values[rows])
            losses, d_logits = rows_of(logits, targets[rows], l2wrap, any(wanted))
            total += losses.sum()
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, d_logits.mT, x)
            if ids is not None and d_values is not None:
                torch.gather(d_logits, -1, ids[rows], out=d_values[rows])
            del logits, d_logits  # before the next chunk's are there
        return total, (targets != -100).sum().clamp(min=1), d_hidden, d_weight, d_values


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float,
    chunk_rows: int,
    kernel: bool,
    product_dtype: torch.dtype,
    with_gradient: bool,
    ids: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_targets(targets, weight.shape[0])
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if ids is not None and values is not None:
        check_ids("linear_cross_entropy", "the ids of bonus", ids, weight.shape[0])
        values = values.contiguous()
    total, count, *grads = _summed(
        hidden, weight, targets, l2wrap, chunk_rows, kernel, product_dtype, [with_gradient] * 3, ids, values
    )
    d_hidden, d_weight, d_values = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return total, count, d_hidden, d_weight, d_values


def _shapes(hidden, weight, targets, l2wrap, chunk_rows, kernel, product_dtype, with_gradient, ids=None, values=None):
    dtype = torch.promote_types(product_dtype, torch.float32)
    scalars = hidden.new_empty((), dtype=dtype), targets.new_empty(())
    dtypes = (hidden, product_dtype), (weight, dtype), (values, product_dtype)
    return *scalars, *(
        x.new_empty(x.shape, dtype=its_dtype) if with_gradient and x is not None else hidden.new_empty(0)
        for x, its_dtype in dtypes
    )


def _keep_for_backward(ctx, inputs, output) -> None:
    hidden, weight, *_, values = inputs
    ctx.dtypes = hidden.dtype, weight.dtype, None if values is None else values.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _operator_backward(ctx, d_total, *_):
    return _scaled(ctx.saved_tensors, d_total, ctx.dtypes)


_operator = _graph.Operator("linear_cross_entropy", _run, _shapes, _keep_for_backward, _operator_backward)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """KernelError for a target on the CPU that is neither in [0, V) nor -100."""
    check_ids("linear_cross_entropy", "targets", targets, vocab_size, ignored=-100)


def _add_at(logits: Tensor, ids: Tensor, values: Tensor) -> None:
    """logits[row, ids[row, k]] += values[row, k]; one k at a time, for a GPU adds the ids of one call in any order."""
    for k in range(ids.shape[1]):
        logits.scatter_add_(-1, ids[:, k : k + 1], values[:, k : k + 1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the dtype of `total`, which is at least that of `a` and `b`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":  # half precision in, fp32 out, in one product
        add_large_product_(total, a, b)
    else:
        total += a @ b
