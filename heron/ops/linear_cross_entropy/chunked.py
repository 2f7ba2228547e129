"""The loss over chunks of rows: no more than one chunk of logits ever exists, in the forward or in the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGITS_PER_CHUNK = 1 << 24


def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, chunk_rows: int | None = None
) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy` in chunks of rows. Inputs (rows, C), (V, C), (rows,).

    The gradients are computed in the forward, while a chunk's logits exist, and only scaled in the backward.
    `chunk_rows`: rows in a chunk; None: as many as keep a chunk near 2^24 logits.
    """
    if chunk_rows is None:
        chunk_rows = max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    grad_mode = torch.is_grad_enabled()
    return _Chunked.apply(hidden, weight, targets, l2wrap, chunk_rows, grad_mode)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, l2wrap, chunk_rows, grad_mode):
        device = hidden.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        dtype = torch.promote_types(product_dtype, torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=product_dtype) if grad_mode and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if grad_mode and ctx.needs_input_grad[1] else None

        with torch.autocast(device, enabled=False):
            weight = weight.to(product_dtype)
            total = hidden.new_zeros((), dtype=dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                x = hidden[rows].to(product_dtype)
                counted = (targets[rows] != -100).unsqueeze(-1)
                target = targets[rows].clamp(min=0).unsqueeze(-1)
                logits = (x @ weight.mT).to(dtype)
                largest, where = logits.max(dim=-1, keepdim=True)
                at_target = logits.gather(-1, target)
                exp = logits.sub_(largest).exp_()
                normaliser = exp.sum(dim=-1, keepdim=True)
                total += (largest + normaliser.log() - at_target).masked_fill(~counted, 0).sum()
                if d_hidden is None and d_weight is None:
                    continue
                # The gradient of count * loss; 1 / count comes last, so that half precision doesn't underflow.
                d_logits = exp.mul_(counted / normaliser)
                d_logits.scatter_add_(-1, target, -counted.to(dtype))
                d_logits.scatter_add_(-1, where, l2wrap * largest * counted)
                d_logits = d_logits.to(product_dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[rows])
                if d_weight is not None and product_dtype == dtype:
                    d_weight.addmm_(d_logits.mT, x)
                elif d_weight is not None:
                    d_weight += d_logits.mT @ x
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
        return d_hidden, d_weight, None, None, None, None
