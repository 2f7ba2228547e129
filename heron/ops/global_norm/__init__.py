"""The norm of all gradients of a training step, and what it says about the step. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.global_norm import cuda
from heron.ops.global_norm.reference import global_norm_reference, verdict_reference

_NORMS = {"reference": global_norm_reference, "cuda": cuda.global_norm_cuda}
_VERDICTS = {"reference": verdict_reference, "cuda": cuda.verdict_cuda}


def global_norm_choice(device: torch.device, *dtypes: torch.dtype) -> _choice.Choice:
    """The form that "auto" takes for tensors of these dtypes on `device`."""
    other = _choice.Choice("reference", f"PyTorch's norms of lists; runs on {device.type}")
    return cuda.FORM.choice("one launch for a thousand tensors and one that adds up", other, device, *dtypes)


def global_norm(tensors: Sequence[Tensor], impl: str = "auto") -> Tensor:
    """The square root of the sum of the squares of all values of some tensors.

    "cuda" sums the squares of 64 values of a chunk in fp32, all further sums in fp64, in an order that depends on the
    shapes alone: equal values give equal bits, in bf16 and in fp32, wherever they lie. As in PyTorch's norms squares
    are in fp32: a value above 1.8e19 counts as infinite, and so do 64 that are added up if all are above 2.3e18; one
    below 2.6e-23 counts as zero. Of a value that is infinite or NaN the norm is infinite or NaN.

    Args:
        tensors: one or more, of any shapes, on one device; "cuda" takes bf16 and fp32, mixed as they come.
        impl: "reference" (PyTorch), "cuda" (kernels, built at first use), or "auto": "cuda" where it runs.

    Returns:
        An fp32 scalar on the device.

    Raises:
        KernelError: no tensor, or an `impl` that does not exist or run here.
    """
    if not tensors:
        raise KernelError("global_norm: wanted at least one tensor")
    if impl == "auto":
        impl = global_norm_choice(tensors[0].device, *{tensor.dtype for tensor in tensors}).impl
    return _choice.form_of("global_norm", impl, _NORMS)(tensors)


def verdict(loss: Tensor, norm: Tensor, limit: float, clip: float, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Say whether a training step is bad and what its gradients are divided by, on the device of its loss::

        bad      = 0 if loss and norm are finite and loss <= limit, else 1
        divisor  = max((norm + 1e-6) / clip, 1)                           1 where `clip` is 0; NaN of a norm that is NaN

    Args:
        loss, norm: fp32 scalars on one device.
        limit: the largest loss that is not bad; may be infinite.
        clip: the largest norm that gradients keep; 0: any.
        impl: as for :func:`global_norm`.

    Returns:
        bad and divisor, fp32 scalars there.

    Raises:
        KernelError: an `impl` that does not exist or run here.
    """
    if impl == "auto":
        impl = global_norm_choice(loss.device, loss.dtype, norm.dtype).impl
    return _choice.form_of("verdict", impl, _VERDICTS)(loss, norm, limit, clip)
