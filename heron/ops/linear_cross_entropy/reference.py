"""The loss, the definition: all logits at once, cross entropy by PyTorch, and L2Wrap as a function of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _L2Wrap(torch.autograd.Function):
    """The identity on `loss`, whose backward also sends each counted row's ``c * max_logit`` to its largest logit."""

    @staticmethod
    def forward(ctx, loss: Tensor, logits: Tensor, counted: Tensor, c: Tensor) -> Tensor:
        largest, where = logits.max(dim=-1, keepdim=True)
        ctx.save_for_backward(c * largest * counted.unsqueeze(-1), where)
        ctx.logits_shape = logits.shape
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        pull, where = ctx.saved_tensors
        d_logits = pull.new_zeros(ctx.logits_shape).scatter_(-1, where, d_loss * pull)
        return d_loss, d_logits, None, None


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy`, literally. Inputs (rows, C), (V, C), (rows,)."""
    return cross_entropy(F.linear(hidden, weight), targets, l2wrap)


def cross_entropy(logits: Tensor, targets: Tensor, l2wrap: float = 1e-4) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy` behind the product, for a head that is more than one: (..., V), (...)."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != -100
    count = counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
    return _L2Wrap.apply(loss, logits, counted, l2wrap / count.to(loss.dtype))
