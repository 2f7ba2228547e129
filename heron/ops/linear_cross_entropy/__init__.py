"""The language-model loss: output projection, cross entropy and L2Wrap as one operator. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice, _graph
from heron.ops.linear_cross_entropy import cuda
from heron.ops.linear_cross_entropy.chunked import (
    check_targets,
    linear_cross_entropy_chunked,
    linear_cross_entropy_cuda,
)
from heron.ops.linear_cross_entropy.reference import (
    Bonus,
    bonus_in_rows,
    cross_entropy,
    linear_cross_entropy_reference,
)

__all__ = ["cross_entropy", "linear_cross_entropy"]

_FORMS = {
    "reference": linear_cross_entropy_reference,
    "chunked": linear_cross_entropy_chunked,
    "cuda": linear_cross_entropy_cuda,
}


def linear_cross_entropy_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> _choice.Choice:
    """The form that "auto" takes for hidden states of `dtype` on `device`."""
    other = _choice.Choice("chunked", f"a bounded number of logits at a time; runs on {device.type}")
    return cuda.FORM.choice("a bounded number of logits at a time, each read and written once", other, device, dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float = 1e-4,
    impl: str = "auto",
    bonus: Bonus | None = None,
) -> Tensor:
    """Mean cross entropy of ``hidden @ weight.T`` against `targets`, with L2Wrap in the backward::

        logits = hidden @ weight.T,   then  logits[row, ids[row, k]] += values[row, k]  for each k of the bonus
        loss   = mean over the counted targets of  logsumexp(logits) - logits[target]
        d_loss = gradient of  loss + (c / 2) * sum over the counted rows of  max(logits)^2,   c = l2wrap / count

    The value returned is the cross entropy alone. Both parts of the gradient scale with the incoming one.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp (L2Wrap); counting only the targets that aren't ignored is ours.

    Args:
        hidden: (..., C), a floating dtype.
        weight: (V, C), the dtype of `hidden` unless autocast is on, which then decides the dtype of the products.
        targets: (...) int64 in [0, V), or -100 to be ignored. With none counted the loss and its gradients are 0.
        l2wrap: weight of L2Wrap; 0 leaves plain cross entropy.
        impl: "reference" (all logits at once), "chunked" (a bounded number of rows at a time, gradients computed
            along with the loss), "cuda" (the same with a kernel for the rows, built at first use), or "auto": "cuda"
            where it runs, else "chunked".
        bonus: (ids, values), what is added to single logits: ids (..., K) int64 in [0, V), which may repeat (then each
            value is added), values (..., K) in the dtype of `hidden` or fp32. They are added in the dtype of the
            logits. Gradients flow into values; L2Wrap acts on the logits with the bonus.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an `impl` that does not exist, or a target
            that is neither in [0, V) nor -100, or an id of `bonus` that is not in [0, V) (on the CPU; other devices
            report these two in their own way, unsynchronised).
    """
    _check(hidden, weight, targets)
    if bonus is not None:
        bonus = bonus_in_rows("linear_cross_entropy", bonus, targets, weight.shape[0], hidden)
    if impl == "auto":
        impl = linear_cross_entropy_choice(hidden.device, hidden.dtype).impl
    form = _choice.form_of("linear_cross_entropy", impl, _FORMS)
    return form(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), l2wrap, bonus=bonus)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise KernelError(
            f"linear_cross_entropy: hidden must be (..., C) and floating, got {tuple(hidden.shape)} {hidden.dtype}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.is_floating_point():
        raise KernelError(
            f"linear_cross_entropy: weight must be (V, C) with C = {hidden.shape[-1]} and floating, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise KernelError(
            f"linear_cross_entropy: weight must have the dtype of hidden, {hidden.dtype}, unless autocast is on; "
            f"got {weight.dtype}"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise KernelError(
            f"linear_cross_entropy: targets must be {tuple(hidden.shape[:-1])} int64, "
            f"got {tuple(targets.shape)} {targets.dtype}"
        )
    if weight.device != hidden.device or targets.device != hidden.device:
        raise KernelError(
            f"linear_cross_entropy: all tensors must be on {hidden.device}; "
            f"weight is on {weight.device}, targets on {targets.device}"
        )
    if not _graph.in_graph():  # there the operator looks, when it runs
        check_targets(targets, weight.shape[0])
