"""The loss over chunks of rows: no more than one chunk of logits ever exists, in the forward or in the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.ops.linear_cross_entropy import cuda

_LOGITS_PER_CHUNK = 1 << 24
_LOGITS_PER_CHUNK_CUDA = 1 << 28


def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, chunk_rows: int | None = None
) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy` in chunks of rows. Inputs (rows, C), (V, C), (rows,).

    The gradients are computed in the forward, while a chunk's logits exist, and only scaled in the backward.
    `chunk_rows`: rows in a chunk; None: as many as keep a chunk near 2^24 logits.
    """
    if chunk_rows is None:
        chunk_rows = max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    return _Chunked.apply(hidden, weight, targets, l2wrap, chunk_rows, loss_rows, torch.is_grad_enabled())


def linear_cross_entropy_cuda(hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float) -> Tensor:
    """The same in chunks near 2^28 logits with a kernel for their rows, on a CUDA device.

    Raises:
        KernelError: not a CUDA device, one older than 8.0, products in fp64, or the kernel can't be built.
    """
    cuda.FORM.require(hidden.device, _product_dtype(hidden))
    chunk_rows = max(1, _LOGITS_PER_CHUNK_CUDA // weight.shape[0])
    return _Chunked.apply(hidden, weight, targets, l2wrap, chunk_rows, cuda.loss_rows_cuda, torch.is_grad_enabled())


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
    def forward(ctx, hidden, weight, targets, l2wrap, chunk_rows, rows_of, grad_mode):
        product_dtype = _product_dtype(hidden)
        dtype = torch.promote_types(product_dtype, torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=product_dtype) if grad_mode and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if grad_mode and ctx.needs_input_grad[1] else None
        with_gradient = d_hidden is not None or d_weight is not None

        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(product_dtype)
            total = hidden.new_zeros((), dtype=dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                x = hidden[rows].to(product_dtype)
                # The gradient of count * loss; 1 / count comes last, so that half precision doesn't underflow.
                losses, d_logits = rows_of(x @ weight.mT, targets[rows], l2wrap, with_gradient)
                total += losses.sum()
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[rows])
                if d_weight is not None:
                    _add_product(d_weight, d_logits.mT, x)
            count = (targets != -100).sum().clamp(min=1)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(count, d_hidden, d_weight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        count, *grads = ctx.saved_tensors
        scale = d_loss / count
        d_hidden, d_weight = (
            None if grad is None else (grad.to(scale.dtype) * scale).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return d_hidden, d_weight, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the dtype of `total`, which is at least that of `a` and `b`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":  # half precision in, fp32 out, in one product
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
