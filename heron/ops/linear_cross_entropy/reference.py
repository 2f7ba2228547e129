"""The loss, the definition: all logits at once, cross entropy by PyTorch, and L2Wrap as a function of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.errors import KernelError
from heron.ops import _graph

Bonus = tuple[Tensor, Tensor]  # ids (..., K) int64, and values (..., K) that are added to the logits there


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


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, bonus: Bonus | None = None
) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy`, literally. Inputs (rows, C), (V, C), (rows,), twice (rows, K)."""
    return _of_rows(F.linear(hidden, weight), targets, l2wrap, bonus)


def cross_entropy(logits: Tensor, targets: Tensor, l2wrap: float = 1e-4, bonus: Bonus | None = None) -> Tensor:
    """:func:`heron.ops.linear_cross_entropy` behind the product, for a head that is more than one: (..., V), (...).

    The values of `bonus` have the dtype of `logits` or fp32.

    Raises:
        KernelError: a `bonus` that does not fit `targets` and `logits`, or (on the CPU) an id that is not in [0, V).
    """
    if bonus is not None:
        bonus = bonus_in_rows("cross_entropy", bonus, targets, logits.shape[-1], logits)
    return _of_rows(logits.flatten(0, -2), targets.flatten(), l2wrap, bonus)


def _of_rows(logits: Tensor, targets: Tensor, l2wrap: float, bonus: Bonus | None) -> Tensor:
    if bonus is not None:
        logits = logits.scatter_add(-1, bonus[0], bonus[1].to(logits.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != -100
    count = counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
    return _L2Wrap.apply(loss, logits, counted, l2wrap / count.to(loss.dtype))


def bonus_in_rows(op: str, bonus: Bonus, targets: Tensor, vocab_size: int, like: Tensor) -> Bonus:
    """`bonus` of targets (...) as (rows, K) each.

    Raises:
        KernelError: its shape does not fit `targets`, or its dtypes or devices do not fit `like`; or (on the CPU) an id
            is not in [0, V).
    """
    ids, values = bonus
    if ids.dim() < 1 or ids.shape[:-1] != targets.shape or ids.dtype != torch.int64:
        wanted = ", ".join(map(str, (*targets.shape, "K")))
        raise KernelError(f"{op}: the ids of bonus must be ({wanted}) int64, got {tuple(ids.shape)} {ids.dtype}")
    if values.shape != ids.shape or values.dtype not in (like.dtype, torch.float32):
        dtypes = " or ".join(dict.fromkeys(map(str, (like.dtype, torch.float32))))
        raise KernelError(
            f"{op}: the values of bonus must be {tuple(ids.shape)} like its ids, in {dtypes}; "
            f"got {tuple(values.shape)} {values.dtype}"
        )
    if ids.device != like.device or values.device != like.device:
        raise KernelError(
            f"{op}: all tensors must be on {like.device}; the ids of bonus are on {ids.device}, "
            f"its values on {values.device}"
        )
    if not _graph.in_graph():
        check_ids(op, "the ids of bonus", ids, vocab_size)
    return ids.reshape(targets.numel(), ids.shape[-1]), values.reshape(targets.numel(), ids.shape[-1])


def check_ids(op: str, name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """KernelError for an id on the CPU that is neither in [0, V) nor `ignored`."""
    if ids.device.type != "cpu":
        return
    bad = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        bad &= ids != ignored
    if bad.any():
        where = bad.nonzero()[0].tolist()
        wanted = f"in [0, {vocab_size})" if ignored is None else f"in [0, {vocab_size}) or {ignored} to be ignored"
        raise KernelError(f"{op}: {name} must be {wanted}; got {ids[tuple(where)].item()} at position {where}")
