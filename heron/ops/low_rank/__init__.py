"""A frozen linear layer with an update of low rank that trains. README.md says what it reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.low_rank.in_place import low_rank_linear_in_place
from heron.ops.low_rank.reference import low_rank_linear_reference

__all__ = ["low_rank_linear", "low_rank_linear_choice", "low_rank_linear_reference"]
_FORMS = {"reference": low_rank_linear_reference, "in_place": low_rank_linear_in_place}


def low_rank_linear_choice(device: torch.device) -> _choice.Choice:
    """The form that "auto" takes on `device`."""
    if device.type == "cuda":
        return _choice.Choice("in_place", "the large product is added to the update where that lies")
    return _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")


def low_rank_linear(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0, impl: str = "auto"
) -> Tensor:
    """LoRA (arXiv:2106.09685, section 4.1)::

        y = x weight^T + scale (x down^T) up^T

    Args:
        x: (..., in), a floating dtype.
        weight: (out, in); it gets no gradient.
        down: (rank, in).
        up: (out, rank).
        impl: "reference", "in_place" (any device; rounds y once), or "auto": "in_place" on a GPU.

    Returns:
        y (..., out).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, a weight that wants a gradient, or an unknown
            `impl`.
    """
    (n_out, n_in), rank = weight.shape, down.shape[0]
    if x.shape[-1] != n_in or down.shape != (rank, n_in) or up.shape != (n_out, rank):
        raise KernelError(
            f"low_rank_linear: wanted x (..., {n_in}), down (rank, {n_in}) and up ({n_out}, rank) for a weight of "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}, {tuple(down.shape)}, {tuple(up.shape)}"
        )
    if len({(tensor.dtype, tensor.device) for tensor in (x, weight, down, up)}) > 1:
        told = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (x, weight, down, up))
        raise KernelError(f"low_rank_linear: x, weight, down and up must have one dtype and device, got {told}")
    if weight.requires_grad:
        raise KernelError("low_rank_linear: the weight is frozen here; weight.requires_grad_(False)")
    if impl == "auto":
        impl = low_rank_linear_choice(x.device).impl
    return _choice.form_of("low_rank_linear", impl, _FORMS)(x, weight, down, up, scale)
